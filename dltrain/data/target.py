"""A new directory of files that appears wholly or not at all, at a path or any fsspec URL.

    with new_directory("s3://bucket/digits-32") as open_part:
        with open_part("part-00000.parquet") as out: out.write(data)

On this machine's disks the files are written to a hidden directory beside it, which is renamed at the end. Object
storage has no rename. There, uploads are begun and completed only when all of them have arrived, so nothing can be
listed before; and from the start until all of them are complete, the directory has a mark for which `read_catalog`
refuses it. Taking that mark away is the one act that makes the data appear.

A process that was killed leaves only what nobody sees, and the next one to the same place clears that up first.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from dltrain.data.files import UNFINISHED
from dltrain.errors import DataError, StoreError
from dltrain.store import Store, explain, open_store

__all__ = ["PART", "OpenPart", "free_bytes", "new_directory"]

OpenPart = Callable[[str], contextlib.AbstractContextManager[Any]]
# What the files are called; an interrupted commit may have left some.
PART = "part-{:05d}.parquet"
_BLOCK_BYTES = 16 * 1024 * 1024
_HIDDEN = ".dltrain-new"


@contextlib.contextmanager
def new_directory(url: str) -> Iterator[OpenPart]:
    """Gives a function that opens a file of the directory for writing, by its name in it.

    Raises:
        DataError: there is something at the URL, or another process is writing there.
        StoreError: the storage can't be reached, refuses, or is full.
    """
    store = open_store(url)
    way = _by_rename(store) if _is_local(store) else _by_mark(store)
    with way as open_part:
        yield open_part


def free_bytes(url: str) -> int | None:
    """Free space where the directory will be; None for storage that does not say."""
    store = open_store(url)
    if not _is_local(store):
        return None
    place = os.path.abspath(store.root)
    while not os.path.isdir(place):
        place = os.path.dirname(place)
    return shutil.disk_usage(place).free


def _is_local(store: Store) -> bool:
    protocol = store.fs.protocol
    return "file" in ((protocol,) if isinstance(protocol, str) else protocol)


def _occupied(url: str, what: str) -> DataError:
    return DataError(f"{url} {what}; give a directory that does not exist yet, or remove this one first")


def _taken_over(url: str) -> DataError:
    return DataError(f"{url}: another process is writing there; let it finish, or give another directory")


# ---- disks of this machine ----


@contextlib.contextmanager
def _by_rename(store: Store) -> Iterator[OpenPart]:
    target = os.path.abspath(store.root)
    _check_empty(target)
    hidden = os.path.join(os.path.dirname(target), f".{os.path.basename(target)}{_HIDDEN}")
    with explain(store.url):
        os.makedirs(hidden, exist_ok=True)
        # Ends with the process, whatever ends it.
        lock = os.open(hidden, os.O_RDONLY)
    try:
        _hold(lock, hidden, store.url)
        _clear(hidden)
        yield lambda name: _synced(os.path.join(hidden, name))
        _rename(hidden, target, store.url)
    except BaseException as error:
        # Never what belongs to the process that holds the lock.
        if not isinstance(error, _HeldError):
            shutil.rmtree(hidden, ignore_errors=True)
        raise
    finally:
        os.close(lock)


class _HeldError(DataError):
    pass


def _check_empty(target: str) -> None:
    if os.path.isdir(target):
        names = os.listdir(target)
        if names:
            raise _occupied(target, f"holds {len(names)} file(s), {sorted(names)[0]} among them")
    elif os.path.lexists(target):
        raise _occupied(target, "is a file")


def _hold(lock: int, hidden: str, url: str) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The one before may have renamed it between our opening and locking it.
        mine = os.path.samestat(os.fstat(lock), os.stat(hidden))
    except (BlockingIOError, FileNotFoundError):
        mine = False
    if not mine:
        raise _HeldError(str(_taken_over(url)))


def _clear(hidden: str) -> None:
    for entry in os.scandir(hidden):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


@contextlib.contextmanager
def _synced(path: str) -> Iterator[Any]:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "xb") as out:
        yield out
        out.flush()
        os.fsync(out.fileno())


def _rename(hidden: str, target: str, url: str) -> None:
    try:
        # An empty directory is replaced.
        os.rename(hidden, target)
    except OSError as error:
        _check_empty(target)
        raise StoreError(f"{url}: {hidden} could not be renamed to it: {error.strerror}; remove {target}") from error
    parent = os.open(os.path.dirname(target), os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


# ---- object storage ----


@contextlib.contextmanager
def _by_mark(store: Store) -> Iterator[OpenPart]:
    mine = uuid.uuid4().hex.encode()
    if store.exists(UNFINISHED):
        _clear_up(store)
    found = store.list()
    if found:
        raise _occupied(store.url, f"holds {len(found)} file(s), {found[0]} among them")
    store.write(UNFINISHED, mine)
    try:
        with explain(store.url), store.fs.transaction:
            yield lambda name: store.fs.open(store.path(name), "wb", block_size=_BLOCK_BYTES)
            # Leaving the transaction completes the uploads.
            if _mark(store) != mine:
                raise _taken_over(store.url)
    except BaseException:
        # Where the storage is gone, the next one clears up.
        with contextlib.suppress(StoreError):
            if _mark(store) == mine:
                _clear_up(store)
        raise
    store.delete(UNFINISHED)


def _mark(store: Store) -> bytes:
    try:
        return store.read(UNFINISHED)
    except FileNotFoundError:
        return b""


def _clear_up(store: Store) -> None:
    """Removes what an interrupted process left: uploads, files, and last the mark."""
    _abort_uploads(store)
    for name in store.list():
        if name.rpartition("/")[2].startswith(PART.partition("{")[0]):
            store.delete(name)
    store.delete(UNFINISHED)


def _abort_uploads(store: Store) -> None:
    """S3 keeps begun uploads, unlisted but paid for, until they are told to go."""
    if "s3" not in store.fs.protocol:
        return
    bucket, key, _ = store.fs.split_path(store.root)
    here = {"Bucket": bucket, "Prefix": f"{key}/" if key else ""}
    with explain(store.url):
        more = True
        while more:
            reply = store.fs.call_s3("list_multipart_uploads", **here)
            for upload in reply.get("Uploads", []):
                which = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
                store.fs.call_s3("abort_multipart_upload", Bucket=bucket, **which)
            more = bool(reply.get("IsTruncated"))
