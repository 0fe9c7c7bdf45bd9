"""What jobs.finetune_hf learns of its rows, that packed texts stay apart, and what LoRA and bf16 leave alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dltrain import Input, Keys
from dltrain.data.packing import pack
from dltrain.errors import DataError, MissingExtraError, UserError
from jobs.common import hf
from jobs.common.hf_batch import of_texts, padded, positions
from jobs.common.hf_data import questions, tokenize, tokenized
from jobs.common.hf_text import LEARNED, asked, marked
from jobs.common.hf_tiny import write_tiny
from jobs.common.hf_tuning import check_packs, save_model, with_lora
from jobs.finetune_hf import FinetuneHf

TEXTS = ["Which day comes after Monday?", "Tuesday."] * 9
PAIRS = {"prompt": TEXTS[:1] * 3, "answer": ["Tuesday.", "", "Monday. Tuesday."]}
KINDS = ("llama", "gpt2", "t5")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kind."""
    home = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        write_tiny(f"{home}/{kind}", TEXTS, kind, size=290, width=16)
    return home


def batch_of(task: FinetuneHf, columns: dict[str, Any] | pa.Table) -> Any:
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    keys = Keys(0, np.zeros(len(table), np.int64), np.arange(len(table)))
    return task.collate(table.combine_chunks().to_batches()[0], keys)


def test_answers_alone_are_learned(models: Path) -> None:
    task = FinetuneHf(f"{models}/llama")
    batch, words = batch_of(task, PAIRS), task.tokenizer
    wanted = [row[row >= 0].tolist() for row in batch.wanted]
    assert [words.decode(row) for row in wanted] == ["Tuesday.<end>", "<end>", "Monday. Tuesday.<end>"]
    assert batch.count == sum(map(len, wanted))
    assert batch.asked == [asked(words, TEXTS[0])] * 3
    whole = batch_of(FinetuneHf(f"{models}/llama", fields=["answer"]), PAIRS)
    assert whole.count == batch.count


def test_a_text_is_cut_where_its_answer_stays(models: Path) -> None:
    task = FinetuneHf(f"{models}/llama", longest=9)
    batch = batch_of(task, PAIRS)
    assert batch.input_ids.shape[1] == 8
    assert (batch.wanted[:, -1] == task.tokenizer.eos_token_id).any()


def test_positions_of_packed_rows() -> None:
    segments = torch.tensor([[1, 1, 1, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    assert positions(segments).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], [*range(8)]]
    tokens = torch.tensor([[5, 6 | LEARNED, 7, 8 | LEARNED, 9, 3 | LEARNED, 0, 0]])
    batch = of_texts(tokens, segments[:1], [1])
    # The first token of a text follows nothing.
    assert batch.wanted.tolist() == [[6, -1, -1, -1, -1, -1, -1]]
    assert batch.input_ids.max() < LEARNED


@pytest.mark.parametrize("kind", KINDS[:2])
def test_packed_texts_give_what_they_give_alone(models: Path, kind: str) -> None:
    task = FinetuneHf(f"{models}/{kind}", packed=64)
    model = task.build().eval()
    table = tokenized(task.tokenizer, questions(12, test=False))
    rows = pack(table, "tokens", 64, -(-sum(len(one) for one in table["tokens"].to_pylist()) // 64))
    first = table["tokens"].to_pylist()[:2]
    second = slice(len(first[0]), min(63, len(first[0]) + len(first[1])))
    with torch.no_grad():
        packed = task._scores(model, batch_of(task, rows))[0, second]
        alone = model(input_ids=torch.tensor([first[1]]) % LEARNED).logits[0, : len(packed)]
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


def test_a_model_that_would_mix_texts_is_refused() -> None:
    class Mixes(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, use_cache: bool) -> Any:
            return type("Out", (), {"logits": torch.nn.functional.one_hot(input_ids).float().cumsum(1)})

    with pytest.raises(UserError, match="Mixes does not keep texts in one row apart"):
        check_packs(Mixes())


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_has_a_part_in_the_loss(models: Path, kind: str) -> None:
    task = FinetuneHf(f"{models}/{kind}")
    model, batch = task.build(), batch_of(task, PAIRS)
    loss = task.loss(model, batch)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        found = task.evaluate(model.eval(), batch)
    assert found["loss"].total / found["loss"].count == pytest.approx(loss.item(), rel=1e-4)
    assert task.metrics({"loss": 0.0, "accuracy": 1.0})["perplexity"] == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_lora_begins_as_the_model_and_comes_back_merged(models: Path, tmp_path: Path, kind: str) -> None:
    task, whole = FinetuneHf(f"{models}/{kind}", lora=2), FinetuneHf(f"{models}/{kind}")
    model, batch = task.build().eval(), batch_of(task, PAIRS)
    with torch.no_grad():
        torch.testing.assert_close(task._scores(model, batch), whole._scores(whole.build().eval(), batch))
        for name, one in model.named_parameters():
            assert one.requires_grad == ("lora_" in name)
            one += 0.02 if one.requires_grad else 0.0
        tuned = task._scores(model, batch)
    save_model(model, task.tokenizer, f"{tmp_path}/merged")
    again = FinetuneHf(f"{tmp_path}/merged")
    with torch.no_grad():
        torch.testing.assert_close(again._scores(again.build().eval(), batch), tuned, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=r"args\.targets"):
        with_lora(whole.build(), 2, ["no_such_layer"])


def test_frequencies_stay_exact_in_bf16(models: Path) -> None:
    model = hf.load_model(f"{models}/llama")
    exact = {name: one.clone() for name, one in model.named_buffers() if "inv_freq" in name}
    assert exact
    model.bfloat16()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(torch.equal(one, exact[name]) for name, one in model.named_buffers() if name in exact)


def test_rows_are_continued_from_the_right() -> None:
    found = padded([[5, 6], [7, 8, 9]], left=True)
    assert found["input_ids"].tolist() == [[0, 5, 6], [7, 8, 9]]
    assert found["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert padded([[5, 6], [7, 8, 9]])["input_ids"].tolist() == [[5, 6, 0], [7, 8, 9]]


@pytest.mark.parametrize(("kind", "packed"), [("llama", 64), ("gpt2", 0), ("t5", 0)])
def test_lines_are_answered(models: Path, kind: str, packed: int) -> None:
    task = FinetuneHf(f"{models}/{kind}", packed=packed, pieces=4)
    lines = [task.read(Input("line", text=text)) for text in (TEXTS[0], "Monday?")]
    rows = [{"answer": "", **line} for line in lines] if not packed else lines
    table = pa.Table.from_pylist(rows)
    fixed = [pa.list_(one.type.value_type, 64) if pa.types.is_list(one.type) else one.type for one in table.schema]
    batch = batch_of(task, table.cast(pa.schema(list(zip(table.column_names, fixed, strict=True)))))
    with torch.no_grad():
        said = task.predict(task.build().eval(), batch)
    assert len(said) == 2
    assert all(isinstance(text, str) for text in said)
    assert task.samples(task.build().eval(), batch)


def test_a_chat_template_is_followed(models: Path) -> None:
    words = hf.load_tokenizer(f"{models}/llama")
    words.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    assert words.decode(asked(words, "Monday?")) == "[Monday?]"
    ids = marked(words, "Monday?", "Tuesday.")
    assert words.decode([token % LEARNED for token in ids if token >= LEARNED]) == "Tuesday.<end>"


def test_parquet_is_given_tokens(models: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(PAIRS), tmp_path / "in" / "a.parquet")
    assert tokenize(f"{models}/llama", f"{tmp_path}/in", f"{tmp_path}/out") == f"wrote 1 files to {tmp_path}/out"
    assert pq.read_table(tmp_path / "out")["tokens"].to_pylist()[0][-1] & LEARNED
    with pytest.raises(DataError, match="prompt and answer are needed, or text"):
        tokenized(hf.load_tokenizer(f"{models}/llama"), pa.table({"x": [1]}))
    with pytest.raises(DataError, match="no Parquet"):
        tokenize(f"{models}/llama", f"{tmp_path}/none", f"{tmp_path}/out")


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        hf.load_model(str(tmp_path))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'dltrain\[hf\]'"):
        hf.needed("peft")
