"""jobs.summarize_transformer from texts to a summary, in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from harness import dltrain, make_spec, write_spec

from jobs.common import vocabulary
from jobs.common.data import write_splits
from jobs.summarize_transformer import SPECIAL, baselines

VERBS = ("sorts", "counts", "reads", "copies", "joins", "moves", "prints", "shuffles")
THINGS = ("rows", "files", "keys", "words", "names", "pages", "nodes", "bytes", "trees", "lines")


def test_it_learns_and_summarizes(tmp_path: Path, ray_address: str) -> None:
    rng = np.random.default_rng(0)

    def row(verb: str, thing: str) -> dict[str, str]:
        text = f"Nothing is done without {rng.choice(THINGS)}. This {verb} all {thing}, as often as it is called."
        return {"text": text, "summary": f"{verb.capitalize()} the {thing}"}

    pairs = [(verb, thing) for verb in VERBS for thing in THINGS]
    # Every eighth pair is in no text for training.
    splits = {
        "train": [row(*pair) for i, pair in enumerate(pairs) if i % 8 for _ in range(12)],
        "eval": [row(*pair) for i, pair in enumerate(pairs) if not i % 8 for _ in range(4)],
    }
    texts = [text for some in splits["train"] for text in some.values()]
    vocabulary.save(str(tmp_path), vocabulary.learn(texts, 400, SPECIAL))
    write_splits(str(tmp_path), {name: pa.Table.from_pylist(some) for name, some in splits.items()})
    spec: dict[str, Any] = {
        "name": "summarize",
        "task": "jobs.summarize_transformer:SummarizeTransformer",
        "args": {"vocabulary": f"{tmp_path}/vocabulary.json", "width": 48, "layers": 1, "heads": 4, "longest": 8},
        "data": {"train": f"{tmp_path}/train", "eval": f"{tmp_path}/eval"},
        "batch": {"global": 32},
        "train": {"steps": 90, "best": {"metric": "rouge_l", "mode": "max"}},
        "optim": {"lr": 1e-2, "schedule": "cosine", "warmup": 10, "clip": 1.0},
        "checkpoint": {"every": 90},
    }
    done = dltrain("run", str(write_spec(tmp_path, make_spec(tmp_path, **spec))), "--json", "--address", ray_address)
    assert done.code == 0, done.err
    # Without reading, "the" and by chance one other word: 0.4.
    assert done.json["eval"]["rouge_l"] > max(0.6, 2 * baselines(str(tmp_path))["rouge_l"])
    (tmp_path / "notes.txt").write_text(splits["eval"][0]["text"])
    said = dltrain("predict", str(tmp_path / "runs" / "summarize"), str(tmp_path / "notes.txt"), "--json")
    assert said.code == 0, said.err
    assert "the" in said.json["results"][0]["prediction"]
