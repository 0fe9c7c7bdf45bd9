"""English that this machine has: CPython's documentation, as sentences, in two parts.

manual_splits()                      # {"train": [paragraph, ...], "eval": [...]}
held_out("numpy.linalg", 10)         # the same tenth of all names, on any machine
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from jobs.common.docstrings import docstrings, standard_library

__all__ = ["held_out", "manual", "manual_splits", "paragraphs", "topics"]


def topics() -> list[tuple[str, str]]:
    """Chapters of the language reference by name, as `help("if")` shows them."""
    from pydoc_data.topics import topics as found

    return sorted(found.items())


def manual() -> Iterator[tuple[str, str]]:
    """The language reference and the standard library's docstrings: (chapter or module, text)."""
    yield from ((f"topic {name}", text) for name, text in topics())
    yield from ((one.module, one.text) for one in docstrings(standard_library()))


def paragraphs(text: str) -> Iterator[str]:
    """Those that are sentences, each as one line: no headings, tables, code or grammar."""
    for block in text.split("\n\n"):
        line = " ".join(block.split())
        plain = sum(letter.isalpha() or letter in " ,." for letter in line)
        if len(line) >= 60 and line[0].isalpha() and line[-1] in ".:" and plain >= 0.9 * len(line):
            yield line


def manual_splits(one_in: int = 10) -> dict[str, list[str]]:
    """`eval`: paragraphs of the chapters and modules that are held out; `train`: those of others, and none of these."""
    found: dict[str, dict[str, None]] = {"train": {}, "eval": {}}
    for source, text in manual():
        found["eval" if held_out(source, one_in) else "train"].update(dict.fromkeys(paragraphs(text)))
    return {"train": [one for one in found["train"] if one not in found["eval"]], "eval": list(found["eval"])}


def held_out(name: str, one_in: int) -> bool:
    """Whether a name is among the one in so many that are kept for tests; by its checksum."""
    return zlib.crc32(name.encode()) % one_in == 0
