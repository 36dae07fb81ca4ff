"""Overflow policies: what each keeps, counted before the first step, and trained."""

import numpy as np
import pytest

from chunkflow.errors import PlanError, SourceError
from chunkflow.loader import ChunkLoader
from chunkflow.overflow import Overflow, account, apply_overflow, parse_overflow
from chunkflow.sources import fetch
from chunkflow.sources_memory import MemorySource
from chunkflow.survey import overflowed
from tests.tiny import sequence

LENGTHS = [5, 8, 9, 20, 16, 3]
SOURCE = MemorySource([sequence(n, length) for n, length in enumerate(LENGTHS)])


def loader(**options):
    options = {"chunk_tokens": 8, "global_batch": 4, "rank": 0, "world_size": 1, "report": lambda text: None, **options}
    return ChunkLoader(SOURCE, **options)


def trained(**options):
    """Tokens and targets that an epoch really trains, from the tensors."""
    tokens, targets = 0, 0.0
    for batch in loader(**options):
        for chunk in batch.chunks:
            tokens += chunk.num_tokens
            targets += float(chunk.tensors()["loss_weights"].double().sum())
    return tokens, targets


@pytest.mark.parametrize("max_tokens", [None, 12])
def test_accounts_are_what_is_trained(max_tokens):
    rows = {row.policy: row for row in account(SOURCE, chunk_tokens=8, max_tokens=max_tokens)}
    assert set(rows) == set(Overflow) - {Overflow.RAISE}
    for policy, row in rows.items():
        assert row.kept_tokens + row.cut_tokens + row.dropped_tokens == sum(LENGTHS)
        assert row.kept_targets + row.lost_targets == pytest.approx(SOURCE.weights.sum())
        if policy is Overflow.SPLIT and max_tokens:
            continue  # refused, see below
        tokens, targets = trained(overflow=policy, max_tokens=max_tokens)
        assert (tokens, targets) == (row.kept_tokens, pytest.approx(row.kept_targets))
        left = overflowed(SOURCE.lengths, policy, chunk_tokens=8, max_tokens=max_tokens)
        assert (len(left), left.sum()) == (row.samples, row.kept_tokens)
    assert rows[Overflow.SPLIT_INDEPENDENT].lost_targets == 0


def test_policies_by_hand():
    def lengths(policy, max_tokens=None):
        left = apply_overflow(SOURCE, Overflow(policy), chunk_tokens=8, max_tokens=max_tokens)
        for index in range(len(left)):
            fetch(left, index)
        return left.lengths.tolist()

    assert apply_overflow(SOURCE, Overflow.SPLIT, chunk_tokens=8, max_tokens=None) is SOURCE
    assert lengths("truncate") == [5, 8, 8, 8, 8, 3]
    assert lengths("truncate", 12) == [5, 8, 9, 12, 12, 3]
    assert lengths("drop") == [5, 8, 3]
    assert lengths("split_independent") == [5, 8, 8, 1, 8, 8, 4, 8, 8, 3]
    assert lengths("drop", 20) == LENGTHS


def test_a_piece_keeps_the_target_across_the_cut_and_a_truncated_sample_does_not():
    whole = SOURCE.read(3)
    pieces = apply_overflow(SOURCE, Overflow.SPLIT_INDEPENDENT, chunk_tokens=8, max_tokens=None)
    found = [pieces.read(index) for index in (4, 5, 6)]
    for name in ("input_ids", "shift_labels", "loss_weights"):
        assert np.array_equal(np.concatenate([getattr(s, name) for s in found]), getattr(whole, name))
    cut = apply_overflow(SOURCE, Overflow.TRUNCATE, chunk_tokens=8, max_tokens=None).read(3)
    assert (cut.shift_labels[-1], cut.loss_weights[-1]) == (-100, 0)
    assert np.array_equal(cut.shift_labels[:-1], whole.shift_labels[:7])


def test_the_loader_tells_before_the_first_step():
    told = []
    batches = iter(loader(overflow="truncate", report=told.append))
    assert told == []
    next(batches)
    assert len(told) == 1
    assert "> truncate" in told[0]
    assert "  split_independent" in told[0]
    next(iter(loader(chunk_tokens=20, report=told.append)))
    assert len(told) == 1  # nothing is longer than a chunk


def test_refusals():
    with pytest.raises(SourceError, match=r"3 of 6 samples have more than 8 tokens, the longest of them, sample 3, 20"):
        loader(overflow="raise")
    with pytest.raises(SourceError, match=r"2 of 6 samples have more than 12 tokens.*raise max_tokens"):
        loader(max_tokens=12)
    with pytest.raises(SourceError, match="every sample has more than 2 tokens"):
        loader(overflow="drop", chunk_tokens=2)
    with pytest.raises(PlanError, match=r"overflow is 'cut'; it must be one of split, split_independent, truncate"):
        parse_overflow("cut")
    with pytest.raises(PlanError, match=r"packed\(\) cannot train the target across a cut"):
        loader(overflow="split_independent").packed()


def test_another_policy_is_another_data_set():
    manifests = {
        loader(overflow=policy).source.manifest for policy in ("split", "truncate", "drop", "split_independent")
    }
    assert len(manifests) == 4
