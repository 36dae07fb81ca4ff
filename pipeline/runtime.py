"""The runtime of weight-bound schedules: a dull loop over `schedule.of(rank)`.

Micro-batches may have any shape and number, and change every step; the schedule may be another one every step. The
loop decides nothing: what is not in the schedule does not happen, and what the schedule forgot is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Protocol, runtime_checkable

from torch import Tensor

from pipeline.actions import Action, Op, Phase
from pipeline.errors import ScheduleError, WatchdogError
from pipeline.schedule import Schedule
from pipeline.tracing import Trace
from pipeline.transport.base import Message, Transport
from pipeline.units import StageModule, Unit


@runtime_checkable
class HalvedStage(Protocol):
    """A stage that can recompute ahead, and run its backward in two halves, as zero-bubble schedules do."""

    def recompute(self, mb: int) -> None:
        """Run forward again, ahead of the backward."""
        ...

    def backward_input(self, mb: int, grad: Tensor | None) -> Tensor | None:
        """Return the gradient of the input."""
        ...

    def backward_weight(self, mb: int) -> None:
        """Compute the gradients of the weights that are still due."""
        ...


class PipelineRuntime:
    """Runs one rank's part of schedules. `stages` are the stages this rank holds, by number.

    Made on every rank of the pipeline, with a transport between them; `rank` is the place in the pipeline.
    `timeout_s` is how long an action may wait for another rank.
    """

    def __init__(
        self,
        stages: Mapping[int, StageModule],
        transport: Transport,
        *,
        rank: int,
        timeout_s: float = 600.0,
        trace: Trace | None = None,
    ) -> None:
        self._stages, self._transport = dict(stages), transport
        self._rank, self._timeout_s, self._trace = rank, timeout_s, trace

    def run(self, schedule: Schedule, *, step: int) -> dict[int, Tensor]:
        """Run one step; return the last stage's outputs by micro-batch, on the rank that holds it. Every rank calls.

        Raises WatchdogError naming rank, step, action and peer when a peer is gone, gave up, or is later than the
        timeout, and ScheduleError for a schedule that is not for these stages. Peers are told before anything is
        raised, so that they do not wait for the deadline.
        """
        run = _StepRun(self, schedule, step)
        try:
            return run.all()
        except Exception as error:
            self._transport.abort(str(error) or type(error).__name__)
            raise

    def close(self) -> None:
        """End the transport."""
        self._transport.close()


class _StepRun:
    """The loop of one step, and the tensors between its actions."""

    def __init__(self, runtime: PipelineRuntime, schedule: Schedule, step: int) -> None:
        self._stages, self._transport = runtime._stages, runtime._transport
        self._rank, self._timeout_s, self._trace = runtime._rank, runtime._timeout_s, runtime._trace
        self._schedule, self._step = schedule, step
        self._recomputed = schedule.recomputed()
        self._inputs: dict[Message, Tensor] = {}
        self._outbox: dict[Message, Tensor] = {}
        self._outputs: dict[int, Tensor] = {}
        self._handlers: dict[Op, Callable[[Action, int], None]] = {
            Op.F: self._forward, Op.B: self._backward, Op.R: self._recompute, Op.I: self._input_half,
            Op.W: self._weight_half, Op.SEND: self._send, Op.RECV: self._receive, Op.FREE: self._free,
        }  # fmt: skip

    def all(self) -> dict[int, Tensor]:
        actions = self._schedule.of(self._rank)
        self._check(actions)
        self._transport.begin(Counter(_peer(a) for a in actions if a.op is Op.RECV))
        for action in actions:
            timed = nullcontext() if self._trace is None else self._trace.timed(action, self._step)
            try:
                with timed:
                    self._handlers[action.op](action, action.microbatch or 0)
            except WatchdogError as error:
                raise WatchdogError(f"rank {self._rank}, step {self._step}, action {action.label}: {error}") from error
        try:
            self._transport.end(self._timeout_s)
        except WatchdogError as error:
            raise WatchdogError(f"rank {self._rank}, end of step {self._step}: {error}") from error
        if self._inputs or self._outbox:
            raise self._mistake(f"it leaves tensors that no action takes: {[*self._inputs, *self._outbox][:3]}")
        return self._outputs

    def _check(self, actions: tuple[Action, ...]) -> None:
        wrong = [a for a in actions if a.op not in self._handlers or a.stage not in self._stages]
        if wrong:
            raise self._mistake(
                f"{wrong[0].label} cannot run on rank {self._rank}, which holds stages {sorted(self._stages)} and runs "
                f"{', '.join(op.value for op in self._handlers)}"
            )

    def _forward(self, action: Action, mb: int) -> None:
        unit = self._unit(mb)
        keep = (action.stage, mb) not in self._recomputed
        x = None if action.stage == 0 else self._take(Phase.F, action)
        group, index = (None, 0) if unit is None else (unit.group, unit.index)
        out = self._stages[action.stage].forward(x, mb=mb, group=group, index=index, keep=keep)  # type: ignore[arg-type]
        if action.stage == self._schedule.num_stages - 1:
            self._outputs[mb] = out.detach()
        else:
            self._hand_over(Phase.F, action.stage + 1, mb, out)

    def _backward(self, action: Action, mb: int) -> None:
        self._pass_back(action, mb, self._stages[action.stage].backward(mb, self._output_grad(action)))

    def _recompute(self, action: Action, mb: int) -> None:
        stage = self._stages[action.stage]
        if isinstance(stage, HalvedStage):
            stage.recompute(mb)  # another stage does so in its backward

    def _input_half(self, action: Action, mb: int) -> None:
        self._pass_back(action, mb, self._halved(action).backward_input(mb, self._output_grad(action)))

    def _weight_half(self, action: Action, mb: int) -> None:
        self._halved(action).backward_weight(mb)

    def _send(self, action: Action, mb: int) -> None:
        phase = action.phase or Phase.F
        message = Message(self._step, phase, action.stage + (1 if phase is Phase.F else -1), mb)
        if message not in self._outbox:
            raise self._mistake(f"{action.label} sends the {message}, which is not computed yet, or sent already")
        self._transport.send(message, self._outbox.pop(message), peer=_peer(action))

    def _receive(self, action: Action, mb: int) -> None:
        message = Message(self._step, action.phase or Phase.F, action.stage, mb)
        self._inputs[message] = self._transport.receive(message, peer=_peer(action), timeout_s=self._timeout_s)

    def _free(self, action: Action, mb: int) -> None:
        unit = None if action.microbatch is None else self._unit(mb)
        if unit is not None and unit.group is not None:
            self._stages[action.stage].release(unit.group)

    def _pass_back(self, action: Action, mb: int, grad: Tensor | None) -> None:
        if grad is not None and action.stage > 0:
            self._hand_over(Phase.B, action.stage - 1, mb, grad)

    def _hand_over(self, phase: Phase, stage: int, mb: int, tensor: Tensor) -> None:
        """To a stage of this rank directly, to another through a SEND."""
        box = self._inputs if stage in self._stages else self._outbox
        box[Message(self._step, phase, stage, mb)] = tensor

    def _output_grad(self, action: Action) -> Tensor | None:
        return None if action.stage == self._schedule.num_stages - 1 else self._take(Phase.B, action)

    def _take(self, phase: Phase, action: Action) -> Tensor:
        message = Message(self._step, phase, action.stage, action.microbatch or 0)
        if message not in self._inputs:
            raise self._mistake(f"{action.label} needs the {message}, which has not been received or computed")
        return self._inputs.pop(message)

    def _halved(self, action: Action) -> HalvedStage:
        stage = self._stages[action.stage]
        if not isinstance(stage, HalvedStage):
            raise self._mistake(f"{action.label} needs a stage that runs its backward in halves, such as GraphStage")
        return stage

    def _unit(self, mb: int) -> Unit | None:
        return None if self._schedule.units is None else self._schedule.units[mb]

    def _mistake(self, text: str) -> ScheduleError:
        return ScheduleError(f"schedule {self._schedule.name} cannot run on rank {self._rank}: {text}; validate it")


def _peer(action: Action) -> int:
    if action.peer is None:
        raise ScheduleError(f"{action.label} names no peer; complete the schedule with its communication first")
    return action.peer
