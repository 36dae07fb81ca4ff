"""The planner of RoundPipe: its simulation against formulas and a plain one, its search against exhaustion."""

import json
from dataclasses import replace
from itertools import accumulate, pairwise, takewhile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from benchmarks.pipeline_tables import NUM_DEVICES, PUBLISHED_ROUNDS, read_models
from launch.roundpipe_plan import without_frozen_slots
from pipeline.cli import app
from pipeline.comms import complete
from pipeline.costs import Costs
from pipeline.errors import PlanError
from pipeline.roundpipe.lowering import completed, slot_schedule
from pipeline.roundpipe.planner import RoundPipePlan, anneal_all, evaluate, plan
from pipeline.roundpipe.search import Problem, even_cuts, running_sums
from pipeline.roundpipe.slot_sim import ready_makespan, strict_makespan
from pipeline.roundpipe.slots import LayerCosts, Op, even_sizes, rounds_of
from pipeline.schedules.roundpipe import Slots
from pipeline.simulate import simulate
from pipeline.validate import validate


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


def times_of(problem, partition, plan):
    """Run each device's order as given, one operation after the other: {(slot, micro-batch): (start, end)}."""
    costs, c = problem.costs, problem.transfer_s
    ranges = [layers for _, layers in partition.ranges()]
    ends_F = list(accumulate(partition.forward))
    sources = [-1 if lo == 0 else next(i for i, end in enumerate(ends_F) if end >= lo) for lo, _ in ranges]
    queues = [list(ops) for ops in plan.order]
    free, ends = [0.0] * problem.num_devices, {}
    while any(queues):
        progress = False
        for device, queue in enumerate(queues):
            while queue:
                op = queue[0]
                low, high = ranges[op.slot]
                source, before = sources[op.slot], (op.slot - 1, op.microbatch)
                needs = [(source, op.microbatch)] if source >= 0 else []
                backward = op.slot > len(partition.forward)
                if any(key not in ends for key in [*needs, *([before] if backward else [])]):
                    break
                t = max([free[device], *(ends[key] + c for key in needs)])
                t += sum(costs.forward_s[low:high])
                if backward:
                    t = max(t, ends[before] + c)
                if op.slot >= len(partition.forward):
                    t += sum(costs.backward_s[low:high])
                free[device] = ends[op.slot, op.microbatch] = t
                queue.pop(0)
                progress = True
        assert progress, f"deadlock: {queues}"
    return ends


@settings(max_examples=150, deadline=None)
@given(problems())
def test_a_dull_execution_of_the_order_takes_what_the_compiled_simulation_says(case):
    problem, partition = case
    found = evaluate(problem, partition)
    ends = times_of(problem, partition, found)
    assert max(ends.values()) == pytest.approx(found.makespan_s, abs=1e-9)
    assert len(ends) == partition.num_slots * sum(problem.rounds)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_every_operation_once_on_its_device_and_strict_order_where_asked(case):
    problem, partition = case
    found = evaluate(problem, partition)
    for device, ops in enumerate(found.order):
        numbers = [op.round * partition.num_slots + op.slot for op in ops]
        assert all(n % problem.num_devices == device for n in numbers)
        if problem.open_slots == 1:
            assert all(a <= b for a, b in pairwise(numbers))
    everything = [op for ops in found.order for op in ops]
    assert len(set(everything)) == len(everything) == partition.num_slots * sum(problem.rounds)


@pytest.mark.parametrize(("num_slots", "num_microbatches"), [(24, 16), (25, 16), (7, 3), (9, 4), (12, 4)])
def test_equal_slots_take_what_the_formula_says(num_slots, num_microbatches):
    """T = (floor((S-1)/N) M + (S-1) mod N + M) t for M >= N, (S-1+M) t below; no communication."""
    n = 8 if num_slots > 12 else 4
    num_forward = num_slots // 3
    table_S3 = np.zeros((num_slots, 3))
    table_S3[:num_forward, 0] = 1
    table_S3[num_forward:, 2] = 1
    input_S = np.array([*range(-1, num_forward), *[-1] * (num_slots - num_forward - 1)])
    rounds, scratch = np.array([num_microbatches]), np.zeros((num_slots, num_microbatches))
    m, s = num_microbatches, num_slots
    expected = (s - 1) // n * m + (s - 1) % n + m if m >= n else s - 1 + m
    common = (num_slots, num_forward, table_S3, input_S, rounds, n, 0.0)
    assert strict_makespan(*common, scratch, np.zeros(n)) == expected
    assert ready_makespan(*common, 1, scratch, np.zeros((0, 3), np.int64)) == expected


@pytest.mark.parametrize("model", read_models(), ids=lambda m: m.name)
def test_the_published_bubbles_come_out_of_the_published_partitions(model):
    """Two rounds of eight, strict order. One model's published number lets the head start before its input is there."""
    problem = Problem(costs=model.costs, rounds=PUBLISHED_ROUNDS, num_devices=NUM_DEVICES, open_slots=1)
    bubble = evaluate(problem, model.published).bubble
    late = {"GPT-OSS-20B": 0.1502, "Qwen3-32B": 0.0691}
    assert bubble == pytest.approx(late.get(model.name, model.published_bubble), abs=0.0006)


def test_the_search_finds_the_best_of_all_partitions_of_a_small_model():
    costs = LayerCosts(forward_s=(1.0, 2.0, 1.0, 1.0, 3.0), backward_s=(2.0, 4.0, 2.0, 3.0, 5.0), transfer_s=0.25)
    for open_slots in (1, 2):
        problem = Problem(costs=costs, rounds=(4,), num_devices=2, open_slots=open_slots)
        every = [
            evaluate(problem, Slots(forward=f, fused=fused, backward=b)).makespan_s
            for fused in range(1, 5)
            for f in compositions(5 - fused)
            for b in compositions(5 - fused)
        ]
        found = anneal_all(problem, even_cuts(problem, 2), (0.3, 0.1), seed=0, operations=4_000_000)
        assert found[0][0] == pytest.approx(min(every))


def test_the_plan_is_the_same_every_time_and_reads_back():
    costs = uniform(9, transfer_s=0.1)
    first, second = (plan(costs, num_devices=3, num_microbatches=6, effort=0.01) for _ in range(2))
    assert first == second
    assert RoundPipePlan.from_json(json.loads(json.dumps(first.to_json()))) == first
    assert isinstance(first.order[0][0], Op)
    assert any("round(s)" in reason for reason in first.reasons)


def test_two_devices_gain_by_ready_first_where_the_head_is_heavy():
    """A head of eight layers on a model of four: strict slot order is bound by it, ready-first is not."""
    costs = LayerCosts(forward_s=(1.0,) * 4 + (8.0,), backward_s=(2.0,) * 4 + (16.0,))
    strict = plan(costs, num_devices=2, num_microbatches=8, open_slots=(1,), num_rounds=(1, 2, 4), effort=0.02)
    ready = plan(costs, num_devices=2, num_microbatches=8, open_slots=(1, 2, 3), num_rounds=(1, 2, 4), effort=0.02)
    bound = 8 * (24 + 12) / 2
    assert bound <= ready.makespan_s < strict.makespan_s
    assert ready.open_slots > 1


def test_memory_cap_is_kept_or_refused():
    costs = uniform(8, weight_bytes=(100,) * 8, activation_bytes=(10,) * 8)
    free = plan(costs, num_devices=2, num_microbatches=4, effort=0.02)
    tight = plan(costs, num_devices=2, num_microbatches=4, memory_cap_bytes=320, effort=0.02)
    assert tight.peak_bytes <= 320 < free.peak_bytes
    assert tight.makespan_s >= free.makespan_s
    with pytest.raises(PlanError, match=r"needs .* bytes on a device, the cap is 250; cut finer or raise it"):
        evaluate(Problem(costs=costs, rounds=(4,), num_devices=2, open_slots=1, memory_cap_bytes=250), tight.partition)


@pytest.mark.parametrize("open_slots", [1, 2])
def test_a_cap_that_no_cut_keeps_is_refused_with_what_is_needed_and_that_is_enough(open_slots):
    sizes = {"weight_bytes": (100,) * 7 + (900,), "activation_bytes": (10,) * 8, "boundary_bytes": 7}
    costs = uniform(8, **sizes)
    settings = {"num_devices": 2, "num_microbatches": 4, "open_slots": (open_slots,), "effort": 0.02}
    needed = {1: 1_800 + 14 + 100, 2: 1_800 + 200 + 21 + 100}[open_slots]  # head, open beside it, what passes, next
    pattern = (
        rf"{open_slots} open slot.* need {needed:,} bytes .*layer 7 has 1,810 .*; the cap is {needed - 1:,}; raise"
    )
    with pytest.raises(PlanError, match=rf"{pattern} it to {needed:,}, or"):
        plan(costs, memory_cap_bytes=needed - 1, **{**settings, "effort": 1e9})
    assert plan(costs, memory_cap_bytes=needed, **settings).peak_bytes <= needed


def device_peaks(schedule, costs):
    """What every device of a completed schedule holds at most, by the rules of the runtime's arena: an input until its
    slot is through with the micro-batch, an output until it is put, weights from the first action of a visit on."""
    peaks = []
    for row in schedule.devices:
        held, peak = {}, 0
        for i, a in enumerate(row):
            (lo, hi), mb, b = schedule.layers(a), a.microbatch or 0, costs.boundary_bytes
            visit = (schedule.step(mb), schedule.round(mb), a.stage)
            weights, gradients, kept = (
                sum(x[lo:hi]) for x in (costs.weight_bytes, costs.gradient_bytes, costs.activation_bytes)
            )
            x, handed = (b if lo else 0), (b if lo > schedule.first_trainable else 0)
            outputs = sum(o.op.value == "PUT" for o in takewhile(lambda o: o.op.value == "PUT", row[i + 1 :]))
            passing = {
                "F": x + b * outputs, "FB": max(kept, x + handed), "R": kept, "B": b + max(kept, x + handed)
            }.get(a.op.value)  # fmt: skip
            if passing is not None:
                held[visit] = weights + (0 if a.op.value == "F" else gradients)
                peak = max(peak, sum(held.values()) + passing)
                last = visit
            elif a.op.value == "FREE":
                del held[last]
        peaks.append(peak)
    return peaks


@settings(max_examples=80, deadline=None)
@given(problems(), st.data())
def test_no_device_holds_more_than_the_plan_says(case, data):
    """In the plan's order and in that of a job, also where layers in front lose their backward."""
    problem, partition = case
    num, b = problem.costs.num_layers, data.draw(st.integers(0, 30))
    amounts = [tuple(data.draw(st.integers(0, 50)) for _ in range(num)) for _ in range(3)]
    frozen = data.draw(st.integers(0, num - 1))
    costs = replace(
        problem.costs, weight_bytes=amounts[0], gradient_bytes=amounts[1], boundary_bytes=b, first_trained=frozen,
        activation_bytes=tuple(kept + (b if i else 0) for i, kept in enumerate(amounts[2])),
    )  # fmt: skip
    found = evaluate(replace(problem, costs=costs), partition)
    if not frozen:
        assert max(device_peaks(completed(found.schedule()), costs)) <= found.peak_bytes
    schedule = slot_schedule(
        without_frozen_slots(partition, frozen), devices=problem.num_devices, microbatches=sum(problem.rounds),
        rounds=len(problem.rounds), open_slots=problem.open_slots,
        costs=Costs(forward_s=(costs.forward_s,), backward_s=(costs.backward_s,), hop_s=problem.transfer_s),
    )  # fmt: skip
    most = max(device_peaks(schedule, costs))
    assert most <= found.peak_bytes
    if problem.num_devices == problem.open_slots == 1:
        assert found.peak_bytes <= most + max(sum(amounts[0][lo:hi]) for _, (lo, hi) in partition.ranges())


def test_a_tiny_model_is_searched_no_longer_than_it_has_partitions():
    """With this effort the search would take hours, were it not bounded by what there is to see."""
    costs = uniform(3)
    found, less = (plan(costs, num_devices=5, num_microbatches=2, effort=effort) for effort in (100.0, 1.0))
    assert found.makespan_s == less.makespan_s
    assert found.makespan_s <= min(evaluate(
        Problem(costs=costs, rounds=(1, 1), num_devices=5, open_slots=1), Slots(forward=f, fused=1, backward=b)
    ).makespan_s for f in ((2,), (1, 1)) for b in ((2,), (1, 1)))  # fmt: skip


def test_costs_of_unequal_microbatches_are_planned_by_their_mean():
    rows = ((1.0, 2.0, 3.0), (3.0, 2.0, 1.0), (2.0, 2.0, 8.0))
    found = LayerCosts.of(Costs(
        forward_s=rows, backward_s=((4.0, 4.0, 4.0),), activation_bytes=((1,), (7,), (2,)), boundary_bytes=(10, 20, 60),
        link_bytes_per_s=10,
    ))  # fmt: skip
    assert (found.forward_s, found.backward_s) == ((2.0, 2.0, 4.0), (4.0,) * 3)
    assert (found.activation_bytes, found.transfer_s, found.boundary_bytes) == ((7, 7, 7), 3.0, 60)
    with pytest.raises(PlanError, match="forward_s of the costs is of 3 micro-batches; 4 were asked for"):
        Costs(forward_s=rows, backward_s=rows).check_microbatches(4)


def test_the_number_of_microbatches_is_planned_too():
    """Costs are of the first number; the finest deal idles least, and is the one that fits a memory cap."""
    costs = uniform(12, transfer_s=0.0, weight_bytes=(10,) * 12, activation_bytes=(100,) * 12)
    numbers = (4, 8, 16)
    free = plan(costs, num_devices=4, num_microbatches=numbers, effort=0.02)
    few = plan(costs, num_devices=4, num_microbatches=4, effort=0.02)
    assert sum(free.rounds) == 16
    assert free.makespan_s < few.makespan_s
    assert free.makespan_s == pytest.approx(evaluate(
        Problem(costs=costs.dealt(0.25), rounds=free.rounds, num_devices=4, open_slots=free.open_slots), free.partition
    ).makespan_s)  # fmt: skip
    with pytest.raises(PlanError, match="need 130 bytes"):
        plan(costs, num_devices=4, num_microbatches=4, memory_cap_bytes=100, effort=0.02)
    tight = plan(costs, num_devices=4, num_microbatches=numbers, memory_cap_bytes=100, effort=0.02)
    assert sum(tight.rounds) == 16
    assert tight.peak_bytes <= 100
    assert costs.dealt(0.25).useful_s * 4 == pytest.approx(costs.useful_s)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partition": 3}, "no plan of RoundPipe as JSON: TypeError"),
        ({"partition": {"forward": [10**15], "fused": 1, "backward": [1]}}, "no plan|ends|layers"),
        ({"partition": {"forward": [1.5], "fused": 1, "backward": [1]}}, "no plan of RoundPipe as JSON: TypeError"),
        ({"order": [[{"round": 0, "slot": 0}]]}, "no plan of RoundPipe as JSON: TypeError"),
        ({"order": [[]]}, "the order has 0 pairs on 1 devices"),
        ({"rounds": [10**4]}, "micro-batches once, on 2 devices"),
        ({"rounds": [10**12]}, "micro-batches; their product may be"),
        ({"rounds": []}, "no plan|at least one"),
        ({"num_devices": -1}, "no plan|devices"),
        ({"colour": 3}, "no plan of RoundPipe as JSON: TypeError"),
        ({"order": None}, "no plan of RoundPipe as JSON: TypeError"),
    ],
)
def test_whatever_is_in_a_file_is_a_plan_or_one_clear_error(changes, message):
    good = plan(uniform(4), num_devices=2, num_microbatches=3, effort=0.01).to_json()
    assert RoundPipePlan.from_json(good).num_devices == 2
    with pytest.raises(PlanError, match=message):
        RoundPipePlan.from_json(good | changes)
    with pytest.raises(PlanError, match="no plan of RoundPipe"):
        RoundPipePlan.from_json([1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"forward": (1,), "fused": 1, "backward": (2,)}, "runs 2 layers backward and 1 forward"),
        ({"forward": (2, 0), "fused": 1, "backward": (2,)}, "every slot holds at least one"),
        ({"forward": (2,), "fused": 0, "backward": (2,)}, "every slot holds at least one"),
    ],
)
def test_partitions_that_are_none_are_refused(arguments, message):
    with pytest.raises(PlanError, match=message):
        Slots(**arguments)


def test_costs_that_are_none_are_refused():
    with pytest.raises(PlanError, match="3 forward and 2 backward costs"):
        LayerCosts(forward_s=(1.0,) * 3, backward_s=(1.0,) * 2)
    with pytest.raises(PlanError, match="positive finite"):
        LayerCosts(forward_s=(1.0, float("nan")), backward_s=(1.0, 1.0))
    problem = Problem(costs=uniform(4), rounds=(2,), num_devices=2, open_slots=1)
    with pytest.raises(PlanError, match="the partition cuts 3 layers, the costs are of 4"):
        evaluate(problem, Slots(forward=(2,), fused=1, backward=(2,)))
    with pytest.raises(PlanError, match="leave nothing to deal"):
        plan(uniform(1), num_devices=2, num_microbatches=2)


def test_even_sizes_and_rounds():
    assert even_sizes(7, 3) == (3, 2, 2)
    assert rounds_of(7, 2) == (4, 3)
    with pytest.raises(PlanError, match="do not fill"):
        rounds_of(2, 3)


@settings(max_examples=40, deadline=None)
@given(problems())
def test_the_general_simulator_says_the_same_of_the_plan_as_a_schedule(case):
    problem, partition = case
    found = evaluate(problem, partition)
    costs = problem.costs
    general = Costs(forward_s=(costs.forward_s,), backward_s=(costs.backward_s,), hop_s=problem.transfer_s)
    schedule = complete(found.schedule())
    validate(schedule)
    assert simulate(schedule, general).makespan_s == pytest.approx(found.makespan_s, abs=1e-9)


def test_a_measured_profile_becomes_costs_of_layers():
    profile = Costs(
        forward_s=((1.0, 2.0),), backward_s=((2.0, 4.0),), hop_s=0.5, boundary_bytes=(100,), link_bytes_per_s=200,
        weight_bytes=(10, 20),
    )  # fmt: skip
    expected = LayerCosts(
        forward_s=(1.0, 2.0), backward_s=(2.0, 4.0), transfer_s=1.0, weight_bytes=(10, 20), activation_bytes=(0, 0),
        boundary_bytes=100,
    )  # fmt: skip
    assert LayerCosts.of(profile) == expected


def test_the_plan_command(tmp_path):
    (tmp_path / "costs.json").write_text(json.dumps({"forward_s": [1] * 5 + [3], "backward_s": [2] * 5 + [6]}))
    words = ["plan", "--costs", str(tmp_path / "costs.json"), "--ranks", "2", "--microbatches", "4", "--effort", "0.01"]
    text = CliRunner().invoke(app, words)
    assert text.exit_code == 0
    assert "round(s)" in text.output
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).output)
    again = RoundPipePlan.from_json(found)
    assert again.num_devices == 2


def test_the_plan_command_tells_bad_input_from_no_plan(tmp_path):
    costs = tmp_path / "costs.json"
    good = {"forward_s": [1] * 4, "backward_s": [2] * 4, "weight_bytes": 100}
    for numbers, words, code, said in (
        (good, ["--memory-cap", "150"], 1, "layer 0 has 200 of them); the cap is 150; raise it to 300"),
        (good, ["--memory-cap", "210"], 1, "the cap is 210; raise it to 300"),
        (good | {"forward_s": [0] * 4}, [], 2, "costs are positive finite seconds"),
        (good | {"boundary_bytes": [1, 2]}, [], 2, "boundary_bytes of the costs is of 2 micro-batches; 8 were asked"),
        ({"forward_s": [1], "backward_s": [2]}, [], 2, "the costs are of one layer"),
        ({}, [], 2, "cannot read costs"),
    ):
        costs.write_text(json.dumps(numbers))
        done = CliRunner().invoke(app, ["plan", "--costs", str(costs), "--ranks", "2", "--effort", "0.01", *words])
        assert done.exit_code == code, done.output
        assert said in done.output
        assert len(done.output.splitlines()) == 1


def test_bytes_that_are_no_machine_integer_are_counted():
    costs = LayerCosts(forward_s=(1.0, 1.0), backward_s=(2.0, 2.0), weight_bytes=(10**20, 1), activation_bytes=(0, 0))
    assert running_sums(costs)[2].tolist() == [0, 1e20, 1e20]
