"""What a task showed of its work after an evaluation, as files: RUN/samples/step-00000200/00.png, index.json.

    kept, left_out = bounded(task.samples(model, batch))      # on the rank
    write_samples(store, 200, kept, left_out, metrics, is_best)
    for found in read_samples(store, step, best): found.items[0].data

Bounded in number and bytes: a run of weeks keeps the best ones and the newest few.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dltrain.artifact import Artifact
from dltrain.errors import UserError
from dltrain.store import Store
from dltrain.wording import human_bytes

__all__ = ["SampleSet", "ShownItem", "bounded", "read_samples", "write_samples"]

MOST_ITEMS = 24
MOST_BYTES_EACH = 2 * 1024 * 1024
MOST_BYTES = 4 * 1024 * 1024
MOST_CAPTION = 500
# Steps that are kept besides the best one.
KEPT_STEPS = 8


@dataclass(frozen=True)
class ShownItem:
    """One of them; `data` is read when it is wanted."""

    file: str
    media_type: str
    caption: str
    data: bytes


@dataclass(frozen=True)
class SampleSet:
    """What was shown at one step; `left_out` has a sentence for each that was too large."""

    step: int
    is_best: bool
    metrics: Mapping[str, float]
    items: Sequence[ShownItem]
    left_out: Sequence[str] = ()


def bounded(shown: Any) -> tuple[list[Artifact], list[str]]:
    """What of it is kept, and a sentence for each that is not.

    Raises:
        UserError: it is not a list of Artifacts.
    """
    if not isinstance(shown, list | tuple) or not all(isinstance(item, Artifact) for item in shown):
        found = type(shown).__name__
        inside = next((type(i).__name__ for i in shown if not isinstance(i, Artifact)), "") if found == "list" else ""
        raise UserError(
            f"samples returned {found}{f' with {inside} in it' if inside else ''}; return a list of Artifact"
        )
    kept: list[Artifact] = []
    left_out: list[str] = []
    room = MOST_BYTES
    for number, item in enumerate(shown):
        size, name = len(item.data), item.caption[:80] or f"number {number + 1}"
        if len(kept) == MOST_ITEMS:
            left_out.append(f"{len(shown) - number} more: at most {MOST_ITEMS} are kept")
            break
        if size > MOST_BYTES_EACH:
            left_out.append(f"{name}: {human_bytes(size)}, at most {human_bytes(MOST_BYTES_EACH)} each")
        elif size > room:
            left_out.append(f"{name}: {human_bytes(size)}, at most {human_bytes(MOST_BYTES)} together")
        else:
            kept.append(item)
            room -= size
    return kept, left_out


def write_samples(
    store: Store,
    step: int,
    kept: Sequence[Artifact],
    left_out: Sequence[str],
    metrics: Mapping[str, float],
    best_step: int,
) -> None:
    """Writes those of a step, the index last, and forgets those of older steps.

    Args:
        store: of the run.
        best_step: of the best evaluation; its samples stay.
    """
    name = f"samples/step-{step:08d}"
    # A step that is evaluated again may show less.
    store.delete(name)
    items = []
    for number, item in enumerate(kept):
        file = f"{number:02d}{item.suffix}"
        store.write(f"{name}/{file}", item.data)
        items.append({"file": file, "media_type": item.media_type, "caption": item.caption[:MOST_CAPTION]})
    index = {"step": step, "metrics": dict(metrics), "items": items, "left_out": list(left_out)}
    store.write(f"{name}/index.json", (json.dumps(index, indent=1) + "\n").encode())
    for old in _steps(store)[:-KEPT_STEPS]:
        if old != best_step:
            store.delete(f"samples/step-{old:08d}")


def read_samples(store: Store, step: int, best: Mapping[str, Any] | None) -> list[SampleSet]:
    """The newest ones and those of the best step, the newest first; one set where they are the same.

    Args:
        step: the run's last; what was shown at later ones belongs to weights that are gone.
        best: {metric, value, step}, or None.
    """
    there = [s for s in _steps(store) if s <= step]
    best_step = int(best["step"]) if best else -1
    wanted = dict.fromkeys([*there[-1:], *(s for s in there if s == best_step)])
    return [found for s in wanted for found in _read(store, s, s == best_step)]


def _read(store: Store, step: int, is_best: bool) -> Iterator[SampleSet]:
    name = f"samples/step-{step:08d}"
    try:
        index = json.loads(store.read(f"{name}/index.json"))
        items = [
            ShownItem(f"{name}/{i['file']}", i["media_type"], i["caption"], store.read(f"{name}/{i['file']}"))
            for i in index["items"]
        ]
    except (FileNotFoundError, ValueError, KeyError):
        # It is being written, or taken away.
        return
    yield SampleSet(step, is_best, index["metrics"], items, index["left_out"])


def _steps(store: Store) -> list[int]:
    """In ascending order."""
    names = [name.removeprefix("step-") for name in store.dirs("samples")]
    return sorted(int(name) for name in names if name.isdigit())
