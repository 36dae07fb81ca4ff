"""What a plan is made from, checked: samples and their lengths as arrays, or an error that names the sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import index

import numpy as np

from chunkflow.errors import PlanError
from chunkflow.layout import Ints
from chunkflow.records import MAX_SAMPLE_TOKENS


def checked(
    samples: Sequence[int] | Ints, lengths: Mapping[int, int] | Sequence[int] | Ints, max_tokens: int | None
) -> tuple[Ints, Ints]:
    """Return samples and lengths as int64 [N]. Raises PlanError, naming the sample, on what cannot be planned."""
    if isinstance(lengths, Mapping):
        lengths = _in_order(samples, lengths)
    if len(lengths) != len(samples):
        raise PlanError(f"{len(lengths)} lengths for {len(samples)} samples; give one length a sample")
    if len(samples) == 0:
        raise PlanError("a step of no samples cannot be planned; draw at least one")
    numbers, tokens = _integers("samples", samples), _integers("lengths", lengths)
    ordered = np.sort(numbers)
    if (again := np.flatnonzero(ordered[1:] == ordered[:-1])).size:
        twice = int(ordered[again[0]])
        times = int(np.count_nonzero(numbers == twice))
        raise PlanError(f"sample {twice} stands {times} times in one step; a sample can occur only once")
    check_lengths(tokens, max_tokens, numbers)
    return numbers, tokens


def check_lengths(tokens: Ints, max_tokens: int | None = None, numbers: Ints | None = None) -> None:
    """Raise PlanError at the first length that no plan can have; `numbers` are the samples, if not 0, 1, 2, ..."""
    most = MAX_SAMPLE_TOKENS if max_tokens is None else max_tokens
    for wrong in (tokens < 1, tokens > most):
        if wrong.any():
            at = int(wrong.argmax())
            number, length = (at if numbers is None else int(numbers[at])), int(tokens[at])
            raise PlanError(f"sample {number} has {length} tokens; {_what_to_do(length, most)}")


def _what_to_do(length: int, most: int) -> str:
    if length < 1:
        return "it needs at least 1: drop it before planning"
    if most == MAX_SAMPLE_TOKENS:
        return f"at most {most} can be counted in 32 bits: divide it"
    return (
        f"max_tokens, what fits into memory with its keys and values, is {most}: raise it, or choose an overflow "
        "policy that cuts or drops longer samples"
    )


def _in_order(samples: Sequence[int] | Ints, lengths: Mapping[int, int]) -> list[int]:
    missing = [sample for sample in samples if sample not in lengths]
    if missing:
        raise PlanError(f"sample {missing[0]} has no length; give a length for every sample of the step")
    return [lengths[sample] for sample in samples]


def _integers(name: str, values: Sequence[int] | Ints) -> Ints:
    try:
        if isinstance(values, np.ndarray):
            return values.astype(np.int64, casting="safe")
        return np.array([index(value) for value in values], dtype=np.int64)
    except (TypeError, OverflowError) as error:
        raise PlanError(f"{name} must be whole numbers of at most 64 bits: {error}") from error
