"""A stage on its rank: contiguous layers, with what they keep between the forward and the backward of a micro-batch.

`GraphStage` has the shape of `StageModule`. What the layers are is the business of the function it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.deferred import WeightJob, deferring, run_weight_jobs
from pipeline.errors import PipelineError, ScheduleError
from pipeline.random_state import RandomState, replayed

Run = Callable[[Tensor | None, int], Tensor]
"""(input, micro-batch) -> output. The input is None on the first stage, the output a 0-d loss on the last."""


@dataclass(slots=True)
class _Live:
    """One micro-batch between its forward and its backward."""

    x: Tensor | None
    random: RandomState | None = None
    """As it was before a forward that kept nothing."""
    out: Tensor | None = None
    jobs: list[WeightJob] = field(default_factory=list)


class GraphStage:
    """Runs a stage's layers under autograd: kept or recomputed, backward whole or in two halves.

    `run` runs the layers. `input_grad` says whether anything before this stage is trained, `trained` whether this stage
    or anything before it is: a stage that is not never runs backward. `halves` prepares forwards for a backward in two
    halves (I and W); it costs nothing but a look at every call of `linear`.
    """

    def __init__(
        self,
        run: Run,
        *,
        input_grad: bool,
        trained: bool = True,
        halves: bool = False,
        device: torch.device | None = None,
        on_release: Callable[[int], None] | None = None,
    ) -> None:
        self._run, self._input_grad, self._trained, self._halves = run, input_grad, trained, halves
        self._device = device or torch.device("cpu")
        self._on_release = on_release
        self._live: dict[int, _Live] = {}

    @property
    def live(self) -> tuple[int, ...]:
        """Micro-batches between forward and backward."""
        return tuple(self._live)

    def forward(self, x: Tensor | None, *, mb: int, group: int | None, index: int, keep: bool) -> Tensor:
        """Run the layers on a micro-batch; with `keep`, their graph stays for `backward`, else only the input."""
        if not self._trained or not torch.is_grad_enabled():
            with torch.no_grad():
                return self._output(x, mb)
        if keep:
            return self._with_graph(mb, _Live(x)).detach()
        self._live[mb] = _Live(x, RandomState.now(self._device))
        before = None if x is None else x._version
        with torch.no_grad():
            out = self._output(x, mb)
        if x is not None and x._version != before:
            raise PipelineError(
                f"the stage changes its input in place (micro-batch {mb}), so it cannot run forward again from it: "
                "let its first layer return a new tensor"
            )
        return out

    def recompute(self, mb: int) -> None:
        """Run forward again from the saved input and random state."""
        live = self._live_one(mb, "R")
        if live.out is None:
            assert live.random is not None
            with replayed(live.random, self._device):
                self._with_graph(mb, _Live(live.x))

    def backward(self, mb: int, grad: Tensor | None) -> Tensor | None:
        """Run backward, recomputing what was not kept; return the gradient of the input, None where nobody needs it."""
        dx = self.backward_input(mb, grad)
        self.backward_weight(mb)
        return dx

    def backward_input(self, mb: int, grad: Tensor | None) -> Tensor | None:
        """Run the half of the backward that others wait for."""
        self.recompute(mb)
        live = self._live_one(mb, "I")
        out, live.out = live.out, None
        assert out is not None
        if grad is None and out.numel() != 1:
            raise PipelineError(
                f"the last stage gave {list(out.shape)} numbers for micro-batch {mb}; `run` has to return the loss, "
                "one number, there"
            )
        if out.requires_grad:
            torch.autograd.backward(out, grad)
        x, live.x = live.x, None
        if x is None or not self._input_grad:
            return None
        return torch.zeros_like(x) if x.grad is None else x.grad  # the stages before wait for it all the same

    def backward_weight(self, mb: int) -> None:
        """Run the half of the backward that only the optimizer waits for."""
        run_weight_jobs(self._live_one(mb, "W").jobs)
        del self._live[mb]

    def release(self, group: int) -> None:
        """Drop the state of a group of chunks."""
        if self._on_release is not None:
            self._on_release(group)

    def drop(self) -> None:
        """Forget all micro-batches, after an error."""
        self._live.clear()

    def _output(self, x: Tensor | None, mb: int) -> Tensor:
        out = self._run(x, mb)
        if not isinstance(out, Tensor):
            raise PipelineError(
                f"`run` of a stage gave {type(out).__name__} for micro-batch {mb}; it has to return one tensor, which "
                "the next stage takes, and the last stage the loss"
            )
        return out

    def _with_graph(self, mb: int, live: _Live) -> Tensor:
        if live.x is not None:
            live.x = live.x.detach().requires_grad_(self._input_grad)
        defer: AbstractContextManager[None] = deferring(live.jobs) if self._halves else nullcontext()
        with defer:
            live.out = self._output(live.x, mb)
        self._live[mb] = live
        return live.out

    def _live_one(self, mb: int, op: str) -> _Live:
        if mb not in self._live:
            raise ScheduleError(
                f"{op} of micro-batch {mb} without its forward; live on this stage are {sorted(self._live)}: validate "
                "the schedule before it runs"
            )
        return self._live[mb]
