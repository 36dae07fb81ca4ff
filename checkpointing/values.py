"""JSON values, exactly: what comes back equals what was saved, NaN and infinities included.

Strict JSON has no NaN: a float that is not finite is written as `{"$float": "nan" | "inf" | "-inf"}`, and a key of the
user's that begins with `$` gets one more `$`.
"""

from __future__ import annotations

import json
import math
from typing import Any

from checkpointing.errors import IntegrityError, StateError

_MAX_DEPTH = 100
_MAX_INT_BITS = 4096
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode(name: str, value: object) -> Any:
    """Return `value` as strict JSON. Raises StateError naming `name`, the place inside the value and the remedy."""
    return _encode(name, "", value, 0)


def decode(encoded: Any) -> Any:
    """Return the value that was encoded. Raises IntegrityError on what `encode` never writes."""
    if isinstance(encoded, list):
        return [decode(item) for item in encoded]
    if not isinstance(encoded, dict):
        return encoded
    if "$float" in encoded:
        if len(encoded) != 1 or encoded["$float"] not in _NOT_FINITE:
            raise IntegrityError(f"{encoded!r} is not a number; the manifest was not written by this library")
        return _NOT_FINITE[encoded["$float"]]
    return {_decode_key(key): decode(item) for key, item in encoded.items()}


def canonical(encoded: Any) -> str:
    """Return one text per value: equal texts, equal values (1, 1.0 and True differ; the order of keys does not)."""
    return json.dumps(encoded, sort_keys=True, allow_nan=False)


def _decode_key(key: str) -> str:
    if not key.startswith("$"):
        return key
    if not key.startswith("$$"):
        raise IntegrityError(f"unknown mark {key!r} in a value; it needs a newer version of longrail")
    return key[1:]


def _encode(name: str, where: str, value: object, depth: int) -> Any:
    # Exact types only: a subclass (np.float64, IntEnum) would come back as something else.
    if value is None or type(value) in (bool, str):
        return value
    if type(value) is int:
        return _encode_int(name, where, value)
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if depth == _MAX_DEPTH:
        raise StateError(f"{name!r} is nested deeper than {_MAX_DEPTH} levels (or holds itself); give it flat names")
    if type(value) is list:
        return [_encode(name, f"{where}[{i}]", item, depth + 1) for i, item in enumerate(value)]
    if isinstance(value, dict):
        return {
            _encode_key(name, where, key): _encode(name, f"{where}[{key!r}]", item, depth + 1)
            for key, item in value.items()
        }
    raise StateError(_refusal(name, where, value))


def _encode_int(name: str, where: str, value: int) -> int:
    if value.bit_length() > _MAX_INT_BITS:
        raise StateError(f"{name!r}{_at(where)} is an int of {value.bit_length()} bits; save it as a string")
    return value


def _encode_key(name: str, where: str, key: object) -> str:
    if type(key) is not str:
        raise StateError(
            f"{name!r}{_at(where)} has the key {key!r} of type {type(key).__name__}; keys are strings, and a state is "
            "flat: {name: Tensor | JSON value}. A torch optimizer: use launch.TrainState"
        )
    return f"${key}" if key.startswith("$") else key


def _at(where: str) -> str:
    return f" at {where}" if where else ""


def _refusal(name: str, where: str, value: object) -> str:
    kind = type(value).__name__
    remedy = {
        "Tensor": "give every tensor a name of its own in a flat state, {name: Tensor | JSON value}; "
        "a torch optimizer: use launch.TrainState",
        "Parameter": "give every tensor a name of its own in a flat state, {name: Tensor | JSON value}",
        "tuple": "make it a list, which is what JSON gives back",
        "set": "make it a sorted list",
        "bytes": "make it a uint8 tensor, or a string",
        "ndarray": "make it a tensor: torch.from_numpy(...)",
    }.get(kind, "save tensors and JSON values (None, bool, int, float, str, list, dict) only")
    return f"{name!r}{_at(where)} is of type {kind}; {remedy}"
