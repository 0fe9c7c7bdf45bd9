"""Storage: the few verbs dltrain asks of any fsspec URL, and errors a user can act on.

    store = open_store("s3://bucket/runs").child("image-cnn")
    store.write("state.json", data)          # whole or not at all
    store.create("attempts/1", b"")          # only if it was not there
    with explain(url): fs, path = filesystem(url); fs.open(path)

S3: endpoint from AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, region from AWS_REGION or AWS_DEFAULT_REGION,
credentials from the environment or the usual chain.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import fsspec

from dltrain.errors import StoreError

__all__ = ["Store", "explain", "filesystem", "open_store"]

_CONNECT_SECONDS = 5
_READ_SECONDS = 60
_ATTEMPTS = 4


class Store:
    """A directory in some storage.

    Args:
        url: normalised, without a trailing slash.
        fs: its filesystem, for readers that need one.
        root: the directory's path within it.
    """

    def __init__(self, url: str, fs: Any, root: str) -> None:
        self.url, self.fs, self.root = url, fs, root
        self._local = "file" in _protocols(fs)

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def path(self, *parts: str) -> str:
        """The path of a file under it, within the filesystem."""
        return "/".join([self.root.rstrip("/"), *parts])

    def child(self, *parts: str) -> Store:
        """A sub-directory."""
        return Store("/".join([self.url, *parts]), self.fs, self.path(*parts))

    def exists(self, name: str) -> bool:
        """Whether there is such a file or directory now."""
        with explain(self.url):
            self._forget()
            return bool(self.fs.exists(self.path(name)))

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """A file, or its bytes [start, end).

        Raises:
            FileNotFoundError: there is none.
            StoreError: the storage can't be reached or refuses.
        """
        with explain(self.url):
            return bytes(self.fs.cat_file(self.path(name), start=start, end=end))

    def write(self, name: str, data: bytes) -> None:
        """Writes a file, whole or not at all, over the one that was there."""
        with explain(self.url):
            if self._local:
                with _temporary(self.path(name), data) as temporary:
                    os.replace(temporary, self.path(name))
            else:
                self.fs.pipe_file(self.path(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """Writes a file only if it is not there yet; False when it was. Of several at once one wins."""
        with explain(self.url):
            try:
                if self._local:
                    with _temporary(self.path(name), data) as temporary:
                        os.link(temporary, self.path(name))
                else:
                    self.fs.pipe_file(self.path(name), data, mode="create")
            except FileExistsError:
                return False
            return True

    def list(self, prefix: str = "") -> builtins.list[str]:
        """Files under it at any depth, relative to the store, sorted; [] when there is no such directory."""
        with explain(self.url):
            self._forget()
            base = self.path(prefix) if prefix else self.root
            try:
                found = self.fs.find(base)
            except FileNotFoundError:
                return []
        start = len(self.root.rstrip("/")) + 1
        return sorted(path[start:] for path in found)

    def dirs(self, prefix: str = "") -> builtins.list[str]:
        """Names of the directories right under it, sorted."""
        with explain(self.url):
            self._forget()
            try:
                found = self.fs.ls(self.path(prefix) if prefix else self.root, detail=True)
            except FileNotFoundError:
                return []
        return sorted(e["name"].rstrip("/").rpartition("/")[2] for e in found if e["type"] == "directory")

    def size(self, name: str) -> int:
        """Bytes of a file."""
        with explain(self.url):
            self._forget()
            return int(self.fs.size(self.path(name)))

    def delete(self, prefix: str) -> None:
        """Removes a file or a directory with all in it; fine when there is none."""
        with explain(self.url):
            self._forget()
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm(self.path(prefix), recursive=True)

    def _forget(self) -> None:
        """Listings that fsspec keeps would hide what other processes did."""
        self.fs.invalidate_cache()


def open_store(url: str | os.PathLike[str]) -> Store:
    """The store at a URL or path.

    Raises:
        StoreError: no such kind of storage.
    """
    fs, root = filesystem(url)
    local = "file" in _protocols(fs)
    return Store(root if local else fs.unstrip_protocol(root).rstrip("/"), fs, root.rstrip("/"))


def filesystem(url: str | os.PathLike[str]) -> tuple[Any, str]:
    """The fsspec filesystem of a URL, and the path within it."""
    text = os.fspath(url)
    options = _s3_options() if text.startswith(("s3://", "s3a://")) else {}
    try:
        fs, path = fsspec.core.url_to_fs(text, **options)
    except (ValueError, ImportError) as error:
        raise StoreError(
            f"{text}: {error}; use a path, file://, s3:// or another URL that fsspec has a backend for"
        ) from None
    return fs, str(path)


def _s3_options() -> dict[str, Any]:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    config: dict[str, Any] = {
        "connect_timeout": _CONNECT_SECONDS,
        "read_timeout": _READ_SECONDS,
        "retries": {"mode": "standard", "max_attempts": _ATTEMPTS},
    }
    if endpoint:
        # A server of one's own seldom has a name for every bucket.
        config["s3"] = {"addressing_style": "path"}
    client = {"region_name": region} if region else {}
    return {
        "endpoint_url": endpoint,
        "client_kwargs": client,
        "config_kwargs": config,
        "use_listings_cache": False,
        "default_fill_cache": False,
    }


@contextlib.contextmanager
def _temporary(path: str, data: bytes) -> Iterator[str]:
    """A complete, synced file beside `path`, gone afterwards whatever happens."""
    directory = os.path.dirname(path)
    os.makedirs(directory, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=directory, prefix=".tmp-")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, 0o644)
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


@contextlib.contextmanager
def explain(url: str) -> Iterator[None]:
    """Turns what storage libraries raise into a StoreError; a missing file and a full disk pass through."""
    try:
        yield
    except (StoreError, FileNotFoundError, FileExistsError):
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StoreError(_sentence(url, error)) from error
    except Exception as error:
        if not _is_storage(error):
            raise
        raise StoreError(_sentence(url, error)) from error


def _is_storage(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] in ("botocore", "aiobotocore", "aiohttp", "s3fs", "gcsfs", "adlfs")


def _sentence(url: str, error: BaseException) -> str:
    text = f"{type(error).__name__} {error} {error.__cause__ or ''}"
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
    known = {
        ("NoCredentials", "Unable to locate credentials"): (
            "no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
        ),
        ("SignatureDoesNotMatch", "InvalidAccessKeyId", "InvalidToken"): (
            f"{endpoint} does not accept the credentials; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ),
        ("ExpiredToken",): "the credentials have expired; renew them",
        ("AccessDenied", "Forbidden", "403", "PermissionError", "Permission denied"): (
            "access is denied; these credentials, or this user, may not read or write there"
        ),
        ("NoSuchBucket", "bucket does not exist"): "the bucket does not exist; create it or correct the URL",
        ("EndpointConnection", "Could not connect", "ConnectTimeout", "Connection refused", "ConnectionClosed"): (
            f"{endpoint} can't be reached; check AWS_ENDPOINT_URL and the network"
        ),
    }
    for words, sentence in known.items():
        if any(word in text for word in words):
            return f"{url}: {sentence}"
    return f"{url}: {type(error).__name__}: {error}"


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
