"""The loader: every target once, the same steps at any world size, resumed exactly, ended cleanly."""

import inspect
import json
import threading
from collections import Counter

import numpy as np
import pytest
import torch

from chunkflow.config import PlannerConfig
from chunkflow.errors import ChunkflowError, PlanError, SourceError, StateError
from chunkflow.index import StoredSource
from chunkflow.loader import ChunkLoader
from chunkflow.records import StepBatch
from chunkflow.sampler import global_batch
from chunkflow.sources import Sample
from tests.long_tail import CHUNK, NUM_SAMPLES, long_tail
from tests.spawn import run_ranks


def make(source, **options) -> ChunkLoader:
    options = {"chunk_tokens": CHUNK, "global_batch": 5, "rank": 0, "world_size": 1, "seed": 3, "epochs": 2, **options}
    return ChunkLoader(source, **options)


def tensors_of(batch: StepBatch):
    return [{name: tensor.tolist() for name, tensor in chunk.tensors().items()} for chunk in batch.chunks]


def assert_same(got: list[StepBatch], expected: list[StepBatch]):
    assert got == expected
    assert [tensors_of(batch) for batch in got] == [tensors_of(batch) for batch in expected]


def test_every_target_once_and_none_lost_at_a_border(tmp_path):
    source = long_tail(tmp_path)
    assert source.lengths.max() > 3 * CHUNK
    for batch in make(source, epochs=1):
        seen = {index: source.read(index) for index in batch.samples}
        rebuilt = {i: [np.full(len(s.input_ids), -7, dtype=np.int64) for _ in range(3)] for i, s in seen.items()}
        weights = {i: np.full(len(s.input_ids), -7.0) for i, s in seen.items()}
        for chunk in batch.chunks:
            tensors = chunk.tensors()
            for segment in chunk.segments:
                here = slice(segment.offset, segment.offset + segment.length)
                there = slice(segment.start, segment.start + segment.length)
                assert (rebuilt[segment.sample][0][there] == -7).all()
                names = ("input_ids", "shift_labels", "position_ids")
                for array, name in zip(rebuilt[segment.sample], names, strict=True):
                    array[there] = tensors[name][0, here]
                weights[segment.sample][there] = tensors["loss_weights"][0, here]
        for index, sample in seen.items():
            ids, labels, positions = rebuilt[index]
            assert ids.tolist() == sample.input_ids.tolist()
            assert labels.tolist() == sample.shift_labels.tolist()
            assert weights[index].tolist() == sample.loss_weights.tolist()
            assert positions.tolist() == list(range(len(ids)))
        total = sum(float(chunk.tensors()["loss_weights"].sum()) for chunk in batch.chunks)
        assert batch.denominator == total == sum(source.weights[list(batch.samples)])


def test_tensors_of_each_chunk(tmp_path):
    kinds = Counter()
    for batch in make(long_tail(tmp_path)):
        for chunk in batch.chunks:
            t = chunk.tensors()
            assert {name: (x.dtype, tuple(x.shape)) for name, x in t.items()} == {
                "input_ids": (torch.int64, (1, chunk.num_tokens)),
                "position_ids": (torch.int64, (1, chunk.num_tokens)),
                "shift_labels": (torch.int64, (1, chunk.num_tokens)),
                "loss_weights": (torch.float32, (1, chunk.num_tokens)),
                "cu_seqlens_q": (torch.int32, (len(chunk.segments) + 1,)),
                "cu_seqlens_k": (torch.int32, (len(chunk.segments) + 1,)),
            }
            q, k = t["cu_seqlens_q"].diff().tolist(), t["cu_seqlens_k"].diff().tolist()
            assert q == [segment.length for segment in chunk.segments]
            assert [keys - queries for queries, keys in zip(q, k, strict=True)] == [
                segment.start for segment in chunk.segments
            ]
            assert all(segment.start == 0 for segment in chunk.segments[1:])
            kinds["group" if chunk.group is not None else "standalone"] += 1
            kinds["filled tail"] += chunk.group is not None and len(chunk.segments) > 1
            kinds["packed"] += chunk.group is None and len(chunk.segments) > 1
    assert min(kinds.values()) > 0, kinds


def test_an_epoch_visits_every_sample_once_and_the_last_step_is_smaller(tmp_path):
    loader = make(long_tail(tmp_path))
    assert (len(loader), loader.num_steps, loader.steps_per_epoch) == (10, 10, 5)
    batches = list(loader)
    assert [batch.step for batch in batches] == list(range(10))
    assert [len(batch.samples) for batch in batches] == [5, 5, 5, 5, 3] * 2
    for epoch in (batches[:5], batches[5:]):
        assert sorted(i for batch in epoch for i in batch.samples) == list(range(NUM_SAMPLES))
    assert batches[7].samples == tuple(global_batch(3, 1, 2, num_samples=NUM_SAMPLES, global_batch=5))
    assert len(loader) == 10
    assert list(loader) == []


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_the_same_steps_at_any_world_size(tmp_path, world_size):
    source = long_tail(tmp_path)
    alone = list(make(source))
    ranks = [list(make(source, rank=rank, world_size=world_size)) for rank in range(world_size)]
    for expected, *batches in zip(alone, *ranks, strict=True):
        assert {(b.step, b.samples, b.denominator) for b in batches} == {
            (expected.step, expected.samples, expected.denominator)
        }
        assert len({b.program for b in batches}) == 1
        segments = [s for b in batches for chunk in b.chunks for s in chunk.segments]
        assert Counter(segments) == Counter(s for chunk in expected.chunks for s in chunk.segments)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_resuming_at_every_step_at_another_world_size(tmp_path, world_size):
    source = long_tail(tmp_path)
    whole = list(make(source, world_size=world_size, rank=world_size - 1))
    with make(source, world_size=2, rank=0, prefetch=4) as first:
        states = [first.state_dict()]
        for _ in first:
            states.append(first.state_dict())
    for step, state in enumerate(states):
        with make(source, world_size=world_size, rank=world_size - 1, prefetch=1 + step % 3) as second:
            second.load_state_dict(json.loads(json.dumps(state)))
            assert second.step == step
            assert_same(list(second), whole[step:])


def test_the_state_advances_with_the_loop_not_with_the_thread(tmp_path):
    source = long_tail(tmp_path)
    with make(source, prefetch=8) as loader:
        assert (loader.state_dict()["epoch"], loader.state_dict()["step"]) == (0, 0)
        places = []
        for _ in loader:
            state = loader.state_dict()
            places.append((state["epoch"], state["step"]))
    assert places == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (2, 0)]
    assert set(state) == {
        "manifest",
        "description",
        "planner",
        "seed",
        "global_batch",
        "weighting",
        "balance",
        "epoch",
        "step",
    }
    assert state["manifest"] == source.manifest
    assert state["planner"] == {"chunk_tokens": CHUNK, "retain": 1, "pair_cost": 1 / 4096, "max_tokens": None}


def test_a_break_and_a_second_iterator_go_on(tmp_path):
    source = long_tail(tmp_path)
    whole = list(make(source))
    with make(source) as loader:
        got = []
        for batch in loader:
            got.append(batch)
            if len(got) == 3:
                break
        old = iter(loader)
        got.append(next(old))
        got.append(next(iter(loader)))
        with pytest.raises(StateError, match="this iteration was ended by"):
            next(old)
        got += list(loader)
        assert_same(got, whole)
        state = make(source).state_dict()
        loader.load_state_dict(state)
        assert_same(list(loader), whole)


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "chunkflow-prefetch"]


def test_the_thread_ends_with_its_iterator(tmp_path):
    loader = make(long_tail(tmp_path), epochs=1000)
    for how in ("break", "drop", "close", "with"):
        iterator = iter(loader)
        next(iterator)
        assert len(prefetch_threads()) == 1
        if how == "break":
            for _ in iterator:
                break
            del iterator
        elif how == "drop":
            del iterator
        elif how == "close":
            loader.close()
            loader.close()
        else:
            with loader:
                pass
        assert prefetch_threads() == [], how


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_tokens": 32}, "planner.chunk_tokens was 16 and is 32"),
        ({"retain": 2}, "planner.retain was 1 and is 2"),
        ({"pair_cost": 0.5}, "planner.pair_cost was 0.000244140625 and is 0.5"),
        ({"seed": 4}, "seed was 3 and is 4"),
        ({"global_batch": 6, "seed": 4}, "seed was 3 and is 4; global_batch was 5 and is 6"),
    ],
)
def test_a_state_of_another_configuration_is_refused(tmp_path, change, message):
    source = long_tail(tmp_path)
    state = make(source).state_dict()
    with pytest.raises(StateError) as caught:
        make(source, **change).load_state_dict(state)
    assert f"the saved loader state belongs to other steps: {message}. Go back" in str(caught.value)


def test_a_state_of_other_data_is_refused(tmp_path):
    state = make(long_tail(tmp_path)).state_dict()
    other = long_tail(tmp_path, name="other", seed=1)
    old, new = state["description"]["file"], other.description["file"]
    with pytest.raises(StateError, match=f"data\\.file was '{old}' and is '{new}'. Go back"):
        make(other).load_state_dict(state)
    with pytest.raises(StateError, match=r"data\.select was None and is '20 samples, "):
        make(long_tail(tmp_path).select(range(20))).load_state_dict(state)


def test_a_state_that_does_not_fit(tmp_path):
    source = long_tail(tmp_path)
    loader = make(source)
    list(loader)
    with pytest.raises(StateError, match=r"step 0 of epoch 2; .* and 5 steps in all; raise epochs"):
        make(source, epochs=1).load_state_dict(loader.state_dict())
    more = make(source, epochs=3)
    more.load_state_dict(loader.state_dict())
    assert [batch.step for batch in more] == [10, 11, 12, 13, 14]
    with pytest.raises(StateError, match=r"lacks manifest, description, .*step; it is not the state of a ChunkLoader"):
        loader.load_state_dict({"epoch": 0})
    for key, wrong in {"step": 1.5, "epoch": None, "planner": None, "description": "x"}.items():
        with pytest.raises(StateError, match=f"{key} is {wrong!r} in the loader's saved state"):
            loader.load_state_dict({**loader.state_dict(), key: wrong})
    with pytest.raises(StateError, match="stands at step 5 of epoch 0"):
        loader.load_state_dict({**loader.state_dict(), "epoch": 0, "step": 5})


class Altered(StoredSource):
    """A stored source with other weights, or one that cannot read."""

    failure: Exception | None = None
    scale = 1.0

    def read(self, index):
        if self.failure is not None:
            raise self.failure
        sample = super().read(index)
        weights = (sample.loss_weights * self.scale).astype(np.float32)
        return Sample(sample.input_ids, sample.shift_labels, weights)


def test_fractional_weights_add_up(tmp_path):
    source = Altered(long_tail(tmp_path).folder)
    source.scale, source.weights = 0.25, source.weights * 0.25
    for batch in make(source, epochs=1):
        total = sum(float(chunk.tensors()["loss_weights"].sum()) for chunk in batch.chunks)
        assert total == batch.denominator
        assert total % 1 in (0, 0.25, 0.5, 0.75)


def test_a_step_without_any_weight_is_named(tmp_path):
    source = Altered(long_tail(tmp_path).folder)
    source.scale, source.weights = 0.0, source.weights * 0.0
    with pytest.raises(SourceError, match=r"loss weights of step 0 are 0\.0 in sum \(samples \[.*\); a step needs"):
        next(iter(make(source)))


def test_errors_of_the_thread_surface_with_their_cause(tmp_path):
    source = Altered(long_tail(tmp_path).folder)
    source.failure = SourceError("sample 3 is gone")
    with pytest.raises(SourceError, match="sample 3 is gone") as caught:
        next(iter(make(source, chunk_tokens=128)))
    assert any(entry.name == "collate" for entry in caught.traceback)
    source.failure = MemoryError("no more")
    with pytest.raises(SourceError, match=r"step 0 could not be loaded: MemoryError\('no more'\)") as caught:
        next(iter(make(source, chunk_tokens=128)))
    assert isinstance(caught.value.__cause__, MemoryError)
    assert prefetch_threads() == []


def test_data_that_is_not_what_was_announced(tmp_path):
    source = Altered(long_tail(tmp_path).folder)
    source.lengths = source.lengths + 1
    with pytest.raises(SourceError, match=r"sample \d+ was announced with \d+ tokens and read with"):
        next(iter(make(source)))


def test_a_plan_can_be_looked_at(tmp_path):
    loader = make(long_tail(tmp_path), world_size=3)
    batches = list(loader)
    plan = loader.plan(7)
    plan.validate(loader.source.lengths[list(plan.samples)].tolist())
    assert plan.ranks[0] == batches[7].chunks
    assert plan.program == batches[7].program
    with pytest.raises(PlanError, match="no step 10; 2 epochs have steps 0 to 9"):
        loader.plan(10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank is 2 in a world of 2; it must be 0 to 1"),
        ({"rank": None}, "rank is None and world_size is 1; give both, or neither"),
        ({"epochs": 0}, "epochs is 0"),
        ({"prefetch": 0}, "prefetch is 0"),
        ({"global_batch": 0}, "global_batch is 0"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(PlanError, match=message):
        make(long_tail(tmp_path), **options)


def test_defaults_are_the_planners(tmp_path):
    defaults = {name: p.default for name, p in inspect.signature(ChunkLoader).parameters.items()}
    config = PlannerConfig(chunk_tokens=1)
    assert (defaults["retain"], defaults["pair_cost"]) == (config.retain, config.pair_cost)


def test_without_a_process_group_it_is_one_process(tmp_path, monkeypatch):
    loader = ChunkLoader(long_tail(tmp_path), chunk_tokens=8, global_batch=4)
    assert (loader.rank, loader.world_size) == (0, 1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(ChunkflowError, match=r"started by torchrun and torch\.distributed is not initialised.*call"):
        ChunkLoader(loader.source, chunk_tokens=8, global_batch=4)
    assert make(loader.source, rank=1, world_size=2).rank == 1


def steps_of_this_rank(rank_info, folder):
    loader = ChunkLoader(long_tail(folder), chunk_tokens=CHUNK, global_batch=5, seed=3, epochs=2)
    assert (loader.rank, loader.world_size) == (rank_info.rank, rank_info.world_size)
    return [(batch, tensors_of(batch)) for batch in loader]


def test_ranks_come_from_the_default_group(tmp_path):
    source = long_tail(tmp_path)
    for rank, got in enumerate(run_ranks(steps_of_this_rank, 2, tmp_path)):
        expected = [(batch, tensors_of(batch)) for batch in make(source, rank=rank, world_size=2)]
        assert got == expected
