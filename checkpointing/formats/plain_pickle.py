"""Pickles of other tools' metadata, read without running them: only the classes of a list can be made.

A pickle is a program. What it can call is what `find_class` gives it; here that are plain records (dataclasses, enums,
sizes, dtypes), named one by one by the caller, and everything else ends the reading.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pickle import UnpicklingError
from typing import Any

__all__ = ["UnpicklingError", "load_plain"]


def load_plain(data: bytes, allowed: Mapping[str, Any]) -> Any:
    """Return what is pickled, made of builtin containers and of `allowed`: `module.name` to the record itself.

    Raises UnpicklingError naming what was asked for beyond that; nothing of it is executed.
    """
    return _Plain(io.BytesIO(data), allowed).load()


class _Plain(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, allowed: Mapping[str, Any]) -> None:
        super().__init__(file)
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[f"{module}.{name}"]
        except KeyError:
            raise UnpicklingError(f"it asks for {module}.{name}, which is not plain metadata") from None

    def persistent_load(self, pid: Any) -> Any:
        raise UnpicklingError(f"it refers to {pid!r} outside of the file")
