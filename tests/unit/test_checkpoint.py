"""Checkpoints in storage: whole or not at all, verified, pruned, read by slices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from dltrain.checkpoint import reader as reader_module
from dltrain.checkpoint.commit import (
    commit,
    discard,
    find,
    list_checkpoints,
    newest_good,
    prune,
    verify,
    write_rank,
)
from dltrain.checkpoint.export import export, state_dict
from dltrain.checkpoint.reader import FragmentReader
from dltrain.errors import CheckpointError, UserError
from dltrain.store import Store, open_store

WEIGHT = torch.arange(12, dtype=torch.float32).reshape(3, 4)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "checkpoints")


def save(store: Store, step: int, attempt: int = 1, best: int | None = None, offset: float = 0.0) -> None:
    """Two ranks that hold 5 and 7 elements of one weight, and a buffer each."""
    files = []
    for rank, (lo, hi) in enumerate(((0, 5), (5, 12))):
        values = WEIGHT.reshape(-1)[lo:hi] + offset
        tensors = {"param:w": values.clone(), "exp_avg:w": values * 2}
        parts: list[Any] = [["w", kind, [3, 4], f"{kind}:w", lo, hi - lo, 0] for kind in ("param", "exp_avg")]
        tensors["buffer:count"] = torch.tensor(7)
        files.append({**write_rank(store, step, attempt, rank, to_bytes(tensors)), "parts": parts})
    meta = {"position": step * 10, "whole": ["buffer:count"], "ties": {"head": "w"}, "num_ranks": 2}
    commit(store, step, attempt, files, {**meta, "best": {"step": best} if best else None})


def steps(store: Store) -> list[int]:
    return [c.step for c in list_checkpoints(store)]


def test_without_a_manifest_there_is_nothing(store: Store) -> None:
    write_rank(store, 5, 1, 0, to_bytes({"a": torch.zeros(1)}))
    assert list_checkpoints(store) == []
    save(store, 6)
    assert steps(store) == [6]


def test_the_highest_attempt_of_a_step_counts(store: Store) -> None:
    save(store, 5, attempt=2)
    save(store, 5, attempt=1, offset=100)
    assert [c.path for c in list_checkpoints(store)] == ["step-00000005/a0002"]


def test_verify_finds_each_kind_of_damage(store: Store) -> None:
    save(store, 5)
    (checkpoint,) = list_checkpoints(store)
    assert verify(store, checkpoint) == []
    path = Path(store.path(checkpoint.path, "rank-00001.safetensors"))
    good = path.read_bytes()
    for bad, said in ((good[:-1], "bytes instead of"), (good[:-1] + b"\x01", "checksum")):
        path.write_bytes(bad)
        assert said in verify(store, checkpoint)[0]
    path.unlink()
    assert "is missing" in verify(store, checkpoint)[0]


def test_falling_back_says_so(store: Store) -> None:
    save(store, 5)
    save(store, 10)
    Path(store.path("step-00000010/a0001/rank-00000.safetensors")).unlink()
    said: list[str] = []
    found = newest_good(store, said.append)
    assert found
    assert found.step == 5
    assert "step 10 is damaged" in said[0]
    assert newest_good(open_store(store.url + "-none"), said.append) is None


def test_pruning_keeps_the_newest_and_the_best(store: Store) -> None:
    for step in (5, 10, 15, 20):
        save(store, step, best=5)
    # An attempt that died before its manifest.
    write_rank(store, 12, 3, 0, to_bytes({"a": torch.zeros(1)}))
    write_rank(store, 25, 3, 0, to_bytes({"a": torch.zeros(1)}))
    assert prune(store, keep=2, best_step=5) == [10]
    assert steps(store) == [5, 15, 20]
    left = {name.split("/")[0] for name in store.list()}
    # What is being written now is left alone.
    assert left == {"step-00000005", "step-00000015", "step-00000020", "step-00000025"}


def test_discarding_removes_what_there_is(store: Store) -> None:
    write_rank(store, 5, 1, 0, to_bytes({"a": torch.zeros(1)}))
    discard(store, 5, 1)
    assert store.list() == []


def test_finding_what_the_user_means(store: Store) -> None:
    with pytest.raises(UserError, match="there are: none"):
        find(store)
    for step in (5, 10):
        save(store, step, best=5)
    assert [find(store, which).step for which in ("newest", "best", "10")] == [10, 5, 10]
    with pytest.raises(UserError, match="there are: 5, 10"):
        find(store, "7")


def test_a_torn_manifest_is_no_checkpoint(store: Store) -> None:
    save(store, 5)
    save(store, 10)
    path = Path(store.path("step-00000010/a0001/manifest.json"))
    path.write_bytes(path.read_bytes()[:40])
    assert steps(store) == [5]


@pytest.mark.parametrize("whole_bytes", [1 << 20, 0])
def test_reading_any_slice(store: Store, monkeypatch: pytest.MonkeyPatch, whole_bytes: int) -> None:
    """Small files are read whole, large ones by ranges; the answer is the same."""
    monkeypatch.setattr(reader_module, "_WHOLE_BYTES", whole_bytes)
    save(store, 5)
    reader = FragmentReader(store, find(store))
    flat = WEIGHT.reshape(-1)
    for lo in range(12):
        for length in range(1, 13 - lo):
            assert reader.read("w", "param", lo, length).tolist() == flat[lo : lo + length].tolist()
    assert torch.equal(reader.tensor("w", "exp_avg"), WEIGHT * 2)
    assert reader.whole("buffer:") == {"count": torch.tensor(7)}
    assert (reader.kinds("w"), reader.kinds("v")) == (("param", "exp_avg"), ())
    with pytest.raises(CheckpointError, match="lacks elements of w"):
        reader.read("w", "param", 10, 5)


def test_a_later_format_is_refused(store: Store) -> None:
    save(store, 5)
    checkpoint = find(store)
    later = type(checkpoint)(checkpoint.path, {**checkpoint.manifest, "format": 2})
    with pytest.raises(CheckpointError, match="format 2"):
        FragmentReader(store, later)


def test_exporting_weights(store: Store, tmp_path: Path) -> None:
    save(store, 5)
    size = export(store, find(store), str(tmp_path / "out" / "model.safetensors"))
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert size == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert set(loaded) == {"w", "head", "count"}
    assert torch.equal(loaded["w"], WEIGHT)
    assert torch.equal(state_dict(store, find(store))["head"], WEIGHT)


def test_the_manifest_is_plain_json(store: Store) -> None:
    save(store, 5)
    manifest = json.loads(store.read("step-00000005/a0001/manifest.json"))
    assert (manifest["format"], manifest["step"], manifest["position"]) == (1, 5, 50)
