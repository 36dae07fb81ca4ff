"""FSDP2 as the engine of a job: parameters, gradients and moments sharded over the ranks that share the data."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from chunkflow.engine import WholeParameters
from chunkflow.parts import parts_of


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> PreTrainedModel:
    """Shard each decoder layer, and the rest, over a mesh of one axis, in place. Every rank calls.

    Names stay, weights become DTensors. Raises UnsupportedModelError for a model whose layers are not found.
    """
    for layer in parts_of(model, WholeParameters(None)).layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@torch.no_grad()
def gather_shards(model: PreTrainedModel, build: Callable[[], PreTrainedModel]) -> PreTrainedModel | None:
    """Return the whole model on rank 0, filled into the one that `build` makes there; tensor by tensor.

    Every rank calls.
    """
    whole = build() if dist.get_rank() == 0 else None
    target = {} if whole is None else whole.state_dict()
    for name, tensor in model.state_dict().items():
        value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if name in target:
            target[name].copy_(value)
    return whole
