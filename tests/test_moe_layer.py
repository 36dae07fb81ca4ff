"""The layer against the loop over tokens, in fp64: gradcheck on one rank, outputs and every gradient on several."""

import copy
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moe.config import MoeConfig
from moe.errors import MoeError
from moe.experts import ModuleExperts
from moe.gates import SoftmaxGate
from moe.lanes import make_lanes
from moe.layer import ExpertRunner, MoELayer
from moe.parallel import ParallelExperts
from moe.plan import PLAIN, LayerPlan
from tests.moe_case import (
    EXPERTS,
    TOP_K,
    WIDTH,
    backward_of,
    errors_of,
    lanes_of,
    make_layer,
    make_mesh,
    reference,
    stacks,
    tokens_of,
)
from tests.spawn import run_ranks

PLANS = [
    PLAIN,
    LayerPlan(3, 1),
    LayerPlan(1, 4),
    LayerPlan(4, 2),
    LayerPlan(3, 5, "ready", 1, 2),
]
EXACT = 1e-11


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_gradcheck_through_gate_order_experts_and_combine(plan):
    layer = make_layer(plan=plan)
    x = tokens_of(0, [7]).requires_grad_()
    params = [layer.gate.weight, layer.experts.gate_up_proj, layer.experts.down_proj]

    def run(x, *values):
        names = ["gate.weight", "experts.gate_up_proj", "experts.down_proj"]
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,)).hidden

    assert torch.autograd.gradcheck(run, (x, *params), fast_mode=True)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_one_rank_equals_the_loop(plan):
    counts = [9]
    layer, x = make_layer(plan=plan), tokens_of(0, counts).requires_grad_()
    y = layer(x).hidden
    backward_of(y)
    assert errors_of(layer, x, y, reference([0], counts), 0) < EXACT


def spread(info, ep, esp, counts, gate, config):
    mesh = make_mesh(info.world_size, ep, esp)
    dp = info.rank // (ep * esp)
    mates = list(range(dp * ep * esp, (dp + 1) * ep * esp))
    expected = reference(mates, counts, gate)
    lanes = lanes_of(mesh, **config)
    errors = []
    for plan in PLANS:
        layer, x = make_layer(lanes, plan, gate), tokens_of(info.rank, counts).requires_grad_()
        y = layer(x).hidden
        backward_of(y)
        errors.append(errors_of(layer, x, y, expected, info.rank))
    lanes.close()
    return max(errors)


@pytest.mark.parametrize(
    ("ep", "esp", "counts", "gate", "config"),
    [
        (4, 1, [5, 9, 1, 6], "softmax", {}),
        (2, 2, [5, 9, 0, 6], "softmax", {}),
        (1, 4, [3, 0, 4, 2], "softmax", {}),
        (2, 1, [4, 7, 6, 5], "softmax", {}),
        (4, 1, [4, 0, 6, 5], "one expert", {"exchange": "2d", "node_ranks": 2}),
        (4, 1, [4, 3, 6, 5], "softmax", {"exchange": "1d", "node_ranks": 2}),
        (2, 2, [0, 0, 0, 0], "softmax", {}),
    ],
)
def test_spread_layers_equal_the_loop_over_all_ranks(ep, esp, counts, gate, config):
    """Uneven tokens, ranks and experts without any, every plan, and two copies of the experts where dp is 2."""
    assert max(run_ranks(spread, 4, ep, esp, counts, gate, config)) < EXACT


def keep_collectives(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if "c10d" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE


def other_uses(info):
    """What is not a plain forward and backward: activation checkpointing, two backwards, no grad, any module."""
    mesh, counts = make_mesh(2, 2, 1), [6, 3]
    lanes, expected = lanes_of(mesh), reference([0, 1], [6, 3])
    found = {}
    for how in ("reentrant", "not reentrant", "selective", "twice", "frozen"):
        plan = PLAIN if how == "selective" else LayerPlan(3, 2)
        layer, x = make_layer(lanes, plan), tokens_of(info.rank, counts).requires_grad_()
        if how == "frozen":
            layer.experts.requires_grad_(False)
        if how == "selective":  # what was received is not computed again, says the user: of an exchange it is not kept
            contexts = partial(create_selective_checkpoint_contexts, keep_collectives)
            y = checkpoint(lambda x, m=layer: m(x).hidden * 1.0, x, use_reentrant=False, context_fn=contexts)
        elif "reentrant" in how:
            y = checkpoint(lambda x, m=layer: m(x).hidden * 1.0, x, use_reentrant=how == "reentrant")
        else:
            y = layer(x).hidden
        if how == "twice":
            (y * y).sum().backward(retain_graph=True)
            layer.zero_grad()
            x.grad = None
        backward_of(y)
        if how == "frozen":
            assert layer.experts.down_proj.grad is None
            found[how] = float((x.grad - expected[info.rank]["x"]).abs().max())
        else:
            found[how] = errors_of(layer, x, y, expected, info.rank)
    with torch.no_grad():
        y = make_layer(lanes, LayerPlan(2, 3))(tokens_of(info.rank, counts)).hidden
    found["no grad"] = float((y - expected[info.rank]["y"]).abs().max())
    assert not y.requires_grad
    lanes.close()
    return found


def test_checkpointing_two_backwards_frozen_experts_and_no_grad_are_exact():
    for found in run_ranks(other_uses, 2):
        assert max(found.values()) < EXACT, found


class Scaled(nn.Module):
    """An expert that is no MLP: with a parameter that is used twice, and one that is not used."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))
        self.unused = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, rows):
        return torch.tanh(rows @ self.w) @ self.w


def any_module(info, ep):
    mesh = make_mesh(info.world_size, ep, 1)
    lanes = lanes_of(mesh)
    each = EXPERTS // ep
    own = range(lanes.position * each, (lanes.position + 1) * each)
    torch.manual_seed(1)
    gate = SoftmaxGate(WIDTH, EXPERTS, TOP_K).double()
    layer = MoELayer(gate, ModuleExperts(Scaled(e) for e in own), lanes=lanes, plan=LayerPlan(2, 3))
    y = layer(tokens_of(info.rank if ep > 1 else 0, [5, 4])).hidden
    backward_of(y)
    grads = [layer.experts.each[i].w.grad for i in range(each)]
    unused = [layer.experts.each[i].unused.grad.item() for i in range(each)]
    lanes.close()
    return y.detach(), grads, unused


def test_any_module_is_an_expert_and_an_unused_parameter_gets_zeros():
    spread = run_ranks(any_module, 2, 2)
    y, grads, unused = run_ranks(any_module, 1, 1)[0]
    assert torch.allclose(spread[0][0], y, rtol=0, atol=EXACT)
    assert not torch.allclose(spread[0][1][0], grads[0])  # rank 1's tokens are in it too
    assert spread[0][2] == spread[1][2] == [0.0, 0.0]
    assert unused == [0.0] * EXPERTS


def test_sgd_step_of_two_ranks_equals_one_process():
    """The scale of expert gradients: with SGD a wrong factor changes the weights (Adam would hide it)."""
    counts = [6, 5]
    got = run_ranks(sgd_step, 2, counts)
    layers = [make_layer()]
    optimizer = torch.optim.SGD(layers[0].parameters(), lr=0.1)
    losses = [(layers[0](tokens_of(r, counts)).hidden ** 2).mean() for r in range(2)]
    (sum(losses) / 2).backward()
    optimizer.step()
    expected = layers[0]
    for rank, (gate, gate_up, down) in enumerate(got):
        own = slice(2 * rank, 2 * rank + 2)
        assert torch.allclose(gate, expected.gate.weight, rtol=0, atol=EXACT)
        assert torch.allclose(gate_up, expected.experts.gate_up_proj[own], rtol=0, atol=EXACT)
        assert torch.allclose(down, expected.experts.down_proj[own], rtol=0, atol=EXACT)


def sgd_step(info, counts):
    lanes = lanes_of(make_mesh(2, 2, 1))
    layer = make_layer(lanes, LayerPlan(2, 3))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    (layer(tokens_of(info.rank, counts)).hidden ** 2).mean().backward()
    for param in layer.parameters():  # the mean over the ranks of the loss: experts already have the sum
        if not getattr(param, "is_expert", False):
            dist.all_reduce(param.grad)
        param.grad /= 2
    optimizer.step()
    lanes.close()
    return [p.detach() for p in (layer.gate.weight, layer.experts.gate_up_proj, layer.experts.down_proj)]


def test_double_backward_and_a_freed_graph_are_refused_by_name():
    layer, x = make_layer(), tokens_of(0, [4]).requires_grad_()
    y = layer(x).hidden
    with pytest.raises(MoeError, match=r"layer case: double backward \(create_graph=True\) does not pass"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


def parallel_experts():
    return ParallelExperts(*stacks(), nn.functional.silu, ExpertRunner(), None, grouped=False)


@pytest.mark.parametrize("make", [make_layer, parallel_experts])
def test_experts_stay_marked_where_torch_makes_new_parameters(make):
    copied, loaded, emptied = nn.Sequential(make()), nn.Sequential(make()), nn.Sequential(make())
    before = [p for model in (copied, loaded, emptied) for p in model.parameters()]
    loaded.load_state_dict({name: value.clone() for name, value in loaded.state_dict().items()}, assign=True)
    for model in (copy.deepcopy(copied), loaded, emptied.to("meta").to_empty(device="cpu")):
        params = dict(model.named_parameters())
        assert not {id(p) for p in before} & {id(p) for p in params.values()}
        marked = {name for name, p in params.items() if getattr(p, "is_expert", False)}
        assert marked == {name for name in params if "gate.weight" not in name}


def test_expert_relabelling_and_token_order_do_not_matter():
    layer, x = make_layer(plan=LayerPlan(2, 1)), tokens_of(0, [8])
    y = layer(x).hidden
    turned = torch.tensor([3, 1, 0, 2])
    layer.gate.weight = nn.Parameter(layer.gate.weight[turned])
    layer.experts.gate_up_proj = nn.Parameter(layer.experts.gate_up_proj[turned])
    layer.experts.down_proj = nn.Parameter(layer.experts.down_proj[turned])
    mixed = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(layer(x[mixed]).hidden, y[mixed], rtol=0, atol=EXACT)


def timelines(info):
    spans = []
    mesh = make_mesh(4, 2, 2)
    lanes = make_lanes(mesh.get_group("ep"), mesh.get_group("esp"), MoeConfig(timeout_s=20), on_span=spans.append)
    layer, x = make_layer(lanes, LayerPlan(2, 3)), tokens_of(info.rank, [6, 3, 5, 4]).requires_grad_()
    backward_of(layer(x).hidden)
    lanes.close()
    return [tuple(span) for span in spans]


def test_the_measured_timeline_has_every_operation_from_when_it_had_its_input():
    for spans in run_ranks(timelines, 4):
        ran = {op: (link, t0, t1) for link, _, op, t0, t1 in spans}
        assert {layer for _, layer, *_ in spans} == {"case"}
        for way, r in (("", 2), ("backward ", 3)):
            for c in range(r):
                steps = [ran[f"{way}{op} {c}"] for op in ("dispatch", "gather", "expert", "scatter", "combine")]
                assert [link for link, *_ in steps] == ["inter", "intra", "compute", "intra", "inter"]
                assert all(t0 <= t1 for _, t0, t1 in steps)
                assert all(a[2] <= b[1] for a, b in pairwise(steps)), (way, c, steps)
        assert len(spans) == len(ran) + 2 == 5 * 5 + 4  # and both exchanges of counts, and of sizes, of one name each


class Zero(nn.Module):
    """The expert that forgets its rows, and has nothing to train."""

    def forward(self, rows):
        return torch.zeros_like(rows)


@pytest.mark.parametrize("plan", [PLAIN, LayerPlan(3, 2), LayerPlan(1, 6)], ids=str)
def test_experts_that_ignore_their_rows_pass_no_gradient_to_them(plan):
    torch.manual_seed(1)
    gate = SoftmaxGate(WIDTH, EXPERTS, TOP_K).double()
    layer = MoELayer(gate, ModuleExperts(Zero() for _ in range(EXPERTS)), plan=plan)
    for tokens in (7, 1):  # of one token a chunk has all rows, and the others none
        x = tokens_of(0, [tokens]).requires_grad_()
        (layer(x).hidden.sum() + x.sum()).backward()
        assert torch.equal(x.grad, torch.ones_like(x))


class Added(nn.Module):
    """Two parameters whose gradient is one tensor, and one whose gradient is expanded from a number."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.a, self.b = (
            nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)) for _ in range(2)
        )
        self.c = nn.Parameter(torch.ones(WIDTH, dtype=torch.float64))

    def forward(self, rows):
        return torch.tanh(rows @ (self.a + self.b)) * self.c.sum()


def test_gradients_of_pieces_add_up_where_autograd_shares_one_tensor():
    found = []
    for plan in (PLAIN, LayerPlan(3, 2)):
        torch.manual_seed(1)
        gate = SoftmaxGate(WIDTH, EXPERTS, TOP_K).double()
        layer = MoELayer(gate, ModuleExperts(map(Added, range(EXPERTS))), plan=plan)
        backward_of(layer(tokens_of(0, [9])).hidden)
        found.append([p.grad for p in layer.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


class Bias(nn.Module):
    """The expert whose parameter, with one row, has the gradient of that row."""

    num_experts = 1

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(WIDTH, dtype=torch.float64))

    def forward(self, rows, counts):
        return rows + self.bias[None]


@pytest.mark.parametrize("plan", [PLAIN, LayerPlan(1, 6), LayerPlan(3, 6)], ids=str)
def test_gradients_of_rows_stay_what_they_are_where_a_parameter_has_the_same(plan):
    layer, x = MoELayer(SoftmaxGate(WIDTH, 1, 1).double(), Bias(), plan=plan), tokens_of(0, [6]).requires_grad_()
    backward_of(layer(x).hidden)
    plain = tokens_of(0, [6]).requires_grad_()
    backward_of(plain * 1.0)
    assert torch.allclose(x.grad, plain.grad, rtol=0, atol=EXACT)
    assert torch.allclose(layer.experts.bias.grad, plain.grad.sum(0), rtol=0, atol=EXACT)


class InPlace(Scaled):
    def forward(self, rows):
        return torch.sigmoid(rows @ self.w).mul_(2)  # the gradient of sigmoid needs what it returned


def test_experts_that_change_what_backward_needs_are_refused_as_by_autograd():
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        InPlace(0)(tokens_of(0, [4])).sum().backward()
    torch.manual_seed(1)
    layer = MoELayer(SoftmaxGate(WIDTH, EXPERTS, TOP_K).double(), ModuleExperts(map(InPlace, range(EXPERTS))))
    y = layer(tokens_of(0, [4])).hidden
    with pytest.raises(MoeError, match="the experts changed in place, in their forward, what their backward needs"):
        y.sum().backward()


def test_a_weight_that_was_changed_before_backward_is_refused():
    """As in plain autograd, whether the graph saved a view of the weight or the weight itself."""
    torch.manual_seed(1)
    gate = SoftmaxGate(WIDTH, EXPERTS, TOP_K).double()
    for experts in (make_layer().experts, ModuleExperts(nn.LayerNorm(WIDTH).double() for _ in range(EXPERTS))):
        y = MoELayer(gate, experts)(tokens_of(0, [4])).hidden
        with torch.no_grad():
            for param in experts.parameters():
                param += 1
        with pytest.raises((MoeError, RuntimeError), match=r"of the experts was changed in place|an inplace operation"):
            y.sum().backward()
