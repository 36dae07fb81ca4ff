"""One small layer in fp64, its weights the same everywhere, against the loop of `moe.reference`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moe.config import MoeConfig
from moe.experts import StackedExperts, slice_inner
from moe.gates import SoftmaxGate
from moe.lanes import ALONE, Lanes, make_lanes
from moe.layer import MoELayer
from moe.plan import PLAIN, LayerPlan
from moe.reference import reference_experts, reference_moe

EXPERTS, WIDTH, INNER, TOP_K = 4, 6, 8, 2


def stacks(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    gate_up = torch.randn(EXPERTS, 2 * INNER, WIDTH, generator=generator, dtype=torch.float64)
    down = torch.randn(EXPERTS, WIDTH, INNER, generator=generator, dtype=torch.float64)
    return gate_up.to(dtype), down.to(dtype)


def make_gate(kind: str = "softmax") -> nn.Module:
    torch.manual_seed(3)
    gate = SoftmaxGate(WIDTH, EXPERTS, TOP_K).double()
    if kind == "one expert":  # every token to experts 0 and 1, by a bias that no token overcomes
        gate.weight = nn.Parameter(gate.weight.detach() * 1e-3)
        gate.logits_bias = torch.tensor([9.0, 5.0, 0.0, 0.0], dtype=torch.float64)
        plain = gate.logits
        gate.logits = lambda x: plain(x) + gate.logits_bias
    return gate


def tokens_of(rank: int, counts: list[int]) -> Tensor:
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(counts[rank], WIDTH, generator=generator, dtype=torch.float64)


def make_mesh(world_size: int, ep: int, esp: int) -> DeviceMesh:
    shape = (1, world_size // (ep * esp), ep, esp)
    return init_device_mesh("cpu", shape, mesh_dim_names=("pp", "dp", "ep", "esp"))


def lanes_of(mesh: DeviceMesh, **config: object) -> Lanes:
    return make_lanes(mesh.get_group("ep"), mesh.get_group("esp"), MoeConfig(**{"timeout_s": 20.0, **config}))


def sliced(gate_up: Tensor, down: Tensor, lanes: Lanes) -> list[Tensor]:
    pairs = (("gate_up_proj", gate_up), ("down_proj", down))
    return [slice_inner(name, stack, lanes.member, lanes.num_members) for name, stack in pairs]


def make_layer(lanes: Lanes = ALONE, plan: LayerPlan = PLAIN, gate: str = "softmax", **changes: object) -> MoELayer:
    gate_up, down = sliced(*stacks(), lanes)
    each = EXPERTS // lanes.num_ranks
    own = slice(lanes.position * each, (lanes.position + 1) * each)
    experts = StackedExperts(gate_up[own], down[own])
    return MoELayer(make_gate(gate), experts, lanes=lanes, plan=plan, name="case", **changes)


def backward_of(y: Tensor) -> None:
    """A loss whose gradient differs in every element."""
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)
    (y * y * weights).sum().backward()


def reference(ranks: list[int], counts: list[int], gate: str = "softmax") -> dict[int, dict[str, Tensor]]:
    """Outputs and gradients of tokens and gate of each rank; those of the experts summed over `ranks`, under -1."""
    gate_up, down = (stack.requires_grad_() for stack in stacks())
    found = {}
    for rank in ranks:
        module, x = make_gate(gate), tokens_of(rank, counts).requires_grad_()
        y = reference_moe(x, module(x), reference_experts(gate_up, down))
        backward_of(y)
        found[rank] = {"y": y.detach(), "x": _grad(x), "gate": _grad(module.weight)}
    found[-1] = {"gate_up": _grad(gate_up), "down": _grad(down)}
    return found


def _grad(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def errors_of(layer: MoELayer, x: Tensor, y: Tensor, expected: dict[int, dict[str, Tensor]], rank: int) -> float:
    """Return the largest difference from the reference, in outputs and all gradients."""
    lanes = layer.runner.lanes
    whole = sliced(expected[-1]["gate_up"], expected[-1]["down"], lanes)
    each = EXPERTS // lanes.num_ranks
    own = slice(lanes.position * each, (lanes.position + 1) * each)
    pairs = [
        (y, expected[rank]["y"]),
        (x.grad, expected[rank]["x"]),
        (layer.gate.weight.grad, expected[rank]["gate"]),
        (layer.experts.gate_up_proj.grad, whole[0][own]),
        (layer.experts.down_proj.grad, whole[1][own]),
    ]
    return max(float((a - b).detach().abs().max()) if a.numel() else 0.0 for a, b in pairs)
