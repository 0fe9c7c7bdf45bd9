"""Kubernetes' quantities: "500m", "16Gi", "1e3".

quantity("16Gi")     # Fraction(17179869184)
mebibytes(2**31)     # "2048Mi"
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

__all__ = ["mebibytes", "quantity"]

_FACTORS = {"": Fraction(1), "m": Fraction(1, 1000)}
_FACTORS |= {letter: Fraction(1000**power) for power, letter in enumerate("kMGTPE", 1)}
_FACTORS |= {f"{letter}i": Fraction(1024**power) for power, letter in enumerate("KMGTPE", 1)}


def quantity(text: Any) -> Fraction:
    """The number that a quantity stands for.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(?:([a-zA-Z]{0,2})|[eE]([+-]?\d{1,2}))", str(text))
    if not found or (found[2] or "") not in _FACTORS:
        raise ValueError(f"found {text!r}, which is not a quantity; write it as 4, 500m or 16Gi")
    exponent = Fraction(10) ** int(found[3]) if found[3] else _FACTORS[found[2] or ""]
    return Fraction(found[1]) * exponent


def mebibytes(num_bytes: int | Fraction) -> str:
    """Bytes as a quantity, rounded down to whole MiB, in Gi where that is exact."""
    mebi = int(num_bytes // 2**20)
    return f"{mebi // 1024}Gi" if mebi % 1024 == 0 else f"{mebi}Mi"
