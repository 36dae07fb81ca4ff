"""A tensor cut along its rows: parts of it in the new file, the rest where an older save left it. Pure.

A row is what one index of the first dim that has several holds (of a stack of experts, one expert), so that rows
side by side are bytes side by side, whatever slice of a larger tensor a rank holds. A part is a slice as sharded saves
write them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from checkpointing.plan import file_order
from checkpointing.records import TensorSpec

Span = tuple[int, int]
"""From which to which byte of a tensor, as a rank holds it."""


class Part(NamedTuple):
    """Rows of a tensor under the name they have in a data file, where no name may stand twice."""

    spec: TensorSpec
    """Of these rows; its name is that in the file."""
    held: TensorSpec
    """Of the tensor, as this rank holds it."""
    at: int
    """Where in that the rows begin, in bytes."""


def row_bytes(spec: TensorSpec) -> int:
    """Return the bytes of one row."""
    return spec.num_bytes // max(1, spec.shape[_dim(spec)] if spec.shape else 1)


def whole_rows(spec: TensorSpec, span: Span) -> Span:
    """Return the rows that lie in a span; an empty span where there is none."""
    size = row_bytes(spec)
    begin, end = span[0] + -span[0] % size, span[1] - span[1] % size
    return (begin, max(begin, end))


def rows_of(spec: TensorSpec, span: Span) -> TensorSpec:
    """Return the spec of whole rows."""
    if span == (0, spec.num_bytes):
        return spec
    size, dim = row_bytes(spec), _dim(spec)
    shape = (*spec.shape[:dim], (span[1] - span[0]) // size, *spec.shape[dim + 1 :])
    offset = (*spec.begin[:dim], spec.begin[dim] + span[0] // size, *spec.begin[dim + 1 :])
    return spec._replace(shape=shape, global_shape=spec.whole_shape, offset=offset)


def overlaps(spans: Sequence[Span], others: Sequence[Span]) -> Iterator[tuple[int, Span]]:
    """Yield what each of the others, by its index, shares with a span. Both lie in order."""
    at = 0
    for index, (low, high) in enumerate(others):
        while at < len(spans) and spans[at][1] <= low:
            at += 1
        here = at
        while here < len(spans) and spans[here][0] < high:
            yield index, (max(spans[here][0], low), min(spans[here][1], high))
            here += 1


def gaps(size: int, taken: Sequence[Span]) -> list[Span]:
    """Return what of `size` bytes is in none of the spans, which are in order."""
    edges = [0, *(edge for span in taken for edge in span), size]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]


def written_specs(
    specs: Sequence[TensorSpec], referred: Collection[str], parts: Mapping[str, Sequence[Span]]
) -> Sequence[TensorSpec]:
    """Return what a rank writes, in the order of its file: all but the `referred`, and of `parts` only these rows.

    A function of what rank 0 is told, too. Several parts of one name come in the order of their rows.
    """
    if not parts:
        return [spec for spec in specs if spec.name not in referred] if referred else specs
    found = []
    for spec in specs:
        if spec.name in parts:
            found += [rows_of(spec, span) for span in parts[spec.name]]
        elif spec.name not in referred:
            found.append(spec)
    return file_order(found)


def cut_parts(specs: Sequence[TensorSpec], held_specs: Sequence[TensorSpec], taken: Collection[str]) -> list[Part]:
    """Return `written_specs` under names that stand once in a file, and are none of the `taken`: `name[8:16]`.

    `held_specs` are what they were made of.
    """
    found, by_name = [], {spec.name: spec for spec in held_specs}
    for spec in specs:
        held = by_name[spec.name]
        if spec is held:
            found.append(Part(spec, held, 0))
            continue
        dim = _dim(held)
        first = spec.begin[dim]
        label = f"{spec.name}[{first}:{first + spec.shape[dim]}]"
        while label in taken:
            label += "'"
        found.append(Part(spec._replace(name=label), held, (first - held.begin[dim]) * row_bytes(held)))
    return found


def _dim(spec: TensorSpec) -> int:
    return next((dim for dim, size in enumerate(spec.shape) if size > 1), 0)
