"""Do all ranks load the same thing? Asked before the first step, since afterwards they would hang or train nonsense."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from chunkflow.errors import ChunkflowError, PlanError


def require_agreement(group: dist.ProcessGroup, settings: Mapping[str, Any], *, of: str = "loaders") -> None:
    """Compare flat settings over a group. Every rank calls; raises the same PlanError on all, or on none."""
    answers: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(answers, dict(settings), group=group)
    difference = first_difference(answers, of=of)
    if difference is not None:
        raise PlanError(difference)


@contextmanager
def place_noted(group: dist.ProcessGroup | None, step: int) -> Iterator[None]:
    """Add rank, step and where to look to an error of torch's inside: its transports name an address at most.

    The error stays what it is, for those who know it by its class.
    """
    try:
        yield
    except RuntimeError as error:
        if group is not None:
            error.add_note(
                f"rank {dist.get_rank(group)} of {dist.get_world_size(group)}, step {step}: where this is a connection "
                "that was closed or timed out, another rank died, stopped or is late: its own output says why"
            )
        raise


def require_same_step(
    group: dist.ProcessGroup, device: torch.device, *, step: int, denominator: float, digest: int, failed: bool
) -> None:
    """Compare what the ranks are about to run. Every rank calls, before anything of a step runs.

    `failed`: this rank cannot run its part and is about to say why. Then the others raise ChunkflowError instead of
    waiting for it; so do all ranks when steps, denominators or digests (of `StepBatch`) differ, since gradients of two
    steps would be added up, or a sample trained twice or never.
    """
    mine = torch.tensor([float(failed), step, denominator, digest], dtype=torch.float64, device=device)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, mine, group=group)
    found = [row.tolist() for row in rows]
    broken = [rank for rank, row in enumerate(found) if row[0]]
    if broken and not failed:
        raise ChunkflowError(f"rank {broken[0]} cannot run its part of step {step}; its own error says why")
    if not broken and any(row != found[0] for row in found):
        other = next(rank for rank, row in enumerate(found) if row != found[0])
        (_, step_0, sum_0, _), (_, step_r, sum_r, _) = found[0], found[other]
        what = f"different steps: step {step_0:.0f} and {step_r:.0f}, loss weights {sum_0} and {sum_r} in sum"
        if (step_0, sum_0) == (step_r, sum_r):
            what = f"step {step_0:.0f} by different plans (of other data, chunk_tokens, retain, ranks or pair_cost)"
        raise ChunkflowError(
            f"ranks 0 and {other} are about to train {what}; give every rank the same data, settings and saved state"
        )


def batch_digest(*parts: str) -> int:
    """Return the digest of a `StepBatch` of what decides it: 53 bits, which a float64 holds."""
    return xxhash.xxh3_64_intdigest(" ".join(parts).encode()) >> 11


def first_difference(answers: Sequence[Mapping[str, Any]], *, of: str = "loaders") -> str | None:
    """Return in words how two ranks differ, None when all agree. Pure."""
    ours = answers[0]
    for rank, theirs in enumerate(answers):
        keys = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
        if keys:
            parts = ", ".join(f"{key} is {ours.get(key)!r} and {theirs.get(key)!r}" for key in keys)
            return f"the {of} of ranks 0 and {rank} differ: {parts}; give every rank the same data and settings"
    return None
