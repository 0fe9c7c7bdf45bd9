"""What jobs.translate_transformer reads, writes and counts; and its network, which the job of summaries has as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from dltrain import Batch, Input, Keys
from jobs.common import vocabulary
from jobs.common.cldr import phrase
from jobs.common.seq2seq import PAD, Seq2Seq, token_losses, write
from jobs.translate_transformer import END, LANGUAGES, SPECIAL, TranslateTransformer

ROWS = [
    {"text": "in 3 days", "language": "fr", "translation": "dans 3 jours"},
    {"text": "in 14 days", "language": "de", "translation": "in 14 Tagen"},
]


@pytest.fixture
def task(tmp_path: Path) -> TranslateTransformer:
    texts = [row[name] for row in ROWS for name in ("text", "translation")]
    vocabulary.save(str(tmp_path), vocabulary.learn(texts * 9, 290, SPECIAL))
    return TranslateTransformer(f"{tmp_path}/vocabulary.json", longest=12, width=16, layers=1, heads=2, groups=1)


def batch(task: TranslateTransformer, rows: list[dict[str, str]]) -> Batch:
    keys = Keys(0, np.zeros(len(rows), np.int64), np.arange(len(rows)))
    return task.collate(pa.RecordBatch.from_pylist(rows), keys)


def network() -> Seq2Seq:
    torch.manual_seed(0)
    return Seq2Seq(size=20, width=16, layers=2, heads=4, groups=2).eval()


def test_chances_add_up_to_one() -> None:
    source, target = torch.randint(1, 20, (2, 5)), torch.randint(1, 20, (2, 4))
    with torch.no_grad():
        chances = network()(source, target)
    torch.testing.assert_close(chances.exp().sum(-1), torch.ones(2, 4), rtol=1e-4, atol=1e-4)


def test_what_is_copied_comes_from_the_source() -> None:
    model = network()
    with torch.no_grad():
        # The gate always says: copy.
        torch.nn.init.zeros_(model.gate.weight)
        torch.nn.init.constant_(model.gate.bias, -30.0)
        chances = model(torch.tensor([[7, 9, 7, PAD]]), torch.tensor([[2, 3]])).exp()
    assert chances[0, :, [7, 9]].sum(-1).tolist() == pytest.approx([1, 1], abs=1e-4)
    assert chances[0, :, PAD].max() < 1e-4


def test_padding_changes_nothing_and_later_pieces_are_not_seen() -> None:
    model, target = network(), torch.tensor([[2, 3, 4]])
    with torch.no_grad():
        short = model(torch.tensor([[7, 9]]), target)
        torch.testing.assert_close(model(torch.tensor([[7, 9, PAD, PAD]]), target), short)
        torch.testing.assert_close(model(torch.tensor([[7, 9]]), target[:, :2]), short[:, :2])
        assert not torch.allclose(model(torch.tensor([[9, 7]]), target), short)


def test_written_piece_by_piece_as_all_at_once() -> None:
    model, source = network(), torch.tensor([[7, 9, 5], [4, 4, PAD]])
    with torch.no_grad():
        rows = write(model, source, torch.tensor([2, 3]), end=1, most=6)
        for row, begin, one in zip(rows, (2, 3), source, strict=True):
            told = torch.tensor([[begin, *row]])
            best = model(one[None], told).argmax(-1)[0].tolist()
            assert best[: len(row)] == row
            assert len(row) == 6 or best[len(row)] == 1


def test_losses_are_those_of_pieces_that_are_there() -> None:
    chances = torch.randn(1, 3, 5).log_softmax(-1)
    found = token_losses(chances, torch.tensor([[3, 1, PAD]]))
    assert found.item() == pytest.approx(-(chances[0, 0, 3] + chances[0, 1, 1]).item(), rel=1e-5)


def test_rows_and_their_loss(task: TranslateTransformer) -> None:
    model, both = task.build().eval(), batch(task, ROWS)
    assert both.begin.tolist() == [LANGUAGES["fr"], LANGUAGES["de"]]
    assert both.count == sum(len(task.vocabulary.encode(row["translation"]).ids) + 1 for row in ROWS)
    assert (both.target == END).sum() == 2
    with torch.no_grad():
        apart = sum(task._nats(model, batch(task, [row])).item() for row in ROWS)
        assert task.loss(model, both).item() == pytest.approx(apart / both.count, rel=1e-4)


def test_bleu_is_that_of_all_together(task: TranslateTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    from sacrebleu.metrics import BLEU

    said = ["dans 3 jours de plus", "in 14 Tagen und Wochen"]
    wanted = ["dans 3 jours de trop", "in 14 Tagen und Wochen"]
    rows = [{**row, "translation": text} for row, text in zip(ROWS, wanted, strict=True)]
    totals: Any = 0.0
    for one, row in zip(said, rows, strict=True):
        monkeypatch.setattr(task, "_said", lambda model, batch, one=one: [one])
        found = task.evaluate(task.build().eval(), batch(task, [row]))
        totals = totals + np.asarray(found["bleu"].total)
    means = task.metrics({"exact": 0.5, "loss": 1.0, "bleu": totals / 2})
    assert means["bleu"] == pytest.approx(BLEU().corpus_score(said, [wanted]).score, rel=1e-6)
    assert means["exact"] == 0.5


def test_lines_say_into_which_language(task: TranslateTransformer) -> None:
    assert task.read(Input("line", text="in 3 days")) == {"text": "in 3 days", "language": "fr"}
    assert task.read(Input("line", text="de: in 3 days")) == {"text": "in 3 days", "language": "de"}
    assert task.read(Input("line", text="note: in 3 days"))["text"] == "note: in 3 days"
    assert task.read(Input("line", text='{"text": "a", "language": "de"}')) == {"text": "a", "language": "de"}
    blank = batch(task, [{**ROWS[0], "translation": ""}])
    with torch.no_grad():
        (said,) = task.predict(task.build().eval(), blank)
    assert isinstance(said, str)


def test_phrases_that_are_held_out_are_in_no_training_data() -> None:
    rng = np.random.default_rng(0)
    train = [phrase(rng, test=False) for _ in range(700)]
    test = [phrase(rng, test=True) for _ in range(200)]
    assert not {one["en"] for one in train} & {one["en"] for one in test}
    assert all(set(one) == {"en", "fr", "de"} and all(one.values()) for one in train)
    assert all("  " not in text and "\xa0" not in text for one in train for text in one.values())
