"""What jobs.lm_rnn makes of rows, what it counts, and how a text goes on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from dltrain import Batch, Input, Keys
from jobs.common.texts import END, write_texts
from jobs.lm_rnn import LmRnn

TEXTS = ["the end of a text", "the text of an end"]


@pytest.fixture
def task(tmp_path: Path) -> LmRnn:
    write_texts(str(tmp_path), {"train": TEXTS, "eval": TEXTS}, size=270)
    return LmRnn(f"{tmp_path}/vocabulary.json", length=24, embedding=8, width=12, dropout=0.0, pieces=9)


def batch(task: LmRnn, *texts: str) -> Batch:
    rows = pa.RecordBatch.from_pylist([dict(task.read(Input("one", text=text))) for text in texts])
    fixed = pa.list_(pa.int32(), 24)
    kinds = [fixed, fixed, pa.int32()]
    rows = pa.RecordBatch.from_arrays([c.cast(k) for c, k in zip(rows.columns, kinds, strict=True)], rows.schema.names)
    return task.collate(rows, Keys(0, np.zeros(len(texts), np.int64), np.arange(len(texts))))


def test_characters_and_pieces_are_counted(task: LmRnn) -> None:
    one = batch(task, *TEXTS)
    assert one.characters == sum(map(len, TEXTS))
    assert one.count == one.there.sum() < one.characters
    assert one.before[:, 0].tolist() == [END, END]
    assert one.before[:, 1:].tolist() == one.tokens[:, :-1].tolist()


def test_bits_of_a_network_that_knows_nothing(task: LmRnn) -> None:
    model = task.build().eval()
    torch.nn.init.zeros_(model.get_parameter("embed.weight"))
    one = batch(task, *TEXTS)
    found = task.evaluate(model, one)
    bits = one.count * math.log2(task.vocabulary.get_vocab_size())
    assert found["bits_per_character"].total == pytest.approx(bits, rel=1e-5)
    assert found["bits_per_character"].count == one.characters
    assert task.loss(model, one).item() == pytest.approx(math.log(task.vocabulary.get_vocab_size()), rel=1e-5)


def test_what_is_not_there_costs_nothing(task: LmRnn) -> None:
    model = task.build().eval()
    short = batch(task, TEXTS[0])
    changed = Batch(**{**short.tensors, "count": short.count, "tokens": short.tokens.where(short.there, 5)})
    assert task.loss(model, changed).item() == task.loss(model, short).item()


class Says:
    """A network that says what it is told to, one score high, and counts its calls."""

    def __init__(self, tokens: list[int], size: int) -> None:
        self.tokens, self.size, self.read = tokens, size, list[int]()

    def __call__(self, tokens: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        self.read += tokens[0].tolist()
        scores = torch.zeros(1, tokens.shape[1], self.size)
        scores[0, -1, self.tokens.pop(0)] = 100.0
        return scores, "state"


def test_it_goes_on_to_the_end(task: LmRnn) -> None:
    size = task.vocabulary.get_vocab_size()
    more = task.vocabulary.encode(" of it").ids
    model = Says([*more, END, END], size)
    begin = task.vocabulary.encode("the end").ids
    assert "".join(task.predict(model, batch(task, "the end"))) == "the end of it"
    # Each piece is read once.
    assert model.read == [END, *begin, *more]
    endless = Says([more[0]] * 20, size)
    assert len(list(task.predict(endless, batch(task, "the end")))) == 1 + 9


def test_it_shows_a_text(task: LmRnn) -> None:
    (shown,) = task.samples(task.build().eval(), batch(task, "the end of a text of a text"))
    assert shown.data.decode().startswith(task.vocabulary.decode(task.vocabulary.encode("the end of a text").ids[:8]))
