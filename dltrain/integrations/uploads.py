"""A rank's checkpoints where no agent writes them: uploaded by a thread of the rank, made whole by rank 0.

uploads = Uploads(job, run, say)
uploads.slots_made(report); uploads.save(wanted, manifest, unpin=loop.unpin); uploads.close()

Each rank writes its file, and beside it a note of what is in it. When all notes of a checkpoint are there rank 0 writes
its manifest: training goes on meanwhile, and nobody waits in a collective for somebody's upload.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dltrain.checkpoint.commit import directory, write_rank
from dltrain.errors import CheckpointError
from dltrain.observing.reports import Saved, SaveFailed, SaveWanted, SlotsMade
from dltrain.running.holdings import Holdings
from dltrain.running.keeper import Keeper
from dltrain.running.messages import Slots
from dltrain.running.rundir import RunDir
from dltrain.training.plan import RankJob

__all__ = ["Uploads"]

_WAIT_SECONDS = 600.0
_PAUSES = (0.05, 1.0)


class Uploads:
    """One rank's.

    Args:
        keeper: rank 0's, which commits; None elsewhere.
        say: told of a checkpoint that is lost.
    """

    def __init__(self, job: RankJob, run: RunDir, keeper: Keeper | None, say: Callable[[str], None]) -> None:
        self._job, self._store, self._keeper, self._say = job, run.checkpoints, keeper, say
        self._holdings = Holdings()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dltrain-upload")
        self._commits = ThreadPoolExecutor(1, thread_name_prefix="dltrain-notes")

    def slots_made(self, report: SlotsMade) -> None:
        """Where this process's snapshots are."""
        self._holdings.open(Slots.made(report, self._job.attempt, os.getpid(), -1), mine=True)

    def save(self, wanted: SaveWanted, manifest: Mapping[str, Any], unpin: Callable[[int], None]) -> None:
        """Begins to write a snapshot; its slot is unpinned when it has been.

        Args:
            manifest: what rank 0 knows of the run at this step.
        """
        self._thread.submit(self._upload, wanted, unpin)
        if self._keeper:
            self._commits.submit(self._commit, self._keeper, wanted.step, manifest)

    def failed(self, report: SaveFailed, manifest: Mapping[str, Any]) -> None:
        """This rank has no part of a checkpoint that the others may be writing."""
        self._thread.submit(self._note, report.step, {"error": report.reason})
        if self._keeper:
            self._commits.submit(self._commit, self._keeper, report.step, manifest)

    def close(self) -> None:
        """Waits for what is under way."""
        self._thread.shutdown(wait=True)
        self._commits.shutdown(wait=True)
        if self._keeper:
            self._keeper.close()
            self._tell(self._keeper)

    # ---- in a thread of its own ----

    def _upload(self, wanted: SaveWanted, unpin: Callable[[int], None]) -> None:
        note: dict[str, Any]
        try:
            note = self._write(wanted)
        except Exception as error:  # whatever it is, rank 0 waits for a note
            note = {"error": f"{type(error).__name__}: {error}"}
        unpin(wanted.slot)
        self._note(wanted.step, note)

    def _write(self, wanted: SaveWanted) -> dict[str, Any]:
        job = self._job
        found = self._holdings.slot_bytes(job.attempt, wanted.step, wanted.slot)
        if found is None:
            raise CheckpointError("the memory of the snapshot has been used for another one")
        slots, data = found
        file = write_rank(self._store, wanted.step, job.attempt, job.rank, data)
        whole = {"optimizer_step": wanted.applied, "whole": slots.whole, "ties": dict(slots.ties)}
        meta = whole if job.rank == 0 else {}
        return {"position": wanted.position, "file": {**file, "parts": slots.parts}, "meta": meta}

    def _note(self, step: int, note: Mapping[str, Any]) -> None:
        try:
            self._store.write(self._name(step, self._job.rank), json.dumps(note).encode())
        except Exception as error:  # rank 0 will miss it
            self._say(f"step {step}: {error}")

    def _name(self, step: int, rank: int) -> str:
        return f"{directory(step, self._job.attempt)}/note-{rank:05d}.json"

    # ---- rank 0, in another thread ----

    def _commit(self, keeper: Keeper, step: int, manifest: Mapping[str, Any]) -> None:
        attempt = self._job.attempt
        notes = [self._wait(step, rank) for rank in range(self._job.num_ranks)]
        errors = [f"rank {rank}: {note['error']}" for rank, note in enumerate(notes) if "error" in note]
        if errors:
            keeper.discard(step, attempt, errors[0])
        else:
            for rank, note in enumerate(notes):
                keeper.saved(Saved(rank, step, int(note["position"]), note["file"], 0.0, note["meta"]))
            keeper.commit(step, attempt, manifest, lambda: self._forget_notes(step))
        self._tell(keeper)

    def _wait(self, step: int, rank: int) -> dict[str, Any]:
        deadline, (pause, longest) = time.monotonic() + _WAIT_SECONDS, _PAUSES
        while True:
            try:
                note: dict[str, Any] = json.loads(self._store.read(self._name(step, rank)))
                return note
            except FileNotFoundError:
                if time.monotonic() > deadline:
                    return {"error": f"its part was not written within {_WAIT_SECONDS:g} s"}
            except Exception as error:  # the store is away; the files may be there
                if time.monotonic() > deadline:
                    return {"error": str(error)}
            time.sleep(pause)
            pause = min(2 * pause, longest)

    def _forget_notes(self, step: int) -> None:
        for rank in range(self._job.num_ranks):
            self._store.delete(self._name(step, rank))

    def _tell(self, keeper: Keeper) -> None:
        for event, _ in keeper.take():
            if event.reason:
                self._say(f"step {event.step}: the checkpoint could not be saved ({event.reason})")
