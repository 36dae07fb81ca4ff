"""Gradients of all ranks added up, once an optimizer step, in fixed buckets.

DDP's own reduction cannot serve: it is armed at *forward*, and a group that keeps more than one chunk runs several
forwards before the backward that would be the last. The loss is divided by the loss weights of the whole step already,
so ranks are summed and not averaged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

BUCKET_BYTES = 32 * 2**20


def sum_gradients(parameters: Iterable[Parameter], group: dist.ProcessGroup) -> None:
    """Replace every `.grad` by its sum over the ranks of the group; every rank calls, with the same parameters.

    A parameter that no rank used keeps `.grad` None, as it would in one process; one that only others used gets theirs.
    Raises torch.distributed's error when a rank does not arrive within the group's timeout.
    """
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        return
    used = torch.tensor([p.grad is not None for p in trained], dtype=torch.int32, device=trained[0].device)
    dist.all_reduce(used, group=group)
    grads: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    for parameter, count in zip(trained, used.tolist(), strict=True):
        if count and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad is not None:
            groups, local = _where_summed(parameter.grad, group)
            grads.setdefault(groups, []).append(local)
    for groups, tensors in grads.items():
        for bucket in _buckets(tensors):
            _sum_bucket(bucket, groups)


def _where_summed(grad: Tensor, group: dist.ProcessGroup) -> tuple[tuple[dist.ProcessGroup, ...], Tensor]:
    """Return the groups to sum a gradient over, one after another, and the part of it that is here."""
    if not isinstance(grad, DTensor):
        return (group,), grad
    mesh = grad.device_mesh
    replicated = [axis for axis, placement in enumerate(grad.placements) if placement.is_replicate()]
    return tuple(mesh.get_group(axis) for axis in replicated), grad.to_local()


def _sum_bucket(bucket: list[Tensor], groups: tuple[dist.ProcessGroup, ...]) -> None:
    if len(bucket) == 1 and bucket[0].is_contiguous():  # the largest ones: no copy of them is made
        for group in groups:
            dist.all_reduce(bucket[0], group=group)
    elif groups:
        flat = torch.cat([g.reshape(-1) for g in bucket])
        for group in groups:
            dist.all_reduce(flat, group=group)
        for grad, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            grad.copy_(part.view_as(grad))


def _buckets(grads: list[Tensor]) -> Iterator[list[Tensor]]:
    """Cut the gradients, in order, into runs of one dtype and device and of at most about BUCKET_BYTES."""
    bucket: list[Tensor] = []
    size = 0
    for grad in grads:
        kind_changes = bucket and (grad.dtype, grad.device) != (bucket[0].dtype, bucket[0].device)
        if bucket and (kind_changes or size + grad.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(grad)
        size += grad.nbytes
    if bucket:
        yield bucket
