"""Generators: golden orders, equality with torch's own, completeness, and the CSV of torch.distributed.pipelining."""

from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from pipeline.actions import Action, Op
from pipeline.comms import complete, with_messages
from pipeline.costs import Costs
from pipeline.errors import PlanError, ScheduleError
from pipeline.schedule import Schedule
from pipeline.schedules import SCHEDULES
from pipeline.schedules.build import balanced_stages, even_stages, with_recompute
from pipeline.schedules.roundpipe import Slots
from pipeline.simulate import simulate
from pipeline.torch_csv import dump_csv, load_csv
from pipeline.units import Unit

BOUND = [name for name in SCHEDULES if name != "roundpipe"]


def labels(schedule, device):
    return " ".join(a.label for a in schedule.of(device))


def test_golden_orders():
    one = SCHEDULES["1f1b"](devices=3, microbatches=4)
    assert labels(one, 0) == "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3"
    assert labels(one, 2) == "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3"
    assert labels(SCHEDULES["gpipe"](devices=2, microbatches=2), 1) == "1F0 1F1 1B0 1B1"
    assert labels(SCHEDULES["zb_h1"](devices=3, microbatches=4), 2) == "2F0 2I0 2F1 2I1 2F2 2I2 2W0 2F3 2I3 2W1 2W2 2W3"
    units = [Unit(2), *(Unit(2, 0, i, 3, 1) for i in range(3))]
    state_aware = SCHEDULES["state_aware_1f1b"](devices=2, units=units)
    assert labels(state_aware, 0) == "0F0 0F1 0B0 0F2 0F3 0B3 0R2 0B2 0R1 0B1 0FREE1"


def test_messages_follow_their_makers_and_come_in_the_order_of_the_sender():
    schedule = with_messages(SCHEDULES["1f1b"](devices=2, microbatches=2))
    assert labels(schedule, 0) == "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1"
    assert labels(schedule, 1) == "1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1"


def torch_order(cls, devices, stages, microbatches):
    """What torch's class computes for each rank, without its process group."""
    rounds = max(1, microbatches // devices)
    self = SimpleNamespace(
        pp_group_size=devices,
        n_local_stages=stages,
        _n_microbatches=microbatches,
        _stages=[None] * stages,
        num_stages=devices * stages,
        microbatches_per_round=microbatches // rounds,
    )
    rows = [cls._calculate_single_rank_operations(self, r) for r in range(devices)]
    return [" ".join(str(a) for a in row if a is not None) for row in rows]


@pytest.mark.parametrize("devices", [2, 3, 4])
@pytest.mark.parametrize("microbatches", [1, 2, 4, 6, 8])
def test_orders_are_those_of_torch(devices, microbatches):
    rounds = max(1, microbatches // devices)
    pairs = [("looped_bfs", torch_schedules.ScheduleLoopedBFS, 2), ("zbv", torch_schedules.ScheduleZBVZeroBubble, 2)]
    if microbatches % rounds == 0:
        pairs += [
            ("interleaved", torch_schedules.ScheduleInterleaved1F1B, 2),
            ("1f1b", torch_schedules.ScheduleInterleaved1F1B, 1),
        ]
    for name, cls, stages in pairs:
        ours = SCHEDULES[name](devices=devices, microbatches=microbatches)
        if name == "1f1b":  # torch's one-stage interleaving warms up twice as deep, so only the last rank is the same
            assert labels(ours, devices - 1) == torch_order(cls, devices, stages, microbatches)[-1]
        else:
            assert [labels(ours, d) for d in range(devices)] == torch_order(cls, devices, stages, microbatches), name


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("devices", [1, 2, 3, 5])
@pytest.mark.parametrize("microbatches", [1, 2, 3, 7, 10])
def test_every_schedule_runs_for_any_number_of_devices_and_microbatches(name, devices, microbatches):
    schedule = SCHEDULES[name](devices=devices, microbatches=microbatches)
    costs = Costs.uniform(schedule.num_layers)
    plain, whole = simulate(schedule, costs), simulate(complete(schedule), costs)
    work = 3 * schedule.num_layers * microbatches / devices
    assert whole.makespan_s == pytest.approx(plain.makespan_s)
    assert plain.useful * plain.makespan_s == pytest.approx(work)


@pytest.mark.parametrize("name", BOUND)
def test_csv_goes_there_and_back_and_torch_accepts_it(name, tmp_path):
    plain = SCHEDULES[name](devices=2, microbatches=4)
    whole = with_messages(plain)
    for schedule in (plain, whole):
        back = load_csv(dump_csv(schedule), name=name)
        assert back.devices == schedule.devices
    path = tmp_path / "plain.csv"
    path.write_text(dump_csv(plain))
    order = {}
    loader = SimpleNamespace(pipeline_order=order, _validate_and_set_stage_mapping=lambda _: None)
    torch_schedules.PipelineScheduleMulti._load_csv(loader, str(path))
    torch_schedules._validate_schedule(order, 2, plain.num_stages, 4)
    assert [" ".join(map(str, row)) for row in order.values()] == [labels(plain, d) for d in range(2)]


def test_a_recv_of_torch_waits_where_its_message_is_needed():
    """Torch begins to receive as soon as it may, which is no reason to wait there."""
    eager = {0: [], 1: []}
    whole = with_messages(SCHEDULES["interleaved"](devices=2, microbatches=4))
    for device, row in enumerate(whole.devices):
        receives = [a.label for a in row if a.op is Op.RECV]
        for place, action in enumerate(a for a in row if a.op is not Op.RECV):
            eager[device] += receives[: max(0, 2 + place - device)]
            del receives[: max(0, 2 + place - device)]
            eager[device].append(action.label)
        eager[device] += receives
    text = "\n".join(",".join(cells) for cells in eager.values())
    assert text != dump_csv(whole).rstrip()
    assert load_csv(text).devices == whole.devices


def test_csv_says_what_it_cannot_hold():
    with pytest.raises(ScheduleError, match="0R0 has no form"):
        dump_csv(with_recompute(SCHEDULES["1f1b"](devices=2, microbatches=2)))
    with pytest.raises(ScheduleError, match="no compute action"):
        load_csv(",,\n")
    with pytest.raises(ScheduleError, match="stage 0 of csv runs on devices 0 and 1"):
        load_csv("0F0,0B0\n0F1,0B1\n")
    overlapped = load_csv("0UNSHARD,0F0,,(0F1;0B0)OVERLAP_F_B,0B1,0RESHARD\n")
    assert labels(overlapped, 0) == "0F0 0F1 0B0 0B1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0X0\n", "'0X0' is no action"),
        ("0F0,0B0\n\n7F0,99999999999999999999F1\n", "is no action"),
        ("0F0,0B0,999999999F0\n", "names stage 999999999 and micro-batch 0 and has 3 actions"),
        ("0F0,0B0,0F999999999\n", "names stage 0 and micro-batch 999999999 and has 3 actions"),
        ("(" * 5000 + "0F0" + ")OVERLAP_F_B" * 5000 + "\n", "is no action"),
        ("0F0,1SEND_F0,0B0\n1F0\n", "1SEND_F0 has no stage 2 at its other end"),
        ('0F0,"' + "x" * 200_000 + '"\n', "this is no CSV: field larger than field limit"),
        ("0F0\x00,0B0\n", "no action|no CSV"),
        ("", "has 0 rows and no compute action"),
    ],
    ids=range(9),
)
def test_a_csv_that_is_none_is_one_clear_error(text, message):
    with pytest.raises(ScheduleError, match=message) as raised:
        load_csv(text)
    assert len(str(raised.value)) < 1000


def test_splits():
    assert even_stages(7, 3) == ((0, 3), (3, 5), (5, 7))
    assert balanced_stages([1, 1, 1, 1, 8], 2) == ((0, 4), (4, 5))
    assert balanced_stages([1.0] * 6, 3) == ((0, 2), (2, 4), (4, 6))
    with pytest.raises(ScheduleError, match="2 layers do not fill 3 stages"):
        even_stages(2, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SCHEDULES["1f1b"](devices=0, microbatches=4), "at least one of each"),
        (lambda: SCHEDULES["1f1b"](devices=10**9, microbatches=4), "their product may be 2097152 at most"),
        (lambda: SCHEDULES["zbv"](devices=2, microbatches=10**9), "their product may be"),
        (lambda: SCHEDULES["roundpipe"](devices=2, microbatches=10**9), "their product may be"),
        (lambda: SCHEDULES["roundpipe"](devices=2, microbatches=2, layers=10**9), "their product may be"),
        (lambda: SCHEDULES["1f1b"](devices=2, microbatches=2, layers=[(0, 1)]), "got layer ranges for 1"),
        (
            lambda: SCHEDULES["state_aware_1f1b"](devices=2, units=[Unit(1, 0, 1, 2), Unit(1, 0, 0, 2)]),
            "stand together",
        ),
        (lambda: SCHEDULES["state_aware_1f1b"](devices=2, units=[Unit(1, 0, 0, 2)]), "ascending from 0 to 1"),
        (lambda: SCHEDULES["roundpipe"](devices=2, microbatches=2, staleness=2), "staleness is 0 or 1"),
        (lambda: SCHEDULES["roundpipe"](devices=2, microbatches=2, layers=1), "at least 2"),
        (lambda: SCHEDULES["roundpipe"](devices=2, microbatches=2, rounds=3), "3 rounds for 2 micro-batches"),
        (lambda: Slots(forward=(2, 0), fused=1, backward=(1,)), "no layer"),
    ],
)
def test_what_cannot_be_generated_is_refused(make, message):
    with pytest.raises((ScheduleError, PlanError), match=message):
        make()


def test_roundpipe_deals_slots_in_turn_and_never_resets_its_cursor():
    slots = Slots(forward=(2, 2), fused=1, backward=(1, 3))
    schedule = SCHEDULES["roundpipe"](devices=2, microbatches=4, slots=slots, rounds=2)
    assert schedule.stages == ((0, 2), (2, 4), (4, 5), (3, 4), (0, 3))
    first = [[a.stage for a in row if a.op is not Op.R] for row in schedule.devices]
    assert first == [[0, 0, 2, 2, 4, 4, 1, 1, 3, 3], [1, 1, 3, 3, 0, 0, 2, 2, 4, 4]]
    assert Action(Op.R, 4, 0, device=0) in schedule.of(0)
    frozen = SCHEDULES["roundpipe"](devices=2, microbatches=1, slots=Slots(forward=(3,), fused=1, backward=(2,)))
    assert frozen.first_trainable == 1
    assert Schedule.from_text(frozen.to_text()) == frozen
