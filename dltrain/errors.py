"""Every error that dltrain raises on purpose, as one tree.

    DltrainError
      UserError                 the user's input is wrong: shown without a traceback, exit code 2
        SpecError               the spec: all faults at once, one line each
        DataError               the dataset: missing, empty, unreadable, wrong schema
          BadRowsError            rows of a batch that a task's collate can't use
          DataChangedError        a file is not the one that the run was planned with
        StoreError              object storage: unreachable, credentials refused, bucket missing
        RunChangedError         resuming a run whose task or data is not the one it was started with
        CapacityError           the cluster is smaller than the run needs and did not grow in time
        MissingExtraError       an optional dependency is not installed
      RunFailedError            the run itself ended badly, exit code 1
        TaskError               the user's own code raised; carries rank, step and its traceback
        CheckpointError         a checkpoint can't be read or written

A message says what was found (with numbers), why it matters and what to set.
"""

from __future__ import annotations

from collections.abc import Sequence


class DltrainError(Exception):
    """Root of the tree. `exit_code` is what the command line ends with."""

    exit_code = 1


class UserError(DltrainError):
    """The user's input is wrong; the message is all they need."""

    exit_code = 2


class SpecError(UserError):
    """One or more faults in a spec.

    Args:
        source: where the spec came from (a path or "spec").
        faults: one sentence each, "field: what was found; what is allowed".
    """

    def __init__(self, source: str, faults: Sequence[str]) -> None:
        self.source = source
        self.faults = tuple(faults)
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__("\n".join([f"{source}: {count}", *(f"  {fault}" for fault in self.faults)]))

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.source, self.faults)


class DataError(UserError):
    """The dataset is missing, empty, unreadable or of the wrong schema."""


class BadRowsError(DataError):
    """Rows that a task's `collate` can't use: raise it there, and with `data.bad_rows` others take their place.

    Args:
        rows: their indices in the batch that `collate` was given.
        reason: what is wrong with them; a list has a sentence for each.
    """

    def __init__(self, rows: Sequence[int], reason: str | Sequence[str]) -> None:
        self.rows, self._given = tuple(rows), reason
        self.reasons = (reason,) * len(self.rows) if isinstance(reason, str) else tuple(reason)
        super().__init__(f"{len(self.rows)} row(s) of a batch can't be used: {self.told(self.rows)}")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.rows, self._given)

    def told(self, names: Sequence[int]) -> str:
        """The rows, by other names, with what is wrong with them: one clause for each reason."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in zip(names, self.reasons, strict=True):
            by_reason.setdefault(reason, []).append(str(name))
        return "; ".join(f"row {', '.join(rows)}: {reason}" for reason, rows in by_reason.items())


class DataChangedError(DataError):
    """A file of the dataset is not the one that the run was planned with: no row of it can be trusted."""


class StoreError(UserError):
    """Object storage can't be reached or refuses the request."""


class RunChangedError(UserError):
    """The run directory belongs to another task or other data."""


class CapacityError(UserError):
    """The cluster has fewer slots than `workers.min` and did not grow in time."""


class MissingExtraError(UserError):
    """An optional dependency is missing; names the extra that brings it."""

    def __init__(self, package: str, extra: str) -> None:
        self._given = package, extra
        super().__init__(f"{package} is not installed. Install it with: pip install 'dltrain[{extra}]'")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), self._given


class RunFailedError(DltrainError):
    """The run ended badly and can't go on by itself."""


class TaskError(RunFailedError):
    """The user's own code raised.

    Args:
        message: the exception's type and text.
        rank, step: where it happened; step is the number of the step that was being made.
        trace: the user's part of the traceback, ready to print.
    """

    def __init__(self, message: str, rank: int, step: int, trace: str) -> None:
        self.rank, self.step, self.trace = rank, step, trace
        super().__init__(message)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.rank, self.step, self.trace)


class CheckpointError(RunFailedError):
    """A checkpoint can't be read or written."""
