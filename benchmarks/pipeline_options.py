"""What the command line of `benchmarks.pipeline` says to its parts."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.pipeline_plans import PlanFile


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Each part reads what concerns it; empty means all, and zero the part's own number."""

    quick: bool
    models: tuple[str, ...]
    devices: tuple[int, ...]
    """Emulated devices."""
    modes: tuple[str, ...]
    """synchronous, asynchronous."""
    rounds: int
    """Repetitions."""
    effort: float
    """Of the planner's search; 1 is what users get."""
    plans: PlanFile
