"""Expert state between ranks: DTensors that say what part of the whole each rank has, and back from them.

`expert names` are those of expert parameters, and of anything kept for one, `optim.<name>.<slot>`, that has its shape.
So what was saved at one number of ranks loads at another: each takes its rows of dimension 0, the expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from moe.errors import MoeConfigError
from moe.experts import INNER, join_inner, slice_inner
from moe.parallel import ParallelExperts, expert_layers
from moe.together import Together

_STACKS = ("gate_up_proj", "down_proj")


def to_global(model: nn.Module, flat: Mapping[str, Any], *, prefix: str = "") -> dict[str, Any]:
    """Return `flat` with each expert tensor of this rank as a DTensor `[E, ...]`, `Shard(0)` over `ep`; no copy.

    Where experts are shared over `esp`, their slices are gathered first: every rank calls; ExchangeError when one is
    lost or late. The rest stays as it is.
    `prefix` stands before the names of parameters, not before `optim.`.
    """
    owners = _owners(model, prefix)
    together = Together(model, "to_global") if owners else None
    found = {name: _owner(owners, name, value) for name, value in flat.items()}
    return {n: _globally(*owner, flat[n], together) if owner and together else flat[n] for n, owner in found.items()}


def to_local(model: nn.Module, flat: Mapping[str, Any], *, prefix: str = "") -> dict[str, Any]:
    """Return `flat` with each expert tensor cut to what this rank holds, from DTensors or whole tensors `[E, ...]`.

    Raises MoeConfigError when a tensor is not that of all experts of its layer.
    """
    owners = _owners(model, prefix)
    found = {name: _find(owners, name) for name in flat}
    return {name: _locally(name, *owner, flat[name]) if owner else flat[name] for name, owner in found.items()}


def state_dict(model: nn.Module) -> dict[str, Any]:
    """Return the model's state, its names unchanged, experts as DTensors over `ep`. Every rank calls."""
    return to_global(model, model.state_dict())


def load_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load what `state_dict` gave at any number of ranks, or whole tensors; changes nothing when something misfits."""
    local = to_local(model, state)
    own = model.state_dict()
    missing, unknown = sorted(set(own) - set(local)), sorted(set(local) - set(own))
    wrong = sorted(name for name in set(own) & set(local) if not _can_copy(local[name], own[name]))
    if missing or unknown or wrong:
        raise MoeConfigError(
            f"the state does not fit {type(model).__name__}: missing {missing[:3]}, unknown {unknown[:3]}, of another "
            f"shape or kind {wrong[:3]}; load it into a model of the same configuration"
        )
    model.load_state_dict(local)


def _can_copy(value: Any, own: Any) -> bool:
    if not isinstance(own, Tensor):
        return True
    if not isinstance(value, Tensor) or value.shape != own.shape or value.is_meta or value.layout != own.layout:
        return False
    return (value.is_complex(), value.is_floating_point()) == (own.is_complex(), own.is_floating_point())


_Owner = tuple[ParallelExperts, str]


def _owners(model: nn.Module, prefix: str) -> dict[str, _Owner]:
    """Return the expert parameters by name, and by the name under which their optimizer state is kept."""
    owners = {}
    for name, layer in expert_layers(model).items():
        for stack in _STACKS:
            owners[f"{prefix}{name}.{stack}"] = owners[f"optim.{name}.{stack}"] = (layer, stack)
    return owners


def _find(owners: Mapping[str, _Owner], name: str) -> _Owner | None:
    return owners.get(name.rpartition(".")[0] if name.startswith("optim.") else name)


def _owner(owners: Mapping[str, _Owner], name: str, value: Any) -> _Owner | None:
    found = _find(owners, name)
    # A slot of another shape, a step count say, is whole on every rank.
    fits = found is not None and isinstance(value, Tensor) and value.shape == getattr(*found).shape
    return found if fits else None


def _globally(layer: ParallelExperts, stack: str, value: Tensor, together: Together) -> DTensor:
    mesh, ep, esp = layer.placement.mesh, layer.placement.ep, layer.placement.esp
    if esp is not None and mesh[esp].size() > 1:
        value = join_inner(stack, together.join(value, esp))
    return DTensor.from_local(value, mesh[ep], [Shard(0)], run_check=False)


def _whole_shape(layer: ParallelExperts, stack: str) -> torch.Size:
    shape, (inner, _) = list(getattr(layer, stack).shape), INNER[stack]
    shape[0] = layer.placement.num_experts
    shape[inner] *= layer.runner.lanes.num_members
    return torch.Size(shape)


def _locally(name: str, layer: ParallelExperts, stack: str, value: Any) -> Any:
    lanes, place = layer.runner.lanes, layer.placement
    if not isinstance(value, Tensor) or value.dim() != 3:
        return value
    if len(value) != place.num_experts:
        raise MoeConfigError(
            f"{name} has {len(value)} experts, the layer {place.num_experts}; give all of them, or a DTensor"
        )
    if value.shape != (whole := _whole_shape(layer, stack)) or value.layout != torch.strided:
        raise MoeConfigError(
            f"{name} is {list(value.shape)} ({value.layout}), but all experts of the layer together are {list(whole)}, "
            "strided"
        )
    if isinstance(value, DTensor) and value.device_mesh == place.mesh[place.ep] and value.placements == (Shard(0),):
        own = value.to_local()
    else:
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        each = place.num_experts // lanes.num_ranks
        own = whole[lanes.position * each : (lanes.position + 1) * each]
    return own if lanes.num_members == 1 else slice_inner(stack, own, lanes.member, lanes.num_members)
