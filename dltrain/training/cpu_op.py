"""DeepSpeed's C++ op for the CPU: compiled at install time, so that no run waits for it.

    python -m dltrain.training.cpu_op         # compiles it
    cpu_op.load()                             # in a worker, after DeepSpeed is imported

torch's own cache of compiled ops compiles again when a process is killed at the wrong moment, and asks a build tool at
every start. So the finished op is kept under a name that says what it was compiled against, and loaded from there.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["build", "is_built", "load", "place"]

_NAME = "deepspeed_shm_comm"


def place() -> Path:
    """Where the compiled op is kept: beside the packages it was compiled against, else in the user's cache."""
    home = Path(sys.prefix, "dltrain-ops")
    if not home.is_dir() and not os.access(sys.prefix, os.W_OK):
        home = Path.home() / ".cache" / "dltrain"
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Path(home, f"{_NAME}-torch{version('torch')}-deepspeed{version('deepspeed')}-python{python}.so")


def is_built() -> bool:
    """Whether a compiled op lies there."""
    return place().exists()


def load() -> None:
    """Gives DeepSpeed the compiled op, compiling it first where it is not there."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    if _NAME not in OpBuilder._loaded_ops:
        build()
        spec = importlib.util.spec_from_file_location(_NAME, place())
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        OpBuilder._loaded_ops[_NAME] = module


def build() -> None:
    """Compiles the op; does nothing when it is there."""
    if is_built():
        return
    with _only_one():
        if not is_built():
            _compile()


@contextlib.contextmanager
def _only_one() -> Iterator[None]:
    """Of the processes of a machine one compiles; the kernel lets go of the lock when it dies."""
    target = place()
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Before torch reads it.
    before = os.environ.get("TORCH_EXTENSIONS_DIR")
    target = place()
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        os.environ["TORCH_EXTENSIONS_DIR"] = directory
        try:
            from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

            ShareMemCommBuilder().load(verbose=False)
        finally:
            os.environ.pop("TORCH_EXTENSIONS_DIR")
            if before is not None:
                os.environ["TORCH_EXTENSIONS_DIR"] = before
        (made,) = Path(directory).rglob(f"{_NAME}.so")
        finished = made.with_suffix(".finished")
        shutil.copyfile(made, finished)
        os.replace(finished, target)


def _show() -> None:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    if is_built():
        print("  compiled already")
        return
    failure: list[BaseException] = []

    def work() -> None:
        try:
            build()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True)
    console = Console()
    columns: list[Any] = [TextColumn("  compiling, about a minute"), BarColumn(pulse_style="cyan"), TimeElapsedColumn()]
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        progress.add_task("", total=None)
        if not console.is_terminal:
            print("  compiling, about a minute", flush=True)
        thread.start()
        thread.join()
    if failure:
        raise SystemExit(f"DeepSpeed's CPU op can't be compiled: {failure[0]}\nIt needs g++ and Python's headers.")


if __name__ == "__main__":
    _show()
