"""A real all-reduce over ranks: started here, or by a visitor on each node, and judged.

results = run_ranks([rank_environment(infos, rank, port) for rank in range(2)], "gloo", seconds=30)
judge_reduce(results, "gloo", 1)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dltrain.doctor.finding import Finding, fail, ok
from dltrain.doctor.probe import ANSWER

__all__ = ["RankResult", "judge_reduce", "local_environments", "run_ranks"]

# Importing torch, on a machine that is busy with the other checks as well.
_START_SECONDS = 30.0


@dataclass(frozen=True)
class RankResult:
    """What became of a rank: its sum was right and took so long, or `error` says what happened."""

    rank: int
    error: str = ""
    seconds: float = 0.0
    num_bytes: int = 0


def local_environments(num_ranks: int, port: int) -> list[dict[str, str]]:
    """Ranks that meet on this machine alone."""
    return [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "lo",
        }
        for rank in range(num_ranks)
    ]


def run_ranks(environments: Sequence[Mapping[str, str]], backend: str, seconds: float) -> list[RankResult]:
    """Runs these ranks here, and ends them when they take longer than `seconds` beside their start."""
    inherited = {**os.environ, "OMP_NUM_THREADS": "1"}
    if inherited.get("CUDA_VISIBLE_DEVICES") == "":
        # Ray hides GPUs from who has not asked for one.
        del inherited["CUDA_VISIBLE_DEVICES"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "dltrain.doctor.reduce", backend, str(seconds)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**inherited, **environment},
        )
        for environment in environments
    ]
    deadline = time.monotonic() + seconds + _START_SECONDS
    try:
        return [
            _result(process, int(environment["RANK"]), deadline)
            for process, environment in zip(processes, environments, strict=True)
        ]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _result(process: subprocess.Popen[str], rank: int, deadline: float) -> RankResult:
    try:
        out, err = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return RankResult(rank, "no answer in time")
    answers = [line for line in out.splitlines() if line.startswith(ANSWER)]
    if not answers:
        lines = [line for line in err.splitlines() if line.strip()]
        return RankResult(rank, lines[-1].strip()[:300] if lines else f"exit code {process.returncode}")
    answer = json.loads(answers[-1].removeprefix(ANSWER))
    if answer["sum"] != answer["wanted"]:
        return RankResult(rank, f"the sum is {answer['sum']} instead of {answer['wanted']}")
    return RankResult(rank, "", answer["seconds"], answer["bytes"])


def judge_reduce(results: Sequence[RankResult], backend: str, num_nodes: int) -> Finding:
    """What the ranks say."""
    name = f"all-reduce ({backend})"
    bad = [result for result in results if result.error]
    where = f"{num_nodes} nodes" if num_nodes > 1 else "1 node"
    if not bad:
        slowest = max(result.seconds for result in results)
        rate = results[0].num_bytes / max(slowest, 1e-9) / 1e6
        ranks = f"{len(results)} ranks on {where}"
        return ok(name, f"{ranks}: {results[0].num_bytes >> 20} MiB in {1000 * slowest:.1f} ms, {rate:,.0f} MB/s")
    why = "workers add up their gradients so in every step"
    if backend == "nccl":
        todo = "try it with NCCL_DEBUG=INFO in Ray's environment; check NCCL_SOCKET_IFNAME, ports, /dev/shm, memlock"
    else:
        todo = "check that the nodes' addresses reach each other on all ports, and GLOO_SOCKET_IFNAME"
    return fail(name, f"rank {bad[0].rank} of {len(results)} on {where}: {bad[0].error}", why, todo)
