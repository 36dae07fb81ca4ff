"""What every test shares: one thread a process, no network, no deadlines of hypothesis, one pool of warm ranks."""

import os
import signal

# Before torch is imported by any test module; the ranks inherit these.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import settings

from tests import launch_jobs
from tests.spawn import close_pool

# The same examples on every machine: what gates a commit does not depend on luck.
settings.register_profile("longrail", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("longrail")

# A shell that starts the tests in the background has them ignore it, and every job that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _warm_ranks():
    yield
    close_pool()


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """Where the session's jobs are, and `corpus`, which they train on."""
    folder = tmp_path_factory.mktemp("jobs")
    launch_jobs.write_corpus(folder / "corpus")
    return folder


@pytest.fixture(scope="session")
def undisturbed(place):
    """The folder and the output of a job of 22 steps on 2 ranks: the oracle of every disturbed one."""
    flags = launch_jobs.settings(place / "corpus", place / "whole", run__epochs=2)
    code, output = launch_jobs.run_job(flags, place / "whole.log")
    assert code == 0, output
    return place / "whole", output
