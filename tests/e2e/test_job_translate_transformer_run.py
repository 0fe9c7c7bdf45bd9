"""jobs.translate_transformer from phrases to translations, in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
from harness import dltrain, make_spec, write_spec

from jobs.common import vocabulary
from jobs.common.data import write_splits
from jobs.translate_transformer import SPECIAL

SAY = {"fr": "il y a {} jours", "de": "vor {} Tagen"}


def test_it_learns_and_translates(tmp_path: Path, ray_address: str) -> None:
    rows = [
        {"text": f"{n} days ago", "language": language, "translation": say.format(n)}
        for n in range(10, 500)
        for language, say in SAY.items()
    ]
    # Every fourteenth number is in no row for training.
    splits = {"eval": rows[::28] + rows[1::28], "train": [row for i, row in enumerate(rows) if i % 28 > 1]}
    texts = [text for row in splits["train"] for text in (row["text"], row["translation"])]
    vocabulary.save(str(tmp_path), vocabulary.learn(texts, 290, SPECIAL))
    write_splits(str(tmp_path), {name: pa.Table.from_pylist(some) for name, some in splits.items()})
    spec: dict[str, Any] = {
        "name": "translate",
        "task": "jobs.translate_transformer:TranslateTransformer",
        "args": {"vocabulary": f"{tmp_path}/vocabulary.json", "width": 48, "layers": 1, "heads": 4, "longest": 16},
        "data": {"train": f"{tmp_path}/train", "eval": f"{tmp_path}/eval"},
        "batch": {"global": 32},
        "train": {"steps": 120, "best": {"metric": "exact", "mode": "max"}},
        "optim": {"lr": 1e-2, "schedule": "cosine", "warmup": 10, "clip": 1.0},
        "checkpoint": {"every": 120},
    }
    done = dltrain("run", str(write_spec(tmp_path, make_spec(tmp_path, **spec))), "--json", "--address", ray_address)
    assert done.code == 0, done.err
    assert done.json["eval"]["exact"] > 0.2
    assert 30 < done.json["eval"]["bleu"] <= 100
    said = dltrain("predict", str(tmp_path / "runs" / "translate"), "--text", "de: 23 days ago", "--json")
    assert said.code == 0, said.err
    assert "Tagen" in said.json["results"][0]["prediction"]
