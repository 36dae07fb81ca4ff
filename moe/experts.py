"""Experts: `experts(rows_ND, counts)`, rows expert by expert, `counts[e]` of local expert e; returns `[N, D]`.

E experts of this rank, I inner width (of this rank's slice, where experts are shared), D model width, N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.gated import gated
from moe.precision import narrowed

_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GROUPED_ALIGN_BYTES = 16


@dataclass(frozen=True)
class GatedStacks:
    """Gated experts as a function of two stacked weights: `experts` as the executor calls them."""

    gate_up_EID: Tensor
    down_EDI: Tensor
    act: Callable[[Tensor], Tensor]
    grouped: bool

    @property
    def num_experts(self) -> int:
        """Experts of this rank."""
        return len(self.down_EDI)

    def parameters(self) -> Iterator[Tensor]:
        """Return what backward gives gradients to."""
        yield from (self.gate_up_EID, self.down_EDI)

    def __call__(self, rows_ND: Tensor, counts: list[int]) -> Tensor:
        """Return `[N, D]`."""
        if self.grouped and _can_group(rows_ND, self.gate_up_EID, self.down_EDI):
            return self._grouped_mm(rows_ND, counts)
        out = [self._one(e, rows) for e, rows in enumerate(rows_ND.split(counts)) if len(rows)]
        return torch.cat(out) if out else rows_ND

    def _one(self, e: int, rows_ND: Tensor) -> Tensor:
        return F.linear(gated(F.linear(rows_ND, self.gate_up_EID[e]), self.act), self.down_EDI[e])

    def _grouped_mm(self, rows_ND: Tensor, counts: list[int]) -> Tensor:
        # Rows past the last offset would be left uninitialised: the counts must add up to N.
        assert sum(counts) == len(rows_ND), (counts, rows_ND.shape)
        offsets_E = torch.from_numpy(np.cumsum(counts, dtype=np.int32)).to(rows_ND.device)
        gate_up = F.grouped_mm(rows_ND, self.gate_up_EID.transpose(-2, -1), offs=offsets_E)
        return F.grouped_mm(gated(gate_up, self.act), self.down_EDI.transpose(-2, -1), offs=offsets_E)


class StackedExperts(nn.Module):
    """Gated experts in two stacked parameters, named and laid out as in transformers 5.

    `gate_up_proj[E, 2I, D]`, `down_proj[E, D, I]`. Where experts are shared over an `esp` axis, this holds a slice of
    I, and the outputs of the ranks add up to the expert's.
    """

    def __init__(
        self, gate_up_EID: Tensor, down_EDI: Tensor, act: Callable[[Tensor], Tensor] = F.silu, *, grouped: bool = True
    ) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(gate_up_EID), nn.Parameter(down_EDI)
        self.act_fn = act
        self.num_experts = len(down_EDI)
        self._grouped = grouped

    def stacks(self) -> GatedStacks:
        """Return the experts with weights as the products take them: cast once, where autocast is on."""
        return GatedStacks(narrowed(self.gate_up_proj), narrowed(self.down_proj), self.act_fn, self._grouped)

    def forward(self, rows_ND: Tensor, counts: list[int]) -> Tensor:
        """Return `[N, D]`."""
        return self.stacks()(rows_ND, counts)


def _can_group(rows_ND: Tensor, gate_up_EID: Tensor, down_EDI: Tensor) -> bool:
    dtype, size = rows_ND.dtype, rows_ND.element_size()
    widths = (gate_up_EID.shape[1], gate_up_EID.shape[2], down_EDI.shape[2])
    aligned = all(width * size % _GROUPED_ALIGN_BYTES == 0 for width in widths)
    return aligned and dtype in _GROUPED_DTYPES and dtype == gate_up_EID.dtype == down_EDI.dtype


class ModuleExperts(nn.Module):
    """Any modules `[n, D] -> [n, D]`, one for each local expert."""

    def __init__(self, experts: Iterable[nn.Module]) -> None:
        super().__init__()
        self.each = nn.ModuleList(experts)
        self.num_experts = len(self.each)

    def forward(self, rows_ND: Tensor, counts: list[int]) -> Tensor:
        """Return `[N, D]`; an expert without rows is not called."""
        out = [self.each[e](rows) for e, rows in enumerate(rows_ND.split(counts)) if len(rows)]
        return torch.cat(out) if out else rows_ND


class MarkedExperts(nn.Module):
    """A module whose experts, those in `experts` or else all of it, carry `is_expert = True` on their parameters.

    What averages gradients goes by it; torch drops it wherever it makes new parameters: in a copy, in conversions as
    `to_empty` after `to("meta")`, in `load_state_dict(..., assign=True)`. So it is set again after each of these.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_post_hook(_mark_again)

    def mark(self) -> None:
        """Mark the parameters there are now."""
        for param in getattr(self, "experts", self).parameters():
            param.is_expert = True  # pyright: ignore[reportAttributeAccessIssue]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.mark()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> MarkedExperts:
        super()._apply(fn, recurse)
        self.mark()
        return self


def _mark_again(module: nn.Module, _: object) -> None:
    assert isinstance(module, MarkedExperts)
    module.mark()


INNER = {"gate_up_proj": (1, 2), "down_proj": (2, 1)}
"""Of each stack: the dimension that holds I, and how many halves lie there one after the other."""


def slice_inner(stack: str, value: Tensor, member: int, num_members: int) -> Tensor:
    """Return, as a copy, the slice of a stack that one rank of the `esp` axis holds. I must divide."""
    dim, halves = INNER[stack]
    return torch.cat([half.chunk(num_members, dim)[member] for half in value.chunk(halves, dim)], dim)


def join_inner(stack: str, parts: Sequence[Tensor]) -> Tensor:
    """Return a stack from the slices of all ranks of the `esp` axis: the inverse of `slice_inner`."""
    dim, halves = INNER[stack]
    return torch.cat([part.chunk(halves, dim)[half] for half in range(halves) for part in parts], dim)
