"""The cost model found again from times made by it, and chunks dealt by it at one step on all ranks."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkflow.balance import OnlineBalance
from chunkflow.config import PlannerConfig
from chunkflow.errors import ChunkflowError, StateError
from chunkflow.fit import CostFit, timed
from chunkflow.layout import make_layout
from chunkflow.lengths import DISTRIBUTIONS
from chunkflow.loader import ChunkLoader
from chunkflow.loader_state import Balance
from chunkflow.records import Chunk, Segment
from chunkflow.runner import ChunkRunner
from chunkflow.sources_memory import MemorySource
from tests.spawn import run_ranks
from tests.tiny import sequence, tiny_model

COST = {"F": (1e-3, 2e-6, 5e-10), "B": (2e-3, 5e-6, 9e-10)}


def chunk(length, prefix=0):
    return Chunk((Segment(0, prefix, length, 0),), 0 if prefix else None, 1 if prefix else 0, 2 if prefix else 1)


def seconds(op, c):
    fixed, token, pair = COST[op]
    s = c.segments[0]
    return fixed + token * s.length + pair * (s.length * s.start + s.length * (s.length + 1) / 2)


def test_a_fit_finds_the_model_that_made_the_times():
    fit, rng = CostFit(), np.random.default_rng(0)
    for _ in range(60):
        c = chunk(int(rng.integers(100, 4000)), int(rng.integers(0, 50_000)))
        for op in "fFB":
            fit.add(op, c, seconds("F" if op == "f" else op, c))
    model = fit.solve()
    for found, expected in ((model.forward, COST["F"]), (model.backward, COST["B"])):
        assert (found.fixed, found.per_token, found.per_pair) == pytest.approx(expected, rel=1e-6)
        assert found.residual < 1e-6
    assert (model.forward.count, model.backward.count) == (120, 60)
    assert model.pair_cost == pytest.approx((5e-10 + 9e-10) / 7e-6)
    assert "residual 0.0% over 120 ops" in str(model)


def test_noise_shows_in_the_residual_and_never_as_a_negative_cost():
    fit, rng = CostFit(), np.random.default_rng(0)
    for _ in range(200):
        c = chunk(int(rng.integers(10, 100)))
        for op in "FB":
            fit.add(op, c, 1e-3 * float(rng.uniform(0.5, 1.5)))
    model = fit.solve()
    for op in (model.forward, model.backward):
        assert min(op.fixed, op.per_token, op.per_pair) >= 0
        assert 0.2 < op.residual < 0.6


def test_sums_of_ranks_add_up():
    ones, every = [CostFit(), CostFit()], CostFit()
    for n in range(40):
        c = chunk(100 + 37 * n, 13 * n)
        for op in "FB":
            for fit in (ones[n % 2], every):
                fit.add(op, c, seconds(op, c))
    assert CostFit().solve(ones[0].sums + ones[1].sums).pair_cost == pytest.approx(every.solve().pair_cost)
    with pytest.raises(ChunkflowError, match="0 ops were measured; a cost model needs 6 forwards"):
        CostFit().solve()


def test_operations_are_timed_around_their_run():
    seen = []
    for _ in timed([("F", 0), ("F", None), ("B", 0)], [chunk(4)], lambda *args: seen.append(args)):
        pass
    assert [(op, c) for op, c, _ in seen] == [("F", chunk(4)), ("B", chunk(4))]
    assert all(took > 0 for *_, took in seen)


def test_a_new_pair_cost_holds_from_one_step_on():
    balance = Balance(((0, 0.1),)).then(7, 0.5, now=3)
    assert [balance.at(step) for step in (0, 6, 7, 99)] == [0.1, 0.1, 0.5, 0.5]
    assert Balance.from_json(json.loads(json.dumps(balance.to_json()))) == balance
    assert [balance.then(9, 0.7, now=5).at(step) for step in (6, 8, 9)] == [0.1, 0.5, 0.7]
    assert len(balance.then(12, 0.7, now=8).changes) == 2
    for broken in (3, [], [[0, None]], [0.1, 7, 0.5]):
        with pytest.raises(StateError, match="in the loader's saved state"):
            Balance.from_json(broken)


@given(st.integers(1, 9), st.lists(st.tuples(st.integers(0, 4), st.floats(0.1, 9)), max_size=12))
def test_a_step_that_a_rank_may_have_planned_keeps_its_pair_cost(prefetch, moves):
    """However close together changes come, and on whichever step a slow rank's thread still is."""
    loader = make(prefetch=prefetch)
    for steps, pair_cost in moves:
        loader._step += steps
        planned = range(loader._step, loader._step + prefetch + 2)
        before = [loader.balance.at(step) for step in planned]
        loader.rebalance(pair_cost)
        assert [loader.balance.at(step) for step in planned] == before
        assert loader.balance.at(planned.stop) == loader.balance.pair_cost == pair_cost


def make(rank=0, world_size=1, **options):
    source = MemorySource([sequence(n, length) for n, length in enumerate([5, 70, 9, 30, 12, 8] * 10)])
    options = {"chunk_tokens": 8, "global_batch": 6, "epochs": 3, "report": lambda text: None, **options}
    return ChunkLoader(source, rank=rank, world_size=world_size, **options)


def test_rebalancing_changes_ranks_but_never_steps_and_travels_with_the_state():
    plain, moved = make(world_size=2, prefetch=1), make(world_size=2, prefetch=4)
    steps, changed = [], 0
    for before, after in zip(plain, moved, strict=True):
        assert (before.samples, before.denominator) == (after.samples, after.denominator)
        if before.step == 3:
            moved.rebalance(50.0)
            state = json.loads(json.dumps(moved.state_dict()))
        steps.append(after)
        changed += before.chunks != after.chunks
        assert before.step >= 3 + 1 + 4 + 2 or before.chunks == after.chunks
    assert changed > 0
    resumed = make(world_size=2, prefetch=1)
    resumed.load_state_dict(state)
    assert list(resumed) == steps[4:]


def train_on_a_rank(rank_info):
    loader = make(chunk_tokens=16, rank=None, world_size=None)
    runner, told = ChunkRunner(tiny_model()), []
    balance = OnlineBalance(loader, runner, every=4, report=told.append)
    solve = balance._fit.solve
    if rank_info.rank == 1:  # a processor that rounds otherwise

        def rounded(sums):
            model = solve(sums)
            return replace(model, forward=replace(model.forward, per_pair=model.forward.per_pair * (1 + 1e-9)))

        balance._fit.solve = rounded
    for batch in loader:
        runner.forward_backward(batch)
        balance.step()
        if batch.step == 11:
            break
    loader.close()
    return balance.model, loader.balance, told


def test_ranks_find_the_same_model_and_change_together():
    (model, balance, told), (other, other_balance, silent) = run_ranks(train_on_a_rank, 2)
    assert model is not None
    assert balance == other_balance
    assert (model.backward, model.forward.per_token) == (other.backward, other.forward.per_token)
    assert silent == []
    assert len(told) == 3
    assert "residual" in told[0]
    assert "pair_cost" in told[0]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_from_eight_chunks_a_rank_on_the_slowest_is_within_5_percent_of_the_bound(name):
    checked = 0
    for world_size in (2, 4, 8):
        for chunk_tokens in (2048, 4096, 8192):
            for seed in range(3):
                lengths = DISTRIBUTIONS[name](256, seed=seed)
                config = PlannerConfig(chunk_tokens=chunk_tokens)
                layout = make_layout(np.arange(256), lengths, config=config, world_size=world_size)
                if layout.num_chunks >= 8 * world_size:
                    assert layout.loads.max() <= 1.05 * layout.bound
                    checked += 1
    assert checked >= 9
