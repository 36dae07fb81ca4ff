"""The layer: gate, order, dispatch, experts, combine, inverse order, with the six hooks between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from moe.agree import Problem, agree, agree_on_experts, misfit_of, problem_of
from moe.errors import ContractError, MoeError
from moe.experts import MarkedExperts
from moe.flow import Experts, LayerRun, Pass
from moe.hooks import Hooks
from moe.lanes import ALONE, Lanes
from moe.order import Order, SparseOrder
from moe.overlap import run_experts
from moe.plan import PLAIN, LayerPlan
from moe.precision import narrowed
from moe.records import MoeOutput, Routing

Drain = Callable[[str, LayerPlan], int]


F = TypeVar("F", bound=Callable[..., Any])


def _uncompiled(function: F) -> F:
    """Keep exchanges, threads and a graph of their own out of torch.compile; a model compiles around them."""
    return cast(F, torch.compiler.disable(function))


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
        self.agreed_experts: int | None = None
        """Experts of every rank, where the ranks know that they have as many."""

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertRunner:
        """Copy for the copy of a model, an average of its weights say: over the same lanes, and without a drain."""
        made = ExpertRunner(self.lanes, plan=self.plan, hooks=deepcopy(self.hooks, memo), name=self.name)
        made.agreed_experts = self.agreed_experts
        return made

    @_uncompiled
    def run(self, x_TD: Tensor, routing: Routing, order: Order, experts: Experts) -> tuple[Tensor, Tensor]:
        """Return the output `[T, D]` and the rows this rank sent to each expert, `[E]`. Every rank calls.

        Raises ContractError, on every rank, where a rank's gate or order breaks its contract; PlanError where plans
        differ; ExchangeError where a rank is lost.
        """
        num_experts = experts.num_experts * self.lanes.num_ranks
        with self.telling(x_TD, experts):
            problem = problem_of(routing) or misfit_of(routing, len(x_TD), num_experts)
        if problem:
            self.tell(problem, x_TD, experts)  # rows of nonsense may not be built
        self._agree_on_experts(experts)
        with self.telling(x_TD, experts):
            ordered = order(x_TD, routing)
            rows_RD, counts_E = narrowed(ordered.rows_RD), ordered.counts_E  # before they travel
            fits = _fits(rows_RD, counts_E, num_experts)
        if not fits:
            problem, counts_E = Problem.TOKENS, torch.zeros(num_experts, dtype=torch.int64)
        traffic = agree(counts_E, rows_RD.shape[-1], rows_RD.dtype, problem, self.plan, self.lanes, self.name)
        run = LayerRun(experts, traffic, self.plan, self.lanes, self.hooks, self.name, self.drain, self.on_pass)
        return ordered.inverse(run_experts(rows_RD, run)), counts_E

    @contextmanager
    def telling(self, x: Tensor, experts: Experts) -> Iterator[None]:
        """Let the other ranks raise ContractError where something inside raises: they would wait for this rank."""
        try:
            yield
        except Exception:
            with suppress(MoeError):
                self.tell(Problem.RAISED, x, experts)
            raise

    def tell(self, problem: Problem, x: Tensor, experts: Experts) -> None:
        """Raise ContractError here and on the other ranks, which are about to exchange their counts."""
        self._agree_on_experts(experts)
        counts_E = torch.zeros(experts.num_experts * self.lanes.num_ranks, dtype=torch.int64)
        agree(counts_E, x.shape[-1], x.dtype, problem, self.plan, self.lanes, self.name)

    def _agree_on_experts(self, experts: Experts) -> None:
        if self.agreed_experts != experts.num_experts:
            agree_on_experts(experts.num_experts, self.lanes, self.name)
            self.agreed_experts = experts.num_experts


def _fits(rows_RD: Tensor, counts_E: Tensor, num_experts: int) -> bool:
    """Whether these can be the rows of so many experts."""
    if rows_RD.dim() != 2 or counts_E.shape != (num_experts,) or counts_E.is_floating_point():
        return False
    counts = counts_E.cpu().numpy()  # as the exchange of counts takes them
    return counts.sum() == len(rows_RD) and bool((counts >= 0).all())


class MoELayer(MarkedExperts):
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
        self.mark()

    def forward(self, x: Tensor) -> MoeOutput:
        """Run `[..., D]` through the experts. Every rank of the lanes calls, also one whose x has no tokens."""
        hooks = self.runner.hooks
        x = hooks.before_moe_start(x)
        experts = cast(Experts, self.experts)
        with self.runner.telling(x, experts):
            routing: Routing = self.gate(x)
        y_TD, counts_E = self.runner.run(x.reshape(-1, x.shape[-1]), routing, self.order, experts)
        return MoeOutput(hooks.before_moe_end(y_TD.view_as(x)), routing.aux_loss, counts_E)
