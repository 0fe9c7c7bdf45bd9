"""The code of docs/task-guide.md: each of its tasks is built, fed, differentiated and evaluated."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import harness
import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from PIL import Image

from dltrain import BadRowsError, Keys, Sum, Task
from dltrain.spec import parse_spec
from dltrain.training.task import networks_of

GUIDE = harness.ROOT / "docs" / "task-guide.md"
ROWS = 6


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def guide() -> Iterator[ModuleType]:
    module = ModuleType("guide")
    sys.modules["guide"] = module
    exec(compile("\n".join(blocks("python")), str(GUIDE), "exec", dont_inherit=True), module.__dict__)
    yield module
    del sys.modules["guide"]


def photo(seed: int) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


def rows_of(columns: tuple[str, ...]) -> pa.RecordBatch:
    """Some rows of everything that the guide's tasks read."""
    table = harness.make_table(ROWS)
    everything = {
        "x": table["x"].combine_chunks(),
        "y": table["y"].combine_chunks(),
        "photo": pa.array([photo(i) for i in range(ROWS)]),
        "label": pa.array([i % 4 for i in range(ROWS)]),
        "tokens": pa.array([list(range(i + 2)) for i in range(ROWS)]),
    }
    return pa.RecordBatch.from_pydict({name: everything[name] for name in columns})


KEYS = Keys(seed=0, epochs=np.zeros(ROWS, np.int64), ids=np.arange(ROWS))


class Taking(dict[str, Any]):
    """Networks by name, and whose turn it is."""

    turn = ""


def losses(task: Task, model: Any, batch: Any) -> Iterator[torch.Tensor]:
    if not isinstance(model, Taking):
        yield task.loss(model, batch)
        return
    for name in model:
        model.turn = name
        yield task.step(model, batch)[name]  # type: ignore[arg-type]


NAMES = sorted(set(re.findall(r"^class (\w+)\(", "\n".join(blocks("python")), re.MULTILINE)))


@pytest.mark.parametrize("name", NAMES)
def test_each_task(guide: ModuleType, name: str) -> None:
    task: Task = getattr(guide, name)()
    assert task.columns
    torch.manual_seed(0)
    modules = networks_of(task.build())
    model = modules[""] if "" in modules else Taking(modules)
    batch = task.collate(rows_of(task.columns), KEYS)
    assert batch.count > 0
    for loss in losses(task, model, batch):
        loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.isfinite().all() for m in modules.values() for p in m.parameters())
    with torch.no_grad():
        found = task.evaluate(model, batch)
    assert "loss" in found
    assert all(isinstance(value, Sum) and value.count == batch.count for value in found.values())


def test_the_guide_has_all_of_these() -> None:
    assert NAMES == [
        "Autoencoder",
        "Correlated",
        "Gan",
        "NextToken",
        "Noisy",
        "Photographs",
        "Regression",
        "Strict",
        "WithRmsprop",
    ]


def test_counts_and_sums(guide: ModuleType) -> None:
    # Lists of 2 to 7 tokens: one prediction fewer each.
    tokens = guide.NextToken()
    assert tokens.collate(rows_of(("tokens",)), KEYS).count == sum(range(1, ROWS + 1))
    torch.manual_seed(0)
    task = guide.Regression(width=4)
    model, batch = task.build(), task.collate(rows_of(("x", "y")), KEYS)
    with torch.no_grad():
        found = task.evaluate(model, batch)["loss"]
        assert found.total / found.count == pytest.approx(float(task.loss(model, batch)), rel=1e-5)


def test_what_is_no_mean_is_made_of_sums(guide: ModuleType) -> None:
    torch.manual_seed(0)
    task = guide.Correlated(width=4)
    model, batch = task.build(), task.collate(rows_of(("x", "y")), KEYS)
    with torch.no_grad():
        sums = task.evaluate(model, batch)
        wanted = np.corrcoef(model(batch.x)[:, 0].double(), batch.y[:, 0].double())[0, 1]
    assert task.metrics({name: s.total / s.count for name, s in sums.items()})["r"] == pytest.approx(wanted)


def test_what_is_random_is_the_rows_own(guide: ModuleType) -> None:
    task, rows = guide.Noisy(), rows_of(("x", "y"))
    once, again = task.collate(rows, KEYS).x, task.collate(rows, KEYS).x
    assert torch.equal(once, again)
    other = task.collate(rows, Keys(0, np.ones(ROWS, np.int64), KEYS.ids)).x
    assert not torch.equal(once, other)
    half = task.collate(rows.slice(3), Keys(0, KEYS.epochs[3:], KEYS.ids[3:])).x
    assert torch.equal(once[3:], half)


def test_rows_that_can_not_be_used(guide: ModuleType) -> None:
    rows = pa.RecordBatch.from_pydict({"x": rows_of(("x",))["x"], "y": pa.array([0.0, float("nan"), 1.0] * 2)})
    with pytest.raises(BadRowsError) as caught:
        guide.Strict().collate(rows, KEYS)
    assert caught.value.rows == (1, 4)


def test_its_optimizer_and_its_trial(guide: ModuleType) -> None:
    task = guide.WithRmsprop()
    optimizer = task.optimizer("", [{"params": list(task.build().parameters()), "weight_decay": 0.0}])
    assert isinstance(optimizer, torch.optim.RMSprop)
    assert guide.try_out(guide.Regression(), rows_of(("x", "y"))) > 0


def test_its_spec() -> None:
    (text,) = blocks("yaml")
    spec = parse_spec(yaml.safe_load(text))
    assert spec.task == "guide.py:Regression"
    assert spec.args == {"width": 64}


def test_every_hook_of_a_task_is_told() -> None:
    """What a Task can define is in the guide, by its name."""
    text = GUIDE.read_text()
    missing = [name for name in vars(Task) if not name.startswith("_") and f"`{name}`" not in text]
    assert not missing, f"the guide does not say what these are for: {', '.join(missing)}"
