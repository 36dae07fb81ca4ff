"""Synthetic lengths of sequences, for tests and benchmarks, named after the data they imitate.

Each function draws `num` lengths in tokens (int64 [num], at least 1); equal arguments give equal lengths. The fits are
coarse: what matters is the shape of the tail and where the tokens are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Lengths = NDArray[np.int64]


def llama3_sft(num: int, *, seed: int) -> Lengths:
    """Mixture of Llama 3's fine-tuning data: five short kinds, and 0.11% of long ones that hold 5% of the tokens."""
    share = np.array([0.5266, 0.1489, 0.0301, 0.0814, 0.2119, 0.0011])
    mean = np.array([974, 753, 521, 298, 662, 38136])
    random = np.random.default_rng(seed)
    kind = random.choice(len(share), size=num, p=share / share.sum())
    sigma = 0.6
    drawn = random.lognormal(np.log(mean[kind]) - sigma**2 / 2, sigma)
    return _as_lengths(drawn, longest=131_072)


def lmsys(num: int, *, seed: int) -> Lengths:
    """Chat logs: 90.5% under 1K, 99.54% under 4K, 99.91% under 8K, 99.987% under 32K, the longest 303K."""
    quantile = [0.0, 0.905, 0.9954, 0.9991, 0.99987, 0.99996, 1.0]
    length = [16, 1024, 4096, 8192, 32_768, 131_072, 303_000]
    uniform = np.random.default_rng(seed).random(num)
    return _as_lengths(np.exp(np.interp(uniform, quantile, np.log(length))), longest=303_000)


def bimodal(num: int, *, seed: int) -> Lengths:
    """Two hills, below 16K and at 24K to 32K, with a few over 32K."""
    edge = np.array([0, 4, 8, 16, 24, 32, 64]) * 1024
    count = np.array([1144, 1103, 2245, 990, 3661, 196])
    random = np.random.default_rng(seed)
    hill = random.choice(len(count), size=num, p=count / count.sum())
    return _as_lengths(random.uniform(edge[hill], edge[hill + 1]), longest=65_536)


def giants(num: int, *, seed: int) -> Lengths:
    """80% up to 4K, the others up to 16K, but for 0.05% giants (about 930K tokens each) that hold 12% of the tokens."""
    random = np.random.default_rng(seed)
    kind = random.choice(3, size=num, p=[0.8, 0.1995, 0.0005])
    short = random.uniform(1, 4096, num)
    middle = np.exp(random.uniform(np.log(4096), np.log(16_384), num))
    giant = random.uniform(0.8, 1.2, num) * 930_000
    return _as_lengths(np.choose(kind, [short, middle, giant]), longest=1_200_000)


DISTRIBUTIONS: dict[str, Callable[..., Lengths]] = {
    "llama3_sft": llama3_sft,
    "lmsys": lmsys,
    "bimodal": bimodal,
    "giants": giants,
}


def _as_lengths(drawn: NDArray[np.float64], *, longest: int) -> Lengths:
    return np.clip(np.ceil(drawn), 1, longest).astype(np.int64)
