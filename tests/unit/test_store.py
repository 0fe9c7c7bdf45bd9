"""Storage on this machine and in memory: the verbs' promises, and errors that say what to set."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dltrain import store as module
from dltrain.errors import StoreError
from dltrain.store import Store, explain, filesystem, open_store


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A store of each kind: local files, and what stands for any object store."""
    if request.param == "file":
        yield open_store(tmp_path / "runs")
        return
    yield open_store(f"memory://{tmp_path}")
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return open_store(tmp_path)


def _everything(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


# ---------------------------------------------------------------------------------------------------------------
# URLs


def test_plain_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for url in ("runs", "runs/", "./runs", tmp_path / "runs", f"file://{tmp_path}/runs/"):
        store = open_store(url)
        assert (store.url, store.root) == (f"{tmp_path}/runs", f"{tmp_path}/runs")


def test_child_and_path(local: Store, tmp_path: Path) -> None:
    child = local.child("a", "b")
    assert child.url == child.root == f"{tmp_path}/a/b"
    assert child.path("c", "d") == f"{tmp_path}/a/b/c/d"
    child.write("c", b"1")
    assert local.read("a/b/c") == b"1"


def test_root_of_the_file_system() -> None:
    root = open_store("/")
    assert (root.url, root.child("x").url, root.path("x")) == ("/", "/x", "/x")
    assert "tmp" in root.dirs()


def test_s3_url_is_normalised_without_asking_the_server() -> None:
    for url in ("s3://bucket/runs/", "s3a://bucket/runs"):
        store = open_store(url)
        assert (store.url, store.root) == ("s3://bucket/runs", "bucket/runs")


def test_filesystem_leaves_globs_alone(tmp_path: Path) -> None:
    fs, path = filesystem(tmp_path / "*.parquet")
    (tmp_path / "a.parquet").write_bytes(b"")
    assert fs.glob(path) == [f"{tmp_path}/a.parquet"]


# ---------------------------------------------------------------------------------------------------------------
# Verbs


def test_write_read_size_exists(store: Store) -> None:
    assert not store.exists("a/b")
    store.write("a/b", b"0123456789")
    assert store.exists("a/b")
    assert store.exists("a")
    assert store.exists("")
    assert store.size("a/b") == 10
    assert store.read("a/b") == b"0123456789"
    assert store.read("a/b", 2, 5) == b"234"
    assert store.read("a/b", 8, 20) == b"89"
    store.write("a/b", b"new")
    assert (store.read("a/b"), store.size("a/b")) == (b"new", 3)


def test_missing_file(store: Store) -> None:
    for verb in (store.read, store.size):
        with pytest.raises(FileNotFoundError):
            verb("none")
    assert store.list() == store.list("none") == store.dirs() == store.dirs("none") == []
    store.delete("none")


def test_list_and_dirs(store: Store) -> None:
    for name in ("b/2", "b/1", "a", "bc/3", "b/deep/er/4"):
        store.write(name, b"x")
    assert store.list() == ["a", "b/1", "b/2", "b/deep/er/4", "bc/3"]
    assert store.list("b") == store.list("b/") == ["b/1", "b/2", "b/deep/er/4"]
    assert store.dirs() == ["b", "bc"]
    assert store.dirs("b") == ["deep"]
    assert store.list("a") == store.dirs("a") == []


def test_delete(store: Store) -> None:
    for name in ("b/1", "b/deep/2", "bc/3", "a"):
        store.write(name, b"x")
    store.delete("b")
    assert store.list() == ["a", "bc/3"]
    store.delete("a")
    assert store.list() == ["bc/3"]
    for nothing in ("", "/"):
        with pytest.raises(ValueError, match="needs the name"):
            store.delete(nothing)


def test_create_only_once(store: Store) -> None:
    assert store.create("attempts/1", b"first") is True
    assert store.create("attempts/1", b"second") is False
    assert store.read("attempts/1") == b"first"


# ---------------------------------------------------------------------------------------------------------------
# Local files: whole or not at all, exclusive, and several at once


def test_failed_write_leaves_the_old_content_and_nothing_else(
    local: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.write("state", b"old")

    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for verb in (local.write, local.create):
        for name in ("state", "fresh"):
            with pytest.raises(OSError, match="No space left") as caught:
                verb(name, b"new")
            assert caught.value.errno == errno.ENOSPC
    assert local.read("state") == b"old"
    assert _everything(tmp_path) == ["state"]


def test_failed_rename_leaves_nothing(local: Store, tmp_path: Path) -> None:
    (tmp_path / "taken" / "inside").mkdir(parents=True)
    with pytest.raises(StoreError, match="taken"):
        local.write("taken", b"a directory is in the way")
    assert _everything(tmp_path) == []


def test_file_in_the_way_of_a_directory_is_not_taken_for_success(local: Store) -> None:
    local.write("a", b"")
    for verb in (local.write, local.create):
        with pytest.raises(StoreError, match=r"(File exists|Not a directory).*a"):
            verb("a/b", b"")


def test_readers_see_the_old_or_the_new_content(local: Store) -> None:
    contents = [bytes([value]) * 100_000 for value in range(20)]
    local.write("file", contents[0])
    done = threading.Event()

    def read_on() -> int:
        count = 0
        while not done.is_set():
            assert local.read("file") in contents
            count += 1
        return count

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read_on) for _ in range(3)]
        try:
            for content in contents:
                local.write("file", content)
        finally:
            done.set()
        assert all(reader.result() > 0 for reader in readers)


def test_files_have_the_permissions_that_the_umask_allows(local: Store, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    local.write("written", b"")
    local.create("created", b"")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "written", "created")}
    assert len(modes) == 1


@pytest.mark.parametrize("hard_links", [True, False])
def test_of_eight_creators_one_wins(local: Store, monkeypatch: pytest.MonkeyPatch, hard_links: bool) -> None:
    if not hard_links:
        monkeypatch.setattr(os, "link", _raise(OSError(errno.EPERM, "Operation not permitted")))
    together = threading.Barrier(8)

    def claim(number: int, name: str) -> bool:
        together.wait(10)
        return local.create(name, b"%d" % number)

    with ThreadPoolExecutor(8) as pool:
        for turn in range(50):
            won = list(pool.map(claim, range(8), [f"turn-{turn}"] * 8))
            assert won.count(True) == 1
            assert local.read(f"turn-{turn}") == b"%d" % won.index(True)
    assert local.list() == sorted(f"turn-{turn}" for turn in range(50))


def test_listing_is_complete_while_files_come_and_go(local: Store) -> None:
    kept = [f"kept-{number}" for number in range(20)]
    for name in kept:
        local.write(name, b"")
    done = threading.Event()

    def churn(number: int) -> None:
        while not done.is_set():
            local.write(f"other-{number}", b"")
            local.delete(f"other-{number}")

    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(churn, number) for number in range(2)]
        try:
            for _ in range(200):
                assert set(kept) <= set(local.list()) <= {*kept, "other-0", "other-1"}
        finally:
            done.set()
        for writer in writers:
            writer.result()


def test_two_may_delete_the_same_directory(local: Store) -> None:
    for _ in range(10):
        for number in range(50):
            local.write(f"gone/{number % 5}/{number}", b"")
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(local.delete, ["gone"] * 4))
        assert local.list() == []
        assert local.dirs() == []


def test_link_is_removed_without_what_it_points_to(local: Store, tmp_path: Path) -> None:
    local.write("real/file", b"1")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    local.delete("link")
    assert local.list() == ["real/file"]


# ---------------------------------------------------------------------------------------------------------------
# Object stores: what their replies mean


class _S3Error(Exception):
    """Shaped like botocore's ClientError."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.response = {"Error": {"Code": code}}


def _refused(kind: type[OSError], code: str) -> OSError:
    """What s3fs makes of a refusal."""
    error = kind(errno.EIO, code)
    error.__cause__ = _S3Error(code)
    return error


def _raise(*errors: BaseException) -> Callable[..., Any]:
    """A function which raises these in turn, then the last one again."""
    left = list(errors)

    def fail(*_args: object, **_kwargs: object) -> None:
        raise left.pop(0) if len(left) > 1 else left[0]

    return fail


class _Fake:
    """A filesystem that does as the test says."""

    protocol = ("s3", "s3a")

    def __init__(self, **verbs: Callable[..., Any]) -> None:
        self.__dict__.update(verbs)

    def invalidate_cache(self) -> None:
        pass


def _fake(**verbs: Callable[..., Any]) -> Store:
    return Store("s3://bucket/runs", _Fake(**verbs), "bucket/runs")


def test_conflict_of_creators_is_asked_again() -> None:
    conflict = _refused(OSError, "ConditionalRequestConflict")
    there = _refused(OSError, "PreconditionFailed")
    assert _fake(pipe_file=_raise(conflict, conflict, there)).create("x", b"") is False
    assert _fake(pipe_file=_raise(FileExistsError())).create("x", b"") is False
    with pytest.raises(StoreError, match="SlowDown"):
        _fake(pipe_file=_raise(_refused(OSError, "SlowDown"))).create("x", b"")


def test_bare_403_is_explained_by_a_listing() -> None:
    bare = _refused(PermissionError, "403")
    for cause, sentence in (
        ("SignatureDoesNotMatch", "refuses the secret key"),
        ("InvalidAccessKeyId", "does not know the access key"),
        ("AccessDenied", "denies access to this user"),
    ):
        store = _fake(info=_raise(bare), ls=_raise(_refused(PermissionError, cause)))
        with pytest.raises(StoreError, match=sentence):
            store.exists("x")
    with pytest.raises(StoreError, match=r"denies access \(403\); check AWS_ACCESS_KEY_ID"):
        _fake(info=_raise(bare), ls=lambda _path: []).size("x")


def test_files_that_stay_after_deleting_are_reported() -> None:
    names = ["bucket/runs/x/1", "bucket/runs/x/2"]
    found = [names, names[1:]]
    store = _fake(find=lambda _path: found.pop(0), rm=lambda _path, recursive: None)
    with pytest.raises(StoreError, match="1 of 2 files could not be deleted, bucket/runs/x/2 among them"):
        store.delete("x")


def test_files_that_came_while_deleting_are_not() -> None:
    found = [["bucket/runs/x/1"], ["bucket/runs/x/new"]]
    _fake(find=lambda _path: found.pop(0), rm=lambda _path, recursive: None).delete("x")


# ---------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize("error", [FileNotFoundError(2, "none"), OSError(errno.ENOSPC, "full"), KeyError("mine")])
def test_these_pass_through_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, explain("s3://bucket"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (_refused(FileNotFoundError, "NoSuchBucket"), "the bucket does not exist at AWS; create it"),
        (_refused(PermissionError, "ExpiredToken"), "the session token has expired"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), "Permission denied: '/data/x'"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (TimeoutError("too slow"), "too slow"),
    ],
)
def test_these_become_one_sentence(error: Exception, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    with pytest.raises(StoreError) as caught, explain("s3://bucket/x"):
        raise error
    assert str(caught.value).startswith("s3://bucket/x: ")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("url", ["foo://bucket/x", "foo://"])
def test_unknown_protocol(url: str) -> None:
    with pytest.raises(StoreError, match=r"foo.*use a path, file://, s3://"):
        open_store(url)


def test_missing_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsspec.core, "url_to_fs", _raise(ImportError("Please install gcsfs to access Google Storage")))
    with pytest.raises(StoreError, match="Please install gcsfs"):
        open_store("gs://bucket/x")


def test_url_without_a_bucket() -> None:
    with pytest.raises(StoreError, match="names no bucket"):
        open_store("s3://")


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"])
def test_endpoint_that_is_no_url(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.setenv(variable, "localhost:9000")
    with pytest.raises(StoreError, match=f"{variable} is 'localhost:9000', which is no URL"):
        open_store("s3://bucket")


@contextlib.contextmanager
def _closed_port() -> Iterator[int]:
    """A port that nothing listens on, held so that nothing else takes it."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@contextlib.contextmanager
def _silent_port() -> Iterator[int]:
    """A port whose queue of connections is full: connecting to it takes for ever."""
    with socket.socket() as server, contextlib.ExitStack() as clients:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(3):
            client = clients.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        yield server.getsockname()[1]


@pytest.mark.parametrize(("port", "connect_seconds", "limit"), [(_closed_port, 5, 10), (_silent_port, 0.5, 15)])
def test_unreachable_endpoint_ends_soon(
    port: Callable[[], contextlib.AbstractContextManager[int]],
    connect_seconds: float,
    limit: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_CONNECT_SECONDS", connect_seconds)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with port() as number:
        endpoint = f"http://127.0.0.1:{number}"
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        start = time.monotonic()
        with pytest.raises(StoreError, match=f"{endpoint} can't be reached; check AWS_ENDPOINT_URL_S3"):
            open_store("s3://bucket/runs").read("x")
        assert time.monotonic() - start < limit
