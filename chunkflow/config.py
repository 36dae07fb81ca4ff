"""How to plan chunks and load them: one frozen dataclass a job."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from chunkflow.errors import PlanError
from chunkflow.records import MAX_SAMPLE_TOKENS

CACHE_DIR = Path("runs/cache")
"""Where tokens are stored unless somebody says where: what a command has tokenized, a loop finds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannerConfig:
    """What a plan depends on, beside the lengths."""

    chunk_tokens: int
    """Tokens in a full chunk."""
    retain: int = 1
    """Chunks of a group that keep their activations (the paper's K); the others run forward a second time."""
    pair_cost: float = 1 / 4096
    """Time of one (query, key) pair of attention relative to the rest of the work for one token; about
    1 / (6 * hidden size)."""
    max_tokens: int | None = None
    """The longest sequence that fits into memory with its keys and values, on every rank; None for no limit."""

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1:
            raise PlanError(f"chunk_tokens is {self.chunk_tokens}; it must be at least 1")
        if self.retain < 1:
            raise PlanError(f"retain is {self.retain}; it must be at least 1, the chunk that is trained now")
        if max(self.chunk_tokens, self.retain) > MAX_SAMPLE_TOKENS:
            raise PlanError(
                f"chunk_tokens is {self.chunk_tokens}, retain {self.retain}; both must be at most {MAX_SAMPLE_TOKENS}"
            )
        if not self.pair_cost >= 0:
            raise PlanError(f"pair_cost is {self.pair_cost}; it must be 0 or more")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise PlanError(f"max_tokens is {self.max_tokens}; it must be at least 1, or None for no limit")
