"""The nursery: where an agent's workers come from, with all that is slow done before they are needed.

nursery = make_nursery("cpu", num_threads=1, family="what agents of one driver have in common")
child = nursery.take(theirs, stdout, stderr)      # a worker that waits for its job on the connection `theirs`
child.pid; child.wait()

On CPUs one process of a machine imports everything (`zygote`). It is forked for each agent, and what comes of that for
each worker: a standby that costs neither memory nor a second import. A process that has seen a GPU must not be forked,
so there each worker is a fresh interpreter, and the next one is kept waiting.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from dltrain.running.zygote import plant

__all__ = ["MEMORY", "Child", "Nursery", "make_nursery", "prepare", "serve"]

# Memory that was freed is used again instead of being given back: a page's first touch costs more than a copy of
# what is in it, and a step frees as much as it takes.
MEMORY = {
    # Arrow's own pool, in ms: a window of rows is freed seconds before the next one needs as much.
    "MIMALLOC_PURGE_DELAY": "60000",
    "MALLOC_MMAP_THRESHOLD_": str(32 * 1024 * 1024),
    "MALLOC_TRIM_THRESHOLD_": str(1024 * 1024 * 1024),
}


# How long a nursery is waited for that has to end.
_END_SECONDS = 1.0
# Arrow's allocator is forked with its locks in order, and makes this thread anew.
_FORK_SAFE = ("jemalloc_bg_thd",)


class Child(Protocol):
    """A worker process."""

    @property
    def pid(self) -> int:
        """Its process id."""

    def wait(self) -> int:
        """Waits for its end; the exit code, negative for a signal."""

    def alive(self) -> bool:
        """Whether it runs, as far as is known."""


class Nursery(Protocol):
    """Gives worker processes."""

    def take(self, connection: Connection, stdout: int, stderr: int) -> Child:
        """A new worker that listens on `connection`; it has copies of all three, ours may be closed."""

    def close(self) -> None:
        """Ends what is kept ready; children end with it."""


def make_nursery(device: str, num_threads: int, family: str) -> Nursery:
    """The nursery for a kind of device; those of a family on a machine share what they import."""
    environment = _environment(device, num_threads)
    return FreshProcesses(environment) if device == "cuda" else ForkServer(environment, family)


def _environment(device: str, num_threads: int) -> dict[str, str]:
    environment = {
        **MEMORY,
        **os.environ,
        "DS_ACCELERATOR": "cuda" if device == "cuda" else "cpu",
        "OMP_NUM_THREADS": str(num_threads),
        "OPENBLAS_NUM_THREADS": str(num_threads),
        "PYTHONUNBUFFERED": "1",
    }
    # Ray hides the node's other GPUs from its actors; LOCAL_RANK must count over all of them.
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    return environment


class _Thread:
    """Calls functions in one thread that lives as long as the agent.

    PR_SET_PDEATHSIG fires when the spawning thread ends, and the threads that carry an actor's calls may.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="dltrain-spawner", daemon=True).start()

    def call(self, make: Callable[[], Any]) -> Any:
        answer: Future[Any] = Future()
        self._calls.put((make, answer))
        return answer.result()

    def _run(self) -> None:
        while True:
            make, answer = self._calls.get()
            try:
                answer.set_result(make())
            except BaseException as error:
                answer.set_exception(error)


def _popen(arguments: Sequence[str], fds: Sequence[int], environment: dict[str, str], **options: Any) -> Any:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        pass_fds=list(fds),
        stdin=subprocess.DEVNULL,
        env=environment,
        # Ctrl-C is the driver's to handle: it asks for a clean stop. A group, not a session: the kernel shares the
        # processor out by sessions first, and two workers would be set against each other.
        process_group=0,
        **options,
    )


# ---- fresh interpreters ----


class _Fresh:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process, self.pid = process, process.pid

    def wait(self) -> int:
        return self._process.wait()

    def alive(self) -> bool:
        return self._process.poll() is None


class FreshProcesses:
    """A new interpreter per worker; the next one is started when one is taken."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment, self._thread = environment, _Thread()
        self._waiting: tuple[_Fresh, socket.socket] | None = None
        self._prepare()

    def _prepare(self) -> None:
        ours, theirs = socket.socketpair()
        arguments = ["dltrain.running.worker", str(theirs.fileno()), str(os.getpid())]
        process = self._thread.call(lambda: _popen(arguments, [theirs.fileno()], self._environment))
        theirs.close()
        self._waiting = _Fresh(process), ours

    def take(self, connection: Connection, stdout: int, stderr: int) -> Child:
        if self._waiting is None or not self._waiting[0].alive():
            self._prepare()
        assert self._waiting is not None
        child, control = self._waiting
        socket.send_fds(control, [b"go"], [connection.fileno(), stdout, stderr])
        control.close()
        self._prepare()
        return child

    def close(self) -> None:
        if self._waiting:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._waiting[0].pid, signal.SIGKILL)
            self._waiting[0].wait()
            self._waiting[1].close()
            self._waiting = None


# ---- a fork server ----


class _Forked:
    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.exit: Future[int] = Future()

    def wait(self) -> int:
        return self.exit.result()

    def alive(self) -> bool:
        return not self.exit.done()


class ForkServer:
    """One process with everything imported, forked for each worker."""

    def __init__(self, environment: dict[str, str], family: str) -> None:
        self._environment, self._family, self._thread = environment, family, _Thread()
        self._lock = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            self._link = self._thread.call(lambda: plant(theirs, self._environment, self._family, _popen))
        self._children: dict[int, _Forked] = {}
        self._born: queue.SimpleQueue[_Forked | None] = queue.SimpleQueue()
        state = self._control, self._children, self._born
        self._listener = threading.Thread(target=self._listen, args=state, name="dltrain-nursery", daemon=True)
        self._listener.start()

    def take(self, connection: Connection, stdout: int, stderr: int) -> Child:
        with self._lock:
            for _ in range(2):
                with contextlib.suppress(OSError):
                    socket.send_fds(self._control, [b"go"], [connection.fileno(), stdout, stderr])
                    child = self._born.get()
                    if child is not None:
                        return child
                # It died, and all its children with it.
                self.close()
                self._begin()
        raise RuntimeError("the fork server ended twice; its log is that of the machine's first agent")

    def _listen(
        self, control: socket.socket, children: dict[int, _Forked], born: queue.SimpleQueue[_Forked | None]
    ) -> None:
        connection = Connection(os.dup(control.fileno()))
        try:
            while True:
                kind, pid, code = pickle.loads(connection.recv_bytes())
                if kind == "born":
                    children[pid] = _Forked(pid)
                    born.put(children[pid])
                else:
                    children.pop(pid).exit.set_result(code)
        except (EOFError, OSError):
            connection.close()
        for child in children.values():
            child.exit.set_result(-signal.SIGKILL)
        born.put(None)

    def close(self) -> None:
        # It ends when nobody is left to serve, and its children with it.
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)
        self._listener.join(_END_SECONDS)
        # One that was to be begun while others still import finds this closed.
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        self._listener.join()
        self._control.close()
        self._link.close()


# ---- in the fork server ----


def prepare() -> None:
    """What is done once for all that are forked."""
    from dltrain.running import worker

    worker.import_slow_things()
    gc.freeze()
    _check_single_threaded()


def serve(control: socket.socket) -> None:
    """Forks for each request, and tells of each child's end, until the other end of `control` is closed."""
    from dltrain.running import worker

    wake, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    connection = Connection(os.dup(control.fileno()))
    watched: list[Any] = [control, wake]
    while True:
        ready, _, _ = select.select(watched, [], [])
        if wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(wake, 4096)
            _reap(connection)
        if control in ready:
            message, fds, _, _ = socket.recv_fds(control, 2, 3)
            if not message:
                return
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for fd in (wake, waker, control.fileno(), connection.fileno()):
                    os.close(fd)
                connection_fd, stdout, stderr = fds
                worker.serve(connection_fd, stdout, stderr, os.getppid())
            for fd in fds:
                os.close(fd)
            connection.send_bytes(pickle.dumps(("born", pid, 0)))


def _check_single_threaded() -> None:
    """Only the forking thread lives on in a child; another's locks would be held for ever."""
    names = [Path("/proc/self/task", thread, "comm").read_text().strip() for thread in os.listdir("/proc/self/task")]
    others = [name for name in names[1:] if name not in _FORK_SAFE]
    if others:
        print(f"dltrain: the fork server has threads after its imports: {', '.join(others)}", file=sys.stderr)


def _reap(connection: Connection) -> None:
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            connection.send_bytes(pickle.dumps(("exited", pid, os.waitstatus_to_exitcode(status))))
