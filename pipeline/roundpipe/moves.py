"""Moves of the partition search, compiled: each changes sizes and shape in place, or says that it does not apply.

`sizes` holds a forward sizes and then b backward ones; `shape` is (a, b, fused). A side is 0 (forward) or 1 (backward).
Every move keeps each slot at one layer or more and the fused slot at the head at least.
"""

from __future__ import annotations

import numpy as np

from pipeline.roundpipe.compiled import compiled


@compiled
def remove_slot(sizes, shape, index):
    """Take one entry out of `sizes`."""
    total = shape[0] + shape[1]
    for i in range(index, total - 1):
        sizes[i] = sizes[i + 1]
    shape[0 if index < shape[0] else 1] -= 1


@compiled
def shift_layer(sizes, low, count, neighbours):
    """Move one layer from a slot to another, adjacent or any, of the same side."""
    if count < 2:
        return False
    i = np.random.randint(count)
    j = np.random.randint(count)
    if neighbours:
        j = i + 1 if np.random.random() < 0.5 else i - 1
    if j < 0 or j >= count or i == j or sizes[low + i] < 2:
        return False
    sizes[low + i] -= 1
    sizes[low + j] += 1
    return True


@compiled
def swap_slots(sizes, low, count):
    """Exchange the sizes of two slots of a side."""
    if count < 2:
        return False
    i, j = low + np.random.randint(count), low + np.random.randint(count)
    if sizes[i] == sizes[j]:
        return False
    sizes[i], sizes[j] = sizes[j], sizes[i]
    return True


@compiled
def split_slot(sizes, shape, side, low, count):
    """Cut a slot in two."""
    if count < 1:
        return False
    index = low + np.random.randint(count)
    if sizes[index] < 2:
        return False
    first = 1 + np.random.randint(sizes[index] - 1)
    for i in range(shape[0] + shape[1], index, -1):
        sizes[i] = sizes[i - 1]
    sizes[index + 1] = sizes[index] - first
    sizes[index] = first
    shape[side] += 1
    return True


@compiled
def merge_slots(sizes, shape, low, count):
    """Make one slot of two neighbours."""
    if count < 2:
        return False
    index = low + np.random.randint(count - 1)
    sizes[index] += sizes[index + 1]
    remove_slot(sizes, shape, index + 1)
    return True


@compiled
def recut(sizes, shape):
    """Cut a slot in two and make one of two others, of any side: all other slots stay on their devices."""
    side = np.random.randint(2)
    low, count = (0, shape[0]) if side == 0 else (shape[0], shape[1])
    if not split_slot(sizes, shape, side, low, count):
        return False
    side = np.random.randint(2)
    low, count = (0, shape[0]) if side == 0 else (shape[0], shape[1])
    return merge_slots(sizes, shape, low, count)


@compiled
def change_fused(sizes, shape):
    """Let the fused slot take the last layer of the others, or give one back."""
    a, b, fused = shape
    if a == 0:
        return False
    if np.random.random() < 0.5:
        if fused == 1:
            return False
        sizes[a - 1] += 1
        sizes[a] += 1
        shape[2] -= 1
        return True
    if (sizes[a - 1] < 2 and a < 2) or (sizes[a] < 2 and b < 2):
        return False
    for index in (a, a - 1):
        if sizes[index] < 2:
            remove_slot(sizes, shape, index)
        else:
            sizes[index] -= 1
    shape[2] += 1
    return True


@compiled
def propose(sizes, shape, free_fused):
    """Apply one random move; False where the drawn one does not apply."""
    side = np.random.randint(2)
    low, count = (0, shape[0]) if side == 0 else (shape[0], shape[1])
    draw = np.random.random()
    if draw < 0.24:
        return shift_layer(sizes, low, count, True)
    if draw < 0.34:
        return shift_layer(sizes, low, count, False)
    if draw < 0.48:
        return swap_slots(sizes, low, count)
    if draw < 0.68:
        return recut(sizes, shape)
    if draw < 0.80:
        return split_slot(sizes, shape, side, low, count)
    if draw < 0.92:
        return merge_slots(sizes, shape, low, count)
    return free_fused and change_fused(sizes, shape)
