"""RoundPipe's steps that overlap, in jobs: against one process that takes every gradient on weights one step old."""

from dataclasses import replace
from itertools import islice, pairwise

import pytest
import torch

from checkpointing import Checkpointer, KeepLast
from chunkflow.reference import float64_throughout
from launch.errors import ConfigError, TrainingError
from launch.gradnorm import clip_
from launch.optimizer import apply_settings
from launch.recipe import read_config
from launch.schedule import learning_rate
from launch.stale_steps import MOST_TOGETHER, steps_together, train_together
from pipeline.errors import WatchdogError
from tests.job_cases import SHORT, assert_near, assert_told, job_of, saved
from tests.spawn import run_ranks

pytestmark = pytest.mark.timeout(240)
TOGETHER = {"run.eval_every": 3, "checkpoint.every": 5}
STALE = {"pipeline.schedule": "roundpipe", "pipeline.staleness": 1, "pipeline.timeout_s": 30, **TOGETHER}
OPTIONS = {"lengths": SHORT, "layers": 4}
BORDERS = [0, 3, 5, 6, 9, 10]
"""Of the runs of steps: 3, 2, 1, 3 and 1."""


def rank_trains(info, folder, until, flags):
    """Resume from `folder`, train to step `until`, saving behind every run of steps; losses, norms, held-out losses."""
    with float64_throughout(), Checkpointer(folder, keep=KeepLast(99)) as checkpoints:
        job = job_of(info, {**STALE, "pipeline.ranks": info.world_size, **flags}, **OPTIONS)
        with job.loader:
            checkpoints.restore(job.state)
            steps, told = iter(job.loader), []
            while job.state.step < until:
                together = steps_together(job.config, job.state.step, job.total_steps)
                found = train_together(job, list(islice(steps, together)))
                assert len(found) == together
                told += [(m.loss, m.grad_norm) for m in found]
                told.append((job.evaluate(), job.state.step))
                checkpoints.save(job.state.step, job.state)  # and train on beside it
    job.runner.close()
    return told


def rank_lags(info, folder, until, flags):
    """What `rank_trains` should do, by the plainest means: one process, the whole model, weights put back a step."""
    with float64_throughout(), Checkpointer(folder, keep=KeepLast(99)) as checkpoints:
        job = job_of(info, {**TOGETHER, **flags}, **OPTIONS)
        settings, told = job.config.optimizer, []
        trained = [p for p in job.model.parameters() if p.requires_grad]
        with job.loader:
            steps = iter(job.loader)
            for begin, end in pairwise(BORDERS):
                before = None
                for step in range(begin, min(end, until)):
                    newest = [p.detach().clone() for p in trained]
                    put(trained, before or newest)
                    loss, norm = job.runner.forward_backward(next(steps)), job.runner.grad_norm()
                    put(trained, newest)
                    before = newest
                    clip_(trained, norm, settings.clip_norm)
                    rate = learning_rate(step, job.config.schedule, peak=settings.lr, total_steps=job.total_steps)
                    apply_settings(job.optimizer, settings, lr=rate)
                    job.optimizer.step()
                    job.optimizer.zero_grad()
                    job.state.step += 1
                    told.append((float(loss), float(norm)))
                told.append((job.evaluate(), job.state.step))
                checkpoints.save(job.state.step, job.state)
    return told


def put(parameters, values):
    with torch.no_grad():
        for p, value in zip(parameters, values, strict=True):
            p.copy_(value)


@pytest.mark.parametrize(
    "flags", [{}, pytest.param({"lora.rank": 2}, marks=pytest.mark.slow)], ids=["full", "adapters"]
)
def test_any_number_of_ranks_lags_by_one_step_and_gives_the_same_bits(tmp_path, flags):
    """Steps have other numbers of micro-batches, and other data. Three ranks go on from what two saved."""
    (expected,) = run_ranks(rank_lags, 1, str(tmp_path / "lags"), 10, flags)
    more = {"pipeline.rounds": 2}
    (first,) = run_ranks(rank_trains, 1, str(tmp_path / "one"), 10, flags | more)
    assert_told(first, expected, 1e-9)
    for step in BORDERS[1:]:
        assert_near(saved(tmp_path / "one", step), saved(tmp_path / "lags", step), 1e-7)
    told = run_ranks(rank_trains, 2, str(tmp_path / "legs"), 6, flags | more)
    rest = run_ranks(rank_trains, 3, str(tmp_path / "legs"), 10, flags | more)
    assert all([*told[0], *other] == first for other in rest)
    state, same = saved(tmp_path / "one", 10), saved(tmp_path / "legs", 10)
    assert state.keys() == same.keys()
    assert all(torch.equal(same[name], tensor) for name, tensor in state.items())


def test_the_runs_of_steps_depend_on_settings_and_the_step_alone():
    config = read_config([f"--{key}={value}" for key, value in STALE.items()], prog="x", description="")
    borders = [0]
    while borders[-1] < 40:
        borders.append(borders[-1] + steps_together(config, borders[-1], 40))
    assert borders[: len(BORDERS)] == BORDERS
    assert set(borders) == {n for n in range(41) if n == 40 or n % 3 == 0 or n % 5 == 0 or n % MOST_TOGETHER == 0}
    plain = read_config(["--pipeline.schedule", "roundpipe"], prog="x", description="")
    assert steps_together(plain, 0, 40) == 1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"pipeline.staleness": 2}, "pipeline.staleness is 2; it must be 0 or 1"),
        ({"pipeline.schedule": "1f1b"}, "staleness is 1, and 1f1b ends every step before the next; leave it out"),
    ],
)
def test_bad_settings_are_told_by_their_names(flags, expected):
    with pytest.raises(ConfigError, match=expected):
        read_config([f"--{key}={value}" for key, value in (STALE | flags).items()], prog="x", description="")


def rank_shares_data(info):
    with pytest.raises(ConfigError, match=r"pipeline\.staleness is 1 and pipeline\.ranks 1, with more processes"):
        job_of(info, {**STALE, "pipeline.ranks": 1}, **OPTIONS)


def test_pipelines_that_share_the_data_are_refused():
    run_ranks(rank_shares_data, 2)


def rank_diverges(info):
    """The third step's gradient is no number; that step, and none behind it, changes a weight."""
    job = job_of(info, {**STALE, "pipeline.ranks": info.world_size}, **OPTIONS)
    before = job.runner.worker.optimizer
    with float64_throughout(), job.loader:
        batches = list(islice(iter(job.loader), 3))
        broken = replace(batches[2], denominator=float("nan"))
        with pytest.raises((TrainingError, WatchdogError), match="step 3: the norm of the gradient is nan") as raised:
            train_together(job, [*batches[:2], broken])
    assert before is None
    job.runner.close()
    return type(raised.value).__name__, job.state.step


def test_a_gradient_that_is_no_number_ends_every_rank_at_once():
    """Each finds it out, or hears it of the one that did; nobody waits for the deadline."""
    for found in (*run_ranks(rank_diverges, 1), *run_ranks(rank_diverges, 2)):
        assert found[1] == 0
        assert found[0] in ("TrainingError", "WatchdogError")
