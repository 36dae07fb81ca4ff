"""Samples that are in memory already, tokenized by somebody else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import xxhash

from chunkflow.errors import SourceError
from chunkflow.sources import NO_TARGET, Sample, Selection, Skipped, manifest_of


class MemorySource:
    """A list of `Sample`s as a `Source`; every rank has to hold the same list. L tokens of one sample.

    Raises SourceError on an empty list, or a sample of fewer than 2 tokens, which has no target.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = tuple(samples)
        for number, sample in enumerate(self._samples):
            _check_arrays(number, sample)
        self.lengths = np.array([len(s.input_ids) for s in self._samples], dtype=np.int64)
        if len(self._samples) == 0 or self.lengths.min() < 2:
            where = (
                f"sample {self.lengths.argmin()} has {self.lengths.min()} tokens"
                if len(self._samples)
                else "no samples"
            )
            raise SourceError(f"{where}; a source needs at least one sample, and each of them 2 tokens or more")
        self.weights = np.array([s.loss_weights.sum(dtype=np.float64) for s in self._samples])
        bounds = [_bounds(sample) for sample in self._samples]
        self.min_token_id = min(low for low, _ in bounds)
        self.max_token_id = max(high for _, high in bounds)
        digest = xxhash.xxh3_128()
        for sample in self._samples:
            for array in (sample.input_ids, sample.shift_labels, sample.loss_weights):
                digest.update(np.ascontiguousarray(array).tobytes())
        self.description = {"kind": "memory", "samples": len(self._samples), "contents": digest.hexdigest()}
        self.manifest = manifest_of(self.description)
        self.skipped: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, index: int) -> Sample:
        """Return one sample."""
        return self._samples[index]

    def select(self, indices: Iterable[int]) -> Selection:
        """Return some of the samples, in a given order."""
        return Selection(self, indices)


def _check_arrays(number: int, sample: Sample) -> None:
    for name in ("input_ids", "shift_labels"):
        array = getattr(sample, name)
        if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iu":
            got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
            raise SourceError(f"sample {number}: {name} is {got}; it must be a flat numpy array of whole numbers")
    weights = sample.loss_weights
    if not isinstance(weights, np.ndarray) or weights.dtype.kind != "f" or not np.isfinite(weights).all():
        raise SourceError(f"sample {number}: loss_weights must be a numpy array of finite floats")
    if len(weights) and weights.min() < 0:
        raise SourceError(f"sample {number}: a loss weight is {weights.min()}; it must be 0 or more")


def _bounds(sample: Sample) -> tuple[int, int]:
    """Return the smallest and the largest token or target."""
    ids = np.concatenate([sample.input_ids, sample.shift_labels[sample.shift_labels != NO_TARGET]])
    return int(ids.min()), int(ids.max())
