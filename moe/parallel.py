"""Expert parallelism for transformers models, in place: Mixtral, Qwen3-MoE, DeepSeek-V3, OLMoE and what is built alike.

Only the module `experts` of each block is replaced. The router, with its top-k, normalisation and scaling, and experts
shared by all tokens stay the model's own, so outputs and the auxiliary loss are computed as before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from moe.alike import require_alike
from moe.config import MoeConfig
from moe.errors import MoeConfigError
from moe.experts import INNER, MarkedExperts, StackedExperts, slice_inner
from moe.issue import Span, own_group
from moe.kinds import ADAPTED, REPLACED, check_kind
from moe.lanes import Lanes, lanes_over
from moe.layer import ExpertRunner
from moe.order import SparseOrder
from moe.plan import PLAIN, LayerPlan
from moe.prints import print_of
from moe.records import top_k_assignments

_SAMPLED = 64
"""Elements of a weight, about, by which the models of two ranks are told apart."""


@dataclass(frozen=True)
class Placement:
    """Where the experts of a model are: which axes of the mesh, and how many experts a layer has in all."""

    mesh: DeviceMesh
    ep: str
    esp: str | None
    dp: str
    num_experts: int

    def __deepcopy__(self, memo: dict[int, Any]) -> Placement:
        """Return this: a copy of a model is in the same places."""
        return self

    @property
    def data_axes(self) -> tuple[str, ...]:
        """Axes whose ranks have different tokens: dense gradients are averaged over all of them."""
        return (self.dp, *self.expert_axes)

    @property
    def expert_axes(self) -> tuple[str, ...]:
        """Axes whose ranks hold different experts, or slices of them."""
        return (self.ep, *(() if self.esp is None else (self.esp,)))


class ParallelExperts(MarkedExperts, StackedExperts):
    """Stands in for `block.experts` of a transformers model: the same call, the same parameter names, fewer experts."""

    def __init__(
        self,
        gate_up_EID: Tensor,
        down_EDI: Tensor,
        act: Callable[[Tensor], Tensor],
        runner: ExpertRunner,
        placement: Placement,
        *,
        grouped: bool,
    ) -> None:
        super().__init__(gate_up_EID, down_EDI, act, grouped=grouped)
        self.runner, self.placement = runner, placement
        self.rows_per_expert_E: Tensor | None = None
        """int64: rows this rank sent to each expert in the last forward."""
        self.mark()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return `[T, D]` for tokens `[T, D]`, experts `[T, K]` and weights `[T, K]`. Every rank calls."""
        if not all(isinstance(getattr(self, stack), nn.Parameter) for stack in INNER):
            raise MoeConfigError(f"layer {self.runner.name}: {ADAPTED}")
        if not all(getattr(param, "is_expert", False) for param in self.parameters()):
            raise MoeConfigError(f"layer {self.runner.name}: {REPLACED}")
        stacks = self.stacks()
        with self.runner.telling(hidden_states, stacks):
            routing = top_k_assignments(top_k_index, top_k_weights, self.placement.num_experts)
        order = SparseOrder(stacks.gate_up_EID.dtype)
        output_TD, self.rows_per_expert_E = self.runner.run(hidden_states, routing, order, stacks)
        return output_TD


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    ep: str,
    esp: str | None = None,
    dp: str,
    plan: LayerPlan | Mapping[str, LayerPlan] | None = None,
    config: MoeConfig | None = None,
    on_span: Callable[[Span], None] | None = None,
) -> nn.Module:
    """Spread the experts of `model` over the `ep` axis of the mesh, and slices of each over `esp`; return the model.

    Every rank of the mesh calls with the whole model, the same weights on each. Axes: `ep`, `esp`, `dp` name dimensions
    of the mesh; all three have tokens of their own on each rank. `plan` is one for all layers, or one for each name of
    `expert_layers`; without it layers do not overlap. Expert parameters carry `is_expert = True`: what averages
    gradients, leaves them out over `ep` and `esp` (see `moe.sync`); DDP must be told to ignore them. `on_span` gets the
    measured timeline, for `moe.tracing.from_spans`.

    Raises MoeConfigError, on every rank, and leaves the model as it was, when it has no such experts, when experts do
    not divide, or when ranks were given other axes, models, plans or settings; ExchangeError when a rank is lost, or
    later than `config.timeout_s`.
    """
    config = config or MoeConfig()
    blocks = {name: module for name, module in model.named_modules() if _is_stacked(module)}
    plans, sizes, problem = {}, {}, None
    try:
        _check_axes(mesh, ep, esp, dp)
        sizes = _check(model, blocks, mesh, ep, esp)
        plans = _plans(plan, blocks)
    except MoeConfigError as error:
        problem = str(error)
    # Over all axes of the mesh: a rank that was given other axes would wait in another group than the others.
    axes = zip(mesh.mesh_dim_names or map(str, range(mesh.ndim)), mesh.get_all_groups(), strict=True)
    own = {axis: own_group(group, timeout_s=config.timeout_s) for axis, group in axes if group.size() > 1}
    said = {"axes": f"ep={ep}, esp={esp}, dp={dp}"}
    facts = {} if problem else _facts(blocks, plans, config) | _weights(model)
    require_alike(problem, said | facts, list(own.values()))
    beside = {axis: group for axis, group in own.items() if axis not in (ep, esp)}
    lanes = lanes_over(own.get(ep), own.get(esp or ""), config, on_span=on_span, beside=beside)
    for name, module in blocks.items():
        placement = Placement(mesh, ep, esp, dp, sizes[name])
        runner = ExpertRunner(lanes, plan=plans[name], name=name)
        runner.agreed_experts = sizes[name] // lanes.num_ranks
        model.set_submodule(name, _spread(module, lanes, runner, placement, config))
    return model


def expert_layers(model: nn.Module) -> dict[str, ParallelExperts]:
    """Return the expert-parallel layers of a model by name, in order; `layer.runner.plan` may be set, on all ranks."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ParallelExperts)}


def _is_stacked(module: nn.Module) -> bool:
    """Whether this is a module of stacked gated experts as transformers 5 has them."""
    weights = (getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None))
    return all(isinstance(w, Tensor) and w.dim() == 3 for w in weights) and not isinstance(module, StackedExperts)


def _check_axes(mesh: DeviceMesh, ep: str, esp: str | None, dp: str) -> None:
    names, axes = mesh.mesh_dim_names or (), [ep, *([] if esp is None else [esp]), dp]
    for axis in axes:
        if axis not in names:
            have = ", ".join(names) or "without names"
            raise MoeConfigError(f"the mesh has the axes {have}, but no {axis!r}; one that spreads nothing has size 1")
    if len(set(axes)) < len(axes):
        raise MoeConfigError(f"ep, esp and dp are the axes {', '.join(axes)}; each must be an axis of its own")


def _facts(blocks: Mapping[str, nn.Module], plans: Mapping[str, LayerPlan], config: MoeConfig) -> dict[str, str]:
    """Return what every rank must have alike."""
    facts = {"settings": str(config)}
    for name, module in blocks.items():
        weights = [module.get_parameter(stack) for stack in INNER]
        facts[f"experts of {name}"] = " and ".join(map(_describe, weights))
        facts[f"plan of {name}"] = str(plans[name].schedule)
    return {"layers": ", ".join(blocks), **facts}


def _weights(model: nn.Module) -> dict[str, str]:
    """Return prints of some elements of every weight: other weights show in any, and reading all is slow."""
    whole = {name: p for name, p in model.named_parameters() if not (p.is_meta or isinstance(p, DTensor))}
    some = {name: p.detach().flatten()[:: max(1, p.numel() // _SAMPLED)] for name, p in whole.items()}
    return {f"the weights of {name}": print_of(value) for name, value in some.items()}


def _describe(weight: nn.Parameter) -> str:
    # A frozen one has another backward pass, in which another rank would wait for this one.
    return f"{list(weight.shape)} of {weight.dtype}{'' if weight.requires_grad else ', frozen'}"


def _check(
    model: nn.Module, blocks: Mapping[str, nn.Module], mesh: DeviceMesh, ep: str, esp: str | None
) -> dict[str, int]:
    """Return the number of experts of each layer."""
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise MoeConfigError(
            "the model is inside DDP, which holds on to the weights that are replaced and averages experts over ranks "
            "that hold others; give the model itself, and average with moe.sync.average_gradients"
        )
    if expert_layers(model):
        raise MoeConfigError("this model is expert-parallel already; parallelize is called once")
    if not blocks:
        raise MoeConfigError(
            f"{type(model).__name__} has no stacked experts (gate_up_proj, down_proj); parallelize takes the Mixtral, "
            "Qwen3-MoE, DeepSeek-V3 and OLMoE models of transformers 5. To make one from a dense model: moe.upcycle"
        )
    _check_untied(model, blocks)
    ranks, members = mesh[ep].size(), 1 if esp is None else mesh[esp].size()
    return {name: _check_block(name, module, ranks, members) for name, module in blocks.items()}


def _check_untied(model: nn.Module, blocks: Mapping[str, nn.Module]) -> None:
    owners: dict[int, str] = {}
    wanted = {id(module) for module in blocks.values()}
    for name, module in model.named_modules(remove_duplicate=False):
        for weight in (module.get_parameter(stack) for stack in INNER if id(module) in wanted):
            if (owner := owners.setdefault(id(weight), name)) != name:
                raise MoeConfigError(f"{name} and {owner} share their weights; tied experts are not supported")


def _check_block(name: str, module: nn.Module, ranks: int, members: int) -> int:
    check_kind(name, module)
    num_experts, _, inner = module.get_parameter("down_proj").shape
    if num_experts % ranks:
        raise MoeConfigError(
            f"{name}: {num_experts} experts do not split over {ranks} ranks; choose an ep axis that divides them"
        )
    if inner % members:
        raise MoeConfigError(
            f"{name}: an inner width of {inner} does not split over {members} ranks; choose an esp axis that divides it"
        )
    return num_experts


def _plans(
    plan: LayerPlan | Mapping[str, LayerPlan] | None, blocks: Mapping[str, nn.Module]
) -> Mapping[str, LayerPlan]:
    """Return the plan of each layer."""
    if plan is None or isinstance(plan, LayerPlan):
        return dict.fromkeys(blocks, plan or PLAIN)
    if not isinstance(plan, Mapping) or not all(isinstance(one, LayerPlan) for one in plan.values()):
        raise MoeConfigError(
            f"plan is {plan!r}; give a LayerPlan, LayerPlan.from_json(text) of a file, or one for each name of layers"
        )
    unknown = sorted(set(plan) - set(blocks))
    if unknown:
        raise MoeConfigError(f"there are plans for {', '.join(unknown)}, but the layers are {', '.join(blocks)}")
    return {name: plan.get(name, PLAIN) for name in blocks}


def _spread(
    module: nn.Module, lanes: Lanes, runner: ExpertRunner, placement: Placement, config: MoeConfig
) -> ParallelExperts:
    each = placement.num_experts // lanes.num_ranks
    own = slice(lanes.position * each, (lanes.position + 1) * each)
    whole = [module.get_parameter(name) for name in INNER]
    with torch.no_grad():
        pairs = zip(INNER, whole, strict=True)
        gate_up, down = (slice_inner(name, w[own], lanes.member, lanes.num_members) for name, w in pairs)
    act: Any = module.act_fn  # a module, or a function
    spread = ParallelExperts(gate_up, down, act, runner, placement, grouped=config.grouped_mm)
    for new, old in zip((spread.gate_up_proj, spread.down_proj), whole, strict=True):
        new.requires_grad_(old.requires_grad)
    return spread.train(module.training)
