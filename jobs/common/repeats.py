"""Text that a network writes without saying the same twice: no three pieces in a row come again.

texts = write_once(model, source, begin, end, most=32)      # as `write` of jobs.common.seq2seq

Paulus and others, "A deep reinforced model for abstractive summarization", arXiv:1705.04304.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["banned", "write_once"]


def banned(said: list[int], run: int = 3) -> set[int]:
    """Pieces that would end a run of so many that is in the text already."""
    last = said[len(said) - run + 1 :] if len(said) >= run - 1 else None
    places = range(len(said) - run + 1)
    return {said[i + run - 1] for i in places if said[i : i + run - 1] == last}


def write_once(
    model: Any, source: torch.Tensor, begin: torch.Tensor, end: int, most: int, run: int = 3
) -> list[list[int]]:
    """Of each source a text, the likeliest piece after each that repeats no run, to its end or `most` pieces.

    Args:
        source: (rows, length); begin: (rows,), what each text begins with.
    """
    cache: dict[Any, Any] = {}
    token = begin[:, None]
    rows: list[list[int]] = [[] for _ in range(len(source))]
    for _ in range(most):
        chances = model(source, token, cache=cache)[:, -1]
        for row, said in zip(chances, rows, strict=True):
            row[sorted(banned(said, run))] = float("-inf")
        token = chances.argmax(-1, keepdim=True)
        for said, piece in zip(rows, token[:, 0].tolist(), strict=True):
            said.append(piece)
        if all(end in said for said in rows):
            break
    return [said[: said.index(end)] if end in said else said for said in rows]
