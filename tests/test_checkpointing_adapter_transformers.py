"""A transformers Trainer on two ranks: saved beside its training, and resumed bit by bit in its own data order."""

import os
import shutil
from typing import ClassVar

import numpy as np
import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from checkpointing import SINGLE, Checkpointer
from checkpointing.adapters.transformers import CheckpointCallback
from tests.flat_states import Flat, same
from tests.spawn import run_ranks
from tests.tiny import tiny_model


class Rows(torch.utils.data.Dataset):
    """Rows of tokens; the order in which they were asked for is kept."""

    def __init__(self) -> None:
        self.order = []

    def __len__(self):
        return 40

    def __getitem__(self, index):
        self.order.append(index)
        generator = np.random.Generator(np.random.PCG64(index))
        tokens = torch.from_numpy(generator.integers(1, 60, 12))
        return {"input_ids": tokens, "labels": tokens}


def trainer_of(folder, seed, callbacks):
    torch.manual_seed(seed)
    model = tiny_model(tie_word_embeddings=True, attention_dropout=0.3, dtype=torch.float32)
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, per_device_train_batch_size=2, max_steps=14, learning_rate=0.01,
        lr_scheduler_type="cosine", warmup_steps=2, logging_steps=2, report_to=[], save_strategy="steps", save_steps=4,
        gradient_accumulation_steps=2, disable_tqdm=True, seed=3,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=Rows(), callbacks=callbacks)


def told(trainer):
    """What a run came to: weights, moments, and the curve."""
    weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    optimizer = trainer.optimizer.state_dict()["state"]
    moments = {str(n): slots["exp_avg_sq"].clone() for n, slots in optimizer.items()}
    keep = ("step", "loss", "learning_rate", "grad_norm")
    curve = [{key: line[key] for key in keep} for line in trainer.state.log_history if "loss" in line]
    return weights, moments, curve


def rank_trains(info, folder, resume):
    os.environ.update(
        RANK=str(info.rank), LOCAL_RANK=str(info.rank), WORLD_SIZE=str(info.world_size),
        LOCAL_WORLD_SIZE=str(info.world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT="29400",
    )  # fmt: skip
    callback = CheckpointCallback(f"{folder}/checkpoints")
    trainer = trainer_of(f"{folder}/out", 7 if resume else 1, [callback])
    start = callback.resume_from(trainer)
    assert (start is not None) == resume
    trainer.train(resume_from_checkpoint=start)
    assert trainer.args.world_size == info.world_size
    return told(trainer), trainer.train_dataset.order[-16:]


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_trainer_resumes_bit_by_bit(tmp_path, ranks):
    whole = run_ranks(rank_trains, ranks, str(tmp_path), False, fresh=True, timeout_s=120)
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == ["step-12", "step-14", "step-8"]
    assert not list((tmp_path / "out").glob("checkpoint-*"))  # the Trainer wrote none of its own
    with Checkpointer(tmp_path / "checkpoints", group=SINGLE) as checkpoints:
        back = Flat({})
        checkpoints.restore(back)
        assert same(back.loaded["model.lm_head.weight"], whole[0][0][0]["lm_head.weight"])
        assert {name for name in back.loaded if "#" not in name} >= {
            "trainer",
            "scheduler",
            "rng.0",
            f"rng.{ranks - 1}",
        }
    for name in ("step-12", "step-14"):
        shutil.rmtree(tmp_path / "checkpoints" / name)
    resumed = run_ranks(rank_trains, ranks, str(tmp_path), True, fresh=True, timeout_s=120)
    for (ours, order), (theirs, other) in zip(resumed, whole, strict=True):
        for a, b in zip(ours[:2], theirs[:2], strict=True):
            assert same(a, b)
        assert ours[2] == theirs[2]  # the whole curve, that of the steps before included
        assert order == other


class Scored(Trainer):
    """Its evaluations say what they are told to."""

    scores: ClassVar = {2: 3.0, 4: 1.0, 6: 2.0, 8: 2.5, 10: 2.7, 12: 2.9}

    def evaluate(self, *args, **kwargs):
        metrics = {"eval_score": self.scores[self.state.global_step]}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_what_the_trainer_makes_of_an_evaluation_is_saved(tmp_path, strategy, caplog):
    """The best metric, and how long a callback has been waiting for a better one: known only behind the evaluation."""

    def made(stop):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "out"), use_cpu=True, max_steps=stop, eval_strategy="steps", eval_steps=2,
            save_strategy=strategy, save_steps=2, metric_for_best_model="score", greater_is_better=False, report_to=[],
            disable_tqdm=True, per_device_train_batch_size=1, logging_strategy="no",
            restore_callback_states_from_checkpoint=True, save_total_limit=2, load_best_model_at_end=stop > 6,
        )  # fmt: skip
        callback = CheckpointCallback(tmp_path / "checkpoints")
        callbacks = [callback, EarlyStoppingCallback(early_stopping_patience=3)]
        trainer = Scored(tiny_model(), arguments, train_dataset=Rows(), eval_dataset=Rows(), callbacks=callbacks)
        return trainer, callback.resume_from(trainer)

    trainer, start = made(6)
    assert start is None
    trainer.train()
    assert "finds none of the checkpoints" not in caplog.text
    trainer, start = made(14)
    assert start.endswith("checkpoint-6" if strategy == "steps" else "checkpoint-4")
    trainer.train(resume_from_checkpoint=start)
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (1.0, 4)
    assert trainer.state.global_step == 10  # three evaluations behind the best one
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert kept == (["step-10", "step-8"] if strategy == "steps" else ["step-2", "step-4"])
    assert "load_best_model_at_end finds none of the checkpoints" in caplog.text
