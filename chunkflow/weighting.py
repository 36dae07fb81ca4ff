"""How much each target counts. Every loss here is a weighted sum over tokens divided by one number of the step, so that
neither packing, ranks nor the size of chunks can change it.

    token       the mean over the step's targets
    sequence    the mean over the step's sequences of the mean over their targets
    longalign   the same sum, divided by `global_batch` always, so that every sequence of an epoch counts the same in a
                last step that is smaller, too (LongAlign, arXiv 2401.18058, section 3.2: its loss weighting undoes what
                packing does to short sequences)
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from chunkflow.errors import PlanError, SourceError
from chunkflow.sources import Sample, Selection, Source, manifest_of

WEIGHTINGS = ("token", "sequence", "longalign")
_OF_SEQUENCES = ("dpo", "ipo", "kto", "orpo", "simpo", "cpo", "bco", "ppo", "grpo", "rloo", "reward", "contrastive")


def check_weighting(name: str) -> None:
    """Raise PlanError on a weighting that there is not, with the reason where it is a loss over whole sequences."""
    if name.lower() in _OF_SEQUENCES:
        raise PlanError(
            f"weighting is {name!r}, a loss over whole sequences: it puts sums over tokens through a function that is "
            f"not linear, and chunks add up only what is a sum over tokens; choose one of {', '.join(WEIGHTINGS)}"
        )
    if name not in WEIGHTINGS:
        raise PlanError(f"weighting is {name!r}; it must be one of {', '.join(WEIGHTINGS)}")


def weighted(source: Source, weighting: str) -> Source:
    """Return the source with its loss weights as a weighting has them."""
    check_weighting(weighting)
    return source if weighting == "token" else PerSequence(source)


def denominator_of(weights: np.ndarray, weighting: str, global_batch: int) -> float:
    """Return what the weighted sum of a step is divided by; `weights` float64 [samples of the step]."""
    if weighting == "longalign":
        return float(global_batch) if weights.any() else 0.0
    # fsum: exact, so every rank gets the same bits whatever its machine's vector width.
    return math.fsum(weights.tolist())


def check_denominator(denominator: float, step: int, samples: np.ndarray) -> None:
    """Raise SourceError when there is nothing to divide the losses of a step by; `samples` are its own, int64 [N]."""
    if not 0 < denominator < math.inf:
        raise SourceError(
            f"the loss weights of step {step} are {denominator} in sum (samples {samples[:8].tolist()} ...); "
            "a step needs at least one target with a weight above 0: leave such samples out, or raise global_batch"
        )


class PerSequence:
    """Another source whose loss weights add up to 1 in every sample that has any; a `Source`."""

    def __init__(self, base: Source) -> None:
        self._base = base
        self.description = {**base.description, "weighting": "each sequence 1"}
        self.manifest = manifest_of(self.description)
        self.lengths = base.lengths
        self.weights = (np.asarray(base.weights) > 0).astype(np.float64)
        self.min_token_id, self.max_token_id = base.min_token_id, base.max_token_id
        self.skipped = base.skipped
        self.open_ended = getattr(base, "open_ended", False)

    def __len__(self) -> int:
        return len(self._base)

    def read(self, index: int) -> Sample:
        """Return one sample."""
        sample = self._base.read(index)
        total = sample.loss_weights.sum(dtype=np.float64)
        weights = sample.loss_weights / total if total > 0 else sample.loss_weights
        return Sample(sample.input_ids, sample.shift_labels, weights.astype(np.float32))

    def select(self, indices: Iterable[int]) -> Selection:
        """Return these samples, in this order."""
        return Selection(self, indices)
