"""The published cost tables of RoundPipe's schedule simulation, as the planner takes them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.roundpipe.slots import LayerCosts
from pipeline.schedules.roundpipe import Slots

TABLES = Path(__file__).parent / "data" / "roundpipe_layer_costs.json"
NUM_DEVICES, NUM_MICROBATCHES, PUBLISHED_ROUNDS = 8, 16, (8, 8)


@dataclass(frozen=True, slots=True)
class Model:
    """One row of the published table; seconds are milliseconds here and there, so ratios only."""

    name: str
    costs: LayerCosts
    """Equal layers, then the head."""
    published: Slots
    published_bubble: float


def slot_sizes(given: list[int] | str, layers: int) -> list[int]:
    """Read the slot lists, of which some are words."""
    if isinstance(given, list):
        return given
    if given == "47 slots of two layers":
        return [2] * 47
    if given == f"one fused slot without layers, then {layers} slots of one layer":
        return [0] + [1] * layers
    raise ValueError(f"the table gives slots as {given!r}; write them as a list")


def read_model(name: str, row: dict[str, Any]) -> Model:
    """Turn one row into costs and the published partition (the head is a layer of ours, and always fused)."""
    layers = row["layers"]
    backward = slot_sizes(row["backward_slots"], layers)
    return Model(
        name=name,
        costs=LayerCosts(
            forward_s=(row["forward_ms"],) * layers + (row["head_forward_ms"],),
            backward_s=(row["backward_ms"],) * layers + (row["head_backward_ms"],),
            transfer_s=row["transfer_ms"],
        ),
        published=Slots(
            forward=tuple(slot_sizes(row["forward_slots"], layers)),
            fused=1 + backward[0],
            backward=tuple(backward[1:]),
        ),
        published_bubble=row["published_sync_bubble"],
    )


def read_models() -> list[Model]:
    """Return the five models, smallest first."""
    return [read_model(name, row) for name, row in json.loads(TABLES.read_text())["models"].items()]
