"""Plain child processes that form one gloo group; what a test of several ranks runs its function in.

    results = run_ranks(fn, 2, arg)  # fn(arg) on each of two ranks -> [rank 0's value, rank 1's value]

`fn` is a module's top-level function. Ranks are forked, as a run's workers are, from a process that has imported all
that is slow (ready.py).
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest import mock

from ports import free_ports

__all__ = ["RankError", "run_ranks"]

_PR_SET_PDEATHSIG = 1


class RankError(Exception):
    """A rank raised, died or did not answer in time; carries its traceback."""


def run_ranks(fn: Callable[..., Any], num_ranks: int, *args: Any, timeout_seconds: float = 300) -> list[Any]:
    """Calls `fn(*args)` on `num_ranks` ranks and returns each rank's value, in the order of ranks.

    Raises:
        RankError: with the traceback of the rank that failed first.
    """
    context = _forking()
    call = pickle.dumps((fn, args))
    (port,) = free_ports(1)
    pipes, processes = [], []
    try:
        for rank in range(num_ranks):
            here, there = context.Pipe(duplex=False)
            environment = _environment(rank, num_ranks, port)
            process = context.Process(target=_main, args=(call, environment, there), daemon=True)
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        return _answers(pipes, time.monotonic() + timeout_seconds)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        for pipe in pipes:
            pipe.close()


def _forking() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ready"])
    # Python 3.11 does not tell the server where modules are, and it says nothing of one that it lacks.
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
        forkserver.ensure_running()
    return context


def _answers(pipes: list[Connection], deadline: float) -> list[Any]:
    values: dict[int, Any] = {}
    while len(values) < len(pipes):
        open_pipes = [pipe for rank, pipe in enumerate(pipes) if rank not in values]
        ready = wait(open_pipes, max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = [rank for rank in range(len(pipes)) if rank not in values]
            raise RankError(f"ranks {missing} did not answer in time")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            values[rank] = _answer(pipe, rank)  # type: ignore[arg-type]
    return [values[rank] for rank in range(len(pipes))]


def _answer(pipe: Connection, rank: int) -> Any:
    try:
        good, value = pickle.loads(pipe.recv_bytes())
    except EOFError:
        raise RankError(f"rank {rank} died without a word") from None
    if not good:
        raise RankError(f"rank {rank}:\n{value}")
    return value


def _environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }


def _main(call: bytes, environment: dict[str, str], pipe: Connection) -> None:
    # So that no rank outlives the test's process, however that one ends.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.update(environment)
    try:
        answer = pickle.dumps((True, _call(call)))
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(answer)
    # The others may still be in a collective with this rank; the parent ends all of them.
    pipe.close()
    time.sleep(3600)


def _call(call: bytes) -> Any:
    # torch's own names, deprecated by torch and called by DeepSpeed several times a step.
    warnings.filterwarnings("ignore", category=FutureWarning)
    import deepspeed
    import torch

    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    fn, args = pickle.loads(call)
    return fn(*args)
