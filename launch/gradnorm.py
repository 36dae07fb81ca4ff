"""One norm for the gradient of the whole model, and clipping by it. Tied weights count once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from launch.bounded import all_reduce


def global_grad_norm(
    params: Iterable[nn.Parameter],
    *,
    group: dist.ProcessGroup | None = None,
    timeout_s: float = 600.0,
    what: str = "adding up the gradient's norm",
) -> Tensor:
    """Return the 2-norm of all gradients together, fp32 or wider, 0-d; 0 where there are none.

    Without a group, gradients are whole on every rank, so the norm is too, and no rank asks another. With one, its
    ranks hold different parameters (a pipeline's), or shards of the same (FSDP2's): every rank of it calls, with those
    that it answers for, a tied one on one rank only; the same norm returns on each. Raises WatchdogError, `what` first,
    when a rank does not come in time.
    """
    norms = [
        torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
        for grad in _gradients(params)
    ]
    total = torch.zeros(())
    if norms:
        total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    if group is None:
        return total
    square = total.double().square().reshape(1)
    all_reduce(square, group=group, timeout_s=timeout_s, what=what)
    return square[0].sqrt()


@torch.no_grad()
def clip_(params: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients, in place, so that their norm, which is `norm`, is at most `max_norm`."""
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad in _gradients(params):
        grad.mul_(scale.to(grad.device, grad.dtype))


def _gradients(params: Iterable[nn.Parameter]) -> list[Tensor]:
    unique = {id(param): param for param in params}
    grads = [param.grad for param in unique.values() if param.grad is not None]
    return [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
