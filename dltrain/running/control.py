"""What the short commands do to a run: stop it, and look after its checkpoints."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dltrain.checkpoint.commit import Checkpoint, find, list_checkpoints, verify
from dltrain.data.audit import audit
from dltrain.errors import UserError
from dltrain.observing.reports import OVER
from dltrain.running.diagnose import doorbells, ring
from dltrain.running.rundir import find_run
from dltrain.running.trail import Trail

__all__ = ["audit_run", "checkpoint_table", "drain_host", "stop_run", "verify_checkpoints"]

_OVER = (*OVER, "lost")
_POLL_SECONDS = 0.2


def stop_run(name: str, wait: bool, sleep: Callable[[float], None] = time.sleep) -> dict[str, Any]:
    """Asks a run to stop, and waits until it has.

    Raises:
        UserError: it is not running.
    """
    run = find_run(name)
    state = run.state()
    if state is None or state["state"] in _OVER:
        found = state["state"] if state else "not started"
        raise UserError(f"{name} is not running ({found}); there is nothing to stop")
    run.request_stop()
    while wait and state["state"] not in _OVER:
        sleep(_POLL_SECONDS)
        state = run.state() or state
    return state


def checkpoint_table(name: str) -> list[dict[str, Any]]:
    """A run's checkpoints, oldest first."""
    found = list_checkpoints(find_run(name).checkpoints)
    best = _best_step(found)
    return [
        {
            "step": c.step,
            "num_ranks": c.manifest["num_ranks"],
            "zero": c.manifest["zero"],
            "bytes": c.num_bytes,
            "metrics": c.manifest.get("metrics") or {},
            "best": c.step == best,
            "path": c.path,
        }
        for c in found
    ]


def _best_step(found: list[Checkpoint]) -> int | None:
    best = found[-1].manifest.get("best") if found else None
    return int(best["step"]) if best else None


def verify_checkpoints(name: str) -> list[dict[str, Any]]:
    """Every checkpoint with what is wrong with it."""
    store = find_run(name).checkpoints
    return [{"step": c.step, "path": c.path, "problems": verify(store, c)} for c in list_checkpoints(store)]


def drain_host(wait_seconds: float) -> dict[str, Any]:
    """Asks the agents of this host to move their work away, and waits until they have.

    Returns how many there were and how many are still here.
    """
    bells = doorbells()
    with ThreadPoolExecutor(max(1, len(bells))) as pool:
        left = list(pool.map(lambda bell: ring(bell, wait_seconds), bells))
    return {"agents": len(bells), "left": sum(left), "still_here": len(bells) - sum(left)}


def audit_run(name: str) -> dict[str, Any]:
    """Compares the rows that a run's newest checkpoint was trained on with those that it should have been.

    Raises:
        UserError: there is no checkpoint, or it is of a version that kept no account of its rows.
    """
    run = find_run(name)
    checkpoint = find(run.checkpoints)
    plan = run.load_plan()
    saved = checkpoint.manifest.get("audit")
    if plan is None or saved is None:
        raise UserError(f"the checkpoint of step {checkpoint.step} has no account of the rows it was trained on")
    trail = Trail.of(saved)
    lines = audit(plan.mixture, int(checkpoint.manifest["position"]), trail.sums, trail.replaced, plan.names)
    epochs = [{**dataclasses.asdict(line), "ok": line.ok, "text": str(line)} for line in lines]
    return {"run": name, "step": checkpoint.step, "epochs": epochs, "ok": all(line.ok for line in lines)}
