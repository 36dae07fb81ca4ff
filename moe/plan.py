"""How one layer is cut and in which order its parts are issued: a frozen value, the same on every rank.

A layer has r chunks and three lanes. Chunk i passes dispatch (inter), gather (intra), expert (compute), scatter (intra)
and combine (inter). Backward passes the same roles the other way round: its "dispatch" moves the gradients of what was
combined, its "gather" those of what was scattered, and dense gradients go between its last dispatch and first combine.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from math import gcd
from sys import float_info
from typing import Any, Literal, NamedTuple

from moe.errors import PlanError

DISPATCH, GATHER, EXPERT, SCATTER, COMBINE, GRADIENT = "dispatch", "gather", "expert", "scatter", "combine", "gradient"
INTER, INTRA, COMPUTE = "inter", "intra", "compute"
LANE_OF = {DISPATCH: INTER, COMBINE: INTER, GRADIENT: INTER, GATHER: INTRA, SCATTER: INTRA, EXPERT: COMPUTE}

Order = Literal["fifo", "ready"]


class Op(NamedTuple):
    """One part of one chunk; `chunk` of a gradient is 0."""

    name: str
    chunk: int


MOST_CHUNKS = 1024
"""More parts than any layer has a use for; a plan of more would only exhaust memory."""
_MOST_BYTES = 2**63 - 1
"""Ranks compare their plans as int64."""


def _check_int(name: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise PlanError(f"{name} is {value!r}; it must be an integer from {least} to {most}")


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """Chunks and issue order of one layer, what they were predicted to take, and why they were chosen.

    Everything the executor reads is above `predicted_forward_s`; ranks must agree on `schedule`.
    """

    forward_chunks: int
    backward_chunks: int
    order: Order = "fifo"
    """`fifo`: all gathers, then all scatters. `ready`: scatter i right behind gather i + lag, as `intra_order` says."""
    forward_lag: int = 1
    backward_lag: int = 1
    """Gathers that run ahead of the scatters in `ready` order; unused in `fifo`."""
    gradient_bytes: int = 0
    """Dense gradients this layer's backward drains between its last dispatch and its first combine."""
    predicted_forward_s: float = 0.0
    predicted_backward_s: float = 0.0
    predicted_serial_s: float = 0.0
    """Forward and backward with r = 1 and the gradients afterwards."""
    reasons: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("forward_chunks", "backward_chunks", "forward_lag", "backward_lag"):
            _check_int(name, getattr(self, name), 1, MOST_CHUNKS)
        _check_int("gradient_bytes", self.gradient_bytes, 0, _MOST_BYTES)
        for name in ("predicted_forward_s", "predicted_backward_s", "predicted_serial_s"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= float_info.max:
                raise PlanError(f"{name} is {value!r}; it must be a number of seconds of at least 0")
        if self.order not in ("fifo", "ready"):
            raise PlanError(f"order is {self.order!r}; choose 'fifo' or 'ready'")

    @property
    def predicted_s(self) -> float:
        """Forward and backward together, seconds."""
        return self.predicted_forward_s + self.predicted_backward_s

    @property
    def schedule(self) -> tuple[int | str, ...]:
        """What decides the order of collectives: ranks whose schedules differ would deadlock."""
        return tuple(getattr(self, name) for name in _SCHEDULE)

    @property
    def pieces(self) -> int:
        """Parts in which the experts run, both ways: cut where either direction has a border."""
        return pieces(self.forward_chunks, self.backward_chunks)

    def chunks(self, *, backward: bool) -> int:
        """Return r of one direction."""
        return self.backward_chunks if backward else self.forward_chunks

    def intra_order(self, *, backward: bool) -> tuple[Op, ...]:
        """Return the issue order of the intra-node lane of one direction."""
        lag = self.backward_lag if backward else self.forward_lag
        return intra_order(self.chunks(backward=backward), self.order, lag)

    def to_json(self) -> str:
        """Write the plan as one JSON object."""
        return json.dumps({**asdict(self), "predicted_s": self.predicted_s})

    @classmethod
    def from_json(cls, text: str) -> LayerPlan:
        """Read what `to_json` wrote; raises PlanError for anything else."""
        try:
            values: dict[str, Any] = json.loads(text)
            values.pop("predicted_s", None)
            return cls(**{**values, "reasons": tuple(values.get("reasons", ()))})
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            known = ", ".join(f.name for f in fields(cls))
            raise PlanError(f"not a layer plan: {error}; it is a JSON object with {known}") from None

    def __str__(self) -> str:
        head = (
            f"chunks of a layer: forward r={self.forward_chunks}, backward r={self.backward_chunks}; order {self.order}"
        )
        if not self.predicted_s:
            return head
        head += f"; predicted {self.predicted_s * 1e3:.2f} ms, serial {self.predicted_serial_s * 1e3:.2f} ms"
        return "\n".join([head, *(f"  - {reason}" for reason in self.reasons)])


_SCHEDULE = ("forward_chunks", "backward_chunks", "order", "forward_lag", "backward_lag", "gradient_bytes")


def pieces(forward_chunks: int, backward_chunks: int) -> int:
    """Return into how many parts the borders of both directions cut a layer."""
    return forward_chunks + backward_chunks - gcd(forward_chunks, backward_chunks)


PLAIN = LayerPlan(1, 1)
"""No overlap: one chunk each way, in order."""


def intra_order(chunks: int, order: Order, lag: int = 1) -> tuple[Op, ...]:
    """Return the issue order of gathers and scatters: `ready` with lag 1 and 3 chunks is g0 g1 s0 g2 s1 s2."""
    gathers = [Op(GATHER, i) for i in range(chunks)]
    scatters = [Op(SCATTER, i) for i in range(chunks)]
    if order == "fifo" or lag >= chunks:
        return (*gathers, *scatters)
    pairs = zip(scatters, gathers[lag + 1 :], strict=False)
    ahead = chunks - 1 - lag
    return (*gathers[: lag + 1], *(op for pair in pairs for op in pair), *scatters[ahead:])


def inter_order(chunks: int, *, gradient: bool = False) -> tuple[Op, ...]:
    """Return the issue order of the inter-node lane: dispatches, dense gradients where there are any, combines."""
    dispatches = (Op(DISPATCH, i) for i in range(chunks))
    combines = (Op(COMBINE, i) for i in range(chunks))
    return (*dispatches, *((Op(GRADIENT, 0),) if gradient else ()), *combines)


def check_same(plans: Iterable[LayerPlan]) -> None:
    """Raise PlanError unless the plans, one a rank, have one schedule."""
    first: LayerPlan | None = None
    for rank, plan in enumerate(plans):
        first = first or plan
        if plan.schedule != first.schedule:
            raise PlanError(
                f"rank 0 has the plan {first.schedule}, rank {rank} has {plan.schedule} ({', '.join(_SCHEDULE)}); "
                "let one rank decide and broadcast its plan"
            )
