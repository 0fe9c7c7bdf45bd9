"""Docstrings as texts and their summaries: what is said after the first line, and the first line.

summary_splits()                 # {"train": table, "eval": table} of package, text, summary; packages are held out

A docstring counts if its first line is one sentence of 4 to 16 words and its body has paragraphs of prose, of 12 words
at least. Nothing is asked of what they have in common, in training or in the test. Of the body the prose is kept, not
headings, lists of parameters or code: up to 80 words. No body and no summary comes twice, and none of the test is in
the training data, whichever package it is of.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa

from jobs.common.docstrings import Docstring, docstrings, site_packages, standard_library
from jobs.common.prose import held_out, paragraphs

__all__ = ["Pair", "first_sentence", "pair", "pairs", "summary_splits"]

WORDS, SUMMARY_WORDS = (12, 80), (4, 16)
# Of one package there are so many, those with the least checksums: the large ones are not to be the whole test.
MOST = {"train": 2500, "eval": 150}


class Pair(NamedTuple):
    """A docstring's body, as one line of prose, and its first line."""

    package: str
    text: str
    summary: str


def pair(one: Docstring) -> Pair | None:
    """What a docstring gives; None where it does not count."""
    first, _, rest = one.text.partition("\n\n")
    summary = " ".join(first.split())
    words = " ".join(paragraphs(rest)).split()
    good = re.fullmatch(r"[A-Z][\x20-\x7e]*[a-z)\"'`\d]\.", summary) and ". " not in summary
    if not good or len(words) < WORDS[0] or not SUMMARY_WORDS[0] <= len(summary.split()) <= SUMMARY_WORDS[1]:
        return None
    return Pair(one.module.split(".")[0], " ".join(words[: WORDS[1]]), summary)


def first_sentence(text: str) -> str:
    """The lead: what a reader takes for a summary who has nothing else."""
    return re.split(r"(?<=[.:!?])\s+(?=[A-Z\"'`(])", text, maxsplit=1)[0]


def pairs() -> Iterator[Pair]:
    """Those of the standard library and of all installed packages."""
    for root in (standard_library(), site_packages()):
        yield from (found for one in docstrings(root) if (found := pair(one)))


def summary_splits(one_in: int = 6, most: dict[str, int] = MOST) -> dict[str, pa.Table]:
    """Rows by split; a package is in one of them alone."""
    found: dict[str, dict[str, list[Pair]]] = {"train": {}, "eval": {}}
    for one in pairs():
        found["eval" if held_out(one.package, one_in) else "train"].setdefault(one.package, []).append(one)
    chosen = {
        split: [one for some in packages.values() for one in _fewer(some, most[split])]
        for split, packages in found.items()
    }
    known = {text for one in chosen["train"] for text in one[1:]}
    chosen["eval"] = [one for one in chosen["eval"] if not known & set(one[1:])]
    return {split: pa.Table.from_pylist([one._asdict() for one in _once(some)]) for split, some in chosen.items()}


def _fewer(some: list[Pair], most: int) -> list[Pair]:
    return sorted(_once(some), key=lambda one: zlib.crc32(one.text.encode()))[:most]


def _once(some: list[Pair]) -> list[Pair]:
    """Without those whose body or summary came before."""
    bodies = {one.text: one for one in reversed(some)}
    return list({one.summary: one for one in reversed(bodies.values())}.values())
