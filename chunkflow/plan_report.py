"""What a plan looks like to people: its numbers and its table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chunkflow.assign import makespan_bound
from chunkflow.cost import job_cost, num_recomputed
from chunkflow.pack import lower_bound_chunks
from chunkflow.program import local_program
from chunkflow.records import Chunk

if TYPE_CHECKING:
    from chunkflow.plan import StepPlan


@dataclass(frozen=True, slots=True)
class PlanStats:
    """How good a plan is."""

    tokens: int
    """Tokens trained in the step."""
    chunks: int
    """Chunks over all ranks."""
    lower_bound: int
    """No packing of these samples needs fewer chunks."""
    fill: float
    """Tokens per token of room, 0 to 1."""
    split_share: float
    """Share of the tokens that belong to sequences longer than a chunk."""
    recomputed_tokens: int
    """Tokens that run forward twice."""
    costs: tuple[float, ...]
    """Predicted time per rank; the unit is the forward of one token without its attention."""
    cost_bound: float
    """No assignment has a slowest rank below this."""
    straggler: float
    """Predicted time of the slowest rank over the mean; 1 is perfect balance."""
    dummies: tuple[int, ...]
    """Per rank: ops of the common program that are not its own."""


def stats(plan: StepPlan) -> PlanStats:
    """Compute the numbers of a plan from its chunks alone."""
    size, tokens = plan.config.chunk_tokens, sum(plan.lengths.values())
    jobs = [list(_jobs(chunks)) for chunks in plan.ranks]
    costs = tuple(sum(job_cost(job, plan.config) for job in mine) for mine in jobs)
    num_chunks = sum(map(len, plan.ranks))
    every_job = [job for mine in jobs for job in mine]
    twice = (chunk for job in every_job for chunk in job[: num_recomputed(job, plan.config)])
    own_ops = [len(local_program(chunks, plan.config.retain)) for chunks in plan.ranks]
    return PlanStats(
        tokens=tokens,
        chunks=num_chunks,
        lower_bound=lower_bound_chunks(plan.lengths.values(), chunk_tokens=size),
        fill=tokens / (num_chunks * size),
        split_share=sum(length for length in plan.lengths.values() if length > size) / tokens,
        recomputed_tokens=sum(chunk.num_tokens for chunk in twice),
        costs=costs,
        cost_bound=makespan_bound([job_cost(job, plan.config) for job in every_job], world_size=len(plan.ranks)),
        straggler=max(costs) * len(costs) / sum(costs),
        dummies=tuple(len(plan.program) - own for own in own_ops),
    )


def table(plan: StepPlan) -> str:
    """Return one line a chunk, then what the plan amounts to."""
    lines = [f"step {plan.step}: {len(plan.samples)} samples, denominator {plan.denominator:g}"]
    lines.append(f"{'rank':>4} {'chunk':>5} {'group':>12} {'tokens':>7} {'prefix':>8}  samples")
    for rank, chunks in enumerate(plan.ranks):
        lines += [f"{rank:>4} {n:>5} {_line(chunk)}" for n, chunk in enumerate(chunks)]
        if not chunks:
            lines.append(f"{rank:>4}     - dummies only")
    return "\n".join([*lines, *_summary(plan, stats(plan))])


def _line(chunk: Chunk) -> str:
    place = "-" if chunk.group is None else f"{chunk.group} ({chunk.index + 1}/{chunk.count})"
    names = [str(segment.sample) for segment in chunk.segments]
    shown = " ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"{place:>12} {chunk.num_tokens:>7} {chunk.prefix:>8}  {shown}"


def _summary(plan: StepPlan, numbers: PlanStats) -> list[str]:
    program = plan.program if len(plan.program) <= 100 else plan.program[:97] + "..."
    return [
        f"program {program} ({len(plan.program)} ops; dummies per rank {list(numbers.dummies)})",
        f"{numbers.tokens} tokens in {numbers.chunks} chunks of {plan.config.chunk_tokens} (at least "
        f"{numbers.lower_bound}), {numbers.fill:.1%} full; {numbers.split_share:.1%} of the tokens split, "
        f"{numbers.recomputed_tokens} run forward twice (retain {plan.config.retain})",
        f"predicted cost per rank {[round(cost) for cost in numbers.costs]}, slowest {max(numbers.costs):.0f} (at "
        f"least {numbers.cost_bound:.0f}), {numbers.straggler:.3f} of the mean",
    ]


def _jobs(chunks: Sequence[Chunk]) -> Iterator[Sequence[Chunk]]:
    position = 0
    while position < len(chunks):
        yield chunks[position : position + chunks[position].count]
        position += chunks[position].count
