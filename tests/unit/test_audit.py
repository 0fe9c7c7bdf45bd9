"""The audit: clean runs pass it at every position, and a planted fault of any kind does not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dltrain.data.audit import audit, epoch_sum, expected_sums
from dltrain.data.identity import BatchSum, sum_ids
from dltrain.data.mixture import Mixture
from dltrain.data.order import Order

UNITS = st.lists(st.integers(1, 9), min_size=1, max_size=6)
Sums = dict[tuple[int, int], BatchSum]


def trained(mixture: Mixture, begin: int, size: int, num_ranks: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """(source, epoch, ids) of what all ranks are given."""
    for rank in range(num_ranks):
        for part in mixture.segments(begin, size, rank, num_ranks):
            s = part.segment
            ids = mixture.orders[part.source].window_ids(s.epoch, s.lane, s.window)[s.lo : s.hi]
            yield part.source, s.epoch, ids


def add(sums: Sums, mixture: Mixture, source: int, epoch: int, ids: np.ndarray) -> None:
    seed = mixture.orders[source].seed
    sums[source, epoch] = sums.get((source, epoch), BatchSum()) + sum_ids(seed, np.full(len(ids), epoch), ids)


@given(
    UNITS,
    UNITS,
    st.integers(1, 4),
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(1, 11), st.integers(1, 5)), min_size=1, max_size=8),
)
def test_clean_runs_pass_whatever_their_batches_and_ranks(
    one: list[int], two: list[int], lanes: int, window: int, steps: list[tuple[int, int]]
) -> None:
    mixture = Mixture([Order(one, lanes, window, 1), Order(two, lanes, 2, 2)], [2, 1])
    sums: Sums = {}
    consumed = 0
    for size, num_ranks in steps:
        for source, epoch, ids in trained(mixture, consumed, size, num_ranks):
            add(sums, mixture, source, epoch, ids)
        consumed += size
        assert expected_sums(mixture, consumed) == sums
    assert all(line.ok for line in audit(mixture, consumed, sums, {}, ("a", "b")))


def test_whole_epochs_and_the_one_under_way() -> None:
    mixture = Mixture([Order([40] * 5, 4, 2, 0)], [1])
    sums = expected_sums(mixture, 450)
    assert sums[0, 0] == epoch_sum(mixture.orders[0], 0)
    assert [str(line) for line in audit(mixture, 450, sums, {(0, 1): 3})] == [
        "epoch 0: 200/200 rows exactly once, 0 substituted",
        "epoch 1: 200/200 rows exactly once, 3 substituted",
        "epoch 2: 50/200 rows so far, each exactly once, 0 substituted",
    ]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("drop", "1 of 200 rows missing"),
        ("duplicate", "1 of 200 rows too many"),
        ("drop and duplicate", "not the rows expected"),
        ("another epoch's row", "not the rows expected"),
        ("an epoch nobody asked for", "4 of 0 rows too many"),
    ],
)
def test_a_planted_fault_is_found(fault: str, words: str) -> None:
    mixture = Mixture([Order([40] * 5, 4, 2, 0)], [1])
    rows: Counter[tuple[int, int]] = Counter((e, i) for e in (0, 1) for i in range(200))
    if "drop" in fault:
        del rows[1, 17]
    if "duplicate" in fault:
        rows[1, 18] += 1
    if fault == "another epoch's row":
        del rows[1, 17]
        rows[0, 17] += 1
        del rows[0, 16]
        rows[1, 16] += 1
    if fault == "an epoch nobody asked for":
        rows.update((7, i) for i in range(4))
    sums: Sums = {}
    for (epoch, row), times in rows.items():
        add(sums, mixture, 0, epoch, np.full(times, row))
    bad = [str(line) for line in audit(mixture, 400, sums, {}) if not line.ok]
    assert any(words in line for line in bad), bad
