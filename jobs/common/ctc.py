"""Letters as numbers, and back from what a network says in each frame: connectionist temporal classification.

Graves et al., Connectionist Temporal Classification, 2006.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

__all__ = ["LETTERS", "corrected", "encode", "transcripts"]

ALPHABET = "abcdefghijklmnopqrstuvwxyz "
# With the blank, which is 0.
LETTERS = len(ALPHABET) + 1


def encode(text: str) -> torch.Tensor:
    """(letters,) int64.

    Raises:
        ValueError: something else than small letters and spaces.
    """
    return torch.tensor([ALPHABET.index(letter) + 1 for letter in text], dtype=torch.int64)


def transcripts(said: torch.Tensor, frames: torch.Tensor) -> list[str]:
    """The likeliest letter of each frame; the same ones in a row are one, and blanks none.

    Args:
        said: (rows, frames, LETTERS); frames: (rows,), how many of them each row has.
    """
    found = []
    for best, count in zip(said.argmax(-1).cpu(), frames.tolist(), strict=True):
        letters = torch.unique_consecutive(best[:count]).tolist()
        found.append(" ".join("".join(ALPHABET[i - 1] for i in letters if i).split()))
    return found


def corrected(text: str, words: Collection[str]) -> str:
    """With the nearest of the words that can be said, in letters changed, in the place of what is none of them."""
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import extractOne

    # Of words that are equally near, the first by the alphabet.
    known = sorted(words)

    def nearest(word: str) -> str:
        return str(extractOne(word, known, scorer=Levenshtein.normalized_similarity)[0])

    return " ".join(word if word in words else nearest(word) for word in text.split())
