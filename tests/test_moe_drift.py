"""Layers beside what a profile says of them: the same verdict on every rank, and what makes one."""

import time
from dataclasses import replace

import numpy as np
import pytest

from moe.cost import LayerLoad, Line, Profile
from moe.drift import WINDOW, LayerWatch, load_of, refit_reason, replan_reason
from moe.flow import Pass
from moe.plan import PLAIN, LayerPlan
from moe.planner import plan_layer, planned_time
from moe.traffic import Traffic
from tests.moe_case import backward_of, lanes_of, make_layer, make_mesh, tokens_of
from tests.spawn import run_ranks

LOAD = LayerLoad(exchange_bytes=4e6, gather_bytes=8e6, expert_rows=2000, gradient_bytes=3e6)


def profile_of(seconds):
    """Whatever an operation moves or computes takes so long."""
    each = Line(seconds, 0.0)
    return Profile(all_to_all=each, all_reduce=each, expert_forward=each, expert_backward=each)


def test_reasons():
    assert replan_reason(LOAD, replace(LOAD, exchange_bytes=4.9e6)) is None
    assert replan_reason(LOAD, replace(LOAD, expert_rows=2600)) == "expert_rows went from 2000 to 2600, more than 25%"
    assert refit_reason(1.2) is refit_reason(0.8) is refit_reason(3.0, usual=2.5) is None
    assert refit_reason(1.4) == "layers take 1.40 times what the profile says, more than 25% apart"
    assert refit_reason(1.0, usual=2.0).endswith("says; it was 2.00 times, more than 25% apart")


@pytest.mark.parametrize(
    ("rows_SPE", "expected"),
    [
        # two ranks, an expert each: rank 0 sends 6 of 10 rows away and gets 1
        ([[[4, 6], [1, 3]]], (2 * 6 * 8, 0, 9)),
        # experts shared by two: rank 1 of ep computes on what both members were sent
        ([[[4, 6], [1, 3]], [[0, 0], [7, 0]]], (2 * 7 * 8, 12 * 8, 12)),
        ([[[5]]], (0, 0, 5)),
        ([[[0, 0], [0, 0]]], (0, 0, 0)),
    ],
)
def test_the_load_of_a_pass_is_that_of_its_busiest_rank(rows_SPE, expected):
    one = Pass("x", True, PLAIN, Traffic(np.array(rows_SPE), 0, 0), 8, 96, 1.0)
    load = load_of(one, 32)
    assert (load.exchange_bytes, load.gather_bytes, load.expert_rows) == expected
    assert (load.gradient_bytes, load.slice_bytes) == (96, 32)


def test_a_planned_layer_takes_what_its_plan_says():
    profile = Profile(all_to_all=Line(1e-3, 1e-8), all_gather=Line(1e-3, 4e-9), reduce_scatter=Line(1e-3, 3e-8),
                      all_reduce=Line(1e-3, 1e-8), expert_forward=Line(1e-5, 2e-5), expert_backward=Line(1e-5, 4e-5),
                      slowdowns={"inter+intra": 1.2})  # fmt: skip
    plan = plan_layer(profile, LOAD)
    assert planned_time(profile, LOAD, plan, backward=True) == pytest.approx(plan.predicted_backward_s)
    bare = replace(LOAD, gradient_bytes=0)
    assert planned_time(profile, bare, plan, backward=False) == pytest.approx(plan.predicted_forward_s)


def step(layer, rank, tokens=(6, 3)):
    for count in (1, 0):  # the first passes are not the fullest
        backward_of(layer(tokens_of(rank, [max(1, n * (1 - count)) for n in tokens])).hidden)


def watched(info):
    """Four windows: faster than the machine, accepted, made slow, and one layer without a row."""
    lanes = lanes_of(make_mesh(2, 2, 1))
    layers = {name: make_layer(lanes, LayerPlan(2, 1)) for name in ("a", "b")}
    for name, layer in layers.items():
        layer.runner.name = name
    watch, said, took = LayerWatch({n: x.runner for n, x in layers.items()}, profile_of(1e-9), slice_bytes=64), [], []

    def window():
        watch._left = min(watch._left, 4)
        for _ in range(4):
            for layer in layers.values():
                step(layer, info.rank)
            took.extend(one.seconds for one in watch._fullest.values())
            assert all(one.traffic.rows_SPE.sum() == 18 for one in watch._fullest.values())
            found = watch.after_step()
        said.append(found)

    window()
    watch.renew(profile_of(1e-2))
    assert watch._left == 2 * WINDOW
    window()

    right, longest = lanes.exchange, max(took)

    def slow(rows, matrix):  # a pass has two at least
        time.sleep(longest)
        return right(rows, matrix)

    for layer in layers.values():
        layer.runner.lanes = replace(lanes, exchange=slow)
    window()
    lanes.close()
    return said


def test_times_that_moved_are_told_alike_on_every_rank():
    first, second = run_ranks(watched, 2)
    assert first == second
    wrong, accepted, slow = first
    assert wrong.ratio > 1000
    assert wrong.reason.startswith("layers take ")
    assert accepted.reason is None
    assert slow.ratio > 1.25 * accepted.ratio
    assert f"it was {accepted.ratio:.2f} times" in slow.reason


def without_rows(info):
    """One process without rows, or one that never ran: nothing to compare, and no wait."""
    layer = make_layer()
    watch = LayerWatch({"case": layer.runner}, profile_of(1.0), slice_bytes=64)
    found = []
    for tokens in (None, 0, 5):
        watch._left = 1
        if tokens is not None:
            layer(tokens_of(0, [tokens]))
        found.append(watch.after_step())
    return found


def test_steps_without_rows_show_nothing():
    never, empty, some = run_ranks(without_rows, 1)[0]
    assert never is None
    assert empty is None
    assert some.ratio > 0
    assert some.reason is not None  # a second was said
