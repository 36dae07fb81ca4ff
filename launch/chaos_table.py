"""What was done to jobs and what became of them, in numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich.table import Table


@dataclass(slots=True)
class Strikes:
    """What came of one kind of disturbance."""

    struck: int = 0
    recovered: int = 0
    seconds: list[float] = field(default_factory=list)
    """From a strike to the next trained step, or the end of the job."""


@dataclass(slots=True)
class Tally:
    """All counts of a session."""

    kinds: dict[str, Strikes] = field(default_factory=dict)
    runs: int = 0
    """Disturbed runs that ended well and were compared."""
    identical: int = 0
    """Of them, those with the weights and metrics of the undisturbed run, to the bit."""
    resumes: int = 0
    skipped: int = 0
    """Checkpoints that did not verify and were passed over."""
    largest_difference: float | None = None
    """Relative, of a loss, of runs that went on with fewer ranks; None without one."""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        kinds = {
            kind: {
                "struck": found.struck,
                "recovered": found.recovered,
                "median_s": round(_median(found.seconds), 2),
                "longest_s": round(max(found.seconds, default=0.0), 2),
            }
            for kind, found in self.kinds.items()
        }
        return {
            "kinds": kinds, "runs": self.runs, "identical": self.identical, "resumes": self.resumes,
            "skipped": self.skipped, "largest_difference": self.largest_difference, "seconds": round(self.seconds),
        }  # fmt: skip


def table(tally: Tally) -> Table:
    """Return the counts as a table for people."""
    found = Table(title="chaos", title_justify="left")
    for name in ("kind", "struck", "recovered", "median s", "longest s"):
        found.add_column(name, justify="left" if name == "kind" else "right")
    for kind, row in tally.to_json()["kinds"].items():
        found.add_row(kind, *(str(row[name]) for name in ("struck", "recovered", "median_s", "longest_s")))
    words = [
        f"runs {tally.runs}, resumes {tally.resumes}, damaged checkpoints passed over {tally.skipped}",
        f"runs with the weights and metrics of the undisturbed one, to the bit: {tally.identical}",
    ]
    if tally.largest_difference is not None:
        fewer = tally.runs - tally.identical
        words.append(f"runs that ended on fewer ranks, with the same global batches: {fewer}")
        words.append(f"largest relative difference of a loss of theirs: {tally.largest_difference:.1e}")
    found.caption, found.caption_justify = "\n".join(words), "left"
    return found


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0
