"""What crosses from one stage to another: the activations and gradients that messages and host transfers carry."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.actions import COMPUTE, FORWARD, Action, Op, Phase
from pipeline.graph import Graph, Why
from pipeline.schedule import Schedule


def without_transfers(schedule: Schedule) -> Schedule:
    """Compute actions, and the FREE of chunk groups, only."""

    def stays(a: Action) -> bool:
        return a.op in COMPUTE or (a.op is Op.FREE and a.microbatch is not None)

    return schedule.with_devices([[a for a in row if stays(a)] for row in schedule.devices])


def crossings(graph: Graph, *kinds: Why) -> Iterator[tuple[int, int, int]]:
    """(consumer, maker, boundary) of every activation and gradient that goes from one stage to another."""
    found = graph.listing
    for i, before in enumerate(graph.before):
        action = found.actions[i]
        lo, hi = found.schedule.layers(action)
        for j, why in before:
            maker = found.actions[j]
            if why in kinds and maker.op in COMPUTE and maker.stage != action.stage:
                yield i, j, lo if _is_forward(action) else hi


def _is_forward(action: Action) -> bool:
    return action.op in FORWARD or action.op is Op.R


def ends(graph: Graph, maker: int, user: int, at: int, give: Op, take: Op) -> tuple[Action, Action]:
    """The two actions, `give` and `take`, that carry boundary `at` from its maker to its user.

    What is given away from the middle of a stage names the layers up to there.
    """
    a, b = graph.listing.actions[maker], graph.listing.actions[user]
    lo, hi = graph.listing.schedule.layers(a)
    phase = Phase.F if _is_forward(b) else Phase.B
    layers = a.layers if at in (lo, hi) else (lo, at)
    return Action(give, a.stage, a.microbatch, phase, layers), Action(take, b.stage, b.microbatch, phase, b.layers)
