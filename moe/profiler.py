"""Measure what each operation of a layer costs, on the groups that will run it, and fit it.

Every rank measures together: sizes log-spaced and in random order (the same on all ranks), the slowest rank of each
try counts, the median of the tries is the point. Rank 0 fits and broadcasts, so that all ranks plan from one profile.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from moe.cost import FREE, PAIRS, Cost, Profile
from moe.dispatch import all_to_all, gather_rows, scatter_sum
from moe.errors import MoeConfigError
from moe.fit import fit_cost
from moe.issue import IssueQueue
from moe.plan import COMPUTE, INTER, INTRA, LayerPlan

MIN_BYTES = 64 << 10
"""Smaller exchanges are noise (8 to 32 KiB tripped the residual rule), and no plan makes chunks that small."""

Job = Callable[[], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileConfig:
    """What to measure. Sizes span the chunks a plan may make: from a sixteenth of the smallest load to the largest."""

    least_bytes: int = MIN_BYTES
    most_bytes: int = 8 << 20
    least_rows: int = 16
    most_rows: int = 4096
    sizes: int = 6
    tries: int = 7
    repeats: int = 3
    """Least back-to-back runs in one try, as chunks follow one another; of small sizes more, until half of the largest
    size has passed: a link that rested has credit for its first bytes, and small chunks would look free."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.least_bytes < self.most_bytes or not 0 < self.least_rows < self.most_rows:
            raise MoeConfigError(
                f"sizes go from {self.least_bytes} to {self.most_bytes} bytes and from {self.least_rows} to "
                f"{self.most_rows} rows; each needs a smaller and a larger one"
            )
        if self.sizes < 2 or self.tries < 1 or self.repeats < 1:
            raise MoeConfigError(
                f"{self.sizes} sizes, {self.tries} tries, {self.repeats} repeats; give at least 2, 1 and 1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """The two links of a layer: a queue with its own group each; `intra` is None without expert sharding."""

    inter: IssueQueue
    ep: dist.ProcessGroup
    intra: IssueQueue | None = None
    esp: dist.ProcessGroup | None = None
    gradients: dist.ProcessGroup
    """Group of the dense gradients' all-reduce, which runs on the inter-node link."""


def exchange(group: dist.ProcessGroup, nbytes: int) -> Job:
    """Return an all-to-all of `nbytes` a rank, evenly split."""
    each = max(1, nbytes // group.size())
    rows, sizes = torch.zeros(each * group.size(), dtype=torch.uint8), [each] * group.size()
    return lambda: all_to_all(rows, sizes, sizes, group)


def gather(group: dist.ProcessGroup, nbytes: int) -> Job:
    """Return the all-gather of the layer, which puts out `nbytes`."""
    each = max(1, nbytes // group.size())
    rows, sizes = torch.zeros(each, dtype=torch.uint8), [each] * group.size()
    return lambda: gather_rows(rows, sizes, group)


def scatter(group: dist.ProcessGroup, nbytes: int) -> Job:
    """Return the reduce-scatter of the layer, which takes in `nbytes`."""
    each = max(1, nbytes // (4 * group.size()))
    rows, sizes = torch.zeros(each * group.size(), dtype=torch.float32), [each] * group.size()
    return lambda: scatter_sum(rows, sizes, group)


def reduce(group: dist.ProcessGroup, nbytes: int) -> Job:
    """Return an all-reduce of `nbytes`."""
    values = torch.zeros(max(1, nbytes // 4), dtype=torch.float32)
    return lambda: dist.all_reduce(values, group=group)


def measure(make: Callable[[int], Job], sizes: Sequence[int], config: ProfileConfig, group: Any = None) -> list[float]:
    """Return the seconds of each size: median over tries of the slowest rank of `group`. All its ranks call."""
    half = max(sizes) / 2
    return timed([(make(size), max(config.repeats, ceil(half / size))) for size in sizes], config, group)


def timed(runs: Sequence[tuple[Job, int]], config: ProfileConfig, group: Any = None) -> list[float]:
    """Return the seconds of one run of each job, which runs so many times in a row: as `measure`."""
    order = [number for number in range(len(runs)) for _ in range(config.tries)]
    random.Random(config.seed).shuffle(order)
    for job, _ in runs:
        job()
    times = torch.zeros(len(order), dtype=torch.float64)
    for at, number in enumerate(order):
        job, repeats = runs[number]
        dist.barrier(group)
        began = time.perf_counter()
        for _ in range(repeats):
            job()
        times[at] = (time.perf_counter() - began) / repeats
    dist.all_reduce(times, dist.ReduceOp.MAX, group=group)
    return [median(t for t, n in zip(times.tolist(), order, strict=True) if n == number) for number in range(len(runs))]


def log_spaced(least: int, most: int, count: int) -> list[int]:
    """Return `count` sizes from least to most, multiples of 16, evenly apart on a log scale."""
    ratio = (most / least) ** (1 / (count - 1))
    return sorted({max(16, round(least * ratio**i) // 16 * 16) for i in range(count)})


def make_profile(
    links: Links,
    *,
    expert_forward: Callable[[int], Job],
    expert_backward: Callable[[int], Job],
    config: ProfileConfig,
    group: dist.ProcessGroup | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> Profile:
    """Measure and fit every operation; every rank of `group` (None: all) calls and gets the same profile.

    `expert_forward(rows)` returns a function that runs the experts on that many rows; `expert_backward` likewise, with
    whatever it recomputes.
    """
    sizes = log_spaced(config.least_bytes, config.most_bytes, config.sizes)
    rows = log_spaced(config.least_rows, config.most_rows, config.sizes)
    jobs: dict[str, tuple[Callable[[int], Job], Sequence[int], IssueQueue | None]] = {
        "all_to_all": (lambda n: exchange(links.ep, n), sizes, links.inter),
        "all_reduce": (lambda n: reduce(links.gradients, n), sizes, links.inter),
        "expert_forward": (expert_forward, rows, None),
        "expert_backward": (expert_backward, rows, None),
    }
    if (esp := links.esp) is not None:
        jobs["all_gather"] = (lambda n: gather(esp, n), sizes, links.intra)
        jobs["reduce_scatter"] = (lambda n: scatter(esp, n), sizes, links.intra)
    costs: dict[str, Cost] = {"all_gather": FREE, "reduce_scatter": FREE}
    residuals: dict[str, float] = {}
    for name, (make, points, queue) in jobs.items():
        progress(name)
        times = measure(_through(queue, make), points, config, group)
        costs[name], residuals[name] = fit_cost(points, times)
    progress("slowdowns")
    profile = Profile(**costs, residuals=residuals)  # type: ignore[arg-type]
    slowdowns = measure_slowdowns(links, expert_forward, profile, config, group)
    return agree(replace(profile, slowdowns=slowdowns), group)


def measure_slowdowns(
    links: Links,
    expert: Callable[[int], Job],
    profile: Profile,
    config: ProfileConfig,
    group: dist.ProcessGroup | None = None,
    *,
    least: float = 1.05,
) -> dict[str, float]:
    """Return how much longer two lanes take together than the longer alone; pairs under `least` are left out."""
    lanes: dict[str, tuple[Callable[[int], Job], Cost, IssueQueue | None, float]] = {
        INTER: (lambda n: exchange(links.ep, n), profile.all_to_all, links.inter, config.most_bytes),
        COMPUTE: (expert, profile.expert_forward, None, config.most_rows),
    }
    if (esp := links.esp) is not None:
        lanes[INTRA] = (lambda n: gather(esp, n), profile.all_gather, links.intra, config.most_bytes)
    found = {}
    for one, other in (pair for pair in PAIRS if set(pair) <= lanes.keys()):
        # As long as each other, so that they overlap all the time.
        target_s = min(lanes[lane][1](lanes[lane][3]) for lane in (one, other))
        sizes = [_size_for(lanes[lane][1], target_s, lanes[lane][3]) for lane in (one, other)]
        both = [(lanes[lane][0](size), lanes[lane][2]) for lane, size in zip((one, other), sizes, strict=True)]
        ways = [(_together(jobs, config.repeats), 1) for jobs in (both[:1], both[1:], both)]
        *alone, together = timed(ways, config, group)
        factor = together / max(alone)
        if factor >= least:
            found["+".join(sorted((one, other)))] = round(factor, 4)
    return found


def agree(profile: Profile, group: dist.ProcessGroup | None = None) -> Profile:
    """Return the profile of the first rank of `group`, on every rank of it."""
    return Profile.from_json(_broadcast(profile.to_json(), group))


def agree_on_plans(plans: Mapping[str, LayerPlan], group: dist.ProcessGroup | None = None) -> dict[str, LayerPlan]:
    """Return the plans, by layer name, of the first rank of `group`, on every rank of it: one rank decides."""
    names = list(plans)
    texts = _broadcast("\n".join(plans[name].to_json() for name in names), group).split("\n")
    return {name: LayerPlan.from_json(text) for name, text in zip(names, texts, strict=True)}


def _broadcast(text: str, group: dist.ProcessGroup | None) -> str:
    first = dist.get_global_rank(group, 0) if group is not None else 0
    box = [text]
    dist.broadcast_object_list(box, src=first, group=group)
    return box[0]


def _through(queue: IssueQueue | None, make: Callable[[int], Job]) -> Callable[[int], Job]:
    """Run a job where the executor runs it: on its link's thread."""
    if queue is None:
        return make

    def made(size: int) -> Job:
        job = make(size)
        return lambda: queue.submit(job, layer="profile", op=f"{size} bytes").result()

    return made


def _together(jobs: Sequence[tuple[Job, IssueQueue | None]], repeats: int) -> Job:
    """Run every job so many times in a row, lanes side by side; they meet at the end only, or the later one counts."""

    def run() -> None:
        queued = [(job, queue) for job, queue in jobs if queue is not None]
        tickets = [queue.submit(job, layer="profile", op="together") for job, queue in queued for _ in range(repeats)]
        for job, queue in jobs:
            for _ in range(repeats if queue is None else 0):
                job()
        for ticket in tickets:
            ticket.result()

    return run


def _size_for(cost: Cost, target_s: float, most: float) -> int:
    """Return the size that takes about `target_s`, by bisection; costs do not fall."""
    low, high = 16.0, most
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) < target_s else (low, middle)
    return int(high) // 16 * 16 or 16
