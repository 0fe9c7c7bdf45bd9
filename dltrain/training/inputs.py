"""What a rank reads: the run's plan, which all ranks must have alike, and the readers of its datasets.

inputs = Inputs(job, task.columns)
inputs.check_same(device)
TrainStream(inputs.plan.mixture, inputs.readers, ...)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist

from dltrain.data.cache import NodeCache
from dltrain.data.fetch import LIMIT_BYTES
from dltrain.data.plan import Plan, check_plan, open_footers
from dltrain.data.reader import UnitReader, added
from dltrain.errors import RunFailedError
from dltrain.store import open_store
from dltrain.training.plan import RankJob

__all__ = ["Inputs"]


class Inputs:
    """One rank's.

    Args:
        columns: that the task names; None means all. The spec's own go before them.
        say: told what the user should know while it reads.

    Attributes:
        readers: of the datasets to train on, in the plan's order; eval_reader: of the one to evaluate on.

    Raises:
        DataError: a dataset lacks a column.
    """

    def __init__(self, job: RankJob, columns: tuple[str, ...] | None, say: Callable[[str], None]) -> None:
        self._job = job
        self._counted: Mapping[str, float] = {}
        # One rank of a node speaks for all.
        self._cache = _open_cache(job, say if job.environment.get("LOCAL_RANK", "0") == "0" else lambda _: None)
        store = open_store(job.run)
        # A large plan is not sent to each rank: it lies in the run directory.
        self.plan = Plan.from_bytes(job.plan if job.plan is not None else store.read("plan.arrow"))
        names = job.spec.data.columns or columns or tuple(self.plan.schema.names)
        check_plan(self.plan, names, job.spec.task)
        footers = open_footers(store, self.plan)
        room = LIMIT_BYTES // len(self.plan.catalogs)
        readers = [
            UnitReader(catalog, names, footers=kept, cache=self._cache, limit_bytes=room)
            for catalog, kept in zip(self.plan.catalogs, footers, strict=True)
        ]
        self._all = readers
        self.readers = readers[: len(self.plan.sources)]
        self.eval_reader = readers[-1] if self.plan.eval else None

    def check_same(self, device: torch.device) -> None:
        """Compares the plan with the driver's and all other ranks'; every rank must call it.

        Raises:
            RunFailedError: on every rank, when one of them has another plan.
        """
        mine = int(self.plan.plan_id, 16) - (1 << 63)
        found = [mine]
        if self._job.num_ranks > 1:
            gathered = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(self._job.num_ranks)]
            dist.all_gather(gathered, torch.tensor([mine], device=device))
            found = [int(t) for t in gathered]
        ids = [f"{number + (1 << 63):016x}" for number in found]
        other = [f"rank {rank} has {own}" for rank, own in enumerate(ids) if own != self._job.plan_id]
        if other:
            raise RunFailedError(
                f"the run was planned as {self._job.plan_id}, but {', '.join(other[:4])}: ranks would train different "
                "rows; see that all nodes run the same version of dltrain and read the same run directory"
            )

    def close(self) -> None:
        """Ends the readers' threads."""
        for reader in self._all:
            reader.close()

    def newly_counted(self) -> dict[str, float]:
        """What the readers and the cache counted since the last time, of what changed."""
        cached = self._cache.stats if self._cache else {}
        before, self._counted = self._counted, added(*(reader.stats for reader in self._all), cached)
        changes = ((name, number - before.get(name, 0)) for name, number in self._counted.items())
        return {name: change for name, change in changes if change}


def _open_cache(job: RankJob, say: Callable[[str], None]) -> NodeCache | None:
    spec = job.spec.data.cache
    return NodeCache(spec.dir, int(spec.gb * 1e9), say) if spec else None
