"""The simulator against closed formulas, golden values and its own book-keeping."""

import pytest

from pipeline.actions import Op, Phase
from pipeline.comms import complete, with_messages
from pipeline.costs import Costs
from pipeline.schedules import SCHEDULES
from pipeline.schedules.build import with_recompute
from pipeline.schedules.roundpipe import Slots
from pipeline.simulate import simulate
from pipeline.units import Unit

ONE_F_ONE_B = SCHEDULES["1f1b"]
STATE_AWARE = SCHEDULES["state_aware_1f1b"]
GROUP_OF_TWO = (Unit(2, 0, 0, 2, 2), Unit(2, 0, 1, 2, 2))


@pytest.mark.parametrize(
    ("schedule", "factors", "makespan", "bubble"),
    [
        (ONE_F_ONE_B(devices=4, microbatches=4), (1, 1, 1, 1), 21, 42.86),
        (ONE_F_ONE_B(devices=4, microbatches=4), (4, 2, 1, 1), 56, 57.14),
        (
            STATE_AWARE(devices=4, units=[Unit(2), Unit(2), Unit(2, 0, 0, 2, 2), Unit(2, 0, 1, 2, 2)]),
            (2,) * 4,
            46,
            47.83,
        ),
        (STATE_AWARE(devices=4, units=[Unit(4), Unit(4)]), (4, 4), 60, 60.0),
    ],
)
def test_golden_values(schedule, factors, makespan, bubble):
    result = simulate(schedule, Costs.uniform(4).scaled(factors))
    assert result.makespan_s == makespan
    assert round(100 * result.bubble.total, 2) == bubble


@pytest.mark.parametrize(("devices", "microbatches"), [(2, 2), (4, 4), (4, 9), (8, 16)])
def test_formulas_of_weight_bound_schedules(devices, microbatches):
    p, m = devices, microbatches
    costs = Costs.uniform(p, forward_s=1, backward_s=2)
    assert simulate(ONE_F_ONE_B(devices=p, microbatches=m), costs).makespan_s == 3 * (m + p - 1)
    assert simulate(SCHEDULES["gpipe"](devices=p, microbatches=m), costs).makespan_s == 3 * (m + p - 1)
    looped = SCHEDULES["looped_bfs"](devices=p, microbatches=m)
    assert simulate(looped, Costs.uniform(2 * p)).makespan_s == 3 * (2 * m + p - 1)
    zero_bubble = simulate(SCHEDULES["zb_h1"](devices=p, microbatches=m), costs)
    assert zero_bubble.makespan_s == 3 * m + p - 1  # (p - 1)(F + I - W), against (p - 1)(F + I + W)


def uniform_slots(whole, single):
    """Slots that all take a second: `whole` layers of 1 + 0 s, `single` pairs of layers of 1/2 + 1/2 s, a head."""
    slots = Slots(forward=(1,) * whole + (2,) * single, fused=1, backward=(1,) * (2 * single + whole))
    forward_s = (1.0,) * whole + (0.5,) * (2 * single) + (0.5,)
    return slots, Costs(forward_s=(forward_s,), backward_s=(tuple(1 - f for f in forward_s),))


@pytest.mark.parametrize(
    ("devices", "microbatches", "whole", "single", "percent"),
    [(8, 16, 1, 7, 12.7), (8, 16, 0, 8, 21.9), (4, 4, 1, 3, None), (4, 6, 2, 5, None), (2, 5, 0, 3, None)],
)
def test_roundpipe_uniform_slots(devices, microbatches, whole, single, percent):
    slots, costs = uniform_slots(whole, single)
    schedule = SCHEDULES["roundpipe"](devices=devices, microbatches=microbatches, slots=slots)
    s, n, m = schedule.num_stages, devices, microbatches
    result = simulate(schedule, costs)
    expected = (s - 1) // n * m + (s - 1) % n + m
    assert result.makespan_s == pytest.approx(expected)
    assert result.bubble.total == pytest.approx(1 - s * m / (n * expected))
    if s % n == 0:
        assert result.bubble.total == pytest.approx(n * (n - 1) / (s * m + n * (n - 1)))
    if percent is not None:
        assert round(100 * result.bubble.total, 1) == percent


def test_a_latency_needs_more_microbatches_to_hide():
    """Bubble-free from M >= N (1 + c/t) on: the device comes back to its next slot when the first of it is ready."""
    slots, costs = uniform_slots(0, 5)
    costs = Costs(forward_s=costs.forward_s, backward_s=costs.backward_s, hop_s=0.5)
    for microbatches, waits in ((4, True), (6, False)):
        schedule = SCHEDULES["roundpipe"](devices=4, microbatches=microbatches, slots=slots)
        bubble = simulate(schedule, costs).bubble
        assert (bubble.transfer > 1e-9) == waits


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_parts_of_the_bubble_are_all_idle_time(name):
    plain = SCHEDULES[name](devices=3, microbatches=5)
    costs = Costs.uniform(plain.num_layers, hop_s=0.3, weight_bytes=(2,), boundary_bytes=(1,), host_bytes_per_s=4.0)
    result = simulate(complete(plain), costs)
    compute = [s for s in result.spans if s.action.op.value in ("F", "B", "I", "W", "R", "FB")]
    busy = sum(s.end_s - s.start_s for s in compute) / (3 * result.makespan_s)
    assert result.bubble.total == pytest.approx(1 - busy)
    assert min(vars_of(result.bubble)) >= -1e-12
    assert result.critical_path[0].start_s == pytest.approx(0)
    assert result.critical_path[-1].end_s == result.makespan_s


def vars_of(bubble):
    return [getattr(bubble, name) for name in ("fill", "drain", "transfer", "switch", "imbalance")]


def test_useful_does_not_count_recompute():
    plain = ONE_F_ONE_B(devices=2, microbatches=4)
    kept, again = (simulate(s, Costs.uniform(2)) for s in (plain, with_recompute(plain)))
    assert again.makespan_s == 4 * 4 + 4 - 1  # the last recompute of device 0 hides in the wait for its gradient
    assert again.useful == pytest.approx(3 * 4 * 2 / (2 * again.makespan_s))
    assert kept.useful == pytest.approx(1 - kept.bubble.total)


def test_memory_of_1f1b_is_devices_minus_rank_microbatches():
    costs = Costs.uniform(4, activation_bytes=((10,),), weight_bytes=(100,))
    kept = simulate(ONE_F_ONE_B(devices=4, microbatches=8), costs)
    assert kept.peak_bytes == (240, 230, 220, 210)
    gpipe = simulate(SCHEDULES["gpipe"](devices=4, microbatches=8), costs)
    assert gpipe.peak_bytes == (280,) * 4
    again = simulate(with_recompute(SCHEDULES["gpipe"](devices=4, microbatches=8)), costs)
    assert again.peak_bytes == (210,) * 4


@pytest.mark.parametrize(("devices", "layers"), [(1, 5), (2, 9), (2, 33), (4, 33)])
def test_memory_of_roundpipe_does_not_depend_on_layers_devices_or_microbatches(devices, layers):
    costs = Costs.uniform(
        layers, activation_bytes=((7,),), weight_bytes=(100,), boundary_bytes=(1,), host_bytes_per_s=1e4
    )
    slots = Slots(forward=(2,) * ((layers - 1) // 2), fused=1, backward=(2,) * ((layers - 1) // 2))
    schedule = complete(SCHEDULES["roundpipe"](devices=devices, microbatches=2 * devices, slots=slots))
    assert (
        max(simulate(schedule, costs).peak_bytes) <= 3 * 200 + 2 * 7 + 4
    )  # two weights, one gradient, one micro-batch


def test_devices_of_one_root_share_its_bandwidth():
    slots = Slots(forward=(2, 2, 2), fused=1, backward=(1,) * 6)
    schedule = complete(SCHEDULES["roundpipe"](devices=2, microbatches=2, slots=slots))
    own = Costs.uniform(7, weight_bytes=(10,), host_bytes_per_s=10.0, chunk_bytes=1)
    shared = Costs.uniform(7, weight_bytes=(10,), host_bytes_per_s=10.0, chunk_bytes=1, pcie_roots=(0, 0))
    assert simulate(schedule, shared).makespan_s > simulate(schedule, own).makespan_s


def test_activations_go_before_the_pieces_of_weights():
    slots = Slots(forward=(1, 1), fused=1, backward=(1, 1))
    schedule = complete(SCHEDULES["roundpipe"](devices=2, microbatches=4, slots=slots))
    sizes = {"weight_bytes": (40,), "boundary_bytes": (1,), "host_bytes_per_s": 10.0}
    whole, pieces = (simulate(schedule, Costs.uniform(3, **sizes, chunk_bytes=n)) for n in (1000, 1))
    assert pieces.makespan_s < whole.makespan_s


def test_messages_take_latency_and_bandwidth():
    costs = Costs.uniform(2, hop_s=0.25, boundary_bytes=(3,), link_bytes_per_s=4.0)
    schedule = ONE_F_ONE_B(devices=2, microbatches=1)
    assert simulate(schedule, costs).makespan_s == simulate(with_messages(schedule), costs).makespan_s == 6 + 2 * 1.0


def test_the_optimizer_of_the_host_delays_the_next_step_unless_it_may_lag():
    slots = Slots(forward=(1, 1), fused=1, backward=(1, 1))
    costs = Costs.uniform(3, optimizer_s=(5,))
    sync, stale = (
        simulate(complete(SCHEDULES["roundpipe"](devices=2, microbatches=2, slots=slots, steps=4, staleness=s)), costs)
        for s in (0, 1)
    )
    assert stale.makespan_s < sync.makespan_s


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_byte_of_a_message_is_given_back_after_it_was_taken(name):
    """The first action of the first device makes one, too; a gradient is there until its backward has ended."""
    costs = Costs.uniform(8, boundary_bytes=(10,), hop_s=0.5, link_bytes_per_s=20.0, host_bytes_per_s=20.0)
    schedule = complete(SCHEDULES[name](devices=2, microbatches=3))
    result = simulate(schedule, costs)
    for curve in result.memory:
        assert min(level for _, level in curve) == 0
        assert curve[-1][1] == 0
    for span in result.spans:
        brings = span.action.op in (Op.RECV, Op.GET) and span.action.phase is Phase.B
        used = [
            s
            for s in result.spans
            if brings
            and s.device == span.device
            and s.action.op in (Op.B, Op.I)
            and (s.action.stage, s.action.microbatch) == (span.action.stage, span.action.microbatch)
        ]
        for user in used:
            inside = (user.start_s + user.end_s) / 2
            assert [level for time, level in result.memory[span.device] if time <= inside][-1] >= 10
