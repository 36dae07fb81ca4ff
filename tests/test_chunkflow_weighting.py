"""Loss weightings: against the definition, and the same whatever packing, ranks and chunk size."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from chunkflow.errors import PlanError
from chunkflow.loader import ChunkLoader
from chunkflow.runner import ChunkRunner
from chunkflow.sources import NO_TARGET
from chunkflow.sources_memory import MemorySource
from chunkflow.weighting import check_weighting
from chunkflow.world import SINGLE
from tests.tiny import clone, relative_errors, sequence, tiny_model

SOURCE = MemorySource([sequence(n, length) for n, length in enumerate([40, 9, 5, 23, 12, 7, 30])])
BATCH = 5


def loaders(weighting, *, chunk_tokens, world_size):
    return [
        ChunkLoader(
            SOURCE, chunk_tokens=chunk_tokens, global_batch=BATCH, rank=rank, world_size=world_size, seed=1,
            weighting=weighting, report=lambda text: None,
        )
        for rank in range(world_size)
    ]  # fmt: skip


def by_definition(model, samples, weighting):
    """The mean loss of a step, sequence by sequence, as the definition has it."""
    sums, totals = [], []
    for index in samples:
        sample = SOURCE.read(index)
        ids = torch.from_numpy(sample.input_ids)[None]
        losses = cross_entropy(
            model(input_ids=ids, use_cache=False).logits[0],
            torch.from_numpy(sample.shift_labels),
            ignore_index=NO_TARGET,
            reduction="none",
        )
        weights = torch.from_numpy(sample.loss_weights).double()
        sums.append((losses * weights).sum())
        totals.append(float(weights.sum()))
    if weighting == "token":
        return sum(sums) / sum(totals)
    means = [s / t for s, t in zip(sums, totals, strict=True)]
    return sum(means) / (BATCH if weighting == "longalign" else len(means))


@pytest.mark.parametrize("weighting", ["token", "sequence", "longalign"])
def test_every_weighting_is_its_definition_at_any_chunk_size_and_world_size(weighting):
    ours, whole = tiny_model(), tiny_model()
    for chunk_tokens, world_size in ((8, 1), (16, 3), (64, 2)):
        steps = [list(loader) for loader in loaders(weighting, chunk_tokens=chunk_tokens, world_size=world_size)]
        for batches in zip(*steps, strict=True):
            ours.zero_grad(set_to_none=True)
            runner = ChunkRunner(ours, group=SINGLE)
            loss = sum(float(runner.forward_backward(batch)) for batch in batches)
            reference = clone(whole)
            expected = by_definition(reference, batches[0].samples, weighting)
            expected.backward()
            # Loss weights travel as fp32.
            assert loss == pytest.approx(expected.item(), rel=1e-6 if weighting != "token" else 1e-12)
            assert max(relative_errors(ours, reference).values()) < (1e-5 if weighting != "token" else 1e-10)


def test_in_the_last_smaller_step_longalign_counts_a_sequence_as_before():
    *_, full = (batch.denominator for batch in list(loaders("sequence", chunk_tokens=8, world_size=1)[0])[:1])
    assert full == BATCH
    last = {w: list(loaders(w, chunk_tokens=8, world_size=1)[0])[-1].denominator for w in ("sequence", "longalign")}
    assert last == {"sequence": 2, "longalign": BATCH}


def test_losses_over_sequences_are_refused_by_name():
    with pytest.raises(PlanError, match=r"weighting is 'DPO', a loss over whole sequences: .* choose one of token"):
        check_weighting("DPO")
    with pytest.raises(PlanError, match=r"weighting is 'tokens'; it must be one of token, sequence, longalign"):
        loaders("tokens", chunk_tokens=8, world_size=1)


def test_a_sample_without_any_weight_stays_without():
    silent = sequence(0, 6)
    silent.loss_weights[:] = 0
    source = MemorySource([silent, sequence(1, 6)])
    loader = ChunkLoader(source, chunk_tokens=8, global_batch=2, rank=0, world_size=1, weighting="sequence")
    assert loader.source.weights.tolist() == [0, 1]
    assert not loader.source.read(0).loss_weights.any()
    assert np.isclose(loader.source.read(1).loss_weights.sum(), 1)
