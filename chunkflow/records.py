"""The words of chunkflow, as frozen values. Lengths, starts and offsets are in tokens.

sequence          one sample of the data set: its tokens, and for each of them a target and a weight
segment           a run of tokens of one sequence inside a chunk
chunk             at most `chunk_tokens` tokens: one micro-batch
standalone chunk  whole short sequences, each a segment that cannot see the others (`group is None`)
group             the ordered, dependent chunks of one long sequence
retain            how many chunks of a group keep their activations (the paper's K)

Source of the words: ChunkFlow, arXiv 2503.02356.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from chunkflow.errors import PlanError
from chunkflow.lazy import LazyText

if TYPE_CHECKING:
    from torch import Tensor

MAX_SAMPLE_TOKENS = 2**31 - 1
"""Attention kernels count tokens in int32."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens `start .. start + length` of one sample, at `offset` in the chunk."""

    sample: int
    start: int
    length: int
    offset: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """One micro-batch: its segments, and its place in a group if it belongs to one.

    In a chunk of a group the *first* segment is the group's; it sees everything before `start` of its own sequence.
    Segments behind it fill the ragged tail with whole short sequences, which see only themselves.
    """

    segments: tuple[Segment, ...]
    group: int | None = None
    """Number of the group within the step; None for a standalone chunk."""
    index: int = 0
    """Place in the group, 0 first."""
    count: int = 1
    """Chunks in the group."""
    payload: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)
    """The tensors, once collated; a chunk of a plan has none."""

    @property
    def num_tokens(self) -> int:
        """T, the tokens in this chunk."""
        return sum(segment.length for segment in self.segments)

    @property
    def prefix(self) -> int:
        """Tokens of the group's sequence before this chunk, all visible to its first segment."""
        return self.segments[0].start if self.group is not None else 0

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the tensors of this chunk.

        `input_ids`, `position_ids`, `shift_labels`: int64 [1, T]; labels are shifted already (-100: no target).
        `loss_weights`: fp32 [1, T], 0 where there is no target.
        `cu_seqlens_q`, `cu_seqlens_k`: int32 [segments + 1]; q tokens with k > q keys have k - q tokens of prefix.

        Raises PlanError on a chunk that was planned and not loaded.
        """
        if self.payload is None:
            raise PlanError("this chunk comes from a plan and has no tensors; iterate a ChunkLoader to get loaded ones")
        return self.payload


@dataclass(frozen=True)
class StepBatch:
    """What one rank trains in one optimizer step."""

    step: int
    """Optimizer steps before this one, counted over all epochs."""
    chunks: tuple[Chunk, ...]
    """This rank's chunks in forward order; the chunks of a group stand together, in ascending order."""
    denominator: float
    """What the weighted sum of the losses of all ranks and chunks is divided by: for the mean, the sum of weights."""
    program: LazyText = LazyText()  # noqa: RUF009 - a descriptor, not a default
    """The op program (see `chunkflow.program`), a string, identical on every rank; made when it is first asked for."""
    samples: tuple[int, ...] = ()
    """The global batch: every sample of the step, over all ranks, in drawing order."""
    digest: int = 0
    """Of the data and of the plan of all ranks, below 2**53: ranks whose digests differ would not train one step."""

    @property
    def num_tokens(self) -> int:
        """Tokens that this rank trains."""
        return sum(chunk.num_tokens for chunk in self.chunks)

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "program": self.program}  # made, where it was not: the function would not travel
