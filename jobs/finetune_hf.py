"""Trains any Hugging Face model that lies in a folder, causal or sequence-to-sequence, whole or by LoRA.

python -m jobs.finetune_hf make-data .data/finetune_hf              # a tiny model and some questions, to try it
python -m jobs.finetune_hf tokenize /models/some-llm s3://b/questions s3://b/tokens     # your own, for data.pack
dltrain run jobs/finetune_hf.yaml args.model=/models/some-llm args.lora=16
dltrain predict finetune-hf --text "Which is larger, 21 or 34?"
python -m jobs.finetune_hf export finetune-hf tuned [bf16]           # for AutoModel*.from_pretrained("tuned")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import nn

from dltrain import Artifact, Batch, Input, Keys, Sum, Task
from dltrain.data.columns import tensors
from jobs.common import hf, vocabulary
from jobs.common.data import main, write_splits
from jobs.common.hf_batch import of_pairs, of_texts, padded
from jobs.common.hf_data import questions, tokenize, tokenized
from jobs.common.hf_text import LEARNED, asked, marked
from jobs.common.hf_tiny import write_tiny
from jobs.common.hf_tuning import check_packs, export, with_lora

# What it reaches depends on the model and the data that it is given.
GOALS = ()


class FinetuneHf(Task):
    """What follows a prompt, or the rest of a text.

    Args:
        model: its folder, as `save_pretrained` writes it, on each node or at a URL.
        packed: tokens of a row, as in data.pack; with 0 rows are texts in `fields`.
        fields: columns of a prompt and its answer, or the one of texts, all of which is learned.
        longest: tokens of a text that is not packed.
        lora: rank of the matrices that are trained in place of the weights; 0: all weights are trained.
        targets: layers that get them, as peft names them.
        temperature, pieces: of an answer.
    """

    def __init__(
        self,
        model: str,
        packed: int = 0,
        fields: Sequence[str] = ("prompt", "answer"),
        longest: int = 512,
        lora: int = 0,
        targets: str | Sequence[str] = "all-linear",
        temperature: float = 0.0,
        pieces: int = 64,
    ) -> None:
        self.model, self.packed, self.longest, self.lora, self.targets = model, packed, longest, lora, targets
        self.temperature, self.pieces, self.fields = temperature, pieces, tuple(fields)
        self.columns = ("tokens", "segment_ids", "num_tokens") if packed else self.fields
        self.target_columns = self.columns[1:2] if not packed else ()

    @cached_property
    def tokenizer(self) -> Any:
        return hf.load_tokenizer(self.model)

    @cached_property
    def config(self) -> Any:
        return hf.load_config(self.model)

    def build(self) -> nn.Module:
        model = hf.load_model(self.model)
        if self.packed:
            check_packs(model)
        return with_lora(model, self.lora, self.targets) if self.lora else model

    def collate(self, rows: pa.RecordBatch, keys: Keys) -> Batch:
        if self.config.is_encoder_decoder:
            pairs = [rows[name].to_pylist() for name in self.fields]
            return of_pairs(self.tokenizer, self.config.decoder_start_token_id, *pairs, self.longest)
        if self.packed:
            found = tensors(rows)
            return of_texts(found["tokens"].long(), found["segment_ids"], found["num_tokens"].tolist())
        *prompts, answers = (rows[name].to_pylist() for name in self.fields)
        pairs = zip(prompts[0] if prompts else [""] * len(answers), answers, strict=True)
        ids = [marked(self.tokenizer, *pair)[-self.longest :] for pair in pairs]
        there = torch.from_numpy(vocabulary.pad([[1] * len(one) for one in ids]))
        begun = [sum(token < LEARNED for token in one) if prompts else len(one) - 1 for one in ids]
        return of_texts(torch.from_numpy(vocabulary.pad(ids)), there, begun)

    def _scores(self, model: Any, batch: Batch) -> torch.Tensor:
        inputs = {name: one for name, one in batch.tensors.items() if name not in ("wanted", "asked")}
        scores: torch.Tensor = model(**inputs, use_cache=False).logits
        return scores

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        return _nats(self._scores(model, batch), batch) / max(batch.count, 1)

    def evaluate(self, model: Any, batch: Batch) -> dict[str, Sum]:
        scores = self._scores(model, batch)
        right = int((scores.argmax(-1) == batch.wanted).sum())
        return {"loss": Sum(_nats(scores, batch).item(), batch.count), "accuracy": Sum(right, batch.count)}

    def metrics(self, means: Mapping[str, Any]) -> dict[str, float]:
        return {**means, "perplexity": float(np.exp(means["loss"]))}

    def samples(self, model: Any, batch: Batch) -> list[Artifact]:
        said, text = self._scores(model, batch).argmax(-1), self.tokenizer.decode
        pairs = [(a[b >= 0], b[b >= 0]) for a, b in zip(said, batch.wanted, strict=True)]
        rows = [{"wanted": text(b.tolist()), "said": text(a.tolist())} for a, b in pairs[:24]]
        return [Artifact.table(rows, "the likeliest token after each one of what was wanted")]

    def read(self, source: Input) -> Mapping[str, Any]:
        text = source.text if source.text is not None else (source.data or b"").decode()
        if text.lstrip().startswith("{"):
            return super().read(source)
        if not self.packed:
            return {self.fields[0]: text}
        whole = marked(self.tokenizer, "", text)[:-1] if len(self.fields) == 1 else asked(self.tokenizer, text)
        return vocabulary.pack_row("tokens", [token % LEARNED for token in whole], self.packed)

    def predict(self, model: Any, batch: Batch) -> list[str]:
        device = batch.input_ids.device
        given = {name: one.to(device) for name, one in padded(batch.asked, left=True).items()}
        drawn = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        ends = {"pad_token_id": self.tokenizer.eos_token_id, "eos_token_id": self.tokenizer.eos_token_id}
        ids = model.generate(**given, **drawn, **ends, max_new_tokens=self.pieces)
        # A causal model gives back what it was given.
        ids = ids if self.config.is_encoder_decoder else ids[:, given["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def _nats(scores: torch.Tensor, batch: Batch) -> torch.Tensor:
    wanted = batch.wanted.flatten()
    return F.cross_entropy(scores.flatten(0, 1).float(), wanted, ignore_index=-1, reduction="sum")


def make_data(url: str, rows: int = 4000, kind: str = "llama") -> dict[str, int]:
    """Writes questions and answers under url/train and url/eval, and a tiny model for them under url/model."""
    said = {name: questions(count, name == "eval") for name, count in (("train", rows), ("eval", rows // 20))}
    write_tiny(f"{url}/model", [text for column in said["train"].columns for text in column.to_pylist()], kind)
    tokenizer = hf.load_tokenizer(f"{url}/model")
    return write_splits(url, {name: tokenized(tokenizer, table) for name, table in said.items()})


if __name__ == "__main__":
    main(make_data, tokenize, export)
