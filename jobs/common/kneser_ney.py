"""Interpolated Kneser-Ney: the n-gram model of characters that a network has to beat.

model = KneserNey(texts, order=5)
model.bits(text) / (len(text) + 1)               # bits per character, the end of the text counted as one
bits_per_character(texts, held_out, order=5)     # of all of other texts

After Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (1998), section 4.1.6: one
discount for each order, n1 / (n1 + 2 n2) of its counts of counts; the lowest order falls back on all characters alike.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

__all__ = ["END", "START", "KneserNey", "bits_per_character"]

# Of every text; characters that no text has.
START, END = "\x02", "\x03"


class KneserNey:
    """Counts of all orders, and probabilities made of them.

    Args:
        texts: it learns from.
        order: 5 is a character after four.
    """

    def __init__(self, texts: Iterable[str], order: int = 5) -> None:
        self.order = order
        grams = _grams(texts, order)
        # What a character can be; one place for all that were never seen.
        self.size = len({gram[-1] for gram in grams}) + 1
        self._orders: list[tuple[Counter[str], Counter[str], Counter[str], float]] = []
        for _ in range(order):
            contexts, kinds = Counter[str](), Counter[str]()
            for gram, count in grams.items():
                contexts[gram[:-1]] += count
                kinds[gram[:-1]] += 1
            of_counts = Counter(grams.values())
            discount = of_counts[1] / max(of_counts[1] + 2 * of_counts[2], 1)
            self._orders.insert(0, (grams, contexts, kinds, discount))
            # A shorter one counts in how many longer ones it is the end of.
            grams = Counter(gram[1:] for gram in grams)
        self._known: dict[str, float] = {}

    def probability(self, gram: str) -> float:
        """Of its last character after those before it, `order` - 1 at most."""
        found = self._known.get(gram)
        if found is None:
            found = self._known[gram] = self._computed(gram)
        return found

    def _computed(self, gram: str) -> float:
        if not gram:
            return 1.0 / self.size
        grams, contexts, kinds, discount = self._orders[len(gram) - 1]
        context, shorter = gram[:-1], gram[1:]
        lower = self.probability(shorter) if shorter else 1.0 / self.size
        total = contexts[context]
        if not total:
            return lower
        return (max(grams[gram] - discount, 0.0) + discount * kinds[context] * lower) / total

    def bits(self, text: str) -> float:
        """Of the text and its end."""
        padded = _padded(text, self.order)
        grams = (padded[i : i + self.order] for i in range(len(text) + 1))
        return -sum(math.log2(self.probability(gram)) for gram in grams)


def _padded(text: str, order: int) -> str:
    return START * (order - 1) + text + END


def _grams(texts: Iterable[str], order: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        padded = _padded(text, order)
        counts.update(padded[i : i + order] for i in range(len(text) + 1))
    return counts


def bits_per_character(texts: Iterable[str], held_out: Sequence[str], order: int = 5) -> float:
    """What a model of some texts needs for others, their ends counted as characters."""
    model = KneserNey(texts, order)
    return sum(map(model.bits, held_out)) / sum(len(text) + 1 for text in held_out)
