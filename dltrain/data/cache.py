"""The node cache: what was fetched from object storage, kept in a directory that the processes of a node share.

    cache = NodeCache("/scratch/cache", limit_bytes=500_000_000_000)
    found = cache.look(file, ranges)
    if isinstance(found, Slot):              # not there, and nobody else is fetching it
        found.store(parts)                   # or found.drop()

An entry's name is made of the file's path, size and version and of the ranges, so that runs with other columns, or
after a change of the data, don't see each other's. An entry is written beside its name and then renamed. Who writes
holds a lock on what is written, which the kernel frees when the process ends: others wait, or take over. What was
used longest ago goes first. Only entries in a sub-directory of its own are ever removed. Whatever goes wrong with
the directory is said once and counted, and the data comes from the store.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import stat
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dltrain.data.catalog import DataFile
from dltrain.data.ranges import Parts, Range

__all__ = ["NodeCache", "Slot"]

_OWN = "dltrain-units"
_NAME = re.compile(r"[0-9a-f]{40}(\.part)?")
_ACCOUNT = "bytes"
# magic, CRC of the bytes, how many there are
_HEADER = struct.Struct("<8sIQ")
_MAGIC = b"dltrain1"
# So much is left after entries had to go: listing all of them for each new one would take longer than fetching it.
_FULL_SHARE = 0.9
_PAUSE_SECONDS = 60.0
_LOCK_SECONDS, _LOCK_POLL_SECONDS = 5.0, 0.005


class NodeCache:
    """Entries up to `limit_bytes` in a directory of this node.

    Attributes:
        stats: hits and bytes of them, misses, errors of the directory, and entries that were damaged.

    Args:
        directory: made if it is missing; what others keep there stays.
        say: told the first time something is wrong.
    """

    def __init__(
        self, directory: str | os.PathLike[str], limit_bytes: int, say: Callable[[str], None] | None = None
    ) -> None:
        self.directory = Path(directory).expanduser() / _OWN
        self.limit_bytes = limit_bytes
        self._say = say or logging.getLogger("dltrain").warning
        self._lock = threading.Lock()
        self._counted: Counter[str] = Counter()
        self._writes_from = 0.0

    @property
    def stats(self) -> dict[str, float]:
        """What was counted so far."""
        with self._lock:
            return dict(self._counted)

    def look(self, file: DataFile, ranges: Sequence[Range]) -> Parts | Slot | None:
        """The bytes of the ranges by where each begins; else a slot to store them in; None while another process
        fetches them: look again.

        Nothing is raised: where the directory can't be used the slot keeps nothing.
        """
        path = self.directory / _name(file, ranges)
        found = self._load(path, ranges)
        try:
            slot = None if found else self._slot(path, file, sum(end - start for start, end in ranges))
        except OSError as error:
            self.trouble(error)
            slot = Slot(self)
        if slot is None and not found:
            return None
        if slot and slot.path:
            # Another process may have been done between the two.
            found = self._load(path, ranges)
            if found:
                slot.drop()
        self.count("cache_hit" if found else "cache_miss")
        return found or slot

    def count(self, name: str, number: int = 1) -> None:
        """Adds to what is counted."""
        with self._lock:
            self._counted[name] += number

    def trouble(self, error: OSError) -> None:
        """The directory can't be used: nothing is written there for a while."""
        with self._lock:
            self._counted["cache_error"] += 1
            self._writes_from = time.monotonic() + _PAUSE_SECONDS
            first = self._counted["cache_error"] == 1
        if first:
            self._say(
                f"the data cache in {self.directory} can't be used now: {error}; data comes from the storage. "
                "Free or enlarge the disk, or set data.cache to a directory that can be written"
            )

    def reserve(self, fd: int, size: int) -> bool:
        """Makes room for a file of `size` bytes and books it; entries used longest ago go for it.

        False where others are writing so much that there is none.
        """
        with self._account() as account:
            used = _number(account)
            if used is None or used + size > self.limit_bytes:
                used = self._make_room(size)
            fits = used + size <= self.limit_bytes
            if fits:
                # At once, so that whoever adds the files up meanwhile sees what this one will have.
                os.ftruncate(fd, size)
            os.pwrite(account, b"%020d" % (used + size if fits else used), 0)
        return fits

    # ---- entries ----

    def _slot(self, path: Path, file: DataFile, size: int) -> Slot | None:
        whole = size + _HEADER.size
        if time.monotonic() < self._writes_from or whole > self.limit_bytes or not file.etag:
            return Slot(self)
        self.directory.mkdir(parents=True, exist_ok=True)
        fd = _locked(path.with_suffix(".part"))
        return None if fd is None else Slot(self, path, fd)

    def _load(self, path: Path, ranges: Sequence[Range]) -> Parts | None:
        """An entry's bytes; None where there is none that is whole."""
        try:
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb", buffering=0) as entry:
                data = _checked(entry.read(), sum(end - start for start, end in ranges))
                with contextlib.suppress(OSError):
                    os.utime(entry.fileno(), ns=(time.time_ns(), time.time_ns()))
        except FileNotFoundError:
            return None
        except OSError as error:
            self.trouble(error)
            return None
        if data is None:
            self.count("cache_damaged")
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        self.count("cache_bytes", len(data))
        parts: Parts = {}
        at = 0
        for start, end in ranges:
            parts[start] = data[at : at + end - start]
            at += end - start
        return parts

    # ---- room ----

    @contextlib.contextmanager
    def _account(self) -> Iterator[int]:
        """The file that says how many bytes the entries have, locked."""
        fd = os.open(self.directory / _ACCOUNT, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            deadline = time.monotonic() + _LOCK_SECONDS
            while not _try_lock(fd):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process has kept {_ACCOUNT} locked for {_LOCK_SECONDS:.0f} s")
                time.sleep(_LOCK_POLL_SECONDS)
            yield fd
        finally:
            os.close(fd)

    def _make_room(self, size: int) -> int:
        """Removes entries until there is room to spare; returns the bytes that are left."""
        entries = sorted(self._entries())
        used = sum(entry.size for entry in entries)
        target = min(int(self.limit_bytes * _FULL_SHARE), self.limit_bytes - size)
        for entry in entries:
            if used <= target:
                break
            if _removed(entry.path):
                used -= entry.size
        return used

    def _entries(self) -> Iterator[_Entry]:
        with os.scandir(self.directory) as found:
            for item in found:
                with contextlib.suppress(FileNotFoundError):
                    status = item.stat(follow_symlinks=False)
                    if _NAME.fullmatch(item.name) and stat.S_ISREG(status.st_mode):
                        yield _Entry(status.st_mtime_ns, Path(item.path), status.st_size)


@dataclass(frozen=True, order=True)
class _Entry:
    used_ns: int
    path: Path
    size: int


class Slot:
    """The right to write one entry; without a path it keeps nothing."""

    def __init__(self, cache: NodeCache, path: Path | None = None, fd: int = -1) -> None:
        self._cache, self.path, self._fd = cache, path, fd

    def store(self, parts: Parts) -> None:
        """Writes the entry; where that fails, there is none."""
        if self.path is None:
            return
        try:
            pieces = [parts[start] for start in sorted(parts)]
            size = sum(map(len, pieces))
            if not self._cache.reserve(self._fd, _HEADER.size + size):
                self.drop()
                return
            at, crc = _HEADER.size, 0
            for piece in pieces:
                at, crc = _write(self._fd, piece, at), zlib.crc32(piece, crc)
            _write(self._fd, _HEADER.pack(_MAGIC, crc, size), 0)
            os.replace(self.path.with_suffix(".part"), self.path)
        except OSError as error:
            self._cache.trouble(error)
            self.drop()
        else:
            self._close()

    def drop(self) -> None:
        """Leaves it to others."""
        if self.path is not None:
            with contextlib.suppress(OSError):
                self.path.with_suffix(".part").unlink()
            self._close()

    def _close(self) -> None:
        self.path = None
        os.close(self._fd)


def _name(file: DataFile, ranges: Sequence[Range]) -> str:
    text = json.dumps([file.path, file.size, file.etag, [list(r) for r in ranges]])
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def _checked(raw: bytes, size: int) -> memoryview | None:
    """The bytes after the header, if they are what was written."""
    if len(raw) != _HEADER.size + size:
        return None
    magic, crc, written = _HEADER.unpack_from(raw)
    data = memoryview(raw)[_HEADER.size :]
    return data if (magic, written) == (_MAGIC, size) and zlib.crc32(data) == crc else None


def _write(fd: int, data: bytes | memoryview, at: int) -> int:
    left = memoryview(data)
    while left:
        done = os.pwrite(fd, left, at)
        left, at = left[done:], at + done
    return at


def _number(fd: int) -> int | None:
    text = os.pread(fd, 64, 0)
    return int(text) if text.isdigit() else None


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _locked(path: Path) -> int | None:
    """The file at a path, open and locked; None while another has it."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            if not _try_lock(fd):
                os.close(fd)
                return None
            # Renamed or removed by who had it before?
            if os.stat(path).st_ino == os.fstat(fd).st_ino:
                return fd
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _removed(path: Path) -> bool:
    """Removes an entry, unless it is being written."""
    with contextlib.suppress(FileNotFoundError):
        if path.suffix:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                if not _try_lock(fd):
                    return False
                path.unlink()
            finally:
                os.close(fd)
        else:
            path.unlink()
    return True
