"""`python -m pipeline plan`: how RoundPipe would run a model, and why."""

from __future__ import annotations

import json
from collections.abc import Sequence

import typer

from pipeline.costs import Costs
from pipeline.roundpipe.planner import RoundPipePlan, plan
from pipeline.roundpipe.slots import LayerCosts


def print_plan(
    costs: Costs,
    *,
    devices: int,
    microbatches: Sequence[int],
    memory_cap_bytes: float | None,
    effort: float,
    as_json: bool,
) -> None:
    """Plan and print, as text or JSON. The costs are of the first number of `microbatches`, the others are tried too.

    Raises PlanError where nothing fits.
    """
    costs.check_microbatches(microbatches[0])
    found = plan(
        LayerCosts.of(costs),
        num_devices=devices,
        num_microbatches=microbatches,
        num_rounds=(1, 2, 4),
        memory_cap_bytes=None if memory_cap_bytes is None else int(memory_cap_bytes),
        effort=effort,
    )
    if as_json:
        typer.echo(json.dumps(found.to_json()))
        return
    typer.echo(as_text(found))
    if len(costs.forward_s) > 1 or len(costs.backward_s) > 1:
        typer.echo(
            "- the costs of micro-batches differ: this is the plan of as many with their mean seconds, most bytes"
        )


def as_text(found: RoundPipePlan) -> str:
    """Return the plan in words: what runs, what it costs, why."""
    cut = found.partition
    lines = [
        f"{found.num_devices} devices, {sum(found.rounds)} micro-batches in rounds of {list(found.rounds)}, "
        f"{found.open_slots} open slot(s)",
        f"layers in forward slots   {list(cut.forward)}",
        f"layers in the fused slot  {cut.fused}",
        f"layers in backward slots  {list(cut.backward)}",
        f"makespan {found.makespan_s:.6g} s, bubble {found.bubble:.2%}, useful {found.useful:.2%}"
        + (f", {found.peak_bytes:,} bytes a device" if found.peak_bytes else ""),
        *(f"- {reason}" for reason in found.reasons),
    ]
    return "\n".join(lines)
