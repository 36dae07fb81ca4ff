"""Values that are too large or too rich for the manifest's JSON: serialised in the background."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from checkpointing.objects import ENCODING, dump_object
from checkpointing.providers.base import Chunk, Cost, Mutability, Place


@dataclass(frozen=True, slots=True)
class ObjectProvider:
    """A value of plain types (`objects.dump_object`): restored as the value itself.

    With `mutability` STEP or NEVER it is serialised beside the bulk copies; the default serialises inside of `save`.
    """

    value: Any
    mutability: Mutability = Mutability.ANYTIME
    place: Place = Place.HOST
    cost: Cost = Cost.COMPUTE
    dtype: str = "U8"
    shape: None = None
    global_shape: None = None
    offset: None = None
    encoding: str = ENCODING

    def chunks(self) -> Iterator[Chunk]:
        """Yield the serialised value."""
        yield dump_object("an object", self.value)
