"""Exact event simulation of slots, compiled: the inner loop of the planner's search.

Times are seconds; S slots, N devices, a forward slots. `fill_tables` turns a partition (as integers) into tables of one
row a slot; `strict_makespan` and `ready_makespan` run them.

Strict: a device finishes a slot before it opens the next, and waits where a micro-batch is late. Ready-first: of the
first unfinished slot and those right behind it, `open_slots` together, it takes, each time it is free, the lowest whose
next micro-batch can start now, else the one that can start first. Within a slot micro-batches keep their order.

Dependencies: forward slots chain per micro-batch; the fused slot waits on the last forward; a backward slot waits on
the gradient of the slot before and its recomputation on the forward slot that stored its input, both a transfer later.
The recomputation may start before the gradient arrives.
"""

from __future__ import annotations

import numpy as np

from pipeline.roundpipe.compiled import compiled

FORWARD, RECOMPUTE, BACKWARD = 0, 1, 2
"""Columns of a slot table."""


@compiled
def fill_tables(sizes, shape, forward_sum, backward_sum, table_S3, input_S):
    """Fill per-slot seconds and input slots; sizes are a forward then b backward ones; return S.

    `shape` holds (a, b, fused); `forward_sum` and `backward_sum` are running sums over layers, starting at 0.
    """
    a, b, fused = shape
    num_layers = forward_sum.size - 1
    low = 0
    for i in range(a):
        high = low + sizes[i]
        table_S3[i, 0] = forward_sum[high] - forward_sum[low]
        table_S3[i, 1] = 0.0
        table_S3[i, 2] = 0.0
        input_S[i] = i - 1
        low = high
    table_S3[a, 0] = forward_sum[num_layers] - forward_sum[num_layers - fused]
    table_S3[a, 1] = 0.0
    table_S3[a, 2] = backward_sum[num_layers] - backward_sum[num_layers - fused]
    input_S[a] = a - 1
    high = num_layers - fused
    slot, end = a - 1, high
    for i in range(b):
        low = high - sizes[a + i]
        s = a + 1 + i
        table_S3[s, 0] = 0.0
        table_S3[s, 1] = forward_sum[high] - forward_sum[low]
        table_S3[s, 2] = backward_sum[high] - backward_sum[low]
        while slot >= 0 and end - sizes[slot] >= low:
            end -= sizes[slot]
            slot -= 1
        input_S[s] = slot if low > 0 else -1
        high = low
    return a + 1 + b


@compiled
def strict_makespan(num_slots, num_forward, table_S3, input_S, rounds, num_devices, transfer_s, done_SM, free_N):
    """Return the makespan in strict slot order. `done_SM` and `free_N` are scratch."""
    free_N[:] = 0.0
    makespan = 0.0
    cursor = 0
    for r in range(rounds.size):
        for s in range(num_slots):
            device = cursor % num_devices
            t = free_N[device]
            before, after = table_S3[s, 0] + table_S3[s, 1], table_S3[s, 2]
            backward = s > num_forward
            source = input_S[s]
            for m in range(rounds[r]):
                if source >= 0:
                    t = max(t, done_SM[source, m])
                t += before
                if backward:
                    t = max(t, done_SM[s - 1, m])
                t += after
                done_SM[s, m] = t + transfer_s
            free_N[device] = t
            makespan = max(makespan, t)
            cursor += 1
    return makespan


@compiled
def _micro_batches(num_slots, rounds):
    """Return, for every global slot, its slot, its first micro-batch and the one after its last."""
    num_global = rounds.size * num_slots
    slot_G, next_G, end_G = (
        np.zeros(num_global, np.int64),
        np.zeros(num_global, np.int64),
        np.zeros(num_global, np.int64),
    )
    first = 0
    for r in range(rounds.size):
        for s in range(num_slots):
            g = r * num_slots + s
            slot_G[g], next_G[g], end_G[g] = s, first, first + rounds[r]
        first += rounds[r]
    return slot_G, next_G, end_G


@compiled
def ready_makespan(
    num_slots, num_forward, table_S3, input_S, rounds, num_devices, transfer_s, open_slots, done_SM, order_O3
):
    """Return the makespan of ready-first dispatch; write the dispatch, rows (device, global slot, micro-batch).

    `done_SM` is scratch; `order_O3` has one row an operation, or none where the order is of no interest.
    """
    num_global = rounds.size * num_slots
    slot_G, next_G, end_G = _micro_batches(num_slots, rounds)
    done_SM[:num_slots, :] = np.inf
    first_N, free_N = np.arange(num_devices), np.zeros(num_devices)
    start_N, pick_N = np.full(num_devices, np.inf), np.zeros(num_devices, np.int64)
    start_N[0] = 0.0
    makespan = 0.0
    for op in range(num_slots * rounds.sum()):
        device = np.argmin(start_N)
        g = pick_N[device]
        s, m = slot_G[g], next_G[g]
        end = start_N[device] + table_S3[s, 0] + table_S3[s, 1] + table_S3[s, 2]
        done_SM[s, m] = end + transfer_s
        free_N[device] = end
        makespan = max(makespan, end)
        next_G[g] += 1
        if order_O3.shape[0] > 0:
            order_O3[op, 0], order_O3[op, 1], order_O3[op, 2] = device, g, m
        # Only this device and the one of the next slot have something new to choose from.
        for d in (device, (device + 1) % num_devices):
            while first_N[d] < num_global and next_G[first_N[d]] == end_G[first_N[d]]:
                first_N[d] += num_devices
            start_N[d] = np.inf
            for g in range(first_N[d], min(num_global, first_N[d] + open_slots * num_devices), num_devices):
                if next_G[g] < end_G[g]:
                    s, m = slot_G[g], next_G[g]
                    start = free_N[d]
                    if input_S[s] >= 0:
                        start = max(start, done_SM[input_S[s], m])
                    if s > num_forward:
                        start = max(start, done_SM[s - 1, m] - table_S3[s, 1])
                    if start < start_N[d]:
                        start_N[d], pick_N[d] = start, g
    return makespan
