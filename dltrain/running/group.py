"""The group: the agents of one attempt as one thing to start, listen to, tell and kill.

group = Group(slots, attempt)
group.start(lambda rank: RankJob(...)); group.poll(0.25); group.tell("stop"); group.kill()
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dltrain.observing.reports import StepReport
from dltrain.running.agent import LogLine, SlotInfo
from dltrain.running.cluster import Slot
from dltrain.running.lifecycle import AgentLost, Event
from dltrain.training.plan import RankJob

__all__ = ["Group", "rank_environment"]

# News other than steps comes at once; steps may wait: asking costs the machines that train.
_POLL_SECONDS = 0.5
_KILL_SECONDS = 30.0


class Group:
    """The ranks of one attempt, in the order of nodes and GPUs.

    Args:
        slots: as many as there are ranks.
        attempt: reports of another attempt are left out.
    """

    def __init__(self, slots: Sequence[Slot], attempt: int) -> None:
        self.slots = sorted(slots, key=lambda s: (s.info.node_id, s.info.gpus))
        self.attempt = attempt
        self.pids: list[int] = []
        self._polls: dict[Any, int] = {}

    def start(self, job: Callable[[int, Mapping[str, str]], RankJob]) -> None:
        """Gives every rank its job, with a rendezvous port that nobody else uses.

        Raises:
            ray.exceptions.RayError: an agent is gone.
        """
        import ray

        port = ray.get(self.slots[0].agent.free_port.remote())
        infos = [slot.info for slot in self.slots]
        jobs = [job(rank, rank_environment(infos, rank, port)) for rank in range(len(infos))]
        self.pids = ray.get([s.agent.start.remote(j) for s, j in zip(self.slots, jobs, strict=True)])
        for rank in range(len(infos)):
            self._ask(rank)

    def _ask(self, rank: int) -> None:
        self._polls[self.slots[rank].agent.poll.remote(_POLL_SECONDS)] = rank

    def poll(self) -> Iterator[Event | LogLine]:
        """What the agents have, after waiting for one of them a moment; a lost one is news too."""
        import ray

        if not self._polls:
            time.sleep(_POLL_SECONDS)
            return
        done, _ = ray.wait(list(self._polls), num_returns=1, timeout=2 * _POLL_SECONDS)
        for ref in done:
            rank = self._polls.pop(ref)
            try:
                attempt, events = ray.get(ref)
            except ray.exceptions.RayError as error:
                yield AgentLost(rank, str(error).splitlines()[0])
                continue
            self._ask(rank)
            if attempt == self.attempt:
                yield from events

    def tell(self, command: str) -> None:
        """Passes a command to every rank."""
        for slot in self.slots:
            slot.agent.tell.remote(command)

    def kill(self, alive: Sequence[Slot]) -> list[StepReport]:
        """Ends every worker at once, on the slots that are still there; returns what they had yet to report."""
        import ray

        killing = [slot.agent.kill.remote() for slot in self.slots if slot in alive]
        # A question that is under way may have taken them already.
        asked, self._polls = list(self._polls), {}
        left: list[StepReport] = []
        for ref in _done([*killing, *asked]):
            with contextlib.suppress(ray.exceptions.RayError):
                answer = ray.get(ref)
                events = answer[1] if isinstance(answer, tuple) else answer
                left += [event for event in events if isinstance(event, StepReport)]
        return left


def _done(refs: list[Any]) -> list[Any]:
    import ray

    return ray.wait(refs, num_returns=len(refs), timeout=_KILL_SECONDS)[0] if refs else []


def rank_environment(infos: Sequence[SlotInfo], rank: int, port: int) -> dict[str, str]:
    """Where a rank is among all, and among those of its node.

    Every worker sees all GPUs of its node's slots, so that LOCAL_RANK is a valid device.
    """
    me = infos[rank]
    peers = [r for r, info in enumerate(infos) if info.node_id == me.node_id]
    environment = {
        "RANK": str(rank),
        "WORLD_SIZE": str(len(infos)),
        "LOCAL_RANK": str(peers.index(rank)),
        "LOCAL_WORLD_SIZE": str(len(peers)),
        "MASTER_ADDR": infos[0].address,
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": me.interface,
        "NCCL_SOCKET_IFNAME": me.interface,
    }
    if me.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(g for r in peers for g in infos[r].gpus)
    return environment
