"""Where bytes come from: ranges of S3 objects, and of anything else that fsspec knows.

backend = open_backend("s3://bucket/data")
backend.read(file, 0, 4096)

A range is read with one request, and only of the version of the file that the catalog listed.
"""

from __future__ import annotations

import os
import threading
from typing import Any, Protocol

from dltrain.data.catalog import DataFile
from dltrain.errors import DataChangedError
from dltrain.store import filesystem, s3_options, s3_session

__all__ = ["Backend", "changed", "check_local", "open_backend"]

# Short: a part that stalls is cheap to ask for again.
_READ_SECONDS = 20


class Backend(Protocol):
    """Reads ranges, from several threads at once."""

    def read(self, file: DataFile, start: int, end: int, fresh: bool = False) -> bytes:
        """Bytes [start, end), fewer where the connection broke off; `fresh` asks for a connection of its own.

        Raises:
            DataChangedError: the file is not the one that was listed.
        """

    def renew(self) -> None:
        """Begins again with the credentials of this moment."""

    def close(self) -> None:
        """Lets go of connections that nobody uses."""


def open_backend(url: str, connections: int) -> Backend | None:
    """The backend of a dataset's URL; None for files of this machine, which pyarrow reads best by itself."""
    if url.startswith(("s3://", "s3a://")):
        return S3Backend(connections)
    fs, _ = filesystem(url)
    protocol = (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
    return None if "file" in protocol else FsspecBackend(url)


def changed(file: DataFile, how: str) -> DataChangedError:
    """The error for a file that is not the one the run was planned with."""
    return DataChangedError(
        f"{file.path} has changed since the run was planned ({how}); its rows are no longer those that the order of "
        "samples was made of: restore the file, or start a run under another name"
    )


def check_local(file: DataFile) -> None:
    """Raises DataChangedError when a local file is not the one that was listed."""
    try:
        found = os.stat(file.path)
    except FileNotFoundError:
        raise changed(file, "it is gone") from None
    if found.st_size != file.size or str(found.st_mtime) != file.etag:
        raise changed(file, f"{file.size:,} bytes then, {found.st_size:,} now, or written to")


class S3Backend:
    """Objects by botocore in the caller's thread: less CPU per byte than through an event loop.

    It repeats nothing: that is the fetcher's part, which knows what is urgent.
    """

    def __init__(self, connections: int) -> None:
        self._connections = connections
        self._lock = threading.Lock()
        self.renew()

    def renew(self) -> None:
        """New clients, with the credentials of this moment."""
        client = _s3_client(self._connections)
        with self._lock:
            self._client: Any = client
            self._fresh: Any = None

    def close(self) -> None:
        """Closes the connections that no request is using."""
        for client in (self._client, self._fresh):
            if client:
                client.close()

    def read(self, file: DataFile, start: int, end: int, fresh: bool = False) -> bytes:
        from botocore.exceptions import ClientError

        bucket, _, key = file.path.partition("/")
        match = {"IfMatch": f'"{file.etag}"'} if file.etag else {}
        client = self._fresh_client() if fresh else self._client
        try:
            reply = client.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}", **match)
            return bytes(reply["Body"].read())
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            if code in ("PreconditionFailed", "412"):
                raise changed(file, "another version is there") from None
            if code in ("NoSuchKey", "404"):
                raise changed(file, "it is gone") from None
            if code == "InvalidRange":
                raise changed(file, "it is shorter") from None
            raise

    def _fresh_client(self) -> Any:
        """A client that makes a connection for each request."""
        with self._lock:
            if self._fresh is None:
                self._fresh = _s3_client(self._connections)
                self._fresh.meta.events.register("before-send.s3", _ask_to_close)
            return self._fresh


def _s3_client(connections: int) -> Any:
    import botocore.session
    from botocore.config import Config

    options = s3_options()
    changes = {"retries": {"total_max_attempts": 1}, "read_timeout": _READ_SECONDS}
    return s3_session(botocore.session.Session).create_client(
        "s3",
        endpoint_url=options["endpoint_url"],
        config=Config(**{**options["config_kwargs"], **changes}, max_pool_connections=connections),
        **options["client_kwargs"],
    )


def _ask_to_close(request: Any, **_: Any) -> None:
    request.headers["Connection"] = "close"


class FsspecBackend:
    """Whatever fsspec has a filesystem for."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.renew()

    def renew(self) -> None:
        """A new filesystem."""
        self._fs, _ = filesystem(self._url)

    def close(self) -> None:
        """Its connections are fsspec's."""

    def read(self, file: DataFile, start: int, end: int, fresh: bool = False) -> bytes:  # noqa: ARG002 - always so
        try:
            return bytes(self._fs.cat_file(file.path, start=start, end=end))
        except FileNotFoundError:
            raise changed(file, "it is gone") from None
