"""Text as the tokens of a Hugging Face model: questions with answers, and which tokens are to be learned.

tokens = marked(tokenizer, "Which is larger, 3 or 5?", "5.")        # the answer and its end have LEARNED set
tokens = marked(tokenizer, "", "any text")                           # all of a text is learned

A tokenizer's chat template is followed; without one a question is a line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["LEARNED", "as_source", "as_target", "asked", "marked"]

# This bit of a token says that it is to be predicted. Packing keeps the tokens alone.
LEARNED = 1 << 30


def asked(tokenizer: Any, prompt: str) -> list[int]:
    """What an answer follows; an empty prompt is the beginning of a text."""
    if prompt and tokenizer.chat_template:
        said = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = list(tokenizer(f"{prompt}\n" if prompt else "")["input_ids"])
    # Some tokenizers put an end after each text.
    ids = ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
    # A text must follow something, or its first token could not be learned.
    return ids or [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]


def marked(tokenizer: Any, prompt: str, answer: str) -> list[int]:
    """A prompt and its answer, for a causal model."""
    ids = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return [*asked(tokenizer, prompt), *(token | LEARNED for token in ids)]


def as_source(tokenizer: Any, texts: Sequence[str], longest: int) -> list[list[int]]:
    """What the encoder of a sequence-to-sequence model reads."""
    return [list(ids) for ids in tokenizer(list(texts), truncation=True, max_length=longest)["input_ids"]]


def as_target(tokenizer: Any, texts: Sequence[str], longest: int) -> list[list[int]]:
    """What it is to write, to the end."""
    end = tokenizer.eos_token_id
    found = tokenizer(text_target=list(texts), truncation=True, max_length=longest)["input_ids"]
    return [[*ids, *([end] if ids[-1:] != [end] else [])] for ids in found]
