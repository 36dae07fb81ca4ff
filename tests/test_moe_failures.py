"""Bad routing, differing plans and lost ranks: one clear error in bounded time, on every rank."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import moe
from moe.config import MoeConfig
from moe.dispatch import all_to_all
from moe.errors import ContractError, ExchangeError, MoeConfigError, MoeError, PlanError
from moe.experts import ModuleExperts, StackedExperts
from moe.hooks import Hooks
from moe.issue import own_group
from moe.plan import LayerPlan
from moe.records import top_k_assignments
from moe.sync import average_gradients, clip_grad_norm_
from tests.moe_case import EXPERTS, WIDTH, lanes_of, make_layer, make_mesh, stacks, tokens_of
from tests.moe_models import tiny_moe
from tests.spawn import SpawnError, run_ranks


class BadGate(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        if self.kind == "raises":
            raise ContractError("layer case, rank 1 of the ep axis: its gate or order raised an error")
        ids = torch.arange(2).repeat(len(x), 1)
        weights = torch.full((len(x), 2), 0.5, dtype=x.dtype)
        if self.kind == "nan":
            weights[0, 0] = float("nan")
        elif self.kind == "repeated":
            ids[1] = 3
        elif self.kind == "range":
            ids[0, 0] = EXPERTS
        routing = top_k_assignments(ids, weights, EXPERTS)
        return replace(routing, **CHANGES.get(self.kind, lambda r: {})(routing))


CHANGES = {
    "float ids": lambda r: {"experts_A": r.experts_A.double()},
    "flat": lambda r: {"experts_A": r.experts_A.view(-1, 2)},
    "keep": lambda r: {"keep_A": torch.ones(3, dtype=torch.bool)},
    "keep ids": lambda r: {"keep_A": torch.ones(8, dtype=torch.int64)},
    "token order": lambda r: {"tokens_A": r.tokens_A.flip(0)},
    "per token": lambda r: {"per_token": 3},
    "complex weights": lambda r: {"weights_A": r.weights_A * 1j},
    "lists": lambda r: {"experts_A": r.experts_A.tolist()},
    "tokens": lambda r: {"num_tokens": r.num_tokens + 1, "per_token": None},
    "experts": lambda r: {"num_experts": 2 * EXPERTS},
}


class LosingOrder:
    def __init__(self, order, kind):
        self.order, self.kind = order, kind

    def __call__(self, x_TD, routing):
        counts_E = torch.zeros(EXPERTS, dtype=torch.int64)
        if self.kind == "negative":
            counts_E[0], counts_E[1] = -1, 9
        return self.order(x_TD, routing)._replace(counts_E=counts_E)


def misbehave(info, kind):
    """Rank 1 alone does something wrong; returns what each rank got to hear, and after how long."""
    lanes = lanes_of(make_mesh(2, 2, 1))
    layer, x = make_layer(lanes), tokens_of(info.rank, [4, 4])
    if info.rank == 1:
        if kind == "plan":
            layer.runner.plan = LayerPlan(2, 1)
        elif kind == "dtype":
            layer, x = layer.float(), x.float()
        elif kind in ("order", "negative"):
            layer.order = LosingOrder(layer.order, kind)
        elif kind in ("raises", "many"):
            layer.gate = BadGate(kind)
            layer.experts = ModuleExperts(nn.Identity() for _ in range(3)) if kind == "many" else layer.experts
        elif kind == "name":
            layer.runner.name = "other"
        elif kind == "counts":
            layer.order = lambda x, r, order=layer.order: order(x, r)._replace(counts_E=[4, 4, 0, 0])
        elif kind == "complex":
            layer.order = lambda x, r, order=layer.order: order(x, r)._replace(rows_RD=order(x, r).rows_RD * 1j)
        else:
            layer.gate = BadGate(kind)
    start_s = time.monotonic()
    try:
        layer(x)
    except (MoeError, AttributeError) as error:
        heard = (type(error), str(error))
    lanes.close()
    return *heard, time.monotonic() - start_s


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        ("nan", ContractError, "layer case, rank 1 of the ep axis: its gate returned weights that are NaN"),
        ("repeated", ContractError, "rank 1 of the ep axis: its gate sent a token to the same expert twice"),
        ("range", ContractError, "rank 1 of the ep axis: its gate returned experts or tokens that do not exist"),
        ("order", ContractError, "rank 1 of the ep axis: its order returned rows or counts that do not belong"),
        ("negative", ContractError, "rank 1 of the ep axis: its order returned rows or counts that do not belong"),
        ("float ids", ContractError, "rank 1 of the ep axis: its gate returned experts or tokens that do not exist"),
        (
            "flat",
            ContractError,
            "rank 1 of the ep axis: its gate returned tokens, experts and weights that do not",
        ),
        (
            "keep",
            ContractError,
            "rank 1 of the ep axis: its gate returned tokens, experts and weights that do not",
        ),
        ("keep ids", ContractError, "its gate returned tokens, experts and weights that do not belong together"),
        ("token order", ContractError, "its gate returned tokens, experts and weights that do not belong together"),
        ("per token", ContractError, "its gate returned tokens, experts and weights that do not belong together"),
        ("tokens", ContractError, "its gate returned a routing for another number of tokens than it was asked for"),
        ("experts", ContractError, "its gate has not as many experts as the ranks of ep hold together"),
        (
            "complex weights",
            ContractError,
            "rank 1 of the ep axis: its gate returned weights that are complex; use",
        ),
        ("complex", ContractError, "rank 1 of the ep axis: its rows are of a dtype that does not travel; use fp32"),
        ("raises", ContractError, "layer case, rank 1 of the ep axis: its gate or order raised an error"),
        ("many", MoeConfigError, r"layer case: the ranks have \[2, 3\] experts; give each the same number"),
        ("name", PlanError, "rank 1 of the ep axis is in another layer than rank 0 of the ep axis; one of them is"),
        ("plan", PlanError, "rank 0 of the ep axis has .* = .* rank 1 of the ep axis has .*; give every rank the same"),
        ("dtype", PlanError, "give every rank the same plan and dtype"),
    ],
)
def test_what_one_rank_does_wrong_every_rank_hears(kind, error, text):
    for kind_of, message, waited_s in run_ranks(misbehave, 2, kind):
        assert kind_of is error
        with pytest.raises(error, match=text):
            raise error(message)
        assert waited_s < 10


@pytest.mark.parametrize("kind", ["lists", "counts"])
def test_what_is_no_tensor_ends_the_step_on_every_rank(kind):
    (kind_of, message, waited_s), (own_kind, *_) = run_ranks(misbehave, 2, kind)
    assert (kind_of, own_kind) == (ContractError, AttributeError)
    assert message == "layer case, rank 1 of the ep axis: its gate or order raised an error, which that rank shows"
    assert waited_s < 5


def misroute(info):
    """The router of a transformers model gives rank 1 ids of another shape; returns what each rank hears, and when."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "ep"))
    model = moe.parallelize(tiny_moe("mixtral"), mesh, ep="ep", dp="dp", config=MoeConfig(timeout_s=20.0))
    layer = next(iter(moe.expert_layers(model).values()))
    x, ids = torch.ones(3, 16, dtype=torch.float64), torch.tensor([[0, 1], [1, 2], [3, 0]])
    before, start_s = layer(x, ids, ids.double()), time.monotonic()
    with pytest.raises((ContractError, ValueError)) as caught:
        layer(x, ids.flatten() if info.rank == 1 else ids, ids.double())
    waited_s = time.monotonic() - start_s
    assert torch.equal(layer(x, ids, ids.double()), before)
    layer.runner.lanes.close()
    return caught.type, str(caught.value), waited_s


def test_ids_of_another_shape_end_the_step_of_a_model_on_every_rank():
    (kind, message, waited_s), (own_kind, *_) = run_ranks(misroute, 2)
    assert (kind, own_kind) == (ContractError, ValueError)
    assert message.endswith("rank 1 of the ep axis: its gate or order raised an error, which that rank shows")
    assert waited_s < 5


class Failing(nn.Module):
    num_experts = 2

    def __init__(self, rank, how):
        super().__init__()
        self.rank, self.how = rank, how

    def forward(self, rows, counts):
        if self.rank != 1:
            return rows
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "shape":
            return rows[:, :1]
        raise ValueError("the expert is broken")


def fail_in_the_middle(info, how):
    lanes = lanes_of(make_mesh(2, 2, 1), timeout_s=3.0)
    layer = make_layer(lanes, LayerPlan(3, 1))
    layer.experts = Failing(info.rank, how)
    start_s = time.monotonic()
    with pytest.raises((MoeError, ValueError)) as caught:
        layer(tokens_of(info.rank, [6, 6]))
    assert time.monotonic() - start_s < 15
    if how == "killed":
        raise caught.value
    return type(caught.value), str(caught.value)


def test_an_expert_that_fails_ends_the_step_on_every_rank():
    (kind, text), (own_kind, own_text) = run_ranks(fail_in_the_middle, 2, "fails", fresh=True)
    assert kind is ExchangeError
    assert text.startswith("rank 0, layer case, combine 0 on the inter link: ")
    assert (own_kind, own_text) == (ValueError, "the expert is broken")


class BrokenHooks(Hooks):
    at = None

    def before_dispatch(self, rows_ND, info):
        return self._pass("before_dispatch", rows_ND, info)

    def after_combine(self, rows_N, info):
        return self._pass("after_combine", rows_N, info)

    def _pass(self, where, rows, info):
        if self.at == (where, info.backward) and info.chunk == info.chunks - 1:
            raise ValueError("the hook is broken")
        return rows


BROKEN = [
    (LayerPlan(1, 1), "before_dispatch", False),
    (LayerPlan(1, 1), "before_dispatch", True),
    (LayerPlan(1, 3), "before_dispatch", True),
    (LayerPlan(3, 1), "after_combine", False),
]


def fail_in_a_hook(info):
    """A hook of rank 1 raises in one step, and both ranks go on to the next; returns what each step brought."""
    found = []
    for plan, where, backward in BROKEN:
        hooks, heard, start_s = BrokenHooks(), [], time.monotonic()
        layer = make_layer(lanes_of(make_mesh(2, 2, 1), timeout_s=0.5), plan, hooks=hooks)
        hooks.at = (where, backward) if info.rank == 1 else None
        for _ in range(2):
            with pytest.raises((MoeError, ValueError)) as caught:
                layer(tokens_of(info.rank, [6, 6])).hidden.sum().backward()
            heard.append((caught.type, str(caught.value)))
            hooks.at = None
        found.append((*heard, time.monotonic() - start_s))
    return found


def test_after_a_hook_that_fails_no_rank_takes_the_next_step_for_this_one():
    others, own = run_ranks(fail_in_a_hook, 2, fresh=True)
    for (kind, text), (next_kind, next_text), waited_s in others:
        assert kind is next_kind is ExchangeError
        assert text.startswith("rank 0, layer case, ")
        assert "for the link broke before: " + text in next_text
        assert waited_s < 5
    for first, (next_kind, next_text), waited_s in own:
        assert first == (ValueError, "the hook is broken")
        assert next_kind is ExchangeError
        assert next_text.endswith("experts on the inter link: ValueError: the hook is broken")
        assert waited_s < 5


def test_experts_that_return_another_shape_are_named():
    layer = make_layer()
    layer.experts = Failing(1, "shape")
    layer.experts.num_experts = EXPERTS
    with pytest.raises(ContractError, match=r"layer case: the experts got rows \(12, 6\) .* and returned \(12, 1\)"):
        layer(tokens_of(0, [6]))


def test_a_rank_lost_in_the_middle_of_an_all_to_all_is_an_error_on_the_other():
    with pytest.raises(SpawnError) as caught:
        run_ranks(fail_in_the_middle, 2, "killed", fresh=True, timeout_s=40)
    # Whichever came first: the other rank was not stuck, it raised.
    assert re.search(r"SIGKILL|rank 0, layer case, (dispatch|combine) \d on the inter link", str(caught.value))
    assert "failed after it: ranks" in str(caught.value)


CALLS = {
    "average_gradients": lambda model, _: average_gradients(model),
    "grad_norm": lambda model, _: clip_grad_norm_(model, 1.0),
    "doctor": lambda model, _: moe.doctor(model),
    "save_pretrained": lambda model, folder: moe.save_pretrained(model, folder),
}


def fail_to_come(info, folder):
    """Rank 1 makes none of the calls; returns what rank 0 hears of each, and after how long."""
    heard = {}
    for name, call in CALLS.items():
        sizes = (2, 1) if name in ("average_gradients", "doctor") else (1, 2)  # ranks of dp, of ep
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "ep"))
        model = moe.parallelize(tiny_moe("mixtral"), mesh, ep="ep", dp="dp", config=MoeConfig(timeout_s=1.0))
        if info.rank == 1:
            continue
        start_s = time.monotonic()
        with pytest.raises(MoeError) as caught:
            call(model, folder / name)
        heard[name] = (type(caught.value), str(caught.value), time.monotonic() - start_s)
    group = own_group(None, timeout_s=1.0)
    if info.rank == 0:
        with pytest.raises(RuntimeError, match=r"^between this rank and rank 1: "):
            all_to_all(torch.ones(0), [0, 0], [0, 1], group)
        start_s = time.monotonic()
        with pytest.raises(ExchangeError, match=r"making a group of the ranks \[0, 1\]: a rank is lost or late"):
            moe.parallelize(tiny_moe("mixtral"), mesh, ep="ep", dp="dp", config=MoeConfig(timeout_s=1.0))
        assert time.monotonic() - start_s < 5
    return heard


def test_who_waits_outside_the_layers_hears_of_it_in_time(tmp_path):
    heard, _ = run_ranks(fail_to_come, 2, tmp_path, fresh=True)
    places = [
        "reduction over dp on the dp",
        "reduction over ep on the inter",
        "answers over dp on the dp",
        "answers over",
    ]
    for (name, (kind, text, waited_s)), place in zip(heard.items(), places, strict=True):
        assert kind is ExchangeError
        assert text.startswith(f"rank 0, {name}, {place}")
        assert waited_s < 5
    assert list(tmp_path.iterdir()) == []


END_AT_ONCE = """
import sys
import torch
import torch.distributed as dist
from moe.issue import IssueQueue
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
started = []
def work():
    started.append(True)
    for _ in range(300):
        torch.ones(20000).sort()
    print("done", flush=True)
IssueQueue(dist.group.WORLD, "inter").submit(work)
while not started:
    pass
"""


def test_a_script_that_closes_nothing_ends_after_its_lanes(tmp_path):
    run = [sys.executable, "-c", END_AT_ONCE, str(tmp_path / "store")]
    ended = subprocess.run(run, capture_output=True, text=True, timeout=50, check=False)
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr


def make_other_calls(info):
    lanes = lanes_of(make_mesh(2, 2, 1), timeout_s=1.0)
    layer, x, own = make_layer(lanes=lanes), tokens_of(0, [4]), torch.zeros(1, dtype=torch.int64)
    # What a save or the doctor does on these groups, in sizes of its own.
    calls = (lambda: layer(x)), (lambda: dist.all_gather_single(own.repeat(2), own, group=lanes.ep))
    start_s = time.monotonic()
    with pytest.raises((MoeError, RuntimeError)) as caught:
        calls[info.rank]()
    return caught.type.__name__, time.monotonic() - start_s


def test_ranks_in_different_calls_hear_of_it_in_time():
    (kind, waited_s), (_, other_s) = run_ranks(make_other_calls, 2, fresh=True)
    assert kind == "ExchangeError"
    assert max(waited_s, other_s) < 10


def uneven(info):
    with pytest.raises(MoeConfigError, match="node_ranks is 2, but the ep axis has 3 ranks"):
        lanes_of(make_mesh(3, 3, 1), exchange="2d", node_ranks=2)
    return True


def test_nodes_that_do_not_divide_are_refused():
    assert run_ranks(uneven, 3) == [True] * 3


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"exchange": "3d"}, "exchange is '3d'; choose one of direct, 1d, 2d"),
        ({"node_ranks": 0}, "node_ranks is 0; it must be at least 1"),
        ({"timeout_s": 0}, "timeout_s is 0; it must be positive"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, text):
    with pytest.raises(MoeConfigError, match=text):
        MoeConfig(**changes)


def test_rows_and_weights_of_grouped_products_agree_with_one_product_an_expert():
    """Also with widths that grouped_mm refuses, and with experts that have no rows."""
    gate_up, down = stacks(torch.float32)
    rows = torch.randn(5, WIDTH)
    for width in (WIDTH, 8):
        wide = torch.nn.functional.pad(gate_up, (0, width - WIDTH))
        out = torch.nn.functional.pad(down, (0, 0, 0, width - WIDTH))
        x = torch.nn.functional.pad(rows, (0, width - WIDTH))
        fast, slow = StackedExperts(wide, out), StackedExperts(wide, out, grouped=False)
        assert torch.allclose(fast(x, [2, 0, 3, 0]), slow(x, [2, 0, 3, 0]), rtol=0, atol=1e-6)
