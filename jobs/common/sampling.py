"""Text from a network, piece by piece, as it is shown to a person.

for text in spoken(vocabulary, tokens):       # tokens: any iterator of numbers
    print(text, end="", flush=True)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

__all__ = ["draw_token", "spoken"]


def draw_token(scores: torch.Tensor, temperature: float) -> int:
    """One of (size,) scores by chance, by torch's generator; at temperature 0 the highest one."""
    if temperature <= 0:
        return int(scores.argmax())
    return int(torch.multinomial((scores.float() / temperature).softmax(0), 1))


def spoken(vocabulary: Any, tokens: Iterable[int]) -> Iterator[str]:
    """What each token adds to the text; a character of several tokens comes with the last of them."""
    said: list[int] = []
    before = ""
    for token in tokens:
        said.append(token)
        text = vocabulary.decode(said)
        # A character of which bytes are yet to come is shown as a mark.
        if not text.endswith("�") and text != before:
            yield text.removeprefix(before)
            before = text
