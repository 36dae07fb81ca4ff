"""Whether a simulated schedule is within a memory cap; else on which device it is not, by how much, and what helps."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from pipeline.actions import COMPUTE, Op
from pipeline.costs import Costs
from pipeline.listing import Listing
from pipeline.result import Result


@dataclass(frozen=True, slots=True)
class OverCap:
    """The fullest device of a schedule whose bytes pass a cap."""

    action: int
    """Number of what that device computes when its bytes are most."""
    text: str
    """Device, bytes, and what helps."""


def over_cap(found: Listing, costs: Costs, result: Result, memory_cap_bytes: float) -> OverCap | None:
    """Return what passes the cap, None where nothing does. `result` is the simulation of `found` by `costs`."""
    device = max(range(len(result.peak_bytes)), key=result.peak_bytes.__getitem__)
    peak = result.peak_bytes[device]
    if peak <= memory_cap_bytes:
        return None
    curve = result.memory[device]
    at = next(t for t, level in curve if level == peak)
    mine = [i for i, s in enumerate(result.spans) if s.device == device and s.action.op in COMPUTE]
    i = max((i for i in mine if result.spans[i].start_s <= at), default=mine[0])
    text = (
        f"{peak:,.0f} bytes are on device {device}, and the cap is {memory_cap_bytes:,.0f}: "
        f"{ceil(peak - memory_cap_bytes):,} too many. "
    )
    always = min(level for _, level in curve)
    if device in found.streamed:
        advice = "Use shorter micro-batches, or slots of fewer layers: `python -m pipeline plan` searches for some"
    elif always > memory_cap_bytes:
        advice = f"Of these {always:,.0f} are there all the time, as weights are: use more ranks, or roundpipe"
    elif _keeps_activations(found, costs, device):
        advice = "Recompute activations, use shorter micro-batches, more ranks, or roundpipe"
    else:
        advice = "Nothing is left to recompute: use shorter micro-batches, more ranks, or roundpipe"
    return OverCap(i, text + advice)


def _keeps_activations(found: Listing, costs: Costs, device: int) -> bool:
    """Whether a forward of the device keeps activations that a recompute would make again."""
    again = found.schedule.recomputed()
    return any(
        action.op is Op.F
        and (action.stage, action.microbatch or 0) not in again
        and costs.activations(action.microbatch or 0, found.schedule.layers(action)) > 0
        for action in found.schedule.of(device)
    )
