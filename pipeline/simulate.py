"""A schedule in time: discrete events over compute, links, host transfers, shared PCIe roots and the host's optimizer.

    result = simulate(schedule, costs)
    result.makespan_s, result.bubble, result.peak_bytes

Compute actions of a device run one after another in the order of its list, transfers beside them. On a host link (one
of a device, or one that the devices of a PCIe root share, each direction by itself) activations go before weights, and
weights give way between pieces of `chunk_bytes`. Pure and deterministic.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline import graph as graphs
from pipeline.actions import Action, Op
from pipeline.costs import Costs
from pipeline.errors import PlanError
from pipeline.graph import Graph, Why
from pipeline.result import Result, Times, account
from pipeline.schedule import Schedule

_TO_DEVICE, _TO_HOST = frozenset({Op.UPLOAD, Op.GET}), frozenset({Op.DOWNLOAD, Op.PUT})
_WEIGHTS = frozenset({Op.UPLOAD, Op.DOWNLOAD})


def simulate(schedule: Schedule, costs: Costs, *, took: Mapping[tuple[Op, int, int], float] | None = None) -> Result:
    """Run a schedule by its costs.

    `took` has seconds, of a run say, that go before the costs: of an op on a stage and a micro-batch.

    Raises ScheduleError if it is incomplete or has a cycle, PlanError if the costs lack layers or micro-batches.
    """
    if costs.pcie_roots is not None and len(costs.pcie_roots) < schedule.num_devices:
        raise PlanError(f"pcie_roots names {len(costs.pcie_roots)} devices; {schedule.name} has {schedule.num_devices}")
    graph = graphs.build(schedule)
    n = len(graph.before)
    after: list[list[tuple[int, Why]]] = [[] for _ in range(n)]
    for i, before in enumerate(graph.before):
        for j, why in before:
            after[j].append((i, why))
    times = Times([0.0] * n, [0.0] * n, [None] * n)
    run = _Run(graph, costs, times, after, [len(b) for b in graph.before], took or {})
    run.go()
    stuck = next((i for i, left in enumerate(run.waiting) if left), None)
    if stuck is not None:
        raise graph.listing.fail(stuck, "waits for itself through other devices: the schedule has a cycle")
    return account(graph, costs, run.times)


def duration(schedule: Schedule, action: Action, costs: Costs) -> float:
    """Seconds of an action that has its device, or its host link, to itself."""
    layers, mb = schedule.layers(action), action.microbatch or 0
    match action.op:
        case Op.F | Op.R:
            return costs.forward(mb, layers)
        case Op.B:
            return costs.backward(mb, layers)
        case Op.I:
            return costs.input_share * costs.backward(mb, layers)
        case Op.W:
            return (1 - costs.input_share) * costs.backward(mb, layers)
        case Op.FB:
            return costs.forward(mb, layers) + costs.backward(mb, layers)
        case Op.OPT:
            return costs.optimizer(layers)
        case Op.SEND:
            return costs.hop_s + num_bytes(schedule, action, costs) / costs.link_bytes_per_s
        case Op.UPLOAD | Op.DOWNLOAD | Op.PUT | Op.GET:
            return num_bytes(schedule, action, costs) / costs.host_bytes_per_s
        case _:
            return 0.0


def num_bytes(schedule: Schedule, action: Action, costs: Costs) -> float:
    """Bytes that a transfer moves."""
    if action.bytes is not None:
        return action.bytes
    if action.op in _WEIGHTS:
        return costs.weights(schedule.layers(action))
    return costs.boundary(action.microbatch or 0)


@dataclass
class _Run:
    graph: Graph
    costs: Costs
    times: Times
    after: list[list[tuple[int, Why]]]
    waiting: list[int]
    took: Mapping[tuple[Op, int, int], float]
    now: float = 0.0
    events: list[tuple[float, int, str, int, int]] = field(default_factory=list)
    links: dict[tuple, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    moving: set[tuple] = field(default_factory=set)
    left_s: dict[int, float] = field(default_factory=dict)

    def go(self) -> None:
        for i, left in enumerate(self.waiting):
            if not left:
                self.at(0.0, "start", i)
        while self.events:
            self.now = self.events[0][0]
            # Everything that happens at this moment, before a link chooses what it moves next.
            while self.events and self.events[0][0] == self.now:
                _, _, kind, i, j = heapq.heappop(self.events)
                match kind:
                    case "start":
                        self.begin(i)
                    case "moved":
                        self.moved(i)
                    case "arrive":
                        self.release(i, j)
                    case _:
                        self.finish(i)
            for link, queue in self.links.items():
                if queue and link not in self.moving:
                    self.grant(link)

    def at(self, time: float, kind: str, i: int, j: int = -1) -> None:
        heapq.heappush(self.events, (time, i, kind, i, j))

    def begin(self, i: int) -> None:
        action = self.graph.listing.actions[i]
        self.times.start[i] = self.now
        seconds = self.took.get((action.op, action.stage, action.microbatch or 0))
        if seconds is None:
            seconds = duration(self.graph.listing.schedule, action, self.costs)
        link = self.link(i)
        if link is None or seconds == 0:
            self.at(self.now + seconds, "finish", i)
        else:
            self.left_s[i] = seconds
            self.times.start[i] = -1.0
            heapq.heappush(self.links[link], (int(action.op in _WEIGHTS), i))

    def link(self, i: int) -> tuple | None:
        op, device = self.graph.listing.actions[i].op, self.graph.listing.where[i][0]
        if op not in _TO_DEVICE and op not in _TO_HOST:
            return None
        roots = self.costs.pcie_roots
        return (op in _TO_DEVICE, device if roots is None else roots[device])

    def grant(self, link: tuple) -> None:
        is_weights, i = heapq.heappop(self.links[link])
        piece_s = self.costs.chunk_bytes / self.costs.host_bytes_per_s if is_weights else self.left_s[i]
        piece_s = min(piece_s, self.left_s[i])
        if self.times.start[i] < 0:
            self.times.start[i] = self.now
        self.moving.add(link)
        self.left_s[i] -= piece_s
        self.at(self.now + piece_s, "moved", i)

    def moved(self, i: int) -> None:
        link = self.link(i)
        assert link is not None
        self.moving.discard(link)
        if self.left_s[i] > 0:
            heapq.heappush(self.links[link], (1, i))
        else:
            self.finish(i)

    def finish(self, i: int) -> None:
        self.times.end[i] = self.now
        for k, why in self.after[i]:
            if why is Why.HOP:
                self.at(self.now + self.hop_s(k), "arrive", k, i)
            else:
                self.release(k, i)

    def hop_s(self, i: int) -> float:
        """Until data made elsewhere can be used by i; what a GET moves, it moves itself."""
        action = self.graph.listing.actions[i]
        if action.op is Op.GET:
            return self.costs.hop_s
        return self.costs.between_s(action.microbatch or 0)

    def release(self, i: int, by: int) -> None:
        """One thing less that i waits for; the last one is the cause of its start."""
        self.waiting[i] -= 1
        if not self.waiting[i]:
            self.times.cause[i] = by
            self.begin(i)
