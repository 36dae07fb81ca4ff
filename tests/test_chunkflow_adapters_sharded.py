"""transformers' Trainer in chunks, sharded by its own arguments (FSDP2, ZeRO): two ranks equal one process, fp32."""

import os
from importlib.util import find_spec

import pytest
import torch

from tests.chunk_steps import furthest
from tests.spawn import run_ranks
from tests.test_chunkflow_adapters_trainers import (
    TOLERANCE,
    ChunkTrainer,
    arguments,
    as_torchrun_has_it,
    collator,
    rows,
)
from tests.tiny import tiny_model

FSDP2 = {
    "fsdp": "full_shard",
    "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}


def zero(stage):
    return {
        "deepspeed": {
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto", "zero_allow_untested_optimizer": True,
        }
    }  # fmt: skip


def trained(folder, **changes):
    trainer = ChunkTrainer(
        model=tiny_model(dtype=torch.float32), args=arguments(folder, num_train_epochs=1, **changes),
        train_dataset=rows(), eval_dataset=rows(), data_collator=collator(),
    )  # fmt: skip
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return logged, whole_weights(trainer.model, "deepspeed" in changes), trainer.evaluate()["eval_loss"]


def whole_weights(model, by_deepspeed):
    parameters = dict(model.named_parameters())
    if by_deepspeed:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(parameters.values())):
            return {name: p.detach().clone() for name, p in parameters.items()}
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for n, p in parameters.items()}


def rank_of_sharded(info, folder, cases):
    found = []
    for changes in cases:
        before = dict(os.environ)  # the arguments tell Accelerate through it
        if "deepspeed" in changes:
            import deepspeed  # as on a machine without a compiler: the operator takes a minute or two at first

            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        with as_torchrun_has_it(info):
            found.append(trained(folder, per_device_train_batch_size=2, ddp_backend="gloo", **changes))
        os.environ.clear()
        os.environ.update(before)
    return found


@pytest.mark.parametrize("engine", ["fsdp2", "zero"])
def test_the_trainer_sharded_on_two_ranks(engine, tmp_path):
    if engine == "zero" and find_spec("deepspeed") is None:
        pytest.skip("the extra [deepspeed] is not installed")
    losses, weights, evaluated = trained(tmp_path)
    cases = [FSDP2] if engine == "fsdp2" else [zero(2), zero(3)]
    env = {"DS_ACCELERATOR": "cpu"}
    for of_rank in run_ranks(rank_of_sharded, 2, str(tmp_path), cases, fresh=True, timeout_s=120, env=env):
        for ours, theirs, found in of_rank:
            assert ours == pytest.approx(losses, abs=2e-4)  # the trainer rounds what it logs
            assert furthest(theirs, weights) < TOLERANCE
            assert found == pytest.approx(evaluated, rel=TOLERANCE)
