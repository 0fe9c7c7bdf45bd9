"""Who runs it, and what happens when something breaks: `workers`, `checkpoint`, `metrics` and `faults` of a spec."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from dltrain.spec.base import Model

__all__ = ["CheckpointSpec", "FaultsSpec", "MetricsSpec", "WorkersSpec"]


class WorkersSpec(Model):
    min: int = Field(ge=1)
    """Fewest workers to run with."""
    max: int = Field(ge=1)
    """Most workers to use."""
    gpus: Literal["auto"] | int = "auto"
    """GPUs of one worker: 0, 1, or auto (1 where the cluster has GPUs)."""
    cpus: float = Field(default=1, gt=0)
    """CPUs of one worker, as Ray counts them."""
    resources: dict[str, float] = Field(default_factory=dict)
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


class CheckpointSpec(Model):
    every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; default: 10 in a run, at least one an epoch."""
    keep: int = Field(default=2, ge=1)
    """How many of the newest to keep; the best one is kept besides."""


class MetricsSpec(Model):
    port: int = Field(default=9464, ge=0, le=65535)
    """Port of the Prometheus endpoint; 0 takes any free one."""
    host: str = "127.0.0.1"
    """Address that it listens on; 0.0.0.0 to let others scrape it."""


class FaultsSpec(Model):
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
    """A step in which no rank has moved for so long is a hang; default: ten times the slowest steps, 8 at least, and 5
    where a process has been stopped; with train.compile 300."""

    @model_validator(mode="after")
    def _silence(self) -> FaultsSpec:
        if self.silent_seconds <= self.lease_seconds:
            raise ValueError(
                f"silent_seconds {self.silent_seconds:g} must be more than lease_seconds {self.lease_seconds:g}: "
                "a machine that is cut off must be quiet before another takes its place"
            )
        return self
