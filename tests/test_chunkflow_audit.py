"""The audit: passes on what is right, and finds every kind of fault."""

import re
from dataclasses import replace

import pytest
import torch

from chunkflow.audit import audit
from chunkflow.errors import ChunkflowError
from chunkflow.loader import ChunkLoader
from chunkflow.sources_memory import MemorySource
from tests.tiny import sequence

SOURCE = MemorySource([sequence(n, length) for n, length in enumerate([5, 70, 9, 30, 12, 8, 3, 17, 44, 2, 6])])


class Broken(ChunkLoader):
    """A loader whose batches are changed on their way out."""

    def spoil(self, batch):
        return batch

    def __iter__(self):
        for batch in super().__iter__():
            yield self.spoil(batch)


def make(kind=ChunkLoader, **options):
    options = {"chunk_tokens": 16, "global_batch": 3, "seed": 2, "report": lambda text: None, **options}
    return lambda rank, world_size: kind(SOURCE, rank=rank, world_size=world_size, **options)


@pytest.mark.parametrize("options", [{}, {"overflow": "split_independent"}, {"weighting": "sequence"}, {"retain": 3}])
def test_what_is_right_passes_at_every_resume(options):
    for resume_at in range(5):
        report = audit(make(**options), world_size=2, resumed_world_size=3, resume_at=resume_at)
        assert report.exact, report
        assert (report.steps, report.resumed_at) == (len(make(**options)(0, 1)), resume_at)
        assert "every target scored exactly once" in str(report)
        assert report.to_json()["exact"] is True


def lose_a_chunk(batch):
    return replace(batch, chunks=batch.chunks[1:])


def repeat_a_chunk(batch):
    return replace(batch, chunks=(*batch.chunks, *batch.chunks[:1]))


def change_a_target(batch):
    for chunk in batch.chunks[:1]:
        labels = chunk.tensors()["shift_labels"]
        labels[0, 0] = (labels[0, 0] + 1) % 90
    return batch


def change_a_weight(batch):
    for chunk in batch.chunks[:1]:
        chunk.tensors()["loss_weights"].add_(torch.tensor(0.5))
    return batch


def change_the_denominator(batch):
    return replace(batch, denominator=batch.denominator + len(batch.chunks))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lose_a_chunk, r"was scored 0 times"),
        (repeat_a_chunk, r"was scored 2 times"),
        (change_a_target, r"shift_labels of sample \d+ are not the data's"),
        (change_a_weight, r"loss_weights of sample \d+ are not the data's"),
        (change_the_denominator, "the ranks do not agree on step, samples and denominator"),
    ],
)
def test_every_fault_is_found(spoil, message):
    kind = type("Spoiled", (Broken,), {"spoil": lambda self, batch: spoil(batch) if self.rank == 0 else batch})
    report = audit(make(kind), world_size=2, resumed_world_size=1)
    assert not report.exact
    assert any(re.search(message, problem) for problem in report.problems), report
    assert "NOT every target" in str(report)


def test_a_resume_that_repeats_or_skips_a_step_is_found():
    class Forgetful(ChunkLoader):
        def load_state_dict(self, state):
            super().load_state_dict(state)
            self._step -= 1

    report = audit(make(Forgetful), world_size=2, resumed_world_size=2)
    assert any("was trained before" in problem for problem in report.problems)
    assert any("never trained" in problem for problem in report.problems)


def test_a_resume_outside_the_epoch():
    with pytest.raises(ChunkflowError, match="resume_at is 9; the epoch has steps 0 to 4"):
        audit(make(), world_size=1, resumed_world_size=1, resume_at=9)
