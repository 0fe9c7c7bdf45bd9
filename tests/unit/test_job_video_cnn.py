"""The clips of jobs.video_cnn: what happens in them and how, and files that are read."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dltrain import Artifact, Input, Keys
from dltrain.errors import UserError
from jobs.common.clips import ACTIONS, FRAMES, SIZE, clips, frames_of, moves
from jobs.common.digits import digit_splits
from jobs.common.mimicry import CHANGES, PEOPLE, face_clips, mimics_of
from jobs.common.people import EMOTIONS, MIMICS
from jobs.video_cnn import VideoCnn, make_data

DISC = (np.hypot(*np.mgrid[-3.5:4, -3.5:4]) < 3).astype(np.float32)


@pytest.fixture(scope="module")
def shown() -> dict[str, np.ndarray]:
    """By action, (clips, frames, side, side) of a disc with a dark left half."""
    half = DISC * np.where(np.arange(8) < 4, 0.4, 1.0).astype(np.float32)
    rng = np.random.default_rng(0)
    return {name: clips(np.stack([half] * 40), moves(np.full(40, i), rng)) for i, name in enumerate(ACTIONS)}


def centre(frames: np.ndarray) -> np.ndarray:
    """(..., side, side) -> (..., 2): x and y, of what is seen at all."""
    places = np.stack(np.meshgrid(np.arange(SIZE), np.arange(SIZE)), -1)
    weights = frames[..., None]
    return (weights * places).sum((-3, -2)) / weights.sum((-3, -2))


@pytest.mark.parametrize(("action", "axis", "sign"), [("left", 0, -1), ("right", 0, 1), ("up", 1, -1), ("down", 1, 1)])
def test_it_goes_where_it_should(shown: dict[str, np.ndarray], action: str, axis: int, sign: int) -> None:
    went = centre(shown[action][:, -1]) - centre(shown[action][:, 0])
    assert (sign * went[:, axis] > 4).all()
    assert np.abs(went[:, 1 - axis]).mean() < 2


def test_it_grows_and_shrinks(shown: dict[str, np.ndarray]) -> None:
    area = {name: frames.sum((-1, -2)) for name, frames in shown.items()}
    assert (area["grows"][:, -1] > 1.5 * area["grows"][:, 0]).all()
    assert (area["shrinks"][:, 0] > 1.5 * area["shrinks"][:, -1]).all()
    assert np.allclose(np.median(area["up"][:, -1] / area["up"][:, 0]), 1, atol=0.1)


def test_it_turns(shown: dict[str, np.ndarray]) -> None:
    for name, sign in (("turns left", 1), ("turns right", -1)):
        frames = shown[name]
        # From the disc's middle to what is brightest; y is down, so that angles to the left are against it.
        lean = centre(frames) - centre((frames > 0.2).astype(float))
        turned = np.unwrap(np.arctan2(-lean[..., 1], lean[..., 0]), axis=1)
        turned = turned[:, -1] - turned[:, 0]
        assert (sign * turned > 0.3).mean() > 0.95


def test_one_frame_tells_nothing() -> None:
    rng = np.random.default_rng(0)
    middle = [moves(np.full(500, i), rng)[:, FRAMES // 2 - 1 : FRAMES // 2 + 1].mean(1) for i in range(len(ACTIONS))]
    means = np.stack([one.mean(0) for one in middle])
    assert (np.ptp(means, axis=0) < 0.05).all()


@pytest.mark.parametrize("way", [0, 1])
def test_an_expression_comes_or_goes(way: int) -> None:
    rng = np.random.default_rng(0)
    still = MIMICS[EMOTIONS.index("neutral")]
    for change, emotion in ((way, "happy"), (2 + way, "surprised"), (4 + way, "angry")):
        shown = mimics_of(np.full(200, change), rng) - still
        full = MIMICS[EMOTIONS.index(emotion)] - still
        part = shown @ full / (full @ full)
        assert np.allclose(shown, part[..., None] * full)
        steps = np.diff(part, axis=1) * (-1 if way else 1)
        assert (steps > -1e-9).all()
        assert (steps.sum(1) > 0.6).all()
        # Halfway it is neither all there nor all gone.
        assert 0.3 < part[:, FRAMES // 2 - 1 : FRAMES // 2 + 1].mean() < 0.9


def test_faces_are_seen_and_so_is_what_changes() -> None:
    smiles = np.zeros(12, np.int64)
    made, people = face_clips("test", smiles, np.random.default_rng(0))
    assert made.shape == (12, FRAMES, SIZE, SIZE)
    assert 0 <= made.min() < made.max() <= 1
    assert set(people) <= set(PEOPLE["test"])
    # The mouth of another expression is where the difference is.
    other, _ = face_clips("test", smiles + 3, np.random.default_rng(0))
    differs = np.abs(made - other).mean((0, 1))
    assert differs[SIZE // 2 : -4, 6:-6].mean() > 4 * differs[:, [0, -1]].mean()
    assert not set(PEOPLE["test"]) & set(PEOPLE["train"])


def test_the_handwriting_and_the_people_of_the_test_are_its_own(tmp_path: Path) -> None:
    assert make_data(str(tmp_path), 42, 28) == {"train": 42, "test": 28}
    table = pq.read_table(tmp_path / "test")
    assert sorted(table["action"].to_pylist()) == sorted(2 * list(range(len(ACTIONS) + len(CHANGES))))
    assert len(table["clip"][0].as_py()) == FRAMES * SIZE * SIZE
    # No more of a digit than the scans of each split hold.
    scans = digit_splits()
    assert set(table["digit"].drop_null().to_pylist()) <= set(scans["test"]["label"].to_pylist())
    assert not set(scans["train"]["image"].to_pylist()) >= set(scans["test"]["image"].to_pylist())
    people = {name: set(pq.read_table(tmp_path / name)["person"].drop_null().to_pylist()) for name in PEOPLE}
    assert people["train"]
    assert people["test"]
    assert not people["train"] & people["test"]


def rows_of(clip: bytes) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({"clip": pa.array([clip]), "action": pa.array([2], pa.uint8())})


def test_an_animation_is_read_and_drawn(shown: dict[str, np.ndarray]) -> None:
    task = VideoCnn(width=4, stages=2)
    gif = Artifact.animation(shown["up"][0].repeat(3, 1).repeat(3, 2)).data
    row = task.read(Input("up.gif", data=gif))
    again = frames_of([row["clip"]], (FRAMES, SIZE, SIZE))[0] / 255
    assert np.abs(again - shown["up"][0]).mean() < 0.05
    batch = task.collate(rows_of(row["clip"]), Keys(0, np.zeros(1, np.int64), np.zeros(1, np.int64)))
    torch.manual_seed(0)
    model = task.build().eval()
    with torch.no_grad():
        results = task.predict(model, batch)
        (drawn,) = task.draw(batch, results)
        listed = task.samples(model, batch)
    assert results[0]["action"] in ACTIONS
    assert Image.open(io.BytesIO(drawn.data)).n_frames == FRAMES
    assert listed[-1].media_type == "text/html"


def test_what_is_no_animation_is_refused() -> None:
    task = VideoCnn()
    with pytest.raises(UserError, match="not a picture"):
        task.read(Input("a.gif", data=b"nothing"))
    with pytest.raises(UserError, match="one frame"):
        task.read(Input("a.png", data=Artifact.image(DISC).data))


def test_a_step_lowers_the_loss() -> None:
    task = VideoCnn(width=4, stages=2)
    torch.manual_seed(0)
    model = task.build()
    clip = np.random.default_rng(0).integers(0, 255, FRAMES * SIZE * SIZE, np.uint8).tobytes()
    batch = task.collate(rows_of(clip), Keys(0, np.zeros(1, np.int64), np.zeros(1, np.int64)))
    before = task.loss(model, batch)
    before.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    found = task.evaluate(model.eval(), batch)
    assert (found["accuracy"].count, found["loss"].count) == (1, 1)
