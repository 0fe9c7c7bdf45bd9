"""Data for a Hugging Face model: questions to try it with, and the tokens of what a user has.

write_splits(url, {"train": tokenized(tokenizer, questions(4000, test=False))})
tokenize("/models/some-llm", "s3://bucket/questions", "s3://bucket/tokens")      # Parquet in, Parquet out
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dltrain.errors import DataError
from dltrain.store import open_store
from jobs.common import hf
from jobs.common.dialogues import SKILLS
from jobs.common.hf_text import marked

__all__ = ["questions", "tokenize", "tokenized"]


def questions(count: int, test: bool) -> pa.Table:
    """`prompt` and `answer`, of those skills that take a single question."""
    rng = np.random.default_rng(int(test))
    skills = SKILLS[1:]
    said = [skills[int(rng.integers(len(skills)))](rng, test)[0] for _ in range(count)]
    return pa.table({"prompt": [one[0] for one in said], "answer": [one[1] for one in said]})


def tokenized(tokenizer: Any, table: pa.Table) -> pa.Table:
    """A table that has `prompt` and `answer`, or `text`, with the column `tokens` beside them."""
    names = set(table.column_names)
    if not {"prompt", "answer"} <= names and "text" not in names:
        raise DataError(f"found the columns {', '.join(table.column_names)}; prompt and answer are needed, or text")
    answers = table["answer" if {"prompt", "answer"} <= names else "text"].to_pylist()
    prompts = table["prompt"].to_pylist() if {"prompt", "answer"} <= names else [""] * len(answers)
    tokens = [marked(tokenizer, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    kept = table.drop_columns(["tokens"]) if "tokens" in names else table
    return kept.append_column("tokens", pa.array(tokens, pa.list_(pa.int32())))


def tokenize(model: str, source: str, target: str) -> str:
    """Writes Parquet that has prompt and answer, or text, with the model's tokens beside them, for data.pack."""
    tokenizer, here, there = hf.load_tokenizer(model), open_store(source), open_store(target)
    names = [name for name in here.list() if name.endswith(".parquet")]
    if not names:
        raise DataError(f"there is no Parquet under {source}")
    for name in names:
        sink = io.BytesIO()
        table = tokenized(tokenizer, pq.read_table(io.BytesIO(here.read(name))))
        pq.write_table(table, sink, row_group_size=4096, compression="zstd")
        there.write(name, sink.getvalue())
    return f"wrote {len(names)} files to {target}"
