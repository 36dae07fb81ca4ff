"""Whole jobs under torchrun on each engine; the job whose ranks hold whole models is the oracle."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from launch.metrics import read_metrics
from launch.recipe import read_config
from tests.launch_jobs import run_job, settings, write_corpus
from tests.spawn import ROOT

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    write_corpus(folder / "corpus", files=24)
    run(folder, "ddp", engine="ddp")
    return folder


def run(place, name, **changes):
    flags = settings(place / "corpus", place / name, run__steps=6, checkpoint__every=3, **changes)
    code, output = run_job(flags, place / f"{name}.log")
    assert code == 0, output
    return read_metrics(place / name / "metrics.jsonl"), output


@pytest.mark.parametrize(
    "engine", ["fsdp2", *(pytest.param(engine, marks=pytest.mark.slow) for engine in ("zero2", "zero3"))]
)
def test_an_engine_trains_resumes_what_ddp_saved_and_exports(place, engine):
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed", reason="the extra [deepspeed] is not installed")
    shutil.copytree(place / "ddp" / "checkpoints" / "step-3", place / engine / "checkpoints" / "step-3")
    lines, output = run(place, engine, engine=engine)
    assert "Resuming after step 3" in output
    assert "sharded over 2 ranks" in output
    expected = read_metrics(place / "ddp" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [4, 5, 6]
    for ours, theirs in zip(lines, expected[4:], strict=True):
        for key in {"loss", "grad_norm", "eval_loss"} & theirs.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3), key
    ours, theirs = (AutoModelForCausalLM.from_pretrained(place / name / "model") for name in (engine, "ddp"))
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=2e-3, msg=name)


def test_what_does_not_compose_is_one_line_a_rank_before_anything_is_written(place):
    flags = settings(place / "corpus", place / "never", engine="fsdp2", pipeline__ranks=2)
    code, output = run_job(flags, place / "never.log")
    assert code != 0
    assert "exitcode  : 2" in output
    for rank in (0, 1):
        assert output.count(f"rank {rank}: error: engine fsdp2 and pipeline, state_aware_1f1b: the ranks of a") == 1
    assert not (place / "never").exists()


def test_the_recipe_reads():
    config = read_config(["--config", str(ROOT / "recipes" / "deepspeed_zero.yaml")], prog="x", description="")
    assert (config.engine, config.model.library) == ("zero2", "transformers")
