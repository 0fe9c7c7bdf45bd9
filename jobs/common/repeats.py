"""Pieces that would say the same again: Paulus and others, "A deep reinforced model for abstractive summarization",
arXiv:1705.04304.

banned([5, 6, 5], run=2)          # {6}: 5, 6 is there already
"""

from __future__ import annotations

__all__ = ["banned"]


def banned(said: list[int], run: int) -> set[int]:
    """Pieces that would end a run of so many that is in the text already."""
    last = said[len(said) - run + 1 :] if len(said) >= run - 1 else None
    places = range(len(said) - run + 1)
    return {said[i + run - 1] for i in places if said[i : i + run - 1] == last}
