"""Gradients over ranks, plainly: after backward, one all-reduce a parameter. The oracle of sliced communication.

Every rank has tokens of its own and a loss that is a mean over them; wanted is the gradient of the mean over all ranks.
Dense parameters are on all ranks: sum over all axes, divide by the number of ranks. An expert has seen, in backward,
the tokens of its whole `ep` and `esp` group, so its gradient is their sum already: sum over `dp` only, and divide by
the same number of ranks. Dividing by the size of `dp` instead is the error that Adam hides.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from moe.errors import MoeConfigError
from moe.parallel import Placement, expert_layers


def placement_of(model: nn.Module) -> Placement:
    """Return where the experts of a parallelized model are; raises MoeConfigError for another."""
    for layer in expert_layers(model).values():
        return layer.placement
    raise MoeConfigError("this model is not expert-parallel; call moe.parallelize(model, mesh, ...) first")


def _present(params: list[nn.Parameter], placement: Placement) -> list[bool]:
    """Return which parameters have a gradient on some rank: one alone would be added to another parameter's."""
    found = torch.tensor([p.grad is not None for p in params], dtype=torch.int32, device=placement.mesh.device_type)
    for axis in placement.data_axes:
        dist.all_reduce(found, dist.ReduceOp.MAX, group=placement.mesh.get_group(axis))
    return found.bool().tolist()


def average_gradients(model: nn.Module) -> None:
    """Make every gradient that of the mean over the ranks' losses. Every rank calls, after the last backward of a step.

    A parameter without a gradient on some ranks counts as zero there; one without on all keeps None.
    """
    placement = placement_of(model)
    ranks = 1
    for axis in placement.data_axes:
        ranks *= placement.mesh[axis].size()
    params = list(model.parameters())
    for param, is_present in zip(params, _present(params, placement), strict=True):
        if not is_present:
            continue
        if param.grad is None:
            param.grad = torch.zeros_like(param)
        axes = (placement.dp,) if getattr(param, "is_expert", False) else placement.data_axes
        for axis in axes:
            if placement.mesh[axis].size() > 1:
                dist.all_reduce(param.grad, group=placement.mesh.get_group(axis))
        param.grad /= ranks
