"""The order of samples: exactly once, the same batches for any number of ranks, and never changed by accident."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dltrain.data.order import Order, choose_lanes, hash_perm, key, mix64, num_steps

ORDERS = st.builds(
    Order,
    unit_rows=st.lists(st.integers(1, 40), min_size=1, max_size=25),
    num_lanes=st.integers(1, 12),
    window_units=st.integers(1, 6),
    seed=st.integers(0, 2**63),
)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 255, 256, 257, 65535, 65536, 65537])
def test_hash_perm_is_a_bijection(n: int) -> None:
    assert np.array_equal(np.sort(hash_perm(n, key(n))), np.arange(n))


def test_mix64_matches_the_published_sequence() -> None:
    # The first outputs of splitmix64 seeded with 0 (its state advances by the golden gamma).
    gamma = 0x9E3779B97F4A7C15
    states = np.array([0, gamma, 2 * gamma % 2**64], dtype=np.uint64)
    assert [hex(int(x)) for x in mix64(states)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


@given(ORDERS, st.integers(1, 60), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_every_row_exactly_once_per_epoch(order: Order, size: int, epochs: int) -> None:
    n = order.num_rows
    total = epochs * n
    ids = np.concatenate([order.batch(s, min(size, total - s)) for s in range(0, total, size)])
    counts = np.bincount(ids, minlength=n)
    assert counts.tolist() == [epochs] * n
    whole = np.concatenate([order.batch(e * n, n) for e in range(epochs)])
    for e in range(epochs):
        assert np.array_equal(np.sort(whole[e * n : (e + 1) * n]), np.arange(n))


@given(ORDERS, st.integers(1, 60), st.integers(0, 500), st.integers(1, 15))
@settings(max_examples=150, deadline=None)
def test_ranks_join_to_the_same_batch(order: Order, size: int, consumed: int, num_ranks: int) -> None:
    slices = [order.rank_batch(consumed, size, r, num_ranks) for r in range(num_ranks)]
    assert np.array_equal(np.concatenate(slices), order.batch(consumed, size))
    assert max(map(len, slices)) - min(map(len, slices)) <= 1


@given(ORDERS, st.integers(1, 30), st.integers(1, 30))
@settings(max_examples=80, deadline=None)
def test_resume_with_another_batch_continues_the_same_epoch(order: Order, first: int, second: int) -> None:
    n = order.num_rows
    ids: list[int] = []
    consumed, size = 0, first
    while consumed < n:
        ids += order.batch(consumed, min(size, n - consumed)).tolist()
        consumed += min(size, n - consumed)
        size = second if size == first else first
    assert sorted(ids) == list(range(n))


def test_order_changes_with_epoch_and_seed() -> None:
    order = Order([16] * 8, num_lanes=4, window_units=2, seed=1)
    assert not np.array_equal(order.batch(0, 128), order.batch(128, 128))
    assert not np.array_equal(order.batch(0, 128), Order([16] * 8, 4, 2, seed=2).batch(0, 128))


def test_golden_vector() -> None:
    """If this changes, every stored plan's order changes: raise the plan version instead."""
    order = Order([97, 1, 300, 64, 65, 63, 128, 255, 257, 2] * 8, num_lanes=12, window_units=3, seed=42)
    ids = order.batch(0, 3 * order.num_rows)
    digest = hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
    assert digest == "8bda63a8638f1ab8c44ca306e3d4a222ee2c07444a28342444e919c3fe41e16e"


@pytest.mark.parametrize(
    ("units", "batch", "lanes"), [(1, 64, 1), (3, 64, 1), (8, 64, 2), (600, 96, 96), (100_000, 1024, 512), (40, 7, 7)]
)
def test_choose_lanes(units: int, batch: int, lanes: int) -> None:
    v, k = choose_lanes(units, batch)
    assert v == lanes
    assert batch % v == 0
    assert 1 <= k <= max(1, units // v)


def test_num_steps() -> None:
    assert num_steps(100, 3, 64) == 5
    assert num_steps(100, 3, 64, end="drop") == 4
    assert num_steps(100, 3, 64, consumed=300) == 0
    assert num_steps(100, 3, 50) == num_steps(100, 3, 50, end="drop") == 6


def test_empty_units_are_refused() -> None:
    with pytest.raises(ValueError, match="non-empty"):
        Order([3, 0, 2], 1, 1)
