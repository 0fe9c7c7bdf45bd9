"""The loader by itself: batches of a Parquet dataset for a training loop of your own.

    with open_stream("s3://bucket/digits", columns=["image", "label"], global_batch=256, rank=r, num_ranks=w) as stream:
        for batch in stream:                       # {"image": tensor, "label": tensor}
            ...
            saved = stream.state_dict()            # a few numbers, the same on every rank

The batches are those of `dltrain run`: the same for any number of ranks, each row once an epoch. A saved state
goes on at the next batch, on another number of ranks or with another batch size too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import pyarrow as pa

from dltrain.data.batch import Batch, Keys
from dltrain.data.cache import NodeCache
from dltrain.data.columns import tensors
from dltrain.data.dataset import read_dataset
from dltrain.data.decode import Decoder, decoding
from dltrain.data.fetch import LIMIT_BYTES
from dltrain.data.footers import Footers
from dltrain.data.order import num_steps
from dltrain.data.packing import Pack
from dltrain.data.plan import Plan, check_plan, make_plan
from dltrain.data.reader import UnitReader, added
from dltrain.data.stream import TrainStream
from dltrain.errors import UserError

__all__ = ["BatchStream", "open_stream"]

_VERSION = 2
_ENDLESS = 1 << 62


def open_stream(
    url: str | Mapping[str, int],
    columns: Sequence[str] | None = None,
    *,
    global_batch: int,
    seed: int = 0,
    rank: int = 0,
    num_ranks: int = 1,
    epochs: int | None = 1,
    end: Literal["wrap", "drop"] = "wrap",
    collate: Callable[[pa.RecordBatch, Keys], Mapping[str, Any]] | None = None,
    decode: Mapping[str, Decoder] | None = None,
    filter: Sequence[Sequence[Any]] = (),
    pack: tuple[str, int] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_bytes: int | None = None,
) -> BatchStream:
    """Opens a dataset for one rank of a training loop.

    Args:
        url: directory, glob or file of Parquet; any fsspec URL. Several, as {url: weight}, are mixed.
        columns: to read; None means all.
        global_batch: rows of one step over all ranks; this rank gets its share.
        epochs: passes over the data, over as many rows as there are together where they are mixed; None means without
            end.
        end: the last batch holds what is left (`wrap`), or is left out (`drop`).
        collate: makes the batch from Arrow rows; default: a tensor per column (`dltrain.data.columns.tensors`).
        decode: column -> what decodes it, for example `dltrain.data.decode.images`; `collate` gets the others.
        filter: conditions [column, op, value] that all rows must meet (`dltrain.data.filters`).
        pack: column of token sequences, and the length of the rows that they are packed into (`dltrain.data.packing`).
        cache_dir: keeps what was read from object storage there, for all processes of the node; cache_bytes: at most.

    Raises:
        DataError: nothing to read there; StoreError: the storage can't be reached.
    """
    if not 0 <= rank < num_ranks:
        raise UserError(f"rank {rank} of {num_ranks}: ranks are 0 to num_ranks - 1")
    if global_batch < 1:
        raise UserError(f"global_batch: found {global_batch}; it must be >= 1")
    cache = _cache(cache_dir, cache_bytes)
    weights = {url: 1} if isinstance(url, str) else dict(url)
    if not weights or any(not isinstance(w, int) or w < 1 for w in weights.values()):
        raise UserError(
            f"url: found {url!r}; several datasets are given as {{url: weight}}, weights whole numbers >= 1"
        )
    packed = Pack(*pack) if pack else None
    catalogs = {u: (read_dataset(u, columns, "url", filter=filter, pack=packed), w) for u, w in weights.items()}
    plan = make_plan(catalogs, None, global_batch, seed)
    names = tuple(columns or plan.schema.names)
    check_plan(plan, names, "columns")
    make = collate or (lambda rows, _: tensors(rows))
    make = decoding(make, decode) if decode else make
    return BatchStream(plan, names, make, global_batch, rank, num_ranks, epochs, end, cache)


def _cache(directory: str | os.PathLike[str] | None, limit_bytes: int | None) -> NodeCache | None:
    if (directory is None) != (limit_bytes is None) or (limit_bytes is not None and limit_bytes < 1):
        raise UserError(
            f"cache_dir {directory!r} and cache_bytes {limit_bytes!r}: a cache needs both, the directory and how many "
            "bytes it may take"
        )
    return None if directory is None or limit_bytes is None else NodeCache(directory, limit_bytes)


class BatchStream:
    """An iterator of batches, as dicts; made by `open_stream`.

    Every rank yields the same number of batches; where a last short batch has no row for a rank, its tensors
    have no rows.

    Attributes:
        plan: what the datasets hold, and the order; position: rows consumed, over all ranks.
    """

    def __init__(
        self,
        plan: Plan,
        columns: Sequence[str],
        collate: Callable[[pa.RecordBatch, Keys], Mapping[str, Any]],
        global_batch: int,
        rank: int,
        num_ranks: int,
        epochs: int | None,
        end: Literal["wrap", "drop"],
        cache: NodeCache | None,
    ) -> None:
        self.plan, self._collate = plan, collate
        self._columns, self._cache = columns, cache
        self._global_batch = global_batch
        self._rank, self._num_ranks = rank, num_ranks
        self._epochs, self._drops = epochs, end == "drop"
        self.position = 0
        self._stream: TrainStream | None = None
        self._readers: list[UnitReader] = []

    # ---- where it is ----

    @property
    def _last(self) -> int:
        if self._epochs is None:
            return _ENDLESS
        total = self._epochs * self.plan.num_rows
        return self.position + len(self) * self._global_batch if self._drops else total

    def __len__(self) -> int:
        """Batches left.

        Raises:
            TypeError: it goes on without end.
        """
        if self._epochs is None:
            raise TypeError("this stream has no end, so no length")
        rows, end = self.plan.num_rows, "drop" if self._drops else "wrap"
        return num_steps(rows, self._epochs, self._global_batch, self.position, end)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """Where it is: what goes into a checkpoint. It follows what was yielded, not what is prefetched."""
        return {
            "version": _VERSION,
            "plan_id": self.plan.plan_id,
            "position": self.position,
            "num_lanes": self.plan.num_lanes,
            "window_units": [s.window_units for s in self.plan.sources],
            "seed": self.plan.seed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where a state was taken; the batch size and the ranks may be others than then.

        Raises:
            UserError: the state is of other data, or of a later version.
        """
        if state.get("version") != _VERSION:
            raise UserError(f"state of version {state.get('version')!r}; this dltrain reads {_VERSION}")
        windows = state["window_units"]
        if len(windows) == len(self.plan.sources):
            sources = (replace(s, window_units=int(w)) for s, w in zip(self.plan.sources, windows, strict=True))
            self.plan = replace(self.plan, sources=tuple(sources), num_lanes=state["num_lanes"], seed=state["seed"])
        if self.plan.plan_id != state["plan_id"]:
            urls = ", ".join(s.catalog.url for s in self.plan.sources)
            raise UserError(
                f"{urls}: not the data that this state was taken of: files were added, removed or rewritten since, or "
                "it was mixed, filtered or packed in another way; start afresh, or restore what it was"
            )
        self.close()
        self.position = int(state["position"])

    # ---- batches ----

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> dict[str, Any]:
        if self._stream is None:
            self._stream = self._open()
        step = next(self._stream)
        self.position = step.position
        batch = step.micros[0]
        return batch.tensors if batch.count else {name: value[:0] for name, value in batch.tensors.items()}

    def _open(self) -> TrainStream:
        catalogs = [s.catalog for s in self.plan.sources]
        room = LIMIT_BYTES // len(catalogs)
        self._readers = [
            UnitReader(c, self._columns, footers=Footers.held(c.footers), cache=self._cache, limit_bytes=room)
            for c in catalogs
        ]
        stream = TrainStream(
            self.plan.mixture,
            self._readers,
            lambda rows, keys: Batch(rows.num_rows, **self._collate(rows, keys)),
            position=self.position,
            end=self._last,
            global_batch=self._global_batch,
            rank=self._rank,
            num_ranks=self._num_ranks,
            micro_batch=self._global_batch,
        )
        stream.prefetch()
        return stream

    @property
    def stats(self) -> dict[str, float]:
        """What was counted of the storage and the cache: see `Fetcher.stats` and `NodeCache.stats`."""
        return dict(added(*(reader.stats for reader in self._readers), self._cache.stats if self._cache else {}))

    def close(self) -> None:
        """Ends the threads; iterating again goes on from where it was."""
        if self._stream:
            # The readers first: who waits for one is told, and need not be waited for.
            for reader in self._readers:
                reader.close()
            self._stream.close()
            self._stream = None

    def __enter__(self) -> BatchStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
