"""Splitting and packing: every rule, the lower bound against exhaustive search, quality on long-tailed lengths."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkflow.lengths import DISTRIBUTIONS
from chunkflow.pack import lower_bound_chunks, pack
from chunkflow.split import split, tail_tokens


@given(st.integers(1, 200), st.integers(1, 40))
def test_split_covers_a_sequence_in_order(length, chunk_tokens):
    segments = split(7, length, chunk_tokens=chunk_tokens)
    assert [t for s in segments for t in range(s.start, s.start + s.length)] == list(range(length))
    assert [s.length for s in segments[:-1]] == [chunk_tokens] * (len(segments) - 1)
    assert segments[-1].length == tail_tokens(length, chunk_tokens=chunk_tokens) <= chunk_tokens
    assert {(s.sample, s.offset) for s in segments} == {(7, 0)}


def bins_of(lengths, chunk_tokens):
    """Pack all lengths; return the packing and the number of chunks it needs with the full ones."""
    shorts = {n: x for n, x in enumerate(lengths) if x <= chunk_tokens}
    tails = {n: tail_tokens(x, chunk_tokens=chunk_tokens) for n, x in enumerate(lengths) if x > chunk_tokens}
    packing = pack(shorts, tails, chunk_tokens=chunk_tokens)
    full = sum((x - 1) // chunk_tokens for x in lengths if x > chunk_tokens)
    return shorts, tails, packing, full + len(tails) + len(packing.standalone)


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(4, 24))
def test_packing_places_every_short_sequence_once_and_within_the_chunk(lengths, chunk_tokens):
    shorts, tails, packing, chunks = bins_of(lengths, chunk_tokens)
    assert packing.fills.keys() == tails.keys()
    filled = [tails[owner] + sum(shorts[s] for s in samples) for owner, samples in packing.fills.items()]
    assert all(tokens <= chunk_tokens for tokens in filled)
    assert all(samples and sum(shorts[s] for s in samples) <= chunk_tokens for samples in packing.standalone)
    placed = [s for samples in (*packing.fills.values(), *packing.standalone) for s in samples]
    assert sorted(placed) == sorted(shorts)
    assert lower_bound_chunks(lengths, chunk_tokens=chunk_tokens) <= chunks


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.randoms())
def test_packing_does_not_depend_on_the_order_of_the_samples(lengths, random):
    shuffled = list(enumerate(lengths))
    random.shuffle(shuffled)
    assert pack(dict(shuffled), {99: 3}, chunk_tokens=40) == pack(dict(enumerate(lengths)), {99: 3}, chunk_tokens=40)


def test_best_fit_fills_the_tightest_tail():
    packing = pack({1: 4, 2: 6, 3: 9}, {10: 6, 11: 3}, chunk_tokens=10)
    assert packing.fills == {10: (1,), 11: (2,)}
    assert packing.standalone == ((3,),)


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
    packing = pack(dict(enumerate(shorts)), {100 + n: tail for n, tail in enumerate(tails)}, chunk_tokens=12)
    packed = len(tails) + len(packing.standalone)
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
