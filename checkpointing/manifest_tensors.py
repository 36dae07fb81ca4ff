"""The table of tensors in a manifest: read strictly. Pure; all raise IntegrityError naming the tensor.

Format 1 holds whole tensors, each with one hash of its own. From format 2 on an entry may be a slice, and the hashes of
the pieces stand with the files: one string a file, its tensors in the order of their bytes.

A table as the writer writes it is taken apart by one pattern and looked at column by column, in a third of the time.
Only where something is odd does it go through JSON and is each entry looked at by itself, to name what is wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain, pairwise, repeat
from math import prod
from operator import attrgetter, eq, le, sub
from typing import Any

import numpy as np

from checkpointing.dtypes import ITEMSIZES, itemsize
from checkpointing.errors import IntegrityError
from checkpointing.manifest_fields import read_dims, read_hash, read_list, read_number, read_record, read_text
from checkpointing.records import FileEntry, TensorEntry

FIELDS = ("name", "dtype", "global_shape", "offset", "shape", "file", "begin", "end")
_MAX_COMPARISONS = 2 * 10**6
_TEXT = "{" + ",".join(f'"{name}":%s' for name in FIELDS) + "}"
_quoted = json.encoder.encode_basestring_ascii
_FIELDS_1 = (*FIELDS, "xxh3_64")
_INTS = {int}
_DIMS = r"\[([0-9,]*)\]"
_ROW_PATTERNS = (r'"([^"\\\x00-\x1f]+)"', '"([A-Z0-9_]+)"', _DIMS, _DIMS, _DIMS, '"([A-Za-z0-9._-]+)"') + (
    "([1-9][0-9]{0,18})",
) * 2
_ROW = re.compile(
    r"\{" + ",".join(f'"{name}":{one}' for name, one in zip(FIELDS, _ROW_PATTERNS, strict=True)) + r"\}(?:,|\Z)"
)
_ROW_LENGTH = len(_TEXT % (*['""'] * 2, *["[]"] * 3, '""', "", "")) + 1
_place = attrgetter("file", "begin", "end", "name")
_Columns = Sequence[Sequence[Any]]
"""The fields of all entries but their hashes, or nothing where there are no entries."""
_NO_COLUMNS: _Columns = ((),) * len(FIELDS)
_Dims = dict[tuple[int, ...], tuple[int, ...]]
"""Shapes and offsets that were found right: most tensors have one that another has, too."""


def tensor_text(entry: TensorEntry) -> str:
    """Return an entry as JSON, without its hashes. By hand: the encoder takes several times as long."""
    name, dtype, whole, offset, shape, file, begin, end, _ = entry
    shapes = (_dims_text(whole), _dims_text(offset), _dims_text(shape))
    return _TEXT % (_quoted(name), f'"{dtype}"', *shapes, f'"{file}"', begin, end)


@lru_cache(1024)
def _dims_text(dims: tuple[int, ...]) -> str:
    return f"[{','.join(map(str, dims))}]"


def read_tensors_1(body: Mapping[str, Any], files: Sequence[FileEntry]) -> tuple[TensorEntry, ...]:
    """Return the tensors of a format-1 manifest."""
    lengths, dims = {file.path: file.length for file in files}, _Dims()
    tensors = []
    for record in read_list(body, "tensors"):
        found = read_record(record, "TensorEntry", _FIELDS_1)
        tensor = _tensor(found, lengths, dims)
        hash_ = read_hash(found["xxh3_64"], tensor.name)
        if (tensor.global_shape, tensor.offset) != (tensor.shape, (0,) * len(tensor.shape)):
            raise IntegrityError(f"manifest: tensor {tensor.name!r} is a slice; format 1 holds whole tensors")
        tensors.append(_with_hashes(tensor, (hash_,) if tensor.end > tensor.begin else ()))
    check_table(tensors)
    return tuple(tensors)


def read_tensors(
    body: Mapping[str, Any], files: Sequence[FileEntry], pieces: Mapping[str, str], piece_bytes: int
) -> tuple[TensorEntry, ...]:
    """Return the tensors of a manifest; `pieces` are the hashes of each file, one behind the other."""
    lengths, dims = {file.path: file.length for file in files}, _Dims()
    tensors = [_tensor(read_record(one, "TensorEntry", FIELDS), lengths, dims) for one in read_list(body, "tensors")]
    return _hashed(_columns(tensors), pieces, piece_bytes)


def rows_of(table: str) -> list[tuple[str, ...]] | None:
    """Return the fields of each entry, as text, of a table in the writer's form, without its brackets; else None."""
    rows = _ROW.findall(table)
    if not rows:
        return None if table else []
    # What the pattern skipped is missed in the sum.
    length = sum(map(len, chain.from_iterable(rows))) + len(rows) * _ROW_LENGTH - 1
    return rows if length == len(table) else None


def read_rows(
    rows: Sequence[tuple[str, ...]], files: Sequence[FileEntry], pieces: Mapping[str, str], piece_bytes: int
) -> tuple[TensorEntry, ...]:
    """Return what `read_tensors` does. Where that would refuse an entry the IntegrityError does not say which."""
    if not rows:
        return _hashed((), pieces, piece_bytes)
    lengths = {file.path: file.length for file in files}
    names, dtypes, *dims, paths, begin_texts, end_texts = zip(*rows, strict=True)
    begins, ends = [*map(int, begin_texts)], [*map(int, end_texts)]
    try:
        known = {text: read_dims(json.loads(f"[{text}]"), "") for text in {*chain(*dims)}}
        shapes = [[*map(known.__getitem__, texts)] for texts in dims]
        sizes = {one: prod(one[1]) * itemsize(one[0]) for one in {*zip(dtypes, shapes[-1], strict=True)}}
        inside = min(begins) >= 8 and all(map(le, ends, map(lengths.__getitem__, paths)))
    except (ValueError, KeyError) as error:
        raise IntegrityError("manifest: a tensor has a shape, dtype or file that cannot be") from error
    said = map(sizes.__getitem__, zip(dtypes, shapes[-1], strict=True))
    if not inside or not all(map(eq, map(sub, ends, begins), said)):
        raise IntegrityError("manifest: a tensor lies outside of its file, or has another size than its shape")
    return _hashed((names, dtypes, *shapes, paths, begins, ends), pieces, piece_bytes)


def hashes_of_files(tensors: Iterable[TensorEntry], paths: Iterable[str]) -> dict[str, str]:
    """Return the hashes of each file, one behind the other, as `read_tensors` takes them."""
    found: dict[str, list[str]] = {path: [] for path in paths}
    for tensor in sorted(tensors, key=_place):
        found[tensor.file].extend(tensor.hashes)
    return {path: "".join(hashes) for path, hashes in found.items()}


def _hashed(columns: _Columns, pieces: Mapping[str, str], piece_bytes: int) -> tuple[TensorEntry, ...]:
    """Return the entries with their hashes, once the table is found right."""
    order = _check_columns(columns)
    names, _, _, _, _, files, begins, ends = columns or _NO_COLUMNS
    found: list[tuple[str, ...]] = [()] * len(names)
    done = dict.fromkeys(pieces, 0)
    for index in order:
        file, begin, end = files[index], begins[index], ends[index]
        first, text = done[file], pieces[file]
        done[file] = last = first + 16 * (-(-end // piece_bytes) - begin // piece_bytes if end > begin else 0)
        if last > len(text):
            raise IntegrityError(f"manifest: {file} has too few hashes for tensor {names[index]!r}")
        found[index] = (
            (*(text[i : i + 16] for i in range(first, last, 16)),) if last - first != 16 else (text[first:last],)
        )
    for path, end in done.items():
        if end != len(pieces[path]):
            raise IntegrityError(f"manifest: {path} has {len(pieces[path])} hex digits of hashes, and needs {end}")
    return tuple(map(TensorEntry, *(columns or _NO_COLUMNS), found))


def _tensor(found: Mapping[str, Any], lengths: Mapping[str, int], dims: _Dims) -> TensorEntry:
    name, dtype, file = read_text(found, "name"), read_text(found, "dtype"), read_text(found, "file")
    global_shape = _dims(found["global_shape"], name, dims)
    offset, shape = _dims(found["offset"], name, dims), _dims(found["shape"], name, dims)
    begin, end = read_number(found["begin"], "begin", 8, name), read_number(found["end"], "end", 8, name)
    if dtype not in ITEMSIZES:
        raise IntegrityError(f"manifest: tensor {name!r} has the dtype {dtype!r}; upgrade longrail, or it is damaged")
    if file not in lengths or end > lengths[file]:
        raise IntegrityError(f"manifest: tensor {name!r} lies outside of the files: {file!r}, bytes {begin}..{end}")
    if end - begin != prod(shape) * itemsize(dtype):
        raise IntegrityError(f"manifest: tensor {name!r}, {dtype} {list(shape)}, cannot have {end - begin} bytes")
    return TensorEntry(name, dtype, global_shape, offset, shape, file, begin, end, ())


def _with_hashes(tensor: TensorEntry, hashes: tuple[str, ...]) -> TensorEntry:
    return TensorEntry(
        tensor.name, tensor.dtype, tensor.global_shape, tensor.offset, tensor.shape, tensor.file, tensor.begin,
        tensor.end, hashes,
    )  # fmt: skip


def _dims(value: Any, name: str, known: _Dims) -> tuple[int, ...]:
    # By type, as 1.0 and True are keys equal to 1.
    if type(value) is list and {*map(type, value)} <= _INTS and (found := known.get(tuple(value))) is not None:
        return found
    made = read_dims(value, name)
    return known.setdefault(made, made)


def check_table(tensors: Sequence[TensorEntry]) -> None:
    """Raise IntegrityError where slices do not tile their whole, or two entries share bytes or a name."""
    _check_columns(_columns(tensors))


def _columns(tensors: Sequence[TensorEntry]) -> _Columns:
    """Return the fields of entries, without their hashes; nothing of nothing."""
    return [*zip(*tensors, strict=True)][:-1]


def _check_columns(columns: _Columns) -> list[int]:
    """Do what `check_table` does; return the indices of the entries in the order of their bytes."""
    if not columns:
        return []
    names, _, global_shapes, offsets, shapes, files, begins, ends = columns
    are_whole = (
        [*global_shapes] == [*shapes] and not any(map(any, offsets)) and [*map(len, offsets)] == [*map(len, shapes)]
    )
    if not are_whole or len({*names}) != len(names):
        by_name: dict[str, list[TensorEntry]] = {}
        for tensor in map(TensorEntry, *columns, repeat(())):
            by_name.setdefault(tensor.name, []).append(tensor)
        for name, slices in by_name.items():
            _check_slices(name, sorted(slices, key=attrgetter("offset")))
    numbers = {file: number for number, file in enumerate(sorted({*files}))}
    places = np.array([[*map(numbers.__getitem__, files)], begins, ends])
    order = np.lexsort(places[::-1])
    file, begin, end = places[:, order]
    overlaps = np.flatnonzero((file[:-1] == file[1:]) & (end[:-1] > begin[1:]))
    if len(overlaps):
        before, after = (int(order[at]) for at in (overlaps[0], overlaps[0] + 1))
        raise IntegrityError(f"manifest: tensors {names[before]!r} and {names[after]!r} overlap in {files[after]}")
    return order.tolist()


def _check_slices(name: str, slices: Sequence[TensorEntry]) -> None:
    """Refuse slices that do not tile the whole."""
    first = slices[0]
    for one in slices:
        if (one.dtype, one.global_shape) != (first.dtype, first.global_shape):
            raise IntegrityError(f"manifest: the slices of tensor {name!r} differ in dtype or global shape")
        inside = len(one.offset) == len(one.shape) == len(one.global_shape) and all(
            at + size <= whole for at, size, whole in zip(one.offset, one.shape, one.global_shape, strict=True)
        )
        if not inside:
            raise IntegrityError(
                f"manifest: tensor {name!r} has a slice of {list(one.shape)} at {list(one.offset)}, outside of "
                f"{list(one.global_shape)}"
            )
    for before, after in pairwise(slices):
        if before.offset == after.offset:
            raise IntegrityError(f"manifest: a tensor stands twice in tensors: {name!r}")
    if sum(prod(one.shape) for one in slices) != prod(first.global_shape) or _any_overlap(slices):
        raise IntegrityError(f"manifest: the slices of tensor {name!r} have gaps or overlap")


def _any_overlap(slices: Sequence[TensorEntry]) -> bool:
    # Along the dim in which they begin at the most places, only those behind `one` that begin before its end can meet
    # it. Ranks cut a tensor into a grid; what takes longer than that is not one of ours, and must not take for ever.
    num_dims = len(slices[0].shape)
    if not num_dims or len(slices) == 1:
        return False
    dim = max(range(num_dims), key=lambda dim: len({one.offset[dim] for one in slices}))
    ordered = sorted(slices, key=lambda one: one.offset[dim])
    left = _MAX_COMPARISONS
    for index, one in enumerate(ordered):
        end = one.offset[dim] + one.shape[dim]
        for at in range(index + 1, len(ordered)):
            other, left = ordered[at], left - 1
            if other.offset[dim] >= end:
                break
            if left < 0:
                raise IntegrityError(f"manifest: tensor {one.name!r} has {len(slices)} slices, too many to check")
            spans = zip(one.offset, one.shape, other.offset, other.shape, strict=True)
            if all(a < c + d and c < a + b for a, b, c, d in spans):
                return True
    return False
