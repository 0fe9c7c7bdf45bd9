"""Reads units: only the row groups and columns asked for, decoded by pyarrow, a bounded amount kept.

reader = UnitReader(catalog, columns=("image", "label"))
reader.read(17)          # pa.Table of unit 17; single-flight between threads
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future

import pyarrow as pa
import pyarrow.parquet as pq

from dltrain.data.catalog import Catalog, read_footer
from dltrain.errors import DataError
from dltrain.store import explain, filesystem

__all__ = ["UnitReader"]

_KEEP_BYTES = 256 * 1024 * 1024


class UnitReader:
    """Decoded units of a catalog, with those read last kept up to `keep_bytes`."""

    def __init__(self, catalog: Catalog, columns: Sequence[str] | None = None, keep_bytes: int = _KEEP_BYTES) -> None:
        self._catalog = catalog
        self._columns = list(columns) if columns is not None else None
        self._keep_bytes = keep_bytes
        self._fs, _ = filesystem(catalog.url)
        self._lock = threading.Lock()
        self._units: OrderedDict[int, Future[pa.Table]] = OrderedDict()
        self._footers: dict[str, pq.FileMetaData] = {}
        self.bytes_read = 0

    def start(self, unit: int, needed: float) -> None:
        """Begins to fetch a unit."""

    def read(self, unit: int) -> pa.Table:
        """The unit's rows.

        Raises:
            DataError: the row group can't be decoded, or the file is not the one that was planned.
            StoreError: the storage can't be reached.
        """
        with self._lock:
            future = self._units.get(unit)
            mine = future is None
            if future is None:
                future = self._units[unit] = Future()
            self._units.move_to_end(unit)
        if mine:
            self._fill(unit, future)
        return future.result()

    def _fill(self, unit: int, future: Future[pa.Table]) -> None:
        try:
            future.set_result(self._load(unit))
        except BaseException as error:
            with self._lock:
                self._units.pop(unit, None)
            future.set_exception(error)
            return
        self._evict()

    def _load(self, unit: int) -> pa.Table:
        file, group = self._catalog.locate(unit)
        with explain(self._catalog.url):
            footer = self._footers.get(file.path)
            if footer is None:
                footer = self._footers[file.path] = read_footer(self._fs, file)
            if group >= footer.num_row_groups:
                raise DataError(f"{file.path} has changed since the run was planned: it lost row group {group}")
            try:
                # No read-ahead: pyarrow asks for exactly the ranges it needs, coalesced.
                with self._fs.open(file.path, "rb", cache_type="none") as raw:
                    source = pq.ParquetFile(pa.PythonFile(raw), metadata=footer, pre_buffer=True)
                    table = source.read_row_group(group, columns=self._columns, use_threads=False)
            except (OSError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                # An OSError without a number is pyarrow's own, about the bytes; the others are the store's.
                if isinstance(error, OSError) and (error.errno is not None or type(error) is not OSError):
                    raise
                raise DataError(f"{file.path}: row group {group} can't be decoded: {error}") from None
        self.bytes_read += int(self._catalog.units["bytes"][unit].as_py())
        return table

    def _evict(self) -> None:
        with self._lock:
            done = [(u, f.result().nbytes) for u, f in self._units.items() if f.done() and not f.exception()]
            held = sum(size for _, size in done)
            for unit, size in done[:-1]:
                if held <= self._keep_bytes:
                    return
                del self._units[unit]
                held -= size
