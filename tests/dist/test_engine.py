"""The engine against plain torch on one process, and steps that no rank may apply."""

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

from dltrain.checkpoint.fragments import collect
from dltrain.spec import OptimSpec
from dltrain.training.schedules import learning_rate
from dltrain.training.engine import Engine, StepResult

ADAMW = {"name": "adamw", "lr": 0.02, "weight_decay": 0.1, "clip": 0.5, "schedule": "cosine", "warmup": 2}
SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
FLAT = {"name": "adamw", "lr": 0.02, "weight_decay": 0.1, "clip": 0.5}
STAGES = (0, 1, 2, 3)
TOTAL_STEPS = 6
# Rows of the global batch, and micro-batches per rank, of each step.
PLAN = ((11, 2), (7, 1), (5, 3), (2, 1), (12, 3), (9, 2))


# ---- the reference ----


def reference(optim: dict[str, Any], plan: tuple[tuple[int, int], ...] = PLAN) -> dict[str, Any]:
    module, spec = networks.dense(0), OptimSpec(**optim)
    split = [
        {"params": [p for p in module.parameters() if p.ndim > 1], "weight_decay": spec.weight_decay},
        {"params": [p for p in module.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(split, lr=spec.lr)
    if spec.name == "sgd":
        optimizer = torch.optim.SGD(split, lr=spec.lr, momentum=spec.momentum)
    seen: dict[str, list[float]] = {"loss": [], "grad_norm": [], "learning_rate": []}
    for step, (count, _) in enumerate(plan):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(spec, step, TOTAL_STEPS)
        x, y = networks.rows(step, count)
        loss = F.mse_loss(module(x), y)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), spec.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        seen["loss"].append(loss.item())
        seen["grad_norm"].append(norm.item())
        seen["learning_rate"].append(optimizer.param_groups[0]["lr"])
    return {"weights": {n: p.detach() for n, p in module.named_parameters()}, **seen}


# ---- on the ranks ----


def slices(count: int, num_micros: int) -> list[tuple[int, int]]:
    """This rank's micro-batches: consecutive, ragged, and empty where the rows run out."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    size = math.ceil(count / (num_ranks * num_micros))
    starts = [(rank * num_micros + i) * size for i in range(num_micros)]
    return [(min(start, count), min(start + size, count)) for start in starts]


def train_step(engine: Engine, step: int, count: int, num_micros: int) -> StepResult:
    x, y = networks.rows(step, count)
    mine = slices(count, num_micros)
    engine.train()
    engine.begin_step(count)
    for i, (lo, hi) in enumerate(mine):
        if lo == hi:
            # A stand-in: it runs for the sake of the collectives only, so its content must not matter.
            loss = engine(torch.full_like(x[:1], math.nan)).mean()
        else:
            loss = F.mse_loss(engine(x[lo:hi]).float(), y[lo:hi])
        engine.backward(loss, hi - lo, last=i == num_micros - 1)
    return networks.whole(engine.step())


def train(optim: dict[str, Any], zero: int) -> dict[str, Any]:
    # Every rank starts elsewhere: rank 0's weights must win.
    module = networks.dense(dist.get_rank())
    engine = networks.engine_for(module, optim, zero, total_steps=TOTAL_STEPS)
    results = [train_step(engine, step, *sizes) for step, sizes in enumerate(PLAN)]
    assert all(r.applied and r.finite for r in results)
    assert engine.step_count == len(PLAN)
    seen = {key: [getattr(r, key) for r in results] for key in ("loss", "grad_norm", "learning_rate")}
    return {"weights": networks.weights(engine), **seen}


def train_all(stages: tuple[int, ...]) -> list[list[dict[str, Any]]]:
    return [[train(optim, zero) for zero in stages] for optim in (ADAMW, SGD)]


class Harm:
    """What goes wrong on one rank in one step, as (name, whether the loss itself shows it)."""

    KINDS = ("nan loss", "inf loss, gradients fine", "loss fine, nan gradient")

    @staticmethod
    def to(loss: torch.Tensor, kind: str) -> torch.Tensor:
        if kind == "nan loss":
            return loss * math.nan
        if kind == "inf loss, gradients fine":
            return loss + math.inf
        return loss + torch.sqrt(loss * 0)


def harmed_step(engine: Engine, step: int, kind: str) -> Any:
    x, y = networks.rows(step, 8)
    mine = slices(8, 2)
    engine.begin_step(8)
    for i, (lo, hi) in enumerate(mine):
        loss = F.mse_loss(engine(x[lo:hi]).float(), y[lo:hi])
        if dist.get_rank() == 1 and i == 0:
            loss = Harm.to(loss, kind)
        engine.backward(loss, hi - lo, last=i == 1)
    return engine.step()


def state(engine: Engine) -> list[Any]:
    found = collect(engine.engine, dist.get_rank(), dist.get_world_size())
    masters = [((f.name, f.kind, f.offset), f.values) for f in found]
    return masters + sorted(networks.weights(engine).items())


def same_bits(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(one, other, strict=True)
    )


def left_out(zero: int, precision: str) -> list[str]:
    """Faults found: harmed steps must leave no trace, so the run without them ends at the same bits."""
    clean = networks.engine_for(networks.dense(0), FLAT, zero, precision)
    harmed = networks.engine_for(networks.dense(0), FLAT, zero, precision)
    faults = []
    for step in range(4):
        train_step(clean, step, 8, 2)
    for step in range(4):
        if step:
            before = state(harmed)
            result = harmed_step(harmed, 50, Harm.KINDS[step - 1])
            if result.applied or result.finite:
                faults.append(f"{Harm.KINDS[step - 1]}: {result}")
            if not same_bits(before, state(harmed)):
                faults.append(f"{Harm.KINDS[step - 1]}: something changed")
        if not train_step(harmed, step, 8, 2).applied:
            faults.append(f"step {step} was not applied")
    if not same_bits(state(clean), state(harmed)):
        faults.append("the end differs")
    return [f"ZeRO {zero} {precision}: {fault}" for fault in faults]


def left_out_all() -> list[str]:
    return [fault for precision in ("fp32", "bf16") for zero in STAGES for fault in left_out(zero, precision)]


def bf16_losses() -> list[list[float]]:
    found = []
    for zero in STAGES:
        engine = networks.engine_for(networks.dense(0), FLAT, zero, "bf16", total_steps=TOTAL_STEPS)
        found.append([train_step(engine, step, *sizes).loss for step, sizes in enumerate(PLAN)])
    return found


def two_ranks() -> tuple[Any, Any, Any]:
    return train_all(STAGES), left_out_all(), bf16_losses()


# ---- the tests ----


def check_exact(found: list[list[dict[str, Any]]], stages: tuple[int, ...]) -> None:
    for optim, by_stage in zip((ADAMW, SGD), found, strict=True):
        wanted = reference(optim)
        for zero, got in zip(stages, by_stage, strict=True):
            where = f"{optim['name']} ZeRO {zero}"
            for key in ("loss", "grad_norm", "learning_rate"):
                assert got[key] == pytest.approx(wanted[key], rel=1e-5), f"{where}: {key}"
            for name, weight in wanted["weights"].items():
                assert torch.allclose(got["weights"][name], weight, rtol=0, atol=1e-6), f"{where}: {name}"


@pytest.fixture(scope="module")
def on_two_ranks() -> list[Any]:
    return run_ranks(two_ranks, 2)


def test_exact_on_two_ranks(on_two_ranks: list[Any]) -> None:
    for exact, _, _ in on_two_ranks:
        check_exact(exact, STAGES)


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_exact_with_ragged_ranks(num_ranks: int) -> None:
    for exact in run_ranks(train_all, num_ranks, STAGES):
        check_exact(exact, STAGES)


def test_a_step_that_is_not_finite_leaves_no_trace(on_two_ranks: list[Any]) -> None:
    for _, faults, _ in on_two_ranks:
        assert faults == []


def test_bf16_follows_fp32(on_two_ranks: list[Any]) -> None:
    wanted = reference(FLAT)["loss"]
    for _, _, losses in on_two_ranks:
        for by_stage in losses:
            assert by_stage == pytest.approx(wanted, rel=2e-2)
