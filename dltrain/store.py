"""Storage: the few verbs dltrain asks of any fsspec URL, and errors a user can act on.

    store = open_store("s3://bucket/runs").child("image-cnn")
    store.write("state.json", data)          # whole or not at all
    store.create("attempts/1", b"")          # only if it was not there
    with explain(url): fs, path = filesystem(url); fs.open(path)

S3: endpoint from AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, region from AWS_REGION or AWS_DEFAULT_REGION,
credentials from the environment or the usual chain. A Store may be used from several threads at once, not
across a fork.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import functools
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import fsspec

from dltrain.errors import StoreError

__all__ = ["Store", "explain", "filesystem", "open_store", "s3_options", "s3_session"]

_CONNECT_SECONDS = 5
_READ_SECONDS = 60
# botocore repeats a request that failed on the way, s3fs a reply that broke off: the worst case is the product.
_ATTEMPTS = 3
_REPEATS = 2
_CREATE_TRIES = 5
_TEMPORARY = ".dltrain-tmp-"
_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


class Store:
    """A directory in some storage.

    Every verb raises StoreError when the storage can't be reached or refuses.

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
        return Store("/".join([self.url.rstrip("/"), *parts]), self.fs, self.path(*parts))

    def exists(self, name: str) -> bool:
        """Whether there is such a file or directory now."""
        try:
            with self._asking():
                # Not fs.exists: for a bucket it takes every failure for "no".
                self.fs.info(self._under(name))
        except FileNotFoundError:
            return False
        return True

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """A file, or its bytes [start, end), fewer where the file ends.

        Raises:
            FileNotFoundError: there is none.
        """
        with self._asking():
            try:
                return bytes(self.fs.cat_file(self.path(name), start=start, end=end))
            except OSError as error:
                # S3 has no reply for a range that begins past the end.
                if _code(error) == "InvalidRange":
                    return b""
                raise

    def write(self, name: str, data: bytes) -> None:
        """Writes a file, whole or not at all, over the one that was there."""
        with self._asking():
            if self._local:
                with _temporary(self.path(name), data) as temporary:
                    os.replace(temporary, self.path(name))
            else:
                self.fs.pipe_file(self.path(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """Writes a file only if it is not there yet; False when it was. Of several at once one wins.

        Also False where S3's reply to a write that succeeded was lost and the repeat found the file.
        """
        with self._asking():
            return _link(self.path(name), data) if self._local else _put_new(self.fs, self.path(name), data)

    def list(self, prefix: str = "") -> builtins.list[str]:
        """Files under it at any depth, relative to the store, sorted; [] when there is no such directory."""
        base = self._under(prefix).rstrip("/")
        try:
            with self._asking():
                found = list(_walk(base)) if self._local else self.fs.find(base)
        except FileNotFoundError:
            return []
        start = len(self.root.rstrip("/")) + 1
        return sorted(path[start:] for path in found if path.startswith(f"{base}/") and not path.endswith("/"))

    def dirs(self, prefix: str = "") -> builtins.list[str]:
        """Names of the directories right under it, sorted; [] when there is no such directory."""
        try:
            with self._asking():
                return sorted(_directories(self.fs, self._under(prefix), self._local))
        except FileNotFoundError:
            return []

    def size(self, name: str) -> int:
        """Bytes of a file.

        Raises:
            FileNotFoundError: there is none.
        """
        with self._asking():
            return int(self.fs.info(self.path(name))["size"])

    def delete(self, prefix: str) -> None:
        """Removes a file or a directory with all in it; fine when there is none."""
        if not prefix.strip("/"):
            raise ValueError(f"{self.url}: delete needs the name of a file or directory under it")
        with contextlib.suppress(FileNotFoundError), self._asking():
            if self._local:
                _remove(self.path(prefix))
            else:
                self._remove_objects(self.path(prefix))

    def _remove_objects(self, path: str) -> None:
        before = set(self.fs.find(path))
        self.fs.rm(path, recursive=True)
        self.fs.invalidate_cache()
        # s3fs drops the per-object refusals of a bulk delete.
        kept = sorted(before & set(self.fs.find(path)))
        if kept:
            raise StoreError(
                f"{self.url}: {len(kept)} of {len(before)} files could not be deleted, {kept[0]} among them; "
                "let this user delete there, or remove the retention rule"
            )

    def _under(self, name: str) -> str:
        return self.path(name) if name else self.root

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """`explain` for one request, of which no listing kept from before is used."""
        with explain(self.url):
            self.fs.invalidate_cache()
            try:
                yield
            except PermissionError as error:
                # The reply to a HEAD has no body; a listing's says whether it was the key, the signature or a policy.
                if _code(error) == "403":
                    self.fs.ls(self.root)
                raise


def open_store(url: str | os.PathLike[str]) -> Store:
    """The store at a URL or path.

    Raises:
        StoreError: no such kind of storage.
    """
    fs, root = filesystem(url)
    root = root.rstrip("/")
    return Store((root or "/") if "file" in _protocols(fs) else fs.unstrip_protocol(root).rstrip("/"), fs, root)


def filesystem(url: str | os.PathLike[str]) -> tuple[Any, str]:
    """The fsspec filesystem of a URL (a directory, glob or file), and the path within it.

    Raises:
        StoreError: no such kind of storage, or its settings can't be used.
    """
    text = os.fspath(url)
    is_s3 = text.startswith(("s3://", "s3a://"))
    if is_s3 and not text.partition("://")[2].strip("/"):
        raise StoreError(f"{text}: names no bucket; write s3://bucket/path")
    try:
        fs, path = fsspec.core.url_to_fs(text, **(s3_options() if is_s3 else {}))
    except (ValueError, ImportError) as error:
        raise StoreError(
            f"{text}: {error}; use a path, file://, s3:// or another URL that fsspec has a backend for"
        ) from error
    if is_s3:
        import aiobotocore.session

        fs.retries = _REPEATS
        fs.session = s3_session(aiobotocore.session.AioSession)
    return fs, str(path)


def s3_session(kind: Callable[[], Any]) -> Any:
    """A session of botocore's, with the credentials of this moment; its descriptions of S3 are read once a process.

    To read them takes a sixth of a second, for every client that is made.
    """
    session = kind()
    session.register_component("data_loader", _s3_loader())
    return session


@functools.cache
def _s3_loader() -> Any:
    import botocore.session

    return botocore.session.Session().get_component("data_loader")


def s3_options() -> dict[str, Any]:
    """What s3fs is opened with, from the environment: endpoint, region, timeouts, addressing."""
    variable, endpoint = _endpoint()
    if endpoint and not endpoint.startswith(("http://", "https://")):
        raise StoreError(f"{variable} is {endpoint!r}, which is no URL; begin it with http:// or https://")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return {
        "endpoint_url": endpoint or None,
        "client_kwargs": {"region_name": region} if region else {},
        "config_kwargs": _s3_config(bool(endpoint)),
        "use_listings_cache": False,
        # A kept instance would go on with the credentials of its first use.
        "skip_instance_cache": True,
    }


def _s3_config(own_server: bool) -> dict[str, Any]:
    config: dict[str, Any] = {
        "connect_timeout": _CONNECT_SECONDS,
        "read_timeout": _READ_SECONDS,
        "retries": {"mode": "standard", "total_max_attempts": _ATTEMPTS},
    }
    if own_server:
        # Such a server seldom has a name for every bucket, and the older ones refuse AWS's newer checksums.
        config["s3"] = {"addressing_style": "path"}
        for option in ("request_checksum_calculation", "response_checksum_validation"):
            if f"AWS_{option.upper()}" not in os.environ:
                config[option] = "when_required"
    return config


def _endpoint() -> tuple[str, str]:
    """The variable that sets the S3 endpoint, and the endpoint; empty for AWS itself."""
    for variable in _ENDPOINT_VARIABLES:
        if os.environ.get(variable):
            return variable, os.environ[variable]
    return _ENDPOINT_VARIABLES[0], ""


# ---------------------------------------------------------------------------------------------------------------
# Local files. fsspec's own walk takes a directory in which a file vanishes meanwhile for an empty one.


@contextlib.contextmanager
def _temporary(path: str, data: bytes) -> Iterator[str]:
    """A complete, synced file beside `path`, gone afterwards whatever happens."""
    directory = os.path.dirname(path)
    os.makedirs(directory, exist_ok=True)
    temporary = os.path.join(directory, _TEMPORARY + uuid.uuid4().hex)
    try:
        _write_new(temporary, data)
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _write_new(path: str, data: bytes) -> None:
    with open(path, "xb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


def _link(path: str, data: bytes) -> bool:
    with _temporary(path, data) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise
            return _open_new(path, data)
    return True


def _open_new(path: str, data: bytes) -> bool:
    """As `_link` where the file system has no hard links: still exclusive, but a crash may leave it cut short."""
    try:
        _write_new(path, data)
    except FileExistsError:
        return False
    return True


def _walk(base: str) -> Iterator[str]:
    for directory, _, names in os.walk(base, onerror=_unless_gone):
        yield from (os.path.join(directory, name) for name in names if not name.startswith(_TEMPORARY))


def _unless_gone(error: BaseException) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _remove(path: str) -> None:
    def skip_gone(_function: Callable[..., Any], _path: str, info: tuple[Any, BaseException, Any]) -> None:
        _unless_gone(info[1])

    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, onerror=skip_gone)
    else:
        os.unlink(path)


# ---------------------------------------------------------------------------------------------------------------
# Both kinds.


def _directories(fs: Any, path: str, local: bool) -> Iterator[str]:
    if local:
        with contextlib.suppress(NotADirectoryError), os.scandir(path or "/") as entries:
            yield from (entry.name for entry in entries if entry.is_dir())
    else:
        for entry in fs.ls(path, detail=True):
            if entry["type"] == "directory":
                yield entry["name"].rstrip("/").rpartition("/")[2]


def _put_new(fs: Any, path: str, data: bytes) -> bool:
    for _ in range(_CREATE_TRIES):
        try:
            fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            if _code(error) == "PreconditionFailed":
                return False
            # AWS: another conditional write is under way; ask again once it is decided.
            if _code(error) != "ConditionalRequestConflict":
                raise
        else:
            return True
    return False


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


# ---------------------------------------------------------------------------------------------------------------
# Errors.

_LIBRARIES = ("botocore", "aiobotocore", "aiohttp", "fsspec", "s3fs", "gcsfs", "google", "adlfs", "azure")
_BAD_KEYS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to a pair that belongs to it"
_UNREACHABLE = "{endpoint} can't be reached; check {variable} and the network"
_NO_CREDENTIALS = (
    "no S3 credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, on every machine"
)

# What S3 calls it, or the class of the exception -> what to tell the user.
_SENTENCES = {
    "NoCredentialsError": _NO_CREDENTIALS,
    "PartialCredentialsError": "only half of the S3 credentials was found; set AWS_ACCESS_KEY_ID and"
    " AWS_SECRET_ACCESS_KEY",
    "ProfileNotFound": "the profile that AWS_PROFILE names is not in ~/.aws; correct or unset AWS_PROFILE",
    "SignatureDoesNotMatch": f"{{endpoint}} refuses the secret key (SignatureDoesNotMatch); {_BAD_KEYS}",
    "InvalidAccessKeyId": f"{{endpoint}} does not know the access key (InvalidAccessKeyId); {_BAD_KEYS}",
    "InvalidToken": "{endpoint} refuses the session token; set AWS_SESSION_TOKEN to that of the keys, or unset it",
    "ExpiredToken": "the session token has expired; renew AWS_SESSION_TOKEN and the keys that came with it",
    "RequestTimeTooSkewed": "this machine's clock is too far from that of {endpoint}; set it right",
    "AccessDenied": "{endpoint} denies access to this user; allow reading and writing there in the bucket's policy",
    "403": "{endpoint} denies access (403); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy",
    "NoSuchBucket": "the bucket does not exist at {endpoint}; create it, or correct the URL or {variable}",
    "InvalidBucketName": "S3 allows no such name for a bucket; correct the URL",
    "QuotaExceeded": "the quota at {endpoint} is used up; free space or raise it",
    "EndpointConnectionError": _UNREACHABLE,
    "ConnectTimeoutError": _UNREACHABLE,
    "ConnectionClosedError": _UNREACHABLE,
    "ReadTimeoutError": f"{{endpoint}} did not answer within {_READ_SECONDS} s; check it, and the network",
    "SSLError": "no secure connection to {endpoint}; check http or https in {variable}, or set AWS_CA_BUNDLE",
}


@contextlib.contextmanager
def explain(url: str) -> Iterator[None]:
    """Turns what storage libraries raise into a StoreError; a missing file and a full disk pass through."""
    try:
        yield
    except OSError as error:
        if _passes(error):
            raise
        raise StoreError(_sentence(url, error)) from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in _LIBRARIES:
            raise
        raise StoreError(_sentence(url, error)) from error


def _passes(error: OSError) -> bool:
    if isinstance(error, FileNotFoundError):
        return _code(error) != "NoSuchBucket"
    return error.errno in (errno.ENOSPC, errno.EDQUOT) and not _code(error)


def _sentence(url: str, error: BaseException) -> str:
    variable, endpoint = _endpoint()
    key = next((name for name in (_code(error), *_classes(error)) if name in _SENTENCES), None)
    if key is None:
        return f"{url}: {type(error).__name__}: {error}"
    return f"{url}: {_SENTENCES[key].format(variable=variable, endpoint=endpoint or 'AWS')}"


def _code(error: BaseException) -> str:
    """What S3 called it; empty when S3 did not say anything."""
    for link in _chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def _classes(error: BaseException) -> Iterator[str]:
    return (base.__name__ for link in _chain(error) for base in type(link).__mro__)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
