"""Complete a schedule with transfers through the host: weights, activations and gradients, as RoundPipe runs.

A *visit* is one stage on one device for one round. Its weights go up while the visit before it runs, so that a device
holds those of two visits (and of one more for each further open slot). After its last action its gradients go down and
its weights are dropped; after the last round the optimizer steps its layers. Activations are fetched one action ahead.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pipeline import graph as graphs
from pipeline.actions import Action, Op
from pipeline.crossings import crossings, ends, without_transfers
from pipeline.graph import Why
from pipeline.schedule import Schedule

Visit = tuple[int, int, int]
"""Step, round, stage."""


@dataclass(frozen=True, slots=True)
class _Plan:
    schedule: Schedule
    gets: dict[int, list[tuple[Action, int]]] = field(default_factory=lambda: defaultdict(list))
    """By consumer, in the numbering of the compute-only schedule, each with its maker."""
    puts: dict[int, list[Action]] = field(default_factory=lambda: defaultdict(list))
    """By maker."""
    finish: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    """(step, stage) with a backward to the (round, device) that completes its gradients."""

    def visit(self, action: Action) -> Visit:
        mb = action.microbatch or 0
        return self.schedule.step(mb), self.schedule.round(mb), action.stage


def with_host(schedule: Schedule) -> Schedule:
    """The schedule with UPLOAD, GET, PUT, DOWNLOAD, OPT and FREE.

    Raises ScheduleError if an action needs what nothing makes.
    """
    plan = _Plan(without_transfers(schedule))
    graph = graphs.build(plan.schedule)
    for i, j, at in crossings(graph, Why.HOP, Why.DATA):
        put, get = ends(graph, j, i, at, Op.PUT, Op.GET)
        plan.gets[i].append((get, j))
        if put not in plan.puts[j]:
            plan.puts[j].append(put)
    for device, row in enumerate(plan.schedule.devices):
        for action in row:
            if action.op in (Op.B, Op.W, Op.FB):
                step, rnd, stage = plan.visit(action)
                plan.finish[step, stage] = max((rnd, device), plan.finish.get((step, stage), (-1, -1)))
    rows, start = [], 0
    for device, row in enumerate(plan.schedule.devices):
        rows.append(list(_row(plan, device, row, start)))
        start += len(row)
    return schedule.with_devices(rows)


def _row(plan: _Plan, device: int, row: Sequence[Action], start: int) -> Iterator[Action]:
    """The list of a device; `start` is the number of its first action."""
    first: dict[Visit, Action] = {}
    for action in row:
        first.setdefault(plan.visit(action), action)
    last = {plan.visit(action): n for n, action in enumerate(row)}
    uploads = deque(first)
    begun: set[Visit] = set()
    stepped: set[tuple[int, int]] = set()
    for n, action in enumerate(row):
        visit = plan.visit(action)
        begun.add(visit)
        # One visit ahead; but weights that this device has yet to step come only when they are there.
        while uploads and (uploads[0] in begun or len(first) - len(uploads) <= len(begun)):
            if uploads[0] not in begun and not _updates(plan, device, uploads[0]) <= stepped:
                break
            yield _upload(first[uploads.popleft()])
        yield from (get for get, maker in plan.gets.get(start + n, []) if n == 0 or maker == start + n - 1)
        if n + 1 < len(row):
            yield from (get for get, maker in plan.gets.get(start + n + 1, []) if maker != start + n)
        yield action
        yield from plan.puts.get(start + n, [])
        if last[visit] == n:
            yield from _leave(plan, device, visit, action)
            if plan.finish.get((visit[0], visit[2])) == (visit[1], device):  # not before the last round
                stepped.add((visit[0], visit[2]))


def _updates(plan: _Plan, device: int, visit: Visit) -> set[tuple[int, int]]:
    """(step, stage) of the optimizer steps on this device that make the weights of a visit."""
    step, _, stage = visit
    made_by = step - 1 - plan.schedule.staleness
    lo, hi = plan.schedule.stages[stage]
    return {
        (s, other)
        for (s, other), (_, where) in plan.finish.items()
        if s <= made_by
        and where == device
        and plan.schedule.stages[other][0] < hi
        and lo < plan.schedule.stages[other][1]
    }


def _upload(first: Action) -> Action:
    return Action(Op.UPLOAD, first.stage, first.microbatch, layers=first.layers, version=first.version)


def _leave(plan: _Plan, device: int, visit: Visit, action: Action) -> Iterator[Action]:
    step, rnd, stage = visit
    finish = plan.finish.get((step, stage))
    if finish is not None:
        yield Action(Op.DOWNLOAD, stage, action.microbatch, layers=action.layers)
    if finish == (rnd, device):
        yield Action(Op.OPT, stage, layers=action.layers, version=step + 1)
    yield Action(Op.FREE, stage, layers=action.layers)
