"""The scenes of jobs.object_detection, what its network is to say of them, and average precision against COCO's."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dltrain import Artifact, Input, Keys
from jobs.common.detection import Boxes, hits, mean_precision, overlaps, tally
from jobs.common.digits import TRAIN_ROWS, digit_splits
from jobs.common.pyramid import STRIDE, peaks, targets
from jobs.common.scenes import DIGITS, KINDS, SCENE, covered, scene_splits, stamp
from jobs.object_detection import ObjectDetection, make_data


@pytest.fixture(scope="module")
def scenes() -> dict[str, pa.Table]:
    return scene_splits(40, 20, noise=0.0)


def batch_of(table: pa.Table, count: int, task: ObjectDetection) -> object:
    keys = Keys(0, np.zeros(count, np.int64), np.arange(count))
    return task.collate(table.slice(0, count).combine_chunks().to_batches()[0], keys)


# ---- the data ----


def test_the_handwriting_of_the_scenes_of_the_test_is_its_own(scenes: dict[str, pa.Table]) -> None:
    most = {"train": TRAIN_ROWS, "test": len(digit_splits()["test"])}
    for name, table in scenes.items():
        labels = digit_splits()[name]["label"].to_pylist()
        things = [pair for row in table.to_pylist() for pair in zip(row["kinds"], row["scans"], strict=True)]
        # Numbers of scans are those of the split.
        assert all(labels[scan] == kind if kind < DIGITS else scan == -1 for kind, scan in things)
        assert max(scan for _, scan in things) < most[name]
    assert len({kind for row in scenes["train"]["kinds"].to_pylist() for kind in row}) == len(KINDS)


def test_boxes_are_around_what_is_bright(scenes: dict[str, pa.Table]) -> None:
    for row in scenes["train"].to_pylist()[:40]:
        picture = np.frombuffer(row["image"], np.uint8).reshape(SCENE, SCENE)
        outside = np.ones((SCENE, SCENE), bool)
        for left, top, right, bottom in np.array(row["boxes"], int):
            assert 0 <= left < right <= SCENE
            assert 0 <= top < bottom <= SCENE
            outside[top:bottom, left:right] = False
        # Nothing but the ground is outside of them.
        assert picture[outside].max() < 0.55 * 255


def test_there_is_no_margin() -> None:
    scan = np.frombuffer(digit_splits()["train"]["image"][0].as_py(), np.uint8).reshape(8, 8) / np.float32(16)
    for kind, one in [(0, scan), *((DIGITS + i, None) for i in range(3))]:
        ink = stamp(kind, one, 20, 10.0)
        assert min(edge.max() for edge in (ink[0], ink[-1], ink[:, 0], ink[:, -1])) > 0.25
        assert max(ink.shape) <= 1.2 * 20


def test_things_hardly_cover_each_other(scenes: dict[str, pa.Table]) -> None:
    for row in scenes["test"].to_pylist():
        boxes = row["boxes"]
        assert 1 <= len(boxes) <= 6
        assert all(covered(a, b) <= 0.15 for i, a in enumerate(boxes) for b in boxes[:i])
    assert covered([0, 0, 4, 4], [2, 0, 10, 4]) == 0.5


def test_shapes_are_what_they_are_called() -> None:
    areas = {name: stamp(DIGITS + i, None, 60, 0.0).mean() for i, name in enumerate(KINDS[DIGITS:])}
    assert areas == pytest.approx({"circle": np.pi / 4, "square": 1.0, "triangle": 0.5}, abs=0.1)
    # A square on its corner fills half of its box.
    assert stamp(KINDS.index("square"), None, 60, 45.0).mean() == pytest.approx(0.5, abs=0.06)


def test_scenes_are_the_same_again_and_written_whole(tmp_path: Path) -> None:
    assert make_data(str(tmp_path), 10, 4) == {"train": 10, "test": 4}
    assert pq.read_table(tmp_path / "train")["image"].to_pylist() == scene_splits(10, 1)["train"]["image"].to_pylist()
    assert pq.read_schema(next((tmp_path / "test").glob("*"))).field("boxes").type.value_type.list_size == 4


# ---- the network ----


def test_what_is_to_be_said_is_read_back(scenes: dict[str, pa.Table]) -> None:
    task = ObjectDetection(width=8, blocks=1)
    batch = batch_of(scenes["train"], 16, task)
    assert batch.heat.shape == (16, len(KINDS), SCENE // STRIDE, SCENE // STRIDE)
    edges = torch.zeros(16, 4, SCENE // STRIDE, SCENE // STRIDE)
    edges[batch.scenes, :, batch.cells[:, 0], batch.cells[:, 1]] = batch.edges
    found = peaks(torch.logit(batch.heat, 1e-6), edges, 24, SCENE)
    pairs = [
        (Boxes(*one), there)
        for one, there in zip(zip(*map(np.asarray, found), strict=True), task._there(batch), strict=True)
    ]
    assert sum(hits(*pair).sum() for pair in pairs) == len(batch.kinds)
    assert mean_precision(*tally(pairs, len(KINDS))) == 1.0


def test_heat_is_one_at_the_centre_and_none_outside() -> None:
    boxes = torch.tensor([[8.0, 16.0, 32.0, 28.0]])
    one = torch.tensor([0])
    heat, cells, edges = targets(one, one + 2, boxes, count=1, num_kinds=3, side=SCENE)
    assert cells.tolist() == [[5, 5]]
    assert edges.tolist() == [[3.5, 1.5, 2.5, 1.5]]
    assert heat[0, 2, 5, 5] == 1.0
    assert heat[0, :2].max() == 0.0
    assert heat[0, 2, 5, 6] > heat[0, 2, 6, 5] > heat[0, 2, 8, 5]
    assert heat[0, 2, 5, 9] < 0.02


def test_a_row_is_judged_by_itself(scenes: dict[str, pa.Table]) -> None:
    task = ObjectDetection(width=8, blocks=1)
    torch.manual_seed(0)
    model = task.build()
    many, few = batch_of(scenes["train"], 8, task), batch_of(scenes["train"], 2, task)
    heat, edges = model(many.image)
    assert torch.allclose(heat[:2], model(few.image)[0], atol=1e-5)
    assert edges.shape == (8, 4, SCENE // STRIDE, SCENE // STRIDE)
    # At first nothing is a centre.
    assert heat.sigmoid().mean() < 0.05


def test_the_loss_is_a_mean_over_things(scenes: dict[str, pa.Table]) -> None:
    task = ObjectDetection(width=8, blocks=1)
    torch.manual_seed(0)
    model = task.build()
    whole = batch_of(scenes["train"], 8, task)
    parts = [batch_of(scenes["train"].slice(start), 4, task) for start in (0, 4)]
    assert whole.count == sum(part.count for part in parts) == len(whole.kinds)
    together = sum(task.loss(model, part) * part.count for part in parts) / whole.count
    assert together.item() == pytest.approx(task.loss(model, whole).item(), rel=1e-5)
    task.loss(model, whole).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_scenes_without_things_are_predicted(scenes: dict[str, pa.Table]) -> None:
    task = ObjectDetection(width=8, blocks=1)
    kinds = scenes["test"].schema
    empty = {"image": scenes["test"]["image"].to_pylist()[:2], "boxes": [[], []], "kinds": [[], []], "scans": [[], []]}
    batch = batch_of(pa.table(empty, kinds), 2, task)
    torch.manual_seed(0)
    model = task.build().eval()
    with torch.no_grad():
        model.head.bias[4] = 5.0
        results = task.predict(model, batch)
        assert np.isfinite(task.evaluate(model, batch)["loss"].total)
    assert {thing["is"] for one in results for thing in one} == {"4"}
    drawn = task.draw(batch, results)
    assert Image.open(io.BytesIO(drawn[0].data)).size == (8 * SCENE, 8 * SCENE)


def test_a_picture_on_white_is_turned_over() -> None:
    task = ObjectDetection()
    page = np.full((128, 128), 240, np.uint8)
    page[40:80, 40:80] = 10
    dark, light = (task.read(Input("a.png", data=Artifact.image(one).data))["image"] for one in (page, 255 - page))
    assert dark == light
    assert np.frombuffer(dark, np.uint8).reshape(SCENE, SCENE)[30, 30] == 245


# ---- average precision ----


def random_pairs(rng: np.random.Generator, count: int, kinds: int) -> list[tuple[Boxes, Boxes]]:
    """Pictures where things were found more or less well, some twice, some as another kind, and things that are not."""
    pairs = []
    for _ in range(count):
        things = int(rng.integers(0, 6))
        corners = rng.uniform(0, 50, (things, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(8, 20, (things, 2))], 1)
        there = Boxes(boxes, rng.integers(0, kinds, things))
        more = rng.uniform(0, 50, (3, 2))
        found = np.concatenate([boxes + rng.normal(0, 1.5, boxes.shape), boxes, np.concatenate([more, more + 12], 1)])
        names = np.concatenate([there.kinds, rng.integers(0, kinds, things + 3)])
        order = rng.permutation(len(found))
        # A score for each bin, so that none is shared.
        scores = np.sort((rng.choice(2048, len(found), replace=False) + 0.5) / 2048)[::-1]
        pairs.append((Boxes(found[order], names[order], scores), there))
    return pairs


def coco(pairs: list[tuple[Boxes, Boxes]], kinds: int) -> float:
    """pycocotools' AP at an IoU of 0.5."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def listed(things: Boxes, image: int) -> list[dict[str, object]]:
        boxes = np.concatenate([things.boxes[:, :2], things.boxes[:, 2:] - things.boxes[:, :2]], 1).tolist()
        scores = things.scores.tolist() or [1.0] * len(boxes)
        listed = zip(boxes, things.kinds.tolist(), scores, strict=True)
        return [
            {"image_id": image, "bbox": b, "category_id": k, "score": s, "area": b[2] * b[3], "iscrowd": 0}
            for b, k, s in listed
        ]

    truth = COCO()
    annotations = [one for i, (_, there) in enumerate(pairs) for one in listed(there, i + 1)]
    truth.dataset = {
        "info": {},
        "images": [{"id": i + 1} for i in range(len(pairs))],
        "categories": [{"id": k} for k in range(kinds)],
        "annotations": [{**one, "id": i + 1} for i, one in enumerate(annotations)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found = truth.loadRes([one for i, (boxes, _) in enumerate(pairs) for one in listed(boxes, i + 1)])
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[1])


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_is_that_of_coco(seed: int) -> None:
    pairs = random_pairs(np.random.default_rng(seed), 40, 3)
    mine = mean_precision(*tally(pairs, 3))
    assert 0.2 < mine < 0.9
    # Scores of different pictures may share a bin.
    assert mine == pytest.approx(coco(pairs, 3), abs=0.01)


def test_tallies_add_up() -> None:
    pairs = random_pairs(np.random.default_rng(0), 12, 3)
    parts = [tally(some, 3) for some in (pairs[:5], pairs[5:])]
    for both, whole in zip(zip(*parts, strict=True), tally(pairs, 3), strict=True):
        assert (sum(both) == whole).all()
    # Quotients, as `metrics` gets them.
    found, there = tally(pairs, 3)
    assert mean_precision(found / 37, there / 37) == pytest.approx(mean_precision(found, there), abs=1e-12)


def test_a_thing_is_found_once() -> None:
    box = np.array([[0.0, 0, 10, 10]])
    there = Boxes(box, np.array([1]))
    twice = Boxes(np.repeat(box, 3, 0), np.array([0, 1, 1]), np.array([0.9, 0.8, 0.7]))
    assert hits(twice, there).tolist() == [False, True, False]
    assert overlaps(box, np.array([[5.0, 0, 15, 10], [10.0, 0, 20, 10]])).tolist() == [[pytest.approx(1 / 3), 0.0]]
    # Half of what both cover is a hit, less is none.
    for edge, hit in ((5.01, True), (4.99, False)):
        assert hits(Boxes(np.array([[0.0, 0, 10, edge]]), np.array([1]), np.ones(1)), there).tolist() == [hit]
    nothing = Boxes(np.zeros((0, 4)), np.zeros(0, int))
    assert hits(twice, nothing).tolist() == [False] * 3
    assert np.isnan(mean_precision(*tally([(twice, nothing)], 2)))
