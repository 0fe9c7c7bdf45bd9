"""What to fix in a dataset: each fault with the reason and the command, from what `inspect` found.

advise(found)          # [{"problem": ..., "why": ..., "fix": ...}], the worst first
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from dltrain.data.content import ENCODED
from dltrain.data.order import choose_lanes
from dltrain.data.progress import human_bytes

__all__ = ["advise"]

_MIB = 1024 * 1024
# A row group is decoded as a whole.
_GIANT_BYTES = 512 * _MIB
# Below this a request costs more than the bytes it brings; a dataset of the second size is read but once.
_TINY_BYTES, _SMALL_DATA = 1 * _MIB, 64 * _MIB
_GOOD_MIB = 32
# Batches noticeably less mixed than with a full shuffle.
_MIXED_VIF = 1.5
_SLOW_CODECS = ("GZIP", "BROTLI")
# Of the bytes that compression leaves, where it is not worth its time.
_INCOMPRESSIBLE = 0.97


def advise(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """Advice on what `inspect_data` found."""
    rules = (_unreadable, _schemas, _files, _row_groups, _lists, _compression)
    return [{"problem": p, "why": w, "fix": f} for rule in rules for p, w, f in rule(found)]


Advice = Iterator[tuple[str, str, str]]


def _rewrite(found: Mapping[str, Any], *options: str) -> str:
    source = str(found["url"]).rstrip("/")
    target = source.partition("*")[0].rstrip("/").removesuffix(".parquet") + "-rewritten"
    return shlex.join(["dltrain", "data", "rewrite", source, target, *options])


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _unreadable(found: Mapping[str, Any]) -> Advice:
    for reason in found["unreadable"]:
        yield reason, "a run stops there unless data.bad_rows lets it go on", "restore the file, or remove it"
    bad = found["files"]["not_parquet"]
    if bad:
        yield (
            f"{_count(len(bad), 'file')} not Parquet: {bad[0]['reason']}",
            "a run refuses the whole directory",
            "remove such files, or write them again",
        )


def _schemas(found: Mapping[str, Any]) -> Advice:
    for difference in found["schema_differences"]:
        each = ", ".join(
            f"{kind} in {_count(types['files'], 'file')} ({types['example']})"
            for kind, types in difference["types"].items()
        )
        yield (
            f"the files differ in column {', '.join(map(repr, difference['columns']))}: {each}",
            "the rows of a batch must be alike; a run that reads this column is refused",
            "write these files alike, or leave the column out of the task's `columns`",
        )


def _files(found: Mapping[str, Any]) -> Advice:
    empty = found["files"]["empty"]
    if empty:
        yield (
            f"{_count(len(empty), 'file')} without rows, {empty[0]} among them",
            "its footer is read at every start, for nothing",
            "remove such files",
        )
    if found["row_groups"]["empty"]:
        yield (
            f"{_count(found['row_groups']['empty'], 'row group')} without rows",
            "they are passed over, but make the footers larger",
            _rewrite(found),
        )


def _row_groups(found: Mapping[str, Any]) -> Advice:
    groups, order = found["row_groups"], found["order"]
    if not order:
        return
    decoded, units = groups["decoded_bytes"], groups["count"] - groups["empty"]
    good = _good_mib(decoded["total"])
    better = choose_lanes(max(1, int(decoded["total"] / good / _MIB)), order["global_batch"])
    if decoded["max"] > _GIANT_BYTES:
        yield (
            f"a row group takes {human_bytes(decoded['max'])} in memory",
            f"row groups are decoded as a whole, and each worker would hold about "
            f"{human_bytes(order['memory_bytes_per_worker'])} of them",
            _rewrite(found, "--row-group-mb", f"{good:g}"),
        )
    elif decoded["total"] > _SMALL_DATA and order["lanes"] < min(order["workers"], better[0]):
        yield (
            f"{_count(units, 'row group')} for {order['workers']} workers",
            f"{_count(order['lanes'], 'lane')} can be read side by side, so that each row group is read up to "
            f"{order['read_amplification']:.1f} times an epoch",
            _rewrite(found, "--row-group-mb", f"{good:g}"),
        )
    elif order["vif"] > _MIXED_VIF:
        yield from _poor_shuffle(found, units, good, better)
    wire = groups["compressed_bytes"]
    if wire["median"] < _TINY_BYTES and wire["total"] > _SMALL_DATA and 2 * decoded["median"] < good * _MIB:
        yield (
            f"{_count(units, 'row group')}, half of them under {human_bytes(wire['median'])}",
            "each is a request of its own, which takes longer than its bytes do",
            _rewrite(found, "--row-group-mb", f"{good:g}"),
        )


def _good_mib(total_bytes: float) -> float:
    """32, or less where the data would not give the 1,024 row groups that shuffle well."""
    size = total_bytes / 1024 / _MIB
    return _GOOD_MIB if size >= _GOOD_MIB else max(0.25, 2.0 ** math.floor(math.log2(max(size, 0.25))))


def _poor_shuffle(found: Mapping[str, Any], units: int, good: float, better: tuple[int, int]) -> Advice:
    """`better`: lanes and window with row groups of `good` MiB."""
    order = found["order"]
    better_vif = 1 + (order["global_batch"] / better[0] - 1) / better[1]
    what = f"{_count(units, 'row group')} shuffle poorly into batches of {order['global_batch']}"
    why = (
        f"of data sorted by row group, the mean of a batch varies {order['vif']:.1f} times as much as in a full shuffle"
    )
    if better_vif < 0.7 * order["vif"]:
        smaller = f"{why}; with smaller row groups {better_vif:.1f} times"
        yield what, smaller, _rewrite(found, "--row-group-mb", f"{good:g}")
    elif found["row_groups"]["decoded_bytes"]["total"] > _SMALL_DATA:
        yield what, why, f"take a batch with more divisors than {order['global_batch']}, or shuffle the rows beforehand"


def _lists(found: Mapping[str, Any]) -> Advice:
    for column in found["columns"]:
        if column["list_length"] and column["holds"].startswith("lists of"):
            yield (
                f"column {column['name']!r} has lists of {column['list_length']:,} numbers in every row",
                "Parquet keeps two levels beside every number of a list: packed as bytes they are decoded several "
                "times as fast, and a batch has a tensor (rows, length) instead of values and offsets",
                _rewrite(found, "--pack-lists"),
            )


def _compression(found: Mapping[str, Any]) -> Advice:
    for column in found["columns"]:
        codecs, name = column["compression"], repr(column["name"])
        missing = [c for c in codecs if c != "UNCOMPRESSED" and not pa.Codec.is_available(_codec(c))]
        left = column["compressed_bytes"] / max(1, column["encoded_bytes"])
        if missing:
            yield f"column {name} is compressed with {missing[0]}", "this pyarrow can't read it", "write it with zstd"
        elif set(codecs) & {*_SLOW_CODECS, "ZSTD"} and column["holds"] in ENCODED and left > _INCOMPRESSIBLE:
            yield (
                f"column {name} holds {column['holds']}, compressed once more with {', '.join(codecs)}",
                f"that takes time and leaves {left:.0%} of the bytes",
                _rewrite(found, "--compression", "none"),
            )
        elif set(codecs) & set(_SLOW_CODECS):
            yield f"column {name} is compressed with {', '.join(codecs)}", "zstd is decoded faster", _rewrite(found)
        elif codecs == ["UNCOMPRESSED"] and column["holds"] not in ENCODED and column["compressed_bytes"] > _SMALL_DATA:
            yield (
                f"column {name} is not compressed: {human_bytes(column['compressed_bytes'])}",
                "where the network is what is slow, zstd makes up for its time if the data shrinks",
                _rewrite(found),
            )


def _codec(name: str) -> str:
    return {"LZ4_RAW": "lz4", "LZ4": "lz4"}.get(name, name.lower())
