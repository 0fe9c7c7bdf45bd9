"""Memory that outlives its writer: slots, black boxes, what agents hold, and where an attempt goes on from."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from dltrain.checkpoint.slots import HeldSlots, Seal, SlotPlace, SlotStore, SlotWriter, copy_of
from dltrain.checkpoint.snapshot import _lay_out
from dltrain.observing.reports import StepReport
from dltrain.running import blackbox
from dltrain.running.holdings import Holdings
from dltrain.running.messages import Holding, Slots
from dltrain.running.recovery import buddies, newest_point


@pytest.fixture
def writer() -> Iterator[SlotWriter]:
    made = SlotWriter(b"head", 12, count=5)
    yield made
    made.close()


def write(writer: SlotWriter, step: int, text: bytes = b"") -> int:
    index = writer.free()
    assert index is not None

    def copy() -> None:
        writer.memory(index)[4:12] = text or b"%08d" % step

    writer.write(index, Seal(1, step, step * 10, step), copy)
    return index


def held_by(writer: SlotWriter) -> HeldSlots:
    return HeldSlots.open(os.getpid(), writer.fds, writer.num_bytes)


def test_the_newest_two_are_never_written_over(writer: SlotWriter) -> None:
    held = held_by(writer)
    assert held.seals() == {}
    for step in range(1, 30):
        write(writer, step)
        steps = {seal.step: index for index, seal in held.seals().items()}
        assert set(range(max(1, step - 1), step + 1)) <= set(steps)
        assert held.read(steps[step]) == b"head%08d" % step
        assert held.read(steps[step], 6, 9) == (b"head%08d" % step)[6:9]
    held.close()


def test_a_pinned_slot_stays_until_it_is_unpinned(writer: SlotWriter) -> None:
    held = held_by(writer)
    pinned = [write(writer, step) for step in (1, 2)]
    for index in pinned:
        writer.pin(index)
    for step in range(3, 9):
        write(writer, step)
    assert [held.seal(i).step for i in pinned] == [1, 2]  # type: ignore[union-attr]
    writer.pin(next(i for i, s in held.seals().items() if s.step == 6))
    assert writer.free() is None
    writer.unpin(pinned[0])
    assert writer.free() == pinned[0]
    held.close()


def test_a_step_taken_twice_does_not_push_the_one_before_out(writer: SlotWriter) -> None:
    held = held_by(writer)
    for step in (1, 2, 2, 2, 2):
        write(writer, step)
    write(writer, 3)
    assert {2, 3} <= {seal.step for seal in held.seals().values()}
    held.close()


def test_a_slot_that_is_being_written_is_not_there(writer: SlotWriter) -> None:
    held = held_by(writer)
    index = write(writer, 1)

    def interrupted() -> None:
        assert held.seal(index) is None
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writer.write(index, Seal(1, 2, 20, 2), interrupted)
    assert held.seal(index) is None
    held.close()


CHILD = """
import os, sys, time
from dltrain.checkpoint.slots import Seal, SlotWriter
writer = SlotWriter(b"", 4 << 20, count=5)
print(*writer.fds, flush=True)
step = 0
while True:
    step += 1
    index = writer.free()
    def copy():
        memory = writer.memory(index)
        for at in range(0, 4 << 20, 1 << 16):
            memory[at:at + (1 << 16)] = bytes([step % 256]) * (1 << 16)
    writer.write(index, Seal(1, step, step, step), copy)
"""


def test_what_a_killed_writer_leaves_is_whole() -> None:
    for pause in (0.05, 0.08, 0.13):
        child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        held = HeldSlots.open(child.pid, list(map(int, child.stdout.readline().split())), 4 << 20)
        while len(held.seals()) < 2:
            time.sleep(0.01)
        time.sleep(pause)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        seals = held.seals()
        newest = max(seal.step for seal in seals.values())
        assert {newest, newest - 1} <= {seal.step for seal in seals.values()}
        for index, seal in seals.items():
            assert set(held.read(index)) == {seal.step % 256}
        held.close()


def test_slots_of_a_process_that_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    with pytest.raises(OSError, match=str(child.pid)):
        HeldSlots.open(child.pid, [5], 10)


def test_the_layout_is_a_safetensors_file() -> None:
    tensors: dict[str, Any] = {
        "flag": (torch.bool, (3,)),
        "step": (torch.int64, ()),
        "param:00000": (torch.float32, (7,)),
        "half": (torch.bfloat16, (2, 3)),
        "none": (torch.float32, (0,)),
    }
    head, places = _lay_out(tensors)
    data = bytearray(head) + bytearray(max(p.end for p in places))
    for p in places:
        assert p.begin % p.dtype.itemsize == 0
    found = load(bytes(data))
    assert {k: (t.dtype, tuple(t.shape)) for k, t in found.items()} == tensors


# ---- the store over slots ----


def test_reading_by_name_here_and_elsewhere() -> None:
    fd = copy_of(b"0123456789")
    asked = []

    def ask(name: str, start: int, end: int) -> bytes:
        asked.append((name, start, end))
        return b"elsewhere"

    places = {"a": SlotPlace(os.getpid(), fd, 10), "b": SlotPlace(0, -1, 9)}
    store = SlotStore(places, ask)
    assert store.read("memory/a") == b"0123456789"
    assert store.read("memory/a", 3, 5) == b"34"
    assert store.read("memory/b", 2) == b"elsewhere"
    assert asked == [("b", 2, 9)]
    store.close()
    os.close(fd)


# ---- the black box ----


@given(st.lists(st.binary(max_size=300), max_size=60))
def test_the_newest_reports_are_there_in_order(records: list[bytes]) -> None:
    box = blackbox.BlackBox(2048)
    for record in records:
        box.add(record)
    found = blackbox.reports(box.fd)
    assert found == records[len(records) - len(found) :]
    # At least half of the ring is always filled, once so much was said.
    assert sum(len(r) + 4 for r in found) >= min(sum(len(r) + 4 for r in records), 700)
    os.close(box.fd)


def test_a_sign_of_life() -> None:
    box = blackbox.BlackBox()
    box.alive("step")
    first = blackbox.look(box.fd)
    box.alive("eval")
    second = blackbox.look(box.fd)
    assert (first.phase, second.phase) == ("step", "eval")
    assert second.count > first.count
    box.add(b"x" * (2 << 20))
    assert blackbox.reports(box.fd) == []
    os.close(box.fd)


# ---- what an agent holds ----


def test_holdings_outlive_the_writer_and_are_let_go(writer: SlotWriter) -> None:
    box = blackbox.BlackBox()
    report = StepReport(3, 7, 70, 8, 8, 1.0, 1.0, 0.1, True, True, {}, 0.1, {}, attempt=1)
    box.add(pickle.dumps(report))
    for step in (6, 7):
        write(writer, step)
    here = len(os.listdir("/proc/self/fd"))
    holdings = Holdings()
    slots = Slots(1, 3, os.getpid(), writer.fds, box.fd, 12, [["w"]], ["buffer:b"], {})
    ours = holdings.open(slots, mine=True)
    assert ours is not None
    assert holdings.mine() == ours
    assert ours.fds != writer.fds
    assert sorted((h.rank, h.step, h.position) for h in holdings.all()) == [(3, 6, 60), (3, 7, 70)]
    assert holdings.read(1, 3, 7, 4, 12) == b"00000007"
    assert holdings.read(1, 3, 5, 0, 12) is None
    assert holdings.reports(3) == [report]
    copied = holdings.copy(1, 3, 6)
    assert copied is not None
    assert holdings.slot_bytes(1, 6, 0) == (ours, b"head00000006")
    # Written again since it was asked for, or another attempt's.
    assert holdings.slot_bytes(1, 5, 0) is holdings.slot_bytes(2, 6, 0) is None
    other = Holdings()
    for _ in range(4):
        other.keep(*copied, [])
    assert [(h.step, h.pid) for h in other.all()] == [(6, os.getpid())] * 2
    assert other.read(1, 3, 6, 0, 12) == b"head00000006"
    other.forget(2)
    holdings.forget(2)
    assert holdings.all() == other.all() == []
    assert len(os.listdir("/proc/self/fd")) == here
    os.close(box.fd)


def test_copies_of_the_attempt_before_stay_until_there_are_as_many_of_this_one() -> None:
    holdings = Holdings()
    here = len(os.listdir("/proc/self/fd"))
    for attempt, step in ((1, 8), (1, 9), (2, 10)):
        holdings.keep(holding(attempt, 0, step), b"", [])
    assert [(h.attempt, h.step) for h in holdings.all()] == [(1, 8), (1, 9), (2, 10)]
    holdings.keep(holding(1, 1, 9), b"", [])
    for step in (11, 12):
        holdings.keep(holding(2, 0, step), b"", [])
    assert [(h.attempt, h.rank, h.step) for h in holdings.all()] == [(1, 1, 9), (2, 0, 11), (2, 0, 12)]
    holdings.keep(holding(3, 0, 13), b"", [])
    holdings.forget(4, but=2)
    assert [(h.attempt, h.step) for h in holdings.all()] == [(2, 11), (2, 12)]
    holdings.forget(4)
    assert len(os.listdir("/proc/self/fd")) == here


# ---- where to go on from ----


def holding(attempt: int, rank: int, step: int) -> Holding:
    return Holding(attempt, rank, step, step * 16, step, 1, 2, 100, [], [], {})


def test_the_newest_step_that_all_ranks_left() -> None:
    held = [("a", holding(1, 0, 7)), ("a", holding(1, 0, 8)), ("b", holding(1, 1, 6)), ("b", holding(1, 1, 7))]
    point = newest_point(held, {1: 2})
    assert point is not None
    assert (point.attempt, point.step, [holder for holder, _ in point.ranks]) == (1, 7, ["a", "b"])
    # Rank 1's agent is gone, and with it what only it had.
    assert newest_point(held[:2], {1: 2}) is None
    # Its buddy has it.
    point = newest_point([*held[:2], ("a", holding(1, 1, 7))], {1: 2})
    assert point is not None
    assert [holder for holder, _ in point.ranks] == ["a", "a"]


def test_a_later_attempt_counts_once_it_has_left_something() -> None:
    old = [("a", holding(1, 0, 9)), ("b", holding(1, 1, 9))]
    half = [("a", holding(2, 0, 10))]
    ranks_of = {1: 2, 2: 3}
    point = newest_point([*old, *half], ranks_of)
    assert point is not None
    assert (point.attempt, point.step) == (1, 9)
    whole = [("a", holding(2, rank, 10)) for rank in range(3)]
    point = newest_point([*old, *whole], ranks_of)
    assert point is not None
    assert (point.attempt, point.step, len(point.ranks)) == (2, 10, 3)
    assert point.manifest()["position"] == 160


def test_places_are_open_on_their_own_node_and_asked_for_elsewhere() -> None:
    point = newest_point([("n1", holding(1, 0, 7)), ("n2", holding(1, 1, 7))], {1: 2})
    assert point is not None
    here, there = point.places("n1", str)
    assert [(name, place.pid) for name, place in here.items()] == [
        ("rank-00000.safetensors", 1),
        ("rank-00001.safetensors", 0),
    ]
    assert there == {"rank-00001.safetensors": ("n2", 1, 1, 7)}


def test_buddies_are_near_and_far() -> None:
    assert buddies(["a"], 0) == (None, None)
    assert buddies(["a", "a"], 0) == (1, None)
    assert buddies(["a", "b", "c"], 2) == (None, 0)
    assert buddies(["a", "a", "b", "b"], 1) == (0, 2)
    assert [buddies(["a", "a", "b"], rank)[1] for rank in range(3)] == [2, 2, 0]


def open_files() -> list[str]:
    links = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
    return links


def test_nothing_has_a_name_in_shared_memory(writer: SlotWriter) -> None:
    write(writer, 1)
    assert not [link for link in open_files() if link.startswith("/dev/shm")]
    assert "memfd:dltrain-snapshot" in os.readlink(Path("/proc/self/fd", str(writer.fds[0])))
