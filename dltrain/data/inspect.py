"""What a dataset holds and what to fix in it, from its footers and a few rows.

    found = inspect_data("s3://bucket/digits", global_batch=256, workers=8)
    found["columns"], found["row_groups"], found["order"], found["advice"]

Nothing is read but footers, and some rows of columns whose bytes say what they are. Files that are not Parquet,
or whose schema is another one, are part of the answer.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dltrain.data.advice import advise
from dltrain.data.catalog import DataFile, list_files, read_footer
from dltrain.data.content import what_it_holds
from dltrain.data.lists import even_lists
from dltrain.data.order import choose_lanes, read_amplification
from dltrain.data.reader import decode_errors
from dltrain.data.source import partition, top
from dltrain.errors import DataError, UserError
from dltrain.store import explain, filesystem

__all__ = ["inspect_data", "order_facts"]

# done, total: footers.
Progress = Callable[[int, int], None]
_FOOTER_THREADS = 16
_SAMPLE_ROWS = 8
_SAMPLE_BUFFER = 64 * 1024


def inspect_data(
    url: str, *, global_batch: int = 256, workers: int = 8, progress: Progress | None = None
) -> dict[str, Any]:
    """Everything `dltrain data inspect` says, ready for JSON.

    Args:
        global_batch, workers: of the run that the order and the memory are worked out for.

    Raises:
        DataError: nothing there that is Parquet.
        StoreError: the storage can't be reached.
        UserError: a batch or a number of workers that can't be.
    """
    if global_batch < 1 or workers < 1:
        raise UserError(f"--global-batch is {global_batch}, --workers is {workers}; both must be >= 1")
    with explain(url):
        fs, root = filesystem(url)
        files = list_files(fs, root, url, "URL")
        facts, refused = _read_all(fs, files, progress)
        if not facts:
            raise DataError(f"URL: {url} holds no Parquet: {refused[0]['reason']}")
        samples, broken = _sample(fs, facts)
    found: dict[str, Any] = {
        "url": url,
        "files": _files(facts, files, refused),
        "rows": sum(fact.rows for fact in facts),
        "row_groups": _row_groups(facts, samples),
        "columns": _columns(facts, samples),
        "partitions": _partitions(root, files),
        "schema_differences": _differences(facts),
        "unreadable": broken,
    }
    found["order"] = order_facts(found["row_groups"], global_batch, workers)
    return {**found, "advice": advise(found)}


def order_facts(row_groups: Mapping[str, Any], global_batch: int, workers: int) -> dict[str, Any]:
    """The order of samples that a run would have, and what each worker would hold for it.

    `vif` is how many times larger the variance of a batch's mean is than with a full shuffle, for data that is
    sorted by row group: 1 + (s - 1) / K with s rows of each lane in a batch. A single row group is shuffled wholly.
    """
    units = row_groups["count"] - row_groups["empty"]
    if not units:
        return {}
    lanes, window = choose_lanes(units, global_batch)
    per_lane = global_batch / lanes
    mean = row_groups["decoded_bytes"]["total"] / units
    return {
        "global_batch": global_batch,
        "workers": workers,
        "lanes": lanes,
        "window": window,
        "vif": round(1 + (per_lane - 1) / window if units > 1 else 1.0, 3),
        # This window and the next one of each lane that it reads.
        "memory_bytes_per_worker": int(-(-lanes // workers) * 2 * window * mean),
        "read_amplification": round(read_amplification(units, lanes, workers), 3),
    }


# ---- footers ----


@dataclass
class _Column:
    """One column in one file."""

    compressed: int = 0
    encoded: int = 0
    nulls: int | None = 0
    codecs: set[str] = field(default_factory=set)


@dataclass
class _File:
    """What is kept of a footer: groups are (rows, bytes on the wire, encoded bytes by column)."""

    file: DataFile
    schema: pa.Schema
    footer_bytes: int
    groups: list[tuple[int, int, dict[str, int]]]
    columns: dict[str, _Column]
    lists: dict[str, int]

    @property
    def rows(self) -> int:
        return sum(rows for rows, _, _ in self.groups)


def _read_all(
    fs: Any, files: Sequence[DataFile], progress: Progress | None
) -> tuple[list[_File], list[dict[str, str]]]:
    """Facts of the files that are Parquet, and why others are not."""

    def read(file: DataFile) -> _File | str:
        try:
            return _facts(file, read_footer(fs, file))
        except DataError as error:
            return str(error)

    facts: list[_File] = []
    refused: list[dict[str, str]] = []
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        for done, (file, found) in enumerate(zip(files, pool.map(read, files), strict=True), 1):
            if isinstance(found, str):
                refused.append({"file": file.path, "reason": found})
            else:
                facts.append(found)
            if progress:
                progress(done, len(files))
    return facts, refused


def _facts(file: DataFile, footer: pq.FileMetaData) -> _File:
    schema = footer.schema.to_arrow_schema().remove_metadata()
    columns = {name: _Column() for name in schema.names}
    groups = []
    for group in map(footer.row_group, range(footer.num_row_groups)):
        encoded = dict.fromkeys(schema.names, 0)
        wire = 0
        for chunk in map(group.column, range(group.num_columns)):
            column = columns[top(chunk)]
            column.compressed += chunk.total_compressed_size
            column.encoded += chunk.total_uncompressed_size
            column.codecs.add(chunk.compression)
            # Within a list or a struct they are not counted by row.
            known = chunk.path_in_schema == top(chunk) and chunk.is_stats_set and chunk.statistics.has_null_count
            column.nulls = column.nulls + chunk.statistics.null_count if known and column.nulls is not None else None
            encoded[top(chunk)] += chunk.total_uncompressed_size
            wire += chunk.total_compressed_size
        groups.append((group.num_rows, wire, encoded))
    return _File(file, schema, footer.serialized_size, groups, columns, even_lists([footer], schema))


# ---- a few rows ----


def _sample(fs: Any, facts: Sequence[_File]) -> tuple[dict[str, Any], list[str]]:
    """The first rows of columns that don't say by their type what they hold, and what could not be decoded."""
    first = next((fact for fact in facts if fact.rows), None)
    names = [f.name for f in first.schema if _is_variable(f.type)] if first else []
    if not first or not names:
        return {}, []
    group = next(i for i, (rows, _, _) in enumerate(first.groups) if rows)
    try:
        with fs.open(first.file.path, "rb", cache_type="none") as source, decode_errors(first.file, group):
            reader = pq.ParquetFile(source, buffer_size=_SAMPLE_BUFFER, pre_buffer=False)
            batch = next(reader.iter_batches(_SAMPLE_ROWS, row_groups=[group], columns=names, use_threads=False))
    except DataError as error:
        return {}, [str(error)]
    return {name: batch.column(name) for name in batch.schema.names}, []


def _is_variable(kind: pa.DataType) -> bool:
    fixed = (pa.types.is_fixed_size_binary, pa.types.is_fixed_size_list)
    return not pa.types.is_primitive(kind) and not any(test(kind) for test in fixed)


def _row_bytes(kind: pa.DataType) -> float | None:
    """Bytes of a row in memory; None for types whose rows differ."""
    if pa.types.is_fixed_size_list(kind):
        inner = _row_bytes(kind.value_type)
        return None if inner is None else kind.list_size * inner
    if pa.types.is_fixed_size_binary(kind):
        return float(kind.byte_width)
    return kind.bit_width / 8 if pa.types.is_primitive(kind) else None


# ---- what is made of them ----


def _spread(values: Iterable[int]) -> dict[str, int]:
    sizes = sorted(values)
    if not sizes:
        return {"min": 0, "median": 0, "max": 0, "total": 0}
    return {"min": sizes[0], "median": int(statistics.median(sizes)), "max": sizes[-1], "total": sum(sizes)}


def _files(facts: Sequence[_File], files: Sequence[DataFile], refused: Sequence[Any]) -> dict[str, Any]:
    return {
        "count": len(files),
        "bytes": _spread(file.size for file in files),
        "empty": [fact.file.path for fact in facts if not fact.rows],
        "not_parquet": list(refused),
    }


def _row_groups(facts: Sequence[_File], samples: Mapping[str, Any]) -> dict[str, Any]:
    groups = [(fact.schema, *group) for fact in facts for group in fact.groups]
    full = [group for group in groups if group[1]]
    decoded = (_decoded(schema, rows, encoded, samples) for schema, rows, _, encoded in full)
    return {
        "count": len(groups),
        "empty": len(groups) - len(full),
        "rows": _spread(rows for _, rows, _, _ in full),
        "compressed_bytes": _spread(wire for _, _, wire, _ in full),
        "decoded_bytes": _spread(decoded),
    }


def _decoded(schema: pa.Schema, rows: int, encoded: Mapping[str, int], samples: Mapping[str, Any]) -> int:
    """About how much memory a row group takes: by type, or as much as the rows seen, or its encoded bytes."""
    total = 0.0
    for f in schema:
        width = _row_bytes(f.type)
        if width is None:
            seen = samples.get(f.name)
            width = max(encoded[f.name] / rows, seen.nbytes / len(seen) if seen else 0.0)
        total += rows * width
    return int(total)


def _columns(facts: Sequence[_File], samples: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [_column(f, facts, samples.get(f.name)) for f in facts[0].schema]


def _column(f: pa.Field, facts: Sequence[_File], sample: Any) -> dict[str, Any]:
    parts = [fact.columns[f.name] for fact in facts if f.name in fact.columns]
    nulls = [part.nulls for part in parts]
    full = [fact for fact in facts if fact.rows]
    lengths = {fact.lists.get(f.name) for fact in full}
    return {
        "name": f.name,
        "type": str(f.type),
        "nullable": f.nullable,
        "nulls": None if None in nulls else sum(n for n in nulls if n),
        "holds": what_it_holds(f.type, sample),
        "list_length": lengths.pop() if len(lengths) == 1 else None,
        "compressed_bytes": sum(part.compressed for part in parts),
        "encoded_bytes": sum(part.encoded for part in parts),
        "compression": sorted(set().union(*(part.codecs for part in parts))),
    }


def _partitions(root: str, files: Sequence[DataFile]) -> dict[str, int]:
    """The keys of key=value directories, and how many values each has."""
    pairs = {pair for file in files for pair in partition(root, file.path).split("/") if pair}
    return dict(Counter(pair.partition("=")[0] for pair in sorted(pairs)))


def _differences(facts: Sequence[_File]) -> list[dict[str, Any]]:
    """Columns that are not of one type in all files: {"columns", "types": {type: {"files", "example"}}}."""
    names = sorted({name for fact in facts for name in fact.schema.names})
    found: list[dict[str, Any]] = []
    for name in names:
        types: dict[str, dict[str, Any]] = {}
        for fact in facts:
            kind = str(fact.schema.field(name).type) if name in fact.schema.names else "missing"
            entry = types.setdefault(kind, {"files": 0, "example": fact.file.path})
            entry["files"] += 1
        if len(types) == 2 and "missing" in types:
            # Then the type is not what differs, and columns that go together are told together.
            types = {"missing" if kind == "missing" else "present": entry for kind, entry in types.items()}
        same = next((difference for difference in found if difference["types"] == types), None)
        if same:
            same["columns"].append(name)
        elif len(types) > 1:
            found.append({"columns": [name], "types": types})
    return found
