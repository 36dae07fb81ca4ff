"""What a device computes: the layers of a slot on one micro-batch, with weights bound to them for that time only.

Random numbers are drawn from a seed of (step, micro-batch, layer), so that a recompute on another device, in a slot
with other layers, draws those of the first forward, and so that nothing depends on the number of devices.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from pipeline.actions import Op
from pipeline.errors import PipelineError, ScheduleError
from pipeline.random_state import seed_generators
from pipeline.roundpipe.arena import Arena, Lease
from pipeline.roundpipe.layers import SlotLayer
from pipeline.roundpipe.timer import exact_sleeps
from pipeline.roundpipe.visit import Visit

AWAKE_S = 0.0003
"""The end of a wait is waited for awake: a machine takes up to so long to wake up."""
LAUNCH_S = 0.005
"""A thread that drives a device launches all the time, and finds torch in its caches when it hands something on. One
that slept for 30 ms does not, and takes hundreds of microseconds for its first operations: so this often, it does one.
"""

Outputs = dict[int, Tensor]
"""By boundary: what lies before that layer; behind the last layer, the loss."""


class Tables(Protocol):
    """Where the rows of tables come from, and where their gradients go."""

    def read(self, visit: Visit, layer: int, rows: Tensor) -> Tensor:
        """Return some rows of a layer's table [R, ..], on the device."""
        ...

    def add(self, visit: Visit, layer: int, mb: int, rows: Tensor, grad: Tensor) -> None:
        """Add to some rows of the table's gradient."""
        ...


class Compute(Protocol):
    """What a worker needs: real layers, or waits in their place. `mb` counts through the steps of the run."""

    def forward(self, visit: Visit, x: Tensor | None, mb: int, keep: Collection[int]) -> Outputs:
        """Run forward without a graph; return what lies at the boundaries `keep`."""
        ...

    def graph(self, visit: Visit, x: Tensor | None, mb: int, *, input_grad: bool) -> Tensor:
        """Run forward with a graph, which stays until `backward`; return the output, detached."""
        ...

    def backward(self, grad: Tensor | None) -> Tensor | None:
        """Run backward through the graph (of a loss: None); return the gradient of its input, where that is wanted."""
        ...


@dataclass(slots=True)
class _Live:
    """The one graph that is alive."""

    visit: Visit
    mb: int
    x: Tensor | None
    out: Tensor
    leases: list[Lease]
    tables: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Of each layer that reads rows: its rows, and the bound table."""


class LayerCompute:
    """`Compute` of real layers. The caller sets `seed` before each run."""

    def __init__(self, layers: Sequence[SlotLayer], tables: Tables, arena: Arena, device: torch.device) -> None:
        self.seed: Callable[[Visit, int, int], int] = lambda visit, mb, layer: 0
        self._layers, self._tables, self._arena, self._device = layers, tables, arena, device
        self._live: _Live | None = None
        empty = {p: torch.empty(0, dtype=p.dtype, device=device) for layer in layers for p in _parameters(layer)}
        self._empty = empty

    def forward(self, visit: Visit, x: Tensor | None, mb: int, keep: Collection[int]) -> Outputs:
        """See `Compute.forward`."""
        leases: list[Lease] = []
        with torch.no_grad(), self._bound(visit, mb, leases):
            try:
                return self._through(visit, x, mb, keep)
            finally:
                _free(leases)

    def graph(self, visit: Visit, x: Tensor | None, mb: int, *, input_grad: bool) -> Tensor:
        """See `Compute.graph`."""
        if self._live is not None:
            raise ScheduleError(f"{visit}: the graph of {self._live.visit} still waits for its backward")
        leases: list[Lease] = []
        if x is not None:
            x = x.detach().requires_grad_(input_grad)
        with self._bound(visit, mb, leases) as tables:
            there = [*visit.weights.values(), *(table for _, table in tables.values()), *([] if x is None else [x])]
            known = {tensor.untyped_storage().data_ptr() for tensor in there}
            with torch.enable_grad(), self._arena.graph(visit.slot, known, leases):
                hi = visit.layers[1]
                out = self._through(visit, x, mb, (hi,))[hi]
        self._live = _Live(visit, mb, x, out, leases, tables)
        return out.detach()

    def backward(self, grad: Tensor | None) -> Tensor | None:
        """See `Compute.backward`."""
        live, self._live = self._live, None
        if live is None:
            raise ScheduleError("a backward without the forward or recompute before it")
        with self._bound(live.visit, live.mb, [], again=live.tables):
            if live.out.requires_grad:
                torch.autograd.backward(live.out, grad)
            for layer, (rows, _) in live.tables.items():
                (p,) = self._layers[layer].parameters.values()
                if p.grad is not None:
                    self._tables.add(live.visit, layer, live.mb, rows, p.grad)
        _free(live.leases)
        if live.x is None or not live.x.requires_grad:
            return None
        return live.x.grad if live.x.grad is not None else torch.zeros_like(live.x)

    def drop(self) -> None:
        """Forget a graph, after an error."""
        if self._live is not None:
            _free(self._live.leases)
            self._live = None

    def _through(self, visit: Visit, x: Tensor | None, mb: int, keep: Collection[int]) -> Outputs:
        outputs, versions = {}, {}
        for layer in range(*visit.layers):
            seed_generators(self.seed(visit, mb, layer), self._device)
            x = self._layers[layer].run(x, mb)
            if layer + 1 in keep:
                outputs[layer + 1], versions[layer + 1] = x, x._version
        changed = next((at for at, out in outputs.items() if out._version != versions[at]), None)
        if changed is not None:
            raise PipelineError(
                f"{visit}: layer {changed}, {self._layers[changed].name}, changes its input in place, which is also "
                "what its backward runs again from; let it return a new tensor"
            )
        return outputs

    @contextmanager
    def _bound(
        self, visit: Visit, mb: int, leases: list[Lease], again: dict[int, tuple[Tensor, Tensor]] | None = None
    ) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
        """Put the weights into the parameters, and take them out again; yields the rows that were read."""
        tables: dict[int, tuple[Tensor, Tensor]] = {} if again is None else again
        try:
            for number in range(*visit.layers):
                layer = self._layers[number]
                if layer.rows is not None:
                    if again is None:
                        rows = layer.rows(mb)
                        table = self._tables.read(visit, number, rows)
                        leases.append(self._arena.lease(table.nbytes, slot=visit.slot, what="rows of a table"))
                        tables[number] = (rows, table)
                    (p,) = layer.parameters.values()
                    p.data, p.grad = tables[number][1], None
                    continue
                for name, p in layer.parameters.items():
                    p.data, p.grad = visit.weights[number, name], visit.gradients.get((number, name))
            yield tables
        finally:
            torch.clear_autocast_cache()  # it goes by the parameter, which holds other weights next time
            for number in range(*visit.layers):
                for p in _parameters(self._layers[number]):
                    p.data, p.grad = self._empty[p], None


class WaitCompute:
    """`Compute` that waits as long as it is told, in place of layers: a device of any speed on any machine.

    `seconds(op, slot, micro-batch)` of F, FB, R and B. What is handed on is one number.
    """

    def __init__(self, seconds: Callable[[Op, int, int], float], num_layers: int) -> None:
        exact_sleeps()
        self._seconds, self._num_layers = seconds, num_layers
        self._handed_on, self._loss, self._scratch = torch.zeros(1), torch.zeros(()), torch.zeros(2)
        self._live: tuple[Visit, int] | None = None

    def forward(self, visit: Visit, x: Tensor | None, mb: int, keep: Collection[int]) -> Outputs:
        """See `Compute.forward`."""
        self._wait(Op.F, visit, mb)
        return dict.fromkeys(keep, self._handed_on)

    def graph(self, visit: Visit, x: Tensor | None, mb: int, *, input_grad: bool) -> Tensor:
        """See `Compute.graph`."""
        self._live = visit, mb
        fused = visit.layers[1] == self._num_layers
        self._wait(Op.FB if fused else Op.R, visit, mb)
        return self._loss

    def backward(self, grad: Tensor | None) -> Tensor | None:
        """See `Compute.backward`."""
        assert self._live is not None
        visit, mb = self._live
        if visit.layers[1] != self._num_layers:
            self._wait(Op.B, visit, mb)
        return self._handed_on

    def drop(self) -> None:
        """Forget what is alive."""
        self._live = None

    def _wait(self, op: Op, visit: Visit, mb: int) -> None:
        until = time.monotonic() + self._seconds(op, visit.slot, mb)
        while (left := until - time.monotonic()) > 0:
            if left > AWAKE_S:
                time.sleep(min(left - AWAKE_S, LAUNCH_S))
                self._scratch[:1].view(self._handed_on.shape).copy_(self._handed_on.to("cpu", copy=True))


def _parameters(layer: SlotLayer) -> Collection[nn.Parameter]:
    return layer.parameters.values()


def _free(leases: list[Lease]) -> None:
    for lease in leases:
        lease.free()
    leases.clear()
