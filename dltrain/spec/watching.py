"""Who else is told of a run, and what is recorded of it: `trackers` and `profile` of a spec."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_serializer, model_validator

from dltrain.spec.base import Model

__all__ = ["MlflowSpec", "ProfileSpec", "TensorboardSpec", "TrackersSpec", "WandbSpec"]


class TensorboardSpec(Model):
    dir: str | None = None
    """Directory or URL of its event files; default: `tensorboard` in the run's directory."""


class MlflowSpec(Model):
    uri: str | None = None
    """The tracking server, or a database such as sqlite:///mlflow.db; default: MLFLOW_TRACKING_URI, else that one."""
    experiment: str = "dltrain"
    """Runs are listed under it; made where it is missing."""

    @model_validator(mode="after")
    def _no_password(self) -> MlflowSpec:
        # Of the whole: a fault of the field alone would show what was found.
        if self.uri and re.match(r"\w+://[^/]*@", self.uri):
            raise ValueError(
                "uri has a user or password in it, and specs are kept and shown; give them as "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return self


class WandbSpec(Model):
    mode: Literal["offline", "online"] = "offline"
    """`offline` writes files that `wandb sync` uploads; `online` needs WANDB_API_KEY in the driver's environment."""
    project: str = "dltrain"
    """Runs are listed under it."""
    entity: str | None = None
    """A user or team; default: the user's own."""
    dir: str | None = None
    """Where it keeps its files; default: the run's directory, or the current one for a run in object storage."""


class TrackersSpec(Model):
    tensorboard: TensorboardSpec | None = None
    mlflow: MlflowSpec | None = None
    wandb: WandbSpec | None = None

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        """A list of names, or a name without settings, means their defaults."""
        if isinstance(value, str):
            value = [value]
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            value = dict.fromkeys(value)
        return {name: inner or {} for name, inner in value.items()} if isinstance(value, dict) else value

    @model_serializer(mode="plain")
    def _wanted(self) -> dict[str, Any]:
        """Those that there are: one without settings would be wanted when it is read again."""
        return {name: inner.model_dump(mode="json") for name, inner in self if inner is not None}


class ProfileSpec(Model):
    steps: str
    """Which steps, as in 10..15 or 10; each rank's trace is in RUN/profile."""
    ranks: tuple[int, ...] = Field(default=(0,), min_length=1)
    """Whose."""
    memory: bool = False
    """Record allocations as well."""

    @field_validator("steps", mode="before")
    @classmethod
    def _steps(cls, steps: Any) -> str:
        text = str(steps)
        found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text)
        if not found or not 1 <= int(found[1]) <= int(found[2] or found[1]):
            raise ValueError("must be a step or a range of steps, as in 10..15; the first step is 1")
        return text

    @field_validator("ranks")
    @classmethod
    def _ranks(cls, ranks: tuple[int, ...]) -> tuple[int, ...]:
        if any(rank < 0 for rank in ranks):
            raise ValueError("ranks count from 0")
        return ranks

    @property
    def first(self) -> int:
        """The first step."""
        return int(self.steps.partition("..")[0])

    @property
    def last(self) -> int:
        """The last step."""
        return int(self.steps.rpartition("..")[2])
