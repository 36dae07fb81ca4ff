"""The parts of a pipeline's ranks, back in one model."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from launch.pipeline_parts import RankParts
from pipeline.errors import WatchdogError
from pipeline.transport.base import reason_of


@torch.no_grad()
def gather_weights(
    parts: RankParts,
    group: dist.ProcessGroup | None,
    build: Callable[[], PreTrainedModel],
    *,
    timeout_s: float,
    build_timeout_s: float,
) -> PreTrainedModel | None:
    """Return on world rank 0 the whole model, filled into what `build` makes there; None on the others.

    Every rank calls; only the pipeline of rank 0 has something to do. Tensors travel one by one. Raises torch's error
    where one does not come within `timeout_s`, and WatchdogError where rank 0, which builds first, does not take one
    within `build_timeout_s`.
    """
    world_rank = dist.get_rank() if dist.is_initialized() else 0
    if group is not None and 0 not in dist.get_process_group_ranks(group):
        return None
    state = parts.model.state_dict()
    model = build() if world_rank == 0 else None
    target = {} if model is None else model.state_dict()
    for name, holders in parts.holders.items():
        first = holders[0]
        if model is not None and first == parts.rank:
            target[name].copy_(state[name])
        elif model is not None:
            assert group is not None
            received = torch.empty_like(target[name], memory_format=torch.contiguous_format)
            work = dist.irecv(received, dist.get_global_rank(group, first), group=group)
            assert work is not None
            work.wait(timedelta(seconds=timeout_s))  # without one, gloo takes half an hour, whatever the group's limit
            target[name].copy_(received)
        elif first == parts.rank:
            _hand_over(state[name].contiguous(), group, timeout_s=build_timeout_s)
    return model


def _hand_over(tensor: Tensor, group: dist.ProcessGroup | None, *, timeout_s: float) -> None:
    """Send a tensor to world rank 0. Raises WatchdogError when it is not taken in time."""
    work = dist.isend(tensor, 0, group=group)
    assert work is not None
    try:
        work.wait(timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise WatchdogError(
            f"rank 0, which puts it together, is gone, stopped, hangs, or is later than {timeout_s:g} s: see its "
            f"output ({reason_of(error)})"
        ) from error
