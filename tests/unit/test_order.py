"""The order of samples: exactly once, the same batches for any number of ranks, and never changed by accident."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dltrain.data.order import Order, choose_lanes, hash_perm, key, mix64, num_steps, read_amplification

# Row groups of one row, around powers of two, and of any size.
GROUPS = st.one_of(st.just(1), st.sampled_from([2**k + d for k in range(1, 7) for d in (-1, 0, 1)]), st.integers(1, 40))
ORDERS = st.builds(
    Order,
    unit_rows=st.lists(GROUPS, min_size=1, max_size=25),
    num_lanes=st.integers(1, 40),
    window_units=st.integers(1, 6),
    seed=st.integers(0, 2**63),
)
# One row; fewer units than lanes; fewer rows than lanes; a giant among dwarfs; only units of one row.
CORNERS = [
    Order([1], 1, 1),
    Order([1], 7, 3),
    Order([5], 8, 2),
    Order([3, 4], 5, 1, seed=7),
    Order([1, 1, 129, 1, 1], 4, 2, seed=1),
    Order([1] * 33, 4, 8, seed=2),
    Order([63, 64, 65, 127, 128, 129, 1], 6, 2, seed=3),
]


def reference(order: Order, consumed: int, size: int) -> list[int]:
    """Row ids of a batch, worked out position by position from the definition of the order."""
    n, lanes = order.num_rows, order.num_lanes
    positions = sorted(range(consumed, consumed + size), key=lambda p: (p % lanes, p))
    made: dict[tuple[int, int], list[int]] = {}
    ids = []
    for p in positions:
        epoch, lane = p // n, p % lanes
        if (epoch, lane) not in made:
            made[epoch, lane] = _lane_ids(order, epoch, lane)
        before = sum(1 for q in range(epoch * n, p) if q % lanes == lane)
        ids.append(made[epoch, lane][before])
    return ids


def _lane_ids(order: Order, epoch: int, lane: int) -> list[int]:
    """What a lane reads in an epoch, in order."""
    n = order.num_rows
    units = hash_perm(len(order.unit_rows), key(order.seed, 1, epoch)).tolist()
    rows = [(u, i) for u in units for i in range(order.unit_rows[u])]
    lengths = [sum(1 for p in range(epoch * n, (epoch + 1) * n) if p % order.num_lanes == v) for v in range(lane + 1)]
    mine = rows[sum(lengths[:-1]) : sum(lengths)]
    spans: list[list[tuple[int, int]]] = []
    for row in mine:
        if spans and spans[-1][-1][0] == row[0]:
            spans[-1].append(row)
        else:
            spans.append([row])
    ids: list[int] = []
    sizes, ramp, k, window = [], 1, order.window_units, 0
    while epoch == 0 and ramp < k and sum(sizes) + ramp < len(spans):
        sizes.append(ramp)
        ramp *= 2
    sizes += [1 + key(order.seed, 2, epoch, lane) % k, *[k] * len(spans)]
    while spans:
        taken, spans = spans[: sizes[window]], spans[sizes[window] :]
        flat = [int(order.starts[u]) + i for span in taken for u, i in span]
        ids += [flat[i] for i in hash_perm(len(flat), key(order.seed, 3, epoch, lane, window)).tolist()]
        window += 1
    return ids


def run(order: Order, sizes: Sequence[int], end: int, num_ranks: Callable[[int], int], consumed: int = 0) -> list[int]:
    """The run's rows from `consumed` to `end`: batches of `sizes` in turn, step t cut for `num_ranks(t)` ranks."""
    ids: list[int] = []
    step = 0
    while consumed < end:
        size = min(sizes[step % len(sizes)], end - consumed)
        slices = [order.rank_batch(consumed, size, r, num_ranks(step)) for r in range(num_ranks(step))]
        ids += np.concatenate(slices).tolist()
        consumed += size
        step += 1
    return ids


def exactly_once(order: Order, ids: list[int], epochs: int) -> bool:
    return np.bincount(ids, minlength=order.num_rows).tolist() == [epochs] * order.num_rows


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 255, 256, 257, 65535, 65536, 65537])
def test_hash_perm_is_a_bijection(n: int) -> None:
    assert np.array_equal(np.sort(hash_perm(n, key(n))), np.arange(n))


def test_mix64_matches_the_published_sequence() -> None:
    # The first outputs of splitmix64 seeded with 0 (its state advances by the golden gamma).
    gamma = 0x9E3779B97F4A7C15
    states = np.array([0, gamma, 2 * gamma % 2**64], dtype=np.uint64)
    assert [hex(int(x)) for x in mix64(states)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


@given(ORDERS, st.integers(1, 60), st.integers(1, 3))
@settings(max_examples=150)
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
@settings(max_examples=150)
def test_ranks_join_to_the_same_batch(order: Order, size: int, consumed: int, num_ranks: int) -> None:
    slices = [order.rank_batch(consumed, size, r, num_ranks) for r in range(num_ranks)]
    assert np.array_equal(np.concatenate(slices), order.batch(consumed, size))
    assert max(map(len, slices)) - min(map(len, slices)) <= 1


@given(ORDERS, st.integers(0, 300), st.integers(0, 60))
@settings(max_examples=60)
def test_a_batch_is_what_the_definition_says(order: Order, consumed: int, size: int) -> None:
    assert order.batch(consumed, size).tolist() == reference(order, consumed, size)


@pytest.mark.parametrize("order", CORNERS, ids=lambda o: f"{len(o.unit_rows)}-units-{o.num_lanes}-lanes")
@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_corners(order: Order, size: int) -> None:
    n = order.num_rows
    assert order.batch(n // 2, size).tolist() == reference(order, n // 2, size)
    # Batches larger than the dataset hold several epochs.
    epochs = 3 + size // n
    for num_ranks in (1, 3, 2 * order.num_lanes + 1):
        ids = run(order, [size], epochs * n, lambda _, w=num_ranks: w)  # type: ignore[misc]
        assert exactly_once(order, ids, epochs)


@given(ORDERS, st.lists(st.integers(1, 80), min_size=1, max_size=6), st.integers(1, 3))
@settings(max_examples=80)
def test_the_batch_size_may_change_at_any_step(order: Order, sizes: list[int], epochs: int) -> None:
    assert exactly_once(order, run(order, sizes, epochs * order.num_rows, lambda step: 1 + step % 4), epochs)


@given(ORDERS, st.lists(st.tuples(st.floats(0, 1), st.integers(1, 70), st.integers(1, 50)), min_size=2, max_size=3))
@settings(max_examples=80)
def test_resumed_twice_and_three_times(order: Order, stops: list[tuple[float, int, int]]) -> None:
    """Each attempt has its own batch size and number of ranks and ends wherever its last committed step did."""
    end, at, ids = 2 * order.num_rows, 0, list[int]()
    for share, size, num_ranks in [*stops, (1.0, 5, 3)]:
        until = min(end, at + int(share * (end - at)) // size * size) if share < 1 else end
        ids += run(order, [size], until, lambda _, w=num_ranks: w, at)  # type: ignore[misc]
        at = until
    assert exactly_once(order, ids, 2)


def test_resumed_at_every_position() -> None:
    order = Order([5, 1, 8, 3, 9, 1, 4], num_lanes=4, window_units=2, seed=5)
    n, end = order.num_rows, 3 * order.num_rows
    whole = [id for p in range(end) for id in order.batch(p, 1).tolist()]
    assert all(sorted(whole[e * n : (e + 1) * n]) == list(range(n)) for e in range(3))
    for at in range(end + 1):
        for size, num_ranks in ((8, 1), (7, 3), (n, 5), (1, 2)):
            rest = run(order, [size], end, lambda _, w=num_ranks: w, at)  # type: ignore[misc]
            assert sorted(rest) == sorted(whole[at:])
            # The batches are the same sets as an uninterrupted run cut at the same positions has.
            assert sorted(rest[:size]) == sorted(whole[at : at + size])


def test_at_the_end_there_is_nothing_left() -> None:
    order = Order([4, 4], num_lanes=2, window_units=1)
    assert order.segments(8, 0, 0, 2) == []
    assert order.batch(8, 0).size == 0


# ---- wrap and drop ----


@given(ORDERS, st.integers(1, 90), st.integers(1, 3), st.floats(0, 1))
@settings(max_examples=80)
def test_drop_says_which_rows_it_leaves_out(order: Order, size: int, epochs: int, share: float) -> None:
    end = epochs * order.num_rows
    consumed = int(share * end)
    steps = num_steps(order.num_rows, epochs, size, consumed, "drop")
    dropped = order.dropped(epochs, size, consumed)
    assert 0 <= dropped.num_rows < size
    assert consumed + steps * size + dropped.num_rows == end
    kept = [order.batch(consumed + t * size, size) for t in range(steps)]
    wrapped = run(order, [size], end, lambda _: 1, consumed)
    assert np.concatenate([*kept, dropped.ids]).tolist() == wrapped
    assert len(wrapped) == end - consumed
    positions = np.sort(np.arange(end - dropped.num_rows, end) // order.num_rows)
    assert np.array_equal(np.sort(dropped.epochs), positions)


def test_drop_leaves_nothing_out_where_the_batch_divides() -> None:
    order = Order([10, 10], num_lanes=2, window_units=1)
    assert order.dropped(2, 8).num_rows == 0
    assert order.dropped(2, 16).num_rows == 8
    assert order.dropped(1, 64, consumed=20).num_rows == 0
    assert order.dropped(1, 64).ids.tolist() == order.batch(0, 20).tolist()


# ---- what it costs ----


def units_read(order: Order, epoch: int, size: int, num_ranks: int) -> int:
    """Reads of units in an epoch's whole batches, a rank reading a unit once however often it comes by."""
    read = set()
    for at in range(-(-epoch * order.num_rows // size) * size, (epoch + 1) * order.num_rows - size + 1, size):
        for rank in range(num_ranks):
            for s in order.segments(at, size, rank, num_ranks):
                if s.epoch == epoch:
                    spans = order.window_spans(s.epoch, s.lane, s.window)
                    read |= {(rank, span.unit) for span in spans}
    return len(read)


@given(
    st.lists(GROUPS, min_size=1, max_size=40),
    st.integers(1, 16),
    st.integers(1, 4),
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(0, 1),
)
@settings(max_examples=80)
def test_units_are_read_no_more_often_than_the_formula_says(
    rows: list[int], lanes: int, per_lane: int, num_ranks: int, window: int, epoch: int
) -> None:
    order = Order(rows, lanes, window, seed=num_ranks)
    bound = read_amplification(len(rows), lanes, num_ranks)
    assert units_read(order, epoch, lanes * per_lane, num_ranks) <= bound * len(rows) + 1e-9


def test_read_amplification() -> None:
    assert read_amplification(10**6, 24, 8) == pytest.approx(1, abs=1e-4)
    assert max(read_amplification(10**6, 24, w) for w in range(1, 25)) < 2
    assert read_amplification(600, 24, 48) == pytest.approx(2.077, abs=1e-3)
    assert read_amplification(600, 24, 7) == pytest.approx(1.298, abs=1e-3)


@given(st.integers(1, 5000), st.integers(1, 2000), st.integers(1, 64))
@settings(max_examples=100)
def test_ranks_are_balanced_at_every_step(size: int, num_ranks: int, lanes: int) -> None:
    order = Order([997] * 64, lanes, 2)
    shares = [sum(s.hi - s.lo for s in order.segments(12345, size, r, num_ranks)) for r in range(num_ranks)]
    assert sum(shares) == size
    assert set(shares) <= {size // num_ranks, math.ceil(size / num_ranks)}


def test_the_layouts_kept_are_bounded_in_bytes() -> None:
    order = Order([10] * 200_000, num_lanes=65536, window_units=2)
    assert order._lane.cache_info().maxsize < 2 * 65536  # type: ignore[attr-defined]
    assert Order([10] * 8, num_lanes=4, window_units=2)._lane.cache_info().maxsize == 8  # type: ignore[attr-defined]


def test_lists_and_arrays_make_the_same_order() -> None:
    rows = [7, 3, 12, 1]
    assert np.array_equal(Order(np.array(rows, np.int32), 3, 2).batch(5, 20), Order(rows, 3, 2).batch(5, 20))


def test_order_changes_with_epoch_and_seed() -> None:
    order = Order([16] * 8, num_lanes=4, window_units=2, seed=1)
    assert not np.array_equal(order.batch(0, 128), order.batch(128, 128))
    assert not np.array_equal(order.batch(0, 128), Order([16] * 8, 4, 2, seed=2).batch(0, 128))


@pytest.mark.parametrize(
    ("rows", "lanes", "window", "digest"),
    [
        ([1] * 257, 16, 4, "5b6bf79664db2ce4"),
        ([3, 4], 5, 1, "8228623ca693a25a"),
        ([4097, 4095, 4096] * 40, 8, 8, "61c2fc430738f930"),
    ],
)
def test_golden_vectors_of_corners(rows: list[int], lanes: int, window: int, digest: str) -> None:
    """As above."""
    order = Order(rows, lanes, window, seed=11)
    ids = order.batch(order.num_rows // 3, 2 * order.num_rows)
    assert hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16] == digest


def test_golden_vector() -> None:
    """If this changes, every stored plan's order changes: raise the plan version instead."""
    order = Order([97, 1, 300, 64, 65, 63, 128, 255, 257, 2] * 8, num_lanes=12, window_units=3, seed=42)
    ids = order.batch(0, 3 * order.num_rows)
    digest = hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
    assert digest == "8bda63a8638f1ab8c44ca306e3d4a222ee2c07444a28342444e919c3fe41e16e"


def test_golden_vector_of_a_million_rows() -> None:
    """The first million row ids of a fixed order, over the end of its first epoch."""
    order = Order([4096, 1, 8191, 12_345, 777] * 30, num_lanes=64, window_units=4, seed=2024)
    assert order.num_rows < 10**6
    ids = order.batch(0, 10**6)
    digest = hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
    assert digest == "ba9a751595657149d9cabab8d3fe1b83ac73a2c6b69ee9e7987e44c67cddb45d"


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
