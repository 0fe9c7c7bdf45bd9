"""Hugging Face models that lie in a folder, loaded without asking any server.

config = load_config("/models/some-llm")                     # is_encoder_decoder and the like
model = load_model("/models/some-llm")                       # fp32, causal or sequence-to-sequence as the config says
tokenizer = load_tokenizer("s3://bucket/some-llm")           # a URL is copied to this machine first
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dltrain.errors import MissingExtraError, UserError
from dltrain.store import open_store

__all__ = ["load_config", "load_model", "load_tokenizer", "needed"]


def needed(package: str) -> Any:
    """transformers or peft; seconds pass before the first is there, so it is imported where it is used."""
    try:
        found = importlib.import_module(package)
    except ImportError:
        raise MissingExtraError(package, "hf") from None
    if package == "transformers":
        # Its bars would be in every worker's log.
        found.utils.logging.disable_progress_bar()
    return found


@contextmanager
def _on_disk(folder: str) -> Iterator[str]:
    """The folder's path on this machine; what is elsewhere is copied for as long as it is read."""
    store = open_store(folder)
    if not store.exists("config.json"):
        raise UserError(f"args.model: {folder} has no config.json; name a folder as `save_pretrained` writes it")
    if "://" not in folder:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="dltrain-model-") as directory:
        for name in store.list():
            path = Path(directory, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(store.read(name))
        yield directory


def load_config(folder: str) -> Any:
    """The model's configuration."""
    with _on_disk(folder) as path:
        return needed("transformers").AutoConfig.from_pretrained(path, local_files_only=True)


def load_tokenizer(folder: str) -> Any:
    """The model's tokenizer, which must have a token that ends a text."""
    with _on_disk(folder) as path:
        found = needed("transformers").AutoTokenizer.from_pretrained(path, local_files_only=True)
    if found.eos_token_id is None:
        raise UserError(f"args.model: the tokenizer in {folder} has no eos_token, with which each answer ends")
    return found


def load_model(folder: str) -> nn.Module:
    """The model with a head that writes text, on the CPU, in fp32."""
    hf = needed("transformers")
    kind = hf.AutoModelForSeq2SeqLM if load_config(folder).is_encoder_decoder else hf.AutoModelForCausalLM
    with _on_disk(folder) as path:
        model: nn.Module = kind.from_pretrained(path, local_files_only=True, dtype=torch.float32)
    for module in model.modules():
        _keep_exact(module)
    return model


def _keep_exact(module: nn.Module) -> None:
    """Buffers that no file has, such as frequencies of rotary positions, stay in fp32 when the weights become bf16."""
    names = module._non_persistent_buffers_set
    exact = {name: module._buffers[name] for name in names if module._buffers[name] is not None}
    exact = {name: one for name, one in exact.items() if one.is_floating_point()}
    if not exact:
        return
    own = module._apply

    def apply(change: Any, recurse: bool = True) -> nn.Module:
        own(change, recurse)
        for name, one in exact.items():
            module._buffers[name] = one.to(module._buffers[name].device)
        return module

    module._apply = apply
