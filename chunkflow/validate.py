"""The rules of a plan, each checked by itself, with the place in the message."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING

from chunkflow.errors import PlanError
from chunkflow.program import align, operations
from chunkflow.records import Chunk

if TYPE_CHECKING:
    from chunkflow.plan import StepPlan


def validate(plan: StepPlan, lengths: Mapping[int, int]) -> None:
    """Raise PlanError at the first rule that the plan breaks for samples of these lengths."""
    _every_token_once(plan, lengths)
    for where, chunk in _places(plan):
        _segments_in_place(where, chunk, plan.config.chunk_tokens)
        if chunk.group is None:
            _standalone(where, chunk, lengths)
        else:
            _of_group(where, chunk, plan.config.chunk_tokens, lengths)
    _one_sample_a_group(plan)
    for chunks in plan.ranks:
        align(plan.program, operations(chunks, plan.config.retain))


def _places(plan: StepPlan) -> Iterator[tuple[str, Chunk]]:
    for rank, chunks in enumerate(plan.ranks):
        for position, chunk in enumerate(chunks):
            yield f"chunk {position} of rank {rank}", chunk


def _every_token_once(plan: StepPlan, lengths: Mapping[int, int]) -> None:
    spans: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for where, chunk in _places(plan):
        for segment in chunk.segments:
            if segment.sample not in lengths:
                raise PlanError(f"{where} holds sample {segment.sample}, which is not of step {plan.step}")
            spans[segment.sample].append((segment.start, segment.start + segment.length))
    for sample, length in lengths.items():
        marks = [(0, 0), *sorted(spans[sample]), (length, length)]
        for (_, end), (start, _) in pairwise(marks):
            if start != end:
                what = "not planned" if start > end else "planned twice, or beyond the end of the sample"
                low, high = sorted((start, end))
                raise PlanError(f"tokens {low} to {high} of sample {sample} ({length} tokens) are {what}")


def _segments_in_place(where: str, chunk: Chunk, chunk_tokens: int) -> None:
    offset = 0
    for segment in chunk.segments:
        if segment.length < 1 or segment.offset != offset:
            raise PlanError(
                f"{where} has {segment.length} tokens of sample {segment.sample} at offset {segment.offset}; segments "
                f"need at least one token and stand side by side, here at {offset}"
            )
        offset += segment.length
    if not 1 <= offset <= chunk_tokens:
        raise PlanError(f"{where} has {offset} tokens; it must have 1 to {chunk_tokens}")


def _standalone(where: str, chunk: Chunk, lengths: Mapping[int, int]) -> None:
    if (chunk.index, chunk.count) != (0, 1):
        raise PlanError(f"{where} is standalone but index {chunk.index} of {chunk.count}; it must be 0 of 1")
    _whole(where, chunk, 0, lengths)


def _of_group(where: str, chunk: Chunk, chunk_tokens: int, lengths: Mapping[int, int]) -> None:
    own = chunk.segments[0]
    count = -(-lengths[own.sample] // chunk_tokens)
    if chunk.count != count or count < 2 or own.start != chunk.index * chunk_tokens:
        raise PlanError(
            f"{where} is index {chunk.index} of {chunk.count} of group {chunk.group}, from token {own.start} of sample "
            f"{own.sample} ({lengths[own.sample]} tokens) on; a group is a sample of more than {chunk_tokens} tokens, "
            f"{chunk_tokens} to a chunk"
        )
    # A second tail would be a segment that is not whole, and a fill of a full chunk would be over its size.
    _whole(where, chunk, 1, lengths)


def _whole(where: str, chunk: Chunk, begin: int, lengths: Mapping[int, int]) -> None:
    for segment in chunk.segments[begin:]:
        if segment.length != lengths[segment.sample]:
            raise PlanError(
                f"{where} holds {segment.length} of the {lengths[segment.sample]} tokens of sample {segment.sample} "
                f"without its prefix; only the first segment of a chunk of a group may be a part of a sample"
            )


def _one_sample_a_group(plan: StepPlan) -> None:
    owner: dict[int, int] = {}
    for where, chunk in _places(plan):
        if chunk.group is not None:
            sample = chunk.segments[0].sample
            if owner.setdefault(chunk.group, sample) != sample:
                raise PlanError(
                    f"{where} is of group {chunk.group} and starts with sample {sample}, but the group is of sample "
                    f"{owner[chunk.group]}; group numbers are unique in a step"
                )
