"""From what the caller gives to flat names, and back by prefix. Nothing here touches a disk or another rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from checkpointing.errors import StateError
from checkpointing.records import Stateful, TensorSpec
from checkpointing.torch_dtypes import NAMES
from checkpointing.values import encode

State: TypeAlias = Stateful | Mapping[str, Stateful]


@dataclass(frozen=True, slots=True)
class FlatState:
    """One rank's state: tensors as they are (not copied), and values as strict JSON."""

    specs: tuple[TensorSpec, ...]
    tensors: Mapping[str, torch.Tensor]
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


def flatten(state: State) -> FlatState:
    """Call every `state_dict()` and check what it gives. Raises StateError naming the first bad key."""
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for prefix, part in parts_of(state).items():
        for name, value in _named(prefix, part):
            if isinstance(value, torch.Tensor):
                tensors[name] = _check_tensor(name, value)
            else:
                values[name] = encode(name, value)
    return FlatState(_specs(tensors), tensors, values)


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


def _named(prefix: str, part: Stateful) -> Iterator[tuple[str, Any]]:
    given = part.state_dict()
    if not isinstance(given, Mapping):
        raise StateError(f"state_dict() of {prefix or 'the state'!r} gave {_kind(given)}; it must give a flat dict")
    for key, value in given.items():
        if type(key) is not str or not key:
            raise StateError(
                f"state_dict() of {prefix or 'the state'!r} has the key {key!r} of type {type(key).__name__}; "
                "names are strings of at least one character. A torch optimizer: use launch.TrainState"
            )
        name = f"{prefix}.{key}" if prefix else key
        _check_name(name)
        yield name, value


def _check_name(name: str) -> None:
    if name == "__metadata__":
        raise StateError("the name '__metadata__' belongs to safetensors; choose another")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise StateError(f"the name {name!r} is not valid Unicode; choose another") from None


def _check_tensor(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise StateError(
            f"{name!r} is a {type(tensor).__name__}; plain tensors can be saved: give its local or full tensor "
            "(a DTensor: .full_tensor(), or .to_local() under a name with the rank in it)"
        )
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


def _specs(tensors: Mapping[str, torch.Tensor]) -> tuple[TensorSpec, ...]:
    """Name the dtypes and find tied tensors: same memory, offset, shape, strides and dtype. Sorted by name."""
    first_name: dict[tuple[Any, ...], str] = {}
    specs = []
    for name in sorted(tensors):
        tensor, alias = tensors[name], None
        if tensor.numel():
            alias = first_name.setdefault(_identity(tensor), name)
        specs.append(TensorSpec(name, NAMES[tensor.dtype], tuple(tensor.shape), None if alias == name else alias))
    return tuple(specs)


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    # A conjugated or negated view shares memory with its base and holds other numbers.
    flags = (tensor.is_conj(), tensor.is_neg())
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), flags)


def _kind(value: object) -> str:
    return f"of type {type(value).__name__}"
