"""What runs the blocks of docs/chunkflow.md and docs/chunkflow_adapters.md, with small models and chunks."""

import os
from unittest import mock

import pytest
import torch

from chunkflow import SINGLE, ChunkLoader, ChunkRunner, MemorySource
from chunkflow.balance import OnlineBalance
from tests.chunk_steps import batches, optimizer_of
from tests.docs_blocks import Run, execute
from tests.spawn import run_ranks
from tests.test_chunkflow_adapters_trainers import arguments, collator, rows, tokenizer
from tests.tiny import VOCABULARY, sequence, tiny_model

PAGE = "docs/chunkflow_adapters.md"


def run_code(code, *, rank=0, world_size=1, **given):
    """Run code; return its names. Trains the first step only, whose program is for retain 1 and 2."""
    code = code.replace("chunk_tokens=8192", "chunk_tokens=16").replace("chunk_tokens=4096", "chunk_tokens=16")
    retain = 2 if "retain=2" in code else 1
    names = {"loader": batches(rank, world_size, retain=retain)[:1], **given}
    if "model" in names and "optimizer" not in names:
        names["optimizer"] = optimizer_of(names["model"])
    return execute(PAGE, code, names)


def trained(code, **given):
    return float(run_code(code, **given)["loss"])


def expected_loss():
    return float(ChunkRunner(tiny_model(), group=SINGLE).evaluate(batches()[0]))


def trainer(folder, texts):
    given = {"args": arguments(folder, max_steps=2), "dataset": rows(), "collator": collator()}
    names = run_code(texts[0], model=tiny_model(dtype=torch.float32), **given)
    assert names["trainer"].state.global_step == 2


def sft_trainer(folder, texts):
    names = run_code(texts[0], **sft_names(folder))
    assert names["trainer"].state.global_step == 2


def sft_names(folder):
    trl = pytest.importorskip("trl", reason="the extra [trl] is not installed")
    args = trl.SFTConfig(**{**arguments(folder, max_steps=2).to_dict(), "bf16": False, "max_length": None})
    return {
        "sft_args": args, "dataset": rows(), "tokenizer": tokenizer(), "model": tiny_model(dtype=torch.float32),
    }  # fmt: skip


def accelerate(folder, texts):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    def forget():
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()

    forget()
    try:
        loss = trained(texts[0], model=tiny_model(), accelerator=Accelerator(cpu=True))
    finally:
        forget()
    assert loss == pytest.approx(expected_loss(), rel=1e-9)


def peft(folder, texts):
    library = pytest.importorskip("peft", reason="the extra [peft] is not installed")
    config = library.LoraConfig(r=4, target_modules=["q_proj"])
    loss = trained(texts[0], model=tiny_model(), get_peft_model=library.get_peft_model, lora_config=config)
    assert loss == pytest.approx(expected_loss(), rel=1e-9)


def fsdp2_rank(info, code):
    return trained(code, rank=info.rank, world_size=info.world_size, model=tiny_model())


def fsdp2(folder, texts):
    assert run_ranks(fsdp2_rank, 2, texts[0]) == pytest.approx([expected_loss()] * 2, rel=1e-7)


def memory_and_speed(folder, texts):
    with mock.patch("torch.nn.Module.compile", return_value=None):  # run in test_chunkflow_recompute
        loss = trained(texts[0], model=tiny_model(), ChunkRunner=ChunkRunner)
    assert loss == pytest.approx(expected_loss(), rel=1e-9)


def deepspeed_names(info):
    import deepspeed as library

    os.environ["LOCAL_RANK"] = str(info.rank)
    library.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # takes a minute to compile
    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    return {"model": tiny_model(dtype=torch.float32), "deepspeed": library, "config": config}


def deepspeed_rank(info, code):
    return trained(code, rank=info.rank, world_size=info.world_size, **deepspeed_names(info))


def deepspeed(folder, texts):
    pytest.importorskip("deepspeed", reason="the extra [deepspeed] is not installed")
    losses = run_ranks(deepspeed_rank, 2, texts[0], fresh=True, timeout_s=150, env={"DS_ACCELERATOR": "cpu"})
    assert losses == pytest.approx([expected_loss()] * 2, rel=1e-5)


def megatron_rank(info, code):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from tests.test_chunkflow_adapters_megatron import gpt

    config = gpt(params_dtype=torch.float32).config  # and the parallel state that every GPTModel needs
    given = {"GPTModel": GPTModel, "get_gpt_layer_local_spec": get_gpt_layer_local_spec, "config": config}
    sizes = {"vocab_size": VOCABULARY, "max_sequence_length": 512}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    return trained(code, rank=info.rank, world_size=info.world_size, **given, **sizes, optimizer=optimizer)


def megatron(folder, texts):
    pytest.importorskip("megatron.core", reason="the extra [megatron] is not installed")
    first, second = run_ranks(megatron_rank, 2, texts[0], fresh=True, timeout_s=150)
    assert 3 < first == second < 7


def online_balance(folder, texts):
    loader = ChunkLoader(
        MemorySource([sequence(n, 10 + 7 * n) for n in range(60)]), chunk_tokens=32, global_batch=3,
        rank=0, world_size=1,
    )  # fmt: skip
    model = tiny_model()
    names = {
        "loader": loader, "runner": ChunkRunner(model, group=SINGLE), "optimizer": optimizer_of(model),
        "OnlineBalance": OnlineBalance,
    }  # fmt: skip
    found = execute("docs/chunkflow.md", texts[0], names)
    assert torch.isfinite(found["loss"])


RUNS = [
    Run("docs/chunkflow.md", ("balance = OnlineBalance",), online_balance),
    Run(PAGE, ("class ChunkTrainer",), trainer),
    Run(PAGE, ("class Chunked(ChunkedSFTTrainer)",), sft_trainer),
    Run(PAGE, ("AcceleratedRunner(",), accelerate),
    Run(PAGE, ("get_peft_model(",), peft),
    Run(PAGE, ("ChunkRunner(fully_shard(model)",), fsdp2),
    Run(PAGE, ("checkpoint_layers=True",), memory_and_speed),
    Run(PAGE, ("deepspeed.initialize(",), deepspeed, slow=True),
    Run(PAGE, ("MegatronRunner(model",), megatron, slow=True),
]
