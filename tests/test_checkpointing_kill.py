"""kill -9 under torchrun's agent: whatever is killed whenever, the job ends as if nothing had been."""

import json
import os
import subprocess
import sys

import pytest

from tests.spawn import ROOT

ROUND_S = 60  # at the very most, on a machine that has much else to do


def soak(*flags: str, rounds: int) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.soak_kill", "--rounds", str(rounds), *flags]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200 + ROUND_S * rounds)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# Not in `make test` yet: one run in twenty hung before ranks in their closing handshake were spared (docs/log.md).
@pytest.mark.soak
@pytest.mark.parametrize("rounds", [5, 200])
@pytest.mark.timeout(13_000)
def test_a_small_job(record_property, rounds):
    counts = soak(rounds=rounds)
    assert counts["rounds"] == rounds
    assert counts["steps_checked"] > 2 * 40
    record_property("kill", counts)


@pytest.mark.soak
@pytest.mark.parametrize("rounds", [5, 20])
@pytest.mark.timeout(1500)
def test_the_real_recipe(record_property, rounds):
    counts = soak("--recipe", rounds=rounds)
    assert counts["rounds"] == rounds
    record_property("kill", counts)
