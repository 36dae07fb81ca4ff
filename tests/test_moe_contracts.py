"""The conformance checks find each broken promise, and pass what keeps it."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moe.contracts import check_exchange, check_experts, check_gate, check_hooks, check_order
from moe.dispatch import DirectExchange
from moe.errors import ContractError
from moe.experts import StackedExperts
from moe.gates import SoftmaxGate
from moe.hooks import Hooks
from moe.layer import MoELayer
from moe.order import SparseOrder
from moe.plan import LayerPlan
from tests.moe_case import EXPERTS, TOP_K, WIDTH, lanes_of, make_layer, make_mesh, stacks, tokens_of
from tests.spawn import run_ranks

X = tokens_of(0, [8])


def plain_gate():
    torch.manual_seed(0)
    return SoftmaxGate(WIDTH, EXPERTS, TOP_K).double()


class Changed(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.gate, self.change, self.calls = plain_gate(), change, 0

    def forward(self, x):
        self.calls += 1
        return self.change(self.gate(x), self.calls)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda r, n: replace(r, weights_A=r.weights_A.detach()), "the weights carry a gradient .*; they are detached"),
        (lambda r, n: replace(r, weights_A=r.weights_A * 0), "the weights carry a gradient .*; all of it is zero"),
        (lambda r, n: replace(r, weights_A=r.weights_A * n), "returns the same for the same tokens"),
        (lambda r, n: replace(r, weights_A=r.weights_A * float("inf")), "formed; its gate .* NaN or inf"),
        (lambda r, n: replace(r, experts_A=r.experts_A * 0), "formed; its gate sent a token to the same expert"),
        (lambda r, n: replace(r, tokens_A=r.tokens_A.flip(0)), "formed; its gate .* do not belong together"),
        (lambda r, n: replace(r, num_tokens=9, per_token=None), "num_tokens is that of x, 8; got 9"),
        (lambda r, n: r.weights_A, "formed; its gate returned neither Assignments nor Slots"),
        (lambda r, n: replace(r, experts_A=r.experts_A[:-1]), "formed; its gate .* do not belong together"),
        (
            lambda r, n: replace(r, weights_A=r.weights_A * torch.arange(1.0, 17.0)),
            "permuted tokens are routed alike, permuted; off by",
        ),
    ],
)
def test_gates_that_break_a_promise_are_found(change, text):
    check_gate(Changed(lambda r, n: r), X)
    with pytest.raises(ContractError, match=text):
        check_gate(Changed(change), X)


class ChangedOrder:
    def __init__(self, change):
        self.change = change

    def __call__(self, x, routing):
        return self.change(SparseOrder()(x, routing))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda o: o._replace(counts_E=o.counts_E + 1), "counts add up to its rows; got 20 for 16"),
        (lambda o: o._replace(rows_RD=o.rows_RD.flip(0)), "experts that do nothing give every token back"),
        (lambda o: o._replace(inverse=lambda rows: o.inverse(rows)[:-1]), r"the inverse order returns \(8, 6\)"),
        (lambda o: o._replace(inverse=lambda rows: o.inverse(rows).float()), "the inverse order returns torch.float64"),
        (lambda o: o._replace(inverse=lambda rows: o.inverse(rows) * 1.01), "experts that do nothing give every token"),
        (
            lambda o: o._replace(inverse=lambda rows: o.inverse(rows.detach()) + 0 * o.inverse(rows)),
            "the gradient of a token is the sum of its weights",
        ),
    ],
)
def test_orders_that_break_a_promise_are_found(change, text):
    with pytest.raises(ContractError, match=text):
        check_order(ChangedOrder(change), plain_gate(), X)


class MeanExperts(StackedExperts):
    def forward(self, rows, counts):
        return super().forward(rows, counts) + rows.mean()


class ShortExperts(StackedExperts):
    def forward(self, rows, counts):
        return super().forward(rows, counts)[:, 1:]


def test_experts_that_break_a_promise_are_found():
    check_experts(StackedExperts(*stacks()), X)
    with pytest.raises(ContractError, match="expert 0 returns the same whatever rows the other experts have"):
        check_experts(MeanExperts(*stacks()), X)
    with pytest.raises(ContractError, match=r"experts return \(8, 6\); got \(8, 5\)"):
        check_experts(ShortExperts(*stacks()), X)
    with pytest.raises(ContractError, match="experts have an int `num_experts`"):
        check_experts(nn.Identity(), X)


class OneWay:
    """Dispatch is right; combine loses what the rows hold."""

    def __init__(self, right):
        self.right, self.calls = right, 0

    def __call__(self, rows, matrix_PP):
        self.calls += 1
        return self.right(rows, matrix_PP) * (self.calls % 2)


def broken_exchanges(info):
    right, said = DirectExchange(dist.group.WORLD), []
    check_exchange(right, dist.group.WORLD)
    for wrong in (
        lambda rows, matrix: right(rows, matrix).flip(0),
        lambda rows, matrix: right(rows, matrix)[: 0 if info.rank else None],
        OneWay(right),
    ):
        with pytest.raises(ContractError) as caught:
            check_exchange(wrong, dist.group.WORLD)
        said.append(str(caught.value))
    return said


def test_exchanges_that_break_a_promise_are_found_on_every_rank():
    first, second = run_ranks(broken_exchanges, 2)
    assert first == second
    assert first[0].startswith("the contract is broken: dispatch returns the rows that were sent, in order of")
    assert first[1].endswith("; not on ranks [1] of the ep axis")
    assert "combine, which gets the matrix transposed, brings the rows back" in first[2]


class HalfHooks(Hooks):
    """Sends half as many bytes, and notes where it was called."""

    def __init__(self):
        self.seen = []

    def before_moe_start(self, x_TD):
        self.seen.append("start")
        return x_TD

    def before_dispatch(self, rows_ND, info):
        self.seen.append(("before dispatch", info.chunk, info.backward))
        return rows_ND.float()

    def after_dispatch(self, rows_N, info):
        self.seen.append(("after dispatch", info.chunk, info.backward))
        return rows_N.double()

    def before_combine(self, rows_ND, info):
        self.seen.append(("before combine", info.chunk, info.backward))
        return rows_ND.float()

    def after_combine(self, rows_N, info):
        self.seen.append(("after combine", info.chunk, info.backward))
        return rows_N.double()

    def before_moe_end(self, y_TD):
        self.seen.append("end")
        return y_TD


class LostHooks(Hooks):
    def before_combine(self, rows_ND, info):
        return rows_ND.float()


def test_hooks_that_do_not_undo_are_found():
    check_hooks(HalfHooks(), X, tolerance=1e-6)
    with pytest.raises(ContractError, match="after_dispatch undoes before_dispatch within 0"):
        check_hooks(HalfHooks(), X)
    with pytest.raises(ContractError, match=r"after_combine returns \(8, 6\) torch.float64"):
        check_hooks(LostHooks(), X)


def compressed(info):
    lanes = lanes_of(make_mesh(2, 2, 1))
    hooks, x = HalfHooks(), tokens_of(info.rank, [6, 6]).requires_grad_()
    layer = make_layer(lanes, LayerPlan(2, 3))
    exact = layer(x).hidden
    layer.runner.hooks = hooks
    y = layer(x).hidden
    y.sum().backward()
    lanes.close()
    return hooks.seen, float((y - exact).abs().max())


def test_hooks_run_once_a_chunk_in_both_directions_and_may_change_what_is_sent():
    for seen, error in run_ranks(compressed, 2):
        assert 0 < error < 1e-5
        assert (seen[0], seen.count("start"), seen.count("end")) == ("start", 1, 1)
        inner = [s for s in seen if isinstance(s, tuple)]
        places = [(f"{when} {what}") for what in ("dispatch", "combine") for when in ("before", "after")]
        expected = [(p, c, b) for b, r in ((False, 2), (True, 3)) for p in places for c in range(r)]
        assert sorted(inner) == sorted(expected)


def test_a_layer_takes_sub_modules_of_the_users():
    layer = MoELayer(Changed(lambda r, n: r), StackedExperts(*stacks()), order=ChangedOrder(lambda o: o))
    assert layer(X).hidden.shape == X.shape
