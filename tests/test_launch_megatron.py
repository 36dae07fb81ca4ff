"""A job on Megatron-core's GPTModel: trained in chunks on two ranks, saved, resumed bit for bit, exported."""

import json
import shutil
import subprocess
import sys

import pytest
from safetensors import safe_open

from launch.metrics import read_metrics
from launch.recipe import read_config
from tests.job_cases import saved
from tests.launch_jobs import run_job, settings, write_corpus
from tests.spawn import ROOT

pytest.importorskip("megatron.core", reason="the extra [megatron] is not installed")
pytestmark = pytest.mark.timeout(300)
GPT = {"model__library": "megatron", "optimizer__lr": 0.001, "run__steps": 6}


def curve(lines):
    return [{key: line[key] for key in ("loss", "grad_norm", "eval_loss") if key in line} for line in lines]


@pytest.mark.slow
def test_a_gpt_model_trains_resumes_and_is_exported(tmp_path):
    write_corpus(tmp_path / "corpus", files=24)
    code, output = run_job(settings(tmp_path / "corpus", tmp_path / "two", **GPT), tmp_path / "two.log")
    assert code == 0, output
    assert "GPTModel of" in output
    lines = read_metrics(tmp_path / "two" / "metrics.jsonl")
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"]
    assert max(line.get("split_tokens", 0) for line in lines) > 0

    shutil.copytree(tmp_path / "two" / "checkpoints" / "step-3", tmp_path / "again" / "checkpoints" / "step-3")
    code, output = run_job(settings(tmp_path / "corpus", tmp_path / "again", **GPT), tmp_path / "again.log")
    assert code == 0, output
    assert "Resuming after step 3" in output
    assert curve(read_metrics(tmp_path / "again" / "metrics.jsonl")) == curve(lines)[4:]

    flags = settings(tmp_path / "corpus", tmp_path / "one", **GPT)
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-m", "launch.finetune", *flags]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(curve(lines), curve(read_metrics(tmp_path / "one" / "metrics.jsonl")), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)

    weights = saved(tmp_path / "two" / "checkpoints", 6)
    with safe_open(tmp_path / "two" / "model" / "model.safetensors", "pt") as exported:
        for name in exported.keys():  # noqa: SIM118 (not a mapping)
            assert exported.get_tensor(name).equal(weights[f"model.{name}"]), name
    sizes = json.loads((tmp_path / "two" / "model" / "gpt_model.json").read_text())
    assert (sizes["num_layers"], sizes["hidden_size"], sizes["vocab_size"]) == (2, 32, 300)
    assert (tmp_path / "two" / "model" / "tokenizer.json").exists()


def test_the_recipe_reads():
    config = read_config(["--config", str(ROOT / "recipes" / "megatron_gpt.yaml")], prog="x", description="")
    assert (config.model.library, config.engine) == ("megatron", "ddp")
