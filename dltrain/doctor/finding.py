"""A finding: what a check found, whether that is well, and what to do about it.

    fail("CPU op", "g++ is not installed", "the first run compiles it", "apt-get install g++")
    merged(findings)        # what several machines have alike as one line each

Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

__all__ = ["Finding", "Status", "at", "counts", "fail", "merged", "ok", "skip", "warn"]

Status = Literal["ok", "skip", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """What one check found in one place.

    Attributes:
        found: with numbers; why: it matters; todo: what to set, install or ask for.
        where: the machine, where there may be several.
    """

    name: str
    status: Status
    found: str
    why: str = ""
    todo: str = ""
    where: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def ok(name: str, found: str) -> Finding:
    """All is well."""
    return Finding(name, "ok", found)


def skip(name: str, found: str) -> Finding:
    """It could not be, or need not be, looked at."""
    return Finding(name, "skip", found)


def warn(name: str, found: str, why: str, todo: str) -> Finding:
    """A run works, but not as it could."""
    return Finding(name, "warn", found, why, todo)


def fail(name: str, found: str, why: str, todo: str) -> Finding:
    """A run would end, hang, or break a promise."""
    return Finding(name, "fail", found, why, todo)


def at(where: str, findings: Iterable[Finding]) -> list[Finding]:
    """The same findings, of a machine."""
    return [replace(finding, where=where) for finding in findings]


def counts(findings: Iterable[Finding]) -> dict[Status, int]:
    """How many there are of each status."""
    found: dict[Status, int] = {"fail": 0, "warn": 0, "skip": 0, "ok": 0}
    for finding in findings:
        found[finding.status] += 1
    return found


def merged(findings: Sequence[Finding]) -> list[Finding]:
    """For people: machines that have the same to say share a line; where all is well the first one's words stand."""
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for f in findings:
        # Numbers differ between healthy machines; they are of no interest then.
        text = f.found if f.status in ("warn", "fail") or not f.where else ""
        groups.setdefault((f.name, f.status, text, f.todo), []).append(f)
    return [replace(group[0], where=_places(group)) for group in groups.values()]


def _places(group: Sequence[Finding]) -> str:
    places = list(dict.fromkeys(f.where for f in group if f.where))
    return ", ".join(places) if len(places) <= 2 else f"{len(places)} machines: {places[0]}, {places[1]}, ..."
