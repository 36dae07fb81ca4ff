"""Plans for micro-batches of very different length: which order, which retain, and against what.

Sequences, or groups of chunks, are tried in four orders, each retain in each of them, in the simulator.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from pipeline.errors import PlanError
from pipeline.result import Result
from pipeline.schedule import Schedule
from pipeline.schedules.build import even_stages, with_recompute
from pipeline.schedules.classic import one_f_one_b
from pipeline.schedules.state_aware import state_aware_1f1b
from pipeline.simulate import simulate
from pipeline.unit_costs import UnitModel
from pipeline.units import Unit

Block = tuple[Unit, ...]


def _middle(blocks: Sequence[Block]) -> list[Block]:
    by_size = sorted(blocks, key=_tokens)
    return by_size[::2] + by_size[1::2][::-1]


def _tokens(block: Block) -> int:
    return sum(u.tokens for u in block)


ORDERS: dict[str, Callable[[Sequence[Block]], list[Block]]] = {
    "as given": list,
    "long first": lambda blocks: sorted(blocks, key=_tokens, reverse=True),
    "short first": lambda blocks: sorted(blocks, key=_tokens),
    "long in the middle": _middle,
}

AHEAD: tuple[Literal["chunks", "groups"], ...] = ("chunks", "groups")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One order and retain, simulated."""

    schedule: Schedule
    result: Result
    order: str
    retain: int | None
    ahead: str | None
    """What state-aware 1F1B counts its lead in."""
    fits: bool
    """Whether every device stays within the memory cap."""
    places: tuple[int, ...] = ()
    """Micro-batch m is the `places[m]`-th of the units that were given."""

    def to_json(self) -> dict[str, Any]:
        """The numbers that a choice is made by."""
        return {
            "order": self.order,
            "retain": self.retain,
            "ahead": self.ahead,
            "makespan": self.result.makespan_s,
            "useful": self.result.useful,
            "peak_bytes": max(self.result.peak_bytes),
            "fits": self.fits,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderPlan:
    """The shortest candidate that fits, and all that were tried."""

    best: Candidate
    tried: tuple[Candidate, ...]

    def table(self) -> str:
        """One line a candidate, the shortest first, the chosen one marked."""
        lines = ["  order               retain ahead      makespan  useful  peak bytes"]
        for c in sorted(self.tried, key=lambda c: c.result.makespan_s):
            mark = ">" if c is self.best else " " if c.fits else "x"
            retain = "-" if c.retain is None else str(c.retain)
            name = f"{mark} {c.order:<19} {retain:>6} {c.ahead or '-':<7}"
            lines.append(
                f"{name} {c.result.makespan_s:>10.5g} {c.result.useful:>7.3f} {max(c.result.peak_bytes):>11.4g}"
            )
        return "\n".join(lines)


def blocks_of(units: Sequence[Unit]) -> list[Block]:
    """Groups, and standalone units, each as a block that stays together."""
    blocks: list[list[Unit]] = []
    for unit in units:
        if unit.group is not None and blocks and blocks[-1][0].group == unit.group:
            blocks[-1].append(unit)
        else:
            blocks.append([unit])
    return [tuple(b) for b in blocks]


def plan_state_aware(
    units: Sequence[Unit],
    model: UnitModel,
    *,
    devices: int,
    retains: Iterable[int] = (1, 2, 4),
    memory_cap_bytes: float | None = None,
) -> OrderPlan:
    """Choose order of groups, retain and lead of state-aware 1F1B; micro-batch m is `best.schedule.units[m]`.

    Raises PlanError when nothing fits the cap.
    """
    layers = even_stages(model.layers, devices)
    tried = []
    for retain, name, ahead in product(retains, ORDERS, AHEAD):
        ordered = [replace(u, retain=retain) for b in ORDERS[name](blocks_of(units)) for u in b]
        schedule = state_aware_1f1b(devices=devices, units=ordered, layers=layers, ahead=ahead)
        result = simulate(schedule, model.costs(ordered))
        found = _candidate(schedule, result, memory_cap_bytes, order=name, retain=retain, ahead=ahead)
        tried.append(replace(found, places=_places(units, ordered)))
    return _choose(tried, memory_cap_bytes)


def _places(units: Sequence[Unit], ordered: Sequence[Unit]) -> tuple[int, ...]:
    """Where each of the ordered units stood; standalone ones of one length are as good as each other."""
    stood: dict[tuple, deque[int]] = {}
    for place, u in enumerate(units):
        stood.setdefault((u.tokens, u.group, u.index), deque()).append(place)
    return tuple(stood[u.tokens, u.group, u.index].popleft() for u in ordered)


def plan_whole_sequences(
    lengths: Sequence[int],
    model: UnitModel,
    *,
    devices: int,
    recompute: bool,
    memory_cap_bytes: float | None = None,
) -> OrderPlan:
    """What state-aware 1F1B is compared with: 1F1B, each sequence one micro-batch, in the best of the four orders.

    Micro-batch m is `best.schedule.units[m]`.

    Raises PlanError when nothing fits the cap.
    """
    tried = []
    for name, arrange in ORDERS.items():
        units = [u for b in arrange([(Unit(n),) for n in lengths]) for u in b]
        schedule = one_f_one_b(devices=devices, microbatches=len(units), layers=even_stages(model.layers, devices))
        schedule = replace(with_recompute(schedule) if recompute else schedule, units=tuple(units))
        tried.append(_candidate(schedule, simulate(schedule, model.costs(units)), memory_cap_bytes, order=name))
    return _choose(tried, memory_cap_bytes)


def _candidate(
    schedule: Schedule,
    result: Result,
    cap: float | None,
    *,
    order: str,
    retain: int | None = None,
    ahead: str | None = None,
) -> Candidate:
    fits = cap is None or max(result.peak_bytes) <= cap
    return Candidate(schedule=schedule, result=result, order=order, retain=retain, ahead=ahead, fits=fits)


def _choose(tried: Sequence[Candidate], cap: float | None) -> OrderPlan:
    best = min((c for c in tried if c.fits), key=lambda c: c.result.makespan_s, default=None)
    if best is None:
        least = min(max(c.result.peak_bytes) for c in tried)
        raise PlanError(
            f"no order or retain stays within {cap:.0f} bytes a device; the least needs {least:.0f}. Use shorter "
            "chunks, a smaller retain, more stages, or recompute"
        )
    return OrderPlan(best=best, tried=tuple(tried))
