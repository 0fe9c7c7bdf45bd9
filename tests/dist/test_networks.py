"""Several networks under DeepSpeed: each has its turn, and nobody else changes; the same as two plain torch loops."""

from __future__ import annotations

from typing import Any

import networks as small
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from launch import run_ranks
from torch import nn

from dltrain.data.batch import Batch
from dltrain.spec import EngineSpec, OptimSpec
from dltrain.training.networks import Networks
from dltrain.training.task import Task

STAGES = (0, 1, 2, 3)
STEPS, ROWS = 4, 11
OPTIM = {
    "name": "adamw",
    "lr": 0.02,
    "weight_decay": 0.1,
    "clip": 0.5,
    "networks": {"judge": {"lr": 0.05, "betas": (0.5, 0.9)}},
}


class Pair(Task):
    """A maker and a judge."""

    def build(self) -> dict[str, nn.Module]:
        torch.manual_seed(3)
        maker = nn.Sequential(nn.Linear(small.FEATURES, 9), nn.Tanh(), nn.Linear(9, small.FEATURES))
        judge = nn.Sequential(nn.Linear(small.FEATURES, 7), nn.Tanh(), nn.Linear(7, 1))
        return {"judge": judge, "maker": maker}

    def step(self, networks: Any, batch: Any) -> dict[str, torch.Tensor]:
        judge, maker = networks["judge"], networks["maker"]
        if networks.turn == "judge":
            with torch.no_grad():
                made = maker(batch.x.flip(-1)).float()
            return {"judge": (F.softplus(-judge(batch.x).float()) + F.softplus(judge(made).float())).mean()}
        return {"maker": F.softplus(-judge(maker(batch.x.flip(-1))).float()).mean()}


class Plain(dict[str, Any]):
    """The bare networks, with a turn."""

    turn = "judge"


# ---- on the ranks ----


def build(zero: int, micros: int) -> Networks:
    return Networks(
        Pair().build(),
        OptimSpec(**OPTIM),
        EngineSpec(zero=zero),
        micro_batch=4,
        grad_accum_steps=micros,
        total_steps=20,
        device=torch.device("cpu"),
    )


def train(zero: int, micros: int) -> dict[str, Any]:
    """Steps over 11 rows in so many micro-batches a rank; of each turn what it left alone."""
    networks, task = build(zero, micros), Pair()
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    alone: list[bool] = []
    for index in range(STEPS):
        x, _ = small.rows(index, ROWS)
        mine = x[rank * ROWS // num_ranks : (rank + 1) * ROWS // num_ranks]
        networks.begin_step(ROWS)
        results = {}
        for name in networks:
            others = {other: small.weights(networks[other]) for other in networks if other != name}
            with networks.taking(name) as engine:
                for i in range(micros):
                    part = mine[i::micros]
                    loss = networks.loss(task, Batch(len(part), x=part))
                    engine.backward(loss, len(part), last=i == micros - 1)
                results[name] = engine.step()
            for other, before in others.items():
                after = small.weights(networks[other])
                alone.append(all(torch.equal(before[n], after[n]) for n in before))
                alone.append(all(p.grad is None for p in networks[other].module.parameters()))
        assert networks.together(results).applied
    assert networks.applied == dict.fromkeys(networks, STEPS)
    weights = {f"{name}.{n}": w for name in networks for n, w in small.weights(networks[name]).items()}
    return {"alone": alone, "weights": weights}


def train_all(cases: list[tuple[int, int]]) -> list[dict[str, Any]]:
    return [train(*case) for case in cases]


# ---- what is wanted ----


def plain() -> dict[str, torch.Tensor]:
    """The same by torch alone."""
    built, task = Pair().build(), Pair()
    optim = OptimSpec(**OPTIM)
    optimizers = {}
    for name, module in built.items():
        of = optim.of(name)
        groups = [
            {"params": [p for p in module.parameters() if p.ndim > 1], "weight_decay": of.weight_decay},
            {"params": [p for p in module.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizers[name] = torch.optim.AdamW(groups, lr=of.lr, betas=of.betas or (0.9, 0.999), eps=of.eps)
    networks = Plain(built)
    for index in range(STEPS):
        x, _ = small.rows(index, ROWS)
        for name in built:
            networks.turn = name
            for module in built.values():
                module.zero_grad()
            task.step(networks, Batch(ROWS, x=x))[name].backward()
            torch.nn.utils.clip_grad_norm_(built[name].parameters(), 0.5)
            optimizers[name].step()
    return {f"{name}.{n}": p.detach() for name, module in built.items() for n, p in module.named_parameters()}


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_turns_are_the_same_at_every_stage_and_leave_the_others_alone(num_ranks: int) -> None:
    cases = [(zero, micros) for zero in STAGES for micros in (1, 2)]
    wanted = plain()
    for found in run_ranks(train_all, num_ranks, cases):
        for case, result in zip(cases, found, strict=True):
            assert all(result["alone"]), case
            for name, weight in wanted.items():
                torch.testing.assert_close(result["weights"][name], weight, rtol=2e-5, atol=2e-6, msg=f"{case} {name}")
