"""The worker: one rank as a plain process, born in its agent's nursery and killed by its agent.

    python -m dltrain.running.worker CONTROL_FD PARENT_PID

It imports what is slow, waits for its job on the pipe, and sends reports back. No Ray in here.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import os
import pickle
import queue
import signal
import socket
import sys
import threading
import traceback
import warnings
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from dltrain.errors import RunFailedError, UserError
from dltrain.observing.reports import Note, Raised, StepReport
from dltrain.running.blackbox import BlackBox
from dltrain.running.messages import Anchored, Bye, Bytes, Command, Hello, Unpin, Want
from dltrain.running.rendezvous import join_group
from dltrain.training.plan import RankJob

__all__ = ["at_home", "die_with", "import_slow_things", "main", "serve", "trace_of"]

_RAYS_NICENESS = 15
_PR_SET_PDEATHSIG = 1
# What torch says when another rank went away; the text is all there is to tell it by.
_PEER_WORDS = ("gloo", "connection closed by peer", "connection reset by peer", "broken pipe", "nccl", "store")


def main(control_fd: int, parent: int) -> NoReturn:
    """A fresh interpreter that is kept waiting: imports, then serves what comes over the control socket."""
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = socket.socket(fileno=control_fd)
    import_slow_things()
    message, fds, _, _ = socket.recv_fds(control, 2, 3)
    if not message:
        os._exit(0)
    connection_fd, stdout, stderr = fds
    serve(connection_fd, stdout, stderr, parent)


def serve(connection_fd: int, stdout: int, stderr: int, parent: int) -> NoReturn:
    """Runs the job that comes over the connection; the exit code is 0 when it ended by itself, 1 when it raised."""
    die_with(parent)
    # A group of its own, so that its children end with it.
    os.setpgid(0, 0)
    _be_as_nice_as_others()
    # Ctrl-C reaches the driver, which asks for a clean stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.close(stdout)
    os.close(stderr)
    # What a crash in native code leaves; the end of it is in the error that the user sees.
    faulthandler.enable(all_threads=False)
    gc.enable()
    connection = Connection(connection_fd)
    try:
        code = _run(at_home(connection.recv()), connection)
    except EOFError:
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: threads of storage clients and of torch may hold the interpreter up.
    os._exit(code)


def at_home(job: RankJob) -> RankJob:
    """The job, with its task looked for here where the driver's directory is not on this machine.

    A Ray job's working directory may be unpacked elsewhere on another node; this process is in it already.
    """
    return job if os.path.isdir(job.cwd) else replace(job, cwd=os.getcwd())


def _be_as_nice_as_others() -> None:
    """Ray runs its workers, and what they start, at niceness 15: training would yield to everything else.

    Another niceness is the wish of whoever started Ray.
    """
    if os.getpriority(os.PRIO_PROCESS, 0) == _RAYS_NICENESS:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, 0)


def die_with(parent: int) -> None:
    """Has the kernel end this process when its parent does."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def import_slow_things() -> None:
    """All that the first step would import: seconds in the background instead of in the way."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    _import_deepspeed()
    import torch._dynamo  # noqa: F401
    from deepspeed.runtime.zero import stage3, stage_1_and_2  # noqa: F401

    _import_muon()
    # PyArrow does, at the first array that is made of Python's values.
    with contextlib.suppress(ImportError):
        importlib.import_module("pandas")
    from dltrain.training import cpu_op, flops, loop  # noqa: F401

    if cpu_op.is_built():
        cpu_op.load()


def _import_deepspeed() -> None:
    """DeepSpeed's autotuner, which no run uses, imports MLflow where it is installed: a second of every start."""
    if absent := "mlflow" not in sys.modules:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        import deepspeed  # noqa: F401
    finally:
        if absent:
            del sys.modules["mlflow"]


def _import_muon() -> None:
    """DeepSpeed imports this optimizer for every engine and has its arithmetic compiled, though no spec can ask for
    it: with it would come torch's code generator, a second of every start."""
    from deepspeed.runtime import compiler

    compiles, compiler.compile = compiler.compile, lambda *_, **__: lambda function: function
    try:
        from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compiles


class _Link:
    """The worker's end of the pipe: what the agent wants of it, and bytes that it asked for."""

    def __init__(self, connection: Connection, box: BlackBox) -> None:
        self._connection, self._box = connection, box
        self._bytes: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.wish = ""
        self._over = threading.Event()
        self.loop: Any = None
        threading.Thread(target=self._listen, daemon=True).start()

    def send(self, report: Any) -> None:
        data = pickle.dumps(report)
        if isinstance(report, StepReport):
            self._box.add(data)
        self._connection.send_bytes(data)

    def ask(self, name: str, start: int, end: int) -> bytes:
        """Bytes of a snapshot on another machine, through the agents."""
        self._connection.send(Want(name, start, end))
        found = self._bytes.get()
        if found is None:
            # As of any rank that went away: the next attempt goes on from elsewhere.
            raise RuntimeError(f"connection closed by peer: who held the snapshot {name} is gone")
        return found

    def wait_for_bye(self) -> None:
        """Until the agent holds this process's memory open: with the process it would be gone."""
        self._over.wait()

    def _listen(self) -> None:
        try:
            self._hear()
        finally:
            self._over.set()

    def _hear(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                match self._connection.recv():
                    case Command(text):
                        self.wish = text
                    case Unpin(slot):
                        if self.loop:
                            self.loop.unpin(slot)
                    case Anchored(seconds):
                        if self.loop:
                            self.loop.anchored(seconds)
                    case Bytes(data):
                        self._bytes.put(data)
                    case Bye():
                        self._over.set()


def _run(job: RankJob, connection: Connection) -> int:
    from dltrain.training.loop import Loop

    box = BlackBox()
    box.alive("starting")
    link = _Link(connection, box)
    loop: Loop | None = None
    try:
        link.send(Hello(job.rank, box.fd))
        task, device = _load(job), _join_group(job, link)
        loop = link.loop = Loop(job, task, device, wish=lambda: link.wish, alive=box.alive, ask=link.ask)
        for report in loop.run():
            link.send(report)
        link.wait_for_bye()
    except BaseException as error:
        link.send(_raised(job, loop, error))
        return 1
    return 0


def _load(job: RankJob) -> Any:
    from dltrain.training.task import load_task

    return load_task(job.spec.task, job.spec.args, job.cwd)


def _join_group(job: RankJob, link: _Link) -> Any:
    """Joins the attempt's process group; returns the rank's device."""
    os.environ.update(job.environment)
    import torch

    from dltrain.training import cpu_op

    if job.device == "cuda":
        device = torch.device("cuda", int(job.environment["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        if job.rank == 0 and not cpu_op.is_built():
            link.send(Note(0, "compiling DeepSpeed's CPU op: about a minute, once on this machine"))
        with contextlib.redirect_stdout(sys.stderr):
            cpu_op.load()
    if job.spec.train.deterministic:
        # cuBLAS reads it when it is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)
    join_group("nccl" if job.device == "cuda" else "gloo", job.environment, device)
    # Objects alive now stay: collecting them again and again only makes stragglers.
    gc.collect()
    gc.freeze()
    return device


def _raised(job: RankJob, loop: Any, error: BaseException) -> Raised:
    step = (loop.step if loop else job.step) + 1
    ids = tuple(loop.current.ids.tolist()) if loop and loop.current is not None else ()
    kind = _kind(error)
    return Raised(job.rank, step, kind, _message(error), trace_of(error), ids if kind == "task" else ())


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


def trace_of(error: BaseException) -> str:
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
    main(int(sys.argv[1]), int(sys.argv[2]))
