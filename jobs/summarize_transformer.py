"""The first line of a docstring out of what follows it, an encoder-decoder transformer that can copy.

python -m jobs.summarize_transformer make-data .data/summarize_transformer
dltrain run jobs/summarize_transformer.yaml
dltrain predict summarize-transformer notes.txt       # or lines of text: -
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import pyarrow as pa
import torch
from torch import nn

from dltrain import Artifact, Batch, Input, Keys, Sum, Task
from dltrain.errors import UserError
from jobs.common import vocabulary
from jobs.common.data import main, read_column, write_splits
from jobs.common.figures import Bench, Figure
from jobs.common.rouge import rouge_l
from jobs.common.seq2seq import Seq2Seq, token_losses, write
from jobs.common.summaries import Summary, lead, plain, summary_splits

SPECIAL = ("<pad>", "<end>", "<begin>")
END, BEGIN = 1, 2
SHOWN = 24


class SummarizeTransformer(Task):
    """A line that says what a text is about.

    Args:
        vocabulary: the file that `make-data` writes.
        length: pieces of a text that are read, from its beginning; longest: pieces of a summary, at most.
        sizes: of the network: width, layers, heads, groups, dropout.
    """

    columns = ("text", "summary")
    target_columns = ("summary",)

    def __init__(self, vocabulary: str, length: int = 64, longest: int = 20, **sizes: Any) -> None:
        self.url, self.length, self.longest, self.sizes = vocabulary, length, longest, sizes

    @cached_property
    def vocabulary(self) -> Any:
        return vocabulary.load(self.url)

    def build(self) -> nn.Module:
        return Seq2Seq(self.vocabulary.get_vocab_size(), **self.sizes)

    def collate(self, rows: pa.RecordBatch, keys: Keys) -> Batch:
        text, summary = (rows[name].to_pylist() for name in self.columns)
        source = self._ids(text, self.length)
        # A summary that is too long is learned as far as it goes, without its end.
        target = self._ids(summary, self.longest)
        count = int((target != 0).sum())
        return Batch(count, source=source, target=target, text=text, wanted=summary)

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        return self._nats(model, batch) / max(batch.count, 1)

    def evaluate(self, model: Any, batch: Batch) -> dict[str, Sum]:
        scores = rouge_l(self._said(model, batch), batch.wanted)
        nats = self._nats(model, batch).item()
        return {"rouge_l": Sum(sum(scores), len(scores)), "loss": Sum(nats, batch.count)}

    def samples(self, model: Any, batch: Batch) -> list[Artifact]:
        found = list(zip(batch.text, self._said(model, batch), batch.wanted, strict=True))[:SHOWN]
        rows = [{"text": text, "said": said, "its author": wanted} for text, said, wanted in found]
        return [Artifact.table(rows, "docstrings of packages that it has not read")]

    def read(self, source: Input) -> dict[str, str]:
        text = source.text if source.text is not None else (source.data or b"").decode(errors="replace")
        if not text.strip():
            raise UserError("no text: there is nothing to summarize")
        return {"text": plain(text)}

    def predict(self, model: Any, batch: Batch) -> Sequence[str]:
        return self._said(model, batch)

    def _ids(self, texts: Sequence[str], most: int) -> torch.Tensor:
        found = self.vocabulary.encode_batch(list(texts))
        return torch.from_numpy(vocabulary.pad([[*one.ids, END][:most] for one in found]))

    def _said(self, model: Any, batch: Batch) -> list[str]:
        begin = torch.full_like(batch.source[:, 0], BEGIN)
        ids = write(model, batch.source, begin, END, self.longest, run=2)
        return [str(self.vocabulary.decode(one)).strip() for one in ids]

    def _nats(self, model: Any, batch: Batch) -> torch.Tensor:
        begin = torch.full_like(batch.target[:, :1], BEGIN)
        before = torch.cat([begin, batch.target[:, :-1]], 1)
        return token_losses(model(batch.source, before), batch.target)


def make_data(url: str, vocabulary_size: int = 3072, most: int = 1200) -> dict[str, int]:
    """Writes docstrings of packages under url/train, of others under url/eval, and the vocabulary of the former.

    Args:
        most: docstrings of a package, at most.
    """
    found = summary_splits(most=most)
    texts = [text for one in found["train"] for text in (one.text, one.summary)]
    vocabulary.save(url, vocabulary.learn(texts, vocabulary_size, SPECIAL))
    return write_splits(url, {name: _table(some) for name, some in found.items()}, rows_per_group=32)


def _table(some: Sequence[Summary]) -> pa.Table:
    return pa.Table.from_pylist([one._asdict() for one in some])


def baselines(data_url: str) -> Mapping[str, float]:
    """The first sentence of each text as its summary."""
    texts, wanted = (read_column(data_url, "eval", name) for name in ("text", "summary"))
    scores = rouge_l([lead(text) for text in texts], wanted)
    return {"rouge_l": sum(scores) / len(scores)}


def figures(bench: Bench) -> list[Figure]:
    """Against the first sentence, on packages that are in no training data."""
    said, first = bench.run()["eval"]["rouge_l"], baselines(bench.data)["rouge_l"]
    return [Figure("ROUGE-L of summaries", said, target=first, baseline=first)]


if __name__ == "__main__":
    main(make_data)
