"""The pair cost measured while training, and the chunks dealt to the ranks by it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from chunkflow.errors import ChunkflowError
from chunkflow.fit import CostFit, CostModel
from chunkflow.loader import ChunkLoader
from chunkflow.runner import ChunkRunner
from chunkflow.world import resolve_group

CHANGE = 1.1
"""A pair cost that moved by less than this factor is kept: the plans would be the same."""


class OnlineBalance:
    """Fits the cost model to the chunks that a runner trains and tells the loader; made and called on every rank.

    Call `step()` after each optimizer step. Every `every` steps the ranks add up their measurements (32 numbers), and
    all plan by the model that the first of them finds; `report` is given it on rank 0, with its residual.
    """

    def __init__(
        self,
        loader: ChunkLoader,
        runner: ChunkRunner,
        *,
        group: dist.ProcessGroup | str | None = None,
        every: int = 20,
        report: Callable[[str], None] = print,
    ) -> None:
        if every < 1:
            raise ChunkflowError(f"every is {every}; it must be at least 1 step")
        self._loader, self._group, self._every, self._report = loader, resolve_group(group), every, report
        self._device = runner.device
        self._fit = CostFit()
        self._steps = 0
        self.model: CostModel | None = None
        """The last model found."""
        runner.on_operation = self._fit.add

    def step(self) -> None:
        """Count one step; every `every` of them, fit and rebalance. Every rank calls."""
        self._steps += 1
        if self._steps % self._every:
            return
        sums = torch.from_numpy(self._fit.sums).to(self._device)
        if self._group is not None:
            dist.all_reduce(sums, group=self._group)
        try:
            self.model = self._fit.solve(sums.cpu().numpy())
        except ChunkflowError:
            return  # too few ops yet, on all ranks together; more come
        now, found = self._loader.balance.pair_cost, self._of_first_rank(self.model.pair_cost)
        if self._loader.rank == 0:
            self._report(f"{self.model} (plans use {now:.3g})")
        if max(now, 1e-12) * CHANGE < found or found * CHANGE < now:
            self._loader.rebalance(found)

    def _of_first_rank(self, pair_cost: float) -> float:
        """Return the first rank's: another processor's least squares may differ in the last bit, and so its plans."""
        if self._group is None:
            return pair_cost
        told = torch.tensor([pair_cost], dtype=torch.float64, device=self._device)
        dist.broadcast(told, group_src=0, group=self._group)
        return float(told)
