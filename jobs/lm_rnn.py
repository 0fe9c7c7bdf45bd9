"""The next word of English text, an LSTM.

python -m jobs.lm_rnn make-data .data/lm_rnn         # or any URL
dltrain run jobs/lm_rnn.yaml
dltrain predict lm-rnn --text "The interpreter"      # goes on with it
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import nn

from dltrain import Artifact, Batch, Input, Keys, Sum, Task
from dltrain.data.columns import tensors
from jobs.common import sampling, vocabulary
from jobs.common.data import main, read_column
from jobs.common.figures import Bench, Figure
from jobs.common.kneser_ney import bits_per_character
from jobs.common.prose import manual_splits
from jobs.common.texts import END, write_texts


class Lstm(nn.Module):
    """Scores of each next piece; pieces come in and go out by the same vectors."""

    def __init__(self, size: int, embedding: int = 128, width: int = 320, dropout: float = 0.2) -> None:
        super().__init__()
        self.embed = nn.Embedding(size, embedding)
        nn.init.normal_(self.embed.weight, std=0.08)
        self.lstm = nn.LSTM(embedding, width, batch_first=True)
        self.down = nn.Linear(width, embedding)
        self.bias = nn.Parameter(torch.zeros(size))
        self.drop = nn.Dropout(dropout)

    def forward(self, tokens: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
        # tokens: (rows, length); scores: (rows, length, size)
        hidden, state = self.lstm(self.drop(self.embed(tokens)), state)
        return F.linear(self.down(self.drop(hidden)), self.embed.weight, self.bias), state


class LmRnn(Task):
    """Each piece of a text from those before it.

    Args:
        vocabulary: the file that `make-data` writes.
        length: of a row, as in data.pack.
        temperature, pieces: of what `predict` writes; 0 takes the likeliest piece each time.
        sizes: of the network: embedding, width, dropout.
    """

    columns = ("tokens", "segment_ids", "num_tokens")

    def __init__(
        self, vocabulary: str, length: int = 64, temperature: float = 0.6, pieces: int = 60, **sizes: Any
    ) -> None:
        self.url, self.length, self.sizes = vocabulary, length, sizes
        self.temperature, self.pieces = temperature, pieces

    @cached_property
    def vocabulary(self) -> Any:
        return vocabulary.load(self.url)

    @cached_property
    def characters(self) -> torch.Tensor:
        return torch.from_numpy(vocabulary.characters(self.vocabulary))

    def build(self) -> nn.Module:
        return Lstm(self.vocabulary.get_vocab_size(), **self.sizes)

    def collate(self, rows: pa.RecordBatch, keys: Keys) -> Batch:
        found = tensors(rows)
        tokens = found["tokens"].long()
        there = torch.arange(tokens.shape[1]) < found["num_tokens"][:, None]
        characters = int((self.characters[tokens] * there).sum())
        # A row begins after the end of another text, as far as the network knows.
        before = F.pad(tokens[:, :-1], (1, 0), value=END)
        return Batch(int(there.sum()), before=before, tokens=tokens, there=there, characters=characters)

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        return self._nats(model, batch) / max(batch.count, 1)

    def evaluate(self, model: Any, batch: Batch) -> dict[str, Sum]:
        nats = self._nats(model, batch).item()
        bits = Sum(nats / math.log(2), batch.characters)
        return {"bits_per_character": bits, "loss": Sum(nats, batch.count)}

    def samples(self, model: Any, batch: Batch) -> list[Artifact]:
        begin = batch.tokens[0, :8].tolist()
        torch.manual_seed(0)
        more = "".join(self._goes_on(model, batch, begin))
        said = f"how it goes on after {self.vocabulary.decode(begin)!r}, of a text that it has not read"
        return [Artifact.text(self.vocabulary.decode(begin) + more, said)]

    def read(self, source: Input) -> dict[str, Any]:
        text = source.text if source.text is not None else (source.data or b"").decode()
        return vocabulary.pack_row("tokens", self.vocabulary.encode(text).ids, self.length)

    def predict(self, model: Any, batch: Batch) -> Iterator[str]:
        begin = batch.tokens[0, : int(batch.there[0].sum())].tolist()
        yield self.vocabulary.decode(begin)
        yield from self._goes_on(model, batch, begin)

    def _goes_on(self, model: Any, batch: Batch, begin: list[int]) -> Iterator[str]:
        """Text after `begin`, piece by piece, to its end or so many pieces."""
        yield from sampling.spoken(self.vocabulary, self._drawn(model, batch.tokens.device, begin))

    def _drawn(self, model: Any, device: torch.device, begin: list[int]) -> Iterator[int]:
        tokens, state = [END, *begin], None
        for _ in range(self.pieces):
            scores, state = model(torch.tensor([tokens], device=device), state)
            tokens = [sampling.draw_token(scores[0, -1], self.temperature)]
            if tokens == [END]:
                return
            yield tokens[0]

    def _nats(self, model: Any, batch: Batch) -> torch.Tensor:
        scores = model(batch.before)[0].float()
        each = F.cross_entropy(scores.transpose(1, 2), batch.tokens, reduction="none")
        return (each * batch.there).sum()


def make_data(url: str) -> dict[str, int]:
    """Writes the paragraphs of CPython's documentation under url/train and url/eval; returns rows by split."""
    return write_texts(url, manual_splits(), size=2048)


def figures(bench: Bench) -> list[Figure]:
    """Against a 5-gram model of characters; both are told where a text ends."""
    network = bench.run()["eval"]["bits_per_character"]
    train, held_out = (read_column(bench.data, split, "text") for split in ("train", "eval"))
    grams = bits_per_character(train, held_out, order=5)
    return [Figure("bits per character", network, target=grams, baseline=grams, at_least=False)]


if __name__ == "__main__":
    main(make_data)
