"""Every job, a few steps of it: 2 workers of which one is killed learn what 1 worker does that nothing happens to."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import pytest
import yaml
from harness import ROOT, Done, finish, start, steps

pytestmark = pytest.mark.long
STEPS, KILL_AFTER = 16, 6
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.yaml") if path.with_suffix(".py").exists())


@dataclass
class Small:
    """How a job is made small.

    Attributes:
        data: what its `make_data` takes; args: what its task takes.
        tolerance: relative, of the losses at another number of workers. 0.0 where they need not be near each other,
            because batch normalization sees other batches: the kill is compared with 2 workers then. Dropout has other
            random numbers at another number of workers, so it is 0.
        evaluation: relative, of the metrics at another number of workers.
        lr: in place of the spec's, where at that rate a rounded digit grows a hundredfold.
    """

    data: dict[str, Any] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-3
    evaluation: float = 1e-2
    lr: float | None = None


SMALL = {
    "chat_transformer": Small(data={"dialogues": 800}, args={"width": 32}),
    "few_labels": Small(args={"width": 8}),
    # A judge that has learned nothing is the same judge at any number of workers.
    "gan_image": Small(data={"epochs": 0}, args={"width": 8}),
    "gan_video": Small(data={"train": 320, "test": 64, "epochs": 0}, args={"width": 2}),
    # The last digits of a score decide which of two notes is chosen.
    "gan_music": Small(data={"train": 320, "test": 64}, args={"width": 16}, evaluation=5e-2),
    "face_cnn": Small(data={"train": 320, "test": 64}, args={"width": 8}, lr=3e-4),
    "finetune_hf": Small(data={"rows": 800}),
    "health_mlp": Small(tolerance=0.0),
    "image_cnn": Small(args={"width": 16, "blocks": 1}, tolerance=0.0),
    "label_check": Small(args={"width": 8}, tolerance=0.0),
    "lm_rnn": Small(args={"embedding": 32, "width": 64, "dropout": 0.0}),
    "object_detection": Small(data={"train": 320, "test": 64}, args={"width": 16, "blocks": 1}, lr=3e-4),
    "speech_rnn": Small(data={"train": 128, "test": 32}, args={"width": 32, "dropout": 0.0}),
    "video_cnn": Small(data={"train": 320, "test": 64}, args={"width": 8, "stages": 2}, tolerance=0.0),
    "translate_transformer": Small(data={"phrases": 960}, args={"width": 32}),
    "summarize_transformer": Small(data={"most": 20}, args={"width": 32, "dropout": 0.0}),
}


@dataclass
class Job:
    """A job on little data of its own, for a few steps."""

    name: str
    spec: dict[str, Any]
    small: Small
    home: Path
    address: str

    def begin(self, run: str, args: Mapping[str, Any] | None = None, **changes: Any) -> Any:
        old = "/".join(Path(self.spec["data"]["train"]).parts[:2])
        changed = yaml.safe_load(yaml.safe_dump(self.spec).replace(old, str(self.home / "data")))
        changed["train"] = {k: v for k, v in changed["train"].items() if k not in ("epochs", "init_from", "freeze")}
        changed["train"] |= {"steps": STEPS, "eval_every": STEPS}
        changed["args"] = {**changed.get("args", {}), **self.small.args, **(args or {})}
        changed |= {"name": run, "runs": str(self.home / "runs"), "metrics": {"port": 0}, **changes}
        if self.small.lr:
            changed["optim"] = {**changed["optim"], "lr": self.small.lr}
        path = self.home / f"{run}.yaml"
        path.write_text(yaml.safe_dump(changed))
        return start("run", str(path), "--json", "--address", self.address, cwd=ROOT)


@pytest.fixture(params=JOBS)
def job(request: pytest.FixtureRequest, tmp_path: Path, ray_address: str) -> Job:
    name, small = request.param, SMALL.get(request.param, Small())
    assert importlib.import_module(f"jobs.{name}").make_data(str(tmp_path / "data"), **small.data)
    return Job(name, yaml.safe_load((ROOT / "jobs" / f"{name}.yaml").read_text()), small, tmp_path, ray_address)


def ended(process: Any) -> Done:
    done = finish(process)
    assert done.code == 0, done.err
    return done


def test_at_one_and_two_workers_and_after_a_kill(job: Job) -> None:
    runs, tolerance = job.home / "runs", job.small.tolerance
    file = job.home / "dying_job.py"
    file.write_text(f'from tests.e2e.dying import dying\n\nDying = dying("{job.name}")\n')
    dies = {"marker": str(job.home / "died"), "step": KILL_AFTER}
    killed = ended(job.begin("killed", dies, task=f"{file}:Dying"))
    assert killed.json["restarts"] == 1
    quiet = ended(job.begin("quiet", workers=1 if tolerance else 2))
    mine, whole = (steps(runs / run).values() for run in ("killed", "quiet"))
    assert [line["batch_id"] for line in mine] == [line["batch_id"] for line in whole]
    losses = [[line["loss"] for line in lines] for lines in (mine, whole)]
    if tolerance:
        assert losses[0] == pytest.approx(losses[1], rel=tolerance)
        assert killed.json["eval"] == pytest.approx(quiet.json["eval"], rel=job.small.evaluation)
    else:
        # Bit for bit.
        assert losses[0] == losses[1]
        assert killed.json["eval"] == quiet.json["eval"]
    assert harness.dltrain("audit", str(runs / "killed")).code == 0
