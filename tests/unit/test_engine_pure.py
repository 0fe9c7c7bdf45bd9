"""The numbers an engine is set up with: DeepSpeed's JSON, learning rates, weight-decay groups."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from dltrain.errors import UserError
from dltrain.spec import EngineSpec, OptimSpec
from dltrain.training.config import deepspeed_config
from dltrain.training.engine import _cast, _check_precision
from dltrain.training.optimizers import make_optimizer, parameter_groups
from dltrain.training.schedules import learning_rate


def config(optim: dict[str, Any], engine: dict[str, Any]) -> dict[str, Any]:
    return deepspeed_config(OptimSpec(lr=0.1, **optim), EngineSpec(**engine), 4, 3, 5)


def _optimizer(module: nn.Module, optim: OptimSpec) -> torch.optim.Optimizer:
    return make_optimizer(parameter_groups(module, optim), optim, fused=False)


def rates(total_steps: int, **fields: Any) -> list[float]:
    optim = OptimSpec(lr=1.0, **fields)
    return [learning_rate(optim, step, total_steps) for step in range(total_steps)]


def test_batch_is_a_product() -> None:
    found = config({}, {})
    assert found["train_micro_batch_size_per_gpu"] == 4
    assert found["gradient_accumulation_steps"] == 3
    assert found["train_batch_size"] == 60


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_stage_and_precision(zero: int) -> None:
    assert config({}, {"zero": zero})["zero_optimization"]["stage"] == zero
    assert "bf16" not in config({}, {"zero": zero})
    assert config({}, {"zero": zero, "precision": "bf16"})["bf16"]["enabled"] is True


def test_clip() -> None:
    assert config({}, {})["gradient_clipping"] == 0.0
    assert config({"clip": 0.5}, {"zero": 1})["gradient_clipping"] == 0.5
    assert config({"clip": 0.5}, {"zero": 0})["gradient_clipping"] == 0.0


def test_raw_keys_are_merged_last_and_deep() -> None:
    raw = {"zero_optimization": {"reduce_bucket_size": 7}, "steps_per_print": 9}
    engine = EngineSpec(zero=2, deepspeed=raw)
    found = deepspeed_config(OptimSpec(lr=0.1), engine, 4, 3, 5)
    assert found["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 7}
    assert found["steps_per_print"] == 9
    assert engine.deepspeed == {"zero_optimization": {"reduce_bucket_size": 7}, "steps_per_print": 9}


def test_constant_after_warm_up() -> None:
    assert rates(6, warmup=4) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    assert rates(3) == [1.0, 1.0, 1.0]


def test_cosine_ends_at_final() -> None:
    found = rates(9, schedule="cosine", final=0.1)
    assert found[0] == pytest.approx(1.0)
    assert found[4] == pytest.approx(0.55)
    assert found[-1] == pytest.approx(0.1)
    assert found == sorted(found, reverse=True)


def test_cosine_after_warm_up() -> None:
    found = rates(7, schedule="cosine", warmup=2)
    assert found[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert found[-1] == pytest.approx(0.0)
    # A resumed run may be asked for more steps than were planned.
    assert learning_rate(OptimSpec(lr=1.0, schedule="cosine"), 50, 7) == pytest.approx(0.0)


@pytest.mark.parametrize("total_steps", [1, 2, 3])
def test_short_runs_have_a_rate(total_steps: int) -> None:
    assert all(0 <= rate <= 1 for rate in rates(total_steps, schedule="cosine", warmup=2))


def test_one_dimension_has_no_weight_decay() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    module[2].weight.requires_grad_(False)
    groups = _optimizer(module, OptimSpec(lr=0.1, weight_decay=0.3)).param_groups
    found = [(group["weight_decay"], sorted(p.ndim for p in group["params"])) for group in groups]
    assert found == [(0.3, [2]), (0.0, [1, 1, 1, 1])]


def test_optimizers_take_their_fields() -> None:
    module = nn.Linear(3, 4)
    adamw = _optimizer(module, OptimSpec(lr=0.1, betas=(0.8, 0.9), eps=1e-5))
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.defaults["betas"] == (0.8, 0.9)
    assert adamw.defaults["eps"] == 1e-5
    sgd = _optimizer(module, OptimSpec(name="sgd", lr=0.1, momentum=0.7))
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.defaults["momentum"] == 0.7


class Pair(NamedTuple):
    ids: torch.Tensor
    image: torch.Tensor


def test_only_floating_inputs_are_cast() -> None:
    pair = Pair(torch.zeros(2, dtype=torch.int64), torch.zeros(2))
    found = _cast({"pair": pair, "list": [torch.zeros(1), "text", None]}, torch.bfloat16)
    assert isinstance(found["pair"], Pair)
    assert found["pair"].ids.dtype == torch.int64
    assert found["pair"].image.dtype == torch.bfloat16
    assert found["list"][0].dtype == torch.bfloat16
    assert found["list"][1:] == ["text", None]


@pytest.mark.parametrize("supported", [False, True])
def test_fp16_is_refused_where_the_device_has_none(monkeypatch: pytest.MonkeyPatch, supported: bool) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: supported)
    if supported:
        _check_precision("fp16")
    else:
        with pytest.raises(UserError, match=r"engine\.precision: found fp16, "):
            _check_precision("fp16")
    _check_precision("bf16")
