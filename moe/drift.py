"""When plans and profiles no longer hold: loads or layer times that moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist

from moe.cost import LayerLoad, Profile, busiest_bytes
from moe.flow import Pass
from moe.lanes import Lanes
from moe.layer import ExpertRunner
from moe.plan import LayerPlan
from moe.planner import planned_time

DRIFT = 0.25
"""Relative change after which a plan, or a profile, is made anew."""
WINDOW = 16
"""Steps over which layers are compared with a profile; twice as many after each new profile."""


def replan_reason(planned: LayerLoad, measured: LayerLoad) -> str | None:
    """Return why a plan made for `planned` no longer fits what was measured, or None."""
    for name in ("exchange_bytes", "gather_bytes", "expert_rows", "gradient_bytes"):
        old, new = getattr(planned, name), getattr(measured, name)
        if abs(new - old) > DRIFT * max(old, 1e-30):
            return f"{name} went from {old:.0f} to {new:.0f}, more than {DRIFT:.0%}"
    return None


def refit_reason(ratio: float, usual: float = 1.0) -> str | None:
    """Return why a profile no longer holds, or None: layers take `ratio` times what it says, not `usual` times."""
    if abs(ratio - usual) <= DRIFT * usual:
        return None
    before = "" if usual == 1.0 else f"; it was {usual:.2f} times"
    return f"layers take {ratio:.2f} times what the profile says{before}, more than {DRIFT:.0%} apart"


def load_of(one: Pass, slice_bytes: float) -> LayerLoad:
    """Return what a pass moved and computed on its busiest rank, the rows as they were really split."""
    rows_SPP = one.traffic.chunk(Fraction(0), Fraction(1)).matrix
    held = float(rows_SPP.sum((0, 1)).max())
    return LayerLoad(
        exchange_bytes=max(busiest_bytes((rows_PP * one.row_bytes).tolist()) for rows_PP in rows_SPP),
        gather_bytes=held * one.row_bytes if len(rows_SPP) > 1 else 0.0,
        expert_rows=held,
        gradient_bytes=one.gradient_bytes,
        slice_bytes=slice_bytes,
    )


class Compared(NamedTuple):
    """What a window of steps showed; the same on every rank."""

    ratio: float
    """Measured over predicted, in the median."""
    reason: str | None
    """Why the profile no longer holds, or None."""


class _Timed(NamedTuple):
    load: LayerLoad
    plan: LayerPlan
    backward: bool
    seconds: float


class LayerWatch:
    """Compares what layers take with what a profile says of the same rows: one layer a step, its fullest pass each way.

    Every rank of the default group makes one, with the same profile, and calls `after_step` after each step.
    """

    def __init__(self, runners: Mapping[str, ExpertRunner], profile: Profile, *, slice_bytes: float) -> None:
        """`runners` are those of all layers, by name; their `on_pass` is set."""
        self._names, self._lanes = list(runners), next(iter(runners.values())).lanes
        self._profile, self._slice_bytes = profile, slice_bytes
        self._usual: float | None = 1.0
        self._window = self._left = WINDOW
        self._turn = 0
        self._fullest: dict[bool, Pass] = {}
        self._timed: list[_Timed] = []
        for runner in runners.values():
            runner.on_pass = self._note

    def after_step(self) -> Compared | None:
        """End a step. At the end of a window ranks exchange what they measured, and get what it comes to; else None."""
        for one in self._fullest.values():
            self._timed.append(_Timed(load_of(one, self._slice_bytes), one.plan, one.backward, one.seconds))
        self._fullest = {}
        self._turn = (self._turn + 1) % len(self._names)
        self._left -= 1
        if self._left:
            return None
        self._left, timed, self._timed = self._window, self._timed, []
        ratio = _ratio(timed, self._profile, self._lanes)
        if ratio is None:
            return None
        if self._usual is None:  # of a profile that was just made: what remains is how well one predicts here
            self._usual = ratio
        return Compared(ratio, refit_reason(ratio, self._usual))

    def renew(self, profile: Profile) -> None:
        """Go on with another profile. What its first window shows is no reason for the next."""
        self._profile, self._usual = profile, None
        self._window = self._left = 2 * self._window  # where times jump about, profiles get rarer
        self._fullest, self._timed = {}, []

    def _note(self, one: Pass) -> None:
        if one.layer != self._names[self._turn]:
            return
        held = self._fullest.get(one.backward)
        if held is None or one.traffic.rows_SPE.sum() > held.traffic.rows_SPE.sum():
            self._fullest[one.backward] = one


def _ratio(timed: Sequence[_Timed], profile: Profile, lanes: Lanes) -> float | None:
    """Return the median of measured over predicted, the mean over all ranks; None where no rank had rows."""
    measured = torch.tensor([one.seconds for one in timed], dtype=torch.float64)
    # A rank that came early waited for the others in its pass: the last one to come has the time of the layer.
    for lane, group in ((lanes.inter, lanes.ep), (lanes.intra, lanes.esp)):
        if group is not None:
            least = partial(dist.all_reduce, measured, dist.ReduceOp.MIN, group)
            lane.call(least, layer="all", op="layer times")
    predicted = [planned_time(profile, one.load, one.plan, backward=one.backward) for one in timed]
    ratios = [m / p for m, p in zip(measured.tolist(), predicted, strict=True) if p > 0]
    total = torch.tensor([median(ratios), 1.0] if ratios else [0.0, 0.0], dtype=torch.float64)
    dist.all_reduce(total)
    return float(total[0] / total[1]) if total[1] else None
