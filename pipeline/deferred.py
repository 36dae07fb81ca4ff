"""Backward in two halves: gradients of the inputs at once, gradients of the weights of matrix products later.

    with deferring(jobs):
        out = layer(x)                 # F.linear calls inside become `DeferredLinear`
    out.backward(grad)                 # the I half: fills `jobs`
    run_weight_jobs(jobs)              # the W half

The products of the W half are those that autograd would have computed, so the gradients are the same to the bit. What
is no `linear` (norms, biases, the embedding, fused losses, grouped experts), or runs under torch.utils.checkpoint, or
has a hook on the weight's gradient, has its weight gradient in the I half.
Source: Zero Bubble Pipeline Parallelism, arXiv 2401.10241.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True, slots=True)
class WeightJob:
    """One weight gradient that is still to be computed: weight.grad += grad^T @ x, of x [..., in], grad [..., out]."""

    weight: Tensor
    x: Tensor
    grad: Tensor


def run_weight_jobs(jobs: list[WeightJob]) -> None:
    """Compute and add the gradients, in the order of the backward, and forget them."""
    while jobs:
        job = jobs.pop(0)
        with torch.no_grad():
            product = job.grad.flatten(0, -2).t() @ job.x.flatten(0, -2).to(job.grad.dtype)
            product = product.to(job.weight.dtype)
            job.weight.grad = product if job.weight.grad is None else job.weight.grad.add_(product)


@contextmanager
def deferring(jobs: list[WeightJob]) -> Iterator[None]:
    """Let the linear layers that run inside leave their weight gradients in `jobs`, when backward reaches them."""
    with _Deferring(jobs):
        yield


class _Deferring(TorchFunctionMode):
    def __init__(self, jobs: list[WeightJob]) -> None:
        super().__init__()
        self._jobs = jobs

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear and torch.is_grad_enabled() and len(args) >= 2 and not kwargs:
            x, weight, bias = args if len(args) == 3 else (*args, None)
            if x.ndim >= 2 and _is_deferrable(weight):
                return _DeferredLinear.apply(x, weight, bias, self._jobs)
        return func(*args, **kwargs)


def _is_deferrable(weight: Tensor) -> bool:
    """Whether nobody else has a say in the weight's gradient, or in what a backward finds saved."""
    hooks: Any = weight
    own: Any = torch._C
    return (
        weight.requires_grad
        and weight.is_leaf
        and not hooks._backward_hooks
        and not hooks._post_accumulate_grad_hooks
        # Under torch.utils.checkpoint, what is saved is computed again in the backward, where nothing is deferred.
        and own._autograd._top_saved_tensors_default_hooks(True) is None
    )


class _DeferredLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, jobs: list[WeightJob]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.jobs = jobs
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, _, wants_bias, _ = ctx.needs_input_grad
        ctx.jobs.append(WeightJob(weight, x.detach(), grads[0]))
        return (
            grads[0] @ weight.to(grads[0].dtype) if wants_x else None,
            None,
            grads[0].flatten(0, -2).sum(0) if wants_bias else None,
            None,
        )
