"""jobs.chat_transformer from dialogues to an answer, in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from harness import dltrain, make_spec, write_spec

from jobs.chat_transformer import SPECIAL, encoded
from jobs.common import vocabulary
from jobs.common.data import write_splits
from jobs.common.dialogues import Turns, knows_the_calendar


def test_it_learns_and_answers(tmp_path: Path, ray_address: str) -> None:
    rng = np.random.default_rng(0)
    talk: dict[str, list[Turns]] = {
        name: [knows_the_calendar(rng, False) for _ in range(count)] for name, count in (("train", 1500), ("eval", 60))
    }
    words = vocabulary.learn([text for turns in talk["train"] for turn in turns for text in turn], 400, SPECIAL)
    vocabulary.save(str(tmp_path), words)
    kind = pa.list_(pa.int32())
    tokens = {name: pa.array([encoded(turns, words) for turns in some], kind) for name, some in talk.items()}
    write_splits(str(tmp_path), {name: pa.table({"tokens": some}) for name, some in tokens.items()})
    spec: dict[str, Any] = {
        "name": "chat",
        "task": "jobs.chat_transformer:ChatTransformer",
        "args": {"vocabulary": f"{tmp_path}/vocabulary.json", "length": 64, "width": 48, "layers": 2, "heads": 4},
        "data": {"train": f"{tmp_path}/train", "eval": f"{tmp_path}/eval", "pack": {"column": "tokens", "length": 64}},
        "batch": {"global": 8},
        "train": {"steps": 120, "best": {"metric": "right", "mode": "max"}},
        "optim": {"lr": 1e-2, "schedule": "cosine", "warmup": 10, "clip": 1.0},
        "checkpoint": {"every": 120},
    }
    done = dltrain("run", str(write_spec(tmp_path, make_spec(tmp_path, **spec))), "--json", "--address", ray_address)
    assert done.code == 0, done.err
    # One answer in nineteen, if it always says the same.
    assert done.json["eval"]["right"] > 0.3
    assert list((tmp_path / "runs" / "chat" / "samples").rglob("*.html"))
    said = dltrain("predict", str(tmp_path / "runs" / "chat"), "--text", "Which day comes after Monday?")
    assert said.code == 0, said.err
    assert said.out.strip()
