"""Ray Train: a rank's part of a run inside the train function of a TorchTrainer.

    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from dltrain.integrations.train import run_in_train_fn

    def train_loop_per_worker(config):
        run_in_train_fn("digits.yaml", {"optim.lr": config["lr"]})

    TorchTrainer(train_loop_per_worker, train_loop_config={"lr": 1e-3}, torch_config=TorchConfig(backend="gloo"),
                 scaling_config=ScalingConfig(num_workers=2)).fit()

Ray Train places the workers, makes their process group and starts them again after a failure; the engine, the loader,
the evaluation and the checkpoints without a world size are dltrain's. What `dltrain run` has beyond that (recovery from
memory, elastic workers, metrics for Prometheus, steps.jsonl) it has not.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dltrain.errors import DltrainError, MissingExtraError, RunFailedError, UserError
from dltrain.integrations.changes import changed, read_spec
from dltrain.integrations.uploads import Uploads
from dltrain.observing.reports import Done, EvalReport, Note, Report, SaveFailed, SaveWanted, SlotsMade, StepReport
from dltrain.running.evaluations import Evaluations
from dltrain.running.keeper import Keeper
from dltrain.running.requests import Requests
from dltrain.running.rundir import RunDir, make_plan
from dltrain.running.trail import Trail
from dltrain.spec import JobSpec
from dltrain.training.plan import RankJob, Schedule

__all__ = ["POINTER", "run_in_train_fn"]

# The file in Ray Train's checkpoints, which says where the run is and its step.
POINTER = "dltrain-run.json"


@dataclass(frozen=True)
class _Start:
    """What rank 0 found, for all ranks.

    Attributes:
        resume: manifest of the checkpoint to go on from, with its path.
        error: why there can be no start.
    """

    plan: bytes | None = None
    plan_id: str = ""
    num_rows: int = 0
    has_eval: bool = False
    attempt: int = 0
    resume: dict[str, Any] | None = None
    error: str = ""

    @property
    def step(self) -> int:
        return int(self.resume["step"]) if self.resume else 0

    @property
    def position(self) -> int:
        return int(self.resume["position"]) if self.resume else 0


def run_in_train_fn(
    spec: str | Path | Mapping[str, Any] | JobSpec,
    changes: Mapping[str, Any] | None = None,
    *,
    cwd: str | None = None,
) -> dict[str, Any]:
    """Trains to the end, or goes on from the run's last checkpoint; every worker of the trainer must call it.

    Each evaluation is reported with `ray.train.report`: its metrics, `step`, `train_loss` and `run`, which is the run's
    directory; without `data.eval` all but the metrics, as often. The checkpoint that Ray Train gets is a file with the
    same, those of the run lie in its directory. `dltrain stop RUN` ends it after a step, with a checkpoint.

    Args:
        spec: a YAML file, what would be in it, or a JobSpec; its `workers` are Ray Train's.
        changes: settings that replace the spec's, by field, as in {"optim.lr": 1e-3}.
        cwd: the directory of the task and of relative paths; default: the current one, or the one that Ray Train was
            started in.

    Returns:
        {"run", "status", "step", "metrics"}, the same on every rank; status is finished or stopped.

    Raises:
        UserError: the spec, the data or the task are wrong.
        RunFailedError: training can't go on; Ray Train may start it again.
    """
    rank, num_ranks = _rank()
    home = cwd or os.environ.get("TUNE_ORIG_WORKING_DIR") or os.getcwd()
    loaded = changed(read_spec(spec, home), {**(changes or {}), "workers": num_ranks})
    run = RunDir.of(loaded)
    keeper = Keeper(run.checkpoints, loaded.checkpoint.keep, run.is_replaced, _say) if rank == 0 else None
    start = _broadcast(_begin(loaded, run, keeper) if keeper else _Start())
    if start.error:
        raise UserError(start.error)
    device = _device()
    return _Rank(loaded, run, start, keeper, rank, num_ranks, home, device).train()


def _begin(spec: JobSpec, run: RunDir, keeper: Keeper) -> _Start:
    """Rank 0: plans, and claims the run."""
    try:
        plan, changes, is_new = make_plan(spec, run, _say)
        for change in changes:
            _say(f"changed since the last start: {change}")
        newest = keeper.find()
        run.save_spec(spec)
        if is_new:
            run.save_plan(plan)
        run.take_stop()
        resume = {**newest.manifest, "path": newest.path} if newest else None
        return _Start(plan.small_bytes, plan.plan_id, plan.num_rows, plan.eval is not None, run.claim_attempt(), resume)
    except DltrainError as error:
        # The others wait for an answer.
        return _Start(error=str(error))


class _Rank:
    """One rank's part of it."""

    def __init__(
        self,
        spec: JobSpec,
        run: RunDir,
        start: _Start,
        keeper: Keeper | None,
        rank: int,
        num_ranks: int,
        home: str,
        device: Any,
    ) -> None:
        self._spec, self._run, self._start, self._device = spec, run, start, device
        self._has_eval, self._num_ranks = start.has_eval, num_ranks
        saved = start.resume or {}
        self._evaluations = Evaluations(spec.train)
        if start.resume:
            self._evaluations.restore(start.resume, {})
        best = self._evaluations.best
        # Rank 0 carries on what was trained before; of the others each has its own part.
        self._trail = Trail.of(saved.get("audit")) if rank == 0 else Trail()
        self._schedule = Schedule.of(spec, start.num_rows, start.step, start.position)
        self._job = RankJob(
            spec=spec,
            attempt=start.attempt,
            rank=rank,
            num_ranks=num_ranks,
            step=start.step,
            position=start.position,
            schedule=self._schedule,
            run=run.url,
            plan=start.plan,
            plan_id=start.plan_id,
            checkpoints=run.checkpoints.url,
            resume=start.resume,
            remembers=False,
            best=float(best["value"]) if best else None,
            best_step=int(best["step"]) if best else 0,
            waited=self._evaluations.waited,
            cwd=home,
            device=device.type,
            environment={"LOCAL_RANK": os.environ.get("LOCAL_RANK", "0")},
        )
        self._keeper = keeper
        self._uploads = Uploads(self._job, run, keeper, _say)
        self._step, self._why, self._loss = start.step, "", 0.0

    def train(self) -> dict[str, Any]:
        """Runs the loop to its end."""
        from dltrain.training.loop import Loop
        from dltrain.training.task import load_task

        task = load_task(self._spec.task, self._spec.args, self._job.cwd)
        with self._wish() as wish:
            self._loop = Loop(self._job, task, self._device, wish=wish, alive=lambda _: None, ask=_no_other_machine)
            for report in self._loop.run():
                self._take(report)
        self._uploads.close()
        # Nobody returns before the last checkpoint is there.
        _barrier()
        status = "stopped" if self._why else "finished"
        return {"run": self._run.url, "status": status, "step": self._step, "metrics": self._evaluations.metrics}

    def _take(self, report: Report) -> None:
        match report:
            case StepReport():
                self._step, self._loss = report.step, report.loss
                self._trail.add(report.step, [report])
                for source, _, row, reason in report.replaced:
                    _say(f"row {row} of dataset {source} can't be read, another one was trained: {reason}")
                if not self._has_eval and self._due():
                    self._tell({})
            case EvalReport():
                self._evaluations.add(report)
                self._tell(report.metrics)
            case SlotsMade():
                self._uploads.slots_made(report)
            case SaveWanted():
                self._uploads.save(report, self._manifest(), self._loop.unpin)
            case SaveFailed():
                self._uploads.failed(report, self._manifest())
            case Note():
                _say(report.text)
            case Done():
                self._why = report.why

    def _due(self) -> bool:
        return self._step % self._schedule.eval_every == 0 or self._step == self._schedule.total_steps

    def _tell(self, metrics: Mapping[str, float]) -> None:
        """To Ray Train, which waits for all ranks to do so."""
        from ray import train

        told = {**metrics, "step": self._step, "train_loss": _summed(self._loss, self._device), "run": self._run.url}
        with tempfile.TemporaryDirectory() as directory:
            pointer = None
            if self._job.rank == 0:
                # Without one Ray Train keeps no metrics. It may copy and delete what it is given: not the run's own.
                Path(directory, POINTER).write_text(json.dumps(told))
                pointer = train.Checkpoint.from_directory(directory)
            train.report(told, checkpoint=pointer)

    def _manifest(self) -> dict[str, Any]:
        """What is known of the run now; every rank must ask, since each has a part of it."""
        from dltrain import __version__

        spec, trail = self._spec, _joined(_gathered(self._trail.to_dict(), self._num_ranks))
        if trail.replaced.total() > spec.data.bad_rows:
            raise RunFailedError(
                f"{trail.replaced.total()} rows can't be read, data.bad_rows allows {spec.data.bad_rows}"
            )
        return {
            "zero": spec.engine.zero,
            "precision": spec.engine.precision,
            "global_batch": spec.batch.global_,
            "plan_id": self._start.plan_id,
            "spec": spec.to_dict(),
            "dltrain": __version__,
            **self._evaluations.to_dict(),
            "audit": trail.to_dict(),
        }

    @contextlib.contextmanager
    def _wish(self) -> Iterator[Callable[[], str]]:
        """What rank 0 is asked to do: one rank's wish is all ranks'."""
        if self._keeper is None:
            yield lambda: ""
            return
        requests = Requests(self._run)
        try:
            yield lambda: "stop" if requests.stop or requests.replaced else ""
        finally:
            requests.close()


def _joined(trails: list[Mapping[str, Any]]) -> Trail:
    whole = Trail()
    for trail in map(Trail.of, trails):
        for where, part in trail.sums.items():
            whole.sums[where] = whole.sums[where] + part if where in whole.sums else part
        whole.replaced.update(trail.replaced)
    return whole


# ---- Ray Train's side ----


def _rank() -> tuple[int, int]:
    try:
        from ray import train
    except ImportError as error:
        raise MissingExtraError(str(error.name or "ray[train]"), "tune") from error
    import torch.distributed as dist

    if not dist.is_initialized():
        raise UserError(
            "run_in_train_fn: there is no process group; call it in the train function of ray.train.torch.TorchTrainer"
        )
    context = train.get_context()
    return int(context.get_world_rank()), int(context.get_world_size())


def _device() -> Any:
    """This rank's, with DeepSpeed on the group that Ray Train has made."""
    import torch
    import torch.distributed as dist
    from ray.train.torch import get_device

    from dltrain.running.rendezvous import use_group
    from dltrain.training import cpu_op

    device = get_device()
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        with contextlib.redirect_stdout(sys.stderr):
            cpu_op.load()
    else:
        torch.cuda.set_device(device)
    use_group(dist.get_backend())
    return device


def _no_other_machine(name: str, *_: int) -> bytes:
    raise RuntimeError(f"there are no snapshots in memory here: {name}")


def _say(text: str) -> None:
    print(text, flush=True)


# ---- what ranks tell each other ----


def _broadcast(start: _Start) -> _Start:
    import torch.distributed as dist

    box = [start]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _gathered(value: Mapping[str, Any], num_ranks: int) -> list[Mapping[str, Any]]:
    import torch.distributed as dist

    everyone: list[Any] = [None] * num_ranks
    dist.all_gather_object(everyone, value)
    return everyone


def _summed(value: float, device: Any) -> float:
    """The loss of a step is a sum of the ranks' parts."""
    import torch
    import torch.distributed as dist

    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total)


def _barrier() -> None:
    import torch.distributed as dist

    dist.barrier()
