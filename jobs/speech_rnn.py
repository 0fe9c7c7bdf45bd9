"""What was said, as letters: a bidirectional LSTM trained with CTC on many voices, heard through noise.

python -m jobs.speech_rnn make-data .data/speech_rnn      # espeak-ng speaks for two or three minutes
dltrain run jobs/speech_rnn.yaml
dltrain predict speech-rnn command.wav                    # its transcript; --out DIR draws what was heard

Voices of the test are not in the training data, nor are those that differ from them by a number alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from dltrain import Artifact, Batch, Keys, Sum, Task
from dltrain.data import decode
from jobs.common.ctc import LETTERS, corrected, encode, transcripts
from jobs.common.data import main, write_splits
from jobs.common.figures import Goal
from jobs.common.lstm import BidirectionalLSTM
from jobs.common.phrases import known_words
from jobs.common.spectrogram import log_mel, varied
from jobs.common.speech import RATE

GOALS = (Goal("word error rate, unseen voices", "wer", 0.10, at_least=False),)
BANDS = 40
# Frames become one: 33 a second are enough for letters.
STRIDE = 3
# In training a phrase is moved by up to so many bands, and lacks up to so many bands and frames.
SHIFT, MASK_BANDS, MASK_FRAMES = 3, 8, 12


class Listener(nn.Module):
    """A convolution that makes frames fewer, and an LSTM over them from both ends."""

    def __init__(self, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.fewer = nn.Conv1d(BANDS, width, 5, STRIDE, padding=2)
        self.lstm = BidirectionalLSTM(width, layers, dropout)
        self.head = nn.Linear(2 * width, LETTERS)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """(rows, frames, bands), (rows,) -> (rows, frames / 3, letters) log probabilities; 0 is the blank."""
        y = F.relu(self.fewer(x.transpose(1, 2))).transpose(1, 2)
        return self.head(self.lstm(y, fewer(lengths))).float().log_softmax(-1)


def fewer(frames: torch.Tensor) -> torch.Tensor:
    return (frames - 1) // STRIDE + 1


class SpeechRnn(Task):
    """Transcripts of short commands."""

    columns = ("audio", "text")
    target_columns = ("text",)

    def __init__(self, width: int = 128, layers: int = 2, dropout: float = 0.1) -> None:
        self.width, self.layers, self.dropout = width, layers, dropout
        self.words = known_words()

    def build(self) -> nn.Module:
        return Listener(self.width, self.layers, self.dropout)

    def collate(self, rows: pa.RecordBatch, keys: Keys) -> Batch:
        sound = decode.audio(rows["audio"], RATE)
        parts = torch.tensor_split(sound.values, sound.offsets[1:-1])
        heard = [log_mel(part, RATE, BANDS) for part in parts]
        texts = rows["text"].to_pylist()
        letters = [encode(text) for text in texts]
        return Batch(
            max(1, sum(map(len, letters))),
            heard=pad_sequence(heard, batch_first=True),
            lengths=torch.tensor([len(one) for one in heard]),
            letters=torch.cat(letters),
            counts=torch.tensor([len(one) for one in letters]),
            texts=texts,
            sounds=[part.numpy() for part in parts],
            keys=keys,
        )

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        rows = zip(batch.heard, batch.lengths.tolist(), strict=True)
        other = [varied(x[:n], batch.keys.rng(i), SHIFT, MASK_BANDS, MASK_FRAMES) for i, (x, n) in enumerate(rows)]
        return self._ctc(model(pad_sequence(other, batch_first=True), batch.lengths), batch) / batch.count

    def _ctc(self, said: torch.Tensor, batch: Batch) -> torch.Tensor:
        # A phrase of more letters than frames can't be written: it has no part in the loss.
        lengths = fewer(batch.lengths), batch.counts
        return F.ctc_loss(said.transpose(0, 1), batch.letters, *lengths, reduction="sum", zero_infinity=True)

    def evaluate(self, model: Any, batch: Batch) -> dict[str, Sum]:
        import jiwer

        said, words = model(batch.heard, batch.lengths), sum(len(text.split()) for text in batch.texts)
        letters, found = self._transcripts(said, batch)
        alone, with_words = (jiwer.process_words(batch.texts, one) for one in (letters, found))
        characters = jiwer.process_characters(batch.texts, letters)
        return {
            "loss": Sum(self._ctc(said, batch).item(), batch.count),
            "wer": Sum(_wrong(with_words), words),
            "wer_without_words": Sum(_wrong(alone), words),
            "cer": Sum(_wrong(characters), batch.count),
        }

    def _transcripts(self, said: torch.Tensor, batch: Batch) -> tuple[list[str], list[str]]:
        """As letters are heard, and made of known words."""
        letters = transcripts(said, fewer(batch.lengths))
        return letters, [corrected(text, self.words) for text in letters]

    def samples(self, model: Any, batch: Batch) -> list[Artifact]:
        letters, found = self._transcripts(model(batch.heard, batch.lengths), batch)
        heard = zip(batch.texts, letters, found, strict=True)
        rows = [{"said": said, "letters": one, "transcript": other} for said, one, other in heard]
        sounds = [Artifact.audio(batch.sounds[i], RATE, f"heard: {found[i]}") for i in range(min(3, len(found)))]
        return [*self.draw(batch, found)[:2], *sounds, Artifact.table(rows[:16], "unseen voices, as they were heard")]

    def predict(self, model: Any, batch: Batch) -> list[str]:
        return self._transcripts(model(batch.heard, batch.lengths), batch)[1]

    def draw(self, batch: Batch, results: Sequence[str]) -> list[Artifact]:
        from jobs.common.charts import spectrogram

        heard = [rows[:count].cpu().numpy() for rows, count in zip(batch.heard, batch.lengths.tolist(), strict=True)]
        return [Artifact.image(spectrogram(one, text), text) for one, text in zip(heard, results, strict=True)]


def _wrong(found: Any) -> float:
    return float(found.substitutions + found.deletions + found.insertions)


def make_data(url: str, train: int = 6000, test: int = 400) -> dict[str, int]:
    """Writes what is said under url/train and url/test; returns rows by split."""
    from jobs.common.utterances import spoken_splits

    return write_splits(url, spoken_splits(train, test), rows_per_group=32)


if __name__ == "__main__":
    main(make_data)
