"""Every gate, against the formula of its paper or the router of transformers, and both orders against the loop."""

import math

import pytest
import torch
from torch import nn
from transformers import DeepseekV3Config, MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from moe.contracts import check_gate, check_order
from moe.errors import ContractError, MoeConfigError
from moe.experts import ModuleExperts
from moe.gates import (
    DeepSeekV3Gate,
    ExpertChoiceGate,
    GShardGate,
    SigmoidGate,
    SoftGate,
    SoftmaxGate,
    XMoEGate,
)
from moe.gates.router import balance_loss
from moe.layer import MoELayer
from moe.order import EinsumOrder, SparseOrder
from moe.plan import LayerPlan
from moe.reference import reference_moe
from tests.moe_case import lanes_of, make_mesh
from tests.spawn import run_ranks

T, D, E, K = 12, 8, 6, 2
GATES = {
    "softmax": lambda: SoftmaxGate(D, E, K),
    "gshard": lambda: GShardGate(D, E, K, capacity_factor=1.0),
    "sigmoid": lambda: SigmoidGate(D, E, K),
    "x-moe": lambda: XMoEGate(D, E, K, routing_width=E // 2),
    "deepseek": lambda: DeepSeekV3Gate(D, E, K, num_groups=3, top_groups=2, scale=2.5),
    "expert choice": lambda: ExpertChoiceGate(D, E, K),
    "soft": lambda: SoftGate(D, E, slots=3),
}


def gate_of(kind):
    torch.manual_seed(0)
    return GATES[kind]().double()


def tokens(*shape):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


class Twist(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.w = nn.Parameter(torch.randn(D, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))

    def forward(self, rows):
        return torch.tanh(rows @ self.w)


@pytest.mark.parametrize("order", [SparseOrder(), EinsumOrder()], ids=["sparse", "einsum"])
@pytest.mark.parametrize("kind", GATES)
def test_layer_with_every_gate_and_order_equals_the_loop_in_values_and_gradients(kind, order):
    if kind == "soft" and isinstance(order, SparseOrder):
        with pytest.raises(ContractError, match="for a gate that makes Slots use EinsumOrder"):
            order(tokens(T), gate_of(kind)(tokens(T)))
        return
    gate, experts = gate_of(kind), [Twist(e) for e in range(E)]
    layer = MoELayer(gate, ModuleExperts(experts), order=order)
    x = tokens(2, T // 2).requires_grad_()
    params = [x, *gate.parameters(), *(e.w for e in experts)]
    y = layer(x).hidden
    expected = reference_moe(x, gate(x), experts)
    assert y.shape == x.shape
    assert torch.allclose(y, expected, rtol=0, atol=1e-12)
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)
    got = torch.autograd.grad((y * weights).sum(), params)
    for a, b in zip(got, torch.autograd.grad((expected * weights).sum(), params), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("order", [SparseOrder(), EinsumOrder()], ids=["sparse", "einsum"])
@pytest.mark.parametrize("kind", GATES)
def test_no_tokens_are_no_trouble(kind, order):
    if kind == "soft" and isinstance(order, SparseOrder):
        return
    layer = MoELayer(gate_of(kind), ModuleExperts(Twist(e) for e in range(E)), order=order, plan=LayerPlan(2, 3))
    x = tokens(0).requires_grad_()
    y = layer(x).hidden
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, D)


def spread_gates(info):
    """Every gate in every order, its experts spread over two ranks: the largest difference from the loop, by name."""
    lanes, errors = lanes_of(make_mesh(2, 2, 1)), {}
    own = range(info.rank * E // 2, (info.rank + 1) * E // 2)
    every = [tokens(2, T // 2) + rank for rank in range(2)]
    for kind in GATES:
        for order in (SparseOrder(), EinsumOrder())[kind == "soft" :]:
            layer = MoELayer(
                gate_of(kind), ModuleExperts(Twist(e) for e in own), order=order, lanes=lanes, plan=LayerPlan(2, 3)
            )
            x = every[info.rank].requires_grad_()
            y = layer(x).hidden
            experts = [Twist(e) for e in range(E)]
            expected = [reference_moe(tokens, gate_of(kind)(tokens), experts) for tokens in every]
            torch.stack(expected).square().sum().backward(inputs=[e.w for e in experts])
            y.square().sum().backward(inputs=list(layer.experts.parameters()))
            pairs = [(y, expected[info.rank])]
            pairs += [(layer.experts.each[i].w.grad, experts[e].w.grad) for i, e in enumerate(own)]
            errors[f"{kind} {type(order).__name__}"] = max(float((a - b).abs().max()) for a, b in pairs)
    lanes.close()
    return errors


def test_every_gate_and_order_over_two_ranks_equals_the_loop_over_both():
    for errors in run_ranks(spread_gates, 2):
        assert len(errors) == 2 * len(GATES) - 1
        assert max(errors.values()) < 1e-11, errors


@pytest.mark.parametrize("kind", GATES)
def test_every_gate_and_order_of_ours_keeps_its_contract(kind):
    check_gate(gate_of(kind), tokens(T), causal=kind not in ("expert choice", "soft", "gshard"))
    check_order(EinsumOrder() if kind == "soft" else SparseOrder(), gate_of(kind), tokens(T))
    check_order(EinsumOrder(), gate_of(kind), tokens(T))


SMALL = {"hidden_size": D, "num_experts_per_tok": K}
ROUTERS = {
    "mixtral": (MixtralTopKRouter, MixtralConfig(num_local_experts=E, **SMALL), {}),
    "qwen3": (Qwen3MoeTopKRouter, Qwen3MoeConfig(num_experts=E, norm_topk_prob=True, **SMALL), {}),
    "olmoe": (OlmoeTopKRouter, OlmoeConfig(num_experts=E, norm_topk_prob=False, **SMALL), {"normalise": False}),
}


class Linear(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.w = nn.Parameter(Twist(seed).w.detach().float())

    def forward(self, rows):
        assert rows.dtype == torch.bfloat16
        return torch.tanh(nn.functional.linear(rows, self.w))


@pytest.mark.parametrize("kind", GATES)
def test_under_autocast_experts_compute_in_bf16_and_routing_in_fp32(kind):
    gate, experts = gate_of(kind).float(), [Linear(e) for e in range(E)]
    order = EinsumOrder() if kind in ("soft", "gshard") else SparseOrder()
    layer, x = MoELayer(gate, ModuleExperts(experts), order=order, plan=LayerPlan(2, 1)), tokens(2, T // 2).float()
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = layer(x).hidden, gate(x)
        y.square().sum().backward()
    plain = gate(x)
    weights = "combine_BTES" if kind == "soft" else "weights_A"
    assert torch.equal(getattr(routing, weights), getattr(plain, weights))
    exact = reference_moe(x, plain, [lambda rows, w=e.w: torch.tanh(rows @ w.t()) for e in experts])
    assert y.dtype == torch.float32
    assert 0 < (y - exact).abs().max() < 0.1
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", ROUTERS)
def test_softmax_gate_is_the_router_of_transformers_bit_for_bit(family):
    kind, config, options = ROUTERS[family]
    router, gate = kind(config), SoftmaxGate(D, E, K, **options)
    router.weight = gate.weight
    x = tokens(T).float()
    _, weights, indices = router(x)
    routing = gate(x)
    assert torch.equal(routing.experts_A.view(T, K), indices)
    assert torch.equal(routing.weights_A.view(T, K), weights)


def test_deepseek_gate_is_the_router_of_transformers_also_with_a_bias_below_zero():
    config = DeepseekV3Config(
        n_routed_experts=E, n_group=3, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5, **SMALL
    )
    router, gate = DeepseekV3TopkRouter(config), DeepSeekV3Gate(D, E, K, num_groups=3, top_groups=2, scale=2.5)
    router.weight = gate.weight
    bias = torch.linspace(-2, -0.5, E)
    router.e_score_correction_bias.copy_(bias)
    gate.bias_E.copy_(bias)
    x = tokens(T).float()
    _, weights, indices = router(x)
    routing = gate(x)
    order, own = indices.argsort(1), routing.experts_A.view(T, K)
    assert torch.equal(own.sort(1).values, indices.sort(1).values)
    assert torch.allclose(routing.weights_A.view(T, K).gather(1, own.argsort(1)), weights.gather(1, order))


def test_bias_of_deepseek_moves_against_the_load_and_not_into_the_weights():
    gate = DeepSeekV3Gate(D, E, K)
    gate.update_bias(torch.tensor([9, 1, 3, 3, 3, 0]), speed=0.5)
    assert gate.bias_E.tolist() == pytest.approx([-0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    x = tokens(T).float()
    before = gate.logits(x).sigmoid().gather(1, gate(x).experts_A.view(T, K))
    expected = before / before.sum(1, keepdim=True)
    assert torch.allclose(gate(x).weights_A.view(T, K), expected)


def test_capacity_drops_later_choices_first_and_counts_what_it_keeps():
    gate = gate_of("gshard")
    routing = gate(tokens(T))
    rows = math.ceil(T * K / E)
    counts = torch.bincount(routing.experts_A[routing.keep_A], minlength=E)
    assert counts.max() <= rows
    assert not routing.keep_A.all()
    first = routing.keep_A.view(T, K)[:, 0]
    firsts_of = torch.bincount(routing.experts_A.view(T, K)[:, 0], minlength=E)
    assert first.sum() == firsts_of.clamp(max=rows).sum()  # no first choice gave way to a second


def test_balance_loss_is_one_when_balanced_and_the_number_of_experts_when_not():
    even = torch.full((E, E), 1 / E)
    assert balance_loss(even, torch.arange(E).view(E, 1)).item() == pytest.approx(1)
    one = torch.zeros(E, E)
    one[:, 0] = 1
    assert balance_loss(one, torch.zeros(E, 1, dtype=torch.int64)).item() == pytest.approx(E)
    assert balance_loss(even[:0], torch.zeros(0, 1, dtype=torch.int64)).item() == 0


def test_soft_sequences_do_not_see_each_other():
    gate, x = gate_of("soft"), tokens(2, 4)
    layer = MoELayer(gate, ModuleExperts(Twist(e) for e in range(E)), order=EinsumOrder())
    changed = x.clone()
    changed[1] += 1
    assert torch.equal(layer(x).hidden[0], layer(changed).hidden[0])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: SoftmaxGate(D, E, 7), "top_k is 7 of 6 experts; it must be between 1 and 6"),
        (lambda: XMoEGate(D, E, 0, routing_width=3), "top_k is 0 of 6 experts"),
        (lambda: GShardGate(D, E, 2, capacity_factor=0), "the capacity factor is 0; it must be positive"),
        (lambda: GShardGate(D, E, 2, capacity_factor=math.inf), "the capacity factor is inf; it must be positive"),
        (lambda: GShardGate(D, E, 2, capacity_factor=math.nan), "the capacity factor is nan"),
        (lambda: DeepSeekV3Gate(D, E, 2, num_groups=4), "6 experts in 4 groups"),
        (lambda: DeepSeekV3Gate(D, E, 3, num_groups=3), "top_k is 3, but the 1 groups that are searched have only 2"),
        (lambda: XMoEGate(D, E, 2, routing_width=0), "routing_width is 0; it must be at least 1"),
        (lambda: SoftGate(D, E, slots=0), "6 experts of 0 slots; there must be at least 1 of each"),
    ],
)
def test_gates_that_cannot_be_are_refused(make, text):
    with pytest.raises(MoeConfigError, match=text):
        make()
