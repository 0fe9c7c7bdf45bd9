"""Questions and answers, a decoder-only transformer: first it reads documentation, then dialogues.

python -m jobs.chat_transformer make-data .data/chat_transformer
dltrain run jobs/chat_transformer_pretrain.yaml && dltrain run jobs/chat_transformer.yaml
dltrain predict chat-transformer -          # a conversation; an empty line begins another one
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import nn

from dltrain import Artifact, Batch, Input, Keys, Sum, Task
from dltrain.data.columns import tensors
from jobs.common import sampling, vocabulary
from jobs.common.data import main, write_splits
from jobs.common.decoder import Decoder
from jobs.common.dialogues import Turns, dialogue
from jobs.common.figures import Bench, Figure, Goal, reached
from jobs.common.prose import manual_splits

END, BEGIN, USER, BOT = range(4)
SPECIAL = ("<end>", "<begin>", "<user>", "<bot>")
# This bit of a token says that it is to be predicted. Packing keeps the tokens alone, and cuts anywhere.
LEARNED = 1 << 16
GOALS = (Goal("right answers", "right", 0.9),)


class ChatTransformer(Task):
    """What is said next; learned of answers alone.

    Args:
        vocabulary: the file that `make-data` writes.
        length: of a row, as in data.pack; temperature, pieces: of an answer.
        sizes: of the network: width, layers, heads, groups.
    """

    columns = ("tokens", "segment_ids", "num_tokens")

    def __init__(self, vocabulary: str, length: int, temperature: float = 0.0, pieces: int = 40, **sizes: int) -> None:
        self.url, self.length, self.sizes = vocabulary, length, sizes
        self.temperature, self.pieces = temperature, pieces
        self.said: list[int] = []

    @cached_property
    def vocabulary(self) -> Any:
        return vocabulary.load(self.url)

    def build(self) -> nn.Module:
        return Decoder(self.vocabulary.get_vocab_size(), **self.sizes)

    def collate(self, rows: pa.RecordBatch, keys: Keys) -> Batch:
        found = tensors(rows)
        tokens, segments = found["tokens"].long(), found["segment_ids"]
        learned = (tokens[:, 1:] >= LEARNED) & (segments[:, 1:] == segments[:, :-1])
        tokens = tokens % LEARNED
        # Of a dialogue that was cut only the answers are right or wrong to which nothing is missing.
        whole = learned & ((segments > 1) | (tokens[:, :1] == BEGIN))[:, 1:]
        count = int(learned.sum())
        return Batch(count, tokens=tokens, segments=segments, learned=learned, whole=whole, length=found["num_tokens"])

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        return self._nats(model(batch.tokens[:, :-1], batch.segments[:, :-1]), batch) / max(batch.count, 1)

    def evaluate(self, model: Any, batch: Batch) -> dict[str, Sum]:
        scores = model(batch.tokens[:, :-1], batch.segments[:, :-1])
        answers = [right for right, _, _ in self._answers(scores.argmax(-1), batch)]
        nats = self._nats(scores, batch).item()
        return {"right": Sum(sum(answers), len(answers)), "loss": Sum(nats, batch.count)}

    def samples(self, model: Any, batch: Batch) -> list[Artifact]:
        said, text = model(batch.tokens[:, :-1], batch.segments[:, :-1]).argmax(-1), self.vocabulary.decode
        some = [{"right": r, "wanted": text(a), "said": text(b)} for r, a, b in self._answers(said, batch)[:24]]
        return [Artifact.table(some, "answers in dialogues that it has not read")]

    def read(self, source: Input) -> dict[str, Any]:
        text = source.text if source.text is not None else (source.data or b"").decode()
        if not text.strip() or not self.said:
            self.said = [BEGIN]
        self.said += [USER, *self.vocabulary.encode(text.strip()).ids, BOT]
        return vocabulary.pack_row("tokens", self.said, self.length)

    def predict(self, model: Any, batch: Batch) -> Iterator[str]:
        yield from sampling.spoken(self.vocabulary, self._drawn(model, batch.tokens[:, : int(batch.length[0])]))

    def _drawn(self, model: Any, tokens: torch.Tensor) -> Iterator[int]:
        cache: dict[Any, Any] = {}
        for _ in range(self.pieces):
            token = sampling.draw_token(model(tokens, cache=cache)[0, -1], self.temperature)
            self.said.append(token)
            if token == END:
                return
            yield token
            tokens = tokens.new_tensor([[token]])

    def _answers(self, said: torch.Tensor, batch: Batch) -> list[tuple[bool, list[int], list[int]]]:
        """Of each whole answer: whether it would have come out so, what was wanted, what was said instead.

        The likeliest piece after each piece of the right answer: if all are right, so is what it says by itself.
        """
        found: list[tuple[bool, list[int], list[int]]] = []
        for row, words, whole in zip(said.tolist(), batch.tokens[:, 1:].tolist(), batch.whole.tolist(), strict=True):
            pairs: list[tuple[int, int]] = []
            for told, word, counts in zip(row, words, whole, strict=True):
                pairs = [*pairs, (word, told)] if counts else []
                if counts and word == END:
                    found.append((all(a == b for a, b in pairs), [a for a, _ in pairs], [b for _, b in pairs]))
                    pairs = []
        return found

    def _nats(self, scores: torch.Tensor, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(scores[batch.learned].float(), batch.tokens[:, 1:][batch.learned], reduction="sum")


def encoded(turns: Turns, words: Any) -> list[int]:
    """A dialogue as tokens, those of answers marked."""
    said = [(words.encode(question).ids, words.encode(answer).ids) for question, answer in turns]
    return [BEGIN, *(t for q, a in said for t in (USER, *q, BOT, *(token | LEARNED for token in [*a, END])))]


def make_data(url: str, dialogues: int = 24_000) -> dict[str, int]:
    """Writes dialogues under url/train and url/eval, and documentation under url/text and url/text_eval."""
    rng, texts = np.random.default_rng(0), manual_splits()
    sizes = {"train": dialogues, "eval": dialogues // 40}
    talk = {name: [dialogue(rng, name == "eval") for _ in range(count)] for name, count in sizes.items()}
    heard = [line for turns in talk["train"][:4000] for turn in turns for line in turn]
    words = vocabulary.learn([*texts["train"], *heard], 1536, SPECIAL)
    vocabulary.save(url, words)
    tokens = {name: [encoded(turns, words) for turns in some] for name, some in talk.items()}
    for name, some in (("text", texts["train"]), ("text_eval", texts["eval"])):
        tokens[name] = [[token | LEARNED for token in [*one.ids, END]] for one in words.encode_batch(some)]
    kind = pa.list_(pa.int32())
    return write_splits(url, {name: pa.table({"tokens": pa.array(some, kind)}) for name, some in tokens.items()})


def figures(bench: Bench) -> list[Figure]:
    """Of the run that goes on from the one that has read the documentation."""
    bench.run(spec="chat_transformer_pretrain")
    return reached(GOALS, bench.run(), {})


if __name__ == "__main__":
    main(make_data)
