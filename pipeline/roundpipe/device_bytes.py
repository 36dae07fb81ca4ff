"""What a partition needs on a device, compiled: the bytes that the runtime's arena counts, at their most.

A device has some slots open, whose weights stay, and of those that run backward the gradients; besides them one
micro-batch of one slot passes through at a time, and the weights of the next slot come ahead of their time.

`memory_3` holds the cap (0: none), the bytes between two layers, and the layers in front that lose their backward;
the rest as in `anneal`.
"""

from __future__ import annotations

import numpy as np

from pipeline.roundpipe.compiled import compiled


@compiled
def _forward_bytes(sizes, shape, sums_5L, memory_3, weight_S, passing_S):
    """Fill the forward slots: their weights; the input and what they hand on, to backward slots that begin in them too.

    The rows that an embedding reads are gone before its output counts, and are no more than that.
    """
    position = 0
    for s in range(shape[0]):
        low, high = position, position + sizes[s]
        weight_S[s] = sums_5L[2, high] - sums_5L[2, low]
        passing_S[s] = memory_3[1] * (2.0 if low > 0 else 1.0)
        position = high
    slot, end, low, first_trained = shape[0] - 1, position, position, int(memory_3[2])
    for i in range(shape[1]):
        if low <= first_trained:
            break
        low = max(low - sizes[shape[0] + i], first_trained)
        while slot >= 0 and end - sizes[slot] >= low:
            end -= sizes[slot]
            slot -= 1
        if slot >= 0 and end - sizes[slot] < low < end:
            passing_S[slot] += memory_3[1]


@compiled
def _slot_bytes(sizes, shape, sums_5L, memory_3, weight_S, held_S, passing_S):
    """Fill, by slot, weights; these and gradients; and what passes through. Return how many slots there are."""
    a, b, fused = shape
    num_layers, first_trained, boundary = sums_5L.shape[1] - 1, int(memory_3[2]), memory_3[1]
    _forward_bytes(sizes, shape, sums_5L, memory_3, weight_S, passing_S)
    held_S[:a] = weight_S[:a]
    high, low = num_layers, num_layers - fused
    for s in range(a, a + 1 + b):
        if s > a:
            high, low = low, max(low - sizes[s - 1], first_trained)
            if high <= first_trained:
                return s
        weight_S[s] = sums_5L[2, high] - sums_5L[2, low]
        held_S[s] = weight_S[s] + sums_5L[3, high] - sums_5L[3, low]
        # The graph, with the input in it; then the gradient of the input in its place.
        passing_S[s] = max(sums_5L[4, high] - sums_5L[4, low], 2 * boundary if low > 0 else 0.0)
        if s > a:
            passing_S[s] += boundary  # the gradient of the output
    return a + 1 + b


@compiled
def peak_bytes(sizes, shape, sums_5L, num_rounds, num_devices, open_slots, memory_3):
    """Return the most bytes a device needs: of its open slots, and the weights of the next."""
    most = shape[0] + 1 + shape[1]
    weight_S, held_S, passing_S = np.zeros(most), np.zeros(most), np.zeros(most)
    num_slots = _slot_bytes(sizes, shape, sums_5L, memory_3, weight_S, held_S, passing_S)
    peak = 0.0
    for s in range(num_slots):
        held = passing = 0.0
        for k in range(open_slots):
            other = s + k * num_devices
            if num_rounds == 1 and other >= num_slots:  # a step ends before the next begins
                break
            held += held_S[other % num_slots]
            passing = max(passing, passing_S[other % num_slots])
        peak = max(peak, held + passing + weight_S[(s + open_slots * num_devices) % num_slots])
    return peak
