"""Which checkpoints may go."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointing import SINGLE, Checkpointer, CheckpointError, KeepBest, KeepEvery, KeepLast
from checkpointing.retention import plan_pruning
from tests.flat_states import Flat

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


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, None])
def test_every_so_many_steps(steps):
    with pytest.raises(CheckpointError, match="give a number of steps, at least 1"):
        KeepEvery(steps)


@pytest.mark.parametrize(("metric", "count"), [("", 1), ("loss", 0), ("loss", True), ("loss", 1.0)])
def test_a_metric_has_a_name(metric, count):
    with pytest.raises(CheckpointError, match="name a metric, and keep at least 1"):
        KeepBest(metric, count)


LOSSES = {
    1: {"run.loss": 3.0}, 2: {"run.loss": 1.0}, 3: {"run": {"loss": 1}}, 4: {"run.loss": float("nan")},
    5: {"run.loss": "low"}, 6: {}, 7: {"run.loss": float("-inf")}, 8: {"run.loss": 2.0},
}  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        (KeepBest("run.loss"), {3}),  # a tie goes to the newer one
        (KeepBest("run.loss", 3), {2, 3, 8}),  # what is no finite number is not among the best
        (KeepBest("run.loss", 2, largest=True), {1, 8}),
        (KeepBest("run.accuracy"), set(LOSSES)),  # nothing is thrown away by a metric that is not there
        (KeepEvery(4), {4, 8}),
        (KeepLast(1) | KeepEvery(3), {3, 6, 8}),
        (KeepEvery(5) | KeepBest("run.loss") | KeepLast(2), {3, 5, 7, 8}),
        (KeepEvery(100), set()),
    ],
)
def test_rules_and_their_unions(rule, kept):
    assert rule.kept(LOSSES) == kept
    gone = plan_pruning(rule, LOSSES, set(), saved=8)
    assert set(gone) == set(LOSSES) - kept - {8}  # whatever the rule says, the newest stays
    assert list(gone) == sorted(gone)


def test_a_damaged_best_does_not_push_a_good_one_out():
    assert plan_pruning(KeepBest("run.loss"), LOSSES, {3}, saved=8) == (1, 4, 5, 6, 7)


def test_what_stays_on_disk(tmp_path):
    keep = KeepLast(1) | KeepEvery(4) | KeepBest("run.eval.loss")
    losses = [5.0, 1.0, 4.0, 3.0, 2.0, float("nan"), 9.0]
    with Checkpointer(tmp_path, group=SINGLE, keep=keep) as ckpt:
        for step, loss in enumerate(losses, 1):
            ckpt.save(step, {"run": Flat({"eval": {"loss": loss}})}).wait()
    assert ckpt.steps() == [2, 4, 7]
    with Checkpointer(tmp_path, group=SINGLE, keep=keep) as ckpt:  # the numbers are those of the checkpoints
        ckpt.restore({"run": Flat({})})
        ckpt.save(9, {"run": Flat({"eval": {"loss": 0.5}})}).wait()
    assert ckpt.steps() == [4, 9]


@pytest.mark.parametrize("keep", [KeepLast, 3, lambda steps: steps])
def test_what_is_no_rule_is_refused_at_once(tmp_path, keep):
    with pytest.raises(CheckpointError, match="give a retention rule"):
        Checkpointer(tmp_path, group=SINGLE, keep=keep)
    with pytest.raises(CheckpointError, match="give a retention rule"):
        KeepLast(2) | keep
