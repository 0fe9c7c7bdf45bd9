"""The doctor's checks on this machine: each finds the fault that was planted for it, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import harness
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dltrain import __version__, cli
from dltrain.doctor import facts
from dltrain.doctor.bare import bare_versions
from dltrain.doctor.checkup import Check, NoProgress, run_checks
from dltrain.doctor.cluster import visit_cluster
from dltrain.doctor.data import look_at_data
from dltrain.doctor.examination import Report, judge_port, port_problem
from dltrain.doctor.finding import Finding, fail, ok, warn
from dltrain.doctor.machine import judge_machine
from dltrain.doctor.nodes import judge_same
from dltrain.doctor.probe import ChildError, ask_child, cards
from dltrain.doctor.rounds import unreachable
from dltrain.doctor.show import LiveProgress, print_report
from dltrain.doctor.storage import judge_store, left_file, try_store
from dltrain.errors import StoreError
from dltrain.spec import MetricsSpec, parse_spec
from dltrain.store import Store, open_store


def statuses(findings: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.status for finding in findings}


# ---- storage ----


def test_a_disk_can_hold_a_run_and_is_left_as_it_was(tmp_path: Path) -> None:
    found = judge_store(try_store(open_store(tmp_path / "runs" / "tiny")))
    assert statuses(found) == {"run directory": "ok"}
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").write_text("kept")
    judge_store(try_store(open_store(tmp_path / "runs")))
    assert [path.name for path in tmp_path.rglob("*")] == ["runs", "mine"]


def test_a_place_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    found = judge_store(try_store(open_store(tmp_path / "file" / "runs")))
    assert statuses(found) == {"run directory": "fail"}
    assert found[0].found.startswith("write failed:")


class Forgetful(MemoryFileSystem):  # type: ignore[misc]
    """Object storage that ignores If-None-Match."""

    store: ClassVar[dict[str, Any]] = {}
    cachable = False

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        super().pipe_file(path, value, mode="overwrite", **options)


def test_a_store_that_ignores_conditions() -> None:
    facts_ = try_store(Store("forgetful://runs/a", Forgetful(), "/runs/a"))
    assert (facts_.failed, facts_.again, facts_.winners) == ("", True, 4)
    assert statuses(judge_store(facts_)) == {"run directory": "fail"}
    # One that does not is told from it by the same trial.
    assert statuses(judge_store(try_store(open_store("memory://doctor/a")))) == {"run directory": "ok"}


def test_a_file_for_others_to_look_for(tmp_path: Path) -> None:
    store = open_store(tmp_path / "runs" / "tiny")
    with left_file(store) as name:
        assert store.exists(name)
    assert list(tmp_path.iterdir()) == []


def test_data_by_their_first_footer(tmp_path: Path) -> None:
    harness.write_data(tmp_path / "train", rows=200, files=2, group=16)
    spec = parse_spec(harness.make_spec(tmp_path, data={"train": str(tmp_path / "train"), "eval": str(tmp_path)}))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.parquet").write_bytes(b"no Parquet at all")
    good, _ = look_at_data(spec)
    assert (good.error, good.files, good.rows, good.row_groups) == ("", 2, 100, 7)
    assert 190 <= good.rows_about <= 210
    assert good.columns == ["x", "y"]
    for place, said in {"broken": "is not a Parquet file", "nowhere": "found no Parquet"}.items():
        found = look_at_data(parse_spec(harness.make_spec(tmp_path, data={"train": str(tmp_path / place)})))
        assert said in found[0].error


# ---- the machine ----


def test_facts_of_this_machine() -> None:
    found = facts.machine_facts(inside_ray=False)
    assert found.versions["torch"]
    assert 0 < found.available_bytes <= found.memory_bytes
    assert 0 < found.cpus <= (os.cpu_count() or 0)
    assert found.addresses["127.0.0.1"]
    assert found.code == facts.source_digest()
    assert {f.name for f in judge_machine(found)} >= {"Python", "packages", "/dev/shm", "open files"}


def test_few_open_files() -> None:
    code = (
        "from dltrain.doctor.facts import machine_facts; from dltrain.doctor.machine import judge_machine\n"
        "print([f.status for f in judge_machine(machine_facts(False)) if f.name == 'open files'])"
    )

    def starve() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))

    done = subprocess.run(
        [sys.executable, "-c", code], preexec_fn=starve, capture_output=True, text=True, cwd=harness.ROOT, check=True
    )
    assert done.stdout.strip() == "['fail']"


def test_an_op_that_can_not_be_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("dltrain.training.cpu_op.place", lambda: tmp_path / "op.so")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = [f for f in judge_machine(facts.machine_facts(inside_ray=False)) if f.name == "DeepSpeed's CPU op"]
    assert [f.status for f in found] == ["fail"]
    assert "g++" in found[0].found


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "PACKAGES", (*facts.PACKAGES, "no-such-package"))
    found = judge_machine(facts.machine_facts(inside_ray=False))
    assert statuses(found)["packages"] == "fail"


def test_a_container_is_what_it_may_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, text in {"cpu.max": "50000 100000", "memory.max": str(1 << 30), "pids.max": "77"}.items():
        (tmp_path / name).write_text(f"{text}\n")
    (tmp_path / "memory.current").write_text(str(1 << 29))
    monkeypatch.setattr(facts, "_CGROUP", tmp_path)
    found = facts.machine_facts(inside_ray=False)
    assert (found.cpus, found.memory_bytes, found.max_processes) == (0.5, 1 << 30, 77)
    assert found.available_bytes <= 1 << 29


def test_a_busy_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        problem = port_problem("127.0.0.1", port)
        assert problem
        assert judge_port(MetricsSpec(port=port), problem, on_cluster=False).status == "warn"
        assert judge_port(MetricsSpec(port=port), problem, on_cluster=True).status == "fail"
    assert port_problem("127.0.0.1", port) == ""
    # Not an address of this machine.
    assert port_problem("203.0.113.7", 0)


def test_cards_that_nvidia_smi_lists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cards() == []
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 580.65.06, 81559, 512'\necho 'No devices'\n")
    smi.chmod(0o755)
    found = cards()
    assert [(c.name, c.driver, c.memory_bytes >> 20, c.used_bytes >> 20) for c in found] == [
        ("NVIDIA H100 80GB HBM3", "580.65.06", 81559, 512)
    ]
    smi.write_text('#!/bin/sh\necho "NVIDIA-SMI has failed because it couldn\'t communicate with the driver"\nexit 9\n')
    assert cards() == []


# ---- children that crash, hang or print ----


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Writes a module that a child process can run."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{harness.ROOT}")

    def write(code: str) -> str:
        (tmp_path / "stub.py").write_text(code)
        return "stub"

    return write


def test_a_child_that_does_not_answer(stub: Any) -> None:
    env = dict(os.environ)
    assert ask_child(stub("print('hello'); print('dltrain-doctor: {\"a\": 1}')"), {}, 30, env) == {"a": 1}
    with pytest.raises(ChildError, match="exit code 1: ValueError: broken"):
        ask_child(stub("raise ValueError('broken')"), {}, 30, env)
    with pytest.raises(ChildError, match="ended by signal 6"):
        ask_child(stub("import os; os.abort()"), {}, 30, env)
    with pytest.raises(ChildError, match=r"no answer within 0\.5 s"):
        ask_child(stub("import time; time.sleep(60)"), {}, 0.5, env)


def test_rounds_that_end_early(stub: Any) -> None:
    say = "import json, sys, os\ndef say(**m): print(json.dumps(m), flush=True)\n"
    good = ok("clocks", "3 nodes").to_dict()
    lines = f"say(stage='clocks')\nsay(finding={good!r})\nsay(node=dict(address='a', resources=dict(CPU=2.0)))\n"
    stages: list[str] = []
    visit = visit_cluster("a:1", None, 30, stages.append, program=stub(f"{say}{lines}say(done=True)"))
    assert (statuses(visit.findings), stages) == ({"clocks": "ok"}, ["clocks"])
    assert [(node.address, node.resources) for node in visit.nodes] == [("a", {"CPU": 2.0})]
    visit = visit_cluster("a:1", None, 30, stages.append, program=stub(f"{say}{lines}sys.exit('Check failed')"))
    assert statuses(visit.findings) == {"clocks": "ok", "Ray": "fail"}
    assert "at clocks (exit code 1): Check failed" in visit.findings[-1].found
    begin = time.monotonic()
    visit = visit_cluster("a:1", None, 0.5, stages.append, program=stub(f"{say}{lines}import time; time.sleep(60)"))
    assert time.monotonic() - begin < 30
    assert "no sign of life for 2 s, at clocks" in visit.findings[-1].found


def test_a_wrong_address() -> None:
    assert unreachable("auto") is None
    assert unreachable("local") is None
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert unreachable(f"127.0.0.1:{port}") is None
    for address, said in {
        f"127.0.0.1:{port}": "refused",
        f"ray://127.0.0.1:{port}": "is for Ray's client",
        "no-such-host.invalid:6379": "there is no host",
    }.items():
        found = unreachable(address)
        assert found is not None
        assert (found.status, said in found.found) == ("fail", True), found


def test_a_node_that_lacks_dltrain_can_be_asked() -> None:
    """The question travels by value: nothing of ours is imported to unpickle it."""
    from ray import cloudpickle

    question = cloudpickle.dumps(bare_versions())
    assert cloudpickle.loads(question)()["dltrain"] == __version__
    code = (
        "import sys; sys.modules['dltrain'] = None\n"
        "import pickle, json; print(json.dumps(pickle.load(sys.stdin.buffer)()))"
    )
    done = subprocess.run([sys.executable, "-c", code], input=question, capture_output=True, check=True)
    found = json.loads(done.stdout)
    assert (found["dltrain"], found["torch"]) == (None, facts.package_versions()["torch"])
    told = judge_same({"here": bare_versions()(), "there": found})
    assert "dltrain is" in told[0].found


# ---- side by side ----


def test_checks_run_side_by_side_and_none_holds_the_others_up() -> None:
    release = threading.Event()

    def broken() -> list[Finding]:
        raise KeyError("x")

    def refused() -> list[Finding]:
        raise StoreError("s3://bucket: denied; let this user in")

    def stuck() -> list[Finding]:
        release.wait(60)
        return []

    def slow() -> list[Finding]:
        time.sleep(0.3)
        return [ok("slow", "done")]

    # More of the heavy ones hang than there are places for.
    hanging = [Check(f"heavy {i}", stuck, 0.4, heavy=True) for i in range(2 * (os.cpu_count() or 1))]
    checks = [*hanging, Check("a", slow, 60, heavy=True), Check("b", broken, 60), Check("c", refused, 60)]
    begin = time.monotonic()
    found, left = run_checks(checks, NoProgress())
    assert time.monotonic() - begin < 20
    assert left
    assert [f.name for f in found] == [*(c.name for c in hanging), "slow", "b", "c"]
    assert {f.status for f in found[: len(hanging)]} == {"fail"}
    assert "no answer within 0.4 s" in found[0].found
    assert "KeyError" in found[-2].found
    assert found[-1].found == "s3://bucket: denied; let this user in"
    release.set()
    assert run_checks([Check("a", slow, 60)], NoProgress()) == ([ok("slow", "done")], False)


# ---- what is shown ----


def test_the_table_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    findings = [ok("memory", "[50] GiB"), warn("op", "not compiled", "a minute", "compile"), fail("Ray", "x", "y", "z")]
    print_report(Report(findings, left=False, seconds=3.0))
    out = capsys.readouterr().out
    assert "[50] GiB" in out
    assert out.index("must be changed") < out.index("should be changed")
    assert "to do: compile" in out
    assert "a run would fail: 1 failed, 1 warnings, 1 good, 0 skipped, in 3 s" in out
    assert Report(findings[:2], left=False, seconds=3.0).good


def test_progress_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("dltrain.doctor.show.time", SimpleNamespace(monotonic=lambda: now[0]))
    with LiveProgress() as progress:
        for second in range(21):
            now[0] = float(second)
            progress.update(1, 3, ["Ray: clocks"])
    assert capsys.readouterr().err.splitlines() == ["1 of 3 checks done; waiting for Ray: clocks"] * 2


def test_a_wrong_spec(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = harness.write_spec(tmp_path, {**harness.make_spec(tmp_path), "wrokers": 2})
    with pytest.raises(SystemExit) as caught:
        cli.main(["doctor", str(path), "--json"])
    assert caught.value.code == 2
    out = capsys.readouterr().out
    assert "did you mean 'workers'?" in json.loads(out)["error"]
