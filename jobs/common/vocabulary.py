"""Words and pieces of words as numbers: a byte-pair vocabulary that is learned from text and lies beside the data.

vocabulary = learn(texts, size=2048, special=("<end>",))     # a tokenizers.Tokenizer; nothing is unknown to it
save(url, vocabulary)                                        # url/vocabulary.json
vocabulary = load(f"{url}/vocabulary.json")
vocabulary.encode("some text").ids, vocabulary.decode([3, 4])
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["FILE", "characters", "learn", "load", "pack_row", "pad", "save"]

FILE = "vocabulary.json"


def learn(texts: Iterable[str], size: int, special: Sequence[str] = ("<end>",)) -> Any:
    """Merges the pairs of pieces that are the most frequent, until there are `size`; special ones are 0, 1, ..."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    vocabulary = Tokenizer(models.BPE())
    vocabulary.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary.decoder = decoders.ByteLevel()
    # With all bytes in it there is no text that it can't say.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    vocabulary.train_from_iterator(texts, trainer)
    return vocabulary


def save(url: str, vocabulary: Any) -> None:
    """Writes it below a URL."""
    from dltrain.store import open_store

    open_store(url).write(FILE, vocabulary.to_str().encode())


@lru_cache(maxsize=8)
def load(url: str) -> Any:
    """Reads what `save` wrote.

    Raises:
        UserError: there is none.
    """
    from tokenizers import Tokenizer

    from dltrain.errors import UserError
    from dltrain.store import open_store

    parent, _, name = url.rpartition("/")
    try:
        return Tokenizer.from_str(open_store(parent or ".").read(name).decode())
    except FileNotFoundError:
        raise UserError(f"args.vocabulary: no file {url}; the job's make-data writes it beside the data") from None


def characters(vocabulary: Any) -> npt.NDArray[np.int64]:
    """(size,): how many characters each piece adds to a text; a special one, such as the end, counts as one."""
    from tokenizers import pre_tokenizers

    # A piece spells bytes, each as one letter. In UTF-8 a character has one byte that is not a continuation.
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    later = {spelled.pre_tokenize_str(chr(code))[0][0][1] for code in range(0x80, 0xC0)}
    special = set(vocabulary.get_added_tokens_decoder())
    counts = np.ones(vocabulary.get_vocab_size(), np.int64)
    for piece, index in vocabulary.get_vocab().items():
        if index not in special:
            counts[index] = sum(letter not in later for letter in piece)
    return counts


def pad(rows: Sequence[Sequence[int]], length: int = 0) -> npt.NDArray[np.int64]:
    """(rows, longest or `length`), 0 after the end of each."""
    found = np.zeros((len(rows), max([length, *map(len, rows)])), np.int64)
    for row, ids in zip(found, rows, strict=True):
        row[: len(ids)] = ids
    return found


def pack_row(column: str, ids: Sequence[int], length: int) -> dict[str, Any]:
    """A row as `data.pack` makes them, of one text; of a longer one its end."""
    ids = list(ids)[-length:]
    gap = [0] * (length - len(ids))
    return {column: [*ids, *gap], "segment_ids": [1] * len(ids) + gap, "num_tokens": len(ids)}
