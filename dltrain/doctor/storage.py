"""Tries a store with the verbs that a run needs, and judges what came of it.

judge_store(try_store(RunDir.of(spec).store))       # in the run's own directory, which is left as it was

A run writes, reads, lists and deletes there; it claims its attempts by creating files that must not exist yet.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from dltrain.doctor.finding import Finding, fail, ok, warn
from dltrain.errors import StoreError
from dltrain.store import Store

__all__ = ["StoreFacts", "judge_store", "left_file", "try_store"]

_NAME = "run directory"
_PREFIX = "doctor-"
_DATA = bytes(range(256)) * 256
_AT_ONCE = 4
_SLOW_SECONDS = 1.0


@dataclass(frozen=True)
class StoreFacts:
    """What became of each verb.

    Attributes:
        failed: the verb that raised, and `error` what it said.
        read_back: what was written; part_read: of a range of it; listed: it was in the listing.
        winners: of those who created one file at the same time; again: it could be created when it was there.
        gone: what was deleted.
        seconds: that each verb took.
    """

    url: str
    failed: str = ""
    error: str = ""
    read_back: bool = True
    part_read: bool = True
    listed: bool = True
    winners: int = 1
    again: bool = False
    gone: bool = True
    seconds: dict[str, float] = field(default_factory=dict)


def try_store(store: Store) -> StoreFacts:
    """Uses every verb on files of its own, and removes them."""
    place = store.child(f"{_PREFIX}{uuid.uuid4().hex[:12]}")
    trial = _Trial(place)
    with _as_it_was(store):
        try:
            return trial.run()
        finally:
            with contextlib.suppress(OSError, StoreError):
                # Not by `place.delete`, which wants a name below itself.
                store.delete(place.url.rpartition("/")[2])


@contextlib.contextmanager
def left_file(store: Store) -> Iterator[str]:
    """A file that lies in a store for a while, for others to look for; gives its name."""
    name = f"{_PREFIX}{uuid.uuid4().hex[:12]}"
    with _as_it_was(store):
        store.write(name, b"here")
        try:
            yield name
        finally:
            with contextlib.suppress(OSError, StoreError):
                store.delete(name)


class _Trial:
    def __init__(self, store: Store) -> None:
        self._store, self._facts = store, StoreFacts(store.url.rpartition("/")[0])

    def run(self) -> StoreFacts:
        """The verbs one after the other, up to the first that raises."""
        for verb in ("write", "read", "list", "create", "delete"):
            begin = time.monotonic()
            try:
                found: dict[str, Any] = getattr(self, f"_{verb}")()
            except (OSError, StoreError) as error:
                return replace(self._facts, failed=verb, error=str(error))
            self._facts.seconds[verb] = time.monotonic() - begin
            self._facts = replace(self._facts, **found)
        return self._facts

    def _write(self) -> dict[str, Any]:
        # Over another one: what is read must be the newer.
        self._store.write("file", b"older")
        self._store.write("file", _DATA)
        return {}

    def _read(self) -> dict[str, Any]:
        part = self._store.read("file", 1000, 1100)
        return {"read_back": self._store.read("file") == _DATA, "part_read": part == _DATA[1000:1100]}

    def _list(self) -> dict[str, Any]:
        return {"listed": self._store.list() == ["file"] and self._store.size("file") == len(_DATA)}

    def _create(self) -> dict[str, Any]:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            won = list(pool.map(lambda i: self._store.create("claim", b"%d" % i), range(_AT_ONCE)))
        return {"winners": sum(won), "again": self._store.create("claim", b"again")}

    def _delete(self) -> dict[str, Any]:
        self._store.delete("file")
        self._store.delete("claim")
        return {"gone": not self._store.exists("file") and self._store.list() == []}


@contextlib.contextmanager
def _as_it_was(store: Store) -> Iterator[None]:
    """Removes the directories that were made for the trial, where they are on a disk."""
    made = []
    if "file" in store.fs.protocol:
        path = os.path.abspath(store.root)
        while not os.path.isdir(path):
            made.append(path)
            path = os.path.dirname(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for path in made:
                os.rmdir(path)


_VERBS = {
    "write": "write",
    "read": "read what it wrote",
    "list": "list",
    "create": "create files conditionally",
    "delete": "delete",
}


def judge_store(facts: StoreFacts) -> list[Finding]:
    """What the trial says."""
    if facts.failed:
        todo = "let this user do so there (the directory's mode, the bucket's policy), or set `runs` to another place"
        why = f"a run must {_VERBS[facts.failed]} in its directory"
        return [fail(_NAME, f"{facts.failed} failed: {facts.error}", why, todo)]
    broken = [finding for judge in (_contents, _claims) for finding in judge(facts)]
    if broken:
        return broken
    slowest = max(facts.seconds, key=lambda verb: facts.seconds[verb])
    seconds, told = facts.seconds[slowest], ", ".join(f"{v} {1000 * s:.0f} ms" for v, s in facts.seconds.items())
    if seconds > _SLOW_SECONDS:
        why = "every checkpoint and attempt makes a few such requests"
        return [warn(_NAME, f"{facts.url} is slow: {told}", why, "keep `runs` in the region of the cluster")]
    return [ok(_NAME, f"{facts.url}: {told}")]


def _contents(facts: StoreFacts) -> Iterator[Finding]:
    said: tuple[tuple[Callable[[StoreFacts], bool], str], ...] = (
        (lambda f: f.read_back, "what was read is not what was written last"),
        (lambda f: f.part_read, "a range of a file is not the bytes asked for"),
        (lambda f: f.listed, "what was written is not in the listing"),
        (lambda f: f.gone, "what was deleted is still there"),
    )
    for good, text in said:
        if not good(facts):
            yield fail(
                _NAME,
                f"{facts.url}: {text}",
                "checkpoints are found by listing, read by ranges and written once: this store would lose them",
                "set `runs` to a store that is consistent: a local or NFS disk, AWS S3, Ceph RGW, MinIO",
            )


def _claims(facts: StoreFacts) -> Iterator[Finding]:
    if facts.winners == 1 and not facts.again:
        return
    if facts.again:
        found = "a file that is there was created again: the store ignores conditional writes (If-None-Match)"
    else:
        found = f"{facts.winners} of {_AT_ONCE} that created one file at the same time succeeded"
    yield fail(
        _NAME,
        f"{facts.url}: {found}",
        "two starts of the same run could both take it for theirs, and overwrite each other's checkpoints",
        "set `runs` to a store that has them (AWS S3, Ceph RGW, MinIO, a disk), or never start a run twice at once",
    )
