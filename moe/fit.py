"""From measured times to a cost: a line with no negative part, or a monotone table where no line fits.

Plain least squares gave a negative alpha, and weighs a 100 ms point as ten thousand 1 ms ones; here errors are
relative, outliers count less (Huber), and neither alpha nor beta is below zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe.cost import Cost, Line, Table
from moe.errors import PlanError

RESIDUAL_LIMIT = 0.25
"""Largest relative residual a line may have; over it the table is used."""
HUBER = 0.05
"""Relative error beyond which a point counts linearly."""
ROUNDS = 20


def fit_cost(sizes: Sequence[float], times_s: Sequence[float]) -> tuple[Cost, float]:
    """Return the cost through these points and the largest relative residual of the line.

    Raises PlanError for fewer than two sizes, or times that are not above zero.
    """
    n, t = np.asarray(sizes, dtype=float), np.asarray(times_s, dtype=float)
    if n.shape != t.shape or len(np.unique(n)) < 2:
        raise PlanError(
            f"{len(np.unique(n))} sizes and {len(t)} times; a fit needs two sizes and a time for each point"
        )
    if not (np.all(np.isfinite(t)) and np.all(t > 0)):
        raise PlanError(f"times {t.tolist()} are not all above zero; measure again")
    line = fit_line(n, t)
    residual = float(np.max(np.abs((line.alpha_s + line.beta_s * n) / t - 1)))
    return (line if residual <= RESIDUAL_LIMIT else monotone_table(n, t)), residual


def fit_line(n: np.ndarray, t: np.ndarray) -> Line:
    """Minimise the Huber loss of alpha/t + beta*n/t - 1 over alpha, beta >= 0, by reweighting."""
    weights = np.ones_like(t)
    alpha = beta = 0.0
    for _ in range(ROUNDS):
        alpha, beta = nonnegative(weights / t, weights * n / t, weights)
        error = np.abs((alpha + beta * n) / t - 1)
        weights = np.sqrt(HUBER / np.maximum(error, HUBER))
    return Line(float(alpha), float(beta))


def monotone_table(n: np.ndarray, t: np.ndarray) -> Table:
    """Return the table of medians by size, made non-decreasing by pooling neighbours that violate it."""
    pools: list[tuple[float, list[float]]] = []  # mean time, sizes
    for size in np.unique(n):
        pools.append((float(np.median(t[n == size])), [float(size)]))
        while len(pools) > 1 and pools[-1][0] < pools[-2][0]:
            (t1, s1), (t0, s0) = pools.pop(), pools.pop()
            pools.append(((t0 * len(s0) + t1 * len(s1)) / (len(s0) + len(s1)), s0 + s1))
    return Table(tuple(s for _, sizes in pools for s in sizes), tuple(time for time, sizes in pools for _ in sizes))


def nonnegative(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> tuple[float, float]:
    """Return a, b >= 0 that minimise |a x + b y - z|: the free solution, or the better edge."""
    xx, yy, xy, xz, yz = x @ x, y @ y, x @ y, x @ z, y @ z
    determinant = xx * yy - xy * xy
    if determinant > 1e-14 * xx * yy:
        a, b = (xz * yy - yz * xy) / determinant, (yz * xx - xz * xy) / determinant
        if a >= 0 and b >= 0:
            return float(a), float(b)
    edges = [(max(float(xz / xx), 0.0), 0.0), (0.0, max(float(yz / yy), 0.0))]
    return min(edges, key=lambda ab: float(np.sum((ab[0] * x + ab[1] * y - z) ** 2)))
