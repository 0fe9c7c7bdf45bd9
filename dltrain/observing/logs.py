"""The workers' logs of a run directory: what each rank printed, as JSON lines.

    logs = RankLogs(store); logs.add(LogLine(rank=0, text="hello", error=False)); logs.flush()
    for line in read_logs(store): print(line.rank, line.text)
    follow_logs(store, None, is_over=lambda: run.state()["state"] == "finished", out=print)

    {"time": 1795528328.369, "rank": 1, "attempt": 1, "stream": "stdout", "text": "hello"}

A local directory has a file for each rank, logs/rank-00001.jsonl, and before it rank-00001.1.jsonl, the older lines, so
that what a rank prints takes no more than so much. In object storage, where each file costs a request, the lines of all
ranks are uploaded together as numbered parts, logs/00000001-5f0c2a81.jsonl, the oldest of which are taken away.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dltrain.errors import UserError
from dltrain.observing.journal import ends_a_line, is_local
from dltrain.observing.reports import LogLine
from dltrain.store import Store

__all__ = ["RankLine", "RankLogs", "follow_logs", "read_logs"]

_EVERY_SECONDS = 0.5
# Of a rank: as much again is kept of older lines.
FILE_BYTES = 16 * 1024 * 1024
# Of all ranks, in object storage.
STORE_BYTES = 256 * 1024 * 1024
# What is kept while the store can't be reached.
_WAITING_LINES = 100_000


@dataclass(frozen=True)
class RankLine:
    """A line that a rank printed, at a time in Unix seconds."""

    rank: int
    text: str
    time: float = 0.0
    attempt: int = 0
    stream: str = "stdout"

    @classmethod
    def of(cls, line: Any) -> RankLine:
        """From JSON."""
        return cls(int(line["rank"]), str(line["text"]), line["time"], line["attempt"], line["stream"])


# ---- writing ----


class RankLogs:
    """Writes them; `add` may be called while another thread flushes.

    Args:
        file_bytes: of a rank's file on a disk, before it is turned over.
        store_bytes: of all parts in object storage.
    """

    def __init__(self, store: Store, file_bytes: int = FILE_BYTES, store_bytes: int = STORE_BYTES) -> None:
        self._store, self._file_bytes, self._store_bytes = store, file_bytes, store_bytes
        self._local = is_local(store)
        self._files: dict[int, IO[str]] = {}
        self._written: dict[int, int] = {}
        self._waiting: deque[str] = deque(maxlen=_WAITING_LINES)
        self._sizes: deque[tuple[str, int]] = deque()
        self._part, self._mark = -1, uuid.uuid4().hex[:8]
        self._turning = threading.Lock()

    def add(self, line: LogLine) -> None:
        """Adds a line; it can be read after the next flush.

        Raises:
            OSError: it could not be written.
        """
        stream = "stderr" if line.error else "stdout"
        values = {"time": round(line.time, 3), "rank": line.rank, "attempt": line.attempt, "stream": stream}
        text = json.dumps({**values, "text": line.text}) + "\n"
        if not self._local:
            self._waiting.append(text)
            return
        with self._turning:
            file = self._files.get(line.rank) or self._open(line.rank)
            file.write(text)
            # All of it is ASCII.
            self._written[line.rank] += len(text)
            if self._written[line.rank] >= self._file_bytes:
                self._turn_over(line.rank)

    def flush(self) -> None:
        """Writes what was added.

        Raises:
            OSError, StoreError: it could not be written; lines for object storage are kept for the next time.
        """
        with self._turning:
            for file in self._files.values():
                file.flush()
        lines = list(self._waiting)
        if not lines:
            return
        if self._part < 0:
            names = self._store.list("logs")
            self._sizes.extend((name, self._store.size(name)) for name in names)
            # Not how many: the oldest may have been taken away.
            self._part = max((int(Path(name).name.partition("-")[0]) for name in names), default=0)
        data, name = "".join(lines).encode(), f"logs/{self._part + 1:08d}-{self._mark}.jsonl"
        self._store.write(name, data)
        for _ in lines:
            self._waiting.popleft()
        self._part += 1
        self._sizes.append((name, len(data)))
        self._take_away()

    def close(self) -> None:
        """Writes what is left.

        Raises:
            OSError, StoreError: it could not be written.
        """
        self.flush()
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _open(self, rank: int) -> IO[str]:
        path = Path(self._store.path("logs", f"rank-{rank:05d}.jsonl"))
        path.parent.mkdir(parents=True, exist_ok=True)
        file = self._files[rank] = path.open("a")
        self._written[rank] = path.stat().st_size
        if not ends_a_line(path):
            # A crash has cut the last one short: what follows is not to be lost with it.
            file.write("\n")
        return file

    def _turn_over(self, rank: int) -> None:
        self._files.pop(rank).close()
        path = self._store.path("logs", f"rank-{rank:05d}.jsonl")
        os.replace(path, path.removesuffix(".jsonl") + ".1.jsonl")

    def _take_away(self) -> None:
        while len(self._sizes) > 1 and sum(size for _, size in self._sizes) > self._store_bytes:
            self._store.delete(self._sizes.popleft()[0])


# ---- reading ----


def read_logs(store: Store, rank: int | None = None) -> list[RankLine]:
    """All lines of all ranks, or of one.

    Raises:
        UserError: that rank has no log.
    """
    lines = list(_Reader(store, rank).read(whole=True))
    if rank is not None and not lines:
        known = sorted({line.rank for line in _Reader(store, None).read(whole=True)})
        raise UserError(f"rank {rank} has printed nothing; {f'ranks with a log: {known}' if known else 'no rank has'}")
    return lines


def follow_logs(
    store: Store,
    rank: int | None,
    is_over: Callable[[], bool],
    out: Callable[[RankLine], None],
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Gives `out` every line, those that are there first, until the run is over."""
    reader = _Reader(store, rank)
    over = False
    while not over:
        # Asked before reading: what is printed in between is read in any case.
        over = is_over()
        for line in reader.read(whole=over):
            out(line)
        if not over:
            sleep(_EVERY_SECONDS)


class _Reader:
    """What was added since it was read last, rank by rank on a disk; of all ranks, or of one."""

    def __init__(self, store: Store, rank: int | None) -> None:
        self._store, self._rank, self._local = store, rank, is_local(store)
        self._tails: dict[int, _Tail] = {}
        self._seen: set[str] = set()

    def read(self, whole: bool) -> Iterator[RankLine]:
        """New lines; with `whole` one too that has no end yet."""
        found = self._from_files(whole) if self._local else self._from_parts()
        for text in found:
            with contextlib.suppress(ValueError, KeyError):
                line = RankLine.of(json.loads(text))
                if self._rank is None or line.rank == self._rank:
                    yield line

    def _from_files(self, whole: bool) -> Iterator[str]:
        directory = Path(self._store.path("logs"))
        pattern = "rank-*.jsonl" if self._rank is None else f"rank-{self._rank:05d}.jsonl"
        for path in directory.glob(pattern):
            number = path.stem.removeprefix("rank-")
            if number.isdigit():
                self._tails.setdefault(int(number), _Tail(path))
        for rank in sorted(self._tails):
            yield from self._tails[rank].read(whole)

    def _from_parts(self) -> Iterator[str]:
        for name in self._store.list("logs"):
            if name not in self._seen:
                self._seen.add(name)
                with contextlib.suppress(FileNotFoundError):
                    yield from self._store.read(name).decode(errors="replace").splitlines()


class _Tail:
    """One rank's file, also when it is turned over meanwhile; it is open only while it is read."""

    def __init__(self, path: Path) -> None:
        self._path, self._older = path, path.with_suffix(".1.jsonl")
        self._inode, self._position, self._began = 0, 0, False

    def read(self, whole: bool) -> Iterator[str]:
        """New lines."""
        older, current = self._state_of(self._older), self._state_of(self._path)
        if not self._began:
            self._began = True
            self._inode, self._position = (older, 0) if older else (current, 0)
        if self._inode != current and self._inode == older:
            # It was turned over: what was written before comes first, to its last line.
            yield from self._new_lines(self._older, True)
        if self._inode != current:
            self._inode, self._position = current, 0
        yield from self._new_lines(self._path, whole)

    @staticmethod
    def _state_of(path: Path) -> int:
        try:
            return path.stat().st_ino
        except FileNotFoundError:
            return 0

    def _new_lines(self, path: Path, whole: bool) -> Iterator[str]:
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return
        with file:
            # Turned over between the look and now: the next reading finds out.
            if os.fstat(file.fileno()).st_ino != self._inode:
                return
            file.seek(self._position)
            data = file.read()
        end = len(data) if whole else data.rfind(b"\n") + 1
        self._position += end
        yield from data[:end].decode(errors="replace").splitlines()
