"""How jobs.speech_rnn's phrases are made and spoken, what is heard of them, and how transcripts are counted."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from PIL import Image
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from dltrain import Batch, Keys
from jobs.common.ctc import LETTERS, corrected, encode, transcripts
from jobs.common.lstm import BidirectionalLSTM
from jobs.common.phrases import in_words, known_words, phrase
from jobs.common.spectrogram import log_mel, varied
from jobs.common.speech import RATE, Speaker, noisy
from jobs.common.utterances import voices
from jobs.speech_rnn import BANDS, SpeechRnn, make_data


def tone(hertz: float, seconds: float = 0.5) -> torch.Tensor:
    return torch.sin(2 * torch.pi * hertz * torch.arange(int(RATE * seconds)) / RATE)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few rows of each split."""
    home = tmp_path_factory.mktemp("spoken")
    assert make_data(str(home), 4, 3) == {"train": 4, "test": 3}
    return home


def batch_of(home: Path, task: SpeechRnn, rows: int = 4) -> Batch:
    table = pq.read_table(home / "train").combine_chunks().slice(0, rows)
    return task.collate(table.to_batches()[0], Keys(0, np.zeros(rows, np.int64), np.arange(rows)))


def test_numbers_in_words() -> None:
    assert [in_words(n) for n in (0, 13, 20, 42, 100, 412, 999)] == [
        "zero",
        "thirteen",
        "twenty",
        "forty two",
        "one hundred",
        "four hundred and twelve",
        "nine hundred and ninety nine",
    ]
    assert len({in_words(n) for n in range(1000)}) == 1000


def test_phrases_are_many_and_can_be_written() -> None:
    rng = np.random.default_rng(0)
    phrases = [phrase(rng) for _ in range(500)]
    assert len(set(phrases)) > 300
    assert all(encode(one).min() > 0 and "{" not in one for one in phrases)


def test_no_voice_of_the_test_is_in_training() -> None:
    found = voices()
    names = {
        split: {voice.lower().rstrip("0123456789") for voice in group if len(voice) > 2}
        for split, group in found.items()
    }
    assert not names["train"] & names["test"]
    assert not set(found["train"]) & set(found["test"])
    assert len(found["train"]) > 70
    assert len(found["test"]) >= 15


def test_what_is_said_is_as_long_as_it_is_slow() -> None:
    speaker = Speaker()
    slow, fast = (speaker.say("turn on the light", "en-us+m3", speed) for speed in (120, 240))
    assert 0.5 * RATE < len(fast) < 0.7 * len(slow) < 3 * RATE
    assert np.abs(slow).max() > 0.05
    with pytest.raises(ValueError, match="no voice 'en-us-nowhere"):
        speaker.say("hello", "en-us-nowhere")


@pytest.mark.parametrize("decibels", [0.0, 20.0])
def test_noise_is_as_loud_as_it_should_be(decibels: float) -> None:
    samples = tone(440, 1.0).numpy()
    powers = []
    for seed in range(20):
        sound = noisy(samples, decibels, np.random.default_rng(seed))
        # The least that is heard before the voice begins, against the voice and the noise together.
        powers.append(np.mean(sound[len(sound) // 2 :][: RATE // 10] ** 2) / np.mean(sound[: RATE // 10] ** 2))
    assert 10 * np.log10(np.median(powers) - 1) == pytest.approx(decibels, abs=2)


def test_a_tone_is_in_its_band() -> None:
    bands = [
        int(log_mel(torch.cat([tone(h), torch.zeros(RATE // 2)]), RATE)[:40].mean(0).argmax())
        for h in (200, 1000, 4000)
    ]
    assert bands == sorted(set(bands))
    # By the definition of mel, in steps between 60 and 7,600 Hz.
    mels = 2595 * np.log10(1 + np.array([60, 7600, 200, 1000, 4000]) / 700)
    wanted = (mels[2:] - mels[0]) / (mels[1] - mels[0]) * 41 - 1
    # All bands rise with sound; of those the one that has the tone rises most.
    energies = [log_mel_of(h) for h in (200, 1000, 4000)]
    assert np.abs(np.array(energies) - wanted).max() < 1


def log_mel_of(hertz: float) -> int:
    """The band with the most energy."""
    from jobs.common.spectrogram import _filters

    power = torch.fft.rfft(tone(hertz)[:400] * torch.hann_window(400), 512).abs().square()
    return int((power @ _filters(RATE, 512, BANDS)).argmax())


def test_frames_and_loudness() -> None:
    sound = torch.randn(RATE)
    heard = log_mel(sound, RATE, BANDS)
    assert heard.shape == (98, BANDS)
    # A microphone that is nearer changes nothing.
    assert torch.allclose(heard, log_mel(5 * sound, RATE, BANDS), atol=1e-3)
    assert log_mel(torch.zeros(3), RATE, BANDS).shape == (1, BANDS)


def test_transcripts_leave_out_blanks_and_repetitions() -> None:
    frames = [0, 8, 8, 0, 5, 12, 0, 12, 12, 15, 0, 27, 27]
    said = torch.nn.functional.one_hot(torch.tensor([frames, frames]), LETTERS).float()
    assert transcripts(said, torch.tensor([13, 5])) == ["hello", "he"]
    assert encode("hello ").tolist() == [8, 5, 12, 12, 15, 27]


def test_unknown_words_become_the_nearest() -> None:
    words = known_words()
    assert corrected("turn on the lihgt in tthe kichen", words) == "turn on the light in the kitchen"
    assert corrected("", words) == ""
    rng = np.random.default_rng(0)
    said = [phrase(rng) for _ in range(300)]
    assert [corrected(text, words) for text in said] == said


def test_what_is_heard_does_not_depend_on_the_others(spoken: Path) -> None:
    task = SpeechRnn(width=16, layers=1, dropout=0.0)
    torch.manual_seed(0)
    model = task.build().eval()
    # In fp32 the sums of a longer batch are other ones in the last digits.
    with torch.no_grad():
        four, one = batch_of(spoken, task), batch_of(spoken, task, 1)
        together, alone = model(four.heard, four.lengths)[0], model(one.heard, one.lengths)[0]
    torch.testing.assert_close(together[: len(alone)], alone, atol=1e-4, rtol=1e-4)


def test_the_loss_is_a_mean_over_letters_and_errors_are_counted(spoken: Path) -> None:
    task = SpeechRnn(width=16, layers=1, dropout=0.0)
    torch.manual_seed(0)
    model, batch = task.build(), batch_of(spoken, task)
    assert batch.count == sum(map(len, batch.texts))
    loss = task.loss(model, batch)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        found = task.evaluate(model, batch)
    assert found["loss"].total / found["loss"].count == pytest.approx(loss.item(), rel=0.1)
    assert found["wer"].count == sum(len(text.split()) for text in batch.texts)
    # One word of the first phrase is missing, and all of the second.
    words = batch.texts[0].split()
    said = [" ".join(words[1:]), "", *batch.texts[2:]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobs.speech_rnn.transcripts", lambda *_: said)
        with torch.no_grad():
            found = task.evaluate(model, batch)
    assert found["wer"].total == found["wer_without_words"].total == 1 + len(batch.texts[1].split())


def test_a_phrase_is_moved_and_lacks_parts() -> None:
    heard = torch.arange(1.0, 1 + 50 * BANDS).reshape(50, BANDS)
    assert torch.equal(varied(heard, np.random.default_rng(0), 0, 0, 0), heard)
    found = [varied(heard, np.random.default_rng(seed), 3, 8, 12) for seed in range(200)]
    assert torch.equal(found[0], varied(heard, np.random.default_rng(0), 3, 8, 12))
    missed = [((one == 0).all(0).sum().item(), (one == 0).all(1).sum().item()) for one in found]
    assert [max(counts) for counts in zip(*missed, strict=True)] == [8, 12]
    # The middle band is one of seven.
    assert {int((one - heard)[:, 20].abs().max()) for one in found if (one[:, 20] != 0).all()} == {0, 1, 2, 3}
    # Shorter than what it may lack.
    assert varied(heard[:1], np.random.default_rng(1), 3, 8, 12).shape == (1, BANDS)


def test_padding_changes_nothing_in_a_bidirectional_lstm() -> None:
    torch.manual_seed(0)
    mine, width, lengths = BidirectionalLSTM(6, 2), 6, torch.tensor([7, 4, 1])
    like = torch.nn.LSTM(width, width, 2, bidirectional=True, batch_first=True)
    weights = {}
    for layer in range(2):
        for suffix, part in (("", mine.ahead[layer]), ("_reverse", mine.back[layer])):
            weights |= {f"{k.replace('l0', f'l{layer}')}{suffix}": v for k, v in part.state_dict().items()}
    like.load_state_dict(weights)
    x = torch.randn(3, 7, width)
    packed = pack_padded_sequence(x, lengths, batch_first=True)
    wanted = pad_packed_sequence(like(packed)[0], batch_first=True)[0]
    found = mine(x, lengths)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(found[row, :length], wanted[row, :length])


def test_a_file_is_read_and_drawn(spoken: Path) -> None:
    task = SpeechRnn(width=16, layers=1)
    sink = io.BytesIO()
    soundfile.write(sink, tone(300, 1.0).numpy(), 22_050, format="WAV")
    rows = pa.RecordBatch.from_pydict({"audio": pa.array([sink.getvalue()]), "text": [""]})
    batch = task.collate(rows, Keys(0, np.zeros(1, np.int64), np.zeros(1, np.int64)))
    model = task.build().eval()
    with torch.no_grad():
        said = task.predict(model, batch)
        shown = task.samples(model, batch_of(spoken, task))
    (drawn,) = task.draw(batch, said)
    assert drawn.caption == said[0]
    assert Image.open(io.BytesIO(drawn.data)).height == 3 * BANDS + 24
    assert [one.media_type for one in shown] == ["image/png"] * 2 + ["audio/wav"] * 3 + ["text/html"]
