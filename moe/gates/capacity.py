"""Capacity: experts that take at most so many rows of a rank, and what is dropped."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from moe.errors import MoeConfigError
from moe.records import Assignments


def capacity_rows(num_tokens: int, per_token: int, num_experts: int, factor: float) -> int:
    """Return how many rows of one rank an expert takes: `factor` times its even share, rounded up."""
    if not 0 < factor < math.inf:
        raise MoeConfigError(
            f"the capacity factor is {factor}; it must be positive, 1.0 is an even share, and the number of experts "
            "drops nothing"
        )
    return math.ceil(factor * num_tokens * per_token / num_experts)


def drop_over_capacity(assignments: Assignments, rows: int) -> Assignments:
    """Return the assignments with `keep_A` False where an expert has `rows` before it.

    Earlier choices of all tokens come before later choices of any, then earlier tokens: GShard's priority.
    """
    per_token = assignments.per_token
    assert per_token is not None, "capacity is for gates that give every token as many experts"
    experts_KT = assignments.experts_A.view(-1, per_token).t().reshape(-1)
    keep_KT = position_in_expert(experts_KT, assignments.num_experts) < rows
    return replace(assignments, keep_A=keep_KT.view(per_token, -1).t().reshape(-1))


def position_in_expert(experts_A: Tensor, num_experts: int) -> Tensor:
    """Return for every assignment how many before it go to the same expert."""
    order = torch.argsort(experts_A, stable=True)
    counts_E = torch.bincount(experts_A, minlength=num_experts)
    first_E = counts_E.cumsum(0) - counts_E
    position = torch.empty_like(experts_A, dtype=torch.int64)
    position[order] = torch.arange(len(experts_A), device=experts_A.device) - first_E[experts_A[order]]
    return position
