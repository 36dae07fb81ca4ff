"""Fits: exact lines, noise, no negative parts, and the table where no line fits."""

import numpy as np
import pytest

from moe.cost import Line, Table
from moe.errors import PlanError
from moe.fit import RESIDUAL_LIMIT, fit_cost, monotone_table

SIZES = np.geomspace(2**16, 2**23, 8)


def test_a_line_is_found_exactly():
    cost, residual = fit_cost(SIZES, 1e-3 + SIZES * 2e-8)
    assert isinstance(cost, Line)
    assert (cost.alpha_s, cost.beta_s) == (pytest.approx(1e-3), pytest.approx(2e-8))
    assert residual < 1e-9


def test_alpha_and_beta_are_never_negative():
    bent = SIZES * 2e-8 - 1e-3  # plain least squares: alpha = -1 ms
    cost, _ = fit_cost(SIZES[4:], bent[4:])
    assert isinstance(cost, Line)
    assert cost.alpha_s == 0
    falling, residual = fit_cost([1e5, 1e6], [1.0, 0.9])
    assert isinstance(falling, Line)
    assert falling.beta_s == 0
    assert residual < 0.06


def test_noise_and_one_outlier_move_it_little():
    rng = np.random.default_rng(0)
    times = (1e-3 + SIZES * 2e-8) * np.exp(rng.normal(0, 0.02, len(SIZES)))
    times[3] *= 1.24
    cost, residual = fit_cost(SIZES, times)
    assert isinstance(cost, Line)
    assert cost.beta_s == pytest.approx(2e-8, rel=0.05)
    assert cost.alpha_s == pytest.approx(1e-3, rel=0.2)
    assert 0.1 < residual < RESIDUAL_LIMIT


def test_steps_become_a_monotone_table():
    times = np.where(SIZES < 5e5, 1e-3, 2e-2)
    cost, residual = fit_cost(SIZES, times)
    assert residual > RESIDUAL_LIMIT
    assert isinstance(cost, Table)
    assert [cost(n) for n in SIZES] == pytest.approx(times.tolist())


def test_a_table_pools_what_falls():
    table = monotone_table(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 5.0, 3.0, 8.0]))
    assert table.times_s == (1.0, 4.0, 4.0, 8.0)


@pytest.mark.parametrize(("sizes", "times"), [([1, 1], [1, 2]), ([1, 2], [1]), ([1, 2], [0, 1]), ([1, 2], [1, np.nan])])
def test_what_cannot_be_fitted_is_refused(sizes, times):
    with pytest.raises(PlanError, match=r"a fit needs two sizes|not all above zero"):
        fit_cost(sizes, times)
