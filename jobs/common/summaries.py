"""Docstrings as texts with a summary: the first line, and the sentences that follow it.

summary_splits(one_in=10)            # {"train": [Summary(package, text, summary), ...], "eval": [...]}
lead("It does this. And that.")      # "It does this."
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from jobs.common.docstrings import Docstring, docstrings, site_packages, standard_library
from jobs.common.progress import watched
from jobs.common.prose import held_out, paragraphs

__all__ = ["Summary", "lead", "plain", "summaries", "summary_splits"]

# Packages that explain themselves in sentences; of these as many as are installed.
PACKAGES = (
    *("numpy", "scipy", "pandas", "sklearn", "statsmodels", "sympy", "networkx", "nltk", "torch", "pyarrow", "arch"),
    *("cleanlab", "joblib", "PIL", "rich", "pydantic", "fsspec", "aiohttp", "attr", "babel", "click", "jinja2"),
    *("packaging", "huggingface_hub", "setuptools", "narwhals", "mpmath", "hypothesis", "sqlalchemy", "pygments"),
    *("absl", "grpc", "google", "docker", "urllib3", "requests", "yaml", "psutil", "typer", "regex", "patsy"),
    *("deepspeed", "matplotlib", "tensorboard", "opentelemetry", "anyio", "cryptography", "dateutil", "tornado"),
)
_ROLE = re.compile(r":[\w:+-]+:`(?:[^`<]*<)?~?!?([^`>]*)>?`")
_MARKS = re.compile(r"`+|\*\*|(?<!\w)\*(?=\w)|(?<=\w)\*(?!\w)|(?<=\w)_(?!\w)")
_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
# What begins a list of parameters, results or examples rather than a sentence.
_HEADING = re.compile(r"[\w ]{1,20}:")


class Summary(NamedTuple):
    """A text and what its author says it is in short, without reStructuredText's marks."""

    package: str
    text: str
    summary: str


def plain(text: str) -> str:
    """One line of text without reStructuredText's marks."""
    return " ".join(_MARKS.sub("", _ROLE.sub(r"\1", text)).split())


def lead(text: str) -> str:
    """Its first sentence."""
    return _END.split(text, maxsplit=1)[0]


def summaries(found: Iterable[Docstring], longest: int = 20) -> Iterator[Summary]:
    """Of docstrings that begin with one sentence of 3 to `longest` words, and go on with others."""
    for one in found:
        first, _, rest = one.text.partition("\n\n")
        summary, text = plain(first), plain(" ".join(paragraphs(rest)))
        words = summary.removesuffix(".").split()
        sentence = summary[:1].isupper() and not _END.search(summary) and re.fullmatch(r"[\w ,.'/()-]+", summary)
        if text and not _HEADING.match(text) and sentence and 3 <= len(words) <= longest:
            yield Summary(one.module.partition(".")[0], text, " ".join(words))


def summary_splits(one_in: int = 8, most: int = 1200, most_held_out: int = 40) -> dict[str, list[Summary]]:
    """`eval`: of packages that are held out; `train`: of others, and nothing of which either part is in `eval`.

    Args:
        one_in: packages, and modules of the standard library, of which one is held out.
        most, most_held_out: of a package, so that no large one is all there is.
    """
    everything = list(summaries(docstrings(standard_library())))
    for name in watched(PACKAGES, "reading packages"):
        found_there = islice(summaries(docstrings(site_packages() / name)), most)
        everything += [one._replace(package=name) for one in found_there]
    found: dict[str, list[Summary]] = {"train": [], "eval": []}
    seen: set[str] = set()
    number: Counter[str] = Counter()
    # Those that are held out come first: what others have in common with them is left out there.
    for one in sorted(everything, key=lambda one: not held_out(one.package, one_in)):
        tested = held_out(one.package, one_in)
        parts = {_key(one.text), _key(one.summary)}
        if parts & seen or (tested and number[one.package] >= most_held_out):
            continue
        number[one.package] += 1
        found["eval" if tested else "train"].append(one)
        seen |= parts
    return found


def _key(text: str) -> str:
    """What is the same in texts that differ in signs, capitals or their ends."""
    return "".join(filter(str.isalnum, text.lower()))[:60]
