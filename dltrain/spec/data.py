"""What is read, and in which order: `data` of a spec."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from dltrain.conditions import check_condition
from dltrain.spec.base import Model

__all__ = ["CacheSpec", "DataSpec", "MixSpec", "PackSpec"]


class CacheSpec(Model):
    dir: str
    """A directory of each node, made where it is missing; what others keep there stays."""
    gb: float = Field(gt=0, allow_inf_nan=False)
    """Most gigabytes (10^9 bytes) kept there; what was used longest ago goes first."""


def _check_filter(conditions: tuple[tuple[Any, ...], ...]) -> tuple[tuple[Any, ...], ...]:
    faults = [fault for fault in map(check_condition, conditions) if fault]
    if faults:
        raise ValueError("; ".join(faults))
    return conditions


Filter = Annotated[tuple[tuple[Any, ...], ...], AfterValidator(_check_filter)]


class MixSpec(Model):
    name: str
    """What the audit and the journals call it."""
    url: str
    """Parquet: a directory, glob or file; any fsspec URL."""
    weight: int = Field(default=1, ge=1, le=65536)
    """Its share of the rows is its weight over the sum of all weights."""
    filter: Filter = ()
    """Conditions that its rows must meet beside those of `data.filter`."""

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name):
            raise ValueError("must be 1-63 letters, digits, dots, dashes or underscores")
        return name


class PackSpec(Model):
    column: str
    """Lists of numbers, such as token ids: what is laid end to end."""
    length: int = Field(ge=1, le=2**24)
    """Tokens of a packed row."""


class DataSpec(Model):
    train: str | None = None
    """Parquet to train on: a directory, glob or file; any fsspec URL. Give `train` or `mix`."""
    mix: tuple[MixSpec, ...] = ()
    """Several datasets in a fixed proportion; an epoch is as many rows as they have together."""
    eval: str | None = None
    """Parquet to evaluate on; without it there is no evaluation."""
    columns: tuple[str, ...] | None = None
    """Columns to read; default: those the task names, else all."""
    filter: Filter = ()
    """Conditions [column, op, value] that rows of all datasets must meet; ops: ==, !=, <, <=, >, >=, in, not in,
    is null, not null."""
    pack: PackSpec | None = None
    """Sequences of all datasets laid end to end and cut into rows of one length."""
    collate_workers: int = Field(default=0, ge=0, le=256)
    """Processes per worker that run the task's `collate`; 0: in the worker's own threads."""
    bad_rows: int = Field(default=0, ge=0)
    """How many rows that can't be read or decoded may be trained as another row, listed in quarantine.jsonl."""
    end: Literal["wrap", "drop"] = "wrap"
    """The run's last batch: `wrap` holds what is left, `drop` leaves it out."""
    lanes: int | None = Field(default=None, ge=1, le=65536)
    """Lanes of the sample order; default: chosen from the batch and the number of row groups."""
    window: int | None = Field(default=None, ge=1, le=65536)
    """Row groups shuffled together in a lane; default: chosen."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the sample order."""
    cache: CacheSpec | None = None
    """Keeps what was read from object storage on each node, for all its workers and runs; default: not kept."""

    @model_validator(mode="after")
    def _one_source(self) -> DataSpec:
        if (self.train is None) == (not self.mix):
            found = "neither" if self.train is None else "both"
            raise ValueError(f"found {found} train and mix; give exactly one, it says what to train on")
        names = [source.name for source in self.mix]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"found the name {twice[0]!r} twice in mix; the audit tells datasets apart by name")
        return self

    @property
    def sources(self) -> tuple[MixSpec, ...]:
        """The datasets to train on; a single one is called `train`."""
        return self.mix if self.train is None else (MixSpec(name="train", url=self.train),)
