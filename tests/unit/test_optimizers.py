"""Parameters in groups, freezing, and the optimizers that a spec can name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dltrain.errors import UserError
from dltrain.spec import OptimSpec
from dltrain.training.optimizers import freeze, make_optimizer, parameter_groups


def net() -> nn.Module:
    return nn.ModuleDict({"body": nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), "head": nn.Linear(4, 2)})


def named(module: nn.Module, optim: OptimSpec) -> list[tuple[float, float, list[str]]]:
    names = {id(p): n for n, p in module.named_parameters()}
    groups = parameter_groups(module, optim)
    return [(g["lr_scale"], g["weight_decay"], [names[id(p)] for p in g["params"]]) for g in groups]


def optim(**fields: Any) -> OptimSpec:
    return OptimSpec(lr=0.1, **fields)


def test_without_decay_there_is_one_group() -> None:
    assert [len(names) for *_, names in named(net(), optim())] == [6]


def test_norms_and_biases_do_not_decay() -> None:
    assert named(net(), optim(weight_decay=0.3)) == [
        (1.0, 0.3, ["body.0.weight", "head.weight"]),
        (1.0, 0.0, ["body.0.bias", "body.1.weight", "body.1.bias", "head.bias"]),
    ]


def test_the_first_group_that_matches_counts() -> None:
    groups = [{"match": "head.bias", "weight_decay": 0.7}, {"match": ["head.*", "body.1.*"], "lr_scale": 0.5}]
    assert named(net(), optim(weight_decay=0.3, groups=groups)) == [
        (1.0, 0.7, ["head.bias"]),
        (1.0, 0.3, ["body.0.weight"]),
        (1.0, 0.0, ["body.0.bias"]),
        (0.5, 0.3, ["head.weight"]),
        (0.5, 0.0, ["body.1.weight", "body.1.bias"]),
    ]


def test_a_pattern_that_matches_nothing_is_told_with_the_names() -> None:
    with pytest.raises(UserError, match=r"optim.groups: 'haed.\*' matches no parameter; they are called body.0.weight"):
        parameter_groups(net(), optim(groups=[{"match": "haed.*"}]))
    with pytest.raises(UserError, match=r"train.freeze: 'x' matches no parameter"):
        freeze(net(), ["body.*", "x"])


def test_what_is_frozen_is_in_no_group() -> None:
    module = net()
    assert freeze(module, ["body.*"]) == ["body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias"]
    assert [names for *_, names in named(module, optim())] == [["head.weight", "head.bias"]]


def test_not_all_can_be_frozen() -> None:
    with pytest.raises(UserError, match="leaves nothing to train"):
        freeze(net(), ["*"])


@pytest.mark.parametrize(
    ("fields", "kind", "defaults"),
    [
        ({}, "AdamW", {"betas": (0.9, 0.999), "eps": 1e-8, "fused": None}),
        ({"betas": (0.8, 0.9), "eps": 1e-5}, "AdamW", {"betas": (0.8, 0.9), "eps": 1e-5}),
        ({"name": "adam"}, "Adam", {"betas": (0.9, 0.999)}),
        ({"name": "sgd", "momentum": 0.7, "nesterov": True}, "SGD", {"momentum": 0.7, "nesterov": True}),
        ({"name": "lion"}, "Lion", {"betas": (0.9, 0.99)}),
        ({"name": "lion", "betas": (0.5, 0.6)}, "Lion", {"betas": (0.5, 0.6)}),
    ],
)
def test_optimizers_take_their_fields(fields: dict[str, Any], kind: str, defaults: dict[str, Any]) -> None:
    spec = optim(**fields)
    made = make_optimizer(parameter_groups(net(), spec), spec, fused=False)
    assert type(made).__name__ == kind
    assert {name: made.defaults[name] for name in defaults} == defaults


def test_fused_is_asked_for() -> None:
    spec = optim()
    assert make_optimizer(parameter_groups(net(), spec), spec, fused=True).defaults["fused"] is True


def test_lion_steps_by_the_sign() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, -1.0, 0.5]]))
    made = make_optimizer([{"params": [weight], "weight_decay": 0.1}], optim(name="lion"), fused=False)
    weight.grad = torch.tensor([[3.0, -0.01, 0.0]])
    made.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([[0.99 - 0.1, -0.99 + 0.1, 0.495]]))
