"""Gradients over ranks, plainly: after backward, one all-reduce a parameter. The oracle of sliced communication.

Every rank has tokens of its own and a loss that is a mean over them; wanted is the gradient of the mean over all ranks.
Dense parameters are on all ranks: sum over all axes, divide by the number of ranks. An expert has seen, in backward,
the tokens of its whole `ep` and `esp` group, so its gradient is their sum already: sum over `dp` only, and divide by
the same number of ranks. Dividing by the size of `dp` instead is the error that Adam hides.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.gradients import scale_down, squares
from moe.parallel import Placement
from moe.together import Together


def placement_of(model: nn.Module) -> Placement:
    """Return where the experts of a parallelized model are; raises MoeConfigError for another."""
    return Together(model, "placement_of").placement


def _present(params: list[nn.Parameter], ranks: Together) -> list[bool]:
    """Return which parameters have a gradient on some rank: one alone would be added to another parameter's."""
    found = torch.tensor(
        [p.grad is not None for p in params], dtype=torch.int32, device=ranks.placement.mesh.device_type
    )
    for axis in ranks.placement.data_axes:
        ranks.reduce(found, axis, dist.ReduceOp.MAX)
    return found.bool().tolist()


def average_gradients(model: nn.Module) -> None:
    """Make every gradient that of the mean over the ranks' losses. Every rank calls, after the last backward of a step.

    A parameter without a gradient on some ranks counts as zero there; one without on all keeps None. Raises
    ExchangeError when a rank is lost or late.
    """
    together = Together(model, "average_gradients")
    placement = together.placement
    ranks = 1
    for axis in placement.data_axes:
        ranks *= placement.mesh[axis].size()
    params = list(model.parameters())
    for param, is_present in zip(params, _present(params, together), strict=True):
        if not is_present:
            continue
        if param.grad is None:
            param.grad = torch.zeros_like(param)
        axes = (placement.dp,) if getattr(param, "is_expert", False) else placement.data_axes
        for axis in axes:
            together.reduce(param.grad, axis)
        param.grad /= ranks


def grad_norm(model: nn.Module) -> Tensor:
    """Return the 2-norm of the gradient of the whole model, every expert once; fp64, 0-d. Every rank calls.

    Call it when gradients are averaged: after `average_gradients`, or the `flush` of a reducer. Raises ExchangeError
    when a rank is lost or late.
    """
    together, params = Together(model, "grad_norm"), list(model.parameters())
    device = torch.device(together.placement.mesh.device_type)
    experts = squares(p for p in params if getattr(p, "is_expert", False)).to(device)
    for axis in together.placement.expert_axes:
        together.reduce(experts, axis)
    return (squares(p for p in params if not getattr(p, "is_expert", False)).to(device) + experts).sqrt()


def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients so that `grad_norm` is at most `max_norm`; return what it was before. Every rank calls.

    Torch's own function counts the experts of one rank only: each rank would scale by another number, and what all of
    them hold would drift apart.
    """
    norm = grad_norm(model)
    scale_down(model.parameters(), norm, max_norm)
    return norm
