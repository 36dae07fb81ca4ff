"""From what the caller gives to flat names, and back by prefix. Nothing here touches a disk or another rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.distributed.tensor import DTensor

from checkpointing.dtypes import ITEMSIZES
from checkpointing.errors import StateError
from checkpointing.objects import ENCODINGS
from checkpointing.providers.base import Provider
from checkpointing.providers.tensors import TensorProvider, slice_of
from checkpointing.records import Stateful, TensorSpec
from checkpointing.torch_dtypes import NAMES
from checkpointing.values import encode

State: TypeAlias = Stateful | Mapping[str, Stateful]


Named: TypeAlias = list[tuple[str, Any]]
"""What a state gave out, name by name: tensors, providers and JSON values, as they are."""


@dataclass(frozen=True, slots=True)
class FlatState:
    """One rank's state: providers of bytes (nothing is copied yet), and values as strict JSON."""

    specs: tuple[TensorSpec, ...]
    """Of tensors and objects, sorted by name."""
    providers: Mapping[str, Provider]
    values: Mapping[str, Any]


def parts_of(state: State) -> dict[str, Stateful]:
    """Return {prefix: Stateful}; a state that is one Stateful has the prefix "". Raises StateError."""
    if isinstance(state, torch.optim.Optimizer):
        raise StateError(_OPTIMIZER.format("the state"))
    if isinstance(state, Stateful):
        return {"": state}
    if not isinstance(state, Mapping) or not state:
        raise StateError(f"the state is {_kind(state)}; give a Stateful, or a mapping of prefix to Stateful")
    for prefix, part in state.items():
        _check_part(prefix, part)
    _check_prefixes(sorted(state))
    return dict(state)


def gather(state: State) -> Named:
    """Call every `state_dict()`, or `state_providers()` where there is one. Raises StateError where one is not flat."""
    named: Named = []
    for prefix, part in parts_of(state).items():
        named += _given(prefix, part)
    return named


def flatten(named: Named) -> FlatState:
    """Check what a state gave out. Raises StateError naming the first bad key."""
    providers: dict[str, Provider] = {}
    values: dict[str, Any] = {}
    for name, value in named:
        _check_name(name)
        if isinstance(value, torch.Tensor):
            providers[name] = TensorProvider(_check_tensor(name, value))
        elif isinstance(value, Provider):
            providers[name] = _check_provider(name, value)
        else:
            values[name] = encode(name, value)
    return FlatState(_specs(providers), providers, values)


def encoded_values(named: Named) -> dict[str, Any]:
    """Return the values as strict JSON, of a state whose names are known to be good."""
    return {n: encode(n, v) for n, v in named if not isinstance(v, torch.Tensor) and not isinstance(v, Provider)}


def under(prefix: str, names: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a Stateful with this prefix is given: every name under it, without the prefix."""
    if not prefix:
        return dict(names)
    start = f"{prefix}."
    return {name.removeprefix(start): value for name, value in names.items() if name.startswith(start)}


_OPTIMIZER = (
    "{} is a torch optimizer, whose state_dict is keyed by integers; a state is flat, {{name: Tensor | JSON value}}: "
    "use launch.TrainState, which names optimizer state after its parameters"
)


def _check_part(prefix: object, part: object) -> None:
    if type(prefix) is not str or not prefix:
        raise StateError(f"the state has the prefix {prefix!r}; a prefix is a string of at least one character")
    if isinstance(part, torch.optim.Optimizer):
        raise StateError(_OPTIMIZER.format(repr(prefix)))
    if not isinstance(part, Stateful):
        raise StateError(
            f"{prefix!r} is {_kind(part)}, without state_dict() and load_state_dict(); wrap it in a class with both"
        )


def _check_prefixes(prefixes: list[str]) -> None:
    for prefix in prefixes:
        for other in prefixes:
            if other.startswith(f"{prefix}."):
                raise StateError(f"the prefixes {prefix!r} and {other!r} overlap; choose ones that do not")


def _given(prefix: str, part: Stateful) -> Named:
    give = getattr(part, "state_providers", part.state_dict)
    given = give()
    if not isinstance(given, Mapping):
        raise StateError(f"state_dict() of {prefix or 'the state'!r} gave {_kind(given)}; it must give a flat dict")
    for key in given:
        if type(key) is not str or not key:
            raise StateError(
                f"state_dict() of {prefix or 'the state'!r} has the key {key!r} of type {type(key).__name__}; "
                "names are strings of at least one character. A torch optimizer: use launch.TrainState"
            )
    return [(f"{prefix}.{key}", value) for key, value in given.items()] if prefix else list(given.items())


def _check_name(name: str) -> None:
    if name == "__metadata__":
        raise StateError("the name '__metadata__' belongs to safetensors; choose another")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise StateError(f"the name {name!r} is not valid Unicode; choose another") from None


def _check_tensor(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, DTensor):
        raise StateError(
            f"{name!r} is a {type(tensor).__name__}; plain tensors and DTensors can be saved: give what it is made of"
        )
    if isinstance(tensor, DTensor):
        slice_of(name, tensor)
        tensor = tensor._local_tensor
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        raise StateError(f"{name!r} is sparse, nested or quantized; save its parts as plain tensors")
    if tensor.device.type == "meta":
        raise StateError(f"{name!r} is on the meta device and has no bytes; materialise it before saving")
    if tensor.dtype not in NAMES:
        raise StateError(
            f"{name!r} has the dtype {tensor.dtype}, for which safetensors has no name; save it as another dtype "
            "(complex128: torch.view_as_real(...))"
        )
    if tensor.dtype is torch.float4_e2m1fn_x2 and not tensor.dim():
        raise StateError(f"{name!r} is a scalar of float4 pairs, which safetensors cannot state; give it a dim")
    return tensor


def _check_provider(name: str, provider: Provider) -> Provider:
    if isinstance(provider, TensorProvider):
        _check_tensor(name, provider.tensor)
    elif provider.encoding is not None and provider.encoding not in ENCODINGS:
        raise StateError(f"{name!r} has the encoding {provider.encoding!r}; there are: {', '.join(ENCODINGS)}")
    elif provider.dtype not in ITEMSIZES:
        raise StateError(f"{name!r} has the dtype {provider.dtype!r}; there are: {', '.join(ITEMSIZES)}")
    elif provider.encoding is None and provider.shape is None:
        raise StateError(f"{name!r} is a provider without a shape; only objects may leave it open")
    return provider


def _specs(providers: Mapping[str, Provider]) -> tuple[TensorSpec, ...]:
    """Name the dtypes and find tied tensors: same memory, offset, shape, strides and dtype. Sorted by name."""
    first_name: dict[tuple[Any, ...], str] = {}
    specs = []
    for name in sorted(providers):
        one, alias = providers[name], None
        if one.encoding is not None:
            specs.append(TensorSpec(name, "U8", (), encoding=one.encoding))
            continue
        if isinstance(one, TensorProvider) and one.local.numel():
            alias = first_name.setdefault(_identity(one), name)
        alias = None if alias == name else alias
        specs.append(TensorSpec(name, one.dtype, one.shape or (), alias, one.global_shape, one.offset))
    return tuple(specs)


def _identity(provider: TensorProvider) -> tuple[Any, ...]:
    # A conjugated or negated view shares memory with its base and holds other numbers.
    tensor = provider.local
    flags = (tensor.is_conj(), tensor.is_neg(), provider.global_shape, provider.offset)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), flags)


def _kind(value: object) -> str:
    return f"of type {type(value).__name__}"
