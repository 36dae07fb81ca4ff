"""Sliding windows through a pipeline, in one job: fp64, against one process."""

import pytest

from tests.job_cases import SHORT, assert_near, assert_told, rank_trains, saved
from tests.spawn import run_ranks

MIXED = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
MODELS = {
    "mistral": {"sliding_window": 11},  # less than a chunk, so that it ends inside of one and in the one before
    "qwen3": {"sliding_window": 20, "use_sliding_window": True, "layer_types": MIXED},
}
CASES = [
    ("mistral", "state_aware_1f1b", 3),
    ("qwen3", "state_aware_1f1b", 2),
    pytest.param("qwen3", "zbv", 2, marks=pytest.mark.slow),
    pytest.param("mistral", "roundpipe", 2, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "schedule", "ranks"), CASES)
def test_windows_are_those_of_one_process(tmp_path, family, schedule, ranks):
    """The first schedule splits samples into as many as six chunks; a stage has some layers of either kind."""
    options = {"family": family, "layers": 4, "changes": MODELS[family]}
    if schedule != "state_aware_1f1b":
        options["lengths"] = SHORT
    (expected,) = run_ranks(rank_trains, 1, str(tmp_path / "one"), 2, {}, options)
    flags = {"pipeline.schedule": schedule, "pipeline.ranks": ranks}
    found = run_ranks(rank_trains, ranks, str(tmp_path / "parts"), 2, flags, options)
    for told in found:
        assert_told(told, expected, 1e-9)
    assert_near(saved(tmp_path / "parts", 2), saved(tmp_path / "one", 2), 1e-7)
