"""What the jobs of text share: the n-gram model, vocabularies, and the texts that this machine has."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from dltrain.errors import UserError
from jobs.common import docstrings, prose, sampling, vocabulary
from jobs.common.data import read_column, write_splits
from jobs.common.kneser_ney import END, START, KneserNey

TEXTS = ["a word is a word", "Größe, naïve, 数", "the end"]


def test_kneser_ney_by_hand() -> None:
    """Bigrams of "ab" and "ac": each of START a (2), a b, a c, b END, c END (1)."""
    model = KneserNey(["ab", "ac"], order=2)
    # Counts of counts of bigrams: four of 1, one of 2. Of characters, by what they follow: a 1, b 1, c 1, END 2.
    discount, lower = 4 / (4 + 2 * 1), 3 / (3 + 2 * 1)
    # Of 5 kinds of bigrams 1 ends in b; 4 characters, and a place for those that were never seen.
    b = (1 - lower) / 5 + lower * 4 / 5 / 5
    end = (2 - lower) / 5 + lower * 4 / 5 / 5
    assert model.probability("b") == pytest.approx(b)
    assert model.probability(END) == pytest.approx(end)
    # After a: seen twice, with two kinds.
    after_a = (1 - discount) / 2 + discount * 2 / 2 * b
    assert model.probability("ab") == pytest.approx(after_a)
    after_b = (1 - discount) / 1 + discount * 1 / 1 * end
    after_start = (2 - discount) / 2 + discount * 1 / 2 * model.probability("a")
    assert model.bits("ab") == pytest.approx(-math.log2(after_start * after_a * after_b))


def test_chances_add_up_to_one() -> None:
    texts = ["abracadabra", "abrasive", "cadaver"]
    model = KneserNey(texts, order=5)
    letters = sorted(set("".join(texts)) | {END})
    for context in (START * 4, "abra", "cada", "xxxx", "bcda"):
        # What was never seen has the last place.
        total = sum(model.probability(context + letter) for letter in [*letters, "?"])
        assert total == pytest.approx(1.0)
    assert model.bits("abra") < model.bits("arba")


def test_a_vocabulary_says_all_texts(tmp_path: Path) -> None:
    words = vocabulary.learn(["a word is a word"] * 20, size=300, special=("<end>", "<more>"))
    vocabulary.save(str(tmp_path), words)
    again = vocabulary.load(f"{tmp_path}/{vocabulary.FILE}")
    assert again.get_vocab_size() <= 300
    assert again.token_to_id("<more>") == 1
    counts = vocabulary.characters(again)
    assert counts[:2].tolist() == [1, 1]
    for text in TEXTS:
        ids = again.encode(text).ids
        assert again.decode(ids) == text
        assert counts[ids].sum() == len(text)
    assert len(again.encode("a word is").ids) < len("a word is")
    with pytest.raises(UserError, match=r"no file .*none\.json; the job's make-data writes it"):
        vocabulary.load(f"{tmp_path}/none.json")


def test_text_comes_in_whole_characters() -> None:
    words = vocabulary.learn(["a word"], size=257)
    for text in TEXTS:
        pieces = list(sampling.spoken(words, iter(words.encode(text).ids)))
        assert "".join(pieces) == text
        assert len(pieces) > 3


def test_drawn_by_chance_or_not() -> None:
    scores = torch.tensor([0.0, 3.0, 1.0])
    assert sampling.draw_token(scores, 0.0) == 1
    torch.manual_seed(0)
    drawn = [sampling.draw_token(scores, 1.0) for _ in range(300)]
    assert drawn.count(1) / 300 == pytest.approx(math.exp(3) / (1 + math.exp(3) + math.e), abs=0.06)


def test_rows_as_packing_makes_them() -> None:
    assert vocabulary.pack_row("t", [1, 2], 4) == {"t": [1, 2, 0, 0], "segment_ids": [1, 1, 0, 0], "num_tokens": 2}
    assert vocabulary.pack_row("t", [1, 2, 3], 2)["t"] == [2, 3]
    assert vocabulary.pad([[1], [2, 3]]).tolist() == [[1, 0], [2, 3]]
    assert vocabulary.pad([[1]], 3).tolist() == [[1, 0, 0]]


def test_docstrings_are_read_from_source(tmp_path: Path) -> None:
    (tmp_path / "one" / "tests").mkdir(parents=True)
    (tmp_path / "one" / "__init__.py").write_text('"""First."""\ndef f():\n    """Second.\n\n    More.\n    """\n')
    (tmp_path / "one" / "bad.py").write_text("def (")
    (tmp_path / "one" / "tests" / "test_one.py").write_text('"""Not this."""\n')
    (tmp_path / "two.py").write_text('class C:\n    """Third."""\n')
    assert list(docstrings.docstrings(tmp_path)) == [
        ("one", "", "First."),
        ("one", "f", "Second.\n\nMore."),
        ("two", "C", "Third."),
    ]
    assert [one.name for one in docstrings.docstrings(tmp_path, {"two"})] == ["C"]


def test_sentences_are_told_from_code() -> None:
    text = "A heading\n*********\n\nThis paragraph says something about the language,\nand goes on.\n\n   x = f(1, 2)\n"
    assert list(prose.paragraphs(text)) == ["This paragraph says something about the language, and goes on."]


def test_what_is_held_out_is_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(number: int) -> str:
        return f"This is what the chapter with the number {'x' * number} says about its own subject."

    shared = "What more than one chapter says word for word, because one is a part of another one."
    chapters = [(f"chapter {i}", f"{of(i)}\n\n{shared}") for i in range(100)]
    monkeypatch.setattr(prose, "manual", lambda: chapters)
    splits = prose.manual_splits()
    assert not set(splits["train"]) & set(splits["eval"])
    assert shared in splits["eval"]
    assert 80 <= len(splits["train"]) <= 97
    assert len(splits["train"]) + len(splits["eval"]) == 101


def test_a_column_is_read_back(tmp_path: Path) -> None:
    import pyarrow as pa

    write_splits(str(tmp_path), {"eval": pa.table({"text": [str(i) for i in range(300)]})}, rows_per_group=16)
    assert read_column(str(tmp_path), "eval", "text") == [str(i) for i in range(300)]
