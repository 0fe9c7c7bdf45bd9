"""What takes a process of its own to find out: torch, DeepSpeed, GPUs; and a user's task.

    torch_facts(seconds=60)                    # imports torch and DeepSpeed in a child process
    cards()                                    # what nvidia-smi lists
    task_facts(spec, cwd, seconds=60)          # imports the user's task and builds its networks

A child can crash, hang or print as it likes. Its answer is the last line of its output.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from dltrain.doctor.gpu import Card, TorchFacts
from dltrain.doctor.job import TaskFacts
from dltrain.spec import JobSpec

__all__ = ["ANSWER", "ChildError", "ask_child", "cards", "task_facts", "torch_facts"]

# What an answer's line begins with, so that a print of somebody else's is not taken for one.
ANSWER = "dltrain-doctor: "
_MIB = 1024**2
_SMI_SECONDS = 20.0
_QUERY = "name,driver_version,memory.total,memory.used"


class ChildError(Exception):
    """A child gave no answer; the text says why."""


def cards() -> list[Card]:
    """The GPUs that nvidia-smi lists; none where there is no such program, or no driver."""
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return read_cards(done.stdout) if done.returncode == 0 else []


def read_cards(text: str) -> list[Card]:
    """nvidia-smi's table; lines that are none are left out."""
    found = []
    for line in csv.reader(io.StringIO(text), skipinitialspace=True):
        with contextlib.suppress(ValueError):
            name, driver, total, used = line
            found.append(Card(name, driver, int(total) * _MIB, int(used) * _MIB))
    return found


def torch_facts(seconds: float) -> TorchFacts:
    """What torch and DeepSpeed say, asked in a child process."""
    environment = dict(os.environ)
    # Ray hides GPUs from who has not asked for one.
    if environment.get("CUDA_VISIBLE_DEVICES") == "":
        del environment["CUDA_VISIBLE_DEVICES"]
    try:
        answer = ask_child("dltrain.doctor.ask_torch", {}, seconds, environment)
    except ChildError as error:
        return TorchFacts(error=str(error))
    answer["no_peers"] = [(a, b) for a, b in answer.get("no_peers", ())]
    return TorchFacts(**answer)


def task_facts(spec: JobSpec, cwd: str, seconds: float) -> TaskFacts:
    """The task of a spec, built in a child process."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    try:
        question = {"spec": spec.to_dict(), "cwd": cwd}
        return TaskFacts(**ask_child("dltrain.doctor.ask_task", question, seconds, environment))
    except ChildError as error:
        return TaskFacts(error=str(error))


def ask_child(module: str, question: Mapping[str, Any], seconds: float, env: Mapping[str, str]) -> dict[str, Any]:
    """Runs a module of ours with a question on stdin, and returns its answer.

    Raises:
        ChildError: it crashed or did not answer in time.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=dict(env),
        start_new_session=True,
    )
    try:
        out, err = process.communicate(json.dumps(question), timeout=seconds)
    except subprocess.TimeoutExpired:
        # With whatever it has started.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.communicate()
        raise ChildError(f"no answer within {seconds:g} s") from None
    answers = [line for line in out.splitlines() if line.startswith(ANSWER)]
    if not answers:
        raise ChildError(_last_words(process.returncode, err))
    found: dict[str, Any] = json.loads(answers[-1].removeprefix(ANSWER))
    return found


def _last_words(code: int, err: str) -> str:
    lines = [line for line in err.splitlines() if line.strip()]
    said = f": {lines[-1].strip()[:300]}" if lines else ""
    return f"the process was ended by signal {-code}{said}" if code < 0 else f"exit code {code}{said}"
