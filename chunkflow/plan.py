"""The plan of one optimizer step: a frozen value, a pure function of integers, equal on every rank.

split -> pack -> assign -> order -> program, each in the file of its name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from operator import index
from typing import Any

from chunkflow import plan_report, validate
from chunkflow.assign import assign
from chunkflow.config import PlannerConfig
from chunkflow.cost import job_cost
from chunkflow.errors import PlanError
from chunkflow.order import Job, order
from chunkflow.pack import pack
from chunkflow.program import common_program, local_program
from chunkflow.records import Chunk, Segment
from chunkflow.split import split, tail_tokens

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Which chunks every rank trains in one optimizer step, in which order."""

    step: int
    """Optimizer steps before this one."""
    samples: tuple[int, ...]
    """The global batch, in drawing order; each sample once."""
    ranks: tuple[tuple[Chunk, ...], ...]
    """Chunks of each data-parallel rank in forward order; empty for a rank that has only dummies to run."""
    program: str
    """The common op program of all ranks (see `chunkflow.program`)."""
    denominator: float
    """Sum of the loss weights of the whole step, over all ranks."""
    config: PlannerConfig
    """What the plan was made with."""

    @property
    def lengths(self) -> dict[int, int]:
        """Tokens of every sample."""
        tokens = dict.fromkeys(self.samples, 0)
        for segment in (segment for chunks in self.ranks for chunk in chunks for segment in chunk.segments):
            tokens[segment.sample] = tokens.get(segment.sample, 0) + segment.length
        return tokens

    def stats(self) -> plan_report.PlanStats:
        """Return how good the plan is: fill, bounds, recompute, balance."""
        return plan_report.stats(self)

    def table(self) -> str:
        """Return the plan for people: one line a chunk, the stats below."""
        return plan_report.table(self)

    def validate(self, lengths: Mapping[int, int] | Sequence[int]) -> None:
        """Raise PlanError unless the plan keeps every rule for samples of these lengths (as `plan_step` takes them)."""
        validate.validate(self, as_mapping(self.samples, lengths))

    def to_json(self) -> str:
        """Return the plan as one line of JSON; segments are [sample, start, length, offset]."""
        ranks = [[_chunk_to_json(chunk) for chunk in chunks] for chunks in self.ranks]
        return json.dumps({"format_version": FORMAT_VERSION, **_scalars(self), "ranks": ranks})

    @classmethod
    def from_json(cls, text: str) -> StepPlan:
        """Read a plan back. Raises PlanError when the text is not a plan; call `validate` on what you do not trust."""
        try:
            raw = json.loads(text)
            version = raw.pop("format_version")
            if version != FORMAT_VERSION:
                raise PlanError(f"plan of format {version}; this version reads format {FORMAT_VERSION}: make it again")
            raw["config"] = PlannerConfig(**raw["config"])
            raw["samples"] = tuple(raw["samples"])
            raw["ranks"] = tuple(tuple(_chunk_from_json(chunk) for chunk in chunks) for chunks in raw["ranks"])
            return cls(**raw)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise PlanError(f"not a step plan ({error}); give the text that StepPlan.to_json returned") from error


def plan_step(
    step: int,
    samples: Sequence[int],
    lengths: Mapping[int, int] | Sequence[int],
    *,
    config: PlannerConfig,
    world_size: int,
    denominator: float,
) -> StepPlan:
    """Plan one optimizer step over `world_size` data-parallel ranks.

    `lengths`, in tokens, are {sample: length} or stand in the order of `samples`. Chunks and groups depend on samples
    and lengths only, never on `world_size`. Ranks get no chunk at all where there are fewer chunks than ranks.

    Raises PlanError on an empty step, a sample drawn twice, a length below 1, or a denominator that is no finite sum.
    """
    if world_size < 1:
        raise PlanError(f"world_size is {world_size}; it must be at least 1")
    if not (math.isfinite(denominator) and denominator >= 0):
        raise PlanError(f"the denominator of step {step} is {denominator}; it must be a finite sum of loss weights")
    samples = tuple(index(sample) for sample in samples)
    jobs = _jobs(as_mapping(samples, lengths), config)
    assignment = assign([job_cost(job, config) for job in jobs], world_size=world_size)
    ranks = tuple(order(jobs[job] for job in mine) for mine in assignment.ranks)
    program = common_program(local_program(chunks, config.retain) for chunks in ranks)
    return StepPlan(step, samples, ranks, program, denominator, config)


def as_mapping(samples: Sequence[int], lengths: Mapping[int, int] | Sequence[int]) -> dict[int, int]:
    """Return {sample: length} with plain ints. Raises PlanError, naming the sample, on what cannot be planned."""
    if not isinstance(lengths, Mapping):
        if len(lengths) != len(samples):
            raise PlanError(f"{len(lengths)} lengths for {len(samples)} samples; give one length a sample")
        given = dict(zip(samples, lengths, strict=True))
    else:
        given = lengths
    if not samples:
        raise PlanError("a step of no samples cannot be planned; draw at least one")
    if len(set(samples)) < len(samples):
        twice = next(sample for sample in samples if samples.count(sample) > 1)
        raise PlanError(f"sample {twice} stands {samples.count(twice)} times in one step; a sample can occur only once")
    found = {sample: index(given[sample]) for sample in samples if sample in given}
    for sample in samples:
        if sample not in found:
            raise PlanError(f"sample {sample} has no length; give a length for every sample of the step")
        if found[sample] < 1:
            raise PlanError(f"sample {sample} has {found[sample]} tokens; it needs at least 1: drop it before planning")
    return found


def _jobs(lengths: Mapping[int, int], config: PlannerConfig) -> list[Job]:
    """Groups, numbered from the longest down, then standalone chunks."""
    size = config.chunk_tokens
    shorts = {sample: length for sample, length in lengths.items() if length <= size}
    longs = sorted((s for s, length in lengths.items() if length > size), key=lambda s: (-lengths[s], s))
    tails = {sample: tail_tokens(lengths[sample], chunk_tokens=size) for sample in longs}
    packing = pack(shorts, tails, chunk_tokens=size)
    groups = [_group(number, s, packing.fills[s], lengths, size) for number, s in enumerate(longs)]
    return groups + [(Chunk(_side_by_side(samples, lengths, 0)),) for samples in packing.standalone]


def _group(number: int, sample: int, fill: Sequence[int], lengths: Mapping[int, int], chunk_tokens: int) -> Job:
    own = split(sample, lengths[sample], chunk_tokens=chunk_tokens)
    chunks = [Chunk((segment,), number, n, len(own)) for n, segment in enumerate(own)]
    filled = (*own[-1:], *_side_by_side(fill, lengths, own[-1].length))
    return (*chunks[:-1], replace(chunks[-1], segments=filled))


def _side_by_side(samples: Sequence[int], lengths: Mapping[int, int], offset: int) -> tuple[Segment, ...]:
    segments = []
    for sample in samples:
        segments.append(Segment(sample, 0, lengths[sample], offset))
        offset += lengths[sample]
    return tuple(segments)


def _scalars(plan: StepPlan) -> dict[str, Any]:
    return {
        "step": plan.step,
        "samples": plan.samples,
        "program": plan.program,
        "denominator": plan.denominator,
        "config": asdict(plan.config),
    }


def _chunk_to_json(chunk: Chunk) -> dict[str, Any]:
    segments = [[s.sample, s.start, s.length, s.offset] for s in chunk.segments]
    return {"segments": segments, "group": chunk.group, "index": chunk.index, "count": chunk.count}


def _chunk_from_json(raw: dict[str, Any]) -> Chunk:
    segments = tuple(Segment(*map(index, numbers)) for numbers in raw["segments"])
    return Chunk(segments, raw["group"], raw["index"], raw["count"])
