"""The planner of RoundPipe: its simulation against formulas and a plain one, its search against exhaustion."""

import json
from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given, settings

from benchmarks.pipeline_tables import NUM_DEVICES, PUBLISHED_ROUNDS, read_models
from pipeline.comms import complete
from pipeline.costs import Costs
from pipeline.errors import PlanError
from pipeline.roundpipe.planner import RoundPipePlan, anneal_all, evaluate, plan
from pipeline.roundpipe.search import Problem, even_cuts
from pipeline.roundpipe.slot_sim import ready_makespan, strict_makespan
from pipeline.roundpipe.slots import LayerCosts, Op, even_sizes, rounds_of
from pipeline.schedules.roundpipe import Slots
from pipeline.simulate import simulate
from pipeline.validate import validate
from tests.roundpipe_plans import compositions, problems, uniform


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
