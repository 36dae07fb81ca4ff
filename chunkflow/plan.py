"""The plan of one optimizer step: a frozen value, a pure function of integers, equal on every rank.

split and pack -> assign (`layout`), then, when asked for, order -> program, each in the file of its name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from operator import index
from typing import Any

import xxhash

from chunkflow import plan_report, validate
from chunkflow.config import PlannerConfig
from chunkflow.errors import PlanError
from chunkflow.layout import Ints, make_layout
from chunkflow.lazy import LazyRows, LazyText
from chunkflow.order import envelope
from chunkflow.plan_input import checked
from chunkflow.program import common_program, job_program
from chunkflow.records import Chunk, Segment

FORMAT_VERSION = 1


@dataclass(frozen=True)
class StepPlan:
    """Which chunks every rank trains in one optimizer step, in which order. Chunks and program are made when asked for.

    A plan holds arrays until then: planning ahead costs the training nothing, and only engines that shard parameters
    ask for the program.
    """

    step: int
    """Optimizer steps before this one."""
    samples: tuple[int, ...]
    """The global batch, in drawing order; each sample once."""
    ranks: Sequence[tuple[Chunk, ...]]
    """Chunks of each data-parallel rank in forward order; empty for a rank that has only dummies to run."""
    denominator: float
    """What the weighted sum of the losses is divided by: for the mean, the sum of all loss weights of the step."""
    config: PlannerConfig
    """What the plan was made with."""
    program: LazyText = LazyText()  # noqa: RUF009 - a descriptor, not a default
    """The common op program of all ranks (see `chunkflow.program`), a string."""
    digest: str = field(default="", compare=False, repr=False)
    """Of what the plan was made from and where everything goes; empty for a plan that was read back."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "program": self.program, "ranks": tuple(self.ranks)}  # made: functions would not travel

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
        samples, tokens = checked(self.samples, lengths, None)
        validate.validate(self, dict(zip(samples.tolist(), tokens.tolist(), strict=True)))

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
    samples: Sequence[int] | Ints,
    lengths: Mapping[int, int] | Sequence[int] | Ints,
    *,
    config: PlannerConfig,
    world_size: int,
    denominator: float,
) -> StepPlan:
    """Plan one optimizer step over `world_size` data-parallel ranks.

    `lengths`, in tokens, are {sample: length} or stand in the order of `samples`. Chunks and groups depend on samples
    and lengths only, never on `world_size`. Ranks get no chunk at all where there are fewer chunks than ranks.

    Raises PlanError on an empty step, a sample drawn twice, a length below 1, over 2**31 - 1 or over
    `config.max_tokens`, or a denominator that is no finite sum.
    """
    if world_size < 1:
        raise PlanError(f"world_size is {world_size}; it must be at least 1")
    if not (math.isfinite(denominator) and denominator >= 0):
        raise PlanError(f"the denominator of step {step} is {denominator}; it must be a finite sum of loss weights")
    numbers, tokens = checked(samples, lengths, config.max_tokens)
    layout = make_layout(numbers, tokens, config=config, world_size=world_size)
    jobs = layout.jobs()
    ranks = LazyRows(world_size, lambda rank: layout.chunks(jobs[rank].tolist()))
    program = partial(_program, [layout.counts[mine] for mine in jobs], config.retain)
    digest = xxhash.xxh3_128_hexdigest(f"{step} {denominator} {config} {world_size} {layout.digest}".encode())
    return StepPlan(step, tuple(numbers.tolist()), ranks, denominator, config, program, digest)


def _program(jobs: Sequence[Ints], retain: int) -> str:
    """Return the shorter of two programs that run all ranks: their rows merged, or their groups side by side.

    `jobs` are the numbers of chunks of each rank's jobs, in order.
    """
    counts = [mine.tolist() for mine in jobs]
    merged = common_program("".join(job_program(count, retain) for count in mine) for mine in counts)
    return min(merged, envelope(counts, retain=retain), key=len)


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
