"""The run directory: everything a run leaves behind, at a path or URL.

run = RunDir.of(spec)
run.check_same(spec); run.claim_attempt(); run.store.read("state.json")
find_run("image-cnn")                 # by name under $DLTRAIN_RUNS or ./runs, or by URL

spec.yaml  plan.arrow  footers/  state.json  ledger.json  events.jsonl  steps.jsonl
quarantine.jsonl  checkpoints/  logs/
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from dltrain.data.plan import Plan, read_plan, save_footers
from dltrain.errors import RunChangedError, UserError
from dltrain.observing.journal import is_local, read_json
from dltrain.observing.reports import OVER
from dltrain.spec import JobSpec
from dltrain.store import Store, open_store

__all__ = ["RunDir", "find_run", "list_runs", "make_plan", "runs_url"]

# A reader takes a run for dead when its heartbeat is older than this.
STALE_SECONDS = 30.0


class RunDir:
    """One run's directory."""

    def __init__(self, store: Store) -> None:
        self.store = store
        # The number of this start of the run; 0 before its first attempt.
        self._start = 0
        self._claiming = threading.Lock()
        self.checkpoints = store.child("checkpoints")

    @classmethod
    def of(cls, spec: JobSpec) -> RunDir:
        """Where this spec's run lives."""
        return cls(open_store(spec.runs).child(spec.name))

    @property
    def url(self) -> str:
        """Path or URL of the directory."""
        return self.store.url

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine's disk."""
        return is_local(self.store)

    # ---- the same run? ----

    def check_same(self, spec: JobSpec) -> list[str]:
        """The settings that differ from those the run was last started with.

        Raises:
            RunChangedError: task, args or data differ: going on would train something else under the old name.
        """
        try:
            before = self.load_spec()
        except FileNotFoundError:
            return []
        changed = [
            f"  {name}: {before.identity[name]!r} in the run, {value!r} in the spec"
            for name, value in spec.identity.items()
            if before.identity[name] != value
        ]
        if changed:
            raise RunChangedError(self._refusal(changed))
        return _differences(before.to_dict(), spec.to_dict())

    def check_data(self, plan: Plan) -> None:
        """Raises RunChangedError when the datasets' files are not those of the stored plan; they are only listed."""
        changed = [
            f"  {old.url}: {len(old.files)} files of {sum(f.size for f in old.files):,} bytes when the run began, "
            f"{len(now)} of {sum(f.size for f in now):,} bytes now (or as many other ones)"
            for old, now in plan.files_now()
        ]
        if changed:
            raise RunChangedError(self._refusal(changed))

    def _refusal(self, lines: list[str]) -> str:
        return "\n".join(
            [
                f"{self.url} holds a run of another task or other data:",
                *lines,
                "Resuming would mix the two. Set another `name` to start afresh, or delete that directory.",
            ]
        )

    # ---- what it stores ----

    def load_spec(self) -> JobSpec:
        """spec.yaml: as the run was last started."""
        return JobSpec.model_validate(yaml.safe_load(self.store.read("spec.yaml")))

    def save_spec(self, spec: JobSpec) -> None:
        """spec.yaml."""
        self.store.write("spec.yaml", spec.to_yaml().encode())

    def save_plan(self, plan: Plan) -> None:
        """footers/ and plan.arrow, in this order: where there is a plan there are its footers."""
        save_footers(self.store, plan)
        self.store.write("plan.arrow", plan.to_bytes())

    def load_plan(self) -> Plan | None:
        """The stored plan, or None before the first start."""
        try:
            return Plan.from_bytes(self.store.read("plan.arrow"))
        except FileNotFoundError:
            return None

    def claim_attempt(self) -> int:
        """The next attempt number, which no other process gets; with its first one a process takes the run over."""
        with self._claiming:
            self._start = self._start or self._claim("start")
            return self._claim("attempt")

    def _claim(self, what: str) -> int:
        number = 1 + max(self._claimed(what), default=0)
        while not self.store.create(f"{what}s/{what}-{number:04d}", b"claimed\n"):
            number += 1
        return number

    def _claimed(self, what: str) -> Iterator[int]:
        return (int(name.split("-")[-1]) for name in self.store.list(f"{what}s"))

    def is_replaced(self) -> bool:
        """Whether another process has taken the run over since this one did; it can't be taken back."""
        return 0 < self._start < max(self._claimed("start"), default=0)

    # ---- talking to a live run ----

    def request_stop(self) -> None:
        """Asks the driver to stop."""
        self.store.write("stop", f"{time.time()}\n".encode())

    def take_stop(self) -> bool:
        """Whether a stop was asked for; forgets it."""
        if not self.store.exists("stop"):
            return False
        self.store.delete("stop")
        return True

    def state(self) -> dict[str, Any] | None:
        """state.json, with `state` "lost" when a live one has stopped beating."""
        state = read_json(self.store, "state.json")
        if state and state["state"] not in OVER:
            age = time.time() - float(state["heartbeat"])
            if age > STALE_SECONDS:
                state = {**state, "state": "lost", "silent_seconds": round(age, 1)}
        return state


def make_plan(spec: JobSpec, run: RunDir, tell: Callable[[str], None]) -> tuple[Plan, list[str], bool]:
    """The run's stored plan where it has one, when the data are still those that it was made of; else a new one.

    Returns the plan, the settings that changed since the run was last started, and whether the plan is new.

    Args:
        tell: gets a sentence about what a filter keeps.

    Raises:
        UserError: faults of the data, or a run directory of something else.
    """
    changes = run.check_same(spec)
    stored = run.load_plan()
    if stored:
        run.check_data(stored)
        return stored, changes, False
    return read_plan(spec.data, spec.batch.global_, tell), changes, True


def runs_url() -> str:
    """Where runs are looked up by name."""
    return os.environ.get("DLTRAIN_RUNS", "./runs")


def find_run(name: str) -> RunDir:
    """A run by name or URL.

    Raises:
        UserError: there is none.
    """
    looks_like_path = "/" in name or "://" in name
    run = RunDir(open_store(name) if looks_like_path else open_store(runs_url()).child(name))
    if not run.store.exists("spec.yaml"):
        where = run.url if looks_like_path else f"{runs_url()} (set DLTRAIN_RUNS for another place)"
        known = "" if looks_like_path else f"; there are: {', '.join(list_runs()) or 'none'}"
        raise UserError(f"no run {name!r} at {where}{known}")
    return run


def list_runs() -> list[str]:
    """Names of the runs under $DLTRAIN_RUNS or ./runs."""
    store = open_store(runs_url())
    return [name for name in store.dirs() if store.exists(f"{name}/spec.yaml")]


def _differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    lines: list[str] = []
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            lines.append(f"{prefix}{name}: {old!r} -> {new!r}")
    return lines
