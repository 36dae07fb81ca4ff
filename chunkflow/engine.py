"""How a model's parameters come to be where they are used, and how gradients of several ranks come together.

`WholeParameters` is for models that are whole on every rank: one process, plain, DDP. Engines that shard them are
adapters (`chunkflow.adapters`), one file each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor, nn

from chunkflow.program import Operation, align
from chunkflow.reduce import sum_gradients

Step = tuple[str, int | None]
"""An op and the position of its chunk; position None is a dummy: one token of weight zero."""


class Engine(Protocol):
    """What differs between ways of keeping parameters. Every rank of the group calls every method."""

    @property
    def in_place(self) -> bool:
        """Whether `.grad` of a parameter is whole and no one else's, so that gradients may be added to it directly."""
        ...

    def call(self, forward: Callable[..., Tensor], **inputs: Any) -> Tensor:
        """Return `forward(**inputs)`, run where the wrappers of the model see a forward of theirs."""
        ...

    def operations(self, program: str, own: Sequence[Operation]) -> Sequence[Step]:
        """Return what this rank runs in a step, given the common program and its own operations."""
        ...

    def scoring_operations(self, program: str, num_chunks: int) -> Sequence[Step]:
        """Return what this rank runs to score a step: `f` only."""
        ...

    def training(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Surround the operations of a step; at the end gradients are summed over the ranks."""
        ...

    def scoring(self) -> AbstractContextManager[None]:
        """Surround forwards without gradients."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Run one backward; `last` in a step."""
        ...


class WholeParameters:
    """`Engine` of models whose parameters are whole on every rank: programs need not agree, one reduction a step."""

    in_place = True

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group

    def call(self, forward: Callable[..., Tensor], **inputs: Any) -> Tensor:
        """See `Engine.call`."""
        return forward(**inputs)

    def operations(self, program: str, own: Sequence[Operation]) -> Sequence[Step]:
        """See `Engine.operations`: this rank's own."""
        return own

    def scoring_operations(self, program: str, num_chunks: int) -> Sequence[Step]:
        """See `Engine.scoring_operations`."""
        return own_forwards(num_chunks)

    @contextmanager
    def training(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """See `Engine.training`."""
        if self._group is None:
            yield
            return
        # Gradients of earlier steps are summed over the ranks already and must not be again.
        before = [(p, p.grad) for p in parameters if p.grad is not None]
        for parameter, _ in before:
            parameter.grad = None
        yield
        self.reduce(parameters)
        for parameter, grad in before:
            parameter.grad = grad if parameter.grad is None else grad.add_(parameter.grad)

    def reduce(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the step's gradients over the ranks of the group, of which there is one."""
        assert self._group is not None
        sum_gradients(parameters, self._group)

    def scoring(self) -> AbstractContextManager[None]:
        """See `Engine.scoring`."""
        return nullcontext()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Engine.backward`."""
        loss.backward()


class InStep(WholeParameters):
    """`Engine` of models with layers that ask other ranks, forward and backward, as expert-parallel ones do.

    Every rank runs the common program; where it has no chunk for an operation it runs one token of weight zero.
    """

    in_place = False

    def operations(self, program: str, own: Sequence[Operation]) -> Sequence[Step]:
        """See `Engine.operations`: the common program."""
        return align(program, own)

    def scoring_operations(self, program: str, num_chunks: int) -> Sequence[Step]:
        """See `Engine.scoring_operations`: as many forwards as the program has chunks."""
        return [("f", position if position < num_chunks else None) for position in range(program.count("B"))]


def own_forwards(num_chunks: int) -> list[Step]:
    """Return a forward without graph of every chunk."""
    return [("f", position) for position in range(num_chunks)]


@contextmanager
def forward_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `module(...)` run another forward, inside the module's hooks: FSDP2 and ZeRO-3 bring parameters in those."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
