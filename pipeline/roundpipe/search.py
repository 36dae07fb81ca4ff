"""Search over partitions: every even cut simulated, then simulated annealing. Bounded by evaluations, so that a seed
gives one result on every rank and on every machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PlanError
from pipeline.roundpipe.anneal import anneal, scan_even
from pipeline.roundpipe.device_bytes import peak_bytes
from pipeline.roundpipe.slot_sim import fill_tables, ready_makespan
from pipeline.roundpipe.slots import LayerCosts, even_sizes
from pipeline.schedules.roundpipe import Slots

MOST_FUSED = 2
"""Even cuts are tried with up to so many fused layers; the search may fuse more."""
COLD = 2e-5
"""Last temperature, in shares of the ideal makespan."""
READY_COST = 20.0
"""What ready-first dispatch takes to simulate, in times of strict order, with 8 devices or fewer."""
SCANNED = {True: 128, False: 24}
"""Most numbers of slots that the scan of even cuts tries on each side: strict simulation is cheap, ready-first not."""
SCAN_OPS, SCANNED_AT_LEAST = 20_000_000, 8
"""Most operations of one scan, in those of strict order; with many layers and micro-batches it is coarser instead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One search: a model, its micro-batches in rounds, devices, and how they dispatch."""

    costs: LayerCosts
    rounds: tuple[int, ...]
    num_devices: int
    open_slots: int
    """Slots a device may have open at once; 1 is strict slot order."""
    memory_cap_bytes: int | None = None
    fused: int | None = None
    """Layers of the fused slot where they are given; None to search them too."""

    @property
    def transfer_s(self) -> float:
        """Seconds of a transfer; on one device nothing is transferred."""
        return self.costs.transfer_s if self.num_devices > 1 else 0.0

    @property
    def ideal_s(self) -> float:
        """Makespan with no recomputation and no idle device."""
        return self.costs.useful_s * sum(self.rounds) / self.num_devices

    @property
    def setting(self) -> tuple[NDArray[np.int64], int, float, int, NDArray[np.float64]]:
        """Rounds, devices, transfer, open slots and `memory_3` as the compiled functions take them."""
        memory_3 = (self.memory_cap_bytes or 0, self.costs.boundary_bytes, self.costs.first_trained)
        rounds = np.array(self.rounds, np.int64)
        return rounds, self.num_devices, self.transfer_s, self.open_slots, np.array(memory_3, np.float64)

    @property
    def operation_cost(self) -> float:
        """What simulating one micro-batch in one slot takes, in those of strict order."""
        return 1.0 if self.open_slots == 1 else READY_COST * max(1.0, self.num_devices / 8)


def running_sums(costs: LayerCosts) -> NDArray[np.float64]:
    """Return sums over the first 0, 1, .. layers, [5, layers + 1]: forward, backward, weights, gradients, kept."""
    none = (0,) * costs.num_layers
    weights = costs.weight_bytes or none
    rows = (
        costs.forward_s, costs.backward_s, weights, costs.gradient_bytes or weights, costs.activation_bytes or none
    )  # fmt: skip
    return np.stack([np.concatenate([[0.0], np.cumsum(np.array(row, np.float64))]) for row in rows])


class Tables:
    """Partitions as the integers that the compiled functions read, for one problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.sums_5L = running_sums(problem.costs)

    def integers(self, partition: Slots) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return sizes (room for every layer twice) and shape."""
        given = (*partition.forward, *partition.backward)
        sizes = np.zeros(2 * self.problem.costs.num_layers + 1, np.int64)
        sizes[: len(given)] = given
        return sizes, np.array([len(partition.forward), len(partition.backward), partition.fused], np.int64)

    def makespan_s(self, partition: Slots) -> float:
        """Return the makespan."""
        return self._dispatch(partition, 0)[0]

    def order(self, partition: Slots) -> tuple[float, NDArray[np.int64]]:
        """Return the makespan and the dispatch, rows (device, global slot, micro-batch of the step)."""
        return self._dispatch(partition, partition.num_slots * sum(self.problem.rounds))

    def _dispatch(self, partition: Slots, num_rows: int) -> tuple[float, NDArray[np.int64]]:
        rounds, num_devices, transfer_s, open_slots, _ = self.problem.setting
        sizes, shape = self.integers(partition)
        num_slots = partition.num_slots
        table_S3, input_S = np.zeros((num_slots, 3)), np.zeros(num_slots, np.int64)
        fill_tables(sizes, shape, self.sums_5L[0], self.sums_5L[1], table_S3, input_S)
        done_SM = np.zeros((num_slots, rounds.sum()))
        order_O3 = np.zeros((num_rows, 3), np.int64)
        makespan_s = ready_makespan(
            num_slots, int(shape[0]), table_S3, input_S, rounds, num_devices, transfer_s, open_slots, done_SM, order_O3
        )
        return float(makespan_s), order_O3

    def peak(self, partition: Slots) -> int:
        """Return the most bytes of a device; 0 where the costs say nothing of bytes."""
        sizes, shape = self.integers(partition)
        rounds, num_devices, _, open_slots, memory_3 = self.problem.setting
        return int(peak_bytes(sizes, shape, self.sums_5L, rounds.size, num_devices, open_slots, memory_3))


def search(problem: Problem, start: Slots, *, seed: int, evaluations: int, hot: float) -> tuple[float, Slots]:
    """Return (makespan in seconds, partition) of the best found from `start`; over the cap, with a penalty.

    `hot` is the first temperature, in shares of the ideal makespan. The same arguments give the same result.
    """
    tables = Tables(problem)
    sizes, shape = tables.integers(start)
    best = anneal(
        seed % 2**32, evaluations, sizes, shape, tables.sums_5L, *problem.setting, problem.fused is None,
        hot * problem.ideal_s, COLD * problem.ideal_s,
    )  # fmt: skip
    a, b, fused = (int(x) for x in shape)
    numbers = [int(x) for x in sizes]
    return float(best), Slots(forward=tuple(numbers[:a]), fused=fused, backward=tuple(numbers[a : a + b]))


def even_cuts(problem: Problem, num: int) -> list[Slots]:
    """Return, for few fused layers, the best `num` of all even cuts and a coarse one."""
    fused = [problem.fused] if problem.fused else few_fused(problem)
    return [cut for f in fused for cut in _even_cuts(problem, f, num)]


def few_fused(problem: Problem) -> range:
    """Return the small numbers of fused layers."""
    return range(1, max(1, min(MOST_FUSED, problem.costs.num_layers - 1)) + 1)


def finest_cut(problem: Problem) -> Slots:
    """Return the cut into slots of one layer, with as few fused as can be: what a device holds at least."""
    fused = problem.fused or 1
    ones = (1,) * _body(problem, fused)
    return Slots(forward=ones, fused=fused, backward=ones)


def _body(problem: Problem, fused: int) -> int:
    """Return the number of layers that are not fused. Raises PlanError when there is none."""
    body = problem.costs.num_layers - fused
    if body < 1:
        raise PlanError(
            f"{problem.costs.num_layers} layers with {fused} fused leave nothing to deal to devices; "
            "give the layers one by one"
        )
    return body


def _even_cuts(problem: Problem, fused: int, num: int) -> list[Slots]:
    body = _body(problem, fused)
    affordable = math.isqrt(int(SCAN_OPS / (problem.operation_cost * sum(problem.rounds) * body)))
    num_counts = min(body, SCANNED[problem.open_slots == 1], max(SCANNED_AT_LEAST, affordable))
    spaced = np.arange(1, body + 1) if num_counts == body else np.geomspace(1, body, num_counts)
    counts = np.unique(spaced.round().astype(np.int64))
    energy_AB = scan_even(counts, fused, running_sums(problem.costs), *problem.setting)
    rows = np.argmin(energy_AB, axis=0)
    columns = np.argsort(energy_AB[rows, np.arange(counts.size)], kind="stable")[:num]
    coarse = (max(1, min(problem.num_devices, body // 3)), min(body, 2 * problem.num_devices))
    cuts = [(int(counts[rows[b]]), int(counts[b])) for b in columns] + [coarse]
    return [Slots(forward=even_sizes(body, a)[::-1], fused=fused, backward=even_sizes(body, b)) for a, b in cuts]
