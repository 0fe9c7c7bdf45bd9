"""DeepSpeed's C++ op for the CPU: compiled at install time, so that no run waits for it.

    python -m dltrain.training.cpu_op

Without it the first run on a machine compiles for about a minute.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

__all__ = ["build", "is_built", "use_own_cache"]

_NAME = "deepspeed_shm_comm"


def use_own_cache() -> None:
    """Keeps the op beside the packages it was compiled against, unless TORCH_EXTENSIONS_DIR says where.

    torch's own cache is one for all environments of a user: two of them would compile it again at every turn. So
    would two versions of ninja, of which the one beside the packages is taken.
    """
    programs = os.path.join(sys.prefix, "bin")
    path = os.environ.get("PATH", os.defpath)
    if path.split(os.pathsep)[0] != programs:
        os.environ["PATH"] = os.pathsep.join([programs, path])
    place = os.path.join(sys.prefix, "torch_extensions")
    if os.path.isdir(place) or os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", place)


def is_built() -> bool:
    """Whether a compiled op lies in the cache."""
    use_own_cache()
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(_NAME, verbose=False), f"{_NAME}.so").exists()


def build() -> None:
    """Compiles the op; does nothing when it is there."""
    use_own_cache()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    ShareMemCommBuilder().load(verbose=False)


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
