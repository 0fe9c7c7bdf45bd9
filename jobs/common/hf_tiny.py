"""A Hugging Face model folder of a few thousand random weights, for trials and tests.

write_tiny(".data/finetune_hf/model", texts)                # a decoder; kind="gpt2", or "t5" for an encoder-decoder
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from dltrain.store import open_store
from jobs.common import vocabulary
from jobs.common.hf import needed

__all__ = ["write_tiny"]

PAD, BEGIN, END = "<pad>", "<begin>", "<end>"


def write_tiny(url: str, texts: Iterable[str], kind: str = "llama", size: int = 512, width: int = 32) -> None:
    """Writes a model as `save_pretrained` does, with a tokenizer that is learned from some texts."""
    hf = needed("transformers")
    pieces = vocabulary.learn(texts, size, (PAD, BEGIN, END))
    names = {"pad_token": PAD, "bos_token": BEGIN, "eos_token": END}
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=pieces, **names)
    with torch.random.fork_rng([]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        _model(hf, kind, len(tokenizer), width).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        store = open_store(url)
        for path in sorted(Path(folder).iterdir()):
            store.write(path.name, path.read_bytes())


def _model(hf: Any, kind: str, size: int, width: int) -> Any:
    ids = {"vocab_size": size, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "llama":
        shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
        return hf.LlamaForCausalLM(hf.LlamaConfig(**ids, **shape, **heads, tie_word_embeddings=True))
    if kind == "gpt2":
        sizes = {"n_embd": width, "n_layer": 2, "n_head": 4, "n_positions": 512}
        return hf.GPT2LMHeadModel(hf.GPT2Config(**ids, **sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    sizes = {"d_model": width, "d_ff": 2 * width, "d_kv": width // 4, "num_layers": 2, "num_heads": 4}
    more = {"feed_forward_proj": "gated-gelu", "dropout_rate": 0.0, "decoder_start_token_id": 0}
    return hf.T5ForConditionalGeneration(hf.T5Config(**ids, **sizes, **more))
