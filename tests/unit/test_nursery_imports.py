"""What a worker imports makes no semaphores: in shared memory they have names, and a killed process leaves them."""

from __future__ import annotations

import subprocess
import sys

import pytest

WATCH = """
import _multiprocessing, multiprocessing.synchronize as synchronize
made = []

class Watched(_multiprocessing.SemLock):
    def __init__(self, *arguments):
        made.append(arguments)

class Module:
    SemLock, sem_unlink = Watched, staticmethod(_multiprocessing.sem_unlink)

synchronize._multiprocessing = Module
{body}
print(len(made))
"""


@pytest.mark.parametrize(
    ("body", "number"),
    [
        ("from dltrain.running.worker import import_slow_things; import_slow_things(); import ray, dltrain.cli", "0"),
        # Or there would be nothing that could fail.
        ("import multiprocessing; multiprocessing.Lock()", "1"),
    ],
)
def test_no_semaphores(body: str, number: str) -> None:
    code = WATCH.format(body=body)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == number


def test_what_no_run_uses_is_left_out_and_can_still_be_imported() -> None:
    pytest.importorskip("mlflow", reason="needs dltrain[mlflow]")
    code = (
        "import sys; from dltrain.running.worker import import_slow_things; import_slow_things()\n"
        "print('mlflow' in sys.modules); import mlflow; print(mlflow.__name__)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ["False", "mlflow"]
