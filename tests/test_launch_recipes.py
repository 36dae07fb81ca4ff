"""Every recipe of the project is run, for a step, as it stands: two ranks, data of a few lines, a tiny model file."""

import json
from importlib.util import find_spec

import pytest

from launch.metrics import read_metrics
from launch.recipe import read_config
from tests.launch_jobs import run_job
from tests.spawn import ROOT
from tests.test_launch_pretrained import write_functions_of
from tests.tiny_gguf import write_gguf

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
NEEDS = {"deepspeed_zero": "deepspeed", "megatron_gpt": "megatron"}
SAID = {
    "deepspeed_zero": "ZeRO-2", "megatron_gpt": "GPTModel of",
    "moe_quickstart": "2 layers of 4 experts over dp 1 x ep 2", "moe_upcycled": "layers of 4 experts over dp 1 x ep 2",
    "pipeline_1f1b": "pipeline state_aware_1f1b of 2 ranks",
    "roundpipe": "pipeline roundpipe of 2 ranks",
}  # fmt: skip
"""What tells that a job is what its recipe is there for."""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("recipe", [pytest.param(path, id=path.stem) for path in RECIPES])
def test_a_recipe_trains(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.launch_jobs.DEADLINE_S", 240)
    if find_spec(NEEDS.get(recipe.stem, "json")) is None:
        pytest.skip(f"{NEEDS[recipe.stem]} is not installed")
    flags = ["--config", str(recipe), "--run.folder", str(tmp_path / "run"), "--run.steps", "1", "--data.held_out", "2",
             "--data.path", str(write_functions_of(tmp_path / "corpus")), "--data.pattern", "*.py",
             "--data.long_files", "[]", "--data.cache", str(tmp_path / "cache")]  # fmt: skip
    path = read_config(["--config", str(recipe)], prog="x", description="").model.path
    if path is not None:
        write_gguf(tmp_path / "tiny.gguf")
        flags += ["--model.path", str(tmp_path / "tiny.gguf")]
    code, output = run_job(flags, tmp_path / "log")
    assert code == 0, output
    assert SAID.get(recipe.stem, "step 1/1") in output
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 1
    assert (tmp_path / "run" / "report.html").exists()
