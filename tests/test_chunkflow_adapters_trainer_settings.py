"""What a Trainer is asked for beside the loss: done as a plain one does it, refused by name, or named as ignored."""

import logging

import pytest
import torch
from accelerate import ParallelismConfig
from transformers import Trainer

from chunkflow import ChunkflowError
from tests.test_chunkflow_adapters_trainers import LENGTHS, ChunkTrainer, arguments, collator, rows
from tests.tiny import tiny_model


def trainer_of(folder, kind=ChunkTrainer, data=None, **changes):
    return kind(
        model=tiny_model(dtype=torch.float32), args=arguments(folder, **changes), data_collator=collator(),
        train_dataset=rows() if data is None else data, eval_dataset=rows(),
    )  # fmt: skip


def steps_of(trainer):
    """Return the samples of each step of two epochs."""
    steps, found = trainer.get_train_dataloader(), []
    for epoch in range(2):
        steps.set_epoch(epoch)
        found.append([batch.samples for batch in steps])
    return found


def test_drop_last_leaves_the_smaller_step_out(tmp_path):
    settings = {"per_device_train_batch_size": 5, "num_train_epochs": 2}
    whole, short = (trainer_of(tmp_path, dataloader_drop_last=drop, **settings) for drop in (False, True))
    every, some = steps_of(whole), steps_of(short)
    assert [[len(step) for step in epoch] for epoch in every] == [[5, 5, 2]] * 2
    assert some == [epoch[:2] for epoch in every]
    short.train()
    plain = trainer_of(tmp_path, Trainer, dataloader_drop_last=True, **settings)
    assert short.state.global_step == 2 * len(plain.get_train_dataloader()) == 4
    assert sum(len(step.samples) for step in short.get_eval_dataloader()) == len(LENGTHS)
    with pytest.raises(ChunkflowError, match="leaves no step: there are 12 samples, and a step has 13 "):
        trainer_of(tmp_path, dataloader_drop_last=True, per_device_train_batch_size=13).train()


def test_samples_longer_than_the_models_positions_are_said(tmp_path, caplog):
    trainer = trainer_of(tmp_path, max_steps=1)
    trainer.model.config.max_position_embeddings = 31
    with caplog.at_level(logging.WARNING, logger="chunkflow"):
        trainer.train()
    (line,) = said(caplog)
    assert line.startswith("2 of 12 samples have more tokens than the model's 31 positions (max_position_embeddings), ")
    assert "the longest 57: they are trained whole" in line


def test_what_becomes_of_long_samples_is_said_once_a_data_set(tmp_path, capsys):
    trainer = trainer_of(tmp_path, max_steps=1)
    trainer.train()
    assert capsys.readouterr().out.count("split_independent") == 1
    trainer.evaluate()  # of the same rows
    assert "split_independent" not in capsys.readouterr().out
    for _ in range(2):
        trainer.evaluate(rows().select(range(1, len(LENGTHS))))
    assert capsys.readouterr().out.count("split_independent") == 1


def test_columns_that_are_not_the_models_do_not_reach_the_collator(tmp_path):
    data = rows().add_column("text", ["what it was"] * len(LENGTHS))
    assert steps_of(trainer_of(tmp_path, data=data)) == steps_of(trainer_of(tmp_path))
    with pytest.raises(ValueError, match="text"):  # the collator's own
        steps_of(trainer_of(tmp_path, data=data, remove_unused_columns=False))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 2; set it to 1"),
        ({"train_sampling_strategy": "sequential"}, "is 'sequential'; samples are drawn .* StreamLoader"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size is True; set it to False: memory is set by chunk_"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches is True; set it to False"),
        ({"parallelism_config": ParallelismConfig(cp_size=2)}, "non_data_parallel_size is 2; leave tp_size, cp_size"),
    ],
)
def test_settings_that_would_make_other_steps_are_refused_by_name(tmp_path, changes, message):
    trainer = trainer_of(tmp_path)
    trainer.args = arguments(tmp_path, **changes)  # with which Accelerate would not make some on one rank
    with pytest.raises(ChunkflowError, match=message):
        trainer.train()


def test_accumulation_is_refused_when_the_trainer_is_made(tmp_path):
    with pytest.raises(ChunkflowError, match="gradient_accumulation_steps is 2; set it to 1"):
        trainer_of(tmp_path, gradient_accumulation_steps=2)


def test_settings_without_effect_are_named_in_one_line(tmp_path, caplog):
    changes = {"train_sampling_strategy": "group_by_length", "dataloader_num_workers": 2, "max_steps": 1}
    with caplog.at_level(logging.WARNING, logger="chunkflow"):
        trainer_of(tmp_path, max_steps=1).train()
        assert not said(caplog)
        trainer_of(tmp_path, **changes).train()
    assert said(caplog) == [
        "ChunkTrainer ignores train_sampling_strategy='group_by_length' (every step is packed and balanced over "
        "ranks), "
        "dataloader_num_workers=2 (a thread loads ahead)"
    ]


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "chunkflow"]
