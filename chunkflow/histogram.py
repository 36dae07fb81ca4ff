"""Lengths of sequences, for people: bars in the terminal, the same in a picture, and where the tokens are."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chunkflow.errors import SourceError
from chunkflow.layout import Ints

PERCENTILES = (50, 90, 99, 99.9)
_WIDTH = 40


@dataclass(frozen=True, slots=True)
class Bar:
    """Sequences of `low <= length < high` tokens."""

    low: int
    high: int
    sequences: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Histogram:
    """A data set's lengths in powers of two."""

    sequences: int
    tokens: int
    shortest: int
    longest: int
    percentiles: dict[str, int]
    bars: tuple[Bar, ...]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return the histogram as lines of text: share of the sequences, and share of the tokens, per bar."""
        most = max(bar.sequences for bar in self.bars)
        lines = [f"{'tokens':>17} {'sequences':>10}  {'':<{_WIDTH}}  {'of them':>8} {'of tokens':>9}"]
        for bar in self.bars:
            drawn = "█" * round(_WIDTH * bar.sequences / most) or ("▏" if bar.sequences else "")
            lines.append(
                f"{bar.low:>8} {bar.high - 1:>8} {bar.sequences:>10}  {drawn:<{_WIDTH}}  "
                f"{bar.sequences / self.sequences:>8.2%} {bar.tokens / self.tokens:>9.2%}"
            )
        shown = ", ".join(f"p{name} {value}" for name, value in self.percentiles.items())
        lines.append(f"{self.sequences} sequences, {self.tokens} tokens; {self.shortest} to {self.longest}, {shown}")
        return lines


def histogram(lengths: Ints) -> Histogram:
    """Count sequences int64 [N], N > 0, by powers of two."""
    first, last = int(np.log2(lengths.min())), int(np.log2(lengths.max()))
    edges = 2 ** np.arange(first, last + 2, dtype=np.int64)
    place = np.searchsorted(edges, lengths, side="right") - 1
    sequences = np.bincount(place, minlength=len(edges) - 1)
    tokens = np.bincount(place, weights=lengths, minlength=len(edges) - 1)
    bars = zip(edges[:-1].tolist(), edges[1:].tolist(), sequences.tolist(), tokens.tolist(), strict=True)
    quantiles = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
    return Histogram(
        sequences=len(lengths),
        tokens=int(lengths.sum()),
        shortest=int(lengths.min()),
        longest=int(lengths.max()),
        percentiles={f"{p:g}": int(q) for p, q in zip(PERCENTILES, quantiles, strict=True)},
        bars=tuple(Bar(low, high, count, int(total)) for low, high, count, total in bars),
    )


def draw(found: Histogram, path: Path, *, chunk_tokens: int | None) -> None:
    """Write the histogram as a picture (PNG, SVG or PDF by the suffix): sequences, and tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    low, high = (np.array([getattr(bar, side) for bar in found.bars]) for side in ("low", "high"))
    for shift, what, total in ((0.0, "sequences", found.sequences), (0.5, "tokens", found.tokens)):
        share = np.array([getattr(bar, what) for bar in found.bars]) / total
        left = low * (high / low) ** shift
        axes.bar(left, 100 * share, width=(low * (high / low) ** (shift + 0.5) - left), align="edge", label=what)
    axes.set_xscale("log", base=2)
    if chunk_tokens is not None:
        axes.axvline(chunk_tokens, linestyle=":", color="black", label="chunk_tokens")
    axes.set_xlabel("tokens of a sequence")
    axes.set_ylabel("% of all")
    axes.set_title(f"{found.sequences} sequences, {found.tokens} tokens, longest {found.longest}")
    axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except ValueError as error:
        raise SourceError(f"no picture can be written to {path}: {error}") from error
