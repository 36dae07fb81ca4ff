"""The snippets of docs/chunkflow_adapters.md are run as they stand there, with small models and chunks."""

import os
import re
from pathlib import Path

import pytest
import torch

from tests.chunk_steps import batches, optimizer_of
from tests.spawn import run_ranks
from tests.test_chunkflow_adapters_trainers import arguments, collator, fresh_accelerate, rows, tokenizer  # noqa: F401
from tests.tiny import VOCABULARY, tiny_model

PAGE = Path(__file__).parent.parent / "docs" / "chunkflow_adapters.md"
SECTIONS = re.findall(r"^## (.+?)\n```python\n(.+?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def snippet(name):
    """Return the code of a section, with chunks that fit the test's sequences."""
    (code,) = [code for title, code in SECTIONS if title == name]
    return code.replace("chunk_tokens=8192", "chunk_tokens=16")


def run_snippet(name, *, rank=0, world_size=1, **given):
    """Run a section; return its names. Trains the first step only, whose program is for retain 1 and 2."""
    retain = 2 if "retain=2" in snippet(name) else 1
    names = {"loader": batches(rank, world_size, retain=retain)[:1], **given}
    if "model" in names and "optimizer" not in names:
        names["optimizer"] = optimizer_of(names["model"])
    exec(snippet(name), names)
    return names


def trained(name, **given):
    return float(run_snippet(name, **given)["loss"])


def expected_loss():
    from chunkflow import SINGLE, ChunkRunner

    return float(ChunkRunner(tiny_model(), group=SINGLE).evaluate(batches()[0]))


def test_every_section_is_run_here():
    assert len(SECTIONS) == PAGE.read_text().count("```python") == 8


def test_trainer(tmp_path):
    given = {"args": arguments(tmp_path, max_steps=2), "dataset": rows(), "collator": collator()}
    names = run_snippet("transformers' Trainer", model=tiny_model(dtype=torch.float32), **given)
    assert names["trainer"].state.global_step == 2


def test_sft_trainer(tmp_path):
    trl = pytest.importorskip("trl", reason="the extra [trl] is not installed")
    args = trl.SFTConfig(**{**arguments(tmp_path, max_steps=2).to_dict(), "bf16": False, "max_length": None})
    given = {"sft_args": args, "dataset": rows(), "tokenizer": tokenizer()}
    names = run_snippet("TRL's SFTTrainer", model=tiny_model(dtype=torch.float32), **given)
    assert names["trainer"].state.global_step == 2


@pytest.mark.usefixtures("fresh_accelerate")
def test_accelerate():
    from accelerate import Accelerator

    loss = trained("Accelerate", model=tiny_model(), accelerator=Accelerator(cpu=True))
    assert loss == pytest.approx(expected_loss(), rel=1e-9)


def test_peft():
    peft = pytest.importorskip("peft", reason="the extra [peft] is not installed")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    loss = trained("PEFT", model=tiny_model(), get_peft_model=peft.get_peft_model, lora_config=config)
    assert loss == pytest.approx(expected_loss(), rel=1e-9)


def fsdp2(info):
    model = tiny_model()
    names = run_snippet("FSDP2", rank=info.rank, world_size=info.world_size, model=model)
    return float(names["loss"])


def test_fsdp2():
    assert run_ranks(fsdp2, 2) == pytest.approx([expected_loss()] * 2, rel=1e-7)


def test_memory_and_speed(monkeypatch):
    monkeypatch.setattr("torch.nn.Module.compile", lambda layer: None)  # run in test_chunkflow_recompute
    from chunkflow import ChunkRunner

    loss = trained("Memory and speed inside a chunk", model=tiny_model(), ChunkRunner=ChunkRunner)
    assert loss == pytest.approx(expected_loss(), rel=1e-9)


def deepspeed(info):
    import deepspeed as library

    os.environ["LOCAL_RANK"] = str(info.rank)
    library.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # takes a minute to compile
    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    given = {"model": tiny_model(dtype=torch.float32), "deepspeed": library, "config": config}
    names = run_snippet("DeepSpeed ZeRO-1, 2 and 3", rank=info.rank, world_size=info.world_size, **given)
    return float(names["loss"])


@pytest.mark.slow
def test_deepspeed():
    pytest.importorskip("deepspeed", reason="the extra [deepspeed] is not installed")
    losses = run_ranks(deepspeed, 2, fresh=True, timeout_s=150, env={"DS_ACCELERATOR": "cpu"})
    assert losses == pytest.approx([expected_loss()] * 2, rel=1e-5)


def megatron(info):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from tests.test_chunkflow_adapters_megatron import gpt

    config = gpt(params_dtype=torch.float32).config  # and the parallel state that every GPTModel needs
    given = {"GPTModel": GPTModel, "get_gpt_layer_local_spec": get_gpt_layer_local_spec, "config": config}
    sizes = {"vocab_size": VOCABULARY, "max_sequence_length": 512}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    place = {"rank": info.rank, "world_size": info.world_size}
    return float(run_snippet("Megatron-core", **place, **given, **sizes, optimizer=optimizer)["loss"])


@pytest.mark.slow
def test_megatron():
    pytest.importorskip("megatron.core", reason="the extra [megatron] is not installed")
    first, second = run_ranks(megatron, 2, fresh=True, timeout_s=150)
    assert 3 < first == second < 7
