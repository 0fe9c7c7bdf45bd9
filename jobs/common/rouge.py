"""How much of a summary is in another one, word by word in order: ROUGE-L, by Google's rouge-score.

rouge_l(["Returns the sum"], ["Return a sum"])       # [0.67]: "return" and "sum" of three words each
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

__all__ = ["rouge_l"]


def rouge_l(said: Sequence[str], wanted: Sequence[str]) -> list[float]:
    """F-measures between 0 and 1, of stems of words."""
    return [float(_scorer().score(b, a)["rougeL"].fmeasure) for a, b in zip(said, wanted, strict=True)]


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)
