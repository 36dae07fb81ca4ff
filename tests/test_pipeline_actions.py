"""Actions, units and schedules print themselves and read themselves back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.actions import COMPUTE, MESSAGES, Action, Op, Phase
from pipeline.errors import PlanError, ScheduleError
from pipeline.schedule import Schedule
from pipeline.units import Unit

small = st.integers(0, 99)


@st.composite
def actions(draw):
    op = draw(st.sampled_from(Op))
    needs_microbatch = op in COMPUTE or op in MESSAGES
    lo = draw(small)
    return Action(
        op,
        draw(small),
        draw(small if needs_microbatch else st.none() | small),
        draw(st.sampled_from(Phase)) if op in MESSAGES else None,
        layers=draw(st.none() | st.integers(lo + 1, 120).map(lambda hi: (lo, hi))),
        device=draw(st.none() | small),
        version=draw(st.none() | small),
        bytes=draw(st.none() | small),
        peer=draw(st.none() | small),
    )


@given(actions())
def test_an_action_reads_itself_back(action):
    assert Action.parse(str(action)) == action


def test_the_short_form_is_stage_op_microbatch():
    assert Action.parse("2F0") == Action(Op.F, 2, 0)
    assert Action.parse("12FB7") == Action(Op.FB, 12, 7)
    assert str(Action(Op.SEND, 1, 3, Phase.B, peer=0)) == "1SEND_B3[peer=0]"
    assert Action.parse("3UPLOAD[version=1]").label == "3UPLOAD"


@pytest.mark.parametrize(
    "text", ["", "F0", "2X0", "2F", "2F0[peer]", "2F0[colour=1]", "2F_F0", "1SEND0", "2F0[layers=3]"]
)
def test_what_is_no_action_is_refused(text):
    with pytest.raises(ScheduleError):
        Action.parse(text)


def test_units_read_themselves_back_and_know_what_is_kept():
    units = [Unit(7), *(Unit(8, 3, i, 4, 2) for i in range(4))]
    assert [Unit.parse(str(u)) for u in units] == units
    assert [u.kept for u in units] == [True, False, False, True, True]
    with pytest.raises(PlanError, match="counts from 0"):
        Unit(5, 1, 4, 4)


@given(st.lists(st.lists(actions(), max_size=5), min_size=1, max_size=3))
def test_a_schedule_reads_itself_back(rows):
    rows = [[Action.parse(a.text(device=False)) for a in row] for row in rows]
    stages = tuple((i, i + 1) for i in range(120))
    schedule = Schedule(name="any", devices=tuple(map(tuple, rows)), stages=stages, num_microbatches=100, steps=2)
    assert Schedule.from_text(schedule.to_text()) == schedule
    assert Schedule.from_json(schedule.to_json()) == schedule
    assert all(a.device == d for d, row in enumerate(schedule.devices) for a in row)


def test_the_table_has_an_arrow_where_it_is_told():
    rows = (tuple(map(Action.parse, ["0F0", "0B0"])), tuple(map(Action.parse, ["1F0", "1B0"])))
    schedule = Schedule(name="two", devices=rows, stages=((0, 1), (1, 2)), num_microbatches=1)
    assert schedule.table(at=(1, 1)).splitlines() == [
        "      device 0 device 1",
        "   0: 0F0      1F0",
        "   1: 0B0      1B0       <-- here, device 1",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ((0, 0),)}, "a stage holds at least one layer"),
        ({"devices": ((Action(Op.F, 1, 0),),)}, "has stages 0 to 0"),
        ({"devices": ((Action(Op.F, 0, 0, device=3),),)}, "stands in the list of device 0"),
        ({"num_microbatches": 3, "steps": 2}, "do not split over 2 equal steps"),
        ({"units": (Unit(1), Unit(1))}, "2 units are given for 1"),
        ({"num_microbatches": 5, "steps": 2, "sizes": (3, 1)}, r"steps of \(3, 1\) micro-batches are given for 5 in 2"),
        ({"num_microbatches": 3, "steps": 2, "sizes": (3, 0)}, "each has at least one"),
        ({"num_microbatches": 5, "steps": 2, "sizes": (3, 2), "rounds": 4}, "4 rounds for 3 micro-batches a step"),
        ({"staleness": -1}, "staleness -1"),
        ({"stages": ((0, 10**12),)}, "has 1000000000000 layers"),
        ({"num_microbatches": 10**12}, "and 1000000000000 micro-batches"),
        ({"devices": ((Action(Op.F, 0, 0, layers=(0, 10**12)),),)}, "has stages 0 to 0 of 1 layers"),
    ],
)
def test_what_is_no_schedule_is_refused(changes, message):
    fields = {"name": "x", "devices": ((),), "stages": ((0, 1),), "num_microbatches": 1} | changes
    with pytest.raises(ScheduleError, match=message):
        Schedule(**fields)


def test_a_text_that_cannot_be_read_names_its_line():
    with pytest.raises(ScheduleError, match=r"line 2 .*no action"):
        Schedule.from_text("schedule x\ndevice 0: 0Q0\n")
    for name in ("devices", "stages", "units", "sizes", "name"):  # of something else than a number
        with pytest.raises(ScheduleError, match=rf"line 2 .*{name} is no number of a schedule"):
            Schedule.from_text(f"schedule x\nmicrobatches 1 {name} 1\nstages 0:1\ndevice 0: 0F0 0B0\n")


GOOD = {"format_version": 1, "name": "x", "num_microbatches": 1, "stages": [[0, 1]], "devices": [["0F0", "0B0"]]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "no schedule as JSON: JSONDecodeError"),
        ("[1]", "no schedule as JSON"),
        ("[" * 10**6, "no schedule as JSON: RecursionError"),
        ("null", "no schedule as JSON: TypeError"),
        (GOOD | {"format_version": 2}, "a schedule of format 2"),
        (GOOD | {"colour": 1}, "'colour', unknown here"),
        (GOOD | {"num_microbatches": "3"}, "num_microbatches of a schedule holds 3; it takes whole numbers"),
        (GOOD | {"num_microbatches": 1.5}, "holds 1.5"),
        (GOOD | {"num_microbatches": True}, "holds True"),
        (GOOD | {"num_microbatches": 10**30}, "has 1 layers and 10{30} micro-batches"),
        (GOOD | {"steps": -1}, "steps of a schedule holds -1"),
        (GOOD | {"name": ["x"]}, "it takes a string"),
        (GOOD | {"stages": [[0, 1, 2]]}, "no schedule as JSON: ValueError"),
        (GOOD | {"stages": [["0", "1"]]}, "stages of a schedule holds 0"),
        (GOOD | {"stages": 3}, "no schedule as JSON: TypeError"),
        (GOOD | {"stages": [[0, 10**15]]}, "has 10{15} layers"),
        (GOOD | {"devices": [[3]]}, "'3' is no action"),
        (GOOD | {"devices": [None]}, "no schedule as JSON: TypeError"),
        (GOOD | {"devices": []}, "lacks its devices"),
        (GOOD | {"devices": [["9" * 5000 + "F0"]]}, "is no action"),
        (GOOD | {"devices": [["0F0[layers=0:99999999999]"]]}, "has stages 0 to 0 of 1 layers"),
        (GOOD | {"sizes": [1, None]}, "sizes of a schedule holds None"),
        (GOOD | {"units": ["x"]}, "'x' is no unit"),
        ({key: value for key, value in GOOD.items() if key != "name"}, "KeyError: 'name'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_whatever_is_in_a_file_is_a_schedule_or_one_clear_error(value, message):
    assert Schedule.from_json(GOOD).num_layers == 1
    with pytest.raises((ScheduleError, PlanError), match=message) as raised:
        Schedule.from_json(value)
    assert len(str(raised.value)) < 1000
