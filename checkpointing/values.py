"""JSON values, exactly: what comes back equals what was saved, NaN and infinities included.

Strict JSON has no NaN: a float that is not finite is written as `{"$float": "nan" | "inf" | "-inf"}`, and a key of the
user's that begins with `$` gets one more `$`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from checkpointing.errors import IntegrityError, StateError

TREE = "tree"
"""Name of the value that says how a nested state (`.pt`) is built from its tensors; see checkpointing.nested."""
TREES = "tree."
"""Before the key of one part of a state, in the name of the value that says how that part is built."""
_MAX_DEPTH = 100
_MAX_INT_BITS = 4096
_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
"""Two characters of Python's, and one once they have been through JSON."""
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_MARKS = [{"$float": text} for text in _NOT_FINITE]


def encode(name: str, value: object) -> Any:
    """Return `value` as strict JSON. Raises StateError naming `name`, the place inside the value and the remedy."""
    return _encode(name, "", value, 0)


def decode(encoded: Any) -> Any:
    """Return the value that was encoded. Raises IntegrityError on what `encode` never writes."""
    return _decode(encoded, 0)


def canonical(encoded: Any) -> str:
    """Return one text per value: equal texts, equal values (1, 1.0 and True differ; the order of keys does not)."""
    return json.dumps(encoded, sort_keys=True, allow_nan=False)


def leaves(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield plain values and lists of them by their path, whatever they are nested in; of trees what is no tensor."""
    for name, value in values.items():
        yield from _leaves(value, "" if name == TREE else name.removeprefix(TREES))


def without_trees(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with the leaves of trees in their place."""
    trees = {name for name in values if name == TREE or name.startswith(TREES)}
    plain = {name: value for name, value in values.items() if name not in trees}
    return plain | dict(leaves({name: values[name] for name in trees}))


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value.keys() <= {"$tensor", "$tuple", "$dict", "$odict"} and len(value) == 1:
        mark, inner = next(iter(value.items()))
        if mark == "$tensor":
            return
        value = {str(key): one for key, one in inner} if mark.endswith("dict") else inner
    inside = isinstance(value, list) and any(isinstance(one, dict | list) for one in value)
    if isinstance(value, dict) or inside:
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(one, f"{name}.{key}" if name else str(key))
    else:
        yield name or TREE, value


def _decode(encoded: Any, depth: int) -> Any:
    if not isinstance(encoded, list | dict):
        return encoded
    if depth > _MAX_DEPTH:
        raise IntegrityError(f"a value is nested deeper than {_MAX_DEPTH} levels; it was not written by this library")
    if isinstance(encoded, list):
        return [_decode(item, depth + 1) for item in encoded]
    if "$float" in encoded:
        if encoded not in _MARKS:
            raise IntegrityError(f"{encoded!r} is not a number; the manifest was not written by this library")
        return _NOT_FINITE[encoded["$float"]]
    return {_decode_key(key): _decode(item, depth + 1) for key, item in encoded.items()}


def _decode_key(key: str) -> str:
    if not key.startswith("$"):
        return key
    if not key.startswith("$$"):
        raise IntegrityError(f"unknown mark {key!r} in a value; it needs a newer version of longrail")
    return key[1:]


def _encode(name: str, where: str, value: object, depth: int) -> Any:
    # Exact types only: a subclass (np.float64, IntEnum) would come back as something else.
    if value is None or type(value) is bool:
        return value
    if type(value) is str:
        return _encode_text(name, where, value)
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
    key = _encode_text(name, where, key)
    return f"${key}" if key.startswith("$") else key


def _encode_text(name: str, where: str, text: str) -> str:
    if pair := _PAIR.search(text):
        raise StateError(
            f"{name!r}{_at(where)} holds the surrogate pair {pair[0]!r}, which JSON gives back as one character; save "
            "text that is valid Unicode"
        )
    return text


def _at(where: str) -> str:
    return f" at {where}" if where else ""


def _refusal(name: str, where: str, value: object) -> str:
    kind = type(value).__name__
    whose = "numpy." if type(value).__module__ == "numpy" else ""  # some are called as Python's own
    remedy = {
        "Tensor": "give every tensor a name of its own in a flat state, {name: Tensor | JSON value}; "
        "a torch optimizer: use launch.TrainState",
        "Parameter": "give every tensor a name of its own in a flat state, {name: Tensor | JSON value}",
        "tuple": "make it a list, which is what JSON gives back",
        "set": "make it a sorted list",
        "bytes": "make it a uint8 tensor, or a string",
        "ndarray": "make it a tensor: torch.from_numpy(...)",
        **dict.fromkeys(("float64", "float32", "int64", "int32", "bool"), "make it a number of Python's: .item()"),
    }.get(kind, "save tensors and JSON values (None, bool, int, float, str, list, dict) only")
    return f"{name!r}{_at(where)} is of type {whose}{kind}; {remedy}"
