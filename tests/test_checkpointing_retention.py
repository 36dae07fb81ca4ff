"""Which checkpoints may go."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointing import CheckpointError, KeepLast
from checkpointing.retention import plan_pruning

steps = st.sets(st.integers(0, 200), max_size=12)


@given(st.integers(1, 5), steps, steps)
def test_the_newest_good_ones_stay(count, intact, known_bad):
    saved = max(intact, default=0)
    known_bad = known_bad - {saved}
    gone = set(plan_pruning(KeepLast(count), intact, known_bad, saved=saved))
    good = intact - known_bad
    assert gone <= intact
    assert sorted(good - gone) == sorted(good)[-count:]


@given(st.integers(1, 5), steps.filter(bool), st.data())
def test_the_one_just_saved_stays_wherever_it_stands(count, intact, data):
    saved = data.draw(st.sampled_from(sorted(intact)))
    gone = set(plan_pruning(KeepLast(count), intact, set(), saved=saved))
    assert intact - gone == {*sorted(intact)[-count:], saved}


@given(st.integers(1, 5), steps)
def test_nothing_goes_when_nothing_is_good(count, intact):
    assert plan_pruning(KeepLast(count), intact, intact, saved=0) == ()


def test_a_bad_one_takes_no_place_and_goes_once_it_is_oldest():
    assert plan_pruning(KeepLast(2), {10, 20, 30}, {20}, saved=30) == ()
    assert plan_pruning(KeepLast(2), {10, 20, 30, 40}, {20}, saved=40) == (10, 20)


def test_steps_are_compared_as_numbers():
    assert plan_pruning(KeepLast(1), {9, 10, 100}, set(), saved=100) == (9, 10)


@pytest.mark.parametrize("count", [0, -1, 1.5, True, None])
def test_at_least_one(count):
    with pytest.raises(CheckpointError, match="keep at least 1 checkpoint"):
        KeepLast(count)
