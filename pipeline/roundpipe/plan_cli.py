"""`python -m pipeline plan`: how RoundPipe would run a model, and why."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.costs import Costs
from pipeline.errors import PlanError
from pipeline.roundpipe.planner import RoundPipePlan, plan
from pipeline.roundpipe.slots import LayerCosts


def layers_of(costs: Costs, microbatches: int) -> LayerCosts:
    """Return what the planner takes of costs. Raises PlanError for costs that it cannot plan."""
    costs.check_microbatches(microbatches)
    if costs.num_layers < 2:
        raise PlanError("the costs are of one layer; give a number for each of the layers, the head the last of them")
    return LayerCosts.of(costs)


def find_plan(
    costs: LayerCosts,
    *,
    devices: int,
    microbatches: Sequence[int],
    memory_cap_bytes: float | None,
    effort: float,
    unit: str,
) -> RoundPipePlan:
    """Search. The costs are of the first number of `microbatches`, the others are tried too.

    Raises PlanError where nothing fits.
    """
    return plan(
        costs,
        num_devices=devices,
        num_microbatches=microbatches,
        num_rounds=(1, 2, 4),
        memory_cap_bytes=None if memory_cap_bytes is None else int(memory_cap_bytes),
        effort=effort,
        unit=unit,
    )


def as_text(found: RoundPipePlan, costs: Costs, unit: str) -> str:
    """Return the plan in words: what runs, what it costs, why. `costs`, in `unit`, are those it was planned by."""
    cut = found.partition
    lines = [
        f"{found.num_devices} devices, {sum(found.rounds)} micro-batches in rounds of {list(found.rounds)}, "
        f"{found.open_slots} open slot(s)",
        f"layers in forward slots   {list(cut.forward)}",
        f"layers in the fused slot  {cut.fused}",
        f"layers in backward slots  {list(cut.backward)}",
        f"makespan {found.makespan_s:.6g} {unit}, bubble {found.bubble:.2%}, useful {found.useful:.2%}"
        + (f", {found.peak_bytes:,} bytes a device" if found.peak_bytes else ""),
        *(f"- {reason}" for reason in found.reasons),
    ]
    if len(costs.forward_s) > 1 or len(costs.backward_s) > 1:
        lines.append(
            "- the costs of micro-batches differ: this is the plan of as many with their mean seconds, most bytes"
        )
    return "\n".join(lines)
