"""jobs.gan_video: clips that are made on demand, and how it is counted whether they show what was asked for."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

from dltrain import Batch, Keys
from jobs.common import judge
from jobs.common.clips import ACTIONS, FRAMES, SIZE, clip_splits
from jobs.gan_video import PENALISED, GanVideo, make_data


class Turns(dict):  # type: ignore[type-arg]
    """As the framework's networks: whose turn it is, besides."""

    turn = ""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    assert make_data(str(path), 32, 24, epochs=0) == {"train": 32, "test": 24}
    return path


@pytest.fixture
def task(data: Path) -> GanVideo:
    return GanVideo(str(data / judge.FILE), width=2)


def batch_of(task: GanVideo, data: Path, rows: int, start: int = 0) -> Batch:
    (some,) = pq.read_table(data / "test").slice(start, rows).combine_chunks().to_batches()
    return task.collate(some, Keys(0, np.zeros(rows, np.int64), np.arange(start, start + rows)))


def means_of(*sums: Any) -> dict[str, Any]:
    return {name: sum(one[name].total for one in sums) / sum(one[name].count for one in sums) for name in sums[0]}


def test_clips_of_all_actions_without_noise(data: Path) -> None:
    found = pq.read_table(data / "test")
    assert sorted(found["action"].to_pylist()) == sorted(3 * list(range(len(ACTIONS))))
    clip = np.frombuffer(found["clip"][0].as_py(), np.uint8)
    assert clip.shape == (FRAMES * SIZE * SIZE,)
    assert (clip == 0).mean() > 0.5
    noisy = np.frombuffer(clip_splits(32, 24)["test"]["clip"][0].as_py(), np.uint8)
    # The same clip, but for the noise.
    assert 0 < np.abs(noisy.astype(int) - clip).mean() < 0.1 * 255


def test_a_clip_is_its_noise_and_its_action(task: GanVideo, data: Path) -> None:
    torch.manual_seed(0)
    networks, batch = task.build(), batch_of(task, data, 8)
    made = networks["generator"](batch.noise, batch.action)
    assert made.shape == (8, FRAMES, SIZE, SIZE)
    assert ((made >= 0) & (made <= 1)).all()
    assert torch.allclose(networks["generator"](batch.noise[3:5], batch.action[3:5]), made[3:5], atol=1e-6)
    other = networks["generator"](batch.noise, (batch.action + 1) % len(ACTIONS))
    assert (other - made).abs().flatten(1).amax(1).min() > 1e-4
    said = networks["discriminator"](batch.real, batch.action)
    assert said.shape == (8,)
    assert not torch.allclose(said, networks["discriminator"](batch.real, (batch.action + 1) % len(ACTIONS)))


def test_rows_make_the_same_noise_with_any_neighbours(task: GanVideo, data: Path) -> None:
    whole, part = batch_of(task, data, 6), batch_of(task, data, 2, start=4)
    for name in ("noise", "chance", "chosen", "real", "action"):
        assert torch.equal(whole[name][4:], part[name])


@pytest.mark.parametrize("turn", ["discriminator", "generator"])
def test_every_weight_has_part_in_its_turn(task: GanVideo, data: Path, turn: str) -> None:
    torch.manual_seed(0)
    networks, batch = Turns(task.build()), batch_of(task, data, 8)
    networks.turn = turn
    task.step(networks, batch)[turn].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in networks[turn].parameters())


class Slope(nn.Module):
    """A discriminator that is steep by 0.01 in each of a clip's pixels."""

    def forward(self, clips: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return 0.01 * clips.sum((1, 2, 3))


def test_the_penalty_of_a_few_rows_is_that_of_all(task: GanVideo, data: Path) -> None:
    batch = batch_of(task, data, 8)
    assert batch.chosen.sum() == 8 / PENALISED
    networks = Turns(discriminator=Slope(), generator=task.build()["generator"])
    networks.turn = "discriminator"
    losses = []
    for task.penalty in (0.0, 3.0):
        losses.append(task.step(networks, batch)["discriminator"].item())
    assert losses[1] - losses[0] == pytest.approx(3 / 2 * FRAMES * SIZE * SIZE * 1e-4, rel=1e-3)


def test_recognised_is_what_was_asked_for(task: GanVideo, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = task.build(), [batch_of(task, data, 16), batch_of(task, data, 8, start=16)]
    # Everything is taken for what moves up; the last one for what moves to the left.
    taken = torch.eye(len(ACTIONS))[[2] * 15 + [0]]
    monkeypatch.setattr(judge, "judged", lambda _, x: (x.flatten(1)[:, :4].double().numpy(), taken[-len(x) :]))
    with torch.no_grad():
        found = task.metrics(means_of(*(task.evaluate(model, batch) for batch in batches)))
    assert found["recognised"] == found["recognised_of_real"] == pytest.approx(3 / 24)
    assert (found["actions"], found["worst_action"]) == (1, 0)


def test_figures_of_clips_as_the_real_ones(task: GanVideo, data: Path) -> None:
    model = task.build()
    with torch.no_grad():
        means = means_of(task.evaluate(model, batch_of(task, data, 24)))
    same = {name.replace("real", "made"): value for name, value in means.items() if name.startswith("real")}
    assert task.metrics({**means, **same})["distance"] == pytest.approx(0, abs=1e-6)
    assert task.metrics(means)["distance"] > 0.01


def test_animations_of_each_action(task: GanVideo, data: Path) -> None:
    model = task.build()
    with torch.no_grad():
        made = task.generate(model, 10)
        shown = task.samples(model, batch_of(task, data, 16))
    assert [one["action"] for one in made] == [*ACTIONS, *ACTIONS[:2]]
    assert made[0]["clip"].data != made[8]["clip"].data
    clip = Image.open(io.BytesIO(made[0]["clip"].data))
    assert (clip.format, clip.size) == ("GIF", (4 * SIZE, 4 * SIZE))
    assert [one.media_type for one in shown] == ["image/png"] * 2 + ["image/gif"] * len(ACTIONS)
    assert shown[0].caption.startswith("made")
    assert task.generate(model, 1)[0]["clip"].caption == ACTIONS[0]
