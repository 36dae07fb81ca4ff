"""Legal schedules pass; each kind of damage is refused, with an arrow at the spot."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.actions import COMPUTE, Action, Op, Phase
from pipeline.comms import complete, with_messages
from pipeline.costs import Costs
from pipeline.errors import ScheduleError
from pipeline.schedule import Schedule
from pipeline.schedules import SCHEDULES
from pipeline.schedules.build import with_recompute
from pipeline.simulate import simulate
from pipeline.units import Unit
from pipeline.validate import validate

BOUND = [name for name in SCHEDULES if name != "roundpipe"]
GROUPS = [Unit(5), *(Unit(8, 0, i, 4, 2) for i in range(4)), Unit(3), *(Unit(8, 1, i, 2, 1) for i in range(2))]

INDEPENDENT = ({Op.SEND, Op.W}, {Op.SEND, Op.R}, {Op.RECV, Op.R})  # of one stage and micro-batch: in either order


def edited(schedule, device, edit):
    rows = [list(row) for row in schedule.devices]
    edit(rows[device])
    return schedule.with_devices(rows)


def swap(row, i, j):
    row[i], row[j] = row[j], row[i]


@pytest.mark.parametrize("name", SCHEDULES)
def test_generated_schedules_are_valid_plain_completed_and_with_recompute(name):
    for devices in (1, 2, 3, 5):
        for microbatches in (1, 2, 3, 7, 10):
            schedule = SCHEDULES[name](devices=devices, microbatches=microbatches)
            validate(schedule)
            validate(complete(schedule))
            if name != "roundpipe":
                validate(with_messages(with_recompute(schedule, keep_last_stage=True)))


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize(("devices", "rounds", "steps"), [(1, 1, 2), (2, 2, 3), (3, 2, 2), (4, 1, 3)])
def test_roundpipe_is_valid_over_rounds_and_steps(devices, rounds, steps, staleness):
    make = SCHEDULES["roundpipe"]
    schedule = make(devices=devices, microbatches=4, rounds=rounds, steps=steps, staleness=staleness)
    validate(schedule)
    validate(complete(schedule))


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("devices", [1, 2, 3])
def test_roundpipe_is_valid_where_steps_have_other_numbers_of_microbatches(devices, staleness):
    """Rounds, devices and buffers follow: the second step has fewer micro-batches than rounds."""
    schedule = SCHEDULES["roundpipe"](devices=devices, microbatches=(5, 1, 3), rounds=2, staleness=staleness)
    assert (schedule.num_microbatches, schedule.steps, schedule.sizes) == (9, 3, (5, 1, 3))
    assert [schedule.step(m) for m in range(9)] == [0] * 5 + [1] + [2] * 3
    assert [schedule.place(m) for m in range(9)] == [0, 1, 2, 3, 4, 0, 0, 1, 2]
    assert [schedule.round(m) for m in range(9)] == [0, 0, 0, 1, 1, 0, 0, 0, 1]
    validate(schedule)
    validate(complete(schedule))
    assert Schedule.from_text(schedule.to_text()) == Schedule.from_json(schedule.to_json()) == schedule
    begins = {(a.stage, a.microbatch): a.device for row in schedule.devices for a in row if a.op is Op.F}
    slots = schedule.num_stages
    assert [begins[0, schedule.first(step)] for step in range(3)] == [0, 2 * slots % devices, 3 * slots % devices]


@st.composite
def legal_schedules(draw):
    """Any order in which each action finds what it needs, of stages dealt to devices at random."""
    devices, stages, microbatches = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    owner = [draw(st.integers(0, devices - 1)) for _ in range(stages)]
    split, again = draw(st.booleans()), draw(st.booleans())
    rows = [[] for _ in range(devices)]
    backward = [Op.R] * again + ([Op.I, Op.W] if split else [Op.B])
    done = set()
    left = {(op, s, m) for op in (Op.F, *backward) for s in range(stages) for m in range(microbatches)}

    def needs(op, s, m):
        if op is Op.F:
            return [(Op.F, s - 1, m)] if s else []
        own = [(Op.F, s, m), *((o, s, m) for o in backward[: backward.index(op)])]
        return own + ([(backward[again], s + 1, m)] if op is backward[again] and s + 1 < stages else [])

    while left:
        ready = sorted((a for a in left if all(n in done for n in needs(*a))), key=str)
        action = draw(st.sampled_from(ready))
        left.remove(action)
        done.add(action)
        rows[owner[action[1]]].append(Action(*action))
    return Schedule(
        name="random",
        devices=tuple(map(tuple, rows)),
        stages=tuple((s, s + 1) for s in range(stages)),
        num_microbatches=microbatches,
    )


@settings(max_examples=60, deadline=None)
@given(legal_schedules(), st.data())
def test_random_legal_schedules_pass_and_every_mutation_is_refused(schedule, data):
    whole = with_messages(schedule)
    validate(schedule)
    validate(whole)
    assert simulate(whole, Costs.uniform(schedule.num_stages)).makespan_s > 0
    device = data.draw(st.sampled_from([d for d, row in enumerate(whole.devices) if row]))
    row = whole.devices[device]
    at = data.draw(st.integers(0, len(row) - 1))
    if row[at].op is not Op.R:  # without its R a forward keeps its activations, which is legal
        with pytest.raises(ScheduleError):
            validate(edited(whole, device, lambda r: r.pop(at)))
    with pytest.raises(ScheduleError):
        validate(edited(whole, device, lambda r: r.insert(at, r[at])))
    mine = [i for i, a in enumerate(row) if (a.stage, a.microbatch) == (row[at].stage, row[at].microbatch)]
    for i, j in pairwise(mine):
        if {row[i].op, row[j].op} not in INDEPENDENT:
            with pytest.raises(ScheduleError):
                validate(edited(whole, device, lambda r, i=i, j=j: swap(r, i, j)))


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zbv", "state_aware_1f1b"])
def test_messages_of_a_pair_out_of_order_are_refused(name):
    schedule = with_messages(SCHEDULES[name](devices=2, microbatches=4))
    validate(schedule)
    for op in (Op.SEND, Op.RECV):
        places = [i for i, a in enumerate(schedule.of(1)) if a.op is op]
        with pytest.raises(ScheduleError, match=r"messages of a pair keep their order|stands after it|never arrives"):
            validate(edited(schedule, 1, lambda r, p=places: swap(r, p[0], p[1])))


def test_every_action_of_a_completed_roundpipe_schedule_is_needed():
    schedule = complete(SCHEDULES["roundpipe"](devices=2, microbatches=2, layers=4, rounds=2, steps=2, staleness=1))
    validate(schedule)
    for device, row in enumerate(schedule.devices):
        for i, action in enumerate(row):
            if action.op is Op.GET and schedule.layers(action)[0] == 0 and action.phase.value == "F":
                continue
            with pytest.raises(ScheduleError):
                validate(edited(schedule, device, lambda r, i=i: r.pop(i)))


def test_early_updates_and_stale_weights_are_refused():
    make = SCHEDULES["roundpipe"]
    schedule = complete(make(devices=2, microbatches=2, layers=4, steps=2, staleness=1))
    device, at = next((d, i) for d, row in enumerate(schedule.devices) for i, a in enumerate(row) if a.op is Op.OPT)
    with pytest.raises(ScheduleError, match="which stands after it on the same device"):
        validate(edited(schedule, device, lambda r: r.insert(0, r.pop(at))))
    with pytest.raises(ScheduleError, match="uses weights of version 0 in step 1; its staleness is declared 0"):
        validate(replace(schedule, staleness=0))

    def newer(row):
        i = next(i for i, a in enumerate(row) if a.op is Op.B and a.microbatch == 2)
        row[i] = replace(row[i], version=1)

    with pytest.raises(ScheduleError, match="forward and backward need the same"):
        validate(edited(schedule, 0, newer))
    plain = SCHEDULES["1f1b"](devices=2, microbatches=2)
    stepped = [[*row, Action(Op.OPT, d, version=1)] for d, row in enumerate(plain.devices)]
    validate(plain.with_devices(stepped))
    early = [[row[-1], *row[:-1]] for row in stepped]
    with pytest.raises(ScheduleError, match=r"needs 0B0 at position .*, which stands after it"):
        validate(plain.with_devices(early))
    with pytest.raises(ScheduleError, match="no OPT makes version 1 of layer 1"):
        validate(plain.with_devices([stepped[0], plain.devices[1]]))


def test_groups():
    schedule = with_messages(SCHEDULES["state_aware_1f1b"](devices=3, units=GROUPS))
    validate(schedule)
    row = schedule.of(1)
    for op in (Op.R, Op.FREE):
        at = next(i for i, a in enumerate(row) if a.op is op)
        with pytest.raises(ScheduleError, match=r"it needs an R|one FREE of it has to follow"):
            validate(edited(schedule, 1, lambda r, at=at: r.pop(at)))
    alone = SCHEDULES["state_aware_1f1b"](devices=1, units=GROUPS)
    for op, text in ((Op.F, "ascending"), (Op.B, "descending")):
        places = [i for i, a in enumerate(alone.of(0)) if a.op is op and a.microbatch in (3, 4)]
        with pytest.raises(ScheduleError, match=text):
            validate(edited(alone, 0, lambda r, p=places: swap(r, p[0], p[1])))


def test_a_deadlock_is_found_before_launch_and_shown():
    plain = SCHEDULES["gpipe"](devices=2, microbatches=2)
    crossed = plain.with_devices(
        [
            [Action.parse(t) for t in ("0F0", "0B0", "0F1", "0B1")],
            [Action.parse(t) for t in ("1F0", "1F1", "1B0", "1B1")],
        ]
    )
    with pytest.raises(ScheduleError) as error:
        validate(crossed)
    assert "a deadlock, each waits for the next" in str(error.value)
    assert "<-- here, device" in str(error.value)
    with pytest.raises(ScheduleError, match="the schedule has a cycle"):
        simulate(crossed, Costs.uniform(2))


def test_what_is_missing_is_named():
    plain = SCHEDULES["1f1b"](devices=2, microbatches=2)
    with pytest.raises(ScheduleError, match="layer 0 never runs backward on micro-batch 1"):
        validate(edited(plain, 0, lambda r: r.pop()))
    with pytest.raises(ScheduleError, match="needs a forward"):
        validate(edited(plain, 0, lambda r: r.pop(0)))
    whole = with_messages(plain)
    recv = next(i for i, a in enumerate(whole.of(1)) if a.op is Op.RECV)
    with pytest.raises(ScheduleError, match=r"device 1 never receives this; add its RECV|sends 0SEND_F0"):
        validate(edited(whole, 1, lambda r: r.pop(recv)))
    with pytest.raises(ScheduleError, match="its peer is 7; it needs another device of the 2"):
        validate(edited(whole, 1, lambda r: r.__setitem__(recv, replace(r[recv], peer=7))))


def test_peak_bytes_are_held_to_the_cap():
    costs = Costs.uniform(4, activation_bytes=((100,),), boundary_bytes=(1,))
    schedule = SCHEDULES["gpipe"](devices=4, microbatches=8)
    validate(schedule, costs=costs, memory_cap_bytes=800)
    with pytest.raises(
        ScheduleError, match=r"0F7: 800 bytes are on device 0, and the cap is 799: 1 too many\. Recompute activations"
    ):
        validate(schedule, costs=costs, memory_cap_bytes=799)
    validate(with_recompute(schedule), costs=costs, memory_cap_bytes=110)
    with pytest.raises(
        ScheduleError, match=r"\d too many\. Nothing is left to recompute: .*, more ranks, or roundpipe"
    ):
        validate(with_recompute(schedule), costs=costs, memory_cap_bytes=97)
    heavy = Costs.uniform(4, activation_bytes=((100,),), weight_bytes=(500,))
    with pytest.raises(
        ScheduleError, match=r"801 too many\. Of these 1,000 are there all the time, .*: use more ranks"
    ):
        validate(with_recompute(schedule), costs=heavy, memory_cap_bytes=299)
    slots = complete(SCHEDULES["roundpipe"](devices=2, microbatches=4))
    with pytest.raises(ScheduleError, match="or slots of fewer layers: `python -m pipeline plan`"):
        validate(slots, costs=Costs.uniform(slots.num_layers, weight_bytes=(500,)), memory_cap_bytes=299)


def test_frozen_layers_need_no_backward():
    schedule = SCHEDULES["1f1b"](devices=3, microbatches=3)
    frozen = [[a for a in row if a.stage > 0 or a.op not in (Op.B,)] for row in schedule.devices]
    with pytest.raises(ScheduleError, match="never runs backward"):
        validate(schedule.with_devices(frozen))
    whole = with_messages(schedule.with_devices(frozen, first_trainable=1))
    validate(whole)
    assert not [a for a in whole.of(0) if a.op in (Op.RECV, Op.B)]
    assert all(a.op in COMPUTE or a.op is Op.SEND for a in whole.of(0))


def test_what_arrives_twice_or_for_nobody_is_refused():
    """Also where its SEND is doubled as well, so that every message has its partner."""
    whole = with_messages(SCHEDULES["1f1b"](devices=2, microbatches=3))
    for op, phase in ((Op.SEND, "F"), (Op.SEND, "B")):
        rows = [list(row) for row in whole.devices]
        sender = 0 if phase == "F" else 1
        for device, kind in ((sender, op), (1 - sender, Op.RECV)):
            at = next(i for i, a in enumerate(rows[device]) if a.op is kind and a.phase and a.phase.value == phase)
            rows[device].insert(at, rows[device][at])
        with pytest.raises(ScheduleError, match=r"brings what position \d+ has brought already; it arrives once"):
            validate(whole.with_devices(rows))
    slots = complete(SCHEDULES["roundpipe"](devices=2, microbatches=2))
    at = next(i for i, a in enumerate(slots.of(1)) if a.op is Op.GET)
    with pytest.raises(ScheduleError, match="it arrives once"):
        validate(edited(slots, 1, lambda row: row.insert(at, row[at])))
    rows = [list(row) for row in whole.devices]
    rows[0].append(Action(Op.SEND, 0, 0, Phase.F, peer=1))
    rows[1].append(Action(Op.RECV, 1, 0, Phase.F, peer=0))
    with pytest.raises(ScheduleError, match="it arrives once"):
        validate(whole.with_devices(rows))
    three = with_messages(SCHEDULES["1f1b"](devices=3, microbatches=1))
    rows = [list(row) for row in three.devices]
    rows[0].append(Action(Op.SEND, 0, 0, Phase.F, peer=2))  # a device that has no use for it
    rows[2].append(Action(Op.RECV, 1, 0, Phase.F, peer=0))
    with pytest.raises(ScheduleError, match="no action of its stage and micro-batch behind it on this device takes"):
        validate(three.with_devices(rows))


def test_the_state_of_a_group_is_freed_by_the_name_of_its_first_chunk():
    schedule = SCHEDULES["state_aware_1f1b"](devices=1, units=GROUPS)
    with pytest.raises(ScheduleError, match="chunk 1 of group 0: the FREE of a group names its first chunk"):
        validate(edited(schedule, 0, lambda row: row.insert(4, Action(Op.FREE, 0, 2))))
