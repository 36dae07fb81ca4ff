"""Parts of frozen values that are made when they are first asked for: most steps never are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")


class LazyText:
    """A field of a frozen dataclass without slots: a string, given as one or as the function that makes it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> LazyText: ...
    @overload
    def __get__(self, instance: Any, owner: type) -> str: ...
    def __get__(self, instance: Any, owner: type) -> LazyText | str:
        if instance is None:
            raise AttributeError(self._name)  # so that dataclasses sees a field without a default
        value: Any = vars(instance)[self._name]
        if callable(value):
            value = vars(instance)[self._name] = value()
        return value

    def __set__(self, instance: Any, value: str | Callable[[], str]) -> None:
        vars(instance)[self._name] = value


class LazyRows(Sequence[T], Generic[T]):
    """A sequence whose rows are made when they are first looked at; equal to whatever has the same rows."""

    def __init__(self, num_rows: int, make: Callable[[int], T]) -> None:
        self._num_rows, self._make = num_rows, make
        self._rows: dict[int, T] = {}

    def __len__(self) -> int:
        return self._num_rows

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[T, ...]: ...
    def __getitem__(self, index: int | slice) -> T | tuple[T, ...]:
        number = range(self._num_rows)[index]
        if isinstance(number, range):
            return tuple(self[n] for n in number)
        if number not in self._rows:
            self._rows[number] = self._make(number)
        return self._rows[number]

    def __eq__(self, other: object) -> bool:
        return tuple(self) == (tuple(other) if isinstance(other, LazyRows) else other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))
