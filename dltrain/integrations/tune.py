"""Ray Tune: a spec as a trainable, each trial a run of its own.

    from ray import tune
    from dltrain.integrations.tune import trainable

    tuner = tune.Tuner(
        trainable("digits.yaml", metric="accuracy", mode="max"),
        param_space={"optim.lr": tune.loguniform(1e-4, 1e-2), "args.width": tune.choice([16, 32])},
        tune_config=tune.TuneConfig(metric="accuracy", mode="max", num_samples=8),
    )

Keys of `param_space` are fields of the spec. A trial reports every evaluation. Its driver runs in the trial's process
and takes no CPU; Tune reserves one bundle for each of `workers.max`, and a trial begins when it has all of them: trials
that wait hold nothing, so they can't keep each other from starting.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dltrain.errors import UserError
from dltrain.integrations.changes import changed, read_spec
from dltrain.observing.view import Progress
from dltrain.running.driver import Driver
from dltrain.running.places import GivenBundles
from dltrain.spec import JobSpec

__all__ = ["trainable"]

# Tune itself gives a trial ten minutes to end (TUNE_FORCE_TRIAL_CLEANUP_S).
_STOP_SECONDS = 300.0
_CHECKPOINT = "dltrain-run.json"


def trainable(
    spec: str | Path | Mapping[str, Any] | JobSpec,
    *,
    metric: str | None = None,
    mode: Literal["min", "max"] = "min",
    cwd: str | None = None,
) -> Any:
    """A class for `ray.tune.Tuner`.

    A trial's run is called as the spec and the trial are, and lies beside the others under `runs`. When a scheduler
    ends a trial, its run stops cleanly, with a checkpoint; a trial that is started again goes on from there. What it
    reports: the evaluation's metrics, `step`, `train_loss`, `samples_per_second`, and `run`, the run's directory.

    Args:
        spec: a YAML file, what would be in it, or a JobSpec; it must have `data.eval`.
        metric, mode: what is tuned: the best checkpoint of each run is chosen by it; default: as the spec says.
        cwd: the directory of the task and of relative paths; default: the current one.

    Raises:
        SpecError: the spec has faults.
        MissingExtraError: Ray Tune is not installed.
    """
    home = cwd or os.getcwd()
    base = read_spec(spec, home)
    if base.data.eval is None:
        raise UserError("data.eval: is missing; a trial reports evaluations, so it needs data to evaluate on")
    first = {"metrics.port": 0, **({"train.best.metric": metric, "train.best.mode": mode} if metric else {})}
    return _trial_class(changed(base, first).to_dict(), home)


def _trial_class(raw: dict[str, Any], home: str) -> Any:
    """Made here, and so sent by value: it carries the spec along, and Tune is imported when it is needed."""
    base: Any = _tune().Trainable

    class DltrainTrial(base):  # type: ignore[misc]
        """One trial: a nested run whose driver is a thread of this process."""

        def setup(self, config: dict[str, Any]) -> None:
            spec = _named(changed(JobSpec.model_validate(raw), config), self.trial_id)
            self._nested = NestedRun(spec, home)

        def step(self) -> dict[str, Any]:
            return self._nested.next_report()

        def cleanup(self) -> None:
            self._nested.stop()

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            Path(checkpoint_dir, _CHECKPOINT).write_text(json.dumps({"run": self._nested.name}))

        def load_checkpoint(self, checkpoint: Any) -> None:
            _check_own(checkpoint, self._nested.name)

        @classmethod
        def default_resource_request(cls, config: dict[str, Any]) -> Any:
            return bundles(changed(JobSpec.model_validate(raw), config))

    return DltrainTrial


def bundles(spec: JobSpec) -> Any:
    """What Tune is to reserve for a trial: nothing for its driver, and a bundle for each worker."""
    import ray

    gpus = spec.workers.gpus
    if gpus == "auto":
        gpus = int(ray.cluster_resources().get("GPU", 0.0) >= 1)  # type: ignore[no-untyped-call]
    slot = {"CPU": spec.workers.cpus, **spec.workers.resources, **({"GPU": gpus} if gpus else {})}
    return _tune().PlacementGroupFactory([{}, *[slot] * spec.workers.max])


def _named(spec: JobSpec, trial_id: str) -> JobSpec:
    return changed(spec, {"name": f"{spec.name}-{trial_id}"})


def _check_own(directory: str, name: str) -> None:
    """Tune hands a trial its own checkpoint, or with population-based training another one's."""
    saved = json.loads(Path(directory, _CHECKPOINT).read_text())["run"]
    if saved != name:
        raise UserError(
            f"trial {name} was given the checkpoint of {saved}: weights do not move between runs, so schedulers that "
            "copy trials (population-based training) can't be used; ASHA, HyperBand and searches can"
        )


def _tune() -> Any:
    from dltrain.errors import MissingExtraError

    try:
        from ray import tune
    except ImportError as error:
        raise MissingExtraError(str(error.name or "ray[tune]"), "tune") from error
    return tune


# ---- the run within ----


@dataclass(frozen=True)
class _End:
    """The run is over."""

    summary: Mapping[str, Any] | None = None
    error: BaseException | None = None


class NestedRun:
    """A run whose driver is a thread of this process; it is also the driver's view.

    Args:
        spec: of the run.
        home: the user's directory, where it is on this machine.
    """

    def __init__(self, spec: JobSpec, home: str) -> None:
        import ray
        from ray.util.placement_group import get_current_placement_group

        group = get_current_placement_group()
        address = str(ray.get_runtime_context().gcs_address)
        cwd = home if os.path.isdir(home) else os.environ.get("TUNE_ORIG_WORKING_DIR", os.getcwd())
        self.name = spec.name
        self._progress: Progress | None = None
        self._news: queue.SimpleQueue[dict[str, Any] | _End] = queue.SimpleQueue()
        self._last: dict[str, Any] = {}
        self._url = f"{spec.runs.rstrip('/')}/{spec.name}"
        self._driver = Driver(spec, self, address, cwd, places=GivenBundles(group) if group else None)
        self._thread = threading.Thread(target=self._run, name="dltrain-driver", daemon=True)
        self._thread.start()

    def next_report(self) -> dict[str, Any]:
        """The next evaluation; with done: True the last one, again if there is nothing new.

        Raises:
            DltrainError: the run failed.
        """
        news = self._news.get()
        if isinstance(news, _End):
            return self._end(news)
        self._last = news
        if self._progress and news["step"] >= self._progress.total_steps:
            # What follows is its last checkpoint.
            return self._end(self._news.get())
        return news

    def _end(self, news: dict[str, Any] | _End) -> dict[str, Any]:
        if isinstance(news, dict):
            return {**news, "done": False}
        if news.error:
            raise news.error
        summary = news.summary or {}
        # Nothing new, where it was over already when the trial was started again.
        known = {**(summary.get("eval") or {}), "step": summary.get("steps", 0), "run": self._url}
        return {**(self._last or known), "status": summary.get("status", ""), "done": True}

    def stop(self, seconds: float = _STOP_SECONDS) -> None:
        """Ends it after the step that it is in, with a checkpoint."""
        self._driver.stop()
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            self._news.put(_End(self._driver.run()))
        except BaseException as error:  # whatever it is, the trial waits for it
            self._news.put(_End(error=error))

    # ---- what the driver tells its view ----

    def say(self, text: str, kind: str = "info") -> None:
        """Into the trial's log."""
        print(f"{self.name}: {'WARNING: ' if kind in ('warn', 'bad') else ''}{text}", flush=True)

    def log(self, text: str) -> None:
        """Into the trial's log."""
        print(text, flush=True)

    def on_step(self, progress: Progress) -> None:
        """Kept for the next report."""
        self._progress = progress

    def on_eval(self, step: int, metrics: Mapping[str, float], is_best: bool) -> None:
        """A report."""
        seen = self._progress
        more = {"train_loss": seen.loss, "samples_per_second": seen.samples_per_second} if seen else {}
        self._news.put({**metrics, "step": step, "is_best": is_best, "run": self._url, **more})

    def close(self) -> None:
        """The run is over."""
