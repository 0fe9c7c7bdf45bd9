"""Mixing: the proportion, every row of every source once an epoch, the same batches for any number of ranks."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dltrain.data.mixture import Mixture
from dltrain.data.order import Order

UNITS = st.lists(st.integers(1, 12), min_size=1, max_size=6)


def rows(mixture: Mixture, consumed: int, size: int, rank: int = 0, num_ranks: int = 1) -> list[tuple[int, int, int]]:
    """(source, epoch, row id) of a rank's part of a batch."""
    found = []
    for part in mixture.segments(consumed, size, rank, num_ranks):
        s = part.segment
        ids = mixture.orders[part.source].window_ids(s.epoch, s.lane, s.window)[s.lo : s.hi]
        found += [(part.source, s.epoch, int(i)) for i in ids]
    return found


@given(
    st.lists(st.tuples(UNITS, st.integers(1, 5)), min_size=1, max_size=4),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 17),
    st.integers(1, 9),
)
def test_the_same_rows_for_any_cut(
    sources: list[tuple[list[int], int]], lanes: int, window: int, size: int, num_ranks: int
) -> None:
    orders = [Order(units, lanes, window, seed) for seed, (units, _) in enumerate(sources)]
    mixture = Mixture(orders, [weight for _, weight in sources])
    total = 6 * size
    whole = Counter(r for at in range(0, total, size) for r in rows(mixture, at, size))
    assert sum(whole.values()) == total
    assert max(whole.values()) == 1
    assert whole == Counter(rows(mixture, 0, total))
    for at in range(0, total, size):
        parts = [rows(mixture, at, size, rank, num_ranks) for rank in range(num_ranks)]
        assert Counter(r for part in parts for r in part) == Counter(rows(mixture, at, size))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 8), st.integers(0, 7), st.integers(0, 500))
def test_counts_add_up_and_keep_the_proportion(weights: list[int], lanes: int, lane: int, time: int) -> None:
    mixture = Mixture([Order([5], lanes, 1) for _ in weights], weights)
    counts = mixture.counts(lane % lanes, time)
    after = mixture.counts(lane % lanes, time + 1)
    assert sum(counts) == time
    assert sorted(b - a for a, b in zip(counts, after, strict=True)) == [0] * (len(weights) - 1) + [1]
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - time * weight / sum(weights)) < len(weights)


def test_every_row_of_every_source_once_an_epoch() -> None:
    orders = [Order([7, 9, 4], 4, 2, 0), Order([30, 33], 4, 1, 1)]
    mixture = Mixture(orders, [1, 2])
    seen = Counter(rows(mixture, 0, 400))
    for source, order in enumerate(orders):
        epochs = [epoch for s, epoch, _ in seen if s == source]
        # The last epoch, and the one before that some lanes are still in, are under way.
        for epoch in range(max(epochs) - 1):
            assert {i for s, e, i in seen if (s, e) == (source, epoch)} == set(range(order.num_rows))
    assert set(seen.values()) == {1}


def test_batches_have_about_the_same_mix() -> None:
    mixture = Mixture([Order([100] * 8, 8, 1), Order([100] * 8, 8, 1)], [3, 1])
    shares = [sum(source == 0 for source, _, _ in rows(mixture, at, 16)) for at in range(0, 640, 16)]
    assert np.mean(shares) == pytest.approx(12, abs=0.1)
    assert max(shares) - min(shares) <= 2


def test_what_cannot_be_mixed() -> None:
    with pytest.raises(ValueError, match="lanes"):
        Mixture([Order([5], 1, 1), Order([5], 2, 1)], [1, 1])
    with pytest.raises(ValueError, match="one weight"):
        Mixture([Order([5], 1, 1)], [0])


def test_resumed_at_every_position_with_other_batches_and_ranks() -> None:
    mixture = Mixture([Order([5, 1, 4], 3, 2, 1), Order([6, 2], 3, 1, 2)], [3, 2])
    end = 60
    whole = [row for p in range(end) for row in rows(mixture, p, 1)]
    for at in range(end + 1):
        for size, num_ranks in ((7, 1), (6, 4), (end, 2)):
            rest: list[tuple[int, int, int]] = []
            for begin in range(at, end, size):
                part = min(size, end - begin)
                rest += [row for rank in range(num_ranks) for row in rows(mixture, begin, part, rank, num_ranks)]
            assert sorted(rest) == sorted(whole[at:])


def test_golden_vector() -> None:
    """If this changes, every stored plan's order changes: raise the plan version instead."""
    mixture = Mixture([Order([97, 1, 300, 64] * 9, 12, 3, seed=42), Order([65, 63, 2] * 4, 12, 1, seed=7)], [5, 2])
    found = np.array(rows(mixture, 100, 20_000), "<i8")
    assert (
        hashlib.sha256(found.tobytes()).hexdigest()
        == "d8c6027026271791c0ca62236ee76f11733428ba43b684c05f0813b042ad809e"
    )
