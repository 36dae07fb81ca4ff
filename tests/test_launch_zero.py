"""Jobs under DeepSpeed's ZeRO: what one process does, to fp32's rounding; checkpoints that any engine resumes."""

import shutil

import pytest
import torch

from tests.flat_states import same
from tests.job_cases import assert_near, assert_told, rank_trains, saved
from tests.spawn import run_ranks

pytest.importorskip("deepspeed", reason="the extra [deepspeed] is not installed")
pytestmark = pytest.mark.timeout(600)
FP32 = {"dtype": torch.float32}
NEAR = 1e-4
"""fp32, sums in another order, Adam's division by small moments."""


def rank_trains_all(info, cases):
    return [rank_trains(info, *case) for case in cases]


def deepspeed_ranks(world_size, cases):
    return run_ranks(rank_trains_all, world_size, cases, fresh=True, timeout_s=300)


def case(folder, until, engine, **more):
    return (str(folder), until, {"engine": engine, **more}, FP32)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Each stage trained four steps on two ranks, and again from its second step; and in one process, without it."""
    place = tmp_path_factory.mktemp("zero")
    stages = ("zero1", "zero2", "zero3")
    first = deepspeed_ranks(2, [case(place / stage, 4, stage) for stage in stages])
    for stage in stages:
        shutil.copytree(place / stage / "step-2", place / f"{stage} again" / "step-2")
        shutil.copytree(place / stage / "step-4", place / f"{stage} on" / "step-4")
    run_ranks(rank_trains, 1, *case(place / "one", 6, "ddp"))
    return place, first[0]


@pytest.mark.parametrize("number", [0, 1, 2], ids=["zero1", "zero2", "zero3"])
def test_every_stage_trains_as_one_process(two_ranks, number):
    place, told = two_ranks
    expected = run_ranks(rank_trains, 1, *case(place / f"told {number}", 4, "ddp"))[0]
    assert_told(told[number], expected, NEAR)
    for step in (1, 4):
        assert_near(saved(place / f"zero{number + 1}", step), saved(place / "one", step), 10 * NEAR)


def test_a_resume_is_bit_for_bit(two_ranks):
    place, told = two_ranks
    stages = ("zero1", "zero2", "zero3")
    again = deepspeed_ranks(2, [case(place / f"{stage} again", 4, stage) for stage in stages])
    for number, stage in enumerate(stages):
        assert again[0][number] == told[number][2:]
        assert same(saved(place / f"{stage} again", 4), saved(place / stage, 4))


def test_another_world_and_another_engine_go_on(two_ranks):
    """What two ranks saved: one rank of another stage, and then plain data parallelism."""
    place, _ = two_ranks
    others = {"zero1": "zero3", "zero2": "zero1", "zero3": "zero2"}
    deepspeed_ranks(1, [case(place / f"{stage} on", 5, other) for stage, other in others.items()])
    for stage in others:
        run_ranks(rank_trains, 2, *case(place / f"{stage} on", 6, "ddp"))
        for step in (5, 6):
            assert_near(saved(place / f"{stage} on", step), saved(place / "one", step), 10 * NEAR)


@pytest.mark.slow
def test_four_ranks_adapters_and_bf16(tmp_path):
    plain = {"ddp": {}, "lora": {"lora.rank": 2}, "bf16": {"model.precision": "bf16"}}
    cases = [(stage, kind) for stage in ("zero1", "zero2", "zero3") for kind in plain]
    found = deepspeed_ranks(4, [case(tmp_path / f"{s} {k}", 2, s, **plain[k]) for s, k in cases])
    for kind, more in plain.items():
        expected = run_ranks(rank_trains, 1, *case(tmp_path / kind, 2, "ddp", **more))[0]
        for number, (stage, other) in enumerate(cases):
            if other == kind:
                assert_told(found[0][number], expected, 0.05 if kind == "bf16" else NEAR)
                tolerance = 0.2 if kind == "bf16" else 10 * NEAR
                assert_near(saved(tmp_path / f"{stage} {kind}", 1), saved(tmp_path / kind, 1), tolerance)
    again = deepspeed_ranks(2, [case(tmp_path / f"{s} {k}", 3, s, **plain[k]) for s, k in cases])
    assert len(again) == 2
