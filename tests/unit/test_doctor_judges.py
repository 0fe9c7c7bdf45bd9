"""The doctor's judges: facts in, findings out. Each fault that can be had is made of a healthy machine's facts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dltrain.doctor.facts import MachineFacts, OpFacts
from dltrain.doctor.finding import Finding, at, counts, fail, merged, ok
from dltrain.doctor.gpu import Card, TorchFacts, judge_card, judge_gpus, judge_torch
from dltrain.doctor.job import (
    DataFacts,
    NodeRoom,
    TaskFacts,
    judge_batch,
    judge_capacity,
    judge_data,
    judge_task,
    slots_of,
    worker_bytes,
)
from dltrain.doctor.machine import judge_machine, judge_room, shm_need
from dltrain.doctor.nodes import (
    Offset,
    judge_clocks,
    judge_loopback,
    judge_reach,
    judge_same,
    judge_shared,
    judge_source,
)
from dltrain.doctor.ranks import RankResult, judge_reduce
from dltrain.doctor.storage import StoreFacts, judge_store
from dltrain.spec import JobSpec, parse_spec
from dltrain.spec.paths import at_home

GIB = 1024**3
HEALTHY = MachineFacts(
    python="3.11.7",
    system="Linux 6.1",
    versions={"dltrain": "0.1.0", "ray": "2.60.0", "torch": "2.13.0"},
    unmet=(),
    code="abc",
    cpus=8,
    memory_bytes=64 * GIB,
    available_bytes=50 * GIB,
    shm_bytes=32 * GIB,
    shm_free_bytes=30 * GIB,
    temp_dir="/tmp",
    temp_bytes=200 * GIB,
    temp_free_bytes=100 * GIB,
    open_files=65536,
    max_processes=-1,
    core_bytes=0,
    core_pattern="core",
    memlock_bytes=65536,
    has_rdma=False,
    op=OpFacts(True, "/venv/op.so"),
)


def spec_of(**changes: Any) -> JobSpec:
    raw = {
        "name": "tiny",
        "task": "tasks:Tiny",
        "data": {"train": "data/train"},
        "batch": {"global": 64},
        "train": {"steps": 5},
        "optim": {"lr": 0.1},
        "workers": 2,
    }
    return parse_spec({**raw, **changes})


def bad(findings: list[Finding]) -> list[tuple[str, str]]:
    """What is not well; each says why it matters and what to do."""
    found = [f for f in findings if f.status in ("warn", "fail")]
    assert all(f.found and f.why and f.todo for f in found)
    assert not any(f.why or f.todo for f in findings if f.status in ("ok", "skip"))
    return [(f.name, f.status) for f in found]


# ---- a machine ----


def test_a_healthy_machine() -> None:
    assert bad(judge_machine(HEALTHY)) == []
    assert len(judge_machine(HEALTHY)) == 11


@pytest.mark.parametrize(
    ("change", "name", "status"),
    [
        ({"versions": {"dltrain": "0.1.0", "ray": None}}, "packages", "fail"),
        ({"unmet": ("torch is 2.1, which is not >=2.13",)}, "packages", "warn"),
        ({"op": OpFacts(False, "/venv/op.so")}, "DeepSpeed's CPU op", "warn"),
        ({"op": OpFacts(False, "/venv/op.so", ("g++",))}, "DeepSpeed's CPU op", "fail"),
        ({"shm_bytes": 64 << 20, "shm_free_bytes": 64 << 20}, "/dev/shm", "fail"),
        ({"shm_bytes": 0, "shm_free_bytes": 0}, "/dev/shm", "fail"),
        ({"shm_free_bytes": GIB // 2}, "/dev/shm", "warn"),
        ({"available_bytes": GIB}, "memory", "warn"),
        ({"temp_free_bytes": 100 << 20}, "disk of /tmp", "fail"),
        ({"temp_free_bytes": 8 * GIB}, "disk of /tmp", "warn"),
        ({"open_files": 256}, "open files", "fail"),
        ({"open_files": 1024}, "open files", "warn"),
        ({"max_processes": 100}, "processes", "fail"),
        ({"max_processes": 2048}, "processes", "warn"),
        ({"core_bytes": -1}, "core dumps", "warn"),
        ({"has_rdma": True}, "locked memory", "fail"),
        ({"name_seconds": 10.0}, "host names", "warn"),
        ({"niceness": 15}, "niceness", "warn"),
    ],
)
def test_one_fault_of_a_machine(change: dict[str, Any], name: str, status: str) -> None:
    assert bad(judge_machine(replace(HEALTHY, **change))) == [(name, status)]


@pytest.mark.parametrize(
    "change",
    [
        {"open_files": -1},
        {"core_bytes": -1, "core_pattern": "|/usr/lib/systemd/systemd-coredump %P"},
        {"has_rdma": True, "memlock_bytes": -1},
        # A small machine whose /dev/shm is a fair part of it.
        {"memory_bytes": 4 * GIB, "shm_free_bytes": GIB // 2},
    ],
)
def test_what_is_no_fault(change: dict[str, Any]) -> None:
    assert bad(judge_machine(replace(HEALTHY, **change))) == []


def test_what_to_install_is_named() -> None:
    finding = next(f for f in judge_machine(replace(HEALTHY, op=OpFacts(False, "", ("g++",)))) if f.status == "fail")
    assert "g++" in finding.found
    assert "python -m dltrain.training.cpu_op" in finding.todo


def test_shared_memory_of_workers() -> None:
    # Docker's 64 MiB is not enough for one.
    assert shm_need(1) > 64 << 20
    assert shm_need(4) == 4 * shm_need(1)


@pytest.mark.parametrize(("gib", "status"), [(1, "ok"), (4, "warn"), (6, "fail")])
def test_room(gib: int, status: str) -> None:
    assert judge_room(10 * GIB, 2, gib * GIB).status == status


# ---- GPUs ----

CARD = Card("NVIDIA H100", "580.65.06", 80 * GIB, 0)
BUILD = TorchFacts(
    torch="2.13.0",
    deepspeed="0.19.8",
    cuda="12.8",
    nccl="2.27.3",
    usable=True,
    names=["NVIDIA H100"] * 2,
    capabilities=["sm_90"] * 2,
    arches=["sm_80", "sm_90", "compute_90"],
)


def test_healthy_gpus() -> None:
    found = judge_gpus([CARD] * 2, BUILD)
    assert bad(found) == []
    assert found[0].found == "2 x NVIDIA H100; driver 580.65.06, CUDA 12.8, NCCL 2.27.3"


def test_no_gpu_is_no_fault() -> None:
    found = judge_gpus([], TorchFacts(torch="2.13.0+cpu"))
    assert [f.status for f in found] == ["skip"]


@pytest.mark.parametrize(
    ("cards", "torch", "said"),
    [
        ([CARD], replace(BUILD, usable=False, cuda=""), "is a CPU build"),
        ([replace(CARD, driver="535.10")], replace(BUILD, usable=False, cuda="13.0"), "which needs 580.65"),
        ([CARD], replace(BUILD, usable=False, warnings=["CUDA initialization: out of luck"]), "out of luck"),
        ([CARD], replace(BUILD, arches=["sm_70", "sm_80"]), "cards are sm_90; torch was built for sm_70, sm_80"),
    ],
)
def test_gpus_that_torch_can_not_use(cards: list[Card], torch: TorchFacts, said: str) -> None:
    found = [f for f in judge_gpus(cards, torch) if f.status == "fail"]
    assert len(found) == 1
    assert said in found[0].found


@pytest.mark.parametrize(
    ("capability", "arches", "runs"),
    [
        ("sm_86", ["sm_80"], True),
        ("sm_80", ["sm_86"], False),
        ("sm_120", ["sm_90", "compute_90"], True),
        ("sm_120", ["sm_90"], False),
        ("sm_90", ["sm_90a"], True),
    ],
)
def test_code_for_a_card(capability: str, arches: list[str], runs: bool) -> None:
    found = judge_gpus([CARD], replace(BUILD, capabilities=[capability], arches=arches))
    assert (bad(found) == []) == runs


def test_gpus_apart_and_in_use() -> None:
    assert bad(judge_gpus([CARD] * 2, replace(BUILD, no_peers=[(0, 1)]))) == [("GPU to GPU", "warn")]
    assert bad(judge_gpus([replace(CARD, used_bytes=9 * GIB)], BUILD)) == [("GPU memory", "warn")]
    assert judge_card([CARD], 10 * GIB).status == "ok"
    assert judge_card([CARD], 70 * GIB).status == "warn"
    assert judge_card([CARD, replace(CARD, memory_bytes=40 * GIB)], 70 * GIB).status == "fail"


def test_torch_that_can_not_be_imported() -> None:
    assert bad(judge_torch(TorchFacts(error="no module"))) == [("torch and DeepSpeed", "fail")]
    assert bad(judge_torch(replace(BUILD, op_error="undefined symbol"))) == [("DeepSpeed's CPU op, loaded", "fail")]


# ---- several nodes ----


def test_the_same_everywhere() -> None:
    versions = {"Python": "3.11.7", "torch": "2.13.0"}
    assert bad(judge_same({"a": versions, "b": versions})) == []
    found = judge_same({"a": versions, "b": versions, "c": {"Python": "3.11.7", "torch": "2.12.0"}})
    assert bad(found) == [("same versions", "fail")]
    assert found[0].found == "torch is 2.13.0 on most, but c: 2.12.0"
    assert "b: none" in judge_same({"a": versions, "c": versions, "b": {**versions, "torch": None}})[0].found
    assert bad(judge_source({"a": "1", "b": "1"})) == []
    assert bad(judge_source({"a": "1", "b": "2"})) == [("same source", "fail")]


@pytest.mark.parametrize(
    ("offset", "status"),
    [
        (Offset(0.01, 0.002), "ok"),
        (Offset(-5.0, 0.1), "warn"),
        (Offset(30.0, 0.1), "fail"),
        # So far away only if the answer took its time on one of its ways.
        (Offset(5.0, 4.0), "ok"),
    ],
)
def test_clocks(offset: Offset, status: str) -> None:
    assert [f.status for f in judge_clocks({"b": offset})] == [status]


def test_a_clock_is_told_with_its_error() -> None:
    assert str(Offset(1.5, 0.25) - Offset(0.5, 0.25)) == "+1.000 s (± 0.500)"
    assert judge_clocks({}) == []


def test_reach() -> None:
    assert [f.status for f in judge_reach({})] == ["skip"]
    assert bad(judge_reach({("a", "b"): "", ("b", "a"): ""})) == []
    found = judge_reach({("a", "b"): "", ("a", "c"): "no answer", ("b", "c"): "no answer", ("c", "a"): ""})
    assert bad(found) == [("node to node", "fail")]
    assert found[0].found == "c can't be reached from a and from 1 more: no answer"


def test_addresses_that_only_the_node_itself_knows() -> None:
    assert judge_loopback(["127.0.0.1"]) == []
    assert judge_loopback(["10.0.0.1", "10.0.0.2"]) == []
    assert bad(judge_loopback(["10.0.0.1", "127.0.0.1"])) == [("node address", "fail")]


def test_a_run_directory_that_is_not_shared() -> None:
    assert bad(judge_shared("runs/a", {"a": True, "b": True})) == []
    found = judge_shared("runs/a", {"a": True, "b": False})
    assert bad(found) == [("shared run directory", "fail")]
    assert found[0].found.startswith("b:")


def test_all_reduce() -> None:
    good = [RankResult(rank, "", 0.01, 4 << 20) for rank in range(2)]
    assert judge_reduce(good, "gloo", 1).found == "2 ranks on 1 node: 4 MiB in 10.0 ms, 419 MB/s"
    found = judge_reduce([good[0], RankResult(1, "no answer in time")], "nccl", 2)
    assert bad([found]) == [("all-reduce (nccl)", "fail")]
    assert found.found == "rank 1 of 2 on 2 nodes: no answer in time"
    assert "NCCL_DEBUG" in found.todo


# ---- a store ----

STORE = StoreFacts("s3://bucket/runs/a", seconds={"write": 0.01, "create": 0.02})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"failed": "write", "error": "denied"}, "write failed: denied"),
        ({"read_back": False}, "not what was written last"),
        ({"part_read": False}, "not the bytes asked for"),
        ({"listed": False}, "not in the listing"),
        ({"gone": False}, "still there"),
        ({"again": True}, "ignores conditional writes"),
        ({"winners": 3}, "3 of 4 that created"),
    ],
)
def test_a_store_that_can_not_hold_a_run(change: dict[str, Any], said: str) -> None:
    found = judge_store(replace(STORE, **change))
    assert bad(found) == [("run directory", "fail")]
    assert said in found[0].found


def test_a_good_store_and_a_slow_one() -> None:
    assert bad(judge_store(STORE)) == []
    assert bad(judge_store(replace(STORE, seconds={"write": 3.0}))) == [("run directory", "warn")]


# ---- a spec ----


@pytest.mark.parametrize(
    ("changes", "batch_norm", "rows", "status"),
    [
        ({}, False, 0, "ok"),
        ({}, True, 10_000, "ok"),
        ({"workers": {"min": 1, "max": 100}}, False, 0, "warn"),
        ({}, False, 20, "warn"),
        ({"batch": {"global": 2}}, True, 0, "warn"),
        ({"batch": {"global": 2}}, False, 0, "ok"),
        ({"batch": {"global": 9}}, False, 0, "warn"),
    ],
)
def test_batches(changes: dict[str, Any], batch_norm: bool, rows: int, status: str) -> None:
    assert [f.status for f in judge_batch(spec_of(**changes), batch_norm, rows)] == [status]


def test_slots() -> None:
    node = NodeRoom("a", {"CPU": 8.0, "GPU": 2.0, "disk": 1.0})
    assert slots_of(node, spec_of().workers, gpus=0) == 8
    assert slots_of(node, spec_of().workers, gpus=1) == 2
    assert slots_of(node, spec_of(workers={"min": 1, "max": 2, "cpus": 3}).workers, gpus=0) == 2
    assert slots_of(node, spec_of(workers={"min": 1, "max": 2, "resources": {"disk": 1}}).workers, gpus=0) == 1
    assert slots_of(node, spec_of(workers={"min": 1, "max": 2, "cpus": 0.1}).workers, gpus=0) == 80


@pytest.mark.parametrize(
    ("cpus", "may_grow", "status"), [(2.0, False, "ok"), (4.0, True, "ok"), (1.0, False, "fail"), (1.0, True, "warn")]
)
def test_capacity(cpus: float, may_grow: bool, status: str) -> None:
    assert [f.status for f in judge_capacity(spec_of(), [NodeRoom("a", {"CPU": cpus})], may_grow)] == [status]


def test_a_run_that_would_be_smaller() -> None:
    found = judge_capacity(spec_of(workers={"min": 1, "max": 4}), [NodeRoom("a", {"CPU": 3.0})], may_grow=False)
    assert found[0].found.endswith("workers is 1 to 4: it would run with 3")
    assert [f.status for f in judge_capacity(spec_of(), [], may_grow=False)] == ["skip"]


def test_a_task_and_the_columns_it_needs() -> None:
    data = [DataFacts("data.train", "data/train", columns=["x"]), DataFacts("data.eval", "data/test", error="gone")]
    assert bad(judge_task(spec_of(), TaskFacts(error="no module 'nowhere'"), data)) == [("task", "fail")]
    assert bad(judge_task(spec_of(), TaskFacts(columns=["x"]), data)) == []
    assert bad(judge_task(spec_of(), TaskFacts(columns=["x", "y"]), data)) == [("columns of data.train", "fail")]
    packed = spec_of(data={"train": "d", "pack": {"column": "x", "length": 8}})
    assert bad(judge_task(packed, TaskFacts(columns=["segment_ids"]), data)) == []
    assert [judge_data(facts).status for facts in data] == ["ok", "fail"]


def test_memory_of_a_worker() -> None:
    spec = spec_of(engine={"zero": 1})
    on_gpu, beside = worker_bytes(spec, 1000, on_gpu=True)
    # fp32: weights and gradients, and the optimizer's 12 bytes over two workers; five snapshots of those.
    assert on_gpu == 1000 * (4 + 4) + 1000 * 12 // 2
    assert beside == 5 * 12 * 1000 // 2
    assert worker_bytes(spec, 1000, on_gpu=False) == (0, on_gpu + beside)


def test_paths_as_others_find_them() -> None:
    data = {"mix": [{"name": "a", "url": "data/a"}, {"name": "b", "url": "s3://bucket/b"}], "eval": "/data/test"}
    found = at_home(spec_of(data=data, runs="../runs"), "/home/me/job")
    assert [source.url for source in found.data.mix] == ["/home/me/job/data/a", "s3://bucket/b"]
    assert (found.data.eval, found.runs) == ("/data/test", "/home/me/runs")
    assert at_home(found, "/elsewhere") == found


# ---- findings ----


def test_machines_with_the_same_to_say_share_a_line() -> None:
    findings = [
        *at("a", [ok("memory", "5 GiB"), fail("clock", "ahead", "why", "todo")]),
        *at("b", [ok("memory", "6 GiB"), fail("clock", "behind", "why", "todo")]),
        *at("c", [ok("memory", "7 GiB"), fail("clock", "ahead", "why", "todo")]),
    ]
    assert [(f.name, f.found, f.where) for f in merged(findings)] == [
        ("memory", "5 GiB", "3 machines: a, b, ..."),
        ("clock", "ahead", "a, c"),
        ("clock", "behind", "b"),
    ]
    assert counts(findings) == {"fail": 3, "warn": 0, "skip": 0, "ok": 3}
