"""What jobs.summarize_transformer learns from, how summaries are scored, and what it reads and writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from dltrain import Batch, Input, Keys
from dltrain.errors import UserError
from jobs.common import summaries, vocabulary
from jobs.common.data import write_splits
from jobs.common.docstrings import Docstring
from jobs.common.repeats import banned
from jobs.common.rouge import rouge_l
from jobs.common.seq2seq import write
from jobs.common.summaries import Summary, lead, plain, summary_splits
from jobs.summarize_transformer import BEGIN, END, SPECIAL, SummarizeTransformer, baselines

LONG = "The values are read from a file that is closed after it, whatever happens to the reader in between."
ROWS = [
    {"text": "It adds up all of the values.", "summary": "Return the sum"},
    {"text": "It multiplies the values.", "summary": "Return the product of values"},
]


@pytest.fixture
def task(tmp_path: Path) -> SummarizeTransformer:
    texts = [text for row in ROWS for text in row.values()]
    vocabulary.save(str(tmp_path), vocabulary.learn(texts * 9, 300, SPECIAL))
    return SummarizeTransformer(f"{tmp_path}/vocabulary.json", length=6, longest=5, width=16, layers=1, heads=2)


def batch(task: SummarizeTransformer, rows: list[dict[str, str]]) -> Batch:
    keys = Keys(0, np.zeros(len(rows), np.int64), np.arange(len(rows)))
    return task.collate(pa.RecordBatch.from_pylist(rows), keys)


def found(text: str) -> list[Summary]:
    return list(summaries.summaries([Docstring("pack.module", "name", text)]))


def test_marks_of_restructuredtext_are_left_out() -> None:
    assert plain("See :meth:`~pack.Class.run`, ``x_y`` and *args*\n  or :ref:`this <there>`.") == (
        "See pack.Class.run, x_y and args or there."
    )


def test_the_first_sentence() -> None:
    assert lead("It reads 3.5 files. Then it stops.") == "It reads 3.5 files."
    assert lead("One alone") == "One alone"


def test_a_docstring_is_a_line_and_what_follows() -> None:
    assert found(f"Read all values.\n\n{LONG}") == [Summary("pack", LONG, "Read all values")]
    # Code, of one word, of two sentences, without more, and followed by a list of parameters.
    for text in ("read(x) -> y", "Read.", "Read it all. Then stop.", "read it all"):
        assert not found(f"{text}\n\n{LONG}")
    assert not found("Read all values.")
    assert not found(f"Read all values.\n\nArgs: {LONG}")


def package(root: Path, name: str, texts: list[tuple[str, str]]) -> None:
    (root / name).mkdir()
    code = "\n".join(f'def f{i}():\n    """{a}.\n\n    {b}\n    """' for i, (a, b) in enumerate(texts))
    (root / name / "__init__.py").write_text(code)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three packages, of which the last is held out."""
    common = ("Read the same values", f"{LONG} In any package.")
    package(tmp_path, "a", [common, *((f"Read value {i}a", f"Number {i} of a. {LONG}") for i in range(9))])
    package(tmp_path, "b", [("Read the same values", f"In b. {LONG}"), ("Read it once more", f"In b alone. {LONG}")])
    package(tmp_path, "c", [common, *((f"Write value {i}c", f"Number {i} of c. {LONG}") for i in range(9))])
    (tmp_path / "library").mkdir()
    monkeypatch.setattr(summaries, "PACKAGES", ("a", "b", "c", "not_there"))
    monkeypatch.setattr(summaries, "site_packages", lambda: tmp_path)
    monkeypatch.setattr(summaries, "standard_library", lambda: tmp_path / "library")
    monkeypatch.setattr(summaries, "held_out", lambda name, one_in: name == "c")


@pytest.mark.usefixtures("installed")
def test_packages_are_held_out_with_all_that_they_say() -> None:
    splits = summary_splits(most=6, most_held_out=4)
    assert splits == summary_splits(most=6, most_held_out=4)
    assert {one.package for one in splits["eval"]} == {"c"}
    assert len(splits["eval"]) == 4
    assert [one.package for one in splits["train"]].count("a") == 5
    # The summary of c is in neither package of the training data, whatever follows it there.
    assert [one.summary for one in splits["train"] if one.package == "b"] == ["Read it once more"]
    for part in ("text", "summary"):
        sets = [{getattr(one, part) for one in some} for some in splits.values()]
        assert not sets[0] & sets[1]
        assert [len(one) for one in sets] == [len(some) for some in splits.values()]


def test_rouge_counts_words_in_their_order() -> None:
    # Of "return the sum" two words are there, of four said: 2 x 0.5 x 2/3 / (0.5 + 2/3).
    (score,) = rouge_l(["Returns a large sum"], ["Return the sum"])
    assert score == pytest.approx(4 / 7)
    assert rouge_l(["sum the return"], ["return the sum"])[0] == pytest.approx(1 / 3)
    assert rouge_l([""], ["anything"]) == [0.0]


def test_the_baseline_is_the_first_sentence(tmp_path: Path) -> None:
    rows = [{"text": "Return the sum. It is fast.", "summary": "Return the sum"}, {"text": "A. B.", "summary": "c"}]
    write_splits(str(tmp_path), {"eval": pa.Table.from_pylist(rows)})
    assert baselines(str(tmp_path)) == {"rouge_l": pytest.approx(0.5)}


def test_long_texts_are_cut_and_summaries_end(task: SummarizeTransformer) -> None:
    long = {"text": "values " * 20, "summary": "values " * 20}
    both = batch(task, [long, {"text": "It adds", "summary": "the sum"}])
    assert both.source.shape == (2, 6)
    assert both.target.shape == (2, 5)
    assert (both.target == END).sum(1).tolist() == [0, 1]
    assert both.count == int((both.target != 0).sum())


def test_the_loss_is_per_piece(task: SummarizeTransformer) -> None:
    torch.manual_seed(0)
    model, both = task.build().eval(), batch(task, ROWS)
    with torch.no_grad():
        apart = sum(float(task.loss(model, one)) * one.count for one in (batch(task, [row]) for row in ROWS))
        assert float(task.loss(model, both)) == pytest.approx(apart / both.count, rel=1e-4)
        found = task.evaluate(model, both)
    assert (found["rouge_l"].count, found["loss"].count) == (2, both.count)
    # What comes next is not read before.
    begin = torch.full((2, 1), BEGIN)
    with torch.no_grad():
        first = model(both.source, begin)
        all_of_it = model(both.source, torch.cat([begin, both.target[:, :-1]], 1))
    torch.testing.assert_close(all_of_it[:, :1], first, rtol=1e-4, atol=1e-4)


def test_text_is_read_and_summarized(task: SummarizeTransformer) -> None:
    assert task.read(Input("a.txt", data=b"It adds\n  ``values``.\n")) == {"text": "It adds values."}
    with pytest.raises(UserError, match="no text"):
        task.read(Input("line", text="  "))
    with torch.no_grad():
        said = task.predict(task.build().eval(), batch(task, [{**ROWS[0], "summary": ""}]))
    assert isinstance(said[0], str)


def test_no_run_comes_again() -> None:
    assert banned([5, 6, 7, 5, 6], run=3) == {7}
    assert banned([5, 6, 7, 6, 5], run=3) == set()
    assert banned([5], run=3) == set()
    assert banned([5, 6, 5], run=2) == {6}


def test_what_repeats_is_not_written() -> None:
    """A network that always says 1, 2, 3, 1, 2, 3, ... and as a second choice 4 and then the end, 0."""

    def model(source: torch.Tensor, token: torch.Tensor, cache: dict[str, int]) -> torch.Tensor:
        place = cache["place"] = cache.get("place", -1) + 1
        scores = torch.zeros(len(source), 1, 5)
        scores[..., 0 if place > 5 else 4] = 1.0
        scores[..., place % 3 + 1] = 2.0 if place < 6 else 0.0
        return scores

    begin = torch.zeros(2, dtype=torch.long)
    source = torch.ones(2, 3, dtype=torch.long)
    assert write(model, source, begin, end=0, most=9, run=3) == [[1, 2, 3, 1, 2, 4]] * 2
    assert write(model, source, begin, end=0, most=9) == [[1, 2, 3, 1, 2, 3]] * 2
