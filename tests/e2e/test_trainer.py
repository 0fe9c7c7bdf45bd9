"""What a spec can ask of training, as whole runs: averages, early stop, weights to begin with, another optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import harness
import pytest
from harness import Done, events, steps
from safetensors.torch import load_file


def spec(tmp: Path, name: str, **changes: Any) -> str:
    data = {"train": str(tmp / "train"), "eval": str(tmp / "test"), **changes.pop("data", {})}
    made = harness.make_spec(tmp, name=name, data=data, **changes)
    path = tmp / f"{name}.yaml"
    path.write_text(harness.json.dumps(made))
    return str(path)


@pytest.fixture
def go(tmp_path: Path, ray_address: str) -> Any:
    harness.write_data(tmp_path / "train")
    harness.write_data(tmp_path / "test", rows=90, seed=1)

    def run(name: str, *overrides: str, **changes: Any) -> Done:
        path = spec(tmp_path, name, **changes)
        return harness.dltrain("run", path, *overrides, "--json", "--address", ray_address)

    return run


def said(run: Path) -> str:
    """All that the workers have said, in all starts of a run."""
    return "\n".join(event["text"] for event in events(run) if event["event"] == "Note")


def weights(run: Path, *options: str) -> dict[str, Any]:
    target = run / "out.safetensors"
    done = harness.dltrain(
        "checkpoint", "export", str(run), "--to", str(target), "--step", "newest", *options, "--json"
    )
    assert done.code == 0, done.err
    return load_file(target)


@pytest.mark.long
def test_the_average_of_weights_is_evaluated_and_exported_and_goes_on(tmp_path: Path, go: Any) -> None:
    plain = go("plain", train={"steps": 20, "eval_every": 20})
    whole = go("whole", train={"steps": 20, "eval_every": 20, "ema": 0.8}, engine={"zero": 2})
    first = go("parts", "train.steps=9", train={"steps": 20, "eval_every": 20, "ema": 0.8}, engine={"zero": 3})
    assert (plain.code, whole.code, first.code) == (0, 0, 0), whole.err + first.err
    parts = go("parts", "workers=1", train={"steps": 20, "eval_every": 20, "ema": 0.8}, engine={"zero": 1})
    assert parts.code == 0, parts.err
    # The same training, another evaluation.
    runs = tmp_path / "runs"
    losses = [[line["loss"] for line in steps(runs / name).values()] for name in ("plain", "whole", "parts")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)
    assert whole.json["eval"]["loss"] != pytest.approx(plain.json["eval"]["loss"], rel=1e-3)
    assert parts.json["eval"]["loss"] == pytest.approx(whole.json["eval"]["loss"], rel=1e-4)
    found = {name: weights(runs / name) for name in ("plain", "whole", "parts")}
    for name, tensor in found["whole"].items():
        assert tensor.allclose(found["parts"][name], atol=1e-5)
    assert not found["whole"]["0.weight"].allclose(found["plain"]["0.weight"], atol=1e-3)


def test_a_run_that_gets_no_better_ends_early_and_stays_ended(tmp_path: Path, go: Any) -> None:
    # So fast that it soon goes up and down.
    train, optim = {"steps": 4000, "eval_every": 4, "early_stop": 3}, {"lr": 0.3}
    done = go("early", train=train, optim=optim)
    assert done.code == 0, done.err
    assert done.json["status"] == "finished"
    assert "early stop at step" in said(tmp_path / "runs" / "early")
    made = [event for event in events(tmp_path / "runs" / "early") if event["event"] == "EvalReport"]
    end = done.json["steps"]
    assert end < 4000
    last = max(event["step"] for event in made if event["rank"] == 0 and event["is_best"])
    assert end == last + 12
    again = go("early", train=train, optim=optim)
    assert again.code == 0, again.err
    assert again.json["steps"] == end
    assert len(steps(tmp_path / "runs" / "early")) == end
    more = go("early", train={**train, "early_stop": 5}, optim=optim)
    assert more.json["steps"] >= end + 8


@pytest.mark.long
def test_weights_of_a_run_or_a_file_begin_another_one(tmp_path: Path, go: Any) -> None:
    assert go("teacher", train={"steps": 20}).code == 0
    runs = tmp_path / "runs"
    teacher = weights(runs / "teacher")
    for name, url in (("from-run", "teacher"), ("from-file", str(runs / "teacher" / "out.safetensors"))):
        freeze = {"steps": 3, "init_from": {"url": url, "step": "newest"}, "freeze": ["0.*"]}
        done = go(name, train=freeze, engine={"zero": 3})
        assert done.code == 0, done.err
        assert "weights of 4 tensors taken from" in said(runs / name)
        pupil = weights(runs / name)
        assert pupil["0.weight"].equal(teacher["0.weight"])
        assert not pupil["3.weight"].equal(teacher["3.weight"])
        assert pupil["3.weight"].allclose(teacher["3.weight"], atol=0.05)
    # What is resumed is not begun again.
    done = go(name, train={**freeze, "steps": 5}, engine={"zero": 3})
    assert done.code == 0, done.err
    assert said(runs / name).count("taken from") == 1


@pytest.mark.long
def test_another_optimizer_begins_without_the_state_of_the_first(tmp_path: Path, go: Any) -> None:
    assert go("other", train={"steps": 8}, optim={"name": "sgd", "lr": 0.05, "momentum": 0.9}).code == 0
    for optim in ({"name": "adamw", "lr": 0.01}, {"name": "adam", "lr": 0.01}):
        more = len(steps(tmp_path / "runs" / "other")) + 4
        done = go("other", train={"steps": more}, optim=optim, engine={"zero": 2})
        assert done.code == 0, done.err
        assert done.json["steps"] == more
    # Said once, by rank 0; adam's state is adamw's.
    assert said(tmp_path / "runs" / "other").count("begins without its state") == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": {"steps": 2, "freeze": ["nothing"]}}, "train.freeze: 'nothing' matches no parameter"),
        ({"train": {"steps": 2, "init_from": "nobody"}}, "train.init_from: "),
        ({"optim": {"lr": 0.1, "name": "task"}}, "define `optimizer` in Tiny"),
        ({"engine": {"activation_checkpointing": ["Conv"]}}, "'Conv' matches no module"),
    ],
)
def test_mistakes_are_told_and_exit_2(go: Any, changes: dict[str, Any], words: str) -> None:
    done = go("wrong", **changes)
    assert done.code == 2, done.err
    assert words in done.json["error"]
    assert "Traceback" not in done.err


def test_fp16_is_refused_where_it_is_not_computed(go: Any) -> None:
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().is_fp16_supported():
        pytest.skip("this processor computes in fp16")
    done = go("half", train={"steps": 2}, engine={"precision": "fp16"})
    assert done.code == 2, done.err
    assert "engine.precision: found fp16" in done.json["error"]
    assert "Traceback" not in done.err
