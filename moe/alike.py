"""Whether ranks were given the same model and settings: asked once, before anything is changed.

What differs later shows as a receive of another size than was sent, which is silent or ends the process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch.distributed as dist

from moe.errors import MoeConfigError
from moe.issue import naming


class _Said(NamedTuple):
    problem: str | None
    facts: dict[str, str]


def require_alike(problem: str | None, facts: Mapping[str, str], groups: Sequence[dist.ProcessGroup]) -> None:
    """Raise MoeConfigError on every rank where one has a problem, or where facts of two differ.

    `groups` are those of the axes of a mesh, on every rank in the same order; all their ranks call. Facts are named.
    Raises ExchangeError when a rank is lost, or later than the groups allow.
    """
    said: dict[int, _Said] = {dist.get_rank() if groups else 0: _Said(problem, dict(facts))}
    for group in groups:  # one axis after the other, so that in the end all know all
        every: list[dict[int, _Said]] = [{} for _ in range(group.size())]
        with naming("parallelize, comparing models and settings"):
            dist.all_gather_object(every, said, group=group)
        said = {rank: one for part in every for rank, one in part.items()}
    problems = {rank: one.problem for rank, one in sorted(said.items()) if one.problem is not None}
    if problems:
        rank, text = next(iter(problems.items()))
        everywhere = len(problems) == len(said) and len(set(problems.values())) == 1
        raise MoeConfigError(text if everywhere else f"on rank {rank}: {text}")
    first = min(said)
    for rank, one in sorted(said.items()):
        for name, ours in said[first].facts.items():
            if (theirs := one.facts.get(name)) != ours:
                raise MoeConfigError(
                    f"ranks {first} and {rank} differ in {name}: {ours} and {theirs}; give every rank the same model, "
                    "plan and settings"
                )
