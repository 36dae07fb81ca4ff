"""Optimizer steps on the host, layer by layer, as gradients become complete: a thread beside the slots of a rank.

Every layer has an owner among the ranks, whose thread steps it: waits for the words of its gradients, adds those of a
tied weight (the head's first), steps, and publishes the next version. With clipping, all gradients of the step have to
be there before the first layer is stepped, on any rank.
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
from pipeline.roundpipe.peers import LOOK_S, Peers
from pipeline.roundpipe.versions import Versions
from pipeline.schedule import Schedule
from pipeline.tracing import Trace

MakeOptimizer = Callable[[Mapping[str, nn.Parameter]], Optimizer]
"""Of the parameters of one layer, by name; any of torch's optimizers."""


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
    words, plan = store.words, store.plan
    index = {name: i for i, name in enumerate(plan.parameters)}
    for name, grad in gradients.items():
        store.norms[index[name]] = torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
    words.publish(plan.words.normed(peers.rank), count)
    for rank in range(plan.ranks):
        peers.wait(
            plan.words.normed(rank),
            count,
            lambda rank=rank: f"rank {peers.rank}: waiting for the gradient norm of rank {rank}",
        )
    trained = [i for i, p in enumerate(plan.parameters.values()) if p.trained]
    return torch.linalg.vector_norm(store.norms[trained])


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """Return what gradients of that norm are multiplied by, at most 1."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


@dataclass(frozen=True, slots=True)
class _Home:
    """Parameters whose home is one layer, with the optimizer that steps them."""

    layer: int
    needs: tuple[int, ...]
    """Layers whose gradients they wait for."""
    parameters: dict[str, nn.Parameter]
    optimizer: Optimizer


class HostOptimizer:
    """Steps the layers that a rank owns. `clip_norm` is of the whole gradient."""

    def __init__(
        self, store: HostStore, peers: Peers, make: MakeOptimizer, *, clip_norm: float | None, trace: Trace | None
    ) -> None:
        self._store, self._peers, self._clip_norm, self._trace = store, peers, clip_norm, trace
        self._homes = []
        owned = [p for p in store.plan.owned(peers.rank) if p.trained]
        for home in sorted({p.home for p in owned}, reverse=True):
            mine = [p for p in owned if p.home == home]
            parameters = {p.name: nn.Parameter(store.weights(p.name)) for p in mine}
            needs = tuple(sorted({layer for p in mine for layer in p.layers}, reverse=True))
            self._homes.append(_Home(home, needs, parameters, make(parameters)))
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(self, schedule: Schedule, versions: Versions, *, norms: int) -> None:
        """Start stepping a run's layers. `norms` is how often the norm has been computed before."""
        self._thread = threading.Thread(
            target=self._serve, args=(schedule, versions, norms), name="roundpipe-optimizer", daemon=True
        )
        self._thread.start()

    def end(self) -> None:
        """Return when all steps are done; the weights are version 0 of the next run. Raises what went wrong."""
        assert self._thread is not None
        while self._thread.is_alive():
            self._thread.join(LOOK_S)
        if self._error is not None:
            raise self._error

    def state(self) -> dict[str, dict]:
        """Return the optimizer's state by parameter name."""
        return {name: home.optimizer.state[p] for home in self._homes for name, p in home.parameters.items()}

    def _serve(self, schedule: Schedule, versions: Versions, norms: int) -> None:
        try:
            for step in range(schedule.steps):
                self._step(schedule, versions, step, norms + step + 1)
            for home in self._homes:  # version 0 of the next run has the first buffer
                for name, p in home.parameters.items():
                    first = self._store.weights(name, 0)
                    if p.data_ptr() != first.data_ptr():
                        first.copy_(p.detach())
                        p.data = first
        except BaseException as error:  # noqa: BLE001  (the rank's own thread raises it)
            self._error = error
            self._peers.abort(str(error) or type(error).__name__)

    def _step(self, schedule: Schedule, versions: Versions, step: int, count: int) -> None:
        factor, grads = None, {}
        if self._clip_norm is not None:
            grads = {name: g for home in self._homes for name, g in self._gradients(home, schedule, versions, step)}
            factor = clip_factor(global_norm(self._store, self._peers, grads, count=count), self._clip_norm)
        for home in self._homes:
            if factor is None:
                grads = dict(self._gradients(home, schedule, versions, step))
            if self._trace is None:
                self._update(home, grads, factor, step)
            else:
                with self._trace.timed(Action(Op.OPT, home.layer, version=step + 1), step):
                    self._update(home, grads, factor, step)
            versions.publish(home.layer, step + 1)

    def _gradients(self, home: _Home, schedule: Schedule, versions: Versions, step: int) -> list[tuple[str, Tensor]]:
        """Wait for the gradients of a home's parameters, and return them."""
        for layer in home.needs:
            word, value = versions.gradients(layer, step, schedule.rounds)
            self._peers.wait(
                word,
                value,
                lambda layer=layer: (
                    f"rank {self._peers.rank}, step {step}, OPT of layer {home.layer}: waiting for the gradients of "
                    f"layer {layer}, which {_makers(schedule, layer, step)} give"
                ),
            )
        return [(name, sum_gradient(self._store, self._store.plan.parameters[name])) for name in home.parameters]

    @torch.no_grad()
    def _update(self, home: _Home, grads: Mapping[str, Tensor], factor: Tensor | None, step: int) -> None:
        for name, p in home.parameters.items():
            grad = grads[name]
            if factor is not None:
                grad.mul_(factor.to(grad.dtype))
            new = self._store.weights(name, step + 1)
            if new.data_ptr() != p.data_ptr():  # another version is still read
                new.copy_(p.detach())
                p.data = new
            p.grad = grad
        home.optimizer.step()
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
