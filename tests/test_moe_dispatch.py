"""Traffic is integer arithmetic that must never lose a row; the all-to-alls must deliver what it says."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from moe.contracts import check_exchange
from moe.dispatch import DirectExchange, TwoLevelExchange, all_to_all, gather_rows, scatter_sum
from moe.errors import MoeConfigError
from moe.traffic import Traffic, cuts
from tests.spawn import run_ranks


@st.composite
def traffics(draw):
    members, ranks, each = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    size = members * ranks * ranks * each
    rows = np.array(draw(st.lists(st.integers(0, 9), min_size=size, max_size=size)), dtype=np.int64)
    return rows.reshape(members, ranks, ranks * each)


@given(traffics(), st.integers(1, 6), st.integers(1, 6))
def test_every_row_is_sent_once_and_computed_once(rows_SPE, forward, backward):
    """Also checked: what one rank sends is what the other expects, chunk for chunk."""
    members, ranks, _ = rows_SPE.shape
    every = cuts(forward, backward)
    computed = np.zeros_like(rows_SPE.sum((0, 1)))
    for member in range(members):
        for position in range(ranks):
            traffic = Traffic(rows_SPE, member, position)
            sent = []
            for c in range(forward):
                start, end = Fraction(c, forward), Fraction(c + 1, forward)
                chunk = traffic.chunk(start, end)
                sent.append(chunk.send_index)
                assert chunk.matrix[member, position].sum() == len(chunk.send_index)
                inside = [cut for cut in every if start <= cut <= end]
                pieces = [chunk.piece_index(a, b) for a, b in pairwise(inside)]
                index = np.concatenate([p[0] for p in pieces])
                assert sorted(index) == list(range(chunk.rows_held))
                if member == 0:
                    computed[traffic.own_experts] += np.sum([p[1] for p in pieces], axis=0)
            assert sorted(np.concatenate(sent)) == list(range(rows_SPE[member, position].sum()))
    assert np.array_equal(computed, rows_SPE.sum((0, 1)))


def test_small_buckets_do_not_all_fall_into_the_last_chunk():
    traffic = Traffic(np.ones((1, 1, 512), dtype=np.int64), 0, 0)
    sizes = [traffic.chunk(Fraction(c, 4), Fraction(c + 1, 4)).rows_held for c in range(4)]
    assert min(sizes) > 100


def exchange_all(info):
    group = dist.group.WORLD
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    stripes = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    intra, inter = halves[info.rank // 2], stripes[info.rank % 2]
    generator = np.random.default_rng(0)
    for density in (0, 1, 5):
        matrix = generator.integers(0, density + 1, (4, 4))
        rows = torch.cat([torch.full((matrix[info.rank, d], 2), 10.0 * info.rank + d) for d in range(4)], dim=0)
        expected = torch.cat([torch.full((matrix[s, info.rank], 2), 10.0 * s + info.rank) for s in range(4)], dim=0)
        for exchange in (
            DirectExchange(group),
            TwoLevelExchange(intra, inter, levels="2d"),
            TwoLevelExchange(intra, inter, levels="1d"),
        ):
            check_exchange(exchange, group, tries=2, seed=density)
            assert torch.equal(exchange(rows, matrix), expected)
            assert torch.equal(exchange(expected, matrix.T), rows)
    sizes = np.array([2, 0, 3, 1])
    mine = torch.full((sizes[info.rank], 2), float(info.rank))
    gathered = gather_rows(mine, sizes, group)
    assert gathered[:, 0].tolist() == [0, 0, 2, 2, 2, 3]
    assert torch.equal(scatter_sum(gathered * (info.rank + 1), sizes, group), mine * 10)
    assert all_to_all(mine[:0], [0] * 4, [0] * 4, group).shape == (0, 2)
    assert posted(group) == ["irecv"] * 3 + ["isend"] * 3
    return True


def posted(group):
    """What an exchange posts, in order: a receive behind a large send is told to its peer when that send is through."""
    found = []

    def noted(name, real):
        return lambda *args, **named: found.append(name) or real(*args, **named)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("irecv", "isend"):
            patch.setattr(dist, name, noted(name, getattr(dist, name)))
        all_to_all(torch.zeros(4, 1), [1] * 4, [1] * 4, group)
    return found


def test_direct_and_two_level_exchanges_deliver_the_same_rows_and_bring_them_back():
    assert run_ranks(exchange_all, 4) == [True] * 4


def test_unknown_levels_are_refused():
    with pytest.raises(MoeConfigError, match="'1d' or '2d', not '3d'"):
        TwoLevelExchange(None, None, levels="3d")
