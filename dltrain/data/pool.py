"""Processes that make batches, for a `collate` that keeps Python busy.

pool = CollatePool(partial(load_collate, "task.py:Task", {}, cwd), size=4)
TrainStream(..., pool, parallel=4)      # called from 4 threads, it answers in each as `collate` itself would
pool.close()

The processes are fresh interpreters, talked to over sockets: nothing is forked, no semaphore or shared memory
has a name, and they end with the process that started them. What a batch holds depends on its rows and keys
alone, so the results are the same for any size.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from typing import Any

import pyarrow as pa

from dltrain.data.batch import Batch, Keys
from dltrain.data.decode import THREADS
from dltrain.errors import RunFailedError

__all__ = ["CollatePool"]

Collate = Callable[[pa.RecordBatch, Keys], Batch]
_WATCH_SECONDS = 0.5


class CollatePool:
    """Calls a `collate` in one of `size` processes.

    Args:
        make: gives the function; called once in each process, so it must be picklable.
    """

    def __init__(self, make: Callable[[], Collate], size: int) -> None:
        # `make` may only be understood with the path in place.
        setup = pickle.dumps((list(sys.path), pickle.dumps(make)))
        self._processes = [_Process(setup) for _ in range(size)]
        self._free: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        for process in self._processes:
            self._free.put(process)

    def __call__(self, rows: pa.RecordBatch, keys: Keys) -> Batch:
        """The batch, or what `collate` raised."""
        process = self._free.get()
        try:
            good, value = process.ask(rows, keys)
        finally:
            self._free.put(process)
        if not good:
            raise value
        assert isinstance(value, Batch)
        return value

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.close()


class _Process:
    def __init__(self, setup: bytes) -> None:
        self._connection, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dltrain.data.pool", str(theirs.fileno()), str(os.getpid())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", THREADS: "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        theirs.close()
        self._connection.send_bytes(setup)

    def ask(self, rows: pa.RecordBatch, keys: Keys) -> tuple[bool, Any]:
        try:
            self._connection.send_bytes(_pack(rows, keys))
            answer: tuple[bool, Any] = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            code = self._process.wait()
            raise RunFailedError(
                f"a collate process ended by itself (exit status {code}; -9 is the kernel, out of memory); "
                "lower data.collate_workers or the batch"
            ) from None
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()


def _pack(rows: pa.RecordBatch, keys: Keys) -> bytes:
    # Arrow's own format: pickle would send all of a slice's buffers.
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_batch(rows)
    return pickle.dumps((sink.getvalue().to_pybytes(), keys))


def _unpack(data: bytes) -> tuple[pa.RecordBatch, Keys]:
    raw, keys = pickle.loads(data)
    return pa.ipc.open_stream(raw).read_next_batch(), keys


# ---- in the process ----


def _main(fd: int, parent: int) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    connection = Connection(fd)
    with contextlib.suppress(EOFError, OSError):
        path, make = pickle.loads(connection.recv_bytes())
        sys.path[:] = path
        collate = _Lazy(pickle.loads(make))
        while True:
            connection.send_bytes(_answer(collate, connection.recv_bytes()))


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)


class _Lazy:
    """Made at the first call, so that what goes wrong is told as that call's answer."""

    def __init__(self, make: Callable[[], Collate]) -> None:
        self._make = make
        self._made: Collate | None = None

    def __call__(self, rows: pa.RecordBatch, keys: Keys) -> Batch:
        if self._made is None:
            import torch

            torch.set_num_threads(1)
            self._made = self._make()
        return self._made(rows, keys)


def _answer(collate: Collate, question: bytes) -> bytes:
    try:
        # Plain pickle: torch's own way over processes would use shared memory.
        return pickle.dumps((True, collate(*_unpack(question))))
    except Exception as error:
        return pickle.dumps((False, _portable(error)))


def _portable(error: Exception) -> Exception:
    """The exception, with its traceback as a note; its text alone where it can't be sent."""
    import traceback

    error.add_note("".join(traceback.format_exception(error)).rstrip())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]))
