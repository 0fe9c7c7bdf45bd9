"""jobs.lm_rnn from its texts to a text that goes on, in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness import dltrain, make_spec, write_spec

from jobs.common.prose import paragraphs, topics
from jobs.common.texts import write_texts


def test_it_learns_and_goes_on(tmp_path: Path, ray_address: str) -> None:
    texts = [line for _, text in topics()[:24] for line in paragraphs(text)]
    rows = write_texts(str(tmp_path), {"train": texts[20:], "eval": texts[:20]}, size=400)
    assert rows["train"] > 200
    spec: dict[str, Any] = {
        "name": "lm",
        "task": "jobs.lm_rnn:LmRnn",
        "args": {"vocabulary": f"{tmp_path}/vocabulary.json", "length": 32, "embedding": 48, "width": 64, "pieces": 12},
        "data": {"train": f"{tmp_path}/train", "eval": f"{tmp_path}/eval", "pack": {"column": "tokens", "length": 32}},
        "batch": {"global": 16},
        "train": {"steps": 120, "best": {"metric": "bits_per_character"}},
        "optim": {"lr": 2e-2},
        "checkpoint": {"every": 120},
    }
    done = dltrain("run", str(write_spec(tmp_path, make_spec(tmp_path, **spec))), "--json", "--address", ray_address)
    assert done.code == 0, done.err
    # Of one that knows nothing it is 4.5, by the frequencies of pieces alone 3.6.
    assert done.json["eval"]["bits_per_character"] < 3.2
    assert list((tmp_path / "runs" / "lm" / "samples").rglob("*.txt"))
    said = dltrain("predict", str(tmp_path / "runs" / "lm"), "--text", "The value of the")
    assert said.code == 0, said.err
    assert said.out.startswith("The value of the")
    assert len(said.out.strip()) > len("The value of the")
