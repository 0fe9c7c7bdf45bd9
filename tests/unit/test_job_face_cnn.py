"""The faces of jobs.face_cnn: what poses, light and emotions do to them, what the test shows alone, and the network."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dltrain import Artifact, Input, Keys
from jobs.common.augment import varied
from jobs.common.faces import FACE, draw_faces
from jobs.common.people import EMOTIONS, LIGHTS, MIMICS, PEOPLE, POSES, POWERS, face_splits, look_of
from jobs.face_cnn import FaceCnn, make_data

MIDDLE = slice(FACE // 2 - 8, FACE // 2 + 8)


def face(who: int = 5, emotion: str = "neutral", pose: Any = (0, 0), light: Any = (0, 0.3, 0.3)) -> np.ndarray:
    """(FACE, FACE, 3)."""
    mimics = MIMICS[[EMOTIONS.index(emotion)]]
    wall = np.full((1, 3), 0.5, np.float32)
    return draw_faces([look_of(who)], mimics, np.array([pose]), np.array([light]), wall, wall)[0]


@pytest.fixture(scope="module")
def faces() -> dict[str, pa.Table]:
    return face_splits(200, 100)


def batch_of(table: pa.Table, count: int) -> Any:
    rows = table.slice(0, count).combine_chunks().to_batches()[0]
    return FaceCnn().collate(rows, Keys(0, np.zeros(count, np.int64), np.arange(count)))


def test_poses_and_light_of_the_test_are_not_in_training(faces: dict[str, pa.Table]) -> None:
    far = {
        name: {column: np.abs(table[column].to_numpy()) for column in ("yaw", "azimuth", "power")}
        for name, table in faces.items()
    }
    for column, limits in (("yaw", POSES), ("azimuth", LIGHTS), ("power", POWERS)):
        assert far["train"][column].max() <= limits["train"][1] <= limits["test"][0] <= far["test"][column].min()
    # Of poses and light there is a gap between the two.
    assert far["test"]["yaw"].min() - far["train"]["yaw"].max() > 2
    assert far["test"]["azimuth"].min() - far["train"]["azimuth"].max() > 5
    for column in ("yaw", "azimuth"):
        signs = np.sign(faces["test"][column].to_numpy())
        assert 0.3 < (signs > 0).mean() < 0.7


def test_everybody_has_every_emotion_equally_often(faces: dict[str, pa.Table]) -> None:
    for times, table in zip((2, 1), faces.values(), strict=True):
        pairs = list(zip(table["person"].to_pylist(), table["emotion"].to_pylist(), strict=True))
        assert sorted(pairs) == sorted(
            times * [(who, feels) for who in range(PEOPLE) for feels in range(len(EMOTIONS))]
        )
        # In no order.
        assert len(set(pairs[:20])) > 10
        assert len({who for who, _ in pairs[:20]}) < PEOPLE


def test_faces_are_the_same_again_and_written_whole(tmp_path: Path) -> None:
    assert make_data(str(tmp_path), 12, 6) == {"train": 12, "test": 6}
    table = pq.read_table(tmp_path / "train")
    assert table["image"].to_pylist() == face_splits(12, 1)["train"]["image"].to_pylist()
    assert len(table["image"][0].as_py()) == FACE * FACE * 3


def test_people_look_different() -> None:
    shown = [face(who) for who in range(PEOPLE)]
    nearest = min(np.abs(a - b).mean() for a, b in combinations(shown, 2))
    # More than anybody's face differs from itself by brows and mouth, unless it is open.
    assert nearest > max(np.abs(face(5) - face(5, emotion)).mean() for emotion in EMOTIONS if emotion != "surprised")
    assert look_of(3)["wide"] == look_of(3)["wide"] != look_of(4)["wide"]


def test_a_head_turns() -> None:
    # Where what is dark on a bald, pale face lies: eyes, brows and mouth.
    def at(pose: tuple[float, float]) -> np.ndarray:
        dark = np.clip(0.5 - face(5, pose=pose, light=(0, 0, 0))[10:38, 12:36].mean(-1), 0, None)
        return np.array([(dark * axis).sum() / dark.sum() for axis in np.mgrid[:28, :24]])

    ahead = at((0, 0))
    for sign in (-1, 1):
        assert sign * (at((sign * 0.5, 0)) - ahead)[1] > 2
        assert sign * (at((0, sign * 0.2)) - ahead)[0] > 1


def test_light_comes_from_its_side() -> None:
    left, right = (face(5, light=(side, 0, 0.6))[MIDDLE].mean(-1) for side in (-1.2, 1.2))
    halves = [(one[:, 12:24].mean(), one[:, 24:36].mean()) for one in (left, right)]
    assert halves[0][0] > 1.2 * halves[0][1]
    assert halves[1][1] > 1.2 * halves[1][0]
    # Behind the head it is the same.
    dark, bright = face(5, light=(1, 0, 0.6)), face(5, light=(1, 0, 0.1))
    assert (dark[:6, :6] == bright[:6, :6]).all()
    assert dark.mean() < bright.mean()


def test_emotions_are_made_by_the_face_alone() -> None:
    for emotion in EMOTIONS[:-1]:
        changed = np.abs(face(5, emotion) - face(5)).max(-1) > 0.1
        assert 8 < changed.sum() < 250
        assert not changed[:8].any()
        assert not changed[:, :8].any()
    mouth = {emotion: face(5, emotion)[28:38, 16:32].mean(-1) for emotion in EMOTIONS}
    # An open mouth is dark.
    assert (mouth["surprised"] < 0.3).sum() > (mouth["neutral"] < 0.3).sum() + 6

    def height(emotion: str, columns: list[int]) -> float:
        dark = np.clip(0.65 - mouth[emotion][:, columns], 0, None)
        return float((dark * np.arange(len(dark))[:, None]).sum() / dark.sum())

    # From the middle of the mouth down to its corners.
    hang = {e: height(e, [3, 4, 11, 12]) - height(e, [6, 7, 8, 9]) for e in ("happy", "sad", "neutral")}
    assert hang["happy"] < -0.8
    assert hang["sad"] > 0.8
    assert abs(hang["neutral"]) < 0.2


def test_pictures_are_changed_by_their_own_generators() -> None:
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.uniform(0.2, 1, (40, 3, 12, 12)).astype(np.float32))
    keys = Keys(3, np.zeros(40, np.int64), np.arange(40))
    whole = varied(images, keys)
    assert torch.equal(whole[5:9], varied(images[5:9], Keys(3, keys.epochs[5:9], keys.ids[5:9])))
    assert not torch.allclose(whole, varied(images, Keys(3, keys.epochs + 1, keys.ids)), atol=0.1)
    assert whole.min() >= 0
    assert whole.max() <= 1
    # Half of them are as in a mirror, and nothing else is left of it.
    still = varied(images, keys, shift=0, squeeze=0, lean=0, shade=0)
    mirrored = [torch.allclose(new, old.flip(-1), atol=1e-5) for new, old in zip(still, images, strict=True)]
    same = [torch.allclose(new, old, atol=1e-5) for new, old in zip(still, images, strict=True)]
    assert [a != b for a, b in zip(mirrored, same, strict=True)] == [True] * 40
    assert 8 < sum(mirrored) < 32
    # Light is taken from one side, and what there is of it is no more than was.
    lit = varied(torch.ones(40, 1, 12, 12), keys, shade=0.6)
    assert lit.amax((1, 2, 3)).min() > 0.95
    assert lit.amin((1, 2, 3)).min() < 0.45
    assert lit.min() >= 0.4 - 1e-5


def test_the_two_heads(faces: dict[str, pa.Table]) -> None:
    task, batch = FaceCnn(width=8), batch_of(faces["train"], 6)
    torch.manual_seed(0)
    model = task.build()
    identity, emotion = model(batch.image)
    assert (identity.shape, emotion.shape) == ((6, PEOPLE), (6, len(EMOTIONS)))
    # A row is judged by itself.
    assert torch.allclose(model(batch.image[:2])[0], identity[:2], atol=1e-5)
    task.loss(model, batch).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_shares_of_what_is_right(faces: dict[str, pa.Table]) -> None:
    batch = batch_of(faces["test"], 10)
    people, feelings = batch.person.clone(), batch.emotion.clone()
    people[:3] = (people[:3] + 1) % PEOPLE
    feelings[2:4] = (feelings[2:4] + 1) % len(EMOTIONS)

    def model(_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 9.0 * torch.eye(PEOPLE)[people], 9.0 * torch.eye(len(EMOTIONS))[feelings]

    found = {name: one.total / one.count for name, one in FaceCnn().evaluate(model, batch).items()}
    assert found["identity"] == pytest.approx(0.7)
    assert found["emotion"] == pytest.approx(0.8)
    assert found["both"] == pytest.approx(0.6)
    (shown,) = FaceCnn().samples(model, batch)
    assert shown.caption.endswith("4 wrong")


def test_a_picture_is_read_and_named(faces: dict[str, pa.Table]) -> None:
    task = FaceCnn(width=8)
    pixels = np.frombuffer(faces["test"]["image"][0].as_py(), np.uint8).reshape(FACE, FACE, 3)
    row = task.read(Input("a.png", data=Artifact.image(pixels).data))
    assert row["image"] == pixels.tobytes()
    batch = batch_of(faces["test"], 2)
    assert np.allclose(batch.image[0].permute(1, 2, 0).numpy() * 255, pixels, atol=1e-3)
    torch.manual_seed(0)
    with torch.no_grad():
        results = task.predict(task.build(), batch)
    drawn = task.draw(batch, results)
    assert results[0]["emotion"] in EMOTIONS
    assert drawn[0].caption.startswith(f"person {results[0]['person']} ")
    assert 1 / PEOPLE < results[0]["of_person"] < results[0]["of_emotion"] < 1
