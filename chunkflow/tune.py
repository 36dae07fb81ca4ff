"""The best (chunk_tokens, retain) for a model under a memory cap: measured, fitted, proposed, and measured again.

Memory of one rank, above weights and gradients, is fitted as `m0 + m1 * C + m2 * C * K + m3 * S`: C chunk_tokens, K
chunks that keep their activations, S tokens before the last chunk, whose keys and values stay. Time is the cost model
of `chunkflow.fit`, summed over the ops of the longest sequence. The fit is coarse far from what was measured, so a
proposal is measured on a short sequence before its peak is predicted: from there on only m3 counts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from chunkflow.errors import ChunkflowError
from chunkflow.fit import CostFit, CostModel
from chunkflow.tune_process import measured

TOLERANCE = 0.1
"""How far the measured peak may be from the predicted one, of the predicted."""
ADAMW_BYTES = 8
"""Two fp32 moments a parameter."""
SIZES, RETAIN = (256, 512, 1024), (1, 2, 4)
"""What is measured where nobody says what."""
_STEPS = (1, 2, 4, 8)
"""Then chunks are proposed up to so many times those measured."""
_MOST_RETAINED = 8
_MOST_PROPOSALS = 5


@dataclass(frozen=True, slots=True)
class Measured:
    """One sequence trained."""

    chunk_tokens: int
    retain: int
    tokens: int
    seconds: float
    peak_bytes: int
    """Above weights and gradients."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """What was measured, what is proposed, and how it turned out."""

    rows: tuple[Measured, ...]
    cost: CostModel
    memory_bytes: tuple[float, float, float, float]
    """m0, m1, m2, m3 of above."""
    memory_residual: float
    """Root mean square of (measured - predicted) / measured peak."""
    fixed_bytes: int
    """What a rank holds whatever the chunks: the process, weights, gradients, AdamW's state."""
    cap_bytes: int
    longest: int
    chunk_tokens: int
    retain: int
    predicted_peak_bytes: int
    """Of the whole process."""
    predicted_seconds: float
    """Of the longest sequence."""
    measured_peak_bytes: int
    measured_seconds: float

    @property
    def holds(self) -> bool:
        """Whether the measured run stayed under the cap and close to the predicted peak."""
        off = abs(self.measured_peak_bytes - self.predicted_peak_bytes) / self.predicted_peak_bytes
        return self.measured_peak_bytes <= self.cap_bytes and off <= TOLERANCE

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**asdict(self), "pair_cost": self.cost.pair_cost, "holds": self.holds}

    def __str__(self) -> str:
        lines = [f"{'chunk_tokens':>12} {'retain':>6} {'tokens':>8} {'seconds':>8} {'peak MiB':>9}"]
        lines += [
            f"{r.chunk_tokens:>12} {r.retain:>6} {r.tokens:>8} {r.seconds:>8.2f} {r.peak_bytes / 2**20:>9.1f}"
            for r in self.rows
        ]
        m0, m1, m2, m3 = self.memory_bytes
        lines += [
            str(self.cost),
            f"memory: {m0 / 2**20:.1f} MiB + {m1:.0f} bytes a token of a chunk + {m2:.0f} a token that is retained + "
            f"{m3:.0f} a token of keys and values (residual {self.memory_residual:.1%}), over "
            f"{self.fixed_bytes / 2**20:.0f} MiB of process, weights, gradients and AdamW",
            f"proposed for {self.longest} tokens under {self.cap_bytes / 2**20:.0f} MiB: chunk_tokens "
            f"{self.chunk_tokens}, retain {self.retain}, pair_cost {self.cost.pair_cost_text}",
            f"peak predicted {self.predicted_peak_bytes / 2**20:.1f} MiB, measured "
            f"{self.measured_peak_bytes / 2**20:.1f}: {'holds' if self.holds else 'does NOT hold'}",
            f"time predicted {self.predicted_seconds:.2f} s, measured {self.measured_seconds:.2f}",
        ]
        return "\n".join(lines)


def tune(
    model: str,
    *,
    cap_bytes: int,
    longest: int,
    chunk_tokens: Sequence[int] = (),
    retain: Sequence[int] = (),
    dtype: str = "float32",
    progress: Callable[[int, int], None] | None = None,
) -> Tuning:
    """Measure, fit, propose, check; processes are started one after another: for the grid, for each proposal on a short
    sequence, for the check. `progress` is called with the tokens trained so far, and in all as far as is known.

    What is proposed is one of `chunk_tokens` and one of `retain`, where they are given. Where they are not, a few are
    measured, and larger chunks and other `retain` may be proposed.

    Raises ChunkflowError when a measurement fails, or when nothing fits under the cap.
    """
    if dtype not in ("float32", "bfloat16", "float64"):
        raise ChunkflowError(f"dtype is {dtype!r}; it must be float32, bfloat16 or float64")
    sizes = chunk_tokens or [size * times for size in SIZES for times in _STEPS]
    retained = retain or range(1, _MOST_RETAINED + 1)
    if longest < 2 or min(sizes) < 1 or min(retained) < 1:
        raise ChunkflowError("longest must be at least 2, every chunk_tokens and retain at least 1")
    grid = cases(chunk_tokens or SIZES, retain or RETAIN)
    run = _Runs(model, dtype, longest, progress, to_come=sum(tokens for *_, tokens in grid) + longest)
    answer = run(grid)
    rows = tuple(Measured(**row) for row in answer["rows"])
    cost = CostFit().solve(np.array(answer["sums"]))
    memory, residual = fit_memory(rows)
    fixed = answer["base_bytes"] + ADAMW_BYTES * answer["trained_parameters"]
    over: set[tuple[int, int]] = set()
    for _ in range(_MOST_PROPOSALS):
        size, kept = propose(
            cost, memory, fixed, cap_bytes=cap_bytes, longest=longest, sizes=sizes, retain=retained, refused=over
        )
        short = Measured(**run([(size, kept, min(longest, size * (kept + 2)))])["rows"][0])
        rows = (*rows, short)
        predicted = fixed + anchored_peak(memory, short, longest)
        if predicted <= cap_bytes:
            break
        over.add((size, kept))
        memory, residual = fit_memory(rows)
    else:
        raise _none_holds(over, cap_bytes)
    check = run([(size, kept, longest)])
    found = Measured(**check["rows"][0])
    return Tuning(
        rows=rows,
        cost=cost,
        memory_bytes=memory,
        memory_residual=residual,
        fixed_bytes=fixed,
        cap_bytes=cap_bytes,
        longest=longest,
        chunk_tokens=size,
        retain=kept,
        predicted_peak_bytes=round(predicted),
        predicted_seconds=seconds(cost, size, kept, longest),
        measured_peak_bytes=found.peak_bytes + check["base_bytes"] + ADAMW_BYTES * check["trained_parameters"],
        measured_seconds=found.seconds,
    )


class _Runs:
    """Measures grids one after another, and says how many tokens of all are trained."""

    def __init__(
        self, model: str, dtype: str, longest: int, progress: Callable[[int, int], None] | None, *, to_come: int
    ) -> None:
        self._model, self._dtype, self._longest, self._progress = model, dtype, longest, progress
        self._done, self._to_come = 0, to_come

    def __call__(self, grid: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
        tokens = sum(tokens for *_, tokens in grid)
        self._to_come = max(self._to_come, self._done + tokens)
        self._tell(0)
        found = measured(self._model, self._dtype, grid, self._tell, longest=self._longest)
        self._done += tokens
        self._tell(0)
        return found

    def _tell(self, trained: int) -> None:
        if self._progress is not None:
            self._progress(self._done + trained, self._to_come)


def cases(chunk_tokens: Sequence[int], retain: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return (chunk_tokens, retain, tokens) to measure: the grid, and for keys and values alone a longer sequence."""
    grid = [(size, kept, size * (kept + 2)) for size in sorted(set(chunk_tokens)) for kept in sorted(set(retain))]
    smallest, largest = min(chunk_tokens), max(chunk_tokens)
    return [*grid, (smallest, 1, 16 * smallest), (largest, 1, 8 * largest)]


def fit_memory(rows: Sequence[Measured]) -> tuple[tuple[float, float, float, float], float]:
    """Return m0 to m3, none negative, and the residual."""
    columns = np.array([_columns(r.chunk_tokens, r.retain, r.tokens) for r in rows])
    peaks = np.array([max(r.peak_bytes, 1) for r in rows], dtype=np.float64)
    kept = list(range(columns.shape[1]))
    terms = np.zeros(columns.shape[1])
    while kept:
        weighted = columns[:, kept] / peaks[:, None]
        found = np.linalg.lstsq(weighted, np.ones(len(rows)), rcond=None)[0]
        if (found >= 0).all():
            terms[kept] = found
            break
        kept.pop(int(np.argmin(found * weighted.mean(0))))
    residual = float(np.sqrt(np.mean((columns @ terms / peaks - 1) ** 2)))
    m0, m1, m2, m3 = terms.tolist()
    return (m0, m1, m2, m3), residual


def _columns(chunk_tokens: int, retain: int, tokens: int) -> tuple[float, float, float, float]:
    count = -(-tokens // chunk_tokens)
    return 1.0, chunk_tokens, chunk_tokens * min(retain, count), chunk_tokens * (count - 1)


def peak(memory: Sequence[float], chunk_tokens: int, retain: int, tokens: int) -> float:
    """Predict the peak of one sequence, in bytes above weights and gradients."""
    return float(np.dot(memory, _columns(chunk_tokens, retain, tokens)))


def anchored_peak(memory: Sequence[float], short: Measured, tokens: int) -> float:
    """Predict the peak of a sequence from a shorter one that was measured: what is added are keys and values."""
    before, after = (_columns(short.chunk_tokens, short.retain, n)[-1] for n in (short.tokens, tokens))
    return short.peak_bytes + memory[-1] * (after - before)


def seconds(cost: CostModel, chunk_tokens: int, retain: int, tokens: int) -> float:
    """Predict the time of one sequence: each chunk forward and backward, the first ones forward twice."""
    total, count = 0.0, -(-tokens // chunk_tokens)
    for n in range(count):
        size = min(chunk_tokens, tokens - n * chunk_tokens)
        pairs = size * n * chunk_tokens + size * (size + 1) / 2
        forwards = 2 if n < count - retain else 1
        total += forwards * cost.forward.seconds(size, pairs) + cost.backward.seconds(size, pairs)
    return total


def propose(
    cost: CostModel,
    memory: Sequence[float],
    fixed_bytes: int,
    *,
    cap_bytes: int,
    longest: int,
    sizes: Sequence[int],
    retain: Sequence[int],
    refused: Collection[tuple[int, int]] = (),
) -> tuple[int, int]:
    """Return the fastest of `sizes` and `retain` whose predicted peak is under the cap; of equals, the smaller peak.

    Those `refused` are left out.
    """
    rows = [(size, kept) for size in sizes if size <= max(longest, min(sizes)) for kept in retain]
    found = [(size, kept, fixed_bytes + peak(memory, size, kept, longest)) for size, kept in rows]
    fitting = [(seconds(cost, size, kept, longest), total, size, kept) for size, kept, total in found]
    fitting = [row for row in fitting if row[1] <= cap_bytes and row[2:] not in refused]
    if not fitting and refused:
        raise _none_holds(refused, cap_bytes)
    if not fitting:
        least = min(found, key=lambda row: row[2])
        raise ChunkflowError(
            f"nothing fits: {longest} tokens need {least[2] / 2**20:.0f} MiB at chunk_tokens {least[0]} and retain "
            f"{least[1]}, the least of all tried, and the cap is {cap_bytes / 2**20:.0f} MiB; raise the cap, or lower "
            "longest or chunk_tokens"
        )
    _, _, size, kept = min(fitting)
    return size, kept


def _none_holds(tried: Collection[tuple[int, int]], cap_bytes: int) -> ChunkflowError:
    return ChunkflowError(
        f"of (chunk_tokens, retain) {sorted(tried)} none stays under {cap_bytes / 2**20:.0f} MiB when measured; raise "
        "the cap, or lower longest or chunk_tokens"
    )
