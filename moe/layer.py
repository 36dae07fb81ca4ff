"""The layer: gate, order, dispatch, experts, combine, inverse order, with the six hooks between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from moe.agree import Problem, agree, problem_of
from moe.errors import ContractError
from moe.flow import Experts, LayerRun, Pass
from moe.hooks import Hooks
from moe.lanes import ALONE, Lanes
from moe.order import Order, SparseOrder
from moe.overlap import run_experts
from moe.plan import PLAIN, LayerPlan
from moe.precision import narrowed
from moe.records import MoeOutput, Routing

Drain = Callable[[str, LayerPlan], int]


class ExpertRunner:
    """What a layer needs beside its parameters to run its experts; the same on every rank but for the lanes.

    `plan`, `hooks` and `drain` may be replaced between steps, on all ranks alike; `on_pass` at any time.
    """

    def __init__(
        self, lanes: Lanes = ALONE, *, plan: LayerPlan = PLAIN, hooks: Hooks | None = None, name: str = ""
    ) -> None:
        self.lanes, self.plan, self.hooks, self.name = lanes, plan, hooks or Hooks(), name
        self.drain: Drain | None = None
        self.on_pass: Callable[[Pass], None] | None = None

    def run(self, x_TD: Tensor, routing: Routing, order: Order, experts: Experts) -> tuple[Tensor, Tensor]:
        """Return the output `[T, D]` and the rows this rank sent to each expert, `[E]`. Every rank calls.

        Raises ContractError, on every rank, where a rank's gate or order breaks its contract; PlanError where plans
        differ; ExchangeError where a rank is lost.
        """
        problem, num_experts = problem_of(routing), experts.num_experts * self.lanes.num_ranks
        if problem:
            # Rows of nonsense may not be built: tell the others, who raise what this rank raises.
            counts_E = torch.zeros(num_experts, dtype=torch.int64)
            agree(counts_E, x_TD.shape[-1], x_TD.dtype, problem, self.plan, self.lanes, self.name)
        ordered = order(x_TD, routing)
        rows_RD, counts_E = narrowed(ordered.rows_RD), ordered.counts_E  # before they travel
        fits = len(counts_E) == num_experts
        if not fits or int(counts_E.sum()) != len(rows_RD):
            problem = Problem.TOKENS if fits else Problem.EXPERTS
            counts_E = torch.zeros(num_experts, dtype=torch.int64)
        traffic = agree(counts_E, rows_RD.shape[-1], rows_RD.dtype, problem, self.plan, self.lanes, self.name)
        run = LayerRun(experts, traffic, self.plan, self.lanes, self.hooks, self.name, self.drain, self.on_pass)
        return ordered.inverse(run_experts(rows_RD, run)), counts_E


class MoELayer(nn.Module):
    """A mixture of experts, each sub-module of which can be replaced.

        layer = MoELayer(SoftmaxGate(D, E, 2), StackedExperts(...), lanes=lanes, plan=plan)
        hidden, aux_loss, rows_per_expert = layer(x)          # x [..., D]

    Experts shared by all tokens stay outside: add their output to `hidden`.
    """

    def __init__(
        self,
        gate: nn.Module,
        experts: nn.Module,
        *,
        order: Order | None = None,
        lanes: Lanes = ALONE,
        plan: LayerPlan = PLAIN,
        hooks: Hooks | None = None,
        name: str = "",
    ) -> None:
        super().__init__()
        if not isinstance(getattr(experts, "num_experts", None), int):
            raise ContractError(
                f"{type(experts).__name__} has no int `num_experts`, how many are on this rank; put modules of your "
                "own into moe.experts.ModuleExperts"
            )
        self.gate, self.experts = gate, experts
        self.order = order or SparseOrder()
        self.runner = ExpertRunner(lanes, plan=plan, hooks=hooks, name=name)
        for param in experts.parameters():
            param.is_expert = True  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: Tensor) -> MoeOutput:
        """Run `[..., D]` through the experts. Every rank of the lanes calls, also one whose x has no tokens."""
        hooks = self.runner.hooks
        x = hooks.before_moe_start(x)
        routing: Routing = self.gate(x)
        y_TD, counts_E = self.runner.run(x.reshape(-1, x.shape[-1]), routing, self.order, cast(Experts, self.experts))
        return MoeOutput(hooks.before_moe_end(y_TD.view_as(x)), routing.aux_loss, counts_E)
