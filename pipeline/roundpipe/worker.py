"""A device of RoundPipe: a dull loop over its row of a schedule. It holds nothing between the slots it runs.

    worker = SlotWorker(layers, store, peers_of(store, group), ...)
    losses = worker.run(schedule)          # every rank, with the same schedule

UPLOAD and DOWNLOAD are queued for the lane, which runs beside; GET is taken up by the action that needs it; OPT is the
business of the layer's owner (see `optimizer`), which waits for the gradients by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.actions import Action, Op, Phase
from pipeline.errors import ScheduleError
from pipeline.random_state import RandomState
from pipeline.roundpipe.arena import Arena
from pipeline.roundpipe.boundaries import Boundaries, Held
from pipeline.roundpipe.compute import Compute, LayerCompute
from pipeline.roundpipe.host_store import HostStore, check_losses
from pipeline.roundpipe.layers import SlotLayer
from pipeline.roundpipe.optimizer import HostOptimizer, require_optimizer
from pipeline.roundpipe.peers import Peers
from pipeline.roundpipe.streams import Streams
from pipeline.roundpipe.transfers import Lane, Link
from pipeline.roundpipe.versions import Versions
from pipeline.roundpipe.visit import Visit
from pipeline.schedule import Schedule
from pipeline.tracing import Trace


class SlotWorker:
    """Runs one rank's part of schedules. Every rank of a store has one, and all make the same calls.

    The store has to be filled before: the parameters of the layers are emptied here.
    `cap_bytes` is the memory of the device; `compute` replaces the layers by something else, such as `WaitCompute`;
    `optimizer` is needed for schedules with OPT.
    """

    def __init__(
        self,
        layers: Sequence[SlotLayer],
        store: HostStore,
        peers: Peers,
        *,
        device: torch.device | None = None,
        cap_bytes: int | None = None,
        optimizer: HostOptimizer | None = None,
        compute: Compute | None = None,
        trace: Trace | None = None,
    ) -> None:
        self.store, self.peers, self.trace = store, peers, trace
        self.device = device or torch.device("cpu")
        self.arena = Arena(device=peers.rank, cap_bytes=cap_bytes)
        self.layers, self.optimizer = layers, optimizer
        self.compute = compute
        self.turns = self.norms = self.runs = 0
        """Optimizer steps and evaluations so far, gradient norms computed, and runs begun."""
        for layer in layers:  # their weights are in the store; between slots a device has none
            for p in layer.parameters.values():
                p.data, p.grad = torch.empty(0, dtype=p.dtype, device=self.device), None
        self.link = Link()
        self.lane = Lane(peers, self.link, rank=peers.rank)

    def run(self, schedule: Schedule, *, seed: int = 0, scoring: bool = False, first_step: int = 0) -> Tensor:
        """Run all steps of a completed schedule; return the losses of all its micro-batches, fp64. Every rank calls.

        With `scoring` there is no gradient. `seed` decides the dropout. `first_step` is what
        errors and the trace call the first of the steps.

        When it returns, every rank has ended: weights, and the gradients of the last step, are in the store.

        Raises WatchdogError naming rank, slot, micro-batch and who is waited for when another rank is gone, gave up or
        is later than the timeout; MemoryCapError; StalenessError; ScheduleError. The other ranks are told first.
        """
        check_losses(schedule.num_microbatches)
        random = RandomState.now(self.device)
        try:
            return _Run(self, schedule, seed=seed, scoring=scoring, first_step=first_step).all()
        except BaseException as error:
            self.peers.fail(error)
            raise
        finally:
            random.set(self.device)

    def close(self) -> None:
        """End the threads. The store is of no use to this rank afterwards."""
        self.lane.close()
        self.peers.close()


class _Run:
    """The loop of one run, and the tensors between its actions."""

    def __init__(self, worker: SlotWorker, schedule: Schedule, *, seed: int, scoring: bool, first_step: int) -> None:
        self._worker, self._schedule, self._scoring, self._first_step = worker, schedule, scoring, first_step
        self._rank, self._arena, self._store = worker.peers.rank, worker.arena, worker.store
        self._stepped = require_optimizer(worker.optimizer, schedule)
        if schedule.staleness > worker.store.plan.staleness:
            raise self._mistake(f"its staleness is {schedule.staleness}; the store holds one version of the weights")
        if schedule.num_devices != worker.store.plan.ranks:
            raise self._mistake(f"it is for {schedule.num_devices} devices, and there are {worker.store.plan.ranks}")
        most, room = max(map(schedule.size, range(schedule.steps))), worker.store.plan.words.microbatches
        if most > room:
            raise self._mistake(f"a step has {most} micro-batches; the store has room for {room}")
        # One more than steps: what a rank says at the beginning of a run must be news to the others.
        self._base = worker.turns + 1
        worker.turns += schedule.steps + 1
        worker.runs += 1
        self._losses = worker.store.losses[worker.runs % 2]
        self._versions = Versions(worker.store, base=self._base)
        self._boundaries = Boundaries(
            schedule, worker.store, worker.peers, worker.arena, worker.link,
            base=self._base, device=worker.device, what=self._what,
        )  # fmt: skip
        self._streams = Streams(
            worker.layers, worker.store, worker.arena, worker.lane, worker.peers, self._versions,
            stepped=self._stepped, device=worker.device,
        )  # fmt: skip
        self._compute = worker.compute or LayerCompute(worker.layers, self._streams, worker.arena, worker.device)
        if isinstance(self._compute, LayerCompute):
            self._compute.seed = lambda visit, mb, layer: _mixed(seed + visit.step, schedule.place(mb), layer)
        self._now: Action | None = None
        self._visits: dict[tuple[int, int, int], Visit] = {}
        self._last: Visit | None = None
        self._input: Held | None = None
        self._puts = self._put_boundaries()
        self._handlers: dict[Op, Callable[[Action, int], None]] = {
            Op.UPLOAD: self._upload, Op.DOWNLOAD: self._download, Op.F: self._forward, Op.FB: self._fused,
            Op.R: self._recompute, Op.B: self._backward, Op.FREE: self._free,
            Op.GET: lambda action, mb: self._boundaries.note(action),
            Op.PUT: lambda action, mb: self._boundaries.put(action),
            Op.OPT: lambda action, mb: None,
        }  # fmt: skip

    def all(self) -> Tensor:
        schedule, worker, plan = self._schedule, self._worker, self._store.plan
        row = schedule.of(self._rank)
        unknown = next((a for a in row if a.op not in self._handlers), None)
        if unknown is not None:
            raise self._mistake(f"{unknown.label} is no action of RoundPipe's runtime")
        for home in plan.homes(self._rank):
            self._versions.publish(home, 0)
        if self._stepped:
            assert worker.optimizer is not None
            worker.optimizer.begin(schedule, self._versions, norms=worker.norms, first_step=self._first_step)
            worker.norms += schedule.steps
        for action in row:
            self._now, mb = action, action.microbatch or 0
            if worker.trace is None:
                self._handlers[action.op](action, mb)
            else:
                with worker.trace.timed(action, self._first_step + schedule.step(mb)):
                    self._handlers[action.op](action, mb)
        return self._end()

    def _end(self) -> Tensor:
        self._now = None
        if left := [*self._boundaries.leftover(), *self._visits.values()]:
            raise self._mistake(f"it leaves {left[0]} behind")
        self._streams.drain(self._what)
        if self._stepped:
            assert self._worker.optimizer is not None
            self._worker.optimizer.end()
        words, end = self._store.plan.words, self._base + self._schedule.steps
        self._store.words.publish(words.ended(self._rank), end)
        for rank in range(self._store.plan.ranks):
            self._worker.peers.wait(
                words.ended(rank), end, lambda rank=rank: f"{self._what()}: waiting for rank {rank} to end its run"
            )
        return self._losses[: self._schedule.num_microbatches].clone()

    def _upload(self, action: Action, mb: int) -> None:
        schedule = self._schedule
        layers = schedule.layers(action)
        parameters = self._store.plan.parameters
        names = {name for layer in range(*layers) for name in self._worker.layers[layer].parameters}
        homes = frozenset(parameters[name].home for name in names)
        step, first = schedule.step(mb), self._first_step
        visit = Visit(action.stage, layers, step, schedule.round(mb), schedule.version(action), homes, first_step=first)
        self._visits[self._key(action, mb)] = visit
        self._streams.upload(visit)

    def _download(self, action: Action, mb: int) -> None:
        self._streams.download(self._visit(action, mb))

    def _free(self, action: Action, mb: int) -> None:
        """Of the visit that is at its end: FREE names none."""
        assert self._last is not None
        del self._visits[self._last.step, self._last.round, self._last.slot]
        self._last.drop_weights()

    def _forward(self, action: Action, mb: int) -> None:
        visit, x = self._begin(action, mb), self._boundaries.take(action, Phase.F)
        keep = self._puts.get((action.stage, mb), frozenset())
        outputs = self._compute.forward(visit, x and x.tensor, mb, keep)
        for at, out in outputs.items():
            self._boundaries.hold(Phase.F, at, mb, out, visit.slot)
        _let_go(x)

    def _fused(self, action: Action, mb: int) -> None:
        visit, x = self._begin(action, mb), self._boundaries.take(action, Phase.F)
        end = self._schedule.num_layers
        if self._scoring:
            loss = self._compute.forward(visit, x and x.tensor, mb, (end,))[end]
        else:
            self._streams.want_gradients(visit)
            loss = self._graph(visit, x, mb)
            self._pass_back(visit, mb, self._compute.backward(None))
        self._losses[mb] = loss.double().cpu()
        _let_go(x)

    def _recompute(self, action: Action, mb: int) -> None:
        visit, self._input = self._begin(action, mb), self._boundaries.take(action, Phase.F)
        self._streams.want_gradients(visit)
        self._graph(visit, self._input, mb)

    def _backward(self, action: Action, mb: int) -> None:
        visit, grad = self._begin(action, mb), self._boundaries.take(action, Phase.B)
        self._pass_back(visit, mb, self._compute.backward(grad and grad.tensor))
        _let_go(grad)
        _let_go(self._input)

    def _graph(self, visit: Visit, x: Held | None, mb: int) -> Tensor:
        input_grad = visit.layers[0] > self._schedule.first_trainable
        return self._compute.graph(visit, x and x.tensor, mb, input_grad=input_grad)

    def _pass_back(self, visit: Visit, mb: int, grad: Tensor | None) -> None:
        if grad is not None and visit.layers[0] > self._schedule.first_trainable:
            self._boundaries.hold(Phase.B, visit.layers[0], mb, grad, visit.slot)

    def _begin(self, action: Action, mb: int) -> Visit:
        """Wait for the weights of an action."""
        visit = self._visit(action, mb)
        self._last = visit
        self._streams.uploaded(visit, self._what)
        return visit

    def _put_boundaries(self) -> dict[tuple[int, int], frozenset[int]]:
        """Return, by forward slot and micro-batch, which boundaries this rank puts."""
        found: dict[tuple[int, int], set[int]] = {}
        for action in self._schedule.of(self._rank):
            if action.op is Op.PUT and action.phase is Phase.F:
                _, at, mb = self._boundaries.carried(action)
                found.setdefault((action.stage, mb), set()).add(at)
        return {key: frozenset(boundaries) for key, boundaries in found.items()}

    def _key(self, action: Action, mb: int) -> tuple[int, int, int]:
        return self._schedule.step(mb), self._schedule.round(mb), action.stage

    def _visit(self, action: Action, mb: int) -> Visit:
        visit = self._visits.get(self._key(action, mb))
        if visit is None:
            raise self._mistake(f"{action.label} comes before the UPLOAD of its slot")
        return visit

    def _what(self) -> str:
        """Say where this rank is."""
        action = self._now
        if action is None:
            return f"rank {self._rank}, end of the run"
        if action.microbatch is None:
            return f"rank {self._rank}, slot {action.stage} ({action.label})"
        step = self._first_step + self._schedule.step(action.microbatch)
        return f"rank {self._rank}, step {step}, slot {action.stage}, micro-batch {action.microbatch} ({action.label})"

    def _mistake(self, text: str) -> ScheduleError:
        return ScheduleError(f"schedule {self._schedule.name} cannot run on rank {self._rank}: {text}; validate it")


def _mixed(step: int, mb: int, layer: int) -> int:
    """Return a seed of its own for every (step, micro-batch, layer)."""
    return ((step * 1_000_003 + mb) * 65_537 + layer) % 2**63


def _let_go(held: Held | None) -> None:
    if held is not None:
        held.lease.free()
