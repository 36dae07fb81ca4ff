"""A trainer's data set as a `Source`: each row through the trainer's own collator, alone, so its labels are its own.

L tokens of one row
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xxhash
from torch import Tensor

from chunkflow.errors import SourceError
from chunkflow.sources import NO_TARGET, Sample, Selection, Skipped, manifest_of


class CollatedRows:
    """`Source` over `rows[0 .. n]`, each a mapping of columns, made into `input_ids` and `labels` by `collate([row])`.

    Lengths and numbers of targets are found by one pass over all rows. A row that is another one when it is read again
    (a data set that changes, a collator that draws labels at random) is an error that names it.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], collate: Callable[[list[Any]], Mapping[str, Any]]) -> None:
        require_rows(rows)
        if len(rows) == 0:
            raise SourceError("the data set has no rows; a source needs at least one")
        self._rows, self._collate = rows, collate
        digests = np.zeros(len(rows), dtype=np.uint64)
        lengths, weights, low, high = [], [], [], []
        for index in range(len(rows)):
            sample = self._sample(index)
            digests[index] = _digest(sample)
            lengths.append(len(sample.input_ids))
            weights.append(float(sample.loss_weights.sum()))
            low.append(int(sample.input_ids.min()))
            high.append(int(max(sample.input_ids.max(), sample.shift_labels.max())))
        self.lengths, self.weights = np.array(lengths, dtype=np.int64), np.array(weights)
        self.min_token_id, self.max_token_id = min(low), max(high)
        self._digests = digests
        digest = xxhash.xxh3_128_hexdigest(digests.tobytes())
        self.description: Mapping[str, Any] = {"kind": "rows", "rows": len(rows), "digest": digest}
        self.manifest = manifest_of(self.description)
        self.skipped: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Sample:
        """Return one row as a sample; raises SourceError, naming it, when it is not what it was."""
        sample = self._sample(index)
        if _digest(sample) != self._digests[index]:
            raise SourceError(
                f"row {index} has other tokens or labels than when it was first read; the data set changed, or its "
                "collator draws at random: give one that does not, or fix the labels beforehand"
            )
        return sample

    def _sample(self, index: int) -> Sample:
        """Return one row as a sample; raises SourceError, naming it, when the collator gives no labels."""
        row = self._collate([self._rows[index]])
        if "input_ids" not in row or "labels" not in row:
            raise SourceError(
                f"row {index} is {sorted(row)} after the collator; it needs input_ids and labels: give a tokenized "
                "data set and a collator for causal language models, such as DataCollatorForLanguageModeling(mlm=False)"
            )
        ids, labels = (_flat(row[name]) for name in ("input_ids", "labels"))
        if "attention_mask" in row:  # padding to a multiple, which chunks have no use for
            kept = _flat(row["attention_mask"]) != 0
            ids, labels = ids[kept], labels[kept]
        if len(ids) == 0:
            raise SourceError(f"row {index} has no tokens; leave empty rows out")
        shifted = np.append(labels[1:], NO_TARGET)
        return Sample(ids, shifted, (shifted != NO_TARGET).astype(np.float32))

    def select(self, indices: Iterable[int]) -> Selection:
        """Return these rows, in this order."""
        return Selection(self, indices)


def require_rows(data: object) -> None:
    """Raise SourceError, with what to do, for a data set that is not read by index."""
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise SourceError(
            f"{type(data).__name__} is not read by index, and chunks are planned from the lengths of all samples: make "
            "a datasets.Dataset of it (Dataset.from_generator), or train it with StreamLoader in a loop of your own"
        )


def _digest(sample: Sample) -> int:
    return xxhash.xxh3_64_intdigest(sample.input_ids.tobytes() + sample.shift_labels.tobytes())


def _flat(value: Any) -> np.ndarray:
    """Return int64 [L] of a batch of one row."""
    array = value.numpy() if isinstance(value, Tensor) else np.asarray(value)
    return array.reshape(-1).astype(np.int64)
