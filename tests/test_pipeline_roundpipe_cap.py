"""The planner of RoundPipe under a memory cap: what it counts is what a device holds."""

from dataclasses import replace
from itertools import takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.roundpipe_plan import without_frozen_slots
from pipeline.costs import Costs
from pipeline.errors import PlanError
from pipeline.roundpipe.lowering import completed, slot_schedule
from pipeline.roundpipe.planner import evaluate, plan
from pipeline.roundpipe.search import Problem, running_sums
from pipeline.roundpipe.slots import LayerCosts
from tests.roundpipe_plans import problems, uniform


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


def test_bytes_that_are_no_machine_integer_are_counted():
    costs = LayerCosts(forward_s=(1.0, 1.0), backward_s=(2.0, 2.0), weight_bytes=(10**20, 1), activation_bytes=(0, 0))
    assert running_sums(costs)[2].tolist() == [0, 1e20, 1e20]
