"""What a loader needs of a data set, and how one sample looks. L: tokens of one sample.

A target belongs to the token *before* it (labels are shifted here, before anything is split), so a border between two
chunks loses none.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import xxhash

from chunkflow.errors import SourceError

NO_TARGET = -100
"""A label that is no target, as torch's and transformers' losses have it."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample, whole."""

    input_ids: np.ndarray
    """int64 [L]."""
    shift_labels: np.ndarray
    """int64 [L]: the target of each token, i.e. the token after it; NO_TARGET where there is none, and at the end."""
    loss_weights: np.ndarray
    """float32 [L]: 0 wherever shift_labels is NO_TARGET."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """Samples that a source left out, for one reason."""

    reason: str
    count: int
    examples: tuple[str, ...]
    """The first few by name."""

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.examples) else ""
        return f"{self.count} left out, {self.reason}: {', '.join(self.examples)}{more}"


class Source(Protocol):
    """A data set of tokenized samples, the same on every rank, read by index from any thread."""

    @property
    def manifest(self) -> str:
        """Digest of what the data set is: another value, another data set."""
        ...

    @property
    def description(self) -> Mapping[str, Any]:
        """The named parts that the manifest is made from, as JSON values; they tell how two manifests differ."""
        ...

    @property
    def lengths(self) -> np.ndarray:
        """Return int64 [samples], in tokens."""
        ...

    @property
    def weights(self) -> np.ndarray:
        """Return float64 [samples], the sum of each sample's loss weights."""
        ...

    @property
    def min_token_id(self) -> int:
        """No token and no target is smaller."""
        ...

    @property
    def max_token_id(self) -> int:
        """No token and no target is larger: a model's vocabulary must be."""
        ...

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Samples of the files that are not samples here."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> Sample:
        """Return one sample; raises SourceError when it cannot be read."""
        ...

    def select(self, indices: Iterable[int]) -> Source:
        """Return these samples, in this order, as a source with a manifest of its own."""
        ...


def is_source(data: object) -> bool:
    """Whether something has what a `Source` has."""
    return all(hasattr(data, name) for name in ("manifest", "description", "lengths", "weights", "read", "select"))


def require_source(data: object) -> None:
    """Raise SourceError, with what makes one, for what is no `Source`."""
    if not is_source(data):
        raise SourceError(
            f"{type(data).__name__} is no source: open_source(data, tokenizer) makes one of a path, a name on the Hub "
            "or a datasets.Dataset, MemorySource of a list of Samples, and StreamLoader trains an IterableDataset"
        )


def shifted(input_ids: np.ndarray, labels: np.ndarray | None) -> Sample:
    """Return the sample of tokens [L] and unshifted labels [L] (None: every token), each target counting 1."""
    shift_labels = np.full(len(input_ids), NO_TARGET, dtype=np.int64)
    shift_labels[:-1] = (input_ids if labels is None else labels)[1:]
    return Sample(input_ids.astype(np.int64), shift_labels, (shift_labels != NO_TARGET).astype(np.float32))


def manifest_of(description: Mapping[str, Any]) -> str:
    """Return the xxh3 hex digest of a description."""
    return xxhash.xxh3_128_hexdigest(json.dumps(description, sort_keys=True, ensure_ascii=True).encode())


def fetch(source: Source, index: int) -> Sample:
    """Return `source.read(index)`, checked against what the source said of it.

    Raises SourceError: a plan made from the announced length and weight would train something else.
    """
    sample = source.read(index)
    length, weight = int(source.lengths[index]), float(source.weights[index])
    shapes = {sample.input_ids.shape, sample.shift_labels.shape, sample.loss_weights.shape}
    if shapes != {(length,)}:
        raise SourceError(
            f"sample {index} was announced with {length} tokens and read with arrays of shape {sorted(shapes)}; "
            "the data changed while it was used, or the source's lengths are wrong"
        )
    no_target = sample.shift_labels == NO_TARGET
    open_ended = getattr(
        source, "open_ended", False
    )  # a piece of a sample ends with a target: the token behind the cut
    if not (no_target[-1] or open_ended) or sample.loss_weights[no_target].any():
        raise SourceError(
            f"sample {index} has a target at its last token, or a loss weight where there is no target; "
            f"shift_labels must end in {NO_TARGET}, and weights be 0 wherever it stands"
        )
    read_weight = float(sample.loss_weights.sum(dtype=np.float64))
    if abs(read_weight - weight) > 1e-6 * max(1.0, abs(weight)):
        raise SourceError(
            f"sample {index} was announced with loss weights of {weight} in sum and read with {read_weight}; "
            "the data changed while it was used, or the source's weights are wrong"
        )
    return sample


class Selection:
    """Some samples of another source, in a given order; a `Source`.

    The token id bounds and the skipped samples are the base's.
    """

    def __init__(self, base: Source, indices: Iterable[int]) -> None:
        self._base = base
        self._indices = _checked_indices(indices, len(base))
        digest = xxhash.xxh3_128_hexdigest(self._indices.tobytes())
        self.description: Mapping[str, Any] = {**base.description, "select": f"{len(self._indices)} samples, {digest}"}
        if "select" in base.description:  # a selection of a selection: keep both in the manifest
            self.description["select"] += f" of {base.description['select']}"
        self.manifest = manifest_of(self.description)
        self.lengths = base.lengths[self._indices]
        self.weights = base.weights[self._indices]
        self.min_token_id = base.min_token_id
        self.max_token_id = base.max_token_id
        self.skipped = base.skipped
        self.open_ended = getattr(base, "open_ended", False)

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> Sample:
        """Return one sample, by its place in the selection."""
        return self._base.read(int(self._indices[index]))

    def select(self, indices: Iterable[int]) -> Selection:
        """Return a selection of this selection."""
        return Selection(self, indices)


def _checked_indices(indices: Iterable[int], num_samples: int) -> np.ndarray:
    array = np.asarray(indices if isinstance(indices, np.ndarray | range) else list(indices))
    if array.size == 0:
        raise SourceError("a selection of 0 samples was asked for; a source needs at least one")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise SourceError(f"a selection needs a flat list of whole numbers, and got {array.dtype} of {array.shape}")
    if array.min() < 0 or array.max() >= num_samples:
        raise SourceError(
            f"a selection asks for samples {array.min()} to {array.max()}; this source has 0 to {num_samples - 1}"
        )
    return array.astype(np.int64)
