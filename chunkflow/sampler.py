"""Which samples an optimizer step trains: a function of integers, and of nothing else.

An epoch is a bijection of [0, num_samples), computed place by place: a Feistel network over the next power of four,
walked along its cycle until it lands inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). So no
permutation is stored, any step is found at once, and neither world size nor packing nor resuming can change a step.
numpy's own shuffles would do neither, and may change between releases of numpy.
"""

from __future__ import annotations

import numpy as np

from chunkflow.errors import PlanError

_ROUNDS = 8
# Below 256 places a Feistel network has too few round functions to look shuffled.
_MIN_HALF_BITS = 4
_MASK_64 = (1 << 64) - 1


def steps_per_epoch(num_samples: int, global_batch: int) -> int:
    """Return the optimizer steps that visit every sample once; the last may be smaller."""
    if global_batch < 1:
        raise PlanError(f"global_batch is {global_batch}; it must be at least 1, the samples of one optimizer step")
    if num_samples < 1:
        raise PlanError("there are 0 samples; a step needs at least one")
    return -(-num_samples // global_batch)


def global_batch(seed: int, epoch: int, step_in_epoch: int, *, num_samples: int, global_batch: int) -> np.ndarray:
    """Return the samples of one step in drawing order: int64 [global_batch], fewer in an epoch's last step.

    Raises PlanError when the epoch has no such step.
    """
    num_steps = steps_per_epoch(num_samples, global_batch)
    if not 0 <= step_in_epoch < num_steps or epoch < 0:
        raise PlanError(
            f"there is no step {step_in_epoch} in epoch {epoch}; {num_samples} samples in batches of {global_batch} "
            f"make steps 0 to {num_steps - 1} of epochs 0 and up"
        )
    first = step_in_epoch * global_batch
    places = np.arange(first, min(first + global_batch, num_samples), dtype=np.uint64)
    return permute(places, num_samples=num_samples, keys=_round_keys(seed, epoch)).astype(np.int64)


def permute(places: np.ndarray, *, num_samples: int, keys: np.ndarray) -> np.ndarray:
    """Map places uint64 [P] of [0, num_samples) to samples uint64 [P], one to one."""
    half_bits = max(_MIN_HALF_BITS, -(-max(num_samples - 1, 1).bit_length() // 2))
    if half_bits == _MIN_HALF_BITS:
        # A walk from 256 down to a few takes many turns; the whole table is cheaper.
        table = _feistel(np.arange(4**half_bits, dtype=np.uint64), half_bits=half_bits, keys=keys)
        return table[table < num_samples][places]
    out = _feistel(places, half_bits=half_bits, keys=keys)
    outside = np.flatnonzero(out >= num_samples)
    # Ends: each walk starts inside [0, num_samples), and its cycle comes back there.
    while outside.size:
        out[outside] = _feistel(out[outside], half_bits=half_bits, keys=keys)
        outside = outside[out[outside] >= num_samples]
    return out


def _feistel(x: np.ndarray, *, half_bits: int, keys: np.ndarray) -> np.ndarray:
    """Permute uint64 [P] values of [0, 4 ** half_bits)."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = x >> shift, x & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """Return the splitmix64 finalizer of uint64 [P] values, wrapping as C does."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    """Return uint64 [rounds] keys; seeds count modulo 2 ** 64, and negative ones are fine."""
    # Mixed twice, so that (seed, epoch + 1) and (seed + 1, epoch) share nothing.
    base = _mix(np.array([seed & _MASK_64], dtype=np.uint64)) + np.uint64(epoch & _MASK_64)
    steps = np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return _mix(_mix(base) + steps)
