"""What every test shares: one thread a process, no network, no deadlines of hypothesis, one pool of warm ranks."""

import os

# Before torch is imported by any test module; the ranks inherit these.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import settings

from tests.spawn import close_pool

# The same examples on every machine: what gates a commit does not depend on luck.
settings.register_profile("longrail", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("longrail")


@pytest.fixture(scope="session", autouse=True)
def _warm_ranks():
    yield
    close_pool()
