"""The job spec: all that a run is, as one frozen model that finds every fault at once.

    spec = load_spec("jobs/image_cnn.yaml", ["workers=2", "optim.lr=3e-4"])
    spec.batch.global_

A fault is a line "field: what was found; what is allowed", and a spec with five faults raises one
`SpecError` with five lines. Nothing here touches the network, Ray or torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dltrain.conditions import check_condition
from dltrain.errors import SpecError
from dltrain.wording import faults_of

__all__ = [
    "BatchSpec",
    "BestSpec",
    "CacheSpec",
    "CheckpointSpec",
    "DataSpec",
    "EngineSpec",
    "FaultsSpec",
    "JobSpec",
    "MetricsSpec",
    "MixSpec",
    "OptimSpec",
    "PackSpec",
    "TrainSpec",
    "WorkersSpec",
    "load_spec",
    "parse_spec",
]

_DEEPSPEED_OURS = {
    "train_batch_size": "batch.global",
    "train_micro_batch_size_per_gpu": "batch.micro",
    "gradient_accumulation_steps": "batch.micro",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "gradient_clipping": "optim.clip",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
}


class _Model(BaseModel):
    # use_attribute_docstrings: the line under a field is what `dltrain plan --help` and the docs show.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, populate_by_name=True)


class CacheSpec(_Model):
    dir: str
    """A directory of each node, made where it is missing; what others keep there stays."""
    gb: float = Field(gt=0, allow_inf_nan=False)
    """Most gigabytes (10^9 bytes) kept there; what was used longest ago goes first."""


class MixSpec(_Model):
    name: str
    """What the audit and the journals call it."""
    url: str
    """Parquet: a directory, glob or file; any fsspec URL."""
    weight: int = Field(default=1, ge=1, le=65536)
    """Its share of the rows is its weight over the sum of all weights."""

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name):
            raise ValueError("must be 1-63 letters, digits, dots, dashes or underscores")
        return name


class PackSpec(_Model):
    column: str
    """Lists of numbers, such as token ids: what is laid end to end."""
    length: int = Field(ge=1, le=2**24)
    """Tokens of a packed row."""


class DataSpec(_Model):
    train: str | None = None
    """Parquet to train on: a directory, glob or file; any fsspec URL. Give `train` or `mix`."""
    mix: tuple[MixSpec, ...] = ()
    """Several datasets in a fixed proportion; an epoch is as many rows as they have together."""
    eval: str | None = None
    """Parquet to evaluate on; without it there is no evaluation."""
    columns: tuple[str, ...] | None = None
    """Columns to read; default: those the task names, else all."""
    filter: tuple[tuple[Any, ...], ...] = ()
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

    @field_validator("filter")
    @classmethod
    def _conditions(cls, conditions: tuple[tuple[Any, ...], ...]) -> tuple[tuple[Any, ...], ...]:
        faults = [fault for fault in map(check_condition, conditions) if fault]
        if faults:
            raise ValueError("; ".join(faults))
        return conditions

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


class BatchSpec(_Model):
    global_: int = Field(alias="global", ge=1)
    """Rows of one optimizer step over all workers."""
    micro: int | None = Field(default=None, ge=1)
    """Most rows of one forward pass on one worker; default: the worker's share of the global batch."""


class BestSpec(_Model):
    metric: str = "loss"
    """A name that the task's `evaluate` returns."""
    mode: Literal["min", "max"] = "min"
    """Whether less or more is better."""


class TrainSpec(_Model):
    epochs: int | None = Field(default=None, ge=1)
    """Passes over the training data. Give `epochs` or `steps`."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps. Give `epochs` or `steps`."""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations; default: once an epoch. The end of the run is always evaluated."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the weights and of everything random in a step."""
    best: BestSpec = BestSpec()
    """Which evaluation is the best one; its checkpoint is kept."""

    @model_validator(mode="after")
    def _one_end(self) -> TrainSpec:
        if (self.epochs is None) == (self.steps is None):
            found = "neither" if self.epochs is None else "both"
            raise ValueError(f"found {found} epochs and steps; give exactly one, it says when the run ends")
        return self


class OptimSpec(_Model):
    name: Literal["adamw", "sgd"] = "adamw"
    """The optimizer."""
    lr: float = Field(gt=0, allow_inf_nan=False)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Decoupled for adamw, L2 for sgd; not applied to biases and norms (parameters of one dimension)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """adamw's decay rates of the two moments."""
    eps: float = Field(default=1e-8, gt=0)
    """adamw's epsilon."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """sgd's momentum."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: flat, or half a cosine down to `final` at the run's last step."""
    warmup: int = Field(default=0, ge=0)
    """Steps in which the learning rate rises linearly."""
    final: float = Field(default=0.0, ge=0, le=1)
    """What cosine ends at, as a share of `lr`."""
    clip: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Largest global gradient norm; default: no clipping."""

    @field_validator("betas")
    @classmethod
    def _betas(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("both must be >= 0 and < 1")
        return betas


class EngineSpec(_Model):
    zero: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage: what is sharded over workers (0 nothing, 1 optimizer, 2 + gradients, 3 + weights)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of forward and backward; the master weights are fp32 in any case."""
    deepspeed: dict[str, Any] = {}
    """Raw DeepSpeed keys, merged into the generated JSON last."""

    @field_validator("deepspeed")
    @classmethod
    def _ours(cls, raw: dict[str, Any]) -> dict[str, Any]:
        taken = [f"{k} (set {_DEEPSPEED_OURS[k]})" for k in raw if k in _DEEPSPEED_OURS]
        if isinstance(raw.get("zero_optimization"), dict) and "stage" in raw["zero_optimization"]:
            taken.append("zero_optimization.stage (set engine.zero)")
        if taken:
            raise ValueError(f"found {', '.join(taken)}; these are derived from the spec's own fields")
        return raw


class WorkersSpec(_Model):
    min: int = Field(ge=1)
    """Fewest workers to run with."""
    max: int = Field(ge=1)
    """Most workers to use."""
    gpus: Literal["auto"] | int = "auto"
    """GPUs of one worker: 0, 1, or auto (1 where the cluster has GPUs)."""
    cpus: float = Field(default=1, gt=0)
    """CPUs of one worker, as Ray counts them."""
    resources: dict[str, float] = {}
    """Custom Ray resources of one worker."""
    wait_seconds: float = Field(default=600, ge=0)
    """How long to wait for `min` workers on a cluster before the run ends with an error."""

    @field_validator("gpus")
    @classmethod
    def _gpus(cls, gpus: str | int) -> str | int:
        if isinstance(gpus, int) and gpus not in (0, 1):
            raise ValueError("must be 0, 1 or auto: a worker drives one GPU")
        return gpus

    @model_validator(mode="before")
    @classmethod
    def _fixed(cls, value: Any) -> Any:
        return {"min": value, "max": value} if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _order(self) -> WorkersSpec:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}; min must be <= max")
        return self


class CheckpointSpec(_Model):
    every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; default: 10 in a run, at least one an epoch."""
    keep: int = Field(default=2, ge=1)
    """How many of the newest to keep; the best one is kept besides."""


class MetricsSpec(_Model):
    port: int = Field(default=9464, ge=0, le=65535)
    """Port of the Prometheus endpoint; 0 takes any free one."""
    host: str = "127.0.0.1"
    """Address that it listens on; 0.0.0.0 to let others scrape it."""


class FaultsSpec(_Model):
    nonfinite: Literal["skip", "stop", "rollback"] = "skip"
    """A step whose loss or gradients are not finite: `skip` the update, `stop` the run, or `rollback`: put back the
    weights of the last checkpoint and go on with the data that follows."""
    restarts_per_hour: int = Field(default=10, ge=0)
    """More restarts than this within an hour end the run."""
    lease_seconds: float = Field(default=2.5, gt=0)
    """A worker ends when its agent has not heard from the driver for so long."""
    silent_seconds: float = Field(default=4.0, gt=0)
    """An agent that has not answered for so long is lost; more than `lease_seconds`."""
    hang_seconds: float | None = Field(default=None, gt=0)
    """A step in which no rank has moved for so long is a hang; default: 10, or ten times the slowest steps."""

    @model_validator(mode="after")
    def _silence(self) -> FaultsSpec:
        if self.silent_seconds <= self.lease_seconds:
            raise ValueError(
                f"silent_seconds {self.silent_seconds:g} must be more than lease_seconds {self.lease_seconds:g}: "
                "a machine that is cut off must be quiet before another takes its place"
            )
        return self


class JobSpec(_Model):
    """A whole run. `name`, `task`, `data.train` or `.mix`, `batch.global`, `train` and `optim.lr` must be given."""

    name: str
    """The run's name, and that of its directory."""
    task: str
    """Your task class: `package.module:Class` or `path.py:Class`."""
    args: dict[str, Any] = {}
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

    def to_yaml(self) -> str:
        """The resolved spec as YAML, defaults included."""
        return str(yaml.safe_dump(self.to_dict(), sort_keys=False))

    def to_dict(self) -> dict[str, Any]:
        """The resolved spec as plain values, ready for JSON."""
        return self.model_dump(mode="json", by_alias=True)

    @property
    def identity(self) -> dict[str, Any]:
        """What may not change when a run is resumed, as field -> value."""
        # data.train's own sub-fields are listed, so that the message can name the one that changed.
        data = self.data.model_dump(mode="json", exclude={"end", "bad_rows", "collate_workers", "cache"})
        return {"task": self.task, "args": self.args, **{f"data.{k}": v for k, v in data.items()}}


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> JobSpec:
    """Reads a YAML spec and applies `key=value` overrides.

    Raises:
        SpecError: the file can't be read or parsed, or the spec has faults (all of them are listed).
    """
    try:
        raw = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(str(path), [f"can't be read: {error}"]) from None
    except yaml.YAMLError as error:
        raise SpecError(str(path), [f"is not YAML: {' '.join(str(error).split())}"]) from None
    if not isinstance(raw, dict):
        raise SpecError(str(path), [f"found {type(raw).__name__}; a spec is a mapping with name, task, data, ..."])
    faults: list[str] = []
    for override in overrides:
        try:
            raw = _override(raw, override)
        except ValueError as error:
            faults.append(str(error))
    return parse_spec(raw, str(path), faults)


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
