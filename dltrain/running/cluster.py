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
from dltrain.spec import WorkersSpec

__all__ = ["Cluster", "Slot", "Slots", "connect"]

# A machine that was asked to be left is gone by then, or wants to be used again.
_AVOID_SECONDS = 120.0
_CLOSE_SECONDS = 15.0
_ASK_AGAIN_SECONDS = 15.0

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
    """A placement group of one bundle, and the agent on it."""

    group: Any
    agent: Any
    info: SlotInfo


@contextlib.contextmanager
def connect(address: str | None) -> Iterator[Cluster]:
    """Connects to the cluster of `address`, RAY_ADDRESS or the Ray job we are in; else starts a private one.

    Raises:
        UserError: there is no cluster at that address.
    """
    import ray

    target = address or os.environ.get("RAY_ADDRESS") or "local"
    private = target == "local"
    options: dict[str, Any] = {"include_dashboard": False} if private else {}
    if private:
        # Its workers would run at niceness 15, which only root could take back.
        os.environ.setdefault("RAY_worker_niceness", "0")
    # Inherited by Ray's worker processes: an agent must find dltrain as this process does.
    runtime_env = {"env_vars": {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}}
    try:
        ray.init(
            address=target,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env=None if private else runtime_env if runtime_env["env_vars"]["PYTHONPATH"] else None,
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
    """

    def __init__(self, cluster: Cluster, workers: WorkersSpec) -> None:
        self._gpus = workers.gpus if workers.gpus != "auto" else int(cluster.gpus >= 1)
        self._bundle = {"CPU": workers.cpus, **workers.resources, **({"GPU": 1} if self._gpus else {})}
        self._num_threads = max(1, int(workers.cpus))
        self._resources = workers.resources
        # the answer that is waited for -> (group, agent)
        self._pending: dict[Any, tuple[Any, Any]] = {}
        self.slots: list[Slot] = []
        # node -> until when nothing is placed there
        self._avoided: dict[str, float] = {}
        self._not_before = 0.0

    @property
    def device(self) -> str:
        """cuda when a slot has a GPU, else cpu."""
        return "cuda" if self._gpus else "cpu"

    def want(self, count: int) -> None:
        """Asks for slots until `count` are there or pending.

        One group each: a group of many bundles is all or nothing, and says nothing about what is missing.
        """
        if time.monotonic() < self._not_before:
            return
        for _ in range(count - len(self.slots) - len(self._pending)):
            self._ask()

    def _ask(self) -> None:
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = placement_group([self._bundle])
        # Answers that must not wait behind others have threads of their own.
        actor: Any = ray.remote(concurrency_groups={"beat": 1})(Agent)  # type: ignore[call-overload]
        # It is queued until its group has a place.
        agent = actor.options(
            num_cpus=self._bundle["CPU"],
            num_gpus=1 if self._gpus else 0,
            resources=self._resources,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
            max_concurrency=8,
        ).remote(self.device, self._num_threads)
        self._pending[agent.hello.remote()] = (group, agent)

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

        group, agent = self._pending.pop(ref)
        try:
            slot = Slot(group, agent, ray.get(ref))
        except ray.exceptions.RayError:
            self._release(group)
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
            self._release(slot.group)

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
        self._release(slot.group)

    def _release(self, group: Any) -> None:
        from ray.util import remove_placement_group

        remove_placement_group(group)

    def close(self) -> None:
        """Ends the agents' processes and gives everything back."""
        import ray

        def close() -> None:
            closing = [slot.agent.close.remote() for slot in self.slots]
            with contextlib.suppress(ray.exceptions.RayError):
                ray.wait(closing, num_returns=len(closing), timeout=5) if closing else None
            for group, agent in [*self._pending.values(), *((s.group, s.agent) for s in self.slots)]:
                ray.kill(agent)
                self._release(group)

        _within(_CLOSE_SECONDS, close)
