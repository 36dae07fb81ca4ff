"""Splitting and packing: every rule, the lower bound against exhaustive search, quality on long-tailed lengths."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkflow.lengths import DISTRIBUTIONS
from chunkflow.pack import lower_bound_chunks, pack


def bins_of(lengths, chunk_tokens):
    """Pack all lengths; return shorts, tails, the contents of each bin, and all chunks with the full ones."""
    shorts = np.sort([x for x in lengths if x <= chunk_tokens]).astype(np.int64)[::-1].copy()
    longs = np.array([x for x in lengths if x > chunk_tokens], dtype=np.int64)
    tails = np.sort((longs - 1) % chunk_tokens + 1)[::-1].copy()
    where, num_bins = pack(shorts, tails, chunk_tokens)
    bins = [shorts[where == n].tolist() for n in range(num_bins)]
    return shorts, tails, bins, int(((longs - 1) // chunk_tokens).sum()) + num_bins


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(4, 24))
def test_packing_places_every_short_sequence_once_and_within_the_chunk(lengths, chunk_tokens):
    shorts, tails, bins, chunks = bins_of(lengths, chunk_tokens)
    assert all(tail + sum(fill) <= chunk_tokens for tail, fill in zip(tails, bins, strict=False))
    assert all(fill and sum(fill) <= chunk_tokens for fill in bins[len(tails) :])
    assert sorted(x for fill in bins for x in fill) == sorted(shorts)
    assert lower_bound_chunks(lengths, chunk_tokens=chunk_tokens) <= chunks


def plain_best_fit(shorts, tails, chunk_tokens):
    """Best fit, longest first, as the textbook has it; the room left in every bin."""
    rooms = [chunk_tokens - tail for tail in tails]
    for x in shorts:
        fits = [(room, n) for n, room in enumerate(rooms) if room >= x]
        if not fits:
            fits = [(chunk_tokens, len(rooms))]
            rooms.append(chunk_tokens)
        rooms[min(fits)[1]] -= x
    return sorted(rooms)


@given(st.lists(st.integers(1, 200), max_size=60), st.integers(4, 90))
def test_packing_is_best_fit_longest_first(lengths, chunk_tokens):
    shorts, tails, bins, _ = bins_of(lengths, chunk_tokens)
    taken = [*tails.tolist(), *[0] * (len(bins) - len(tails))]
    rooms = [chunk_tokens - tail - sum(fill) for tail, fill in zip(taken, bins, strict=True)]
    assert sorted(rooms) == plain_best_fit(shorts.tolist(), tails.tolist(), chunk_tokens)


@given(st.lists(st.integers(1, 10**7), max_size=30))
def test_chunks_of_millions_of_tokens_are_packed_in_larger_units(lengths):
    chunk_tokens = 3 * 10**6 + 1
    _, tails, bins, chunks = bins_of(lengths, chunk_tokens)
    taken = [*tails.tolist(), *[0] * (len(bins) - len(tails))]
    assert all(tail + sum(fill) <= chunk_tokens for tail, fill in zip(taken, bins, strict=True))
    assert chunks <= lower_bound_chunks(lengths, chunk_tokens=chunk_tokens) * 2


def test_best_fit_fills_the_tightest_tail():
    assert bins_of([4, 6, 9, 16, 13], 10)[2] == [[4], [6], [9]]


def fewest_bins(shorts, tails, chunk_tokens):
    """The optimum, by trying every bin for every item; tails each begin a bin."""
    best = len(tails) + len(shorts)

    def place(n, rooms):
        nonlocal best
        if len(rooms) >= best:
            return
        if n == len(shorts):
            best = len(rooms)
            return
        for room in sorted({room for room in rooms if room >= shorts[n]}):
            rest = list(rooms)
            rest.remove(room)
            place(n + 1, [*rest, room - shorts[n]])
        place(n + 1, [*rooms, chunk_tokens - shorts[n]])

    shorts = sorted(shorts, reverse=True)
    place(0, [chunk_tokens - tail for tail in tails])
    return best


@given(st.lists(st.integers(1, 12), max_size=8), st.lists(st.integers(1, 12), max_size=4))
def test_lower_bound_is_no_more_than_the_optimum(shorts, tails):
    bound = lower_bound_chunks([*shorts, *(12 + tail for tail in tails)], chunk_tokens=12) - len(tails)
    optimum = fewest_bins(shorts, tails, 12)
    *_, chunks = bins_of([*shorts, *(12 + tail for tail in tails)], 12)
    packed = chunks - len(tails)
    assert bound <= optimum <= packed <= optimum + 1
    if sum(shorts) + sum(tails) > 0:
        assert bound >= 1


@pytest.mark.parametrize(
    ("lengths", "bound"),
    [
        ([], 0),
        ([5, 5], 1),
        ([6, 6, 6], 3),  # no two above half a chunk together; by tokens it were 2
        ([9, 9, 3, 3, 3, 3], 4),  # nothing of 3 fits beside 9: threshold 3; by tokens it were 3
        ([11, 11, 11], 6),  # three tails of one token never share a chunk
        ([14, 14, 6, 6], 4),  # but each takes one of 6 beside it
        ([14, 14, 7, 7], 6),  # and none of 7
        ([20, 20], 4),
    ],
)
def test_lower_bound_by_hand(lengths, bound):
    assert lower_bound_chunks(lengths, chunk_tokens=10) == bound


@pytest.mark.parametrize("chunk_tokens", [1024, 4096, 8192, 16384])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_packing_is_within_two_chunks_of_the_bound(name, chunk_tokens):
    for seed in range(8):
        lengths = [int(x) for x in DISTRIBUTIONS[name](256, seed=seed)]
        *_, chunks = bins_of(lengths, chunk_tokens)
        assert 0 <= chunks - lower_bound_chunks(lengths, chunk_tokens=chunk_tokens) <= 2


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("llama3_sft", {1024: (0.7, 0.8), 8192: (0.995, 0.9995)}),
        ("lmsys", {1024: (0.902, 0.908), 4096: (0.994, 0.9965), 8192: (0.9985, 0.9995)}),
        ("bimodal", {8192: (0.23, 0.25), 16384: (0.47, 0.49), 32768: (0.97, 0.985)}),
        ("giants", {4096: (0.79, 0.81), 16384: (0.999, 0.9999)}),
    ],
)
def test_lengths_have_the_published_shape(name, shares):
    lengths = DISTRIBUTIONS[name](100_000, seed=3)
    assert lengths.dtype == np.int64
    assert lengths.min() >= 1
    for limit, (low, high) in shares.items():
        assert low <= (lengths <= limit).mean() <= high
    np.testing.assert_array_equal(lengths[:0], DISTRIBUTIONS[name](0, seed=3))
    np.testing.assert_array_equal(lengths, DISTRIBUTIONS[name](100_000, seed=3))
    assert (DISTRIBUTIONS[name](1000, seed=4) != DISTRIBUTIONS[name](1000, seed=5)).any()


def test_a_few_giants_hold_an_eighth_of_the_tokens():
    lengths = DISTRIBUTIONS["giants"](400_000, seed=0)
    assert 0.10 < lengths[lengths > 100_000].sum() / lengths.sum() < 0.14
    lengths = DISTRIBUTIONS["llama3_sft"](400_000, seed=0)
    assert 0.04 < lengths[lengths > 8192].sum() / lengths.sum() < 0.06
