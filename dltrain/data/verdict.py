"""What to do about what was found in a dataset, the worst first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["verdict"]

Finding = Iterator[tuple[str, str, str, str]]
# Rows of the largest class for one of the smallest, and of a class that is too few to learn from.
_UNEVEN, _FEW = 20, 10


def verdict(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """Findings on what `check_data` found: `fault` makes figures wrong, `warning` may well be meant."""
    rules = (_leakage, _conflicts, _values, _duplicates, _suspects, _balance, _constant)
    made = [{"kind": k, "problem": p, "why": w, "fix": f} for rule in rules for k, p, w, f in rule(found)]
    return sorted(made, key=lambda one: one["kind"] != "fault")


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({part / max(1, whole):.2%})"


def _at(place: Mapping[str, Any]) -> str:
    return f"{place['file']} row {place['row']:,}"


def _leakage(found: Mapping[str, Any]) -> Finding:
    for leak in found["leakage"]:
        if leak["rows"]:
            first = leak["examples"][0]
            yield (
                "fault",
                f"{_share(leak['rows'], leak['of'])} rows of {leak['url']} are in {found['url']} too: "
                f"{_at(first['there'])} is {_at(first['here'])}",
                "what is measured on them is memory, not what was learned",
                "take them out of one of the two; split by source (person, document, day), not by row",
            )


def _conflicts(found: Mapping[str, Any]) -> Finding:
    conflicts = found["conflicts"]
    if conflicts and conflicts["rows"]:
        places = ", ".join(_at(place) for place in conflicts["examples"][0][:2])
        yield (
            "fault",
            f"{conflicts['rows']:,} rows of {conflicts['of']:,} contents have different labels: {places}",
            "at most one of them can be right",
            "look at them, and keep the right one",
        )


def _values(found: Mapping[str, Any]) -> Finding:
    for column in found["columns"]:
        name, rows = column["name"], found["rows"]
        if column["not_finite"]:
            yield (
                "fault",
                f"{name}: {column['not_finite']:,} values are nan or infinite",
                "one of them makes a loss, and then all weights, nan",
                "leave these rows out (data.filter), or put a number in their place",
            )
        for what, why in (("nulls", "a `collate` has to know what to do with them"), ("empty", "nothing is in them")):
            if column[what]:
                yield (
                    "warning",
                    f"{name}: {_share(column[what], rows)} values are {'null' if what == 'nulls' else 'empty'}",
                    why,
                    f"leave them out: data.filter [[{name}, not null]]" if what == "nulls" else "leave them out",
                )


def _duplicates(found: Mapping[str, Any]) -> Finding:
    twice = found["duplicates"]
    if twice["rows"]:
        places = ", ".join(_at(place) for place in twice["examples"][0][:2])
        yield (
            "warning",
            f"{_share(twice['rows'], found['rows'])} rows are there before: {places}",
            "they count as often as they are there, and a split by row puts copies on both sides",
            "keep one of each, or say with --ignore which column makes them differ",
        )


def _suspects(found: Mapping[str, Any]) -> Finding:
    suspects = found["suspects"]
    if suspects:
        first = suspects[0]
        yield (
            "warning",
            f"{_share(len(suspects), found['rows'])} labels are contradicted by the network: {_at(first)} is labelled "
            f"{first['label']}, predicted {first['predicted']} ({first['probability']:.0%})",
            "wrong labels limit what can be learned, and what can be measured",
            "look at them (--json lists all); a network that was trained on these very rows has learned some by heart",
        )


def _balance(found: Mapping[str, Any]) -> Finding:
    if not found["label"]:
        return
    classes: Mapping[str, int] = found["label"]["classes"]
    ranked = list(classes.items())
    (most, many), (least, few) = ranked[0], ranked[-1]
    if len(classes) > 1 and many > _UNEVEN * few:
        yield (
            "warning",
            f"{found['label']['column']}: {many:,} rows are {most}, {few:,} are {least}",
            "the rare class hardly counts in a mean loss, and accuracy says little",
            "weight the loss by class, mix datasets by class (data.mix), and look at recall by class",
        )
    if len(classes) > 1 and few < _FEW:
        rare = [name for name, count in classes.items() if count < _FEW]
        yield (
            "warning",
            f"{found['label']['column']}: {len(rare)} of {len(classes)} classes have fewer than {_FEW} rows: "
            f"{', '.join(rare[:8])}",
            "there is not enough to learn them from, or to measure them on",
            "find more of them, or join classes",
        )


def _constant(found: Mapping[str, Any]) -> Finding:
    for column in found["columns"]:
        if column["constant"]:
            yield (
                "warning",
                f"{column['name']} has the same value in all {found['rows']:,} rows",
                "nothing can be learned from it",
                "leave it out of the task's columns",
            )
