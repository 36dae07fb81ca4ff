"""kill -9 under torchrun's agent: whatever is killed whenever, the job ends as if nothing had been."""

import json
import os
import subprocess
import sys

import pytest

from tests.spawn import ROOT

SOAK = pytest.mark.soak


def rounds_of(*flags: str, rounds: int) -> dict[str, int]:
    """Run the rounds, each of which has a deadline of its own, and return their counts."""
    command = [sys.executable, "-m", "tests.soak_kill", "--rounds", str(rounds), *flags]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("rounds", [2, pytest.param(200, marks=SOAK)])
@pytest.mark.timeout(6000)  # the rounds end by themselves, with a better message
def test_a_small_job(record_property, rounds):
    counts = rounds_of(rounds=rounds)
    assert counts["rounds"] == rounds
    assert counts["steps_checked"] > 2 * 40
    record_property("kill", counts)


@pytest.mark.parametrize("rounds", [pytest.param(2, marks=pytest.mark.slow), pytest.param(20, marks=SOAK)])
@pytest.mark.timeout(3000)
def test_the_real_recipe(record_property, rounds):
    counts = rounds_of("--recipe", rounds=rounds)
    assert counts["rounds"] == rounds
    record_property("kill", counts)
