"""The profiler over real groups: every rank gets one profile, whose parts are what was measured."""

import threading
import time
from dataclasses import replace

import torch

from moe.cost import LayerLoad, Line, Profile
from moe.issue import IssueQueue, own_group
from moe.plan import LayerPlan
from moe.planner import plan_layer
from moe.profiler import (
    Links,
    ProfileConfig,
    agree_on_plans,
    exchange,
    gather,
    log_spaced,
    make_profile,
    measure,
    measure_slowdowns,
    reduce,
    scatter,
)
from tests.spawn import run_ranks

CONFIG = ProfileConfig(most_bytes=1 << 20, least_rows=16, most_rows=128, sizes=4, tries=3)


def profiled(info):
    inter = IssueQueue(own_group(None, timeout_s=30), "inter", timeout_s=30)
    intra = IssueQueue(own_group(None, timeout_s=30), "intra", timeout_s=30)
    steps = []
    profile = make_profile(
        Links(inter=inter, ep=inter.group, intra=intra, esp=intra.group, gradients=inter.group),
        expert_forward=lambda rows: lambda: time.sleep(rows * 2e-5),
        expert_backward=lambda rows: lambda: time.sleep(rows * 4e-5),
        config=CONFIG,
        progress=steps.append,
    )
    load = LayerLoad(exchange_bytes=5e5, gather_bytes=1e6, expert_rows=100 + 50 * info.rank, gradient_bytes=1e5)
    plan = plan_layer(profile, load)
    agreed = agree_on_plans({"0": plan, "1": LayerPlan(info.rank + 1, 2)})
    inter.close()
    intra.close()
    return profile.to_json(), steps, plan.to_json(), {name: p.to_json() for name, p in agreed.items()}


def test_every_rank_gets_one_profile_and_one_plan():
    (text, steps, plan, agreed), second = run_ranks(profiled, 2)
    assert second[0] == text
    profile = Profile.from_json(text)
    assert set(profile.residuals) == {
        "all_to_all", "all_gather", "reduce_scatter", "all_reduce", "expert_forward", "expert_backward",
    }  # fmt: skip
    assert steps == [
        "all_to_all", "all_reduce", "expert_forward", "expert_backward", "all_gather", "reduce_scatter", "slowdowns",
    ]  # fmt: skip
    # A wait is never shorter than asked, and rank 0's plan is everyone's.
    assert profile.expert_forward(100) >= 0.9 * 100 * 2e-5
    assert profile.all_to_all(1e6) > 0
    assert second[3] == agreed == {"0": plan, "1": LayerPlan(1, 2).to_json()}


def bytes_in_a_row(_):
    sent = {10: 0, 100: 0, 1000: 0}

    def make(size):
        def job():
            sent[size] += size

        return job

    measure(make, list(sent), replace(CONFIG, tries=1))
    return sent


def test_small_sizes_run_in_a_row_as_a_rested_link_has_credit():
    # Once to warm up, then 3 runs, or until half of 1000 has passed.
    assert run_ranks(bytes_in_a_row, 1) == [{10: 10 + 500, 100: 100 + 500, 1000: 1000 + 3000}]


def slowest_rank(info):
    return measure(lambda n: lambda: time.sleep(n * 1e-4 if info.rank else 0), [10, 200], CONFIG)


def test_the_slowest_rank_counts():
    first, second = run_ranks(slowest_rank, 2)
    assert first == second
    assert first[0] >= 1e-3
    assert first[1] >= 2e-2


def sums(info):
    group = own_group(None)
    torch.set_default_dtype(torch.float64)  # it is no matter
    outputs = [make(group, 4096)() for make in (exchange, gather, scatter)]
    reduce(group, 4096)()
    return [out.numel() * out.element_size() for out in outputs]


def test_jobs_move_the_bytes_they_are_asked_for():
    assert run_ranks(sums, 2) == [[4096, 4096, 2048]] * 2


def test_sizes_are_log_spaced():
    assert log_spaced(1 << 16, 1 << 20, 5) == [1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 20]
    assert torch.tensor(log_spaced(16, 4096, 6)).diff().min() > 0


class Shared(IssueQueue):
    """A link whose operations take one device: nothing else may run on it meanwhile."""

    device = threading.Lock()

    def submit(self, fn, *, needs=None, layer="", op=""):
        def alone():
            with self.device:
                time.sleep(0.03)
                return fn()

        return super().submit(alone, needs=needs, layer=layer, op=op)


def contended(info, kind):
    """Experts and the link wait for one another, or have nothing to do with one another."""
    inter = kind(own_group(None, timeout_s=30), "inter", timeout_s=30)

    def expert(rows):
        def run():
            with Shared.device:
                time.sleep(0.03)

        return run

    links = Links(inter=inter, ep=inter.group, gradients=inter.group)
    known = Profile(all_to_all=Line(0.03, 1e-9), expert_forward=Line(0.03, 1e-9), expert_backward=Line(0.03, 1e-9))
    found = measure_slowdowns(links, expert, known, replace(CONFIG, tries=3, repeats=1))
    inter.close()
    return found


def test_lanes_that_share_a_device_have_a_slowdown_and_the_plan_is_told():
    for found in run_ranks(contended, 2, Shared):
        assert found.keys() == {"compute+inter"}
        assert 1.05 < found["compute+inter"] < 3
