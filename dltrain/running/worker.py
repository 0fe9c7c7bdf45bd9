"""The worker: one rank as a plain process, started and killed by its agent.

    python -m dltrain.running.worker FD PARENT_PID

It imports what is slow, waits for its job on the pipe, and sends reports back. No Ray in here.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import sys
import threading
import traceback
import warnings
from multiprocessing.connection import Connection
from typing import Any

from dltrain.errors import RunFailedError, UserError
from dltrain.observing.reports import Note, Raised
from dltrain.training.plan import RankJob

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1
# What torch says when another rank went away; the text is all there is to tell it by.
_PEER_WORDS = ("gloo", "connection closed by peer", "connection reset by peer", "broken pipe", "nccl", "store")


def main(fd: int, parent: int) -> int:
    """Runs one job; the exit code is 0 when it ended by itself, 1 when something was raised."""
    _die_with(parent)
    _be_as_nice_as_others()
    # Ctrl-C reaches the driver, which asks for a clean stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(fd)
    _import_slow_things()
    try:
        job = connection.recv()
    except EOFError:
        return 0
    return _run(job, connection)


def _be_as_nice_as_others() -> None:
    """Ray runs its workers, and what they start, at niceness 15: training would yield to everything else."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, 0)


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _import_slow_things() -> None:
    """All that the first step would import: 5 s in the background instead of in the way."""
    from dltrain.training import cpu_op

    cpu_op.use_own_cache()
    warnings.filterwarnings("ignore", category=FutureWarning)
    import deepspeed  # noqa: F401
    import torch._dynamo  # noqa: F401
    from deepspeed.runtime.zero import stage3, stage_1_and_2  # noqa: F401

    _import_muon()
    from dltrain.training import loop  # noqa: F401


def _import_muon() -> None:
    """DeepSpeed imports this optimizer for every engine and has its arithmetic compiled, though no spec can ask for
    it: with it would come torch's code generator, a second of every start."""
    from deepspeed.runtime import compiler

    compiles, compiler.compile = compiler.compile, lambda *_, **__: lambda function: function
    try:
        from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compiles


def _run(job: RankJob, connection: Connection) -> int:
    from dltrain.training.loop import Loop

    stop = threading.Event()
    threading.Thread(target=_listen, args=(connection, stop), daemon=True).start()
    loop: Loop | None = None
    try:
        task, device = _load(job), _join_group(job, connection)
        loop = Loop(job, task, device, stop.is_set)
        for report in loop.run():
            connection.send(report)
    except BaseException as error:
        connection.send(_raised(job, loop, error))
        return 1
    return 0


def _listen(connection: Connection, stop: threading.Event) -> None:
    try:
        while True:
            if connection.recv() == "stop":
                stop.set()
    except (EOFError, OSError):
        return


def _load(job: RankJob) -> Any:
    from dltrain.training.task import load_task

    return load_task(job.spec.task, job.spec.args, job.cwd)


def _join_group(job: RankJob, connection: Connection) -> Any:
    """Joins the attempt's process group; returns the rank's device."""
    os.environ.update(job.environment)
    import deepspeed
    import torch

    from dltrain.training import cpu_op

    if job.device == "cuda":
        device = torch.device("cuda", int(job.environment["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        if job.rank == 0 and not cpu_op.is_built():
            connection.send(Note(0, "compiling DeepSpeed's CPU op: about a minute, once on this machine"))
    backend = "nccl" if job.device == "cuda" else "gloo"
    # It prints about its op; stdout is the user's.
    with contextlib.redirect_stdout(sys.stderr):
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    # Objects alive now stay: collecting them again and again only makes stragglers.
    gc.collect()
    gc.freeze()
    return device


def _raised(job: RankJob, loop: Any, error: BaseException) -> Raised:
    step = (loop.step if loop else job.step) + 1
    ids = tuple(loop.current.ids.tolist()) if loop and loop.current is not None else ()
    kind = _kind(error)
    return Raised(job.rank, step, kind, _message(error), _trace(error), ids if kind == "task" else ())


def _kind(error: BaseException) -> str:
    if isinstance(error, UserError):
        return "user"
    if isinstance(error, RunFailedError):
        return "final"
    text = str(error).lower()
    name = type(error).__name__
    if name.startswith("Dist") or (isinstance(error, RuntimeError) and any(w in text for w in _PEER_WORDS)):
        return "peer"
    return "task"


def _message(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError | RunFailedError) else f"{type(error).__name__}: {error}"


def _trace(error: BaseException) -> str:
    """The traceback from the user's first frame on; all of it when there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    ours = ("threading.py", os.path.join("concurrent", "futures"))
    first = next(
        (i for i, f in enumerate(frames) if not f.filename.startswith(home) and not any(o in f.filename for o in ours)),
        0,
    )
    lines = traceback.format_list(frames[first:]) + traceback.format_exception_only(error)
    return "".join(lines).rstrip()


if __name__ == "__main__":
    code = main(int(sys.argv[1]), int(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: threads of storage clients and of torch may hold the interpreter up.
    os._exit(code)
