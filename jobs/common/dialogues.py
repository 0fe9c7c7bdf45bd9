"""Dialogues of a few skills, made by rule: (question, answer) after (question, answer).

Whoever answers must remember, compare, repeat and know facts. Held out are contents: things with a colour or a place,
pairs of numbers, and words, that no dialogue for training brings together.
"""

from __future__ import annotations

import builtins
import calendar
import inspect
import re
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from jobs.common.prose import held_out

__all__ = ["SKILLS", "Turns", "dialogue"]

Turns = list[tuple[str, str]]
WORDS = """
bicycle coat hat cup door book boat chair lamp car bag clock box phone ball house
red blue green yellow black white brown grey pink orange
kitchen garden office cellar hall attic garage bedroom library station
"""
THINGS, COLOURS, PLACES = (line.split() for line in WORDS.strip().splitlines())
DAYS, MONTHS = list(calendar.day_name), list(calendar.month_name)[1:]
ONE_IN = 8


def _pick(test: bool, make: Callable[[], tuple[str, ...]]) -> tuple[str, ...]:
    """Contents that are held out, or that are not."""
    while True:
        found = make()
        if held_out(" ".join(sorted(found)), ONE_IN) == test:
            return found


def remembers(rng: np.random.Generator, test: bool) -> Turns:
    """One or two things are told, then one of them is asked for."""
    told: dict[str, tuple[str, str]] = {}
    for _ in range(int(rng.integers(1, 3))):
        values = COLOURS if rng.random() < 0.5 else PLACES
        thing, value = _pick(test, lambda values=values: (str(rng.choice(THINGS)), str(rng.choice(values))))  # type: ignore[misc]
        if values is COLOURS:
            told[f"My {thing} is {value}."] = f"What colour is my {thing}?", f"Your {thing} is {value}."
        else:
            told[f"The {thing} is in the {value}."] = f"Where is the {thing}?", f"The {thing} is in the {value}."
    asked = list(told.values())
    # Of what was told twice in different words no one can say what is right.
    if len({question for question, _ in asked}) < len(asked):
        return remembers(rng, test)
    return [*((fact, "I will remember that.") for fact in told), asked[int(rng.integers(len(asked)))]]


def compares(rng: np.random.Generator, test: bool) -> Turns:
    """Two numbers."""
    a, b = _pick(test, lambda: tuple(str(n) for n in rng.choice(np.arange(1, 100), 2, replace=False)))
    word, right = ("larger", max) if rng.random() < 0.5 else ("smaller", min)
    return [(f"Which is {word}, {a} or {b}?", f"{right(a, b, key=int)}.")]


def repeats(rng: np.random.Generator, test: bool) -> Turns:
    """Three words come back."""
    words = _pick(test, lambda: tuple(rng.choice([*THINGS, *COLOURS, *PLACES], 3, replace=False).tolist()))
    return [(f"Repeat after me: {' '.join(words)}.", f"{' '.join(words)}.")]


def knows_the_calendar(rng: np.random.Generator, test: bool) -> Turns:
    """What comes after or before a day or a month."""
    kind, names = ("day", DAYS) if rng.random() < 0.5 else ("month", MONTHS)
    place, (word, step) = int(rng.integers(len(names))), (("after", 1), ("before", -1))[int(rng.integers(2))]
    return [(f"Which {kind} comes {word} {names[place]}?", f"{names[(place + step) % len(names)]}.")]


@lru_cache(maxsize=1)
def _functions() -> list[tuple[str, str]]:
    """Python's built-in functions of which one short sentence says what they do."""
    named = [
        (name, inspect.getdoc(one) or "") for name, one in sorted(vars(builtins).items()) if inspect.isbuiltin(one)
    ]
    lines = [(name, " ".join(text.split("\n\n")[0].split())) for name, text in sorted(named) if name.isalpha()]
    return [(name, line) for name, line in lines if re.fullmatch(r"[A-Z][^.()]{10,58}\.", line)]


def knows_python(rng: np.random.Generator, test: bool) -> Turns:
    """What a built-in function does, in the words of its documentation."""
    name, line = rng.choice(_functions()).tolist()
    return [(f"What does {name} do?", line)]


SKILLS = (remembers, compares, repeats, knows_the_calendar, knows_python)


def dialogue(rng: np.random.Generator, test: bool) -> Turns:
    """One to three skills, one after the other."""
    order = rng.permutation(len(SKILLS))[: int(rng.integers(1, 4))]
    return [turn for index in order for turn in SKILLS[index](rng, test)]
