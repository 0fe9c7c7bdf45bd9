"""Ray's side of a run: connect, ask for slots one bundle each, put an agent on every one that is ready.

with connect(address) as cluster:
    slots = Slots(cluster, workers)
    slots.want(4); slots.ready()
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dltrain.errors import UserError
from dltrain.running.agent import Agent, SlotInfo
from dltrain.running.places import OwnGroups, Place, Places
from dltrain.spec import WorkersSpec

__all__ = ["Cluster", "Slot", "Slots", "connect"]

# A machine that was asked to be left is gone by then, or wants to be used again.
_AVOID_SECONDS = 120.0
_CLOSE_SECONDS = 15.0
_ASK_AGAIN_SECONDS = 15.0
# Set by Ray for what a job runs; with it comes the job's own runtime environment.
_IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"

# Then this process must not end by way of Ray, which would wait again.
head_is_gone = False


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster: whether it is ours alone (then it can't grow), and what it has."""

    private: bool
    cpus: float
    gpus: float

    def __str__(self) -> str:
        gpus = f", {self.gpus:g} GPUs" if self.gpus else ""
        return f"{'this machine' if self.private else 'the cluster'} has {self.cpus:g} CPUs{gpus}"


@dataclass
class Slot:
    """A place, and the agent on it."""

    place: Place
    agent: Any
    info: SlotInfo


@contextlib.contextmanager
def connect(address: str | None) -> Iterator[Cluster]:
    """Connects to the cluster of `address`, RAY_ADDRESS or the Ray job we are in; else starts a private one.

    A process that is connected already stays with that cluster.

    Raises:
        UserError: there is no cluster at that address.
    """
    import ray

    if ray.is_initialized():
        # A program's or notebook's own connection, which it goes on with afterwards.
        has = ray.cluster_resources()  # type: ignore[no-untyped-call]
        yield Cluster(False, has.get("CPU", 0.0), has.get("GPU", 0.0))
        return
    target = address or os.environ.get("RAY_ADDRESS") or "local"
    private = target == "local"
    options: dict[str, Any] = {"include_dashboard": False} if private else {}
    if private:
        # Its workers would run at niceness 15, which only root could take back.
        os.environ.setdefault("RAY_worker_niceness", "0")
    # Inherited by Ray's worker processes: an agent must find dltrain as this process does. In a job Ray sees to it.
    path = "" if private or _IN_A_JOB in os.environ else os.environ.get("PYTHONPATH", "")
    try:
        ray.init(
            address=target,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"PYTHONPATH": path}} if path else None,
            **options,
        )
    except ConnectionError as error:
        raise UserError(
            f"--address: no Ray cluster answers at {target}: {error}. Is it up, and reachable from here? "
            "If it wants a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        ) from None
    try:
        has = ray.cluster_resources()  # type: ignore[no-untyped-call]
        yield Cluster(private, has.get("CPU", 0.0), has.get("GPU", 0.0))
    finally:
        _within(_CLOSE_SECONDS, ray.shutdown)


def _within(seconds: float, close: Callable[[], object]) -> None:
    """Calls it, for no longer than that: Ray waits for ever for a head that is gone."""
    thread = threading.Thread(target=close, name="dltrain-close", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        global head_is_gone
        head_is_gone = True


class Slots:
    """The slots of a run.

    Args:
        workers: what one slot needs.
        places: where they are; default: wherever the cluster has room.
    """

    def __init__(self, cluster: Cluster, workers: WorkersSpec, places: Places | None = None) -> None:
        self._gpus = workers.gpus if workers.gpus != "auto" else int(cluster.gpus >= 1)
        self._bundle = {"CPU": workers.cpus, **workers.resources, **({"GPU": 1} if self._gpus else {})}
        self._places = places or OwnGroups(self._bundle)
        self._num_threads = max(1, int(workers.cpus))
        self._resources = workers.resources
        # the answer that is waited for -> the agent and its place
        self._pending: dict[Any, tuple[Place, Any]] = {}
        self.slots: list[Slot] = []
        # node -> until when nothing is placed there
        self._avoided: dict[str, float] = {}
        self._not_before = 0.0

    @property
    def device(self) -> str:
        """cuda when a slot has a GPU, else cpu."""
        return "cuda" if self._gpus else "cpu"

    def want(self, count: int) -> None:
        """Asks for slots until `count` are there or pending, or there are no more places."""
        if time.monotonic() < self._not_before:
            return
        for _ in range(count - len(self.slots) - len(self._pending)):
            place = self._places.take()
            if place is None:
                return
            self._ask(place)

    def _ask(self, place: Place) -> None:
        import ray

        # Answers that must not wait behind others have threads of their own.
        actor: Any = ray.remote(concurrency_groups={"beat": 1})(Agent)  # type: ignore[call-overload]
        agent = actor.options(
            num_cpus=self._bundle["CPU"],
            num_gpus=1 if self._gpus else 0,
            resources=self._resources,
            scheduling_strategy=place.strategy(),
            max_concurrency=8,
        ).remote(self.device, self._num_threads)
        self._pending[agent.hello.remote()] = (place, agent)

    def ready(self, wait_seconds: float) -> list[Slot]:
        """The slots whose agent answers, after waiting for news up to `wait_seconds`."""
        import ray

        if self._pending:
            ray.wait(list(self._pending), num_returns=1, timeout=wait_seconds)
            done, _ = ray.wait(list(self._pending), num_returns=len(self._pending), timeout=0)
            for ref in done:
                self._admit(ref)
        else:
            time.sleep(wait_seconds)
        return self.slots

    def _admit(self, ref: Any) -> None:
        import ray

        place, agent = self._pending.pop(ref)
        try:
            slot = Slot(place, agent, ray.get(ref))
        except ray.exceptions.RayError:
            place.release()
            return
        if time.monotonic() < self._avoided.get(slot.info.node_id, 0.0):
            self._give_back(slot)
            self._not_before = time.monotonic() + _ASK_AGAIN_SECONDS
        else:
            self.slots.append(slot)

    def lose(self, slot: Slot) -> None:
        """Gives a slot up whose agent is gone."""
        if slot in self.slots:
            self.slots.remove(slot)
            slot.place.release()

    def drop(self, is_gone: Callable[[Slot], bool]) -> None:
        """Gives up those whose agents are gone."""
        for slot in [slot for slot in self.slots if is_gone(slot)]:
            self.lose(slot)

    def leave(self, slot: Slot) -> None:
        """Gives a slot up whose machine is to be left; nothing is placed there for a while."""
        self._avoided[slot.info.node_id] = time.monotonic() + _AVOID_SECONDS
        if slot in self.slots:
            self.slots.remove(slot)
            self._give_back(slot)

    def _give_back(self, slot: Slot) -> None:
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            ray.wait([slot.agent.close.remote()], timeout=5)
        ray.kill(slot.agent)
        slot.place.release()

    def close(self) -> None:
        """Ends the agents' processes and gives everything back."""
        import ray

        def close() -> None:
            closing = [slot.agent.close.remote() for slot in self.slots]
            with contextlib.suppress(ray.exceptions.RayError):
                ray.wait(closing, num_returns=len(closing), timeout=5) if closing else None
            for place, agent in [*self._pending.values(), *((s.place, s.agent) for s in self.slots)]:
                ray.kill(agent)
                place.release()

        _within(_CLOSE_SECONDS, close)
