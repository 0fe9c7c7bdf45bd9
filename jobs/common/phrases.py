"""What is said to a house: commands, sums and numbers in words."""

from __future__ import annotations

import numpy as np

__all__ = ["in_words", "known_words", "phrase"]

TEMPLATES = (
    "{n}",
    "{n} {op} {n}",
    "what is {n} {op} {n}",
    "turn {onoff} the {thing}",
    "turn {onoff} the {thing} in the {room}",
    "{door} the {opening}",
    "{door} the {opening} in the {room}",
    "set the timer to {n} {unit}",
    "set the {thing} to {n} percent",
    "remind me in {n} {unit}",
    "{player} the music",
    "call {d} {d} {d} {d} {d}",
    "go to channel {n}",
)
WORDS = {
    "op": ("plus", "minus", "times"),
    "onoff": ("on", "off"),
    "thing": ("light", "heating", "radio", "fan"),
    "room": ("kitchen", "bedroom", "hall", "garden"),
    "door": ("open", "close", "lock"),
    "opening": ("door", "window", "gate"),
    "unit": ("seconds", "minutes", "hours"),
    "player": ("play", "pause", "stop"),
}


def in_words(number: int) -> str:
    """As it is said: "four hundred and forty two"."""
    from num2words import num2words

    return str(num2words(number)).replace("-", " ")


def phrase(rng: np.random.Generator) -> str:
    """One of some millions."""
    words = TEMPLATES[rng.integers(len(TEMPLATES))].split()
    return " ".join(_fill(word, rng) for word in words)


def known_words() -> frozenset[str]:
    """All that phrases are made of."""
    fixed = {word for template in TEMPLATES for word in template.split() if not word.startswith("{")}
    chosen = {word for words in WORDS.values() for word in words}
    return frozenset(fixed | chosen | {word for number in range(1000) for word in in_words(number).split()})


def _fill(word: str, rng: np.random.Generator) -> str:
    kind = word.strip("{}")
    if kind == "n":
        return in_words(int(rng.integers(10 ** rng.integers(1, 4))))
    if kind == "d":
        return in_words(int(rng.integers(10)))
    return WORDS[kind][rng.integers(len(WORDS[kind]))] if word.startswith("{") else word
