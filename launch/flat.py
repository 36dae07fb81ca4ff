"""Nested state as one flat mapping of names to tensors and JSON values, and back.

A value that is JSON stays one entry. A list, tuple or dict that holds a tensor becomes an entry that says so, and one
entry for each of its members: `name.0`, `name.1`, ... or `name.<key>`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from launch.errors import ResumeError

_EXPANDED = "__expanded__"


def flatten(name: str, value: Any, flat: dict[str, Any]) -> None:
    """Write `value` into `flat` under `name`; raises ResumeError on something that is neither tensor nor JSON."""
    if isinstance(value, Tensor):
        flat[name] = value
    elif _is_json(value):
        flat[name] = _plain(value)
    elif isinstance(value, list | tuple):
        flat[name] = {_EXPANDED: type(value).__name__, "length": len(value)}
        for place, member in enumerate(value):
            flatten(f"{name}.{place}", member, flat)
    elif isinstance(value, dict) and all(isinstance(key, str) for key in value):
        flat[name] = {_EXPANDED: "dict", "keys": list(value)}
        for key, member in value.items():
            flatten(f"{name}.{key}", member, flat)
    else:
        raise ResumeError(f"{name} is a {type(value).__name__}; only tensors, numbers, strings, lists and dicts of "
                          "them can be saved")  # fmt: skip


def unflatten(name: str, flat: Mapping[str, Any]) -> Any:
    """Return what `flatten` wrote under `name`; a tuple of JSON values comes back as a list."""
    value = flat[name]
    if not isinstance(value, dict) or _EXPANDED not in value:
        return value
    if value[_EXPANDED] == "dict":
        return {key: unflatten(f"{name}.{key}", flat) for key in value["keys"]}
    members = [unflatten(f"{name}.{place}", flat) for place in range(value["length"])]
    return tuple(members) if value[_EXPANDED] == "tuple" else members


def roots(flat: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names that `flatten` was called with, not those of the members it expanded."""
    expanded = {name for name, value in flat.items() if isinstance(value, dict) and _EXPANDED in value}
    for name in flat:
        outer = name.rpartition(".")[0]
        while outer and outer not in expanded:
            outer = outer.rpartition(".")[0]
        if not outer:
            yield name


def _plain(value: Any) -> Any:
    """Return a JSON value as JSON gives it back: lists for tuples."""
    if isinstance(value, dict):
        return {key: _plain(member) for key, member in value.items()}
    return [_plain(member) for member in value] if isinstance(value, list | tuple) else value


def _is_json(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_json(member) for member in value)
    if isinstance(value, dict):
        return all(type(key) is str and _is_json(member) for key, member in value.items())
    return value is None or type(value) in (bool, int, float, str)
