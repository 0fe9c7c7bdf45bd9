"""The files of a dataset: what a directory, glob or file of Parquet holds, by listing alone.

list_files("s3://bucket/digits/train")      # [DataFile(path, size, etag), ...] in the order of their names
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dltrain.errors import DataError
from dltrain.store import explain, filesystem

__all__ = ["UNFINISHED", "DataFile", "below", "list_files"]

# A directory that has this file is still being written.
UNFINISHED = "_dltrain-unfinished"

_SUFFIXES = (".parquet", ".parq")
_WILD = "*?["


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of the dataset: its path within the filesystem, size in bytes, and version tag.

    Attributes:
        footer_at, footer_bytes: where its footer lies among those kept with the plan; 0 bytes: nowhere.
    """

    path: str
    size: int
    etag: str
    footer_at: int = 0
    footer_bytes: int = 0


def list_files(url: str, field: str = "data") -> list[DataFile]:
    """The files of a dataset, in the order of their names.

    Raises:
        DataError: there are none; StoreError: the storage can't be reached.
    """
    with explain(url):
        fs, path = filesystem(url)
        found, others = _find(fs, path)
    if not found:
        seen = f"{others} other file(s) there" if others else "nothing there"
        raise DataError(f"{field}: found no Parquet at {url} ({seen}); give a directory, glob or file of .parquet")
    return [DataFile(name, int(info["size"]), _etag(info)) for name, info in sorted(found.items())]


def below(path: str, root: str) -> str:
    """A file's path below the dataset's directory: of a glob, the part before its first wildcard."""
    fixed = root.rstrip("/").split("/")
    wild = next((i for i, part in enumerate(fixed) if any(c in part for c in _WILD)), len(fixed))
    # A dataset of one file has no directories of its own.
    return "/".join(path.split("/")[wild:]) or path.rsplit("/", 1)[-1]


def _find(fs: Any, path: str) -> tuple[dict[str, Any], int]:
    """The files to read, and how many others were passed over."""
    if any(c in path for c in _WILD):
        return {k: v for k, v in fs.glob(path, detail=True).items() if v["type"] == "file"}, 0
    try:
        info = fs.info(path)
    except FileNotFoundError:
        return {}, 0
    if info["type"] == "file":
        return {path: info}, 0
    everything = fs.find(path, detail=True)
    if any(name.endswith(f"/{UNFINISHED}") for name in everything):
        raise DataError(
            f"{path} is not complete: `dltrain data rewrite` is writing it, or was interrupted; let it finish, or "
            "run it again"
        )
    found = {k: v for k, v in everything.items() if k.endswith(_SUFFIXES) and not _hidden(k[len(path) :])}
    return found, len(everything) - len(found)


def _hidden(relative: str) -> bool:
    """Writers leave _SUCCESS, _temporary/ and .crc files beside the data."""
    return any(part.startswith(("_", ".")) for part in relative.strip("/").split("/"))


def _etag(info: Mapping[str, Any]) -> str:
    tag = info.get("ETag") or info.get("etag") or info.get("mtime") or ""
    return str(tag).strip('"')
