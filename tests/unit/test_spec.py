"""The spec: defaults, overrides, and every fault at once."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from dltrain.errors import SpecError
from dltrain.spec import JobSpec, load_spec, parse_spec

GOOD: dict[str, Any] = {
    "name": "digits",
    "task": "jobs.image_cnn:ImageCnn",
    "data": {"train": "s3://bucket/train"},
    "batch": {"global": 256},
    "train": {"epochs": 3},
    "optim": {"lr": 1e-3},
}


def good(**changes: Any) -> dict[str, Any]:
    return {**GOOD, **changes}


def faults(raw: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(SpecError) as caught:
        parse_spec(raw)
    return caught.value.faults


def test_the_smallest_spec_has_sensible_defaults() -> None:
    spec = parse_spec(GOOD)
    assert (spec.workers.min, spec.workers.max, spec.engine.zero, spec.metrics.port) == (1, 1, 1, 9464)


def test_a_fixed_number_of_workers_is_min_and_max() -> None:
    spec = parse_spec(good(workers=3))
    assert (spec.workers.min, spec.workers.max) == (3, 3)


def test_a_spec_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse_spec(GOOD).name = "other"  # type: ignore[misc]


def test_yaml_round_trip() -> None:
    spec = parse_spec(good(workers=2, engine={"zero": 3, "precision": "bf16"}))
    assert JobSpec.model_validate(yaml.safe_load(spec.to_yaml())) == spec


def test_a_cache_is_no_part_of_what_a_run_is() -> None:
    spec = parse_spec(good(data={"train": "s3://bucket/train", "cache": {"dir": "/scratch", "gb": 0.5}}))
    assert spec.data.cache is not None
    assert spec.data.cache.gb == 0.5
    assert spec.identity == parse_spec(GOOD).identity
    wrong = good(data={"train": "s3://bucket/train", "cache": {"dir": "/scratch", "gb": 0, "max": 3}})
    assert faults(wrong) == (
        "data.cache.gb: found 0; input should be greater than 0",
        "data.cache.max: unknown key; allowed: dir, gb",
    )


def test_five_faults_are_five_lines() -> None:
    raw = good(
        name="a b",
        optim={"name": "adamm", "lr": -1},
        engine={"zero": 5},
        data={"train": "x", "colums": ["a"]},
    )
    with pytest.raises(SpecError) as caught:
        parse_spec(raw, "job.yaml")
    first, *lines = str(caught.value).splitlines()
    assert first == "job.yaml: 5 faults"
    assert [line.split(":")[0].strip() for line in lines] == [
        "name",
        "data.colums",
        "optim.name",
        "optim.lr",
        "engine.zero",
    ]
    assert "'a b'" in lines[0]
    assert "did you mean 'columns'?" in lines[1]
    assert "found 'adamm'; allowed: 'adamw', 'adam', 'sgd', 'lion' or 'task'" in lines[2]
    assert "found -1" in lines[3]
    assert "found 5; allowed: 0, 1, 2 or 3" in lines[4]
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train": {"epochs": 1, "steps": 2}}, "train: found both epochs and steps"),
        ({"train": {}}, "train: found neither epochs and steps"),
        ({"workers": {"min": 3, "max": 2}}, "min 3 is more than max 2"),
        ({"train": {"epochs": 1, "compile": "fast"}}, "train.compile: found 'fast'; allowed: False, True, 'default'"),
        ({"train": {"epochs": 1, "early_stop": 3}}, "train.early_stop: found 3 without data.eval"),
        ({"train": {"epochs": 1, "ema": 1.0}}, "train.ema: found 1.0"),
        ({"optim": {"lr": 1, "nesterov": True}}, "nesterov: found true with momentum 0"),
        ({"optim": {"lr": 1, "name": "lion", "fused": True}}, "fused: found true with lion"),
        ({"engine": {"zero": 0, "offload": "optimizer"}}, "offload: found optimizer with zero 0"),
        ({"engine": {"zero": 2, "offload": "all"}}, "offload: found all with zero 2"),
        ({"engine": {"loss_scale": 8}}, "loss_scale: found 8 with fp32"),
        ({"engine": {"deepspeed": {"fp16": {"enabled": True}}}}, "fp16.enabled (set engine.precision)"),
        ({"engine": {"deepspeed": {"zero_optimization": {"offload_param": {}}}}}, "offload_param (set engine.offload)"),
        ({"workers": 300}, "batch.global: 256 rows can't feed workers.min 300"),
        ({"workers": {"min": 1, "max": 1, "gpus": 2}}, "must be 0, 1 or auto"),
        ({"engine": {"tensor_parallel": 2}}, "out of scope for now"),
        ({"engine": {"deepspeed": {"train_batch_size": 3}}}, "train_batch_size (set batch.global)"),
        ({"engine": {"deepspeed": {"zero_optimization": {"stage": 3}}}}, "zero_optimization.stage (set engine.zero)"),
        ({"task": "nothing"}, "package.module:Class"),
        ({"optim": {"lr": float("nan")}}, "optim.lr"),
        ({"optim": {"lr": 1e-3, "betas": [0.9, 1.5]}}, "must be >= 0 and < 1"),
        ({"batch": {"global": "many"}}, "batch.global: found 'many'"),
        ({"batch": 3}, "batch: found 3"),
        ({"data": {}}, "data: found neither train and mix; give exactly one"),
        ({"data": {"train": "a", "mix": [{"name": "b", "url": "b"}]}}, "data: found both train and mix"),
        ({"data": {"mix": [{"name": "b", "url": "b"}] * 2}}, "found the name 'b' twice in mix"),
        ({"data": {"mix": [{"name": "b", "url": "b", "weight": 0.5}]}}, "data.mix.0.weight: found 0.5"),
        (
            {"data": {"mix": [{"name": "b", "url": "b", "filter": [["lang", "=", "de"]]}]}},
            "data.mix.0.filter: ",
        ),
        ({"data": {"mix": [{"name": "b", "url": "b", "weigth": 2}]}}, "did you mean 'weight'?"),
        ({"data": {"train": "a", "pack": {"column": "t", "lenght": 8}}}, "did you mean 'length'?"),
        ({"data": {"train": "a", "filter": [["x", ">"]]}}, "'>' takes a value"),
        ({"data": {"train": "a", "filter": [["x", "is null", 1]]}}, "'is null' takes no value"),
        ({"data": {"train": "a", "filter": [["x", "=", 1]]}}, "found the operator '='; allowed: ==, !="),
        ({"data": {"train": "a", "filter": [["x", "in", 1]]}}, "it takes a list of values"),
        ({"data": {"train": "a", "filter": [["x", "<", None]]}}, "it takes one value"),
        ({"data": {"train": "a", "filter": [3]}}, "data.filter.0: found 3"),
    ],
)
def test_each_fault_says_what_was_found(change: dict[str, Any], said: str) -> None:
    assert any(said in fault for fault in faults(good(**change))), faults(good(**change))


def test_the_datasets_of_a_mix_and_of_one_alone() -> None:
    mix = parse_spec(good(data={"mix": [{"name": "web", "url": "w", "weight": 3}, {"name": "books", "url": "b"}]}))
    assert [(s.name, s.url, s.weight) for s in mix.data.sources] == [("web", "w", 3), ("books", "b", 1)]
    assert [(s.name, s.url) for s in parse_spec(GOOD).data.sources] == [("train", "s3://bucket/train")]
    assert JobSpec.model_validate(yaml.safe_load(mix.to_yaml())) == mix


def test_a_filter_survives_the_stored_spec() -> None:
    conditions = [["day", ">=", datetime.date(2024, 1, 2)], ["lang", "in", ["de", "fr"]], ["text", "not null"]]
    spec = parse_spec(good(data={"train": "a", "filter": conditions}))
    again = JobSpec.model_validate(yaml.safe_load(spec.to_yaml()))
    assert again.identity == spec.identity


def test_missing_fields_are_named() -> None:
    assert [fault.split(":")[0] for fault in faults({"name": "x"})] == ["task", "data", "batch", "train", "optim"]


def write(tmp_path: Path, raw: Any) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_overrides_win(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, GOOD), ["optim.lr=3e-4", "workers=2", "args.width=7", "engine.zero=2"])
    assert (spec.optim.lr, spec.workers.max, spec.args, spec.engine.zero) == (3e-4, 2, {"width": 7}, 2)


def test_an_override_inside_a_short_form(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, good(workers=2)), ["workers.max=4"])
    assert (spec.workers.min, spec.workers.max) == (2, 4)


def test_bad_overrides_are_reported_with_the_rest(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(write(tmp_path, good(engine={"zero": 9})), ["optim", "name.x=3"])
    assert len(caught.value.faults) == 3


@pytest.mark.parametrize(("text", "said"), [("a: [", "is not YAML"), ("- 1", "found list"), ("", "found NoneType")])
def test_a_file_that_is_no_spec(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=said):
        load_spec(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="can't be read"):
        load_spec(tmp_path / "none.yaml")


def test_the_shipped_specs_are_good() -> None:
    jobs = Path(__file__).resolve().parents[2] / "jobs"
    for path in jobs.glob("*.yaml"):
        assert load_spec(path).name


@pytest.mark.parametrize(("keep", "policy", "kept"), [(1, "skip", 1), (1, "rollback", 2), (3, "rollback", 3)])
def test_a_rollback_needs_two_checkpoints(keep: int, policy: str, kept: int) -> None:
    spec = parse_spec(good(checkpoint={"keep": keep}, faults={"nonfinite": policy}))
    assert spec.num_kept == kept
