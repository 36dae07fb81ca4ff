"""Orders that a plan chooses: ready-first slots, and order, retain and lead of chunk groups."""

import pytest

from chunkflow.lengths import lmsys
from pipeline.actions import Op
from pipeline.comms import complete
from pipeline.costs import Costs
from pipeline.errors import PlanError
from pipeline.schedules import SCHEDULES
from pipeline.schedules.build import with_recompute
from pipeline.schedules.dispatch import ready_first
from pipeline.schedules.orders import plan_state_aware, plan_whole_sequences
from pipeline.schedules.roundpipe import Slots
from pipeline.simulate import simulate
from pipeline.unit_costs import UnitModel
from pipeline.units import Unit
from pipeline.validate import validate

ROUNDPIPE = SCHEDULES["roundpipe"]


def heavy_head(layers):
    """A head that weighs 8 layers."""
    forward_s = (1.0,) * layers + (8.0,)
    return Costs(forward_s=(forward_s,), backward_s=(tuple(2 * f for f in forward_s),))


def best_one_f_one_b(costs, microbatches):
    """1F1B on 2 devices at its best split; the last stage, whose backward follows at once, recomputes nothing."""
    n = costs.num_layers
    splits = [((0, k), (k, n)) for k in range(1, n)]
    make = SCHEDULES["1f1b"]
    runs = [with_recompute(make(devices=2, microbatches=microbatches, layers=s), keep_last_stage=True) for s in splits]
    return min(simulate(run, costs).makespan_s for run in runs)


@pytest.mark.parametrize(("layers", "speed_up"), [(2, 1.5), (4, 1.25), (6, 1.05)])
def test_ready_first_turns_a_heavy_head_where_strict_order_waits(layers, speed_up):
    costs = heavy_head(layers)
    slots = Slots(forward=(layers,), fused=1, backward=(layers,))
    schedule = ROUNDPIPE(devices=2, microbatches=8, slots=slots, rounds=8)
    ready = ready_first(schedule, costs, open_slots=3)
    validate(complete(ready))
    peer = best_one_f_one_b(costs, 8)
    assert peer / simulate(ready, costs).makespan_s >= speed_up
    assert simulate(ready, costs).makespan_s < simulate(schedule, costs).makespan_s
    assert sorted(map(str, schedule.of(0))) == sorted(map(str, ready.of(0)))


def test_one_open_slot_is_strict_order():
    schedule = ROUNDPIPE(devices=3, microbatches=4, rounds=2, steps=2)
    costs = Costs.uniform(schedule.num_layers, hop_s=0.1)
    assert ready_first(schedule, costs, open_slots=1) == schedule
    with pytest.raises(PlanError, match="at least 1, and compute actions only"):
        ready_first(complete(schedule), costs, open_slots=2)


def test_an_order_of_a_plan_is_followed_and_turns_with_the_cursor():
    slots = Slots(forward=(2,), fused=1, backward=(2,))
    costs = Costs.uniform(3)
    one = ready_first(ROUNDPIPE(devices=2, microbatches=4, slots=slots, rounds=2), costs, open_slots=2)
    order = [[(a.stage, a.microbatch) for a in row if a.op is not Op.R] for row in one.devices]
    assert ROUNDPIPE(devices=2, microbatches=4, slots=slots, rounds=2, order=order) == one
    odd = ROUNDPIPE(devices=2, microbatches=1, slots=slots, steps=2)
    assert [a.stage for a in odd.of(0)] == [0, 2, 2, 1]  # three slots a step: the second step begins on device 1
    with pytest.raises(PlanError, match="every one of 3 slots and 4 micro-batches once, on 2 devices"):
        ROUNDPIPE(devices=2, microbatches=4, slots=slots, order=[order[0], order[0]])


def test_open_slots_cost_the_memory_of_their_weights():
    slots = Slots(forward=(2,), fused=1, backward=(2,))
    sizes = {"weight_bytes": (100,), "host_bytes_per_s": 1e6}
    costs = Costs(forward_s=((1, 1, 8),), backward_s=((2, 2, 16),), **sizes)
    schedule = ROUNDPIPE(devices=2, microbatches=8, slots=slots, rounds=4)
    peaks = [max(simulate(complete(ready_first(schedule, costs, open_slots=n)), costs).peak_bytes) for n in (1, 3)]
    assert peaks[0] < peaks[1]
    assert peaks[1] <= 4 * 200 + 3 * 200  # at most the open slots and the next one, and gradients of those open


def chunks(length, group, size=2048, retain=2):
    count = -(-length // size)
    return [Unit(min(size, length - i * size), group, i, count, retain) for i in range(count)]


LONG_TAIL = [*chunks(9000, 0), *chunks(40_000, 1), *chunks(5000, 2), *([Unit(2000)] * 24)]
SEQUENCES = [9000, 40_000, 5000, *([500] * 96)]


def packed(lengths, size=2048):
    """Chunks of the long ones, then the short ones packed first fit, the longest first."""
    units = [u for group, n in enumerate(n for n in lengths if n > size) for u in chunks(n, group)]
    bins = []
    for n in sorted((n for n in lengths if n <= size), reverse=True):
        at = next((i for i, filled in enumerate(bins) if filled + n <= size), None)
        if at is None:
            bins.append(n)
        else:
            bins[at] += n
    return [*units, *map(Unit, bins)]


@pytest.mark.parametrize(("devices", "useful"), [(4, 0.93), (8, 0.88)])
def test_state_aware_1f1b_keeps_its_stages_busy(devices, useful):
    units = packed(lmsys(512, seed=0).tolist())
    by_lead = {}
    for ahead in ("chunks", "groups"):
        schedule = SCHEDULES["state_aware_1f1b"](devices=devices, units=units, ahead=ahead)
        by_lead[ahead] = simulate(schedule, UnitModel(layers=devices).costs(units)).useful
    assert 0.8 < by_lead["chunks"] < useful < by_lead["groups"]


def test_state_aware_1f1b_beats_whole_sequences_at_the_same_cap():
    model = UnitModel(layers=4, attention_tokens=24_576)
    whole = plan_whole_sequences(SEQUENCES, model, devices=4, recompute=True)
    cap = max(whole.best.result.peak_bytes)
    ours = plan_state_aware(LONG_TAIL, model, devices=4, memory_cap_bytes=cap)
    assert max(ours.best.result.peak_bytes) <= cap
    assert ours.best.result.makespan_s < 0.7 * whole.best.result.makespan_s
    validate(complete(ours.best.schedule), costs=model.costs(ours.best.schedule.units), memory_cap_bytes=cap)
    assert ours.table().count(">") == 1


def test_more_retain_needs_memory_and_saves_recompute():
    model = UnitModel(layers=2)
    free = plan_state_aware(LONG_TAIL, model, devices=2, retains=(1, 20))
    assert free.best.retain == 20
    tight = plan_state_aware(LONG_TAIL, model, devices=2, retains=(1, 20), memory_cap_bytes=20_000)
    assert tight.best.retain == 1
    assert tight.best.result.makespan_s > free.best.result.makespan_s
    with pytest.raises(PlanError, match="no order or retain stays within 100 bytes a device; the least needs"):
        plan_state_aware(LONG_TAIL, model, devices=2, memory_cap_bytes=100)


def test_memory_does_not_grow_with_the_longest_group():
    """Forwards for the next units are run between the backwards of a group, but no further ahead than they need."""
    model = UnitModel(layers=4)
    peaks = []
    for count in (10, 60):
        units = [*chunks(count * 2048, 0), *([Unit(2048)] * 80)]
        schedule = SCHEDULES["state_aware_1f1b"](devices=4, units=units)
        peaks.append(simulate(schedule, model.costs(units)).peak_bytes)
    assert peaks[0] == peaks[1]
