"""Our dispatch, experts and combine inside Megatron-core's `MoELayer`: `co_scheduled` puts them into a layer spec.

    GPTModel(config, co_scheduled(get_gpt_layer_local_spec(num_experts=8), plan=plan), ...)

Megatron's router, experts and shared experts stay as they are. The experts get weights of one and the weighted sum is
taken after combine, which is the same for experts without biases. Tensor parallelism inside experts is refused. Needs
the extra `megatron`. Megatron-core's layer asks for CUDA; on CPU this was tried with its CUDA calls replaced.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from moe.agree import agree, problem_of
from moe.config import MoeConfig
from moe.errors import MoeConfigError
from moe.flow import LayerRun
from moe.hooks import Hooks
from moe.lanes import Lanes, make_lanes
from moe.order import Ordered, SparseOrder
from moe.overlap import run_experts
from moe.plan import PLAIN, LayerPlan
from moe.records import Assignments
from moe.traffic import Traffic


def co_scheduled(spec: Any, **params: Any) -> Any:
    """Return a layer spec, or the submodules of a block, with `CoScheduledMoELayer` for each of Megatron's `MoELayer`.

    `params` are those of `CoScheduledMoELayer`. Megatron hands `pg_collection` to its own layer only, and says
    "Unknown MLP type" for ours: without one in `params` the groups are those of `initialize_model_parallel`.
    Raises MoeConfigError for a spec without such a layer.
    """
    changed: Any = copy.deepcopy(spec)
    layers = getattr(changed, "layer_specs", None) or [changed]
    found = {id(mlp): mlp for layer in layers if (mlp := _mlp(layer)) is not None and mlp.module is MoELayer}
    if not found:
        raise MoeConfigError("the spec has no MoELayer; make it with num_experts, as get_gpt_layer_local_spec takes it")
    for mlp in found.values():
        mlp.module, mlp.params = CoScheduledMoELayer, {**mlp.params, **params}
    return changed


def _mlp(layer: Any) -> ModuleSpec | None:
    mlp = getattr(getattr(layer, "submodules", None), "mlp", None)
    return mlp if isinstance(mlp, ModuleSpec) else None


class CoScheduledTokenDispatcher(MoETokenDispatcher):
    """Sorts tokens by expert and agrees on the counts; the rows themselves move while the experts compute."""

    def __init__(self, config: Any, pg_collection: Any, lanes: Lanes, plan: LayerPlan, name: str) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        if self.tp_size > 1:
            raise MoeConfigError(f"expert tensor parallelism is {self.tp_size}; the co-scheduled dispatcher needs 1")
        self.lanes, self.plan, self.name = lanes, plan, name
        self.traffic: Traffic | None = None
        self._ordered: Ordered | None = None
        self._shape = torch.Size()

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows `[R, H]`, expert by expert, for tokens `[S, B, H]` and maps `[T, E]`."""
        self._shape = tokens.shape
        token_A, expert_A = routing_map.nonzero(as_tuple=True)
        weights_A = probs[token_A, expert_A]
        problem = problem_of(Assignments(token_A, expert_A, weights_A, len(routing_map), routing_map.shape[1]))
        tokens_TD = tokens.reshape(-1, tokens.shape[-1])
        if self.config.moe_apply_probs_on_input:  # a token has one expert then, as Megatron's experts assert
            tokens_TD = (tokens_TD * probs.sum(1, keepdim=True)).to(tokens.dtype)
            weights_A = torch.ones_like(weights_A)
        routing = Assignments(token_A, expert_A, weights_A, len(routing_map), routing_map.shape[1])
        self._ordered = SparseOrder()(tokens_TD, routing)
        rows_RD, counts_E = self._ordered.rows_RD, self._ordered.counts_E
        width = rows_RD.shape[-1]
        self.traffic = agree(counts_E, width, rows_RD.dtype, problem, self.plan, self.lanes, self.name)
        return rows_RD, probs

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows as they are."""
        return hidden_states, probs

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Return the rows as they are."""
        return hidden_states

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Return the weighted sums `[S, B, H]`."""
        assert self._ordered is not None, "Megatron calls dispatch_preprocess first"
        output, self._ordered = self._ordered.inverse(hidden_states), None
        return output.view(self._shape)


class CoScheduledMoELayer(MoELayer):
    """Megatron-core's MoE layer with dispatch, experts and combine in the chunks of a plan."""

    def __init__(
        self,
        config: Any,
        submodules: Any = None,
        layer_number: int | None = None,
        pg_collection: Any = None,
        *,
        plan: LayerPlan = PLAIN,
        moe_config: MoeConfig | None = None,
        lanes: Lanes | None = None,
    ) -> None:
        """`lanes` shares the threads of another layer of the same ranks; without it the layer makes its own.

        Raises MoeConfigError for settings that need Megatron's own dispatcher.
        """
        if config.moe_shared_expert_overlap:
            raise MoeConfigError(
                "moe_shared_expert_overlap computes shared experts inside Megatron's dispatcher, which ours replaces, "
                "so they would be left out; set it to False"
            )
        super().__init__(config, submodules, layer_number, pg_collection)
        # The dispatcher that Megatron built knows the groups, also where pg_collection was left to its defaults.
        groups = _Groups(self.token_dispatcher)
        lanes = lanes or make_lanes(self.ep_group, None, moe_config or MoeConfig())
        name = f"layer {layer_number or 0}"
        self.token_dispatcher = CoScheduledTokenDispatcher(config, groups, lanes, plan, name)

    def set_layer_number(self, layer_number: int) -> None:
        """Take the number that a block gives its layers after making them; errors and spans name it."""
        super().set_layer_number(layer_number)
        dispatcher = self.token_dispatcher
        assert isinstance(dispatcher, CoScheduledTokenDispatcher)
        dispatcher.name = f"layer {layer_number}"

    def routed_experts_compute(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """Move, compute and move back the rows of all experts."""
        dispatcher = self.token_dispatcher
        assert isinstance(dispatcher, CoScheduledTokenDispatcher)
        assert dispatcher.traffic is not None, "Megatron calls dispatch_preprocess first"
        experts = _Experts(self.experts, self.num_local_experts)
        run = LayerRun(experts, dispatcher.traffic, dispatcher.plan, dispatcher.lanes, Hooks(), dispatcher.name)
        return run_experts(hidden_states, run), None


class _Groups:
    def __init__(self, dispatcher: Any) -> None:
        self.ep, self.expt_tp, self.tp_ep = dispatcher.ep_group, dispatcher.tp_group, dispatcher.tp_ep_group


class _Experts:
    """Megatron's experts as the executor calls them."""

    def __init__(self, module: Any, num_experts: int) -> None:
        self._module, self.num_experts = module, num_experts

    def parameters(self) -> Iterator[nn.Parameter]:
        return self._module.parameters()

    def __call__(self, rows_ND: Tensor, counts: list[int]) -> Tensor:
        ones_N = torch.ones(len(rows_ND), dtype=torch.float32, device=rows_ND.device)
        output_ND, bias = self._module(rows_ND, torch.tensor(counts), ones_N)
        if bias is not None:
            raise MoeConfigError("experts with a bias cannot be weighted after combine; set add_bias_linear=False")
        return output_ND
