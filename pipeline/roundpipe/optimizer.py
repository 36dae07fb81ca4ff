"""Optimizer steps on the host, layer by layer, as gradients become complete: a thread beside the slots of a rank.

Every layer has an owner among the ranks, whose thread steps it: waits for the words of its gradients, adds those of a
tied weight (the head's first), steps, and publishes the next version. With clipping, or where the norm is asked for,
all gradients of the step have to be there before the first layer is stepped, on any rank.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.actions import Action, Op
from pipeline.errors import PipelineError
from pipeline.roundpipe.host_plan import HostParameter
from pipeline.roundpipe.host_store import HostStore
from pipeline.roundpipe.peers import Peers
from pipeline.roundpipe.versions import Versions
from pipeline.schedule import Schedule
from pipeline.tracing import Trace

MakeOptimizer = Callable[[Mapping[str, nn.Parameter]], Optimizer]
"""Of the parameters that a rank steps, by name; any of torch's optimizers. Not called where there are none."""
BeforeStep = Callable[[int, Tensor], None]
"""(step of the run, norm of the whole gradient): called on every rank before its layers are stepped."""


def sum_gradient(store: HostStore, p: HostParameter) -> Tensor:
    """Return the gradient of a parameter: of a tied one the sum of its layers', the last layer first. Once a step."""
    total = store.gradient(p.name, p.layers[-1])
    for layer in reversed(p.layers[:-1]):
        total.add_(store.gradient(p.name, layer))
    return total


def global_norm(store: HostStore, peers: Peers, gradients: Mapping[str, Tensor], *, count: int) -> Tensor:
    """Return the norm of the whole gradient, fp64, 0-d: the same bits on any number of ranks.

    Every rank calls, with those it owns, for the `count`-th time since the store was made.
    """
    words, plan, norms = store.words, store.plan, store.norms[count % 2]
    index = {name: i for i, name in enumerate(plan.parameters)}
    for name, grad in gradients.items():
        norms[index[name]] = torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
    words.publish(plan.words.normed(peers.rank), count)
    for rank in range(plan.ranks):
        peers.wait(
            plan.words.normed(rank),
            count,
            lambda rank=rank: f"rank {peers.rank}: waiting for the gradient norm of rank {rank}",
        )
    trained = [i for i, p in enumerate(plan.parameters.values()) if p.trained]
    return torch.linalg.vector_norm(norms[trained])


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """Return what gradients of that norm are multiplied by, at most 1."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def owned_parameters(store: HostStore, rank: int) -> dict[str, nn.Parameter]:
    """Return the trained parameters that a rank steps, by name; their memory is the store's."""
    return {p.name: nn.Parameter(store.weights(p.name)) for p in store.plan.owned(rank) if p.trained}


@dataclass(frozen=True, slots=True)
class _Home:
    """Parameters whose home is one layer."""

    layer: int
    needs: tuple[int, ...]
    """Layers whose gradients they wait for."""
    parameters: dict[str, nn.Parameter]


class HostOptimizer:
    """Steps the layers that a rank owns. `clip_norm` is of the whole gradient.

    `parameters` are those of `owned_parameters`, where the caller has made them already. `before_step` may set what the
    optimizer reads, as the learning rate; a run in which it raises ends with that error on every rank.
    """

    def __init__(
        self,
        store: HostStore,
        peers: Peers,
        make: MakeOptimizer,
        *,
        clip_norm: float | None,
        trace: Trace | None,
        parameters: Mapping[str, nn.Parameter] | None = None,
        before_step: BeforeStep | None = None,
    ) -> None:
        self._store, self._peers, self._clip_norm, self._trace = store, peers, clip_norm, trace
        self._before_step = before_step
        self._parameters = owned_parameters(store, peers.rank) if parameters is None else dict(parameters)
        self._optimizer = make(self._parameters) if self._parameters else None
        owned = [store.plan.parameters[name] for name in self._parameters]
        self._homes = []
        for home in sorted({p.home for p in owned}, reverse=True):
            mine = [p for p in owned if p.home == home]
            needs = tuple(sorted({layer for p in mine for layer in p.layers}, reverse=True))
            self._homes.append(_Home(home, needs, {p.name: self._parameters[p.name] for p in mine}))
        self._thread: threading.Thread | None = None
        self._first_step = 0

    def begin(self, schedule: Schedule, versions: Versions, *, norms: int, first_step: int) -> None:
        """Start stepping a run's layers. `norms` is how often the norm has been computed before; errors and the trace
        call the first of the steps `first_step`."""
        self._first_step = first_step
        self._thread = threading.Thread(
            target=self._serve, args=(schedule, versions, norms), name="roundpipe-optimizer", daemon=True
        )
        self._thread.start()

    def end(self) -> None:
        """Return when all steps are done; the weights are version 0 of the next run. Raises what went wrong."""
        assert self._thread is not None
        self._thread.join()  # its waits have deadlines
        if self._peers.failure is not None:
            raise self._peers.failure

    def state(self) -> dict[str, dict]:
        """Return the optimizer's state by parameter name."""
        return {name: self._optimizer.state[p] for name, p in self._parameters.items()} if self._optimizer else {}

    def _serve(self, schedule: Schedule, versions: Versions, norms: int) -> None:
        try:
            for step in range(schedule.steps):
                self._step(schedule, versions, step, norms + step + 1)
            for name, p in self._parameters.items():  # version 0 of the next run has the first buffer
                first = self._store.weights(name, 0)
                if p.data_ptr() != first.data_ptr():
                    first.copy_(p.detach())
                    p.data = first
        except BaseException as error:  # noqa: BLE001  (the rank's own thread raises it)
            self._peers.fail(error)

    def _step(self, schedule: Schedule, versions: Versions, step: int, count: int) -> None:
        factor, grads = None, {}
        whole = self._clip_norm is not None or self._before_step is not None
        if whole:
            grads = {name: g for home in self._homes for name, g in self._gradients(home, schedule, versions, step)}
            norm = global_norm(self._store, self._peers, grads, count=count)
            if self._before_step is not None:
                self._before_step(step, norm)
            factor = None if self._clip_norm is None else clip_factor(norm, self._clip_norm)
        for home in self._homes:
            if not whole:
                grads = dict(self._gradients(home, schedule, versions, step))
            if self._trace is None:
                self._update(home, grads, factor, step)
            else:
                with self._trace.timed(Action(Op.OPT, home.layer, version=step + 1), self._first_step + step):
                    self._update(home, grads, factor, step)
            versions.publish(home.layer, step + 1)

    def _gradients(self, home: _Home, schedule: Schedule, versions: Versions, step: int) -> list[tuple[str, Tensor]]:
        """Wait for the gradients of a home's parameters, and return them."""
        for layer in home.needs:
            word, value = versions.gradients(layer, step, schedule.rounds_of(step))
            self._peers.wait(
                word,
                value,
                lambda layer=layer: (
                    f"rank {self._peers.rank}, step {self._first_step + step}, OPT of layer {home.layer}: waiting for "
                    f"the gradients of layer {layer}, which {_makers(schedule, layer, step)} give"
                ),
            )
        return [(name, sum_gradient(self._store, self._store.plan.parameters[name])) for name in home.parameters]

    @torch.no_grad()
    def _update(self, home: _Home, grads: Mapping[str, Tensor], factor: Tensor | None, step: int) -> None:
        assert self._optimizer is not None
        for name, p in home.parameters.items():
            grad = grads[name]
            if factor is not None:
                grad.mul_(factor.to(grad.dtype))
            new = self._store.weights(name, step + 1)
            if new.data_ptr() != p.data_ptr():  # another version is still read
                new.copy_(p.detach())
                p.data = new
            p.grad = grad
        self._optimizer.step()  # of those that have a gradient
        for p in home.parameters.values():
            p.grad = None


def _makers(schedule: Schedule, layer: int, step: int) -> str:
    """Return the slots, with their ranks, that make a layer's gradients."""
    found = {
        (a.stage, a.device)
        for row in schedule.devices
        for a in row
        if a.op is Op.DOWNLOAD and schedule.step(a.microbatch or 0) == step and _holds(schedule, a, layer)
    }
    return ", ".join(f"slot {slot} on rank {device}" for slot, device in sorted(found)) or "no slot"


def _holds(schedule: Schedule, action: Action, layer: int) -> bool:
    lo, hi = schedule.layers(action)
    return lo <= layer < hi


def require_optimizer(optimizer: HostOptimizer | None, schedule: Schedule) -> bool:
    """Return whether a schedule steps the optimizer. Raises PipelineError where it does and there is none."""
    steps = any(a.op is Op.OPT for row in schedule.devices for a in row)
    if steps and optimizer is None:
        raise PipelineError(f"{schedule.name} steps the optimizer (OPT), and the worker was given none")
    return steps
