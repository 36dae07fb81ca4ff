"""The cost model, fitted to measured times: an op on T tokens with P pairs takes a + b*T + c*P seconds.

Forward and backward are fitted apart. What a plan needs of it is one ratio, the pair cost: time of a pair over time of
a token, of forward and backward together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from chunkflow.cost import num_pairs
from chunkflow.errors import ChunkflowError
from chunkflow.records import Chunk

Position = TypeVar("Position", int, int | None)
OnOperation = Callable[[str, Chunk, float], None]
"""Called with an op, its chunk and the seconds it took."""

_TERMS = 3
_LEAST = 6
"""Measurements of a kind before it can be fitted."""


@dataclass(frozen=True, slots=True)
class OpTime:
    """Seconds of one kind of op: `fixed + per_token * tokens + per_pair * pairs`."""

    fixed: float
    per_token: float
    per_pair: float
    residual: float
    """Root mean square of (measured - predicted) / measured."""
    count: int
    """Measurements it is fitted to."""

    def seconds(self, tokens: float, pairs: float) -> float:
        """Predict."""
        return self.fixed + self.per_token * tokens + self.per_pair * pairs


@dataclass(frozen=True, slots=True)
class CostModel:
    """What an op takes; prints itself."""

    forward: OpTime
    backward: OpTime

    @property
    def pair_cost(self) -> float:
        """Time of one pair relative to the rest of the work for one token; see `PlannerConfig`."""
        return (self.forward.per_pair + self.backward.per_pair) / self._per_token if self._per_token > 0 else 0.0

    def __str__(self) -> str:
        lines = [
            f"{name}: {1e3 * op.fixed:.3g} ms + {1e6 * op.per_token:.3g} us a token + {1e9 * op.per_pair:.3g} ns a "
            f"pair (residual {op.residual:.1%} over {op.count} ops)"
            for name, op in (("forward", self.forward), ("backward", self.backward))
        ]
        return "\n".join([*lines, f"pair_cost {self.pair_cost_text}"])

    @property
    def pair_cost_text(self) -> str:
        """The ratio for people."""
        if self._per_token > 0:
            return f"{self.pair_cost:.3g}"
        return "not measurable, as the fit finds no time of a token beside that of pairs; try longer chunks"

    @property
    def _per_token(self) -> float:
        return self.forward.per_token + self.backward.per_token


class CostFit:
    """Sums over measurements: 16 numbers a kind, however many there were, that add up over ranks."""

    def __init__(self) -> None:
        self._sums = {kind: np.zeros((_TERMS + 1, _TERMS + 1)) for kind in "FB"}

    def add(self, op: str, chunk: Chunk, seconds: float) -> None:
        """Count one op in (an `OnOperation`)."""
        if seconds > 0:
            # Divided by the time: what counts is the relative error, of small chunks as of large ones.
            row = np.array([1.0, chunk.num_tokens, num_pairs(chunk), seconds]) / seconds
            self._sums["B" if op == "B" else "F"] += np.outer(row, row)

    @property
    def sums(self) -> NDArray[np.float64]:
        """Return float64 [2, 4, 4], to be added up over ranks."""
        return np.stack([self._sums["F"], self._sums["B"]])

    def solve(self, sums: NDArray[np.float64] | None = None) -> CostModel:
        """Return the model of `sums` [2, 4, 4]; by default of this fit's own.

        Raises ChunkflowError when there are too few measurements.
        """
        forward, backward = (_solved(table) for table in (self.sums if sums is None else sums))
        return CostModel(forward, backward)


def _solved(table: NDArray[np.float64]) -> OpTime:
    """Least squares without negative coefficients, from the table of products of the weighted columns."""
    count = round(float(table[_TERMS, _TERMS]))  # the column of times divided by themselves
    if count < _LEAST:
        raise ChunkflowError(f"{count} ops were measured; a cost model needs {_LEAST} forwards and as many backwards")
    scale = np.sqrt(np.maximum(np.diag(table)[:_TERMS], 1e-300))
    best, best_error = np.zeros(_TERMS), np.inf
    for kept in _subsets(_TERMS):
        normal = table[np.ix_(kept, kept)] / np.outer(scale[kept], scale[kept])
        found = np.linalg.lstsq(normal, table[kept, _TERMS] / scale[kept], rcond=1e-12)[0] / scale[kept]
        terms = np.zeros(_TERMS)
        terms[kept] = found
        error = float(
            table[_TERMS, _TERMS] - 2 * terms @ table[:_TERMS, _TERMS] + terms @ table[:_TERMS, :_TERMS] @ terms
        )
        if (found >= 0).all() and error < best_error:
            best, best_error = terms, error
    return OpTime(*map(float, best), residual=float(np.sqrt(max(best_error, 0.0) / count)), count=count)


def _subsets(num: int) -> list[list[int]]:
    return [[term for term in range(num) if bits >> term & 1] for bits in range(1, 1 << num)]


def timed(
    operations: Iterable[tuple[str, Position]], chunks: Sequence[Chunk], on_operation: OnOperation
) -> Iterator[tuple[str, Position]]:
    """Yield operations, and report what each took: whoever iterates runs an op before asking for the next.

    On an accelerator, ops return before they are done; there the times are those of a queue that is always full.
    """
    for op, position in operations:
        started = time.perf_counter()
        yield op, position
        if position is not None:
            on_operation(op, chunks[position], time.perf_counter() - started)
