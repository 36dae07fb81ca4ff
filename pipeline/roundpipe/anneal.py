"""The compiled loops of the search: the energy of a partition, a scan of even cuts, simulated annealing.

`sizes` holds a forward slot sizes and then b backward ones, `shape` is (a, b, fused), `sums_5L` running sums over
layers of forward seconds, backward seconds, weight bytes, gradient bytes and activation bytes; `memory_3` is that of
`device_bytes`.

Compiled code is kept by the file that a function is in: a change in `moves`, `slot_sim` or `device_bytes` needs one
here, or what was compiled before is used.
"""

from __future__ import annotations

import numpy as np

from pipeline.roundpipe.compiled import compiled
from pipeline.roundpipe.device_bytes import peak_bytes
from pipeline.roundpipe.moves import propose
from pipeline.roundpipe.slot_sim import fill_tables, ready_makespan, strict_makespan

OVER_CAP = 1e6
"""What one whole cap of bytes too many costs, in makespans; the first byte costs more than any schedule takes."""


@compiled
def longest_s(sums_5L, rounds, transfer_s):
    """Return seconds that no schedule takes: all operations of the finest cut one by one, each after a transfer."""
    num_layers = sums_5L.shape[1] - 1
    return rounds.sum() * (
        2 * sums_5L[0, num_layers] + sums_5L[1, num_layers] + (2 * num_layers + 1) * transfer_s
    )  # fmt: skip


@compiled
def energy(
    sizes, shape, sums_5L, rounds, num_devices, transfer_s, open_slots, memory_3, table_S3, input_S, done_SM, free_N
):
    """Return the makespan, plus a penalty for every byte over the cap. The last four are scratch."""
    num_slots = fill_tables(sizes, shape, sums_5L[0], sums_5L[1], table_S3, input_S)
    if open_slots == 1:
        t = strict_makespan(num_slots, shape[0], table_S3, input_S, rounds, num_devices, transfer_s, done_SM, free_N)
    else:
        none = np.zeros((0, 3), np.int64)
        t = ready_makespan(
            num_slots, shape[0], table_S3, input_S, rounds, num_devices, transfer_s, open_slots, done_SM, none
        )
    if memory_3[0] > 0:
        over = peak_bytes(sizes, shape, sums_5L, rounds.size, num_devices, open_slots, memory_3) / memory_3[0] - 1.0
        if over > 0:
            t += t * OVER_CAP * over + 2 * longest_s(sums_5L, rounds, transfer_s)
    return t


@compiled
def scan_even(counts, fused, sums_5L, rounds, num_devices, transfer_s, open_slots, memory_3):
    """Return the energy of even cuts into counts[i] forward and counts[j] backward slots, [i, j]."""
    body = sums_5L.shape[1] - 1 - fused
    energy_AB = np.zeros((counts.size, counts.size))
    sizes, shape = np.zeros(2 * body + 2, np.int64), np.zeros(3, np.int64)
    table_S3, input_S = np.zeros((2 * body + 3, 3)), np.zeros(2 * body + 3, np.int64)
    done_SM, free_N = np.zeros((2 * body + 3, rounds.sum())), np.zeros(num_devices)
    for row, a in enumerate(counts):
        for i in range(a):
            # The early forward slots fill the pipeline: the smaller ones come first.
            sizes[i] = body // a + (1 if i >= a - body % a else 0)
        for column, b in enumerate(counts):
            for i in range(b):
                sizes[a + i] = body // b + (1 if i < body % b else 0)
            shape[0], shape[1], shape[2] = a, b, fused
            energy_AB[row, column] = energy(
                sizes, shape, sums_5L, rounds, num_devices, transfer_s, open_slots, memory_3,
                table_S3, input_S, done_SM, free_N,
            )  # fmt: skip
    return energy_AB


@compiled
def anneal(
    seed, evaluations, sizes, shape, sums_5L, rounds, num_devices, transfer_s, open_slots, memory_3,
    free_fused, hot, cold,
):  # fmt: skip
    """Improve `sizes` and `shape` in place; return the best energy found. Temperatures are seconds."""
    np.random.seed(seed)
    most = sizes.size + 1
    table_S3, input_S = np.zeros((most, 3)), np.zeros(most, np.int64)
    done_SM, free_N = np.zeros((most, rounds.sum())), np.zeros(num_devices)
    now, now_shape = sizes.copy(), shape.copy()
    new, new_shape = sizes.copy(), shape.copy()
    now_e, best = np.inf, np.inf
    for step in range(evaluations + 1):
        new[:], new_shape[:] = now, now_shape
        if step > 0 and not propose(new, new_shape, free_fused):
            continue
        e = energy(
            new, new_shape, sums_5L, rounds, num_devices, transfer_s, open_slots, memory_3,
            table_S3, input_S, done_SM, free_N,
        )  # fmt: skip
        temperature = hot * (cold / hot) ** (step / (evaluations + 1))
        if e <= now_e or np.random.random() < np.exp((now_e - e) / temperature):
            now_e = e
            now[:], now_shape[:] = new, new_shape
            if e < best:
                best = e
                sizes[:], shape[:] = now, now_shape
    return best
