"""The files of a dataset: what a directory, glob or file of Parquet holds, by listing alone.

fs, path = filesystem("s3://bucket/digits/train")
list_files(fs, path, url, "data.train")     # [DataFile(path, size, etag), ...] in the order of their names
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import pyarrow as pa
import pyarrow.compute as pc

from dltrain.errors import DataError

__all__ = ["UNFINISHED", "DataFile", "Files", "below", "list_files"]

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


class Files(Sequence[DataFile]):
    """Many files as columns: a hundred thousand of them are made, stored and loaded in milliseconds.

    Args:
        columns: an Arrow struct array of `DataFile`'s fields.
    """

    KIND = pa.struct(
        [("path", pa.string()), ("size", pa.int64()), ("etag", pa.string())]
        + [(name, pa.int64()) for name in ("footer_at", "footer_bytes")]
    )

    def __init__(self, columns: pa.StructArray) -> None:
        self.columns = columns

    @classmethod
    def of(cls, files: Iterable[DataFile]) -> Files:
        """The same files."""
        if isinstance(files, Files):
            return files
        listed = list(files)
        columns = [pa.array([getattr(f, field.name) for f in listed], field.type) for field in cls.KIND]
        return cls(pa.StructArray.from_arrays(columns, fields=list(cls.KIND)))

    def __len__(self) -> int:
        return len(self.columns)

    @overload
    def __getitem__(self, index: int) -> DataFile: ...

    @overload
    def __getitem__(self, index: slice) -> Files: ...

    def __getitem__(self, index: int | slice) -> DataFile | Files:
        if isinstance(index, slice):
            return Files(self.columns[index])
        return DataFile(**self.columns[index].as_py())

    def __iter__(self) -> Iterator[DataFile]:
        lines = (self.columns.field(field.name).to_pylist() for field in self.KIND)
        return (DataFile(*line) for line in zip(*lines, strict=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Files) and bool(self.columns.equals(other.columns))

    __hash__ = None  # type: ignore[assignment]

    def same_versions(self, others: Files) -> bool:
        """Whether these are the same files in the same versions, wherever their footers are kept."""
        return all(self.columns.field(name).equals(others.columns.field(name)) for name in ("path", "size", "etag"))

    def identity(self) -> Iterator[bytes]:
        """What tells these files from others."""
        for name in ("path", "etag"):
            texts = self.columns.field(name)
            lines = pa.ListArray.from_arrays(pa.array([0, len(texts)], pa.int32()), texts)
            yield pc.binary_join(lines, "\n")[0].as_py().encode()
        yield self.columns.field("size").to_numpy().astype("<i8").tobytes()


def list_files(fs: Any, path: str, url: str, field: str) -> list[DataFile]:
    """The Parquet files of a directory, glob or file, in the order of their names.

    Raises:
        DataError: there are none.
    """
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
    # Of a file it finds the file itself: one request says which of the two it is, and what is there.
    everything = fs.find(path, detail=True)
    if list(everything) == [path]:
        return everything, 0
    if any(name.endswith(f"/{UNFINISHED}") for name in everything):
        raise DataError(
            f"{path} is not complete: `dltrain data rewrite` or `predict` is writing it, or was interrupted; let "
            "it finish, or run it again"
        )
    found = {k: v for k, v in everything.items() if k.endswith(_SUFFIXES) and not _hidden(k[len(path) :])}
    return found, len(everything) - len(found)


def _hidden(relative: str) -> bool:
    """Writers leave _SUCCESS, _temporary/ and .crc files beside the data."""
    return any(part.startswith(("_", ".")) for part in relative.strip("/").split("/"))


def _etag(info: Mapping[str, Any]) -> str:
    tag = info.get("ETag") or info.get("etag") or info.get("mtime") or ""
    return str(tag).strip('"')
