"""Texts as data for `data.pack`: Parquet with each text, and what a vocabulary makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa

from jobs.common import vocabulary
from jobs.common.data import write_splits

__all__ = ["END", "write_texts"]

# The first of a vocabulary's special tokens: of every text.
END = 0


def write_texts(url: str, texts: Mapping[str, Sequence[str]], size: int) -> dict[str, int]:
    """Writes `text` and `tokens` of texts by split, and a vocabulary of `size` learned from the training texts."""
    words = vocabulary.learn(texts["train"], size)
    vocabulary.save(url, words)
    tokens = {name: [[*one.ids, END] for one in words.encode_batch(list(some))] for name, some in texts.items()}
    kind = pa.list_(pa.int32())
    tables = {name: pa.table({"text": some, "tokens": pa.array(tokens[name], kind)}) for name, some in texts.items()}
    return write_splits(url, tables)
