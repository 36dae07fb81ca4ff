"""FSDP2: a model on which `torch.distributed.fsdp.fully_shard` was called, root included.

Parameters are gathered once a step and gradients scattered once, at its end. In between no rank needs another, so ranks
need not run the same operations. A step ends with one token of weight zero, whose backward is the one that reduces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from chunkflow.engine import Step, forward_as, own_forwards
from chunkflow.errors import ChunkflowError
from chunkflow.program import Operation


class Fsdp2:
    """`Engine` of an FSDP2 root."""

    in_place = False

    def __init__(self, root: FSDPModule, group: dist.ProcessGroup | None) -> None:
        if group is None:
            raise ChunkflowError("the model is sharded with FSDP2 and group is SINGLE; give the group that shares it")
        assert isinstance(root, nn.Module)
        self._root = root
        self._shards = [m for m in root.modules() if isinstance(m, FSDPModule)]
        for shard in self._shards:
            # Our loss is a sum over ranks already divided; and gloo has no other reduction.
            shard.set_gradient_divide_factor(1.0)
            shard.set_force_sum_reduction_for_comms(True)
        # Not even after the last backward: FSDP2 prefetches in an order that depends on the forwards a rank has run.
        root.set_reshard_after_forward(False)
        root.set_reshard_after_backward(False)

    def call(self, forward: Callable[..., Tensor], **inputs: Any) -> Tensor:
        """See `Engine.call`: as the root's forward, whose hooks gather its parameters."""
        with forward_as(self._root, forward):
            return self._root(**inputs)

    def operations(self, program: str, own: Sequence[Operation]) -> Sequence[Step]:
        """See `Engine.operations`: this rank's own, and the dummy that reduces."""
        return [*own, ("F", None), ("B", None)]

    def scoring_operations(self, program: str, num_chunks: int) -> Sequence[Step]:
        """See `Engine.scoring_operations`: one dummy, so that a rank without chunks gathers too."""
        return [*own_forwards(num_chunks), ("f", None)]

    @contextmanager
    def training(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """See `Engine.training`."""
        with self.scoring():
            self._root.set_requires_gradient_sync(False)
            yield

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """See `Engine.scoring`: parameters that stayed gathered would be those of before the optimizer's step."""
        try:
            yield
        finally:
            self._root.set_requires_gradient_sync(True)
            for shard in self._shards:
                shard.reshard()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Engine.backward`."""
        if last:
            self._root.set_requires_gradient_sync(True)
        loss.backward()
