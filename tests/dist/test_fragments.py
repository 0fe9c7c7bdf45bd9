"""Saved at one number of ranks and ZeRO stage, loaded at another: the run goes on as if nothing had happened."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import networks
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from launch import run_ranks
from torch import nn

from dltrain.checkpoint.fragments import (
    Fragment,
    average_buffers,
    buffers,
    collect,
    frozen,
    restore,
    restore_frozen,
    ties,
)
from dltrain.checkpoint.numbers import numbers, set_numbers
from dltrain.training.engine import Engine

ADAMW = {"name": "adamw", "lr": 0.02, "weight_decay": 0.1}
SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9}
STAGES = (0, 1, 2, 3)
SAVE_AT, END = 3, 7
# (network, optimizer, precision): what is saved at each stage.
CASES = {
    "adamw": (networks.dense, ADAMW, "fp32"),
    "sgd": (networks.dense, SGD, "fp32"),
    "tied": (networks.Tied, ADAMW, "fp32"),
    "bf16": (networks.dense, ADAMW, "bf16"),
    "lion": (networks.dense, {"name": "lion", "lr": 0.01, "weight_decay": 0.1}, "fp32"),
    "own": (networks.dense, {"name": "task", "lr": 0.01}, "fp32"),
    "average": (networks.dense, ADAMW, "fp32"),
    "average bf16": (networks.dense, ADAMW, "bf16"),
    "fused": (networks.dense, {**ADAMW, "fused": True}, "fp32"),
    "offload": (networks.dense, ADAMW, "fp32"),
    "groups": (
        networks.dense,
        {**ADAMW, "groups": [{"match": ["3.*"], "lr_scale": 0.3}, {"match": "0.weight", "weight_decay": 0.0}]},
        "fp32",
    ),
}
# What an optimizer keeps beside the weights.
MOMENTS = {"sgd": {"momentum_buffer"}, "lion": {"exp_avg"}}
Saved = dict[str, Any]


# ---- on the ranks ----


def build(case: str, zero: int, seed: int) -> Engine:
    network, optim, precision = CASES[case]
    return networks.engine_for(
        network(seed),
        optim,
        zero,
        precision,
        train={"ema": 0.7} if case.startswith("average") else {},
        own_optimizer=own if optim["name"] == "task" else None,
        offload="optimizer" if case == "offload" and zero else "none",
    )


def own(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """One that keeps a number for all weights beside its count of steps."""
    return torch.optim.NAdam(groups)


def averages(engine: Engine) -> dict[int, torch.Tensor]:
    return engine.average.tensors if engine.average else {}


def run(engine: Engine, first: int, last: int) -> list[float]:
    return [step(engine, index) for index in range(first, last)]


def step(engine: Engine, index: int) -> float:
    x, y = networks.rows(index, 11)
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    mine = slice(rank * 11 // num_ranks, (rank + 1) * 11 // num_ranks)
    engine.begin_step(11)
    engine.backward(F.mse_loss(engine(x[mine]).float(), y[mine]), len(x[mine]), last=True)
    result = networks.whole(engine.step())
    assert result.applied
    return result.loss


def save(engine: Engine, steps: int) -> Saved:
    return {
        "fragments": collect(engine.engine, dist.get_rank(), dist.get_world_size(), averages(engine)),
        "numbers": numbers(engine.engine),
        "frozen": frozen(engine.module),
        "ties": ties(engine.module),
        "weights": networks.weights(engine),
        "steps": steps,
    }


def save_and_go_on(case: str, zero: int) -> Saved:
    engine = build(case, zero, seed=0)
    before = save(engine, 0)
    run(engine, 0, SAVE_AT)
    saved = save(engine, SAVE_AT)
    copies = [f.values.clone() for f in saved["fragments"]]
    losses = run(engine, SAVE_AT, END)
    # Copies, not views of what training goes on to change.
    assert all(torch.equal(f.values, copy) for f, copy in zip(saved["fragments"], copies, strict=True))
    return {"before": before, "saved": saved, "losses": losses, "end": save(engine, END)}


def save_all() -> dict[tuple[str, int], Saved]:
    return {(case, zero): save_and_go_on(case, zero) for case in CASES for zero in STAGES}


def load_and_go_on(case: str, zero: int, saved: Saved) -> Saved:
    """From other weights, so that whatever is not loaded shows."""
    engine = build(case, zero, seed=7)
    whole = saved["whole"]

    def read(name: str, kind: str, offset: int, length: int) -> torch.Tensor:
        return whole[name, kind].reshape(-1)[offset : offset + length].clone()

    restore(engine.engine, read, lambda name: [kind for of, kind in whole if of == name], averages(engine))
    set_numbers(engine.engine, saved["numbers"])
    restore_frozen(engine.module, saved["frozen"])
    engine.step_count = saved["steps"]
    start = save(engine, saved["steps"])
    losses = run(engine, saved["steps"], END)
    return {"start": start, "losses": losses, "end": save(engine, END)}


def load_all(jobs: list[tuple[str, int, Saved]]) -> list[Saved]:
    return [load_and_go_on(*job) for job in jobs]


def buffers_on_ranks() -> tuple[dict[str, torch.Tensor], list[str]]:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            rank = dist.get_rank()
            self.norm = nn.BatchNorm1d(3)
            self.norm.running_mean = torch.full((3,), float(rank))
            self.norm.num_batches_tracked = torch.tensor(5 + rank)
            self.register_buffer("mask", torch.tensor([True, rank == 1, False]))
            self.register_buffer("phase", torch.tensor([1 + 1j * rank]))
            self.register_buffer("minus", torch.tensor([-math.inf, 0.1]))
            self.register_buffer("passing", torch.ones(1), persistent=False)

    module = Holder()
    average_buffers(module)
    return {name: buffer.clone() for name, buffer in buffers(module).items()}, sorted(buffers(module))


# ---- the saves, and what is wanted of them ----


def whole(saves: list[Saved]) -> dict[tuple[str, str], torch.Tensor]:
    """Puts the ranks' fragments together; every element must come exactly once."""
    tensors: dict[tuple[str, str], torch.Tensor] = {}
    times: dict[tuple[str, str], torch.Tensor] = {}
    for f in itertools.chain.from_iterable(saved["fragments"] for saved in saves):
        assert isinstance(f, Fragment)
        assert f.values.dtype == torch.float32
        assert f.values.ndim == 1
        key, size = (f.name, f.kind), math.prod(f.shape)
        tensors.setdefault(key, torch.full((size,), math.nan))[f.offset : f.offset + len(f.values)] = f.values
        times.setdefault(key, torch.zeros(size))[f.offset : f.offset + len(f.values)] += 1
    for key, count in times.items():
        assert (count == 1).all(), f"{key} is not covered exactly once"
    return tensors


@pytest.fixture(scope="module")
def runs() -> list[dict[tuple[str, int], Saved]]:
    return run_ranks(save_all, 2)


def checkpoint(runs: list[dict[tuple[str, int], Saved]], case: str, zero: int, when: str = "saved") -> Saved:
    ranks = [by_rank[case, zero][when] for by_rank in runs]
    return {"whole": whole(ranks), **{key: ranks[0][key] for key in ("frozen", "numbers", "steps")}}


def matrix() -> Iterator[tuple[str, int, int]]:
    for zero, other in itertools.product(STAGES, STAGES):
        yield "adamw", zero, other
    for case in ("sgd", "tied", "lion", "own", "average", "offload", "groups"):
        for zero in STAGES:
            yield case, zero, (zero + 1) % 4


# ---- the tests ----


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("zero", STAGES)
def test_every_element_is_saved_once(runs: list[dict[tuple[str, int], Saved]], case: str, zero: int) -> None:
    network, optim, _ = CASES[case]
    trained = {n: p for n, p in network(0).named_parameters() if p.requires_grad}
    kinds = {"param", *MOMENTS.get(optim["name"], {"exp_avg", "exp_avg_sq"})}
    began = {"param", "ema"} if case.startswith("average") else {"param"}
    kinds |= began
    found = checkpoint(runs, case, zero)["whole"]
    assert set(found) == set(itertools.product(trained, kinds))
    assert {key: len(tensor) for key, tensor in found.items()} == {key: trained[key[0]].numel() for key in found}
    weights = runs[0][case, zero]["saved"]["weights"]
    for name in trained:
        saved = found[name, "param"].reshape(trained[name].shape)
        assert torch.equal(saved.to(weights[name].dtype), weights[name])
    before = checkpoint(runs, case, zero, "before")["whole"]
    assert set(before) == set(itertools.product(trained, began))


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_other_ranks_and_stages_go_on(runs: list[dict[tuple[str, int], Saved]], num_ranks: int) -> None:
    jobs = [(case, other, checkpoint(runs, case, zero)) for case, zero, other in matrix()]
    for found in run_ranks(load_all, num_ranks, jobs):
        for (case, zero, other), got in zip(matrix(), found, strict=True):
            where = f"{case}: ZeRO {zero} on 2 ranks -> ZeRO {other} on {num_ranks}"
            wanted = runs[0][case, zero]
            assert got["losses"] == pytest.approx(wanted["losses"], rel=1e-5), where
            for name, weight in wanted["end"]["weights"].items():
                assert torch.allclose(got["end"]["weights"][name], weight, atol=1e-5), f"{where}: {name}"


def test_same_ranks_and_stage_bit_for_bit(runs: list[dict[tuple[str, int], Saved]]) -> None:
    keys = list(itertools.product(CASES, STAGES, ("before", "saved")))
    jobs = [(case, zero, checkpoint(runs, case, zero, when)) for case, zero, when in keys]
    by_rank = run_ranks(load_all, 2, jobs)
    for rank, found in enumerate(by_rank):
        for (case, zero, when), got in zip(keys, found, strict=True):
            where = f"{case}: ZeRO {zero}, {when}, rank {rank}"
            wanted = runs[rank][case, zero]
            assert got["losses"][-len(wanted["losses"]) :] == wanted["losses"], where
            for here, there in ((got["start"], wanted[when]), (got["end"], wanted["end"])):
                same_bits(here, there, where)


def same_bits(here: Saved, there: Saved, where: str) -> None:
    assert len(here["fragments"]) == len(there["fragments"]), where
    for one, other in zip(here["fragments"], there["fragments"], strict=True):
        assert (one.name, one.kind, one.offset) == (other.name, other.kind, other.offset), where
        assert torch.equal(one.values, other.values), f"{where}: {one.name} {one.kind}"
    for name, weight in there["weights"].items():
        assert torch.equal(here["weights"][name], weight), f"{where}: {name}"


def test_frozen_parameters_and_ties(runs: list[dict[tuple[str, int], Saved]]) -> None:
    wanted = {n: p for n, p in networks.Tied(0).named_parameters() if not p.requires_grad}
    for by_rank in runs:
        for zero in STAGES:
            saved = by_rank["tied", zero]["end"]
            assert saved["ties"] == {"again.weight": "inside.weight"}
            assert set(saved["frozen"]) == {"frozen.weight", "frozen.bias"}
            for name, value in wanted.items():
                assert torch.equal(saved["frozen"][name], value.detach())


def test_buffers_are_averaged() -> None:
    for found, names in run_ranks(buffers_on_ranks, 2):
        assert "passing" not in names
        assert found["norm.running_mean"].tolist() == [0.5, 0.5, 0.5]
        assert found["norm.num_batches_tracked"].item() == 6
        assert found["mask"].tolist() == [True, True, False]
        assert found["phase"].tolist() == [1 + 0.5j]
        assert found["minus"].tolist() == pytest.approx([-math.inf, 0.1])
