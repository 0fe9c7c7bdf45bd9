"""English phrases into French and German, an encoder-decoder transformer.

python -m jobs.translate_transformer make-data .data/translate_transformer
dltrain run jobs/translate_transformer.yaml
echo "in 3 days" | dltrain predict translate-transformer -        # or "de: in 3 days"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from dltrain import Artifact, Batch, Input, Keys, Sum, Task
from jobs.common import vocabulary
from jobs.common.cldr import phrase
from jobs.common.data import main, write_splits
from jobs.common.figures import Goal
from jobs.common.seq2seq import Seq2Seq, token_losses, write

# A text begins with the language that it is to be in.
SPECIAL = ("<pad>", "<end>", "<fr>", "<de>")
END, LANGUAGES = 1, {"fr": 2, "de": 3}
GOALS = (Goal("phrases translated exactly", "exact", 0.9),)


class TranslateTransformer(Task):
    """The same in another language.

    Args:
        vocabulary: the file that `make-data` writes.
        language: that lines are translated into which do not begin with one.
        longest: pieces of a translation, at most.
        sizes: of the network: width, layers, heads, groups, dropout.
    """

    columns = ("text", "language", "translation")
    target_columns = ("translation",)

    def __init__(self, vocabulary: str, language: str = "fr", longest: int = 40, **sizes: Any) -> None:
        self.url, self.language, self.longest, self.sizes = vocabulary, language, longest, sizes

    @cached_property
    def vocabulary(self) -> Any:
        return vocabulary.load(self.url)

    def build(self) -> nn.Module:
        return Seq2Seq(self.vocabulary.get_vocab_size(), **self.sizes)

    def collate(self, rows: pa.RecordBatch, keys: Keys) -> Batch:
        text, language, translation = (rows[name].to_pylist() for name in self.columns)
        source, target = self._ids(text), self._ids(translation)
        begin = torch.tensor([LANGUAGES[one] for one in language])
        count = int((target != 0).sum())
        return Batch(count, source=source, begin=begin, target=target, text=text, wanted=translation)

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        return self._nats(model, batch) / max(batch.count, 1)

    def evaluate(self, model: Any, batch: Batch) -> dict[str, Sum]:
        from sacrebleu.metrics import BLEU

        said, scorer = self._said(model, batch), BLEU(effective_order=True)
        scores = [scorer.sentence_score(a, [b]) for a, b in zip(said, batch.wanted, strict=True)]
        # Of these corpus BLEU is made: lengths, and n-grams that are right, and all.
        counts = np.sum([[s.sys_len, s.ref_len, *s.counts, *s.totals] for s in scores], axis=0, dtype=float)
        exact = sum(a == b for a, b in zip(said, batch.wanted, strict=True))
        nats = self._nats(model, batch).item()
        return {"exact": Sum(exact, len(said)), "bleu": Sum(counts, len(said)), "loss": Sum(nats, batch.count)}

    def metrics(self, means: Mapping[str, Any]) -> dict[str, float]:
        from sacrebleu.metrics import BLEU

        # sacrebleu wants whole numbers; only their proportions count.
        said, wanted, *counts = [round(1e6 * mean) for mean in means["bleu"].tolist()]
        score = BLEU.compute_bleu(counts[:4], counts[4:], said, wanted, smooth_method="none").score
        return {"exact": means["exact"], "bleu": score, "loss": means["loss"]}

    def samples(self, model: Any, batch: Batch) -> list[Artifact]:
        found = zip(batch.text, self._said(model, batch), batch.wanted, strict=True)
        rows = [{"English": text, "said": said, "right": "yes" if said == b else b} for text, said, b in found]
        return [Artifact.table(rows[:24], "phrases whose contents it has not read")]

    def read(self, source: Input) -> Mapping[str, str]:
        text = source.text if source.text is not None else (source.data or b"").decode()
        if text.startswith("{"):
            return dict(super().read(source))
        before, mark, after = text.partition(":")
        named = bool(mark) and before.strip() in LANGUAGES
        return {"text": (after if named else text).strip(), "language": before.strip() if named else self.language}

    def predict(self, model: Any, batch: Batch) -> Sequence[str]:
        return self._said(model, batch)

    def _ids(self, texts: Sequence[str]) -> torch.Tensor:
        found = self.vocabulary.encode_batch(list(texts))
        return torch.from_numpy(vocabulary.pad([[*one.ids, END] for one in found]))

    def _said(self, model: Any, batch: Batch) -> list[str]:
        ids = write(model, batch.source, batch.begin, END, self.longest)
        return [str(self.vocabulary.decode(one)) for one in ids]

    def _nats(self, model: Any, batch: Batch) -> torch.Tensor:
        before = torch.cat([batch.begin[:, None], batch.target[:, :-1]], 1)
        return token_losses(model(batch.source, before), batch.target)


def make_data(url: str, phrases: int = 12_000) -> dict[str, int]:
    """Writes phrases in both languages under url/train and url/eval, and the vocabulary of the training ones."""
    rng = np.random.default_rng(0)
    sizes = {"train": phrases, "eval": phrases // 24}
    said = {name: [phrase(rng, name == "eval") for _ in range(count)] for name, count in sizes.items()}
    # Each once: those of few words, as "eleven", come up often.
    said = {name: list({one["en"]: one for one in some}.values()) for name, some in said.items()}
    vocabulary.save(url, vocabulary.learn([text for one in said["train"] for text in one.values()], 800, SPECIAL))
    rows = {
        name: [
            {"text": one["en"], "language": language, "translation": one[language]}
            for one in some
            for language in LANGUAGES
        ]
        for name, some in said.items()
    }
    return write_splits(url, {name: pa.Table.from_pylist(some) for name, some in rows.items()})


if __name__ == "__main__":
    main(make_data)
