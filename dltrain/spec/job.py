"""The whole spec, and how it is read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from dltrain.errors import SpecError
from dltrain.spec.base import Model
from dltrain.spec.data import DataSpec
from dltrain.spec.running import CheckpointSpec, FaultsSpec, MetricsSpec, WorkersSpec
from dltrain.spec.training import BatchSpec, EngineSpec, OptimSpec, TrainSpec
from dltrain.spec.watching import ProfileSpec, TrackersSpec
from dltrain.wording import faults_of

__all__ = ["JobSpec", "load_spec", "parse_spec"]


class JobSpec(Model):
    """A whole run. `name`, `task`, `data.train` or `.mix`, `batch.global`, `train` and `optim.lr` must be given."""

    name: str
    """The run's name, and that of its directory."""
    task: str
    """Your task class: `package.module:Class` or `path.py:Class`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Given to the class."""
    data: DataSpec
    batch: BatchSpec
    train: TrainSpec
    optim: OptimSpec
    engine: EngineSpec = EngineSpec()
    workers: WorkersSpec = WorkersSpec(min=1, max=1)
    checkpoint: CheckpointSpec = CheckpointSpec()
    faults: FaultsSpec = FaultsSpec()
    metrics: MetricsSpec = MetricsSpec()
    trackers: TrackersSpec = TrackersSpec()
    profile: ProfileSpec | None = None
    runs: str = "./runs"
    """Where run directories live; any fsspec URL."""

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name):
            raise ValueError("must be 1-63 letters, digits, dots, dashes or underscores: it names the run's directory")
        return name

    @field_validator("task")
    @classmethod
    def _task(cls, task: str) -> str:
        if not re.fullmatch(r"[^:]+:[A-Za-z_]\w*", task):
            raise ValueError("must be package.module:Class or path.py:Class")
        return task

    @model_validator(mode="after")
    def _share(self) -> JobSpec:
        if self.batch.global_ < self.workers.min:
            raise ValueError(
                f"batch.global: {self.batch.global_} rows can't feed workers.min {self.workers.min}; "
                "each worker needs at least one row a step: raise batch.global or lower workers.min"
            )
        return self

    @model_validator(mode="after")
    def _evaluates(self) -> JobSpec:
        if self.train.early_stop and not self.data.eval:
            raise ValueError(
                f"train.early_stop: found {self.train.early_stop} without data.eval; it counts evaluations: "
                "set data.eval, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _profiled(self) -> JobSpec:
        if self.profile and max(self.profile.ranks) >= self.workers.max:
            last = self.workers.max - 1
            raise ValueError(
                f"profile.ranks: found {max(self.profile.ranks)}; the last rank is {last} (workers.max - 1)"
            )
        return self

    def to_yaml(self) -> str:
        """The resolved spec as YAML, defaults included."""
        return str(yaml.safe_dump(self.to_dict(), sort_keys=False))

    def to_dict(self) -> dict[str, Any]:
        """The resolved spec as plain values, ready for JSON."""
        return self.model_dump(mode="json", by_alias=True)

    @property
    def num_kept(self) -> int:
        """Newest checkpoints that stay: a rollback reads one while the next may be coming."""
        return max(2, self.checkpoint.keep) if self.faults.nonfinite == "rollback" else self.checkpoint.keep

    @property
    def identity(self) -> dict[str, Any]:
        """What may not change when a run is resumed, as field -> value."""
        # data.train's own sub-fields are listed, so that the message can name the one that changed.
        data = self.data.model_dump(mode="json", exclude={"end", "bad_rows", "collate_workers", "cache"})
        return {"task": self.task, "args": self.args, **{f"data.{k}": v for k, v in data.items()}}


def load_spec(given: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> JobSpec:
    """Reads a YAML spec, or takes a mapping, and applies `key=value` overrides.

    Raises:
        SpecError: the file can't be read or parsed, or the spec has faults (all of them are listed).
    """
    raw, source = (dict(given), "spec") if isinstance(given, Mapping) else (_read(given), str(given))
    faults: list[str] = []
    for override in overrides:
        try:
            raw = _override(raw, override)
        except ValueError as error:
            faults.append(str(error))
    return parse_spec(raw, source, faults)


def _read(path: str | Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(str(path), [f"can't be read: {error}"]) from None
    except yaml.YAMLError as error:
        raise SpecError(str(path), [f"is not YAML: {' '.join(str(error).split())}"]) from None
    if not isinstance(raw, dict):
        raise SpecError(str(path), [f"found {type(raw).__name__}; a spec is a mapping with name, task, data, ..."])
    return raw


def parse_spec(raw: Mapping[str, Any], source: str = "spec", faults: Sequence[str] = ()) -> JobSpec:
    """Checks a mapping; `faults` found before are reported together with its own.

    Raises:
        SpecError: listing every fault.
    """
    spec, found = None, list(faults)
    try:
        spec = JobSpec.model_validate(raw)
    except ValidationError as error:
        found += faults_of(error, JobSpec)
    if found or spec is None:
        raise SpecError(source, found)
    return spec


def _override(raw: dict[str, Any], override: str) -> dict[str, Any]:
    """A copy of `raw` with `a.b=value` set; the value is read as YAML."""
    dotted, sep, text = override.partition("=")
    if not sep or not dotted:
        raise ValueError(f"{override}: is not an override; write key=value, for example optim.lr=3e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"{dotted}: found {text!r}, which is not YAML") from None
    # YAML 1.1 reads 3e-4 as a string; the model turns it into a number where one is wanted.
    return _set(raw, dotted.split("."), value, dotted)


def _set(node: Any, keys: list[str], value: Any, dotted: str) -> dict[str, Any]:
    if node is None:
        node = {}
    if isinstance(node, int) and keys and dotted.startswith("workers."):
        node = {"min": node, "max": node}
    if not isinstance(node, dict):
        raise ValueError(f"{dotted}: {keys[0]!r} can't be set inside {node!r}")
    head, *rest = keys
    return {**node, head: _set(node.get(head), rest, value, dotted) if rest else value}
