"""What a rank tells the driver, in the order it happens; plain values, picklable, no torch.

Note* -> Ready -> (StepReport | EvalReport | SlotsMade | SaveWanted)* -> Done | Raised

The agent adds Saved or SaveFailed for each SaveWanted. An Aside may come at any time: it is kept and shown, and has no
bearing on the course of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dltrain.artifact import Artifact

__all__ = [
    "OVER",
    "PHASES",
    "Anchor",
    "Aside",
    "Done",
    "EvalReport",
    "LogLine",
    "Logged",
    "Note",
    "Profiled",
    "Raised",
    "Ready",
    "Report",
    "SaveFailed",
    "SaveWanted",
    "Saved",
    "Shown",
    "SlotsMade",
    "StepReport",
]

PHASES = ("data_wait", "h2d", "forward", "backward", "optimizer", "other")
# States in which a run is over.
OVER = ("finished", "stopped", "failed")


@dataclass(frozen=True)
class Ready:
    """The rank has built its engine and loaded what it resumes from.

    Attributes:
        seconds: by phase of its start.
        device: what it computes on; peak_flops: of that, in FLOPs/s, 0 where it is not known.
    """

    rank: int
    pid: int
    num_parameters: int
    seconds: Mapping[str, float]
    device: str = ""
    peak_flops: float = 0.0


@dataclass(frozen=True)
class Note:
    """Something the user should know while they wait."""

    rank: int
    text: str


@dataclass(frozen=True)
class StepReport:
    """One optimizer step on one rank.

    Attributes:
        step: counted from 1; position: samples consumed after it.
        size: rows of the global batch; count: units (rows or tokens) its loss is a mean over.
        loss: this rank's part of that mean: it is the sum over ranks.
        sums: (source, epoch) -> (rows, hash, hash) of this rank's rows.
        seconds: from the end of the previous step, or of what came between, to the end of this one.
        phases: seconds of it by phase.
        replaced: (source, epoch, row id, reason) of each row that another one was trained in the place of.
        time: wall clock at its end; snapshot_every: steps between snapshots in memory, 0 for none.
        data: what the rank's readers counted since its last report, of what changed.
        flops: of the model for the whole step, over all ranks; 0 until they are known.
        gradient_bytes: that this rank handed over to be aggregated.
        losses: of each network where there are several, parts as `loss` is.
        memory_bytes: most that the rank has held; alloc_retries: GPU memory that had to be freed first, since the last.
    """

    rank: int
    step: int
    position: int
    size: int
    count: float
    loss: float
    grad_norm: float
    learning_rate: float
    applied: bool
    finite: bool
    sums: Mapping[tuple[int, int], tuple[int, int, int]]
    seconds: float
    phases: Mapping[str, float]
    ready: int = 0
    replaced: tuple[tuple[int, int, int, str], ...] = ()
    time: float = 0.0
    snapshot_every: int = 0
    attempt: int = 0
    data: Mapping[str, float] = field(default_factory=dict)
    flops: float = 0.0
    gradient_bytes: int = 0
    losses: Mapping[str, float] = field(default_factory=dict)
    memory_bytes: int = 0
    alloc_retries: int = 0


@dataclass(frozen=True)
class EvalReport:
    """The metrics of an evaluation, the same on every rank; `data` is the rank's own, as in a StepReport."""

    rank: int
    step: int
    metrics: Mapping[str, float]
    is_best: bool
    seconds: float
    data: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SlotsMade:
    """This rank's memory for snapshots: file descriptors of its process, and what is where in each of them."""

    rank: int
    fds: tuple[int, ...]
    num_bytes: int
    parts: list[list[Any]]
    whole: list[str]
    ties: Mapping[str, str]


@dataclass(frozen=True)
class Anchor:
    """A snapshot of a step that all ranks have one of, kept until the agent has copied it to another machine."""

    rank: int
    step: int
    slot: int


@dataclass(frozen=True)
class SaveWanted:
    """A checkpoint's snapshot is in a slot, which is kept until the agent has written it to the store.

    Attributes:
        applied: updates that the optimizer has made.
        seconds: that training stood still for it.
        must: it is not left out when the one before is still being written.
    """

    rank: int
    step: int
    position: int
    slot: int
    applied: int
    seconds: float
    must: bool = False


@dataclass(frozen=True)
class Saved:
    """This rank's file of a checkpoint is in the store; `meta` is what rank 0 adds for the whole.

    `seconds`: that writing it took, while training went on.
    """

    rank: int
    step: int
    position: int
    file: Mapping[str, Any]
    seconds: float
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SaveFailed:
    """This rank's file could not be written; training goes on."""

    rank: int
    step: int
    reason: str
    seconds: float


@dataclass(frozen=True)
class Raised:
    """An exception ended the rank.

    Attributes:
        kind: user (the user's input), task (the user's code), peer (another rank went away) or internal.
        trace: the part of the traceback that is not ours.
        ids: row ids of the batch that was being trained.
    """

    rank: int
    step: int
    kind: str
    message: str
    trace: str
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Done:
    """The rank has trained to the end, or to the step at which all ranks agreed to `stop`, `pause` or `drain`."""

    rank: int
    step: int
    why: str = ""


@dataclass(frozen=True)
class Aside:
    """What is kept and shown, and nothing else."""

    rank: int


@dataclass(frozen=True)
class LogLine(Aside):
    """A line that a worker printed, at a time in Unix seconds."""

    text: str
    error: bool
    attempt: int = 0
    time: float = 0.0


@dataclass(frozen=True)
class Logged(Aside):
    """What a task's callbacks logged at a step."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Shown(Aside):
    """What a task showed of its work after an evaluation; `left_out`: a sentence for each that was too large."""

    step: int
    metrics: Mapping[str, float]
    is_best: bool
    artifacts: tuple[Artifact, ...]
    left_out: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Profiled(Aside):
    """The trace of the steps from `step` to `last` is in the run's directory."""

    step: int
    last: int
    file: str
    num_bytes: int


Report = (
    Ready
    | Note
    | StepReport
    | EvalReport
    | SlotsMade
    | Anchor
    | SaveWanted
    | Saved
    | SaveFailed
    | Raised
    | Done
    | Aside
)
