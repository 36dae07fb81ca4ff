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


@dataclass(frozen=True, slots=True)
class Named:
    """What a state gave out: tensors, providers and JSON values, as they are.

    Two lists and no pairs: thousands of new containers in every save would set off the garbage collector.
    """

    names: list[str]
    values: list[Any]


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
    named = Named([], [])
    for prefix, part in parts_of(state).items():
        given = _given(prefix, part)
        named.names.extend([f"{prefix}.{key}" for key in given] if prefix else given)
        named.values.extend(given.values())
    return named


def flatten(named: Named) -> FlatState:
    """Check what a state gave out. Raises StateError naming the first bad key."""
    providers: dict[str, Provider] = {}
    values: dict[str, Any] = {}
    for name, value in zip(named.names, named.values, strict=True):
        _check_name(name)
        if isinstance(value, torch.Tensor):
            _check_tensor(name, value)
            providers[name] = TensorProvider(value)
        elif isinstance(value, TensorProvider) or isinstance(value, Provider):  # noqa: SIM101 - the second asks for its dtype
            providers[name] = _check_provider(name, value)
        else:
            values[name] = encode(name, value)
    return FlatState(_specs(providers), providers, values)


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


def _given(prefix: str, part: Stateful) -> Mapping[str, Any]:
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
    return given


def _check_name(name: str) -> None:
    if name == "__metadata__":
        raise StateError("the name '__metadata__' belongs to safetensors; choose another")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise StateError(f"the name {name!r} is not valid Unicode; choose another") from None


def _check_tensor(name: str, tensor: torch.Tensor) -> None:
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


def _check_provider(name: str, provider: Provider) -> Provider:
    if isinstance(provider, TensorProvider):
        _check_tensor(name, provider.tensor)
        _check_slice(name, provider)
    elif provider.encoding is not None and provider.encoding not in ENCODINGS:
        raise StateError(f"{name!r} has the encoding {provider.encoding!r}; there are: {', '.join(ENCODINGS)}")
    elif provider.dtype not in ITEMSIZES:
        raise StateError(f"{name!r} has the dtype {provider.dtype!r}; there are: {', '.join(ITEMSIZES)}")
    elif provider.encoding is None and provider.shape is None:
        raise StateError(f"{name!r} is a provider without a shape; only objects may leave it open")
    return provider


def _check_slice(name: str, one: TensorProvider) -> None:
    if one.whole is None and one.at is None:
        return
    if isinstance(one.tensor, DTensor):
        raise StateError(f"{name!r} is a DTensor, which knows its slice; leave out whole and at")
    begin, shape, whole = one.at or (), one.shape, one.whole or ()
    fits = len(begin) == len(shape) == len(whole) and all(
        at >= 0 and at + dim <= size for at, dim, size in zip(begin, shape, whole, strict=True)
    )
    if not fits:
        raise StateError(f"{name!r} is {list(shape)} at {list(begin)} of {list(whole)}, which is no slice of that")


def _specs(providers: Mapping[str, Provider]) -> tuple[TensorSpec, ...]:
    """Name the dtypes and find tied tensors: same memory, offset, shape, strides and dtype. Sorted by name."""
    first_name: dict[tuple[Any, ...], str] = {}
    return tuple(_spec(name, providers[name], first_name) for name in sorted(providers))


def _spec(name: str, one: Provider, first_name: dict[tuple[Any, ...], str]) -> TensorSpec:
    if isinstance(one, TensorProvider):
        tensor, whole, begin, alias = one.local, one.global_shape, one.offset, name
        shape, dtype, address = tuple(tensor.shape), tensor.dtype, tensor.data_ptr()
        if address:  # else it has no elements
            # A conjugated or negated view shares memory with its base and holds other numbers.
            flags = (tensor.device, tensor.stride(), tensor.is_conj(), tensor.is_neg())
            alias = first_name.setdefault((address, dtype, shape, whole, begin, flags), name)
        return TensorSpec(name, NAMES[dtype], shape, None if alias == name else alias, whole, begin)
    if one.encoding is not None:
        return TensorSpec(name, "U8", (), encoding=one.encoding)
    return TensorSpec(name, one.dtype, one.shape or (), None, one.global_shape, one.offset)


def _kind(value: object) -> str:
    return f"of type {type(value).__name__}"
