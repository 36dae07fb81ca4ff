"""Sliced gradients for a model that `moe.parallelize` has changed: the overlapped form of `moe.sync`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import torch.distributed as dist
from torch import nn

from moe.errors import MoeConfigError
from moe.gradients import GradientReducer
from moe.issue import IssueQueue, own_group
from moe.parallel import expert_layers
from moe.plan import LayerPlan
from moe.sync import placement_of


def attach_reducer(
    model: nn.Module, *, group: dist.ProcessGroup | None = None, slice_bytes: int = 1 << 20, average: bool = True
) -> GradientReducer:
    """Return a reducer that the MoE layers of `model` feed from their backward. Every rank of `group` calls.

    `group` (None: all ranks) holds every rank with tokens of its own: the `dp`, `ep` and `esp` axes. Gradients become
    those of the mean over the ranks' losses, experts summed over `dp` only, as with `moe.sync.average_gradients`; of
    the sum of the losses with `average=False`.
    Raises MoeConfigError when the model is not expert-parallel, or `group` has another size than the three axes.
    """
    placement = placement_of(model)
    layers = expert_layers(model).values()
    lanes = next(iter(layers)).runner.lanes
    ranks = 1
    for axis in placement.data_axes:
        ranks *= placement.mesh[axis].size()
    size = dist.get_world_size(group)
    if size != ranks:
        raise MoeConfigError(
            f"the group has {size} ranks, the axes {', '.join(placement.data_axes)} have {ranks}: "
            "give the group of all their ranks"
        )
    timeout_s = lanes.timeout_s or 300.0
    mine = own_group(group, timeout_s=timeout_s)
    copies = placement.mesh.get_group(placement.dp)
    reducer = GradientReducer(
        model.named_parameters(),
        group=mine,
        # One rank of experts has no link and so no queue; gradients still need a thread.
        queue=lanes.inter if isinstance(lanes.inter, IssueQueue) else IssueQueue(mine, "inter", timeout_s=timeout_s),
        expert_group=own_group(copies, timeout_s=timeout_s) if copies.size() > 1 else None,
        slice_bytes=slice_bytes,
        average=average,
        model=model,
    )
    for layer in layers:
        layer.runner.drain = reducer.drain
    return reducer


def use_plans(model: nn.Module, plans: Mapping[str, LayerPlan]) -> None:
    """Give layers new plans between two steps; every rank alike. Names are those of `expert_layers(model)`."""
    layers = expert_layers(model)
    unknown = sorted(set(plans) - set(layers))
    if unknown:
        raise MoeConfigError(f"there are plans for {', '.join(unknown)}, but the layers are {', '.join(layers)}")
    for name, plan in plans.items():
        layers[name].runner.plan = plan


def ready_amounts(reducer: GradientReducer) -> list[int]:
    """Return what `moe.spread.plan_model` takes as `ready`, from the last step: bytes that came before each layer.

    In backward order, with one entry more for what came after the last layer. Take the least over ranks, then plan.
    """
    total = sum(part.nbytes for part in reducer.slices)
    marks: Sequence[int] = [0, *reducer.ready_bytes, total]
    return [b - a for a, b in pairwise(marks)]


def backward_order(model: nn.Module) -> list[str]:
    """Return the names of the expert layers as backward meets them, which is the order of `plan_model`."""
    return list(reversed(expert_layers(model)))


def plain_plans(model: nn.Module) -> dict[str, LayerPlan]:
    """Return the layers' plans without gradients: with these a step measures what is ready when."""
    return {name: replace(layer.runner.plan, gradient_bytes=0) for name, layer in expert_layers(model).items()}
