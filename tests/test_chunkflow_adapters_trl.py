"""TRL's SFTTrainer in chunks: weights equal those of the plain one, and two ranks those of one process, fp32."""

import pytest
import torch

from chunkflow import ChunkflowError, PlannerConfig
from tests.chunk_steps import furthest
from tests.spawn import run_ranks
from tests.test_chunkflow_adapters_trainers import (
    LENGTHS,
    TOLERANCE,
    arguments,
    as_torchrun_has_it,
    rows,
    tokenizer,
    weights_of,
)
from tests.tiny import tiny_model

pytest.importorskip("trl", reason="the extra [trl] is not installed")


def sft(kind, folder, **changes):
    from trl import SFTConfig

    args = SFTConfig(**{**arguments(folder, num_train_epochs=1).to_dict(), "bf16": False, "max_length": None,
                        "per_device_train_batch_size": len(LENGTHS), **changes})  # fmt: skip
    return kind(tiny_model(dtype=torch.float32), args=args, train_dataset=rows(labelled=True),
                processing_class=tokenizer())  # fmt: skip


def chunked_sft():
    from chunkflow.adapters.trl import ChunkedSFTTrainer

    class Chunked(ChunkedSFTTrainer):
        chunks = PlannerConfig(chunk_tokens=16)

    return Chunked


def test_trl_trains_completions_only_and_cuts_nothing(tmp_path):
    from trl import SFTTrainer

    Chunked = chunked_sft()
    ours, theirs = sft(Chunked, tmp_path), sft(SFTTrainer, tmp_path)
    ours.train()
    theirs.train()
    assert furthest(weights_of(ours.model), weights_of(theirs.model)) < TOLERANCE
    with pytest.raises(ChunkflowError, match="max_length is 20, and TRL has cut"):
        sft(Chunked, tmp_path, max_length=20)  # before anything is tokenized, and cut
    with pytest.raises(ChunkflowError, match="packing, eval_packing and padding_free must be off"):
        sft(Chunked, tmp_path, packing=True, max_length=64)
    with pytest.raises(ChunkflowError, match="packing, eval_packing and padding_free must be off"):
        sft(Chunked, tmp_path, eval_packing=True)


def sft_steps(folder, **changes):
    """Train two steps an epoch, two epochs; return the logged losses and the weights."""
    trainer = sft(chunked_sft(), folder, num_train_epochs=2, **changes)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], weights_of(trainer.model)


def rank_of_sft(info, folder):
    with as_torchrun_has_it(info):
        return sft_steps(folder, per_device_train_batch_size=3, ddp_backend="gloo")


def test_sft_trainer_on_two_ranks(tmp_path):
    losses, weights = sft_steps(tmp_path, per_device_train_batch_size=6)
    assert len(losses) == 4
    for ours, theirs in run_ranks(rank_of_sft, 2, str(tmp_path)):
        assert ours == pytest.approx(losses, abs=2e-4)
        assert furthest(theirs, weights) < TOLERANCE
