"""Settings of a pipeline."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Literal

from pipeline.errors import PlanError

ScheduleName = Literal["gpipe", "1f1b", "interleaved", "looped_bfs", "zb_h1", "zbv", "state_aware_1f1b", "roundpipe"]

_OF_ROUNDPIPE = {
    "rounds": "passes the micro-batches of a step once",
    "open_slots": "has stages, not slots",
    "microbatches": "takes no host memory for them ahead",
    "staleness": "ends every step before the next",
    "device_memory_bytes": "keeps no cap",
}
"""Settings that only roundpipe reads, and why no other schedule does."""
_OF_OTHERS = {"stages": "plans its slots from the layers", "recompute": "always recomputes"}
"""Settings that roundpipe alone does not read."""


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """How the layers of a model are spread over ranks."""

    schedule: ScheduleName = "state_aware_1f1b"
    """Order of the work. All but state_aware_1f1b need every sample within one chunk."""
    ranks: int = 1
    """Ranks of one pipeline; the number of processes must be a multiple. 1 is no pipeline."""
    stages: int | None = None
    """Stages of the model, a multiple of ranks; null is one a rank, and two a rank for interleaved, looped_bfs and
    zbv."""
    recompute: bool = False
    """Keep only the input of a stage, and run it forward again before its backward: less memory, a third more work.
    roundpipe always does."""
    rounds: int | None = 1
    """roundpipe: the micro-batches of a step pass in so many rounds, or one each where they are fewer. More keep
    devices busy where the head weighs more than its share of the layers. null is what the planner finds best of 1, 2
    and 4; only with a number here are the weights the same to the bit for any number of ranks."""
    open_slots: int | None = 2
    """roundpipe: slots that a device may have begun; of them it takes what is ready. 1 is strict order, and least
    memory. null is what the planner finds best of 1, 2 and 3."""
    microbatches: int | None = None
    """roundpipe: the most micro-batches (chunks) of one step, for which host memory is taken; null is
    chunks.global_batch, which always suffices."""
    staleness: int = 0
    """roundpipe: optimizer steps that a step's weights may lag behind. 1 lets a step begin while the one before it is
    still stepped, on weights without it; steps between two evaluations or checkpoints then run together."""
    device_memory_bytes: int | None = None
    """roundpipe: the most that weights, gradients and activations may take on a device; null only counts."""
    timeout_s: float = 600.0
    """Seconds after which a rank that waits for another gives up, naming it."""

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise PlanError(f"pipeline.ranks is {self.ranks}; it must be at least 1")
        self._refuse_unread()
        if self.stages is not None and (self.stages < 1 or self.stages % self.ranks):
            raise PlanError(f"pipeline.stages is {self.stages}; it must be a multiple of pipeline.ranks, {self.ranks}")
        if self.stages is not None and self.stages != self.num_stages:
            raise PlanError(
                f"pipeline.stages is {self.stages}, and {self.schedule} on {self.ranks} ranks has {self.num_stages}; "
                "leave it out, or use interleaved or looped_bfs for several stages a rank"
            )
        for name in ("rounds", "open_slots", "microbatches", "device_memory_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PlanError(f"pipeline.{name} is {value}; it must be at least 1")
        if self.staleness not in (0, 1):
            raise PlanError(f"pipeline.staleness is {self.staleness}; it must be 0 or 1")
        if not self.timeout_s > 0:
            raise PlanError(f"pipeline.timeout_s is {self.timeout_s}; it must be more than 0")

    def _refuse_unread(self) -> None:
        streams = self.schedule == "roundpipe"
        unread, other = (_OF_OTHERS, "another schedule") if streams else (_OF_ROUNDPIPE, "roundpipe")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in unread and value != field.default:
                raise PlanError(
                    f"pipeline.{field.name} is {json.dumps(value)}, and {self.schedule} {unread[field.name]}; leave it "
                    f"out, or use {other}"
                )

    @property
    def num_stages(self) -> int:
        """Stages of the model."""
        if self.looped:
            return self.stages or 2 * self.ranks
        return 2 * self.ranks if self.schedule == "zbv" else self.ranks

    @property
    def looped(self) -> bool:
        """Whether a rank may hold any number of stages."""
        return self.schedule in ("interleaved", "looped_bfs")
