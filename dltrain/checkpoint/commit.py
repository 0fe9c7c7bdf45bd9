"""Checkpoints in storage: a directory per step and attempt, safetensors files, and a manifest written last.

    checkpoints/step-00000200/a0001/rank-00000.safetensors ...
    checkpoints/step-00000200/a0001/manifest.json

    file = write_rank(store, step, attempt, rank, data)        # every rank's agent
    commit(store, step, attempt, files, meta)                  # the driver, once all files are there
    found = newest_good(store, say)

Without a manifest there is no checkpoint: a reader never sees half of one. A later attempt writes into its
own directory, so that a process that was believed dead can't harm what its successor wrote.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from dltrain.errors import CheckpointError, UserError
from dltrain.store import Store

__all__ = [
    "Checkpoint",
    "commit",
    "directory",
    "discard",
    "find",
    "list_checkpoints",
    "newest_good",
    "prune",
    "rank_file",
    "require_format",
    "verify",
    "write_rank",
]

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: where it is under the store, and its manifest."""

    path: str
    manifest: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps it holds."""
        return int(self.manifest["step"])

    @property
    def num_bytes(self) -> int:
        """Of all its files."""
        return sum(int(f["bytes"]) for f in self.manifest["files"])


def directory(step: int, attempt: int) -> str:
    """Where attempt `attempt` writes step `step`, under the checkpoints' store."""
    return f"step-{step:08d}/a{attempt:04d}"


def write_rank(store: Store, step: int, attempt: int, rank: int, data: bytes) -> dict[str, Any]:
    """Writes one rank's file, and describes it for the manifest, which also wants the file's `parts`.

    Args:
        data: a safetensors file.
    """
    name = rank_file(rank)
    store.write(f"{directory(step, attempt)}/{name}", data)
    return {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def rank_file(rank: int) -> str:
    """The name of a rank's file in a checkpoint."""
    return f"rank-{rank:05d}.safetensors"


def commit(store: Store, step: int, attempt: int, files: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> str:
    """Makes the checkpoint exist; returns its path under the store."""
    manifest = {"format": FORMAT, "step": step, "attempt": attempt, **meta, "files": list(files)}
    path = directory(step, attempt)
    store.write(f"{path}/{MANIFEST}", json.dumps(manifest).encode())
    return path


def discard(store: Store, step: int, attempt: int) -> None:
    """Removes what a failed save left."""
    store.delete(directory(step, attempt))


def list_checkpoints(store: Store) -> list[Checkpoint]:
    """Committed checkpoints, oldest first; of one step the highest attempt's.

    What an attempt committed is left out when a later attempt committed an earlier step: it came from a process that
    did not know it had been replaced.
    """
    newest: dict[int, str] = {}
    for name in store.list():
        parts = name.split("/")
        if len(parts) == 3 and parts[2] == MANIFEST and parts[0].startswith("step-"):
            newest[int(parts[0][5:])] = name
    kept: list[int] = []
    attempt = 0
    for step in sorted(newest, key=lambda s: (_attempt(newest[s]), s)):
        kept = [s for s in kept if s < step] if _attempt(newest[step]) > attempt else kept
        attempt = _attempt(newest[step])
        kept.append(step)
    with ThreadPoolExecutor(8) as pool:
        return [c for c in pool.map(lambda s: _read(store, newest[s]), kept) if c]


def _attempt(name: str) -> int:
    return int(name.split("/")[1][1:])


def _read(store: Store, name: str) -> Checkpoint | None:
    try:
        manifest = json.loads(store.read(name))
    except (FileNotFoundError, ValueError):
        return None
    return Checkpoint(name.removesuffix(f"/{MANIFEST}"), manifest) if manifest.get("format") == FORMAT else None


def verify(store: Store, checkpoint: Checkpoint) -> list[str]:
    """Reads every file back; one sentence for each that is not what was written."""
    with ThreadPoolExecutor(8) as pool:
        return [p for p in pool.map(lambda f: _check(store, checkpoint.path, f), checkpoint.manifest["files"]) if p]


def _check(store: Store, path: str, file: Mapping[str, Any]) -> str:
    try:
        data = store.read(f"{path}/{file['name']}")
    except FileNotFoundError:
        return f"{path}/{file['name']} is missing"
    if len(data) != file["bytes"]:
        return f"{path}/{file['name']} has {len(data):,} bytes instead of {file['bytes']:,}"
    if hashlib.sha256(data).hexdigest() != file["sha256"]:
        return f"{path}/{file['name']} does not have the checksum it was written with"
    return ""


def newest_good(store: Store, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that reads back whole; `say` hears of each that does not."""
    for checkpoint in reversed(list_checkpoints(store)):
        problems = verify(store, checkpoint)
        if not problems:
            return checkpoint
        say(f"checkpoint of step {checkpoint.step} is damaged ({problems[0]}); falling back to the one before")
    return None


def find(store: Store, which: str = "newest") -> Checkpoint:
    """The checkpoint that a user means: `newest`, `best` or a step.

    Raises:
        UserError: there is none.
    """
    found = list_checkpoints(store)
    if which == "best":
        best = (found[-1].manifest.get("best") or {}) if found else {}
        which = str(best.get("step", "newest"))
    chosen = [c for c in found if which == "newest" or str(c.step) == which]
    if not chosen:
        steps = ", ".join(str(c.step) for c in found) or "none"
        raise UserError(f"no checkpoint {which!r} under {store.url}; there are: {steps}")
    return chosen[-1]


def prune(store: Store, keep: int, best_step: int | None) -> list[int]:
    """Deletes all but the newest `keep` and the best; manifests go first. Returns the steps deleted."""
    found = list_checkpoints(store)
    gone = [c for c in found[:-keep] if c.step != best_step]
    kept = {c.path for c in found} - {c.path for c in gone}
    for checkpoint in gone:
        store.delete(f"{checkpoint.path}/{MANIFEST}")
        store.delete(checkpoint.path.split("/")[0])
    _delete_strays(store, kept, found)
    return [c.step for c in gone]


def _delete_strays(store: Store, kept: Iterable[str], found: Sequence[Checkpoint]) -> None:
    """What dead attempts left of steps older than the newest checkpoint."""
    kept = set(kept)
    newest = found[-1].step if found else 0
    seen = {"/".join(name.split("/")[:2]) for name in store.list() if name.startswith("step-")}
    for path in seen - kept:
        if int(path.split("/")[0][5:]) < newest:
            store.delete(path)


def require_format(manifest: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a manifest of a later format."""
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint format {manifest.get('format')!r}; this version reads {FORMAT}")
