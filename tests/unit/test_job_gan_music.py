"""The rules of jobs.gan_music's pieces, how pieces are measured, and what is made of them."""

from __future__ import annotations

import io
import wave

import mido
import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dltrain import Batch, Keys
from jobs.common.harmony import LOWEST, SPAN, STEPS, VOICES, chorale, chord_statistics
from jobs.common.listener import GROUP, Discriminator
from jobs.common.music import RATE, SECONDS, midi, notes, piano_roll, sound
from jobs.common.voices import NOISE, Generator
from jobs.gan_music import GanMusic

C_MAJOR = np.array([48, 55, 64, 72])


@pytest.fixture(scope="module")
def pieces() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([chorale(rng) for _ in range(200)])


def batch_of(pieces: np.ndarray, task: GanMusic) -> Batch:
    rows = pa.RecordBatch.from_pydict({"piece": list(pieces.astype(np.uint8).reshape(len(pieces), -1))})
    return task.collate(rows, Keys(0, np.zeros(len(pieces), np.int64), np.arange(len(pieces))))


def test_voices_keep_to_their_places(pieces: np.ndarray) -> None:
    assert pieces.shape == (200, STEPS, VOICES)
    assert ((pieces >= LOWEST) & (pieces < LOWEST + SPAN)).all()
    assert (np.diff(pieces, axis=2) > 0).all()
    # The last chord is the key's own, after that of its fifth.
    assert ((pieces[:, -2, 0] - pieces[:, -1, 0]) % 12 == 7).all()
    assert len(set(pieces[:, -1, 0] % 12)) == 12
    assert np.abs(np.diff(pieces, axis=1)).mean() < 4


def test_statistics_of_pieces_by_rule_and_at_random(pieces: np.ndarray) -> None:
    found = chord_statistics(pieces)
    assert {name: len(shares) for name, shares in found.items()} == {"in_key": 1, "chords": 8, "changes": 64}
    assert found["in_key"] == 1
    assert found["chords"].sum() == pytest.approx(1)
    assert found["chords"][7] == 0
    assert found["chords"][0] > found["chords"][6]
    # Nothing follows that the rules do not have: the chord of the fifth does not go to that of the second.
    assert found["changes"].reshape(8, 8)[4, 1] == 0
    chance = np.random.default_rng(0).integers(0, SPAN, (200, STEPS, VOICES)) + LOWEST
    assert chord_statistics(chance)["in_key"] < 0.75
    assert chord_statistics(chance)["chords"][7] > 0.95


def test_the_key_does_not_matter(pieces: np.ndarray) -> None:
    for name, shares in chord_statistics(pieces[:20] + 5).items():
        assert shares == pytest.approx(chord_statistics(pieces[:20])[name])


def test_a_wrong_note_is_counted() -> None:
    piece = np.stack([C_MAJOR] * STEPS)
    assert chord_statistics(piece[None])["chords"][0] == 1
    piece[3, 2] = 61
    found = chord_statistics(piece[None])
    assert found["in_key"] == pytest.approx(1 - 1 / (STEPS * VOICES))
    assert found["chords"][[0, 7]] == pytest.approx([1 - 1 / STEPS, 1 / STEPS])
    changes = found["changes"].reshape(8, 8) * (STEPS - 1)
    assert (changes[0, 0], changes[0, 7], changes[7, 0]) == pytest.approx((STEPS - 3, 1, 1))


def test_figures_of_what_is_made(pieces: np.ndarray) -> None:
    task = GanMusic(width=16)
    torch.manual_seed(0)
    model, batch = task.build(), batch_of(pieces, task)
    with torch.no_grad():
        sums = task.evaluate(model, batch)
    means = {name: total.total / total.count for name, total in sums.items()}
    found = task.metrics(means)
    # Nothing is learned yet.
    assert found["chords"] > 0.8
    assert found["chords_of_real"] < 0.1
    same = {name.replace("real", "made"): value for name, value in means.items() if name.startswith("real")}
    assert task.metrics({**means, **same})["distance"] == 0


@pytest.mark.parametrize("turn", ["discriminator", "generator"])
def test_a_turn_has_gradients_of_its_network(pieces: np.ndarray, turn: str) -> None:
    class Networks(dict):  # type: ignore[type-arg]
        pass

    task = GanMusic(width=16)
    torch.manual_seed(0)
    networks, batch = Networks(task.build()), batch_of(pieces[:8], task)
    networks.turn = turn  # type: ignore[attr-defined]
    task.step(networks, batch)[turn].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in networks[turn].parameters())
    made = networks["generator"](batch.noise, batch.dice)
    assert torch.equal(made.detach().sum(-1).round(), torch.ones(8, STEPS, VOICES))


def test_files_to_play_and_a_picture() -> None:
    piece = np.stack([C_MAJOR] * 3 + [C_MAJOR + 2])
    assert notes(piece[:, 0]) == [(48, 3), (50, 1)]
    file = mido.MidiFile(file=io.BytesIO(midi(piece).data))
    assert len(file.tracks) == VOICES
    assert file.length == pytest.approx(4 * SECONDS)
    assert [m.note for m in file.tracks[1] if m.type == "note_on"] == [55, 57]
    with wave.open(io.BytesIO(sound(piece).data)) as heard:
        assert heard.getnframes() == 4 * int(RATE * SECONDS)
        samples = np.frombuffer(heard.readframes(int(RATE * SECONDS)), "<i2").astype(float)
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    tones = np.argsort(spectrum)[-60:] * RATE / len(samples)
    for pitch in C_MAJOR:
        assert np.abs(tones - 440 * 2 ** ((pitch - 69) / 12)).min() < 3
    assert Image.open(io.BytesIO(piano_roll(piece).data)).width == 4 * 18


def test_what_is_generated() -> None:
    task = GanMusic(width=16)
    torch.manual_seed(0)
    model = task.build()
    with torch.no_grad():
        made = task.generate(model, 2)
    assert [one.media_type for one in made[0].values()] == ["audio/midi", "audio/wav", "image/png"]
    assert made[0]["midi"].data != made[1]["midi"].data


def test_the_discriminator_knows_a_key_by_another(pieces: np.ndarray) -> None:
    torch.manual_seed(0)
    judge = Discriminator(16)
    low = pieces[(pieces < LOWEST + SPAN - 3).all((1, 2))][:20]
    assert len(low) == 20
    flat, higher, wrong = (
        F.one_hot(torch.from_numpy(one - LOWEST), SPAN).float().flatten(2) @ judge.tonics
        for one in (low, low + 3, np.where(np.arange(VOICES) == 2, low + 1, low))
    )
    for same, other, changed in zip(judge.hear(flat), judge.hear(higher), judge.hear(wrong), strict=True):
        assert other.allclose(same, atol=1e-5)
        assert not changed.allclose(same, atol=1e-3)


def test_the_discriminator_judges_groups(pieces: np.ndarray) -> None:
    torch.manual_seed(0)
    judge = Discriminator(16)
    rows = F.one_hot(torch.from_numpy(pieces[: 2 * GROUP + 3] - LOWEST), SPAN).float()
    said = judge(rows)
    # Another piece changes what is said of those beside it, and of nobody else.
    rows[0] = rows[-1]
    moved = (judge(rows) - said).abs() > 1e-7
    assert moved.tolist() == [True] * (GROUP + 2) + [False] * (GROUP + 1)
    assert judge(rows[:1]).shape == (1,)
    # Some batches have no row to be penalised.
    judge(rows[:0]).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in judge.parameters())


def test_upper_voices_follow_lower_ones_in_the_generator() -> None:
    torch.manual_seed(0)
    maker = Generator(16)
    noise, dice = torch.randn(8, NOISE), torch.zeros(8, STEPS, VOICES, SPAN)
    made = maker(noise, dice)
    assert made.sum(-1).allclose(torch.ones(8, STEPS, VOICES))
    assert (made.argmax(-1) == maker(noise).argmax(-1)).all()
    # Another note of the tenor changes what is above it, never what is below.
    dice[:, :, 1] = 1e3 * F.one_hot((made.argmax(-1)[:, :, 1] + 1) % SPAN, SPAN)
    other = maker(noise, dice)
    assert (other[:, :, 0] == made[:, :, 0]).all()
    assert (other[:, :, 1].argmax(-1) != made[:, :, 1].argmax(-1)).all()
    assert (other[:, :, 2:].argmax(-1) != made[:, :, 2:].argmax(-1)).any()
