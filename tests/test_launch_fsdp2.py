"""Jobs under FSDP2: the losses, norms, weights and moments of one process, in fp64; any world resumes any other's."""

import shutil

import pytest
import torch

from tests.flat_states import same
from tests.job_cases import assert_near, assert_told, rank_trains, saved
from tests.spawn import run_ranks

FSDP2, EXACT = {"engine": "fsdp2"}, 1e-9


def trained(tmp_path, legs, *, options=None, **more):
    """Train two steps on each (flags, ranks) in one folder, and all of them in one process in another."""
    steps = 2 * len(legs)
    (expected,) = run_ranks(rank_trains, 1, str(tmp_path / "one"), steps, more, options)
    told = []
    for leg, (flags, ranks) in enumerate(legs, start=1):
        found = run_ranks(rank_trains, ranks, str(tmp_path / "legs"), 2 * leg, {**more, **flags}, options)
        assert all(one == found[0] for one in found)
        told += found[0]
    return told, expected


def test_shards_train_as_one_process_and_resume_another(tmp_path):
    told, expected = trained(tmp_path, [(FSDP2, 2), (FSDP2, 1), ({}, 2), (FSDP2, 2)])
    assert_told(told, expected, EXACT)
    for step in range(1, 9):
        assert_near(saved(tmp_path / "legs", step), saved(tmp_path / "one", step), 1e-7)


@pytest.mark.slow
def test_four_ranks_some_of_them_without_a_chunk(tmp_path):
    told, expected = trained(tmp_path, [(FSDP2, 4), (FSDP2, 2)])
    assert_told(told, expected, EXACT)
    assert_near(saved(tmp_path / "legs", 4), saved(tmp_path / "one", 4), 1e-7)


def test_adapters_in_shards(tmp_path):
    told, expected = trained(tmp_path, [(FSDP2, 2), ({}, 1)], **{"lora.rank": 2})
    assert_told(told, expected, EXACT)
    assert_near(saved(tmp_path / "legs", 4), saved(tmp_path / "one", 4), 1e-7)


def test_bf16_in_shards_stays_near(tmp_path):
    told, expected = trained(tmp_path, [(FSDP2, 2)], options={"dtype": torch.float32}, **{"model.precision": "bf16"})
    assert_told(told, expected, 0.02)


def test_a_resume_is_bit_for_bit(tmp_path):
    first = run_ranks(rank_trains, 2, str(tmp_path / "whole"), 4, FSDP2)
    shutil.copytree(tmp_path / "whole" / "step-2", tmp_path / "again" / "step-2")
    again = run_ranks(rank_trains, 2, str(tmp_path / "again"), 4, FSDP2)
    assert again[0] == first[0][2:]
    assert same(saved(tmp_path / "again", 4), saved(tmp_path / "whole", 4))
