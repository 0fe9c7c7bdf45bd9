"""What is done to a Hugging Face model before and after it is trained: LoRA, a test of packing, a folder of its own.

model = with_lora(model, rank=8, targets="all-linear")
check_packs(model)                                           # do texts of one row stay apart?
export("finetune-hf", "tuned", "bf16")                       # a run's model; what LoRA learned is merged

LoRA: Hu and others, arXiv:2106.09685.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import dltrain
from dltrain.errors import UserError
from jobs.common.hf import needed

__all__ = ["DTYPES", "check_packs", "export", "save_model", "with_lora"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def with_lora(model: nn.Module, rank: int, targets: str | Sequence[str]) -> nn.Module:
    """The model with its weights frozen, and two thin matrices to be trained beside each of those that are named."""
    peft = needed("peft")
    kind = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    named = targets if isinstance(targets, str) else list(targets)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=named, task_type=kind)
    try:
        # It warns of what it then sets right: which way round a layer's weights lie.
        with warnings.catch_warnings(action="ignore"):
            made: nn.Module = peft.get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"args.targets: {error}") from None
    return made


def check_packs(model: nn.Module) -> None:
    """Raises UserError where a text that follows another one in a row would see it."""
    tokens, places = torch.arange(1, 7).repeat(2)[None], torch.arange(6).repeat(2)[None]
    training = model.training
    try:
        with torch.no_grad():
            scores = model.eval()(input_ids=tokens, position_ids=places, use_cache=False).logits[0]
        same = torch.allclose(scores[:6], scores[6:], rtol=1e-3, atol=1e-3)
    except TypeError:
        same = False
    finally:
        model.train(training)
    if not same:
        raise UserError(
            f"args.packed: {type(model).__name__} does not keep texts in one row apart by their positions; set "
            "args.packed to 0 and leave data.pack out"
        )


def save_model(model: nn.Module, tokenizer: Any, folder: str, dtype: str = "fp32") -> None:
    """Writes what `from_pretrained` reads; the folder appears when all of it is there."""
    if dtype not in DTYPES:
        raise UserError(f"found {dtype!r}; the weights can be written in {', '.join(DTYPES)}")
    merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    unfinished = f"{folder.rstrip('/')}.unfinished"
    merged.to(DTYPES[dtype]).save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    os.replace(unfinished, folder)


def export(run: str, folder: str, dtype: str = "fp32") -> str:
    """Writes a run's best model as `from_pretrained` reads it, LoRA merged into the weights."""
    if os.path.exists(folder):
        raise UserError(f"{folder} is there already; name a new folder")
    trained = dltrain.load(run, device="cpu")
    save_model(trained.module, trained.task.tokenizer, folder, dtype)
    return f"wrote step {trained.step} of {trained.trained.run} to {folder}"
