"""What `dltrain new NAME` writes: a task, its YAML and a test, which train on data that the task makes itself.

write_starter("disc")       # disc.py, disc.yaml, test_disc.py in this directory
"""

from __future__ import annotations

import importlib.util
import keyword
from pathlib import Path
from string import Template
from typing import Any

from dltrain.errors import UserError

__all__ = ["write_starter"]

_TASK = Template('''"""$name: whether a point of the plane lies within a circle. Put your data and network in its place.

python $name.py .data/$name
dltrain run $name.yaml
dltrain predict $name --text '{"x": 0.1, "y": 0.9}'
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from dltrain import Batch, Keys, Sum, Task
from dltrain.data.columns import tensors
from torch import nn


class $cls(Task):
    """Two classes; `args` of the YAML are given to the constructor."""

    columns = ("x", "y", "inside")
    # What is not there when the trained network is used.
    target_columns = ("inside",)

    def __init__(self, width: int = 32) -> None:
        self.width = width

    def build(self) -> nn.Module:
        width = self.width
        hidden = [nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        return nn.Sequential(*hidden, nn.Linear(width, 2))

    def collate(self, rows: pa.RecordBatch, keys: Keys) -> Batch:
        column = tensors(rows)
        points = torch.stack([column["x"], column["y"]], dim=1)
        return Batch(rows.num_rows, points=points, inside=column["inside"])

    def loss(self, model, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(model(batch.points).float(), batch.inside)

    def evaluate(self, model, batch: Batch) -> dict[str, Sum]:
        right = (model(batch.points).argmax(1) == batch.inside).sum().item()
        return {"accuracy": Sum(right, batch.count)}

    def predict(self, model, batch: Batch) -> list[dict]:
        chances = model(batch.points).softmax(1)[:, 1].tolist()
        return [{"inside": p > 0.5, "probability": round(p, 4)} for p in chances]


def make_data(directory: str | Path) -> None:
    """Parquet under directory/train and directory/test."""
    rng = np.random.default_rng(0)
    for split, rows in {"train": 2048, "test": 512}.items():
        points = rng.uniform(-1.5, 1.5, (rows, 2)).astype(np.float32)
        inside = (np.hypot(points[:, 0], points[:, 1]) < 1.0).astype(np.int64)
        table = pa.table({"x": points[:, 0], "y": points[:, 1], "inside": inside})
        place = Path(directory, split)
        place.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, place / "part-0.parquet", row_group_size=256)


if __name__ == "__main__":
    make_data(sys.argv[1])
''')
_SPEC = Template("""# dltrain run $name.yaml
name: $name
task: $name.py:$cls
args: {width: 32}
data: {train: .data/$name/train, eval: .data/$name/test}   # directory, glob or file; any fsspec URL
batch: {global: 64}                                        # rows of a step over all workers
train: {epochs: 8, best: {metric: accuracy, mode: max}}
optim: {name: adamw, lr: 1.0e-2, schedule: cosine}
engine: {zero: 1, precision: fp32}
workers: 2
checkpoint: {every: 100}                                   # steps; the best evaluation is kept besides
""")
_TEST = Template('''"""$name without a cluster: a few steps of plain torch on the data that it makes."""

import numpy as np
import pyarrow.parquet as pq
import torch
from dltrain import Batch, Keys

from $name import $cls, make_data


def batch_of(task: $cls, directory) -> Batch:
    rows = pq.read_table(directory).combine_chunks().to_batches()[0]
    keys = Keys(0, np.zeros(len(rows), np.int64), np.arange(len(rows)))
    return task.collate(rows, keys)


def test_it_learns(tmp_path):
    make_data(tmp_path)
    torch.manual_seed(0)
    task = $cls()
    model = task.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train = batch_of(task, tmp_path / "train")
    held_out = batch_of(task, tmp_path / "test")
    for _ in range(100):
        optimizer.zero_grad()
        task.loss(model, train).backward()
        optimizer.step()
    accuracy = task.evaluate(model, held_out)["accuracy"]
    assert accuracy.total / accuracy.count > 0.95
    assert len(task.predict(model, held_out)) == held_out.count
''')


def write_starter(name: str, directory: str = ".") -> dict[str, Any]:
    """Writes the three files.

    Returns:
        their names, and the commands to go on with.

    Raises:
        UserError: it is no name for a module, or one of the files is there already.
    """
    if not name.isidentifier() or keyword.iskeyword(name):
        raise UserError(f"{name!r} can't be the name of a Python module; use letters, digits and underscores")
    files = {f"{name}.py": _TASK, f"{name}.yaml": _SPEC, f"test_{name}.py": _TEST}
    there = [file for file in files if Path(directory, file).exists()]
    if there:
        raise UserError(f"{', '.join(there)} is there already, and nothing is written over; choose another name")
    if importlib.util.find_spec(name) is not None:
        raise UserError(f"there is a Python module {name!r}, which `import {name}` would find; choose another name")
    words = {"name": name, "cls": "".join(part[:1].upper() + part[1:] for part in name.split("_")) or "Starter"}
    for file, text in files.items():
        with open(Path(directory, file), "x") as out:
            out.write(text.substitute(words))
    return {
        "files": list(files),
        "next": {
            f"python {name}.py .data/{name}": "make the data",
            f"python -m pytest test_{name}.py": "a few steps of plain torch",
            f"dltrain run {name}.yaml": "train on 2 workers",
            f'dltrain predict {name} --text \'{{"x": 0.1, "y": 0.9}}\'': "use it",
        },
    }
