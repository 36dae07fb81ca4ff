"""Ranges of elements, told as rows: what ranks save is the whole tensor, wherever their ranges cut it."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist

from checkpointing import SINGLE, Checkpointer, KeepLast, Mutability, TensorProvider
from launch.rows import Range, RowExchange, RowsProvider, provider_of
from tests.flat_states import Flat
from tests.spawn import run_ranks

SHAPES = {"matrix": (300, 70), "wide": (3, 40_000), "cube": (30, 20, 40), "vector": (50_001,), "scalar": ()}


def whole_of(name, n):
    numel = int(np.prod(SHAPES[name]))
    return (torch.arange(numel) + 1000 * n).to((torch.float32, torch.bfloat16)[n]).view(SHAPES[name])


def ranges_of(name, world_size, seed):
    """Random ranges that tile the tensor, some of them empty; several within one row of `wide`."""
    numel = int(np.prod(SHAPES[name]))
    cuts = np.random.default_rng([seed, len(name)]).integers(0, numel + 1, world_size - 1)
    borders = [0, *sorted(cuts.tolist()), numel]
    return [Range(SHAPES[name], a, b - a) for a, b in pairwise(borders)]


def rank_saves(info, folder, seeds):
    kinds = set()
    with Checkpointer(folder, keep=KeepLast(99), group=dist.group.WORLD) as checkpoints:
        for seed in range(seeds):
            mine = {name: ranges_of(name, info.world_size, seed)[info.rank] for name in SHAPES}
            mine = {name: held for name, held in mine.items() if held.size}
            exchange = RowExchange(mine, dist.group.WORLD)
            live = {name: [whole_of(name, n).view(-1)[h.start : h.stop].clone() for n in (0, 1)]
                    for name, h in mine.items()}  # fmt: skip
            nothing = [torch.empty(0), torch.empty(0, dtype=torch.bfloat16)]
            tails = exchange.tails({name: live.get(name, nothing) for name in SHAPES})
            state = {
                f"{name}.{n}": provider_of(held, live[name][n], tails[name][n], Mutability.STEP)
                for name, held in mine.items() for n in (0, 1) if held.last > held.first
            }  # fmt: skip
            kinds |= {type(one).__name__ for one in state.values()}
            checkpoints.save(seed, Flat(state)).wait(timeout_s=30)
    return kinds


@pytest.mark.parametrize("world_size", [1, 3])
def test_what_ranks_save_is_the_whole(tmp_path, world_size):
    seeds = 6
    kinds = set().union(*run_ranks(rank_saves, world_size, str(tmp_path), seeds))
    assert kinds == ({TensorProvider.__name__} if world_size == 1 else {TensorProvider.__name__, RowsProvider.__name__})
    with Checkpointer(tmp_path, group=SINGLE) as checkpoints:
        for seed in range(seeds):
            back = Flat({})
            checkpoints.restore(back, step=seed)
            for name in SHAPES:
                for n in (0, 1):
                    assert torch.equal(back.loaded[f"{name}.{n}"], whole_of(name, n)), (seed, name)


def odd_strides(info):
    """Ranks hold one element each of a row of three, whose stride is not 1."""
    mine = Range((1, 3), info.rank, 1)
    exchange = RowExchange({"row": mine}, dist.group.WORLD)
    value = torch.arange(9.0)[3 * info.rank :: 4][:1]
    assert value.stride() == (4,)
    tail = exchange.tails({"row": [value]})["row"][0]
    made = provider_of(mine, value, tail, Mutability.STEP) if mine.last > mine.first else None
    return None if made is None else b"".join(bytes(part) for part in made.chunks())


def test_one_element_of_an_odd_stride_is_saved():
    expected = torch.tensor([0.0, 3.0, 6.0]).numpy().tobytes()
    assert run_ranks(odd_strides, 3) == [expected, None, None]
