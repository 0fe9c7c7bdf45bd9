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
from dltrain.running.agent import SlotInfo
from dltrain.running.cluster import Slot
from dltrain.running.events import AgentLost, Event
from dltrain.running.messages import Holding
from dltrain.training.plan import RankJob

__all__ = ["Group", "rank_environment"]

# News other than steps comes at once; steps may wait: asking costs the machines that train.
_POLL_SECONDS = 0.5
_KILL_SECONDS = 5.0
_START_SECONDS = 300.0
_STACK_SECONDS = 15.0


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
        self._lost: set[int] = set()

    @property
    def nodes(self) -> list[str]:
        """The node of each rank."""
        return [slot.info.node_id for slot in self.slots]

    def start(
        self,
        job: Callable[[int, Mapping[str, str]], tuple[RankJob, Mapping[str, Any]]],
        is_silent: Callable[[Slot], bool],
    ) -> None:
        """Gives every rank its job, with a rendezvous port that nobody else uses.

        Args:
            is_silent: of a slot whose agent is not to be waited for.

        Raises:
            ray.exceptions.RayError: an agent is gone.
        """
        (port,) = _answers({self.slots[0].agent.free_port.remote(): self.slots[0]}, is_silent)
        infos = [slot.info for slot in self.slots]
        jobs = [job(rank, rank_environment(infos, rank, port)) for rank in range(len(infos))]
        started = {s.agent.start.remote(*j): s for s, j in zip(self.slots, jobs, strict=True)}
        self.pids = _answers(started, is_silent)
        for rank in range(len(infos)):
            self._ask(rank)

    def _ask(self, rank: int) -> None:
        self._polls[self.slots[rank].agent.poll.remote(_POLL_SECONDS)] = rank

    def poll(self) -> Iterator[Event]:
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
                self._lost.add(rank)
                yield AgentLost(rank, str(error).splitlines()[0])
                continue
            self._ask(rank)
            if attempt == self.attempt:
                yield from events

    def lose(self, rank: int) -> None:
        """This rank's agent is not waited for any more."""
        self._lost.add(rank)

    def tell(self, command: str) -> None:
        """Passes a wish to every rank."""
        for slot in self.slots:
            slot.agent.tell.remote(command)

    def stacks(self) -> tuple[str, ...]:
        """What every rank is doing, told from outside."""
        import ray

        refs = [slot.agent.stacks.remote() for slot in self.slots]
        done = set(_done(refs, _STACK_SECONDS))
        return tuple(str(ray.get(ref)) if ref in done else "its agent does not answer" for ref in refs)

    def kill(self, slots: Sequence[Slot]) -> tuple[list[StepReport], list[tuple[Slot, Holding]]]:
        """Ends every worker at once; returns what they had yet to report, and the snapshots that are held.

        Args:
            slots: those that are there, this group's and others.
        """
        import ray

        lost = [self.slots[rank] for rank in self._lost]
        there = [slot for slot in slots if slot not in lost]
        killing = {slot.agent.kill.remote(self.attempt): slot for slot in there}
        # A question that is under way may have taken them already.
        asked = [ref for ref, rank in self._polls.items() if rank not in self._lost]
        self._polls = {}
        reports: list[StepReport] = []
        holdings: list[tuple[Slot, Holding]] = []
        answered: list[Slot] = []
        for ref in _done([*killing, *asked], _KILL_SECONDS):
            with contextlib.suppress(ray.exceptions.RayError):
                answer = ray.get(ref)
                if ref in killing:
                    answered.append(killing[ref])
                    reports += answer.reports
                    holdings += [(killing[ref], h) for h in answer.holdings]
                else:
                    reports += [event for event in answer[1] if isinstance(event, StepReport)]
        missing = [rank for rank, slot in enumerate(self.slots) if slot not in answered]
        return [*reports, *_reports_of(missing, answered)], holdings


def _answers(asked: Mapping[Any, Slot], is_silent: Callable[[Slot], bool]) -> list[Any]:
    """All answers, waited for as long as those who owe one are alive: a cold machine may import for a minute."""
    import ray

    deadline, left = time.monotonic() + _START_SECONDS, list(asked)
    while left:
        _, left = ray.wait(left, num_returns=len(left), timeout=_POLL_SECONDS)
        if any(is_silent(asked[ref]) for ref in left) or time.monotonic() > deadline:
            raise ray.exceptions.GetTimeoutError("an agent does not answer")
    return list(ray.get(list(asked)))


def _reports_of(ranks: Sequence[int], slots: Sequence[Slot]) -> list[StepReport]:
    """Of ranks whose agents are gone, from those who hold their black boxes."""
    import ray

    found: list[StepReport] = []
    for ref in _done([slot.agent.reports_of.remote(rank) for rank in ranks for slot in slots], _KILL_SECONDS):
        with contextlib.suppress(ray.exceptions.RayError):
            found += ray.get(ref)
    return found


def _done(refs: list[Any], seconds: float) -> list[Any]:
    import ray

    return ray.wait(refs, num_returns=len(refs), timeout=seconds)[0] if refs else []


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
