"""jobs.gan_image and what judges it: Frechet distances by sums, and a classifier that lies beside the data."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from dltrain import Batch, Keys
from dltrain.errors import UserError
from jobs.common import judge
from jobs.common.digits import SIDE, digit_splits
from jobs.common.frechet import frechet, moments
from jobs.gan_image import EACH, NOISE, GanImage, make_data
from jobs.image_cnn import ImageCnn


class Networks(dict):  # type: ignore[type-arg]
    """As the framework's: whose turn it is, besides."""

    turn = ""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    assert make_data(str(path), epochs=0) == {"train": 1438, "eval": 1797}
    return path


def task_of(data: Path) -> GanImage:
    return GanImage(str(data / judge.FILE), width=4)


def batch_of(task: GanImage, data: Path, rows: int, start: int = 0) -> Batch:
    (some,) = pq.read_table(data / "eval").slice(start, rows).combine_chunks().to_batches()
    return task.collate(some, Keys(0, np.zeros(rows, np.int64), np.arange(start, start + rows)))


def means_of(*sums: dict) -> dict:  # type: ignore[type-arg]
    return {
        name: sum(one[name].total for one in sums) / max(1, sum(one[name].count for one in sums)) for name in sums[0]
    }


class Plain(ImageCnn):
    """A perceptron, which is quick."""

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 16), nn.ReLU(), nn.Linear(16, 10))

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(model(batch.image), batch.label)


def test_the_distance_of_normal_distributions() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200_000, 3))
    # Twice as wide in the first direction, farther by 1.5 in the last: (2 - 1) ** 2 + 1.5 ** 2.
    far = x * [2, 1, 1] + [0, 0, 1.5]
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    for one, other in ((x, far), (x @ turn, far @ turn)):
        means = means_of(moments("one", one) | moments("other", other))
        assert frechet(means, "one", "other") == pytest.approx(3.25, rel=0.02)
        assert frechet(means, "one", "other") == pytest.approx(frechet(means, "other", "one"))
        assert frechet(means, "one", "one") == pytest.approx(0, abs=1e-6)


def test_the_distance_is_the_same_in_any_parts() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 90, 8))
    whole = means_of(moments("x", x) | moments("y", y))
    parts = means_of(*(moments("x", x[cut]) | moments("y", y[cut]) for cut in (slice(0, 7), slice(7, 7), slice(7, 90))))
    assert frechet(parts, "x", "y") == pytest.approx(frechet(whole, "x", "y"), rel=1e-9)


def test_a_judge_is_always_the_same_and_learns(tmp_path: Path) -> None:
    task, rows = Plain(), digit_splits()["train"].slice(0, 320)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = judge.train(task, rows, epochs=12, rate=2e-2)
        after = torch.rand(1)
        torch.manual_seed(1)
        # Nobody else's random numbers are used.
        assert torch.equal(after, torch.rand(1))
    judge.save(str(tmp_path), first)
    again = judge.load(str(tmp_path / judge.FILE), task)
    batch = task.collate(rows.to_batches()[0], Keys(0, np.zeros(320, np.int64), np.arange(320)))
    features, chances = judge.judged(again, batch.image)
    assert features.shape == (320, 16)
    assert torch.equal(chances, judge.judged(judge.train(task, rows, epochs=12, rate=2e-2), batch.image)[1])
    assert (chances.argmax(1) == batch.label).float().mean() > 0.8
    with pytest.raises(UserError, match="make-data writes it"):
        judge.load(str(tmp_path / "none.safetensors"), task)


def test_what_is_held_out_comes_first(data: Path) -> None:
    train, found = (pq.read_table(data / name) for name in ("train", "eval"))
    scans = digit_splits()
    assert not any(train["held"].to_pylist())
    assert found["held"].to_pylist() == [True] * 359 + [False] * 1438
    assert found["image"].to_pylist()[:359] == scans["test"]["image"].to_pylist()
    assert found["image"].to_pylist()[359:] == train["image"].to_pylist()


def test_networks_have_the_shapes_they_should(data: Path) -> None:
    task = task_of(data)
    networks, batch = task.build(), batch_of(task, data, 6)
    made = networks["generator"](batch.noise.flatten(0, 1))
    assert made.shape == (6 * EACH, 1, SIDE, SIDE)
    assert (made.min() >= 0) & (made.max() <= 1)
    assert networks["discriminator"](made).shape == (6 * EACH, 1)
    # A row's result is its own, whatever else is in the batch.
    assert torch.allclose(networks["generator"](batch.noise[0]), made[:EACH], atol=1e-6)


@pytest.mark.parametrize("turn", ["discriminator", "generator"])
def test_each_turn_trains_its_network(data: Path, turn: str) -> None:
    task = task_of(data)
    torch.manual_seed(0)
    networks, batch = Networks(task.build()), batch_of(task, data, 8)
    networks.turn = turn
    task.step(networks, batch)[turn].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in networks[turn].parameters())


def test_the_penalty_is_the_slope_on_real_scans(data: Path) -> None:
    task, batch = task_of(data), batch_of(task_of(data), data, 8)
    # A discriminator whose slope is known: 0.1 by each of 64 pixels.
    slope = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    nn.init.constant_(slope[1].weight, 0.1)
    networks = Networks(discriminator=slope, generator=task.build()["generator"])
    networks.turn = "discriminator"
    losses = []
    for task.penalty in (0.0, 3.0):
        losses.append(task.step(networks, batch)["discriminator"].item())
    assert losses[1] - losses[0] == pytest.approx(3 / 2 * 64 * 0.01, rel=1e-4)


def test_figures(data: Path) -> None:
    task = task_of(data)
    torch.manual_seed(0)
    model = task.build()
    with torch.no_grad():
        parts = [task.evaluate(model, batch_of(task, data, 64, start)) for start in (320, 384, 448)]
    means = means_of(*parts)
    assert sum(one["held mean"].count for one in parts) == 39
    assert parts[0]["made mean"].count == 64 * EACH
    found = task.metrics(means)
    assert 0 < found["frechet_of_real"] < found["frechet_of_noise"]
    assert found["distance"] == pytest.approx(found["frechet"] / found["frechet_of_noise"])
    # What is made as the real ones are is as far away as they are.
    same = {name.replace("learned", "made"): value for name, value in means.items() if name.startswith("learned")}
    assert task.metrics({**means, **same})["frechet"] == found["frechet_of_real"]
    missing = task.metrics({**means, "shares": np.array([0.3, 0.0, 0.019, *[0.02] * 7])})
    assert (missing["classes"], missing["rarest"]) == (8, 0)


def test_only_a_sure_judge_counts(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, batch = task_of(data), batch_of(task_of(data), data, 2)
    sure = torch.full((2 * EACH, 10), 0.05 / 9)
    sure[:, 3] = 0.95
    sure[0] = torch.tensor([0.8, 0.2, *[0.0] * 8])
    monkeypatch.setattr(judge, "judged", lambda _, x: (np.zeros((len(x), 2)), sure[: len(x)]))
    with torch.no_grad():
        shares = task.evaluate(task.build(), batch)["shares"]
    assert (shares.total / shares.count).tolist() == pytest.approx([0, 0, 0, 1 - 1 / (2 * EACH), *[0] * 6])


def test_a_sheet_of_digits(data: Path) -> None:
    task = task_of(data)
    model = task.build()
    with torch.no_grad():
        (sheet,) = task.generate(model, 32)
        shown = task.samples(model, batch_of(task, data, 40))
    assert sheet.caption == "32 digits"
    assert Image.open(io.BytesIO(sheet.data)).size == (16 * 42 + 2, 2 * 42 + 2)
    assert [one.media_type for one in shown] == ["image/png"] * 2
    assert batch_of(task, data, 1).noise.shape[-1] == NOISE


def test_rows_make_the_same_noise_anywhere(data: Path) -> None:
    task = task_of(data)
    whole, part = batch_of(task, data, 6), batch_of(task, data, 2, start=4)
    assert torch.equal(whole.noise[4:], part.noise)
    assert torch.equal(whole.chance[4:], part.chance)
