"""Values that are kept as bytes: msgpack of plain types, so that nothing executes when they are read.

None, bool, int, float, str, bytes, list, tuple, and dict with keys of these; what comes back is equal, tuples included.
"""

from __future__ import annotations

from typing import Any

import msgpack

from checkpointing.errors import IntegrityError, StateError

ENCODING = "msgpack"
ENCODINGS = (ENCODING,)
_TUPLE, _BIG_INT = 1, 2
_MAX_DEPTH = 100


def dump_object(name: str, value: object) -> bytes:
    """Return `value` as bytes. Raises StateError naming `name` when it holds anything but plain types."""
    try:
        return _pack(name, _plain(name, value, 0))
    except (ValueError, OverflowError, UnicodeEncodeError) as error:
        raise StateError(f"{name!r} cannot be kept as msgpack: {error}; save it as tensors and plain values") from error


def load_object(name: str, data: bytes | memoryview) -> Any:
    """Return the value that was dumped. Raises IntegrityError on bytes that `dump_object` never wrote."""
    try:
        return msgpack.unpackb(data, ext_hook=_unpack_ext, strict_map_key=False, raw=False)
    except (ValueError, msgpack.UnpackException, TypeError, RecursionError) as error:
        raise IntegrityError(f"object {name!r} is not what this library writes: {error}") from error


def _pack(name: str, value: Any) -> bytes:
    packed = msgpack.packb(value, use_bin_type=True, strict_types=True)
    assert packed is not None
    return packed


def _plain(name: str, value: Any, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise StateError(f"{name!r} is nested deeper than {_MAX_DEPTH} levels (or holds itself); make it flat")
    kind = type(value)
    if value is None or kind in (bool, float, str, bytes):
        return value
    if kind is int:
        return value if -(2**63) <= value < 2**64 else msgpack.ExtType(_BIG_INT, str(value).encode())
    if kind is list:
        return [_plain(name, item, depth + 1) for item in value]
    if kind is tuple:
        return msgpack.ExtType(_TUPLE, _pack(name, [_plain(name, item, depth + 1) for item in value]))
    if kind is dict:
        return {_plain(name, key, depth + 1): _plain(name, item, depth + 1) for key, item in value.items()}
    raise StateError(
        f"{name!r} holds a {kind.__name__}; an object is made of None, bool, int, float, str, bytes, list, tuple and "
        "dict: give tensors names of their own"
    )


def _unpack_ext(code: int, data: bytes) -> Any:
    if code == _TUPLE:
        return tuple(msgpack.unpackb(data, ext_hook=_unpack_ext, strict_map_key=False, raw=False))
    if code == _BIG_INT:
        return int(data)
    raise ValueError(f"unknown type {code}")
