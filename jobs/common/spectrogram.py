"""Sound as a picture: the log energy of bands that are spaced as ears hear, 100 frames a second."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

__all__ = ["FRAMES_PER_SECOND", "log_mel", "varied"]

FRAMES_PER_SECOND = 100
WINDOW_SECONDS = 0.025
LOWEST, HIGHEST = 60.0, 7600.0


def log_mel(samples: torch.Tensor, rate: int, bands: int = 40) -> torch.Tensor:
    """(samples,) -> (frames, bands), each band with mean 0 and deviation 1 over the whole sound.

    Shorter than a frame it is lengthened by silence.
    """
    hop, window = rate // FRAMES_PER_SECOND, int(rate * WINDOW_SECONDS)
    samples = torch.nn.functional.pad(samples, (0, max(0, window - len(samples))))
    frames = samples.unfold(0, window, hop) * torch.hann_window(window)
    size = 1 << (window - 1).bit_length()
    energy = torch.fft.rfft(frames, size).abs().square() @ _filters(rate, size, bands)
    found = (energy + 1e-8).log()
    return (found - found.mean(0)) / (found.std(0, correction=0) + 1e-3)


def varied(heard: torch.Tensor, rng: np.random.Generator, shift: int, bands: int, frames: int) -> torch.Tensor:
    """Another voice says it, and something is missed: bands move up or down, and some bands and frames are left out.

    A longer throat lowers all of a voice's resonances by one factor, which is one distance in mels, nearly. What is
    left out is 0, the mean (Park et al., 2019).

    Args:
        heard: (frames, bands); shift: in bands, at most; bands, frames: to leave out, at most.
    """
    moved = int(rng.integers(-shift, shift + 1))
    found = heard[:, (torch.arange(heard.shape[1]) + moved).clamp(0, heard.shape[1] - 1)]
    for axis, most in ((1, bands), (0, frames)):
        size = heard.shape[axis]
        width = int(rng.integers(min(most, size) + 1))
        found.narrow(axis, int(rng.integers(size - width + 1)), width).zero_()
    return found


@cache
def _filters(rate: int, size: int, bands: int) -> torch.Tensor:
    """(size / 2 + 1, bands): triangles that overlap by half, of equal width in mels (O'Shaughnessy, 1987)."""
    ends = 2595 * torch.log10(1 + torch.tensor([LOWEST, min(HIGHEST, rate / 2)]) / 700)
    edges = 700 * (10 ** (torch.linspace(float(ends[0]), float(ends[1]), bands + 2) / 2595) - 1)
    tones = torch.linspace(0, rate / 2, size // 2 + 1)[:, None]
    rising = (tones - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - tones) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0)
