"""Phrases in several languages: dates, lengths of time, measures, money, countries, languages, and numbers in words.

phrase(rng, test=False)          # {"en": "3 days ago", "fr": "il y a 3 jours", "de": "vor 3 Tagen"}

From the Unicode Common Locale Data Repository, by babel; numbers in words by num2words. Held out are contents (a date,
a number, a measure, a pair of language and country), in whatever words they are said.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from functools import partial

import numpy as np

from jobs.common.prose import held_out

__all__ = ["LANGUAGES", "phrase"]

LANGUAGES = ("en", "fr", "de")
COUNTRIES = "FR DE ES IT GB US JP CN BR IN CA MX AR EG NG KE ZA AU SE NO FI PL GR TR".split()  # noqa: SIM905
TONGUES = "fr de es it en ja zh pt hi ar sv nb fi pl el tr nl cs da hu".split()  # noqa: SIM905
MONEY = ("EUR", "USD", "GBP", "JPY", "CHF", "SEK")
UNITS = ("kilometer", "meter", "inch", "mile", "kilogram", "gram", "liter", "temperature-celsius", "second")
SECONDS = {"minute": 60, "hour": 3600, "day": 86_400, "week": 604_800, "month": 2_592_000, "year": 31_536_000}
LONGEST = 10_000

Say = Callable[[str], str]


def _date(rng: np.random.Generator) -> tuple[str, Say]:
    from babel.dates import format_date

    day = datetime.date(1950, 1, 1) + datetime.timedelta(days=int(rng.integers(40_000)))
    shape = str(rng.choice(["full", "long", "medium"]))
    return day.isoformat(), lambda language: format_date(day, shape, language)


def _from_now(rng: np.random.Generator) -> tuple[str, Say]:
    from babel.dates import format_timedelta

    unit, number = str(rng.choice(list(SECONDS))), int(rng.integers(1, 100))
    length = datetime.timedelta(seconds=number * SECONDS[unit] * int(rng.choice([-1, 1])))
    say = partial(format_timedelta, length, granularity=unit, threshold=1e9, add_direction=True)
    return f"{number} {unit}", lambda language: say(locale=language)


def _measure(rng: np.random.Generator) -> tuple[str, Say]:
    from babel.units import format_unit

    number, unit = int(rng.integers(1, 1000)), str(rng.choice(UNITS))
    return f"{number} {unit}", lambda language: format_unit(number, unit, locale=language)


def _money(rng: np.random.Generator) -> tuple[str, Say]:
    from babel.numbers import format_currency

    amount, currency = int(rng.integers(2, LONGEST)), str(rng.choice(MONEY))
    say = partial(format_currency, amount, currency, "#,##0", currency_digits=False, format_type="name")
    return f"{amount} {currency}", lambda language: say(locale=language)


def _countries(rng: np.random.Generator) -> tuple[str, Say]:
    from babel import Locale, lists

    codes = rng.choice(COUNTRIES, int(rng.integers(2, 4)), replace=False).tolist()
    return " ".join(codes), lambda to: lists.format_list([Locale(to).territories[code] for code in codes], locale=to)


def _tongue(rng: np.random.Generator) -> tuple[str, Say]:
    from babel import Locale

    tongue, country = str(rng.choice(TONGUES)), str(rng.choice(COUNTRIES))
    return f"{tongue} {country}", lambda to: f"{Locale(to).languages[tongue]} ({Locale(to).territories[country]})"


def _number(rng: np.random.Generator) -> tuple[str, Say]:
    from num2words import num2words

    # As many of two digits as of four.
    number = int(LONGEST ** rng.uniform(0.25, 1.0))
    return str(number), lambda language: str(num2words(number, lang=language)).replace(",", "")


KINDS = (_date, _from_now, _measure, _money, _countries, _tongue, _number)


def phrase(rng: np.random.Generator, test: bool) -> dict[str, str]:
    """One of any kind, by language; of contents that are held out, or that are not."""
    make = KINDS[int(rng.integers(len(KINDS)))]
    while True:
        content, say = make(rng)
        if held_out(content, 10) == test:
            # French has spaces that do not break.
            return {language: " ".join(say(language).split()) for language in LANGUAGES}
