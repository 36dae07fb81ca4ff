"""The token store: samples in one memory-mapped arrow file, their lengths and weights beside it.

`datasets.Dataset.from_file` opens that file, too; it is not used here, as every rank would wait for its import.

    tokens.arrow   input_ids: large_list<int32>, labels: large_list<int32> or null (then the labels are the tokens)
    lengths.npy    int64 [samples]
    weights.npy    float64 [samples]
    index.json     written last: the description, the bounds, what was skipped, and a digest of each file above

Whatever does not match its digest is no store: `is_whole` says so, and the cache builds it again.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from chunkflow.errors import SourceError
from chunkflow.records import MAX_SAMPLE_TOKENS
from chunkflow.sources import NO_TARGET, Sample, Selection, Skipped, manifest_of, shifted

FORMAT_VERSION = 1
_TOKENS, _LENGTHS, _WEIGHTS, _INDEX = "tokens.arrow", "lengths.npy", "weights.npy", "index.json"
_FILES = {_TOKENS, _LENGTHS, _WEIGHTS}
_SCHEMA = pa.schema({name: pa.large_list(pa.int32()) for name in ("input_ids", "labels")})
_BATCH_TOKENS, _BATCH_ROWS = 1 << 20, 1000


@dataclass(frozen=True, slots=True)
class Row:
    """One sample on its way into the store."""

    name: str
    """Where it came from: a file, or a file and a line."""
    input_ids: np.ndarray
    """Integers [L]."""
    labels: np.ndarray | None = None
    """Integers [L], not shifted, NO_TARGET allowed; None when every token is a target."""
    skip: str | None = None
    """Why the sample is left out; None when it is not, or for the store to find out."""


class StoredSource:
    """A data set in a whole token store; a `Source`."""

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / _INDEX).read_text())
        self.folder = folder
        self.manifest: str = index["manifest"]
        self.description: Mapping[str, Any] = index["description"]
        self.min_token_id: int = index["min_token_id"]
        self.max_token_id: int = index["max_token_id"]
        self.skipped = tuple(Skipped(s["reason"], s["count"], tuple(s["examples"])) for s in index["skipped"])
        self.lengths: np.ndarray = np.load(folder / _LENGTHS, mmap_mode="r")
        self.weights: np.ndarray = np.load(folder / _WEIGHTS, mmap_mode="r")
        table = pa.ipc.open_stream(pa.memory_map(str(folder / _TOKENS))).read_all()
        self._input_ids, self._labels = table.column("input_ids"), table.column("labels")

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, index: int) -> Sample:
        """Return one sample."""
        if not 0 <= index < len(self):
            raise IndexError(f"there is no sample {index}; this source has 0 to {len(self) - 1}")
        input_ids, labels = self._input_ids[index], self._labels[index]
        return shifted(input_ids.values.to_numpy(), labels.values.to_numpy() if labels.is_valid else None)

    def select(self, indices: Iterable[int]) -> Selection:
        """Return these samples, in this order."""
        return Selection(self, indices)


class _Tally:
    """What is kept of each sample outside the arrow file, at 16 bytes a sample."""

    def __init__(self) -> None:
        self.lengths, self.weights = array("q"), array("d")
        self.min_token_id, self.max_token_id = MAX_SAMPLE_TOKENS, 0
        self._skipped: dict[str, tuple[int, list[str]]] = {}

    def add(self, row: Row) -> bool:
        """Count a sample in, or out; True when it is in."""
        reason = row.skip or why_skip(row)
        if reason is not None:
            count, examples = self._skipped.get(reason, (0, []))
            self._skipped[reason] = (count + 1, [*examples, row.name] if count < 5 else examples)
            return False
        for ids in (row.input_ids, row.labels):
            if ids is not None:
                self._bound(row.name, ids[ids != NO_TARGET] if ids is row.labels else ids)
        self.lengths.append(len(row.input_ids))
        self.weights.append(_num_targets(row))
        return True

    def _bound(self, name: str, ids: np.ndarray) -> None:
        low, high = int(ids.min(initial=MAX_SAMPLE_TOKENS)), int(ids.max(initial=0))
        if low < 0 or high >= 2**31:
            raise SourceError(f"{name}: token ids go from {low} to {high}; they must be 0 to {2**31 - 1}")
        self.min_token_id, self.max_token_id = min(self.min_token_id, low), max(self.max_token_id, high)

    def skipped(self) -> tuple[Skipped, ...]:
        return tuple(Skipped(reason, count, tuple(names)) for reason, (count, names) in self._skipped.items())


def check_length(name: str, num_tokens: int) -> None:
    """Raise SourceError on a sample too long to be counted in int32."""
    if num_tokens > MAX_SAMPLE_TOKENS:
        raise SourceError(f"{name} has {num_tokens} tokens; a sample may have {MAX_SAMPLE_TOKENS}, so divide it")


def _num_targets(row: Row) -> int:
    return int((row.labels[1:] != NO_TARGET).sum()) if row.labels is not None else max(len(row.input_ids) - 1, 0)


def why_skip(row: Row) -> str | None:
    """Return why there is nothing to train in a row, None when there is."""
    check_length(row.name, len(row.input_ids))
    if len(row.input_ids) < 2:
        return "fewer than 2 tokens, so nothing to predict"
    return None if _num_targets(row) else "no label is a target"


def write_store(folder: Path, rows: Iterable[Row], *, description: Mapping[str, Any], manifest: str) -> None:
    """Write a store into an empty folder; raises SourceError when no sample is left."""
    tally = _Tally()
    with pa.OSFile(str(folder / _TOKENS), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
        for batch in _batches(row for row in rows if tally.add(row)):
            columns = [_lists([row.input_ids for row in batch]), _lists([row.labels for row in batch])]
            writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
    if not tally.lengths:
        raise SourceError("; ".join(["there is no sample to train on", *map(str, tally.skipped())]))
    np.save(folder / _LENGTHS, np.frombuffer(tally.lengths, dtype=np.int64))
    np.save(folder / _WEIGHTS, np.frombuffer(tally.weights, dtype=np.float64))
    index = {
        "format_version": FORMAT_VERSION,
        "manifest": manifest,
        "description": description,
        "min_token_id": tally.min_token_id,
        "max_token_id": tally.max_token_id,
        "skipped": [asdict(skipped) for skipped in tally.skipped()],
        "files": {name: digest_file(folder / name) for name in sorted(_FILES)},
    }
    (folder / _INDEX).write_text(json.dumps(index, indent=1))


def _lists(rows: Sequence[np.ndarray | None]) -> pa.Array:
    """Return arrow's column of lists, null where there is none."""
    some = [row for row in rows if row is not None]
    values = np.concatenate(some, dtype=np.int32, casting="unsafe") if some else np.empty(0, dtype=np.int32)
    ends = np.cumsum([0, *(0 if row is None else len(row) for row in rows)], dtype=np.int64)
    none = np.packbits([row is None for row in rows], bitorder="little")
    mask = pa.Array.from_buffers(pa.bool_(), len(rows), [None, pa.py_buffer(none)])
    return pa.LargeListArray.from_arrays(_array(ends, pa.int64()), _array(values, pa.int32()), mask=mask)


def _array(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Return arrow's view of numbers; `pa.array` would import pandas, to see that they are none of its own."""
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    num_tokens = 0
    for row in rows:
        batch.append(row)
        num_tokens += len(row.input_ids)
        if num_tokens >= _BATCH_TOKENS or len(batch) == _BATCH_ROWS:
            yield batch
            batch, num_tokens = [], 0
    if batch:
        yield batch


def is_whole(folder: Path, *, manifest: str) -> bool:
    """Tell whether this folder holds the store of that manifest, undamaged. Reads every byte once, to be sure of it."""
    try:
        index = json.loads((folder / _INDEX).read_text())
        expected = (FORMAT_VERSION, manifest, manifest_of(index["description"]))
        if expected != (index["format_version"], index["manifest"], manifest) or set(index["files"]) != _FILES:
            return False
        return all(digest_file(folder / name) == digest for name, digest in index["files"].items())
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def digest_file(path: Path) -> str:
    """Return the xxh3 hex digest of a file's bytes."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
