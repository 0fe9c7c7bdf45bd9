"""What jobs.chat_transformer learns of packed dialogues, which answers it counts, and how it keeps a conversation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from dltrain import Batch, Input, Keys
from dltrain.data.packing import pack
from jobs.chat_transformer import BEGIN, BOT, END, LEARNED, SPECIAL, USER, ChatTransformer, encoded
from jobs.common import vocabulary
from jobs.common.dialogues import SKILLS, dialogue

TURNS = [("where is it", "here"), ("and now", "there")]
LENGTH = 32


@pytest.fixture
def task(tmp_path: Path) -> ChatTransformer:
    vocabulary.save(str(tmp_path), vocabulary.learn([text for turn in TURNS for text in turn] * 9, 290, SPECIAL))
    return ChatTransformer(
        f"{tmp_path}/vocabulary.json", length=LENGTH, width=16, layers=1, heads=2, groups=1, pieces=5
    )


def batch(task: ChatTransformer, *documents: list[int]) -> Batch:
    table = pa.table({"tokens": pa.array(documents, pa.list_(pa.int32()))})
    rows = pack(table, "tokens", LENGTH, -(-sum(map(len, documents)) // LENGTH))
    keys = Keys(0, np.zeros(rows.num_rows, np.int64), np.arange(rows.num_rows))
    return task.collate(rows.combine_chunks().to_batches()[0], keys)


def test_answers_alone_are_learned(task: ChatTransformer) -> None:
    words = task.vocabulary
    tokens = encoded(TURNS, words)
    here, there = words.encode("here").ids, words.encode("there").ids
    assert [t for t in tokens if t < LEARNED][:2] == [BEGIN, USER]
    assert [t - LEARNED for t in tokens if t >= LEARNED] == [*here, END, *there, END]
    one = batch(task, tokens)
    assert one.count == one.learned.sum() == len(here) + len(there) + 2
    before = one.tokens[:, :-1][one.learned].tolist()
    assert before == [BOT, *here, BOT, *there]


def test_of_a_dialogue_that_was_cut_what_is_whole_counts(task: ChatTransformer) -> None:
    tokens = encoded(TURNS, task.vocabulary)
    one = batch(task, *[tokens] * 5)
    assert one.tokens.shape[0] > 1
    wanted = one.tokens[:, 1:]
    found = task._answers(wanted, one)
    answers = [task.vocabulary.encode(text).ids for _, text in TURNS]
    # What each row holds of dialogues that begin in it.
    expected = []
    for row in range(len(one.tokens)):
        ids, segments = one.tokens[row].tolist(), one.segments[row].tolist()
        for number in sorted(set(segments) - {0}):
            mine = [token for token, segment in zip(ids, segments, strict=True) if segment == number]
            if mine[0] == BEGIN:
                expected += [[*answer, END] for answer in answers[: mine.count(END)]]
    assert [a for _, a, _ in found] == expected
    assert 5 <= len(found) < 10
    assert all(right for right, _, _ in found)


def test_one_wrong_piece_makes_an_answer_wrong(task: ChatTransformer) -> None:
    one = batch(task, encoded(TURNS, task.vocabulary))
    said = one.tokens[:, 1:].clone()
    place = one.learned[0].nonzero()[0, 0]
    said[0, place] += 1
    assert [right for right, _, _ in task._answers(said, one)] == [False, True]

    def model(tokens: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(said, 300).float() * 50

    found = task.evaluate(model, one)["right"]
    assert (found.total, found.count) == (1, 2)


def test_a_dialogue_does_not_see_another(task: ChatTransformer) -> None:
    model = task.build().eval()
    tokens = encoded(TURNS, task.vocabulary)[:12]
    alone, second = batch(task, tokens), batch(task, [BEGIN, USER, 9, 8, 7], tokens)
    with torch.no_grad():
        a = model(alone.tokens, alone.segments)[0, : len(tokens)]
        b = model(second.tokens, second.segments)[0, 5 : 5 + len(tokens)]
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_was_kept_gives_the_same_as_reading_again(task: ChatTransformer) -> None:
    model = task.build().eval()
    tokens = torch.tensor([encoded(TURNS, task.vocabulary)]) % LEARNED
    cache: dict[Any, Any] = {}
    with torch.no_grad():
        whole = model(tokens)
        parts = [model(part, cache=cache) for part in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:7])]
    torch.testing.assert_close(torch.cat(parts, 1), whole[:, :7], rtol=1e-4, atol=1e-5)


def test_it_keeps_what_was_said(task: ChatTransformer) -> None:
    words = task.vocabulary

    class Says:
        """Answers "here", whatever it reads."""

        read: list[int]

        def __call__(self, tokens: torch.Tensor, cache: dict[Any, Any]) -> torch.Tensor:
            self.read = [*cache.get(0, []), *tokens[0].tolist()]
            cache[0] = self.read
            answer = [*words.encode("here").ids, END]
            scores = torch.zeros(1, tokens.shape[1], 300)
            scores[0, -1, answer[len(self.read) - 1 - max(i for i, t in enumerate(self.read) if t == BOT)]] = 1.0
            return scores

    model = Says()

    def ask(text: str) -> str:
        row = task.read(Input("line", text=text))
        ids = torch.tensor([row["tokens"]])
        return "".join(task.predict(model, Batch(1, tokens=ids, length=torch.tensor([row["num_tokens"]]))))

    assert ask("where is it") == "here"
    assert ask("and now") == "here"
    asked = [t % LEARNED for t in encoded([("where is it", "here"), ("and now", "here")], words)]
    assert [*model.read, END] == asked
    # An empty line begins anew.
    task.read(Input("line", text=""))
    assert task.said == [BEGIN, USER, BOT]


def test_contents_that_are_held_out_are_in_no_training_dialogue() -> None:
    rng = np.random.default_rng(0)
    trained = {turn for _ in range(400) for turn in dialogue(rng, test=False)}
    tested = {turn for _ in range(400) for turn in dialogue(rng, test=True)}
    # What is known of the calendar and of Python is the same for all; so is that something will be remembered.
    facts = ("Which day", "Which month", "What does")
    told = {turn for turn in tested if not turn[0].startswith(facts)}
    assert len(told) > 200
    assert not told & trained
    assert {len(skill(rng, True)) for skill in SKILLS} <= {1, 2, 3}
    turns = [turn for _ in range(200) for skill in SKILLS[1:2] for turn in skill(rng, False)]
    for question, answer in turns:
        numbers = [int(word.strip(",?")) for word in question.split() if word[0].isdigit()]
        assert int(answer.strip(".")) == (max if "larger" in question else min)(numbers)
