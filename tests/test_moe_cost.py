"""T(r) against the event simulation, and what the cost values refuse."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.cost import LayerLoad, Line, Profile, StageTimes, Table, busiest_bytes, layer_time, serial_time, stage_times
from moe.errors import PlanError
from moe.plan import Op, intra_order
from moe.simulate import makespan, peak_bytes, predict, timeline

TIME = st.floats(0, 10).map(lambda x: 0.0 if x < 1e-3 else x)
STAGES = st.builds(StageTimes, TIME, TIME, TIME, TIME, TIME)


@given(STAGES, st.integers(1, 16))
def test_the_formula_is_the_event_simulation(t, chunks):
    intra = intra_order(chunks, "fifo")
    exact = layer_time(t, chunks)
    assert makespan(t, intra) == pytest.approx(exact, rel=1e-12)
    assert max(e.t1_s for e in timeline(t, intra)) == pytest.approx(exact, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("chunks", range(1, 17))
def test_the_formula_on_many_layers(chunks):
    """200,000 layers, a fifth of their stages free of cost."""
    rng = np.random.default_rng(chunks)
    times = [np.exp(rng.normal(0, 1.5, 12_500)) * (rng.random(12_500) > 0.2) for _ in range(5)]
    t = StageTimes(*times)
    np.testing.assert_allclose(makespan(t, intra_order(chunks, "fifo")), layer_time(t, chunks), rtol=1e-12)


@given(STAGES, st.integers(1, 8), st.integers(1, 7))
def test_ready_order_agrees_between_recurrence_and_events(t, chunks, lag):
    intra = intra_order(chunks, "ready", lag)
    assert max(e.t1_s for e in timeline(t, intra)) == pytest.approx(float(makespan(t, intra)), rel=1e-9, abs=1e-9)


@given(STAGES, st.integers(1, 6))
def test_lanes_run_one_operation_at_a_time_in_order_and_after_what_they_need(t, chunks):
    events = timeline(t, intra_order(chunks, "fifo"))
    for lane in ("inter", "intra", "compute"):
        mine = [e for e in events if e.lane == lane]
        assert all(a.t1_s <= b.t0_s + 1e-9 for a, b in pairwise(mine))
    at = {e.op: e for e in events}
    assert len(at) == 5 * chunks + (t.gradient > 0)
    chain = ("dispatch", "gather", "expert", "scatter", "combine")
    for i in range(chunks):
        assert all(at[Op(a, i)].t1_s <= at[Op(b, i)].t0_s + 1e-9 for a, b in pairwise(chain))


def test_a_slowdown_stretches_what_runs_together():
    t = StageTimes(all_to_all=1.0, gather=0.0, expert=4.0, scatter=0.0, gradient=4.0)
    alone = timeline(t, intra_order(1, "fifo"))
    assert max(e.t1_s for e in alone) == 6.0
    # After the dispatch, experts and gradients run side by side at half speed: 8 s for both.
    slow = timeline(t, intra_order(1, "fifo"), {("inter", "compute"): 2.0, ("compute", "inter"): 2.0})
    assert max(e.t1_s for e in slow) == pytest.approx(10.0)
    one_way = timeline(t, intra_order(1, "fifo"), {("compute", "inter"): 2.0})
    assert max(e.t1_s for e in one_way) == pytest.approx(1 + 4 + 2 + 1)


def test_an_order_that_cannot_run_is_an_error():
    t = StageTimes(1.0, 1.0, 1.0, 1.0)
    with pytest.raises(PlanError, match=r"gather i must be issued before scatter i"):
        timeline(t, (Op("scatter", 0), Op("gather", 0)))


def test_peak_bytes_of_one_chunk_by_hand():
    profile = Profile(all_to_all=Line(0, 1), all_gather=Line(0, 1), reduce_scatter=Line(0, 1),
                      expert_forward=Line(0, 1), expert_backward=Line(0, 2))  # fmt: skip
    load = LayerLoad(exchange_bytes=10, gather_bytes=20, expert_rows=5)
    t = stage_times(profile, load, 1, backward=False)
    assert (t.all_to_all, t.gather, t.expert, t.scatter, t.gradient) == (10, 20, 5, 20, 0)
    # The experts' input and output are alive together: 20 + 20.
    assert peak_bytes(predict(profile, t, 1), load, 1) == 40
    assert serial_time(profile, load, backward=True) == 10 + 20 + 10 + 20 + 10


def test_costs():
    assert Line(2.0, 3.0)(0) == 0
    assert Line(2.0, 3.0)(4) == 14
    table = Table((10.0, 20.0, 40.0), (1.0, 3.0, 4.0))
    assert [table(n) for n in (0, 5, 10, 15, 20, 30, 40, 80)] == [0, 1, 1, 2, 3, 3.5, 4, 6]


def test_a_profile_reads_itself_back():
    profile = Profile(
        all_to_all=Line(1e-3, 2e-9),
        all_gather=Table((1.0, 2.0), (3.0, 4.0)),
        expert_forward=Line(0.0, 1e-6),
        expert_backward=Line(0.0, 2e-6),
        slowdowns={"inter+intra": 1.1},
        residuals={"all_to_all": 0.02},
    )
    assert Profile.from_json(profile.to_json()) == profile
    assert profile.slowdown("intra", "inter") == profile.slowdown("inter", "intra") == 1.1
    assert profile.slowdown("compute", "inter") == 1.0
    with pytest.raises(PlanError, match=r"not a profile.*python -m moe profile"):
        Profile.from_json('{"all_to_all": 3}')
    with pytest.raises(PlanError, match=r"slowdown 'inter\+gpu' is 2"):
        Profile(
            all_to_all=Line(0, 1), expert_forward=Line(0, 1), expert_backward=Line(0, 1), slowdowns={"inter+gpu": 2}
        )


def test_the_busiest_direction_of_real_splits():
    assert busiest_bytes([[3, 3], [3, 3]]) == 6
    assert busiest_bytes([[100, 0, 0], [0, 100, 0], [0, 0, 100]]) == 0
    assert busiest_bytes([[0, 10, 0], [0, 0, 0], [0, 20, 7]]) == 30 * 3 / 2
    assert busiest_bytes([[5]]) == 0
    with pytest.raises(PlanError, match="give a square table"):
        busiest_bytes([[1, 2]])
