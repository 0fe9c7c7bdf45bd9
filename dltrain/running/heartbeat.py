"""The driver's heartbeat: a thread that asks every agent how it is, whatever else the driver is at.

heart = Heartbeat(agents=lambda: slots, lease_seconds=2.5)
heart.pulse(slot); heart.silent_seconds(slot)

Ray notices a lost machine after 15 to 65 s; this notices it as soon as an answer is overdue. Each beat renews the
agent's lease, so that one that is cut off ends its worker before anybody takes its place.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dltrain.running.messages import Pulse

__all__ = ["Heartbeat"]

_PERIOD_SECONDS = 0.5


@dataclass
class _Asked:
    """What is known of one agent."""

    heard: float
    ref: Any = None
    pulse: Pulse | None = None
    dead: str = ""


class Heartbeat:
    """Beats until closed.

    Args:
        slots: gives those to ask, at each beat.
    """

    def __init__(self, slots: Callable[[], Sequence[Any]], lease_seconds: float) -> None:
        self._slots, self._lease = slots, lease_seconds
        self._known: dict[Any, _Asked] = {}
        # When this thread last ran.
        self._awake = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dltrain-heartbeat", daemon=True)
        self._thread.start()

    def pulse(self, slot: Any) -> Pulse | None:
        """The last answer of a slot's agent."""
        asked = self._known.get(slot.agent)
        return asked.pulse if asked else None

    def silent_seconds(self, slot: Any) -> float:
        """Since the last answer; infinite when Ray says that the agent is dead."""
        asked = self._known.get(slot.agent)
        if asked is None:
            return 0.0
        return float("inf") if asked.dead else max(0.0, self._awake - asked.heard)

    def why_dead(self, slot: Any) -> str:
        """What Ray said of an agent's end."""
        asked = self._known.get(slot.agent)
        return asked.dead if asked else ""

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._closed.is_set():
            begin = time.monotonic()
            self._wake()
            with contextlib.suppress(Exception):  # Ray is shut down under us
                self._beat()
            self._wake()
            self._closed.wait(max(0.05, _PERIOD_SECONDS - (time.monotonic() - begin)))

    def _wake(self) -> None:
        """Who stood still itself has not listened: that time is nobody's silence."""
        now = time.monotonic()
        slept = now - self._awake - 2 * _PERIOD_SECONDS
        for asked in list(self._known.values()) if slept > 0 else ():
            asked.heard = min(now, asked.heard + slept)
        self._awake = now

    def _beat(self) -> None:
        import ray

        agents = [slot.agent for slot in self._slots()]
        for gone in [a for a in self._known if a not in agents]:
            del self._known[gone]
        for agent in agents:
            asked = self._known.setdefault(agent, _Asked(time.monotonic()))
            if asked.ref is None and not asked.dead:
                asked.ref = agent.beat.options(concurrency_group="beat").remote(self._lease)
        waiting = {asked.ref: asked for asked in self._known.values() if asked.ref is not None}
        if not waiting:
            return
        done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=_PERIOD_SECONDS)
        for ref in done:
            asked = waiting[ref]
            asked.ref = None
            try:
                asked.pulse = ray.get(ref)
                asked.heard = time.monotonic()
            except ray.exceptions.RayActorError as error:
                asked.dead = str(error).splitlines()[0]
            except ray.exceptions.RayError:
                # It answers, if only with an error.
                asked.heard = time.monotonic()
