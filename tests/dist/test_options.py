"""What a spec can ask of an engine, against plain torch, at every ZeRO stage: optimizers, averages, freezing and more."""

from __future__ import annotations

import math
from typing import Any

import networks
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from launch import run_ranks
from torch import nn

from dltrain.checkpoint.numbers import numbers, set_numbers
from dltrain.data.batch import Batch
from dltrain.spec import EngineSpec, OptimSpec
from dltrain.training.engine import Engine
from dltrain.training.initial import recompute
from dltrain.training.networks import Networks
from dltrain.training.optimizers import freeze, make_optimizer, parameter_groups
from dltrain.training.schedules import learning_rate
from dltrain.training.task import Task

STAGES = (0, 1, 2, 3)
STEPS, ROWS, TOTAL = 5, 11, 8
OPTIMS: dict[str, dict[str, Any]] = {
    "adam": {"name": "adam", "lr": 0.02, "weight_decay": 0.1, "schedule": "wsd", "decay": 0.5},
    "nesterov": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "schedule": "linear", "warmup": 2},
    "lion": {"name": "lion", "lr": 0.01, "weight_decay": 0.1, "schedule": "inverse_sqrt", "warmup": 1},
    "fused": {"name": "adamw", "lr": 0.02, "weight_decay": 0.1, "fused": True},
    "groups": {"lr": 0.02, "weight_decay": 0.1, "groups": [{"match": "3.*", "lr_scale": 0.1, "weight_decay": 0.5}]},
}


# ---- on the ranks ----


def mine(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's rows of a step."""
    x, y = networks.rows(index, ROWS)
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    part = slice(rank * ROWS // num_ranks, (rank + 1) * ROWS // num_ranks)
    return x[part], y[part]


def step(engine: Engine, index: int, harm: float = 1.0) -> Any:
    x, y = mine(index)
    engine.begin_step(ROWS)
    engine.backward(F.mse_loss(engine(x).float(), y) * harm, len(x), last=True)
    return engine.step()


def build(zero: int, optim: dict[str, Any] | None = None, module: nn.Module | None = None, **options: Any) -> Engine:
    module = module or networks.dense(0)
    return networks.engine_for(module, optim or {"lr": 0.02}, zero, total_steps=TOTAL, **options)


def optimizers(zero: int) -> dict[str, Any]:
    found = {}
    for name, optim in OPTIMS.items():
        engine = build(zero, optim)
        for index in range(STEPS):
            step(engine, index)
        found[name] = networks.weights(engine)
    return found


def averages(zero: int) -> list[str]:
    """Faults found in the running average of the weights."""
    engine, faults = build(zero, train={"ema": 0.6}), []
    wanted = networks.weights(engine)
    for index in range(STEPS):
        step(engine, index)
        decay, now = min(0.6, (2 + index) / (11 + index)), networks.weights(engine)
        wanted = {name: decay * wanted[name] + (1 - decay) * now[name] for name in now}
    before = networks.weights(engine)
    with engine.averaged():
        inside = networks.weights(engine)
    after = networks.weights(engine)
    for name in before:
        if not torch.equal(before[name], after[name]):
            faults.append(f"{name} is not what it was")
        if not torch.allclose(inside[name], wanted[name], atol=1e-6):
            faults.append(f"{name} is no average")
    return faults


def frozen(zero: int) -> dict[str, Any]:
    module = networks.dense(0)
    freeze(module, ["0.*"])
    engine = build(zero, module=module)
    for index in range(STEPS):
        step(engine, index)
    return networks.weights(engine)


def recomputed(zero: int) -> dict[str, Any]:
    module = networks.dense(0)
    recompute(module, ["Linear"])
    engine = build(zero, module=module)
    for index in range(STEPS):
        step(engine, index)
    return networks.weights(engine)


class Judge(nn.Sequential):
    """One whose second derivative is not zero."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(networks.FEATURES, 7), nn.Softplus(), nn.Linear(7, 1))


def penalised(net: Any, x: torch.Tensor) -> torch.Tensor:
    """R1: the squared gradient by the input is part of the loss. Source: Mescheder et al. 2018."""
    x = x.clone().requires_grad_(True)
    out = net(x).float()
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return F.softplus(-out).mean() + 0.5 * slope.square().sum(1).mean()


def penalty(zero: int) -> dict[str, Any] | None:
    if zero == 3:
        return None
    engine = build(zero, module=Judge())
    for index in range(STEPS):
        x, _ = mine(index)
        engine.begin_step(ROWS)
        engine.backward(penalised(engine, x), len(x), last=True)
        engine.step()
    return networks.weights(engine)


def half(zero: int) -> list[str]:
    """Faults found in fp16, which is computed here though slowly: what follows from an overflow is the same."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    raw = {"fp16": {"initial_scale_power": 8, "hysteresis": 1, "loss_scale_window": 3}}
    engine = build(zero, precision="fp16", deepspeed=raw)
    other = build(zero, precision="fp16", deepspeed=raw)
    faults: list[str] = []

    def expect(what: str, found: Any, wanted: Any) -> None:
        if found != wanted:
            faults.append(f"ZeRO {zero}: {what}: {found}, not {wanted}")

    before = networks.weights(engine)
    # Too large for fp16 on one rank only, with a loss that is finite.
    result = step(engine, 0, harm=1e8 if dist.get_rank() == dist.get_world_size() - 1 else 1.0)
    expect("an overflow", (result.applied, result.finite), (False, True))
    expect("the scale after it", numbers(engine.engine)["scale:cur_scale"], 128.0)
    expect("weights", all(torch.equal(before[n], w) for n, w in networks.weights(engine).items()), True)
    result = step(engine, 0, harm=math.nan if dist.get_rank() == 0 else 1.0)
    expect("a loss of nan", (result.applied, result.finite), (False, False))
    for index in range(4):
        result = step(engine, index)
        expect("a step", (result.applied, result.finite), (True, True))
    saved = numbers(engine.engine)
    expect("the scale after three good steps", saved["scale:cur_scale"], 128.0)
    set_numbers(other.engine, saved)
    expect("the scale of another engine", numbers(other.engine)["scale:cur_scale"], 128.0)
    fixed = build(zero, precision="fp16", loss_scale=64)
    set_numbers(fixed.engine, saved)
    expect("what is saved of a fixed scale", [n for n in numbers(fixed.engine) if n.startswith("scale:")], [])
    expect("a fixed scale after a resume", fixed.engine.optimizer.loss_scale, 64)
    return faults


class Joint(Task):
    """An encoder and a decoder, one loss of both."""

    jointly = True

    def build(self) -> dict[str, nn.Module]:
        torch.manual_seed(5)
        wide = networks.FEATURES
        return {"encoder": nn.Sequential(nn.Linear(wide, 5), nn.Tanh()), "decoder": nn.Linear(5, wide)}

    def step(self, networks: Any, batch: Any) -> dict[str, torch.Tensor]:
        out = networks["decoder"](networks["encoder"](batch.x)).float()
        return {networks.turn: F.mse_loss(out, batch.x)}


def jointly(zero: int) -> dict[str, Any]:
    task = Joint()
    both = Networks(
        task.build(),
        OptimSpec(lr=0.02),
        EngineSpec(zero=zero),
        micro_batch=4,
        grad_accum_steps=1,
        total_steps=TOTAL,
        device=torch.device("cpu"),
        task=task,
    )
    assert both.jointly
    for index in range(STEPS):
        x, _ = mine(index)
        both.begin_step(ROWS)
        for name in both:
            with both.taking(name) as engine:
                engine.backward(both.loss(task, Batch(len(x), x=x)), len(x), last=True)
        both.together({name: engine.step() for name, engine in both.items()})
    return {f"{name}.{n}": w for name in both for n, w in networks.weights(both[name]).items()}


def all_of(zero: int) -> dict[str, Any]:
    made = {f.__name__: f(zero) for f in (optimizers, averages, frozen, recomputed, jointly, penalty)}
    return {**made, "half": half(zero)}


def every_stage() -> list[dict[str, Any]]:
    return [all_of(zero) for zero in STAGES]


def compiled() -> dict[str, Any]:
    engine = build(1, train={"compile": True})
    for index in range(STEPS):
        step(engine, index)
    return networks.weights(engine)


# ---- what is wanted ----


def plain(optim: dict[str, Any], module: nn.Module) -> dict[str, torch.Tensor]:
    spec = OptimSpec(**optim)
    optimizer = make_optimizer(parameter_groups(module, spec), spec, fused=False)
    for index in range(STEPS):
        rate = learning_rate(spec, index, TOTAL)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        x, y = networks.rows(index, ROWS)
        optimizer.zero_grad()
        F.mse_loss(module(x), y).backward()
        optimizer.step()
    return {n: p.detach() for n, p in module.named_parameters()}


def plain_joint() -> dict[str, torch.Tensor]:
    built, task = Joint().build(), Joint()
    optimizer = torch.optim.AdamW([p for m in built.values() for p in m.parameters()], lr=0.02, weight_decay=0.0)
    turn = type("Turn", (dict,), {"turn": "encoder"})(built)
    for index in range(STEPS):
        x, _ = networks.rows(index, ROWS)
        optimizer.zero_grad()
        task.step(turn, Batch(ROWS, x=x))["encoder"].backward()
        optimizer.step()
    return {f"{name}.{n}": p.detach() for name, module in built.items() for n, p in module.named_parameters()}


def close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], where: str) -> None:
    assert set(found) == set(wanted)
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{where}: {n}: {m}")


@pytest.fixture(scope="module", params=[1, 2])
def by_rank(request: pytest.FixtureRequest) -> list[list[dict[str, Any]]]:
    return run_ranks(every_stage, request.param)


@pytest.mark.parametrize("name", OPTIMS)
def test_optimizers_are_those_of_torch(by_rank: list[list[dict[str, Any]]], name: str) -> None:
    wanted = plain(OPTIMS[name], networks.dense(0))
    for stages in by_rank:
        for zero, found in enumerate(stages):
            close(found["optimizers"][name], wanted, f"{name} ZeRO {zero}")


def test_evaluation_sees_the_average_and_training_the_weights(by_rank: list[list[dict[str, Any]]]) -> None:
    assert [found["averages"] for stages in by_rank for found in stages] == [[]] * 4 * len(by_rank)


def test_what_is_frozen_stays(by_rank: list[list[dict[str, Any]]]) -> None:
    module, begun = networks.dense(0), networks.dense(0)
    freeze(module, ["0.*"])
    wanted = plain({"lr": 0.02}, module)
    for stages in by_rank:
        for zero, found in enumerate(stages):
            close(found["frozen"], wanted, f"ZeRO {zero}")
            assert torch.equal(found["frozen"]["0.weight"], begun[0].weight)


def test_recomputed_activations_change_nothing(by_rank: list[list[dict[str, Any]]]) -> None:
    wanted = plain({"lr": 0.02}, networks.dense(0))
    for stages in by_rank:
        for zero, found in enumerate(stages):
            close(found["recomputed"], wanted, f"ZeRO {zero}")


def test_one_loss_of_two_networks_trains_them_as_one(by_rank: list[list[dict[str, Any]]]) -> None:
    wanted = plain_joint()
    for stages in by_rank:
        for zero, found in enumerate(stages):
            close(found["jointly"], wanted, f"ZeRO {zero}")


def test_a_gradient_penalty_is_differentiated_twice(by_rank: list[list[dict[str, Any]]]) -> None:
    module = Judge()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.02, weight_decay=0.0)
    for index in range(STEPS):
        optimizer.zero_grad()
        penalised(module, networks.rows(index, ROWS)[0]).backward()
        optimizer.step()
    wanted = {n: p.detach() for n, p in module.named_parameters()}
    for stages in by_rank:
        for zero, found in enumerate(stages[:3]):
            close(found["penalty"], wanted, f"ZeRO {zero}")


def test_fp16_finds_its_scale(by_rank: list[list[dict[str, Any]]]) -> None:
    assert [fault for stages in by_rank for found in stages for fault in found["half"]] == []


def test_a_compiled_network_is_the_same() -> None:
    (found,) = run_ranks(compiled, 1)
    close(found, plain({"lr": 0.02}, networks.dense(0)), "compiled")
