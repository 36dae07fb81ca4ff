"""The planner against exhaustive search, its thresholds, its memory limit, and its reasons."""

from dataclasses import replace
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.calibrate import CHUNKS, LayerTimes, with_overheads
from moe.cost import LayerLoad, Line, Profile, Table, lane_bound, layer_time, serial_time, stage_times
from moe.errors import PlanError
from moe.plan import intra_order, pieces
from moe.planner import best_choice, best_fixed, best_pair, direction_time, plan_layer
from moe.simulate import peak_bytes, predict, timeline

ALPHA = st.floats(0, 5e-3)
RATE = st.floats(1e-9, 1e-7)
LINE = st.builds(Line, ALPHA, RATE)
PROFILES = st.builds(
    lambda a, g, s, r, e, k: Profile(
        all_to_all=a, all_gather=g, reduce_scatter=s, all_reduce=r,
        expert_forward=e, expert_backward=Line(e.alpha_s, k * e.beta_s),
    ),
    LINE, LINE, LINE, LINE, st.builds(Line, ALPHA, st.floats(1e-6, 1e-4)), st.floats(1.5, 3),
)  # fmt: skip
BYTES = st.floats(1e5, 1e7)
LOADS = st.builds(
    lambda n, g, rows, gradient: LayerLoad(
        exchange_bytes=n, gather_bytes=g, expert_rows=rows, gradient_bytes=gradient
    ),
    BYTES, st.one_of(st.just(0.0), BYTES), st.floats(10, 5000), st.one_of(st.just(0.0), BYTES),
)  # fmt: skip


def simulated(profile, load, r, order, lag, backward):
    t = stage_times(profile, load, r, backward=backward)
    return max(e.t1_s for e in timeline(t, intra_order(r, order, lag)))


@given(PROFILES, LOADS, st.booleans())
def test_a_direction_is_the_exhaustive_minimum(profile, load, backward):
    for order, lags in (("fifo", [1]), ("ready", [1, 2, 3, 4])):
        found = best_choice(profile, load, backward=backward, order=order, max_chunks=5)
        every = [simulated(profile, load, r, order, lag, backward) for r in range(1, 6) for lag in lags]
        assert min(every) * (1 - 1e-9) <= found.time_s <= min(every) * 1.01
        fewer = [simulated(profile, load, r, order, lag, backward) for r in range(1, found.chunks) for lag in lags]
        assert all(time_s > min(every) * 1.01 * (1 - 1e-9) for time_s in fewer)
        again = simulated(profile, load, found.chunks, found.order, found.lag, backward)
        assert again == pytest.approx(found.time_s, rel=1e-9)


@given(PROFILES, LOADS)
def test_a_plan_is_never_slower_than_its_peers_and_says_why(profile, load):
    plan = plan_layer(profile, load)
    fixed_r, fixed_s = best_fixed(profile, load)
    serial_s = sum(serial_time(profile, load, backward=b) for b in (False, True))
    bound = sum(lane_bound(profile, load, backward=b) for b in (False, True))
    assert plan.predicted_serial_s == pytest.approx(serial_s)
    assert plan.predicted_s <= fixed_s * 1.03 * 1.01
    assert plan.predicted_s <= serial_s * 1.01
    if plan.schedule == (fixed_r, fixed_r, "fifo", 1, 1, 0):
        assert plan.predicted_s == pytest.approx(fixed_s)
    elif plan.schedule != (1, 1, "fifo", 1, 1, 0):
        assert fixed_s >= 1.03 * plan.predicted_s * (1 - 1e-9)
    assert bound <= plan.predicted_s * (1 + 1e-9)
    assert f"{plan}".count("\n  - ") == len(plan.reasons) >= 3


def table(smallest, steps):
    """Measured points in which large pieces may cost more than all the small ones that they are made of."""
    return Table(tuple(smallest * 4.0**i for i in range(len(steps))), tuple(accumulate(steps)))


STEPS = st.lists(st.floats(1e-5, 1e-2), min_size=3, max_size=3)


@given(STEPS, STEPS, STEPS, LOADS)
def test_no_plan_is_under_its_bound_where_tables_stand(link, forward, backward, load):
    profile = Profile(
        all_to_all=table(1e4, link), all_reduce=Line(1e-3, 1e-8), all_gather=table(1e4, forward),
        reduce_scatter=Line(1e-3, 4e-9), expert_forward=table(10, forward), expert_backward=table(10, backward),
    )  # fmt: skip
    for choice, is_backward in zip(best_pair(profile, load, max_chunks=4), (False, True), strict=True):
        bound = lane_bound(profile, load, backward=is_backward, max_chunks=4)
        assert 0 < bound <= choice.time_s * (1 + 1e-9)


def case(a=1e-8, g=4e-9, e=2e-5, alpha=1e-3):
    return Profile(
        all_to_all=Line(alpha, a), all_gather=Line(alpha, g), reduce_scatter=Line(alpha, g), all_reduce=Line(alpha, a),
        expert_forward=Line(1e-5, e), expert_backward=Line(1e-5, 2 * e),
    )  # fmt: skip


LOAD = LayerLoad(exchange_bytes=4e6, gather_bytes=8e6, expert_rows=2000, gradient_bytes=3e6)


def test_forward_and_backward_get_their_own_r():
    plan = plan_layer(case(), replace(LOAD, gradient_bytes=6e6))
    assert (plan.forward_chunks, plan.backward_chunks, plan.pieces) == (4, 3, 6)
    assert plan.gradient_bytes == 6_000_000
    assert plan.reasons[0].startswith(f"forward r = {plan.forward_chunks}: ")
    assert "limited by" in plan.reasons[0]
    assert plan.predicted_s < plan.predicted_serial_s / 1.3


def test_no_gain_is_one_chunk():
    plan = plan_layer(case(alpha=0.5), replace(LOAD, gradient_bytes=0.0))
    assert (plan.forward_chunks, plan.backward_chunks, plan.gradient_bytes) == (1, 1, 0)
    assert plan.predicted_s == pytest.approx(plan.predicted_serial_s)
    assert any("over none, 1.03 needed: r = 1" in r for r in plan.reasons)


def test_a_single_r_within_3_percent_is_kept():
    # All inter-node: backward without gradients is as long as forward, so one r is best for both.
    profile = replace(case(), expert_backward=case().expert_forward)
    plan = plan_layer(profile, replace(LOAD, gradient_bytes=0.0, gather_bytes=0.0))
    assert plan.forward_chunks == plan.backward_chunks > 1
    assert any("stays with that" in r for r in plan.reasons)
    ways = [f"{way} r = {plan.forward_chunks}" for way in ("forward", "backward")]
    assert [reason.split(":")[0] for reason in plan.reasons[:2]] == ways


def test_ready_order_is_taken_only_for_8_percent():
    """Early scatters pay where g < a < s: fifo leaves the intra-node lane idle while it waits for dispatches."""
    taken = kept = 0
    for s in (4e-9, 8e-9, 1.2e-8, 1.6e-8, 3e-8):
        for e in (2e-6, 2e-5, 4e-5):
            profile = replace(case(g=2e-9, e=e, alpha=2e-4), reduce_scatter=Line(2e-4, s))
            plan = plan_layer(profile, LOAD)
            fifo = sum(best_choice(profile, LOAD, backward=b).time_s for b in (False, True))
            ready = sum(best_choice(profile, LOAD, backward=b, order="ready").time_s for b in (False, True))
            taken += plan.order == "ready"
            kept += plan.order == "fifo"
            assert (plan.order == "ready") <= (fifo >= 1.08 * ready)
    assert taken
    assert kept


def test_slowdowns_enter_the_prediction():
    slow = replace(case(), slowdowns={"inter+intra": 1.3, "compute+inter": 1.2})
    plain, slowed = plan_layer(case(), LOAD), plan_layer(slow, LOAD)
    assert plain.predicted_s < slowed.predicted_s < plain.predicted_serial_s
    assert "lanes slow one another: inter+intra 1.30x, compute+inter 1.20x" in slowed.reasons


def test_memory_limits_r():
    free = plan_layer(case(), LOAD)
    needs = [
        peak_bytes(predict(case(), stage_times(case(), LOAD, r, backward=b), r), LOAD, r)
        for r, b in ((free.forward_chunks, False), (free.backward_chunks, True))
    ]
    assert plan_layer(case(), LOAD, memory_bytes=max(needs)).schedule == free.schedule
    tight = plan_layer(case(), LOAD, memory_bytes=min(needs) * 0.9)
    assert tight.schedule != free.schedule
    for b in (False, True):
        r, lag = tight.chunks(backward=b), tight.backward_lag if b else tight.forward_lag
        events = predict(case(), stage_times(case(), LOAD, r, backward=b), r, order=tight.order, lag=lag)
        assert peak_bytes(events, LOAD, r) <= min(needs) * 0.9
    with pytest.raises(PlanError, match=r"no r of 1\.\.16 keeps the communication buffers in 1000 bytes.*raise the"):
        plan_layer(case(), LOAD, memory_bytes=1000)


def test_an_empty_layer_is_plain():
    plan = plan_layer(case(), LayerLoad(exchange_bytes=0, expert_rows=0))
    assert (plan.forward_chunks, plan.backward_chunks) == (1, 1)


@given(PROFILES, LOADS)
def test_more_work_never_takes_less(profile, load):
    more = replace(load, gradient_bytes=load.gradient_bytes + 1e6)
    for backward in (False, True):
        one = best_choice(profile, load, backward=backward).time_s
        assert best_choice(profile, more, backward=backward).time_s >= one / 1.01


EVEN = Profile(
    all_to_all=Line(2e-4, 1e-8), all_reduce=Line(2e-4, 1e-8),
    expert_forward=Line(1e-4, 2e-5), expert_backward=Line(1e-4, 4e-5),
)  # fmt: skip
EVEN_LOAD = LayerLoad(exchange_bytes=2e6, expert_rows=2000)


def times_of(profile, load, backward):
    took = {r: direction_time(profile, load, r, backward=backward) for r in CHUNKS}
    busy = {r: r * stage_times(profile, load, r, backward=backward).expert for r in CHUNKS}
    return LayerTimes(layer_s=took, computing_s=busy)


@pytest.mark.parametrize(("alpha_s", "beta_s", "layer_s"), [(0.0, 0.0, 0.0), (1e-3, 0.0, 0.0), (4e-4, 2e-9, 4e-3)])
def test_what_the_executor_costs_is_found_from_what_layers_took(alpha_s, beta_s, layer_s):
    """Times made with known costs give these back."""
    piece, twice = Line(alpha_s, beta_s), Line(2 * alpha_s, beta_s)
    truth = replace(EVEN, piece_forward=piece, piece_backward=twice, layer_s=layer_s)
    found = with_overheads(EVEN, EVEN_LOAD, *(times_of(truth, EVEN_LOAD, b) for b in (False, True)))
    for got, wanted in ((found.piece_forward, piece), (found.piece_backward, twice)):
        assert (got.alpha_s, got.beta_s) == pytest.approx((wanted.alpha_s, wanted.beta_s), abs=1e-9)
    assert found.layer_s == pytest.approx(layer_s, abs=1e-9)
    assert Profile.from_json(found.to_json()) == found


def test_a_layer_that_was_faster_than_its_experts_has_no_overhead():
    quick = LayerTimes(layer_s=dict.fromkeys(CHUNKS, 1e-3), computing_s=dict.fromkeys(CHUNKS, 1e-3))
    for load in (EVEN_LOAD, LayerLoad(exchange_bytes=0, expert_rows=2000)):  # also where no row left its rank
        found = with_overheads(EVEN, load, quick, quick)
        assert found.piece_forward == found.piece_backward == Line(0.0, 0.0)
        assert found.layer_s == 0.0


def test_pieces_that_cost_something_make_chunks_fewer_and_alike():
    dear = replace(case(), piece_forward=Line(8e-3, 0), piece_backward=Line(8e-3, 0))
    load = replace(LOAD, gradient_bytes=6e6)
    free, costly = (plan_layer(profile, load) for profile in (case(), dear))
    assert free.forward_chunks != free.backward_chunks
    assert costly.forward_chunks == costly.backward_chunks
    assert plan_layer(replace(EVEN, layer_s=4e-3), EVEN_LOAD).predicted_serial_s == pytest.approx(
        plan_layer(EVEN, EVEN_LOAD).predicted_serial_s + 8e-3
    )


@given(PROFILES, LOADS, st.floats(0, 5e-3))
def test_a_pair_is_the_exhaustive_minimum_over_both_directions(profile, load, piece_s):
    profile = replace(profile, piece_forward=Line(piece_s, 1e-9), piece_backward=Line(piece_s, 1e-9))

    def together(f, b):
        every = ((f, False), (b, True))
        times = [stage_times(profile, load, r, backward=way, pieces=pieces(f, b)) for r, way in every]
        return sum(float(layer_time(t, r)) for t, (r, _) in zip(times, every, strict=True))

    pairs = {(f, b): together(f, b) for f in range(1, 6) for b in range(1, 6)}
    least_s = min(pairs.values())
    forward, backward = best_pair(profile, load, max_chunks=5)
    chosen = (forward.chunks, backward.chunks)
    assert forward.time_s + backward.time_s == pytest.approx(pairs[chosen])
    assert pairs[chosen] <= least_s * 1.01 * (1 + 1e-9)
    fewer = [pair for pair in pairs if pieces(*pair) < pieces(*chosen)]
    assert all(pairs[pair] > least_s * 1.01 * (1 - 1e-9) for pair in fewer)


def test_overheads_below_zero_are_refused():
    with pytest.raises(PlanError, match="layer_s is -1"):
        replace(EVEN, layer_s=-1)


def test_costs_of_nothing_and_beyond_all_measure_are_no_trouble():
    """Zeros divide nothing, and what would come to infinity, where the search could not end, is refused."""
    free = Profile(all_to_all=Line(0, 0), expert_forward=Line(0, 0), expert_backward=Line(0, 0))
    load = LayerLoad(exchange_bytes=1e6, gather_bytes=1e6, expert_rows=100, gradient_bytes=1e5)
    plan = plan_layer(free, load)
    assert (plan.forward_chunks, plan.backward_chunks, plan.predicted_s) == (1, 1, 0)
    slowed = replace(free, slowdowns={"inter+intra": 2.0})
    for change in ({"all_to_all": Line(0, 1e300)}, {"expert_backward": Line(1e308, 0)}, {"all_reduce": Line(0, 1e308)}):
        for profile in (free, slowed):
            with pytest.raises(PlanError, match="s; look at the units of the profile and of the load"):
                plan_layer(replace(profile, **change), load)
