"""Models, partitions and problems of RoundPipe's planner that several tests share."""

from hypothesis import strategies as st

from pipeline.roundpipe.search import Problem
from pipeline.roundpipe.slots import LayerCosts, rounds_of
from pipeline.schedules.roundpipe import Slots


def uniform(num_layers, **others):
    return LayerCosts(forward_s=(1.0,) * num_layers, backward_s=(2.0,) * num_layers, **others)


def compositions(total):
    """Every way to write total as an ordered sum."""
    if total == 0:
        yield ()
    for first in range(1, total + 1):
        for rest in compositions(total - first):
            yield (first, *rest)


@st.composite
def problems(draw):
    num = draw(st.integers(2, 7))
    times = st.integers(1, 9).map(float)
    costs = LayerCosts(
        forward_s=tuple(draw(times) for _ in range(num)),
        backward_s=tuple(draw(times) for _ in range(num)),
        transfer_s=draw(st.sampled_from([0.0, 0.5, 3.0])),
    )
    fused = draw(st.integers(1, num - 1))
    cuts = [draw(st.sampled_from(list(compositions(num - fused)))) for _ in range(2)]
    rounds = rounds_of(draw(st.integers(2, 6)), draw(st.integers(1, 2)))
    problem = Problem(
        costs=costs, rounds=rounds, num_devices=draw(st.integers(1, 4)), open_slots=draw(st.integers(1, 3))
    )
    return problem, Slots(forward=cuts[0], fused=fused, backward=cuts[1])
