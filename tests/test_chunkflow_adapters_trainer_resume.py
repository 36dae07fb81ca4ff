"""A Trainer in chunks, resumed: the same steps, or an error or a line that says that they are others."""

import pytest
import torch
from transformers import Trainer

from checkpointing.adapters.transformers import CheckpointCallback
from chunkflow import ChunkflowError
from tests.test_chunkflow_adapters_trainers import LENGTHS, ChunkTrainer, arguments, collator, rows, weights_of
from tests.tiny import tiny_model


def test_trainer_resumes_where_it_was(tmp_path):
    args = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    whole = ChunkTrainer(
        model=tiny_model(dtype=torch.float32), args=arguments(tmp_path / "a", **args), train_dataset=rows(),
        data_collator=collator(),
    )  # fmt: skip
    whole.train()
    again = ChunkTrainer(
        model=tiny_model(dtype=torch.float32), args=arguments(tmp_path / "b", **args), train_dataset=rows(),
        data_collator=collator(),
    )  # fmt: skip
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    ours, theirs = weights_of(again.model), weights_of(whole.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("what", ["more samples a step", "other data"])
def test_a_resume_whose_steps_would_be_others_is_refused(tmp_path, what):
    args = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    ChunkTrainer(
        model=tiny_model(dtype=torch.float32), args=arguments(tmp_path, **args), train_dataset=rows(),
        data_collator=collator(),
    ).train()  # fmt: skip
    more = {"per_device_train_batch_size": 8} if what == "more samples a step" else {}
    data = rows() if more else rows().select(range(1, len(LENGTHS)))
    again = ChunkTrainer(
        model=tiny_model(dtype=torch.float32), args=arguments(tmp_path, **args, **more), train_dataset=data,
        data_collator=collator(),
    )  # fmt: skip
    with pytest.raises(ChunkflowError, match="global.batch.*4.*8" if more else "data"):
        again.train(resume_from_checkpoint=True)


def test_a_resume_through_our_checkpoints_is_compared_too(tmp_path):
    def trainer_of(batch):
        callback = CheckpointCallback(tmp_path / "ours")
        args = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=3, per_device_train_batch_size=batch)
        trainer = ChunkTrainer(
            model=tiny_model(dtype=torch.float32), args=args, train_dataset=rows(), data_collator=collator(),
            callbacks=[callback],
        )  # fmt: skip
        return trainer, callback.resume_from(trainer)

    trainer_of(4)[0].train()
    again, found = trainer_of(8)
    with pytest.raises(ChunkflowError, match=r"global_batch was 4 and is 8"):
        again.train(resume_from_checkpoint=found)
    again, found = trainer_of(4)
    again.args.dataloader_drop_last = True  # of 12 samples in steps of 4: nothing
    again.train(resume_from_checkpoint=found)


def test_a_run_moves_over_from_a_plain_trainer_and_is_told_of_its_samples(tmp_path, caplog):
    def train(kind, resume, max_steps):
        args = arguments(tmp_path, save_strategy="steps", save_steps=1, max_steps=max_steps)
        trainer = kind(
            model=tiny_model(dtype=torch.float32), args=args, train_dataset=rows(), data_collator=collator()
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        said = [record.getMessage() for record in caplog.records if record.name == "chunkflow"]
        caplog.clear()
        return said

    assert train(Trainer, None, 1) == []
    (line,) = train(ChunkTrainer, True, 2)
    assert "checkpoint-1 was not trained in chunks" in line
    assert "some are trained a second time and some not at all" in line
    assert train(ChunkTrainer, True, 3) == []


def test_a_resume_with_a_step_more_in_every_epoch_is_refused(tmp_path):
    def trainer_of(drop_last):
        args = arguments(
            tmp_path, save_strategy="steps", save_steps=2, max_steps=3, per_device_train_batch_size=5,
            dataloader_drop_last=drop_last,
        )  # fmt: skip
        return ChunkTrainer(
            model=tiny_model(dtype=torch.float32), args=args, train_dataset=rows(), data_collator=collator()
        )

    trainer_of(False).train()
    with pytest.raises(ChunkflowError, match="an epoch had 3 steps and has 2: set dataloader_drop_last as it was"):
        trainer_of(True).train(resume_from_checkpoint=True)
