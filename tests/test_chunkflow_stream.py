"""Streams: planned in windows of one global batch, the same at any world size, resumed exactly or refused."""

import json

import numpy as np
import pytest
from datasets import Dataset

from chunkflow.errors import ChunkflowError, PlanError, SourceError, StateError
from chunkflow.runner import ChunkRunner
from chunkflow.stream import StreamLoader
from tests.spawn import run_ranks
from tests.tiny import tiny_model
from tests.tokenizers_fixture import tiny_tokenizer

rng = np.random.default_rng(0)
RECORDS = [{"input_ids": rng.integers(0, 50, n).tolist()} for n in [3, 40, 1, 7, 12, 5, 30, 2, 9, 4, 6]]


def stream(records=RECORDS, **options):
    dataset = Dataset.from_list(records).to_iterable_dataset()
    options = {"chunk_tokens": 8, "global_batch": 3, "rank": 0, "world_size": 1, **options}
    return StreamLoader(lambda: dataset, None, **options)


def tokens_of(batches):
    """Each sample of a step as it was loaded, over all ranks."""
    found = {}
    for batch in batches:
        for chunk in batch.chunks:
            ids = chunk.tensors()["input_ids"][0].tolist()
            for s in chunk.segments:
                found.setdefault(s.sample, {})[s.start] = ids[s.offset : s.offset + s.length]
    return {sample: [t for start in sorted(parts) for t in parts[start]] for sample, parts in found.items()}


@pytest.mark.parametrize("world_size", [1, 3])
def test_windows_are_the_records_in_order(world_size):
    kept = [record["input_ids"] for record in RECORDS if len(record["input_ids"]) > 1]
    steps = zip(*(stream(rank=r, world_size=world_size) for r in range(world_size)), strict=True)
    for step, batches in enumerate(steps):
        window = kept[3 * step : 3 * step + 3]
        assert tokens_of(batches) == dict(enumerate(window))
        assert {b.denominator for b in batches} == {sum(len(ids) - 1 for ids in window)}
        assert len({b.program for b in batches}) == 1
    assert step == 3


def test_resuming_at_every_step_at_another_world_size():
    whole = [tokens_of([batch]) for batch in stream()]
    loader = stream(prefetch=3)
    states = [loader.state_dict()]
    states += [loader.state_dict() for _ in loader]
    assert loader.skipped == {"fewer than 2 tokens, so nothing to predict": 1}
    for step, state in enumerate(states):
        ranks = [stream(rank=r, world_size=2) for r in range(2)]
        for rank in ranks:
            rank.load_state_dict(json.loads(json.dumps(state)))
        assert [tokens_of(batches) for batches in zip(*ranks, strict=True)] == whole[step:]


def test_a_stream_that_does_not_repeat_itself_is_refused():
    loader = stream()
    next(iter(loader))
    state = loader.state_dict()
    for records in (RECORDS[::-1], RECORDS[:1]):
        other = stream(records)
        other.load_state_dict(state)
        with pytest.raises(StateError, match="the stream does not repeat itself: its first 4 records are not those"):
            next(iter(other))
    with pytest.raises(StateError, match="global_batch was 3 and is 4"):
        stream(global_batch=4).load_state_dict(state)
    with pytest.raises(StateError, match="that of a StreamLoader has"):
        stream().load_state_dict({"step": 3})


def test_policies_and_weightings_hold_for_windows():
    for batch in stream(overflow="truncate", weighting="sequence"):
        assert all(chunk.group is None for chunk in batch.chunks)
        assert batch.denominator == len(batch.samples)
    with pytest.raises(SourceError, match=r"step 0 of the stream: .* have more than 8 tokens"):
        next(iter(stream(overflow="raise")))
    with pytest.raises(PlanError, match="global_batch is 0"):
        stream(global_batch=0)


def test_a_window_without_a_target_is_an_error_and_not_a_division_by_zero():
    records = [{"input_ids": list(range(20)), "labels": [-100] * 19 + [5]}]
    with pytest.raises(SourceError, match=r"step 0 of the stream: the loss weights of step 0 are 0\.0 in sum"):
        next(iter(stream(records, overflow="truncate")))


def test_a_stream_of_nothing_is_an_error():
    with pytest.raises(SourceError, match=r"gave no sample to train on .*it is empty"):
        list(StreamLoader(list, None, chunk_tokens=8, global_batch=3, rank=0, world_size=1))
    once = iter(RECORDS)
    loader = StreamLoader(lambda: once, None, chunk_tokens=8, global_batch=3, rank=0, world_size=1)
    next(iter(loader))
    loader.close()
    with pytest.raises((SourceError, StateError)):  # the rest of the iterator is no stream from its beginning
        list(loader)
    with pytest.raises(SourceError, match="left out: 1: fewer than 2 tokens"):
        list(stream(RECORDS[2:3]))


def other_streams(info):
    """Each rank reads a part of its own of samples of one length, as after `split_dataset_by_node`."""
    records = [{"input_ids": [10 * info.rank + n] * 12} for n in range(4)]
    loader = StreamLoader(lambda: records, None, chunk_tokens=8, global_batch=2)
    try:
        ChunkRunner(tiny_model()).forward_backward(next(iter(loader)))
    except ChunkflowError as error:
        first = str(error)
    loader.close()
    try:
        next(iter(StreamLoader(lambda: records, None, chunk_tokens=8 + info.rank, global_batch=2)))
    except PlanError as error:
        return first, str(error)


def test_ranks_that_are_given_other_streams_or_settings_are_told():
    for told, named in run_ranks(other_streams, 2):
        assert told.startswith("ranks 0 and 1 are about to train step 0 by different plans (of other data")
        assert named.startswith("the loaders of ranks 0 and 1 differ: planner is [8,")


def test_texts_and_what_is_none():
    texts = StreamLoader(
        lambda: [{"text": "the lazy dog"}], tiny_tokenizer(), chunk_tokens=8, global_batch=2, rank=0, world_size=1
    )
    (batch,) = texts
    assert tiny_tokenizer().decode(tokens_of([batch])[0]) == "the lazy dog<eos>"
    bad = StreamLoader(lambda: [{"body": 1}], None, chunk_tokens=8, global_batch=2, rank=0, world_size=1)
    with pytest.raises(SourceError, match="record 0: neither 'text' nor"):
        next(iter(bad))
