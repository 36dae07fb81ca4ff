"""The order of an epoch is a bijection of integers, and a function of nothing else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkflow.errors import PlanError
from chunkflow.sampler import global_batch, steps_per_epoch


def epoch_order(seed, epoch, num_samples, batch):
    steps = range(steps_per_epoch(num_samples, batch))
    return np.concatenate(
        [global_batch(seed, epoch, step, num_samples=num_samples, global_batch=batch) for step in steps]
    )


@settings(max_examples=100, deadline=None)
@given(
    num_samples=st.integers(1, 3000),
    batch=st.integers(1, 4000),
    seed=st.integers(-(2**70), 2**70),
    epoch=st.integers(0, 2**40),
)
def test_every_epoch_visits_every_sample_once(num_samples, batch, seed, epoch):
    batch = max(batch, num_samples // 50 + 1)  # few steps: the test is of the order, not of patience
    order = epoch_order(seed, epoch, num_samples, batch)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(num_samples))


@pytest.mark.parametrize("num_samples", [*range(1, 40), 255, 256, 257, 1023, 1024, 1025, 4096, 4097, 65536, 65537])
def test_bijection_at_the_borders_of_the_domain(num_samples):
    assert np.array_equal(np.sort(epoch_order(3, 1, num_samples, num_samples)), np.arange(num_samples))


@given(batch=st.integers(1, 300), other=st.integers(1, 300))
@settings(max_examples=30, deadline=None)
def test_the_order_does_not_depend_on_the_batch(batch, other):
    assert np.array_equal(epoch_order(5, 2, 300, batch), epoch_order(5, 2, 300, other))


def test_seeds_and_epochs_differ():
    orders = {tuple(epoch_order(seed, epoch, 100, 100)) for seed in range(-3, 7) for epoch in range(10)}
    assert len(orders) == 100


def test_huge_epochs_need_no_permutation():
    batch = global_batch(1, 0, 123_456_789, num_samples=10**12, global_batch=64)
    assert len(set(batch.tolist())) == 64
    assert batch.min() >= 0
    assert batch.max() < 10**12


@pytest.mark.parametrize("num_samples", [2, 3, 5, 8, 20])
def test_each_sample_comes_first_equally_often(num_samples):
    num_epochs = 2000
    first = [global_batch(0, e, 0, num_samples=num_samples, global_batch=1)[0] for e in range(num_epochs)]
    counts = np.bincount(first, minlength=num_samples)
    expected = num_epochs / num_samples
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    # Mean num_samples - 1; a fixed sequence, so this either always holds or never.
    assert chi2 < (num_samples - 1) + 5 * np.sqrt(2 * (num_samples - 1))


def test_neighbours_are_spread_like_a_shuffle():
    order = epoch_order(9, 0, 10_000, 10_000)
    gaps = np.abs(np.diff(order))
    assert abs(gaps.mean() - 10_000 / 3) < 100
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.03


def test_no_such_step():
    with pytest.raises(PlanError, match=r"no step 3 in epoch 0; 10 samples in batches of 4 make steps 0 to 2"):
        global_batch(0, 0, 3, num_samples=10, global_batch=4)
    with pytest.raises(PlanError, match="global_batch is 0"):
        steps_per_epoch(10, 0)
    with pytest.raises(PlanError, match="0 samples"):
        steps_per_epoch(0, 4)
