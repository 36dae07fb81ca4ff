"""A model without its weights, for ranks that share those of another rank: names, shapes, buffers, and all its code.

Every parameter has the shape it has in the model, and the memory of one number.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


def without_weights(model: nn.Module, device: torch.device) -> None:
    """Give every parameter one zero for all its numbers, and every buffer memory on the device, in place.

    Tied parameters stay tied. For a model that was built on the meta device: there was nothing to lose.
    """
    made: dict[int, tuple[Tensor, nn.Parameter]] = {}  # with the old one, so that its id stays taken
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and id(p) not in made:
                zero = torch.zeros(1, dtype=p.dtype, device=device).expand(p.shape)
                made[id(p)] = p, nn.Parameter(zero, requires_grad=p.requires_grad)
            module._parameters[name] = None if p is None else made[id(p)][1]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.zeros_like(buffer, device=device)


def share(tensors: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Give every rank of a group, or of the world, what its first rank has: a sum of gradients moves the same weights.

    Every rank of it calls.
    """
    first = 0 if group is None else dist.get_global_rank(group, 0)
    for tensor in tensors:
        dist.broadcast(tensor.data, src=first, group=group)


def deal(model: nn.Module, names: Container[str]) -> None:
    """Give this rank the parameters of rank 0 that have one of `names`; tensors travel one by one. Every rank calls.

    On rank 0 the model stays whole, so that it can be tried once more; elsewhere the others have no memory yet.
    """
    for name, p in model.named_parameters():
        wanted = dist.get_rank() == 0 or name in names
        whole = p.data if dist.get_rank() == 0 else torch.empty(p.shape, dtype=p.dtype, device=p.device)
        dist.broadcast(whole, src=0)
        if wanted:
            p.data = whole
