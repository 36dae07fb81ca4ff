"""Costs of micro-batches that are chunks: linear in their tokens, plus attention to what stands before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.costs import Costs
from pipeline.units import Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitModel:
    """What a token costs in one layer."""

    layers: int
    token_s: float = 1.0
    """Forward of one token without attention."""
    backward_ratio: float = 2.0
    """Backward over forward."""
    attention_tokens: float = float("inf")
    """Context at which attention costs as much as the rest of the layer; about 6 hidden sizes."""
    activation_bytes: float = 1.0
    """Kept per token between forward and backward."""
    state_bytes: float = 0.0
    """Kept per token of a group until the group is done: keys, values and their gradients."""
    boundary_bytes: float = 0.0
    """Of one token between two layers."""

    def costs(self, units: Sequence[Unit]) -> Costs:
        """One row a unit; a chunk attends to all earlier chunks of its group."""
        prefix: dict[int, int] = {}
        forward_s = []
        for unit in units:
            before = prefix.get(unit.group, 0) if unit.group is not None else 0
            context = before + unit.tokens / 2
            forward_s.append(self.token_s * unit.tokens * (1 + context / self.attention_tokens))
            if unit.group is not None:
                prefix[unit.group] = before + unit.tokens
        sizes = [u.tokens for u in units]
        return Costs(
            forward_s=tuple((s,) * self.layers for s in forward_s),
            backward_s=tuple((s * self.backward_ratio,) * self.layers for s in forward_s),
            activation_bytes=tuple((n * self.activation_bytes,) * self.layers for n in sizes),
            state_bytes=tuple((n * self.state_bytes,) * self.layers for n in sizes),
            boundary_bytes=tuple(n * self.boundary_bytes for n in sizes),
        )
