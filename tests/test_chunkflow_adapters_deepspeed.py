"""DeepSpeed's own engine at ZeRO 1, 2 and 3 on two ranks: weights after three steps equal the one-process run's."""

import os

import pytest
import torch

from chunkflow import SINGLE, ChunkflowError, ChunkRunner
from chunkflow.families import tiny_model as family_model
from tests.chunk_steps import batches, furthest, one_process, optimizer_of, train_whole
from tests.spawn import run_ranks
from tests.tiny import tiny_model

pytest.importorskip("deepspeed", reason="the extra [deepspeed] is not installed")
FP32, BF16 = 2e-5, 0.05
"""Relative to each parameter's largest weight. fp32: another order of additions; bf16: 8 bits in every operation."""
STAGES = [(1, 3, {}), (2, 1, {"gradient_accumulation_steps": 4}), (3, 3, {})]
CHECKPOINTED = {"checkpoint_layers": True}


def engine_of(stage, *, model=None, **changes):
    import deepspeed

    model = tiny_model(dtype=torch.float32) if model is None else model
    # Without the threshold, parameters this small would never be partitioned.
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, **changes.pop("zero", {})}
    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True, **changes,
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=config)
    return engine


def weights_of(engine):
    import deepspeed

    parameters = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: p.detach().float().clone() for name, p in parameters.items()}


def train(info, engine, retain, settings=None):
    runner, losses = ChunkRunner(engine, retain=retain, **(settings or {})), []
    for batch in batches(info.rank, info.world_size, retain=retain):
        scored = float(runner.evaluate(batch))
        losses.append(float(runner.forward_backward(batch)))
        assert scored == pytest.approx(losses[-1], rel=1e-6)
        engine.step()
    return losses, weights_of(engine)


def train_others(info, cases):
    os.environ["LOCAL_RANK"] = str(info.rank)
    return [[train(info, engine_of(stage, model=other(name), **changes), 2)] for name, stage, changes in cases]


def train_stages(info, cases, compiled=True):
    import deepspeed

    os.environ["LOCAL_RANK"] = str(info.rank)  # as every launcher has it
    if not compiled:  # as on a machine without a compiler: the operator takes a minute or two to compile at first
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return [train(info, engine_of(stage, **changes), retain, *rest) for stage, retain, changes, *rest in cases]


def run_deepspeed(fn, world_size, *args, **env):
    return run_ranks(fn, world_size, *args, fresh=True, timeout_s=600, env={"DS_ACCELERATOR": "cpu", **env})


def assert_one_process(found, tolerance):
    losses, weights = one_process(dtype=torch.float32)
    for of_rank in found:
        for ours, theirs in of_rank:
            assert ours == pytest.approx(losses, rel=tolerance)
            assert furthest(theirs, weights) < tolerance


@pytest.mark.timeout(700)
def test_every_stage_equals_one_process():
    assert_one_process(run_deepspeed(train_stages, 2, STAGES, False), FP32)


@pytest.mark.slow
@pytest.mark.timeout(2000)
@pytest.mark.parametrize("world_size", [1, 3])
def test_other_world_sizes(world_size):
    cases = [*STAGES, (1, 2, {}, CHECKPOINTED), (3, 2, {}, CHECKPOINTED)]
    assert_one_process(run_deepspeed(train_stages, world_size, cases), FP32)


def other(name):
    if name == "tied":
        return tiny_model("qwen3", dtype=torch.float32, tie_word_embeddings=True)
    torch.manual_seed(0)
    return family_model(name).to(torch.float32)


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_other_models_and_buckets():
    """Tied weights, experts that a rank has no tokens for, buckets smaller than a parameter, reduction in the hooks."""
    cases = [
        ("tied", 2, {"zero": {"reduce_bucket_size": 500, "overlap_comm": True}}),
        ("tied", 3, {"zero": {"reduce_bucket_size": 500}}),
        ("qwen3_moe", 1, {}),
        ("qwen3_moe", 2, {}),
        ("qwen3_moe", 3, {}),
    ]
    found = run_deepspeed(train_others, 2, cases)
    for number, (name, *_) in enumerate(cases):
        model = other(name)
        losses = train_whole(model)
        weights = {n: p.detach() for n, p in model.named_parameters()}
        for [(ours, theirs)] in (of_rank[number] for of_rank in found):
            assert ours == pytest.approx(losses, rel=FP32), name
            assert furthest(theirs, weights) < 10 * FP32, name


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_bf16_stays_near(tmp_path):
    """And from a fresh state: nothing compiled yet."""
    half = {"bf16": {"enabled": True}}
    cases = [(stage, 3, half) for stage in (1, 2, 3)]
    cases += [(2, 3, {**half, "data_types": {"grad_accum_dtype": "fp32"}})]
    assert_one_process(run_deepspeed(train_stages, 2, cases, TORCH_EXTENSIONS_DIR=str(tmp_path)), BF16)
    assert any(tmp_path.rglob("*.so"))


def with_lora():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    return get_peft_model(tiny_model(dtype=torch.float32), config).train()


def train_lora(info, stage):
    os.environ["LOCAL_RANK"] = str(info.rank)
    return [train(info, engine_of(stage, model=with_lora()), 3)]


@pytest.mark.slow
@pytest.mark.timeout(1300)
@pytest.mark.parametrize("stage", [2, 3])
def test_lora_under_deepspeed(stage):
    whole = with_lora()
    losses = train_whole(whole, inner=whole.get_base_model())
    weights = {name: p.detach().clone() for name, p in whole.named_parameters()}
    for [(ours, theirs)] in run_deepspeed(train_lora, 2, stage):
        assert ours == pytest.approx(losses, rel=FP32)
        assert furthest(theirs, weights) < FP32


def train_accelerate(info):
    os.environ.update(LOCAL_RANK=str(info.rank), RANK=str(info.rank), WORLD_SIZE=str(info.world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # asked for, and not used: the group is there already
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

    from chunkflow.adapters.accelerate import AcceleratedRunner

    config = {
        "zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    model = tiny_model(dtype=torch.float32)
    engine, optimizer = accelerator.prepare(model, optimizer_of(model))
    runner, losses = AcceleratedRunner(accelerator, engine, retain=3), []
    for batch in batches(info.rank, info.world_size):
        losses.append(float(runner.forward_backward(batch)))
        optimizer.step()
        optimizer.zero_grad()
    return [(losses, weights_of(engine))]


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_accelerate_with_deepspeed():
    assert_one_process(run_deepspeed(train_accelerate, 2), FP32)


def refuse(info):
    os.environ["LOCAL_RANK"] = str(info.rank)
    engine = engine_of(2)
    with pytest.raises(ChunkflowError, match="group is not the ranks that share it; leave group out"):
        ChunkRunner(engine, group=SINGLE)
    runner, first, *_ = ChunkRunner(engine), *batches(info.rank, info.world_size, retain=1)
    runner.forward_backward(first)
    with pytest.raises(ChunkflowError, match=r"step 0 .* engine\.step\(\) was not called since"):
        runner.forward_backward(first)
    with pytest.raises(ChunkflowError, match=r"optimizer is .*; chunks train ZeRO stages 1, 2 and 3"):
        ChunkRunner(engine_of(0))
    with pytest.raises(ChunkflowError, match="configured with torch_autocast"):
        ChunkRunner(engine_of(1, torch_autocast={"enabled": True, "dtype": "bfloat16"}))
    return True


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_what_would_be_lost_or_wrong_is_refused():
    assert run_deepspeed(refuse, 2) == [True, True]
