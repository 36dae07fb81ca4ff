"""The compiled loops of the search: the energy of a partition, a scan of even cuts, simulated annealing.

`sizes` holds a forward slot sizes and then b backward ones, `shape` is (a, b, fused), `sums_4L` running sums over
layers of forward seconds, backward seconds, weight bytes and activation bytes. `cap_bytes` 0 means no cap.

Compiled code is kept by the file that a function is in: a change in `moves` or `slot_sim` needs one here, or what was
compiled before is used.
"""

from __future__ import annotations

import numpy as np

from pipeline.roundpipe.compiled import compiled
from pipeline.roundpipe.moves import propose
from pipeline.roundpipe.slot_sim import fill_tables, ready_makespan, strict_makespan

OVER_CAP = 1e6
"""What one whole cap of bytes too many costs, in makespans: far more than any schedule gains."""


@compiled
def peak_bytes(sizes, shape, sums_4L, num_devices, open_slots):
    """Return the most bytes a device needs: its open slots' weights, gradients, one micro-batch, the next weights."""
    num_forward, num_layers = shape[0], sums_4L.shape[1] - 1
    num_slots = shape[0] + 1 + shape[1]
    weight_S, all_S = np.zeros(num_slots), np.zeros(num_slots)
    position = 0
    for s in range(num_slots):
        if s < num_forward:
            low, high = position, position + sizes[s]
            position = high
        elif s == num_forward:
            low, high = num_layers - shape[2], num_layers
        else:
            low, high = position - sizes[s - 1], position
            position = low
        weight_S[s] = sums_4L[2, high] - sums_4L[2, low]
        all_S[s] = weight_S[s] + sums_4L[3, high] - sums_4L[3, low]
        if s >= num_forward:
            all_S[s] += weight_S[s]
    peak = 0.0
    for s in range(num_slots):
        need = weight_S[(s + open_slots * num_devices) % num_slots]
        for k in range(open_slots):
            need += all_S[(s + k * num_devices) % num_slots]
        peak = max(peak, need)
    return peak


@compiled
def energy(
    sizes, shape, sums_4L, rounds, num_devices, transfer_s, open_slots, cap_bytes, table_S3, input_S, done_SM, free_N
):
    """Return the makespan, plus a penalty for every byte over the cap. The last four are scratch."""
    num_slots = fill_tables(sizes, shape, sums_4L[0], sums_4L[1], table_S3, input_S)
    if open_slots == 1:
        t = strict_makespan(num_slots, shape[0], table_S3, input_S, rounds, num_devices, transfer_s, done_SM, free_N)
    else:
        none = np.zeros((0, 3), np.int64)
        t = ready_makespan(
            num_slots, shape[0], table_S3, input_S, rounds, num_devices, transfer_s, open_slots, done_SM, none
        )
    if cap_bytes > 0:
        peak = peak_bytes(sizes, shape, sums_4L, num_devices, open_slots)
        if peak > cap_bytes:
            t *= 1.0 + OVER_CAP * (peak - cap_bytes) / cap_bytes
    return t


@compiled
def scan_even(counts, fused, sums_4L, rounds, num_devices, transfer_s, open_slots, cap_bytes):
    """Return the energy of even cuts into counts[i] forward and counts[j] backward slots, [i, j]."""
    body = sums_4L.shape[1] - 1 - fused
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
                sizes, shape, sums_4L, rounds, num_devices, transfer_s, open_slots, cap_bytes,
                table_S3, input_S, done_SM, free_N,
            )  # fmt: skip
    return energy_AB


@compiled
def anneal(
    seed, evaluations, sizes, shape, sums_4L, rounds, num_devices, transfer_s, open_slots, cap_bytes,
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
            new, new_shape, sums_4L, rounds, num_devices, transfer_s, open_slots, cap_bytes,
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
