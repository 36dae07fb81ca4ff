"""Gradients of the largest weights, added to `.grad` where it is.

Autograd makes a dense gradient of the embedding and of the output projection for every chunk, each as large as the
vocabulary, and adds them up: for small chunks that costs as much as the products. T tokens, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from chunkflow.engine import forward_as


def grows_in_place(weight: Tensor) -> bool:
    """Whether nothing waits for the gradient of this weight, so that it may come by another way than autograd."""
    hooks = (weight._backward_hooks, getattr(weight, "_post_accumulate_grad_hooks", None))
    is_plain = type(weight) is nn.Parameter and not hasattr(weight, "main_grad")  # where Megatron's DDP moves it
    return is_plain and weight.requires_grad and not any(hooks)


def gradient_of(weight: Tensor) -> Tensor:
    """Return `.grad`, zeros where there was none."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


@contextmanager
def embedding_in_place(module: nn.Module) -> Iterator[None]:
    """Let the gradient of an embedding add its rows to `.grad`, where that can be; other modules stay as they are."""
    if not (type(module) is nn.Embedding and _is_plain(module) and grows_in_place(module.weight)):
        yield
        return

    def forward(ids: Tensor) -> Any:
        return _Embedding.apply(ids, module.weight, module.padding_idx)

    with forward_as(module, forward):
        yield


def _is_plain(embedding: nn.Embedding) -> bool:
    special = embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse
    return not special and "forward" not in embedding.__dict__ and embedding._compiled_call_impl is None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
        ctx.weight, ctx.padding_idx = weight, padding_idx
        ctx.save_for_backward(ids)
        return nn.functional.embedding(ids, weight, padding_idx)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        if ctx.padding_idx is None:
            grad_TD, ids_T = grads[0].reshape(-1, grads[0].shape[-1]), ids.reshape(-1)
        else:
            kept = ids != ctx.padding_idx
            grad_TD, ids_T = grads[0][kept], ids[kept]
        # Rows of one token are added up first, in the order that autograd has; then every row is added once.
        rows, row_T = ids_T.unique(return_inverse=True)
        sums = torch.ops.aten.embedding_dense_backward(grad_TD, row_T, len(rows), -1, False)
        gradient_of(ctx.weight).index_add_(0, rows, sums)
        return None, None, None
