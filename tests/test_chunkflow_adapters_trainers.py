"""transformers' Trainer, Accelerate, PEFT, in chunks: weights equal those of the plain run, fp32."""

import copy
import importlib
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from chunkflow import SINGLE, ChunkRunner, PlannerConfig, SourceError, UnsupportedModelError
from chunkflow.adapters.accelerate import AcceleratedRunner
from chunkflow.adapters.rows import CollatedRows
from chunkflow.adapters.trainer import ChunkMixin
from tests.chunk_steps import batches, furthest, one_process, optimizer_of, train_whole
from tests.spawn import run_ranks
from tests.tiny import VOCABULARY, tiny_model
from tests.tokenizers_fixture import tiny_tokenizer

TOLERANCE = 2e-5  # fp32, another order of additions
LENGTHS = [9, 31, 4, 57, 12, 20, 7, 45, 3, 16, 28, 11]


def rows(labelled=False):
    rng = np.random.default_rng(0)
    data = [{"input_ids": rng.integers(1, VOCABULARY, n).tolist()} for n in LENGTHS]
    for row in data if labelled else []:
        row["completion_mask"] = [int(i >= len(row["input_ids"]) // 3) for i in range(len(row["input_ids"]))]
    return Dataset.from_list(data)


class ChunkTrainer(ChunkMixin, Trainer):
    chunks = PlannerConfig(chunk_tokens=16)


def arguments(folder, **changes):
    settings = {
        "output_dir": str(folder), "use_cpu": True, "per_device_train_batch_size": 4, "num_train_epochs": 2,
        "learning_rate": 0.05, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 1.0,
        "logging_steps": 1, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    return TrainingArguments(**{**settings, **changes})


def tokenizer():
    made = copy.copy(tiny_tokenizer())
    made.pad_token = made.eos_token  # id 0, which no row has
    return made


def collator():
    return DataCollatorForLanguageModeling(tokenizer(), mlm=False)


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_trainer_equals_the_plain_trainer(tmp_path):
    ours = ChunkTrainer(
        model=tiny_model(dtype=torch.float32), args=arguments(tmp_path), train_dataset=rows(), eval_dataset=rows(),
        data_collator=collator(),
    )  # fmt: skip
    steps = ours.get_train_dataloader()
    order = []
    for epoch in range(2):
        steps.set_epoch(epoch)
        order.append([n for batch in steps for n in batch.samples])
    assert sorted(order[0]) == sorted(order[1]) == list(range(len(LENGTHS)))
    assert order[0] != order[1]
    ours.train()

    reference = tiny_model(dtype=torch.float32)
    losses = train_plainly(reference, order)
    logged = [entry["loss"] for entry in ours.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, abs=2e-4)  # the trainer rounds what it logs
    assert furthest(weights_of(ours.model), weights_of(reference)) < TOLERANCE
    assert ours.evaluate()["eval_loss"] == pytest.approx(mean_loss(reference), rel=TOLERANCE)


def train_plainly(model, orders, *, micro=4):
    """The loop a Trainer runs: padded batches, the mean over targets, clipping, SGD."""
    optimizer, losses, data, pad = torch.optim.SGD(model.parameters(), lr=0.05), [], rows(), collator()
    for order in orders:
        for start in range(0, len(order), micro):
            batch = pad([data[n] for n in order[start : start + micro]])
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def mean_loss(model):
    total = count = 0
    for row in rows():
        batch = collator()([row])
        targets = len(row["input_ids"]) - 1
        total, count = total + float(model(**batch).loss) * targets, count + targets
    return total / count


def train_one_epoch(folder, **changes):
    trainer = ChunkTrainer(
        model=tiny_model(dtype=torch.float32), args=arguments(folder, num_train_epochs=1, **changes),
        train_dataset=rows(), eval_dataset=rows(), data_collator=collator(),
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]  # before the model is wrapped
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.state.num_input_tokens_seen == (sum(LENGTHS) if "include_num_input_tokens_seen" in changes else 0)
    return logged, weights_of(trainer.model), (before, trainer.evaluate()["eval_loss"])


def rank_of_trainer(info, folder):
    with as_torchrun_has_it(info):
        count = {"include_num_input_tokens_seen": True}
        return train_one_epoch(folder, per_device_train_batch_size=2, ddp_backend="gloo", **count)


def test_trainer_on_two_ranks(tmp_path):
    losses, weights, evaluations = train_one_epoch(tmp_path, include_num_input_tokens_seen="non_padding")
    for ours, theirs, found in run_ranks(rank_of_trainer, 2, str(tmp_path)):
        assert ours == pytest.approx(losses, abs=2e-4)
        assert furthest(theirs, weights) < TOLERANCE
        assert found == pytest.approx(evaluations, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("adapter", "library", "extra"),
    [
        ("accelerate", "accelerate", "accelerate"),
        ("trl", "trl.trainer.sft_config", "trl"),
        ("megatron", "megatron.core.models.gpt", "megatron"),
    ],
)
def test_an_adapter_without_its_library_names_the_extra(monkeypatch, adapter, library, extra):
    monkeypatch.delitem(sys.modules, f"chunkflow.adapters.{adapter}", raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        ImportError, match=rf"chunkflow\.adapters\.{adapter} needs .*: pip install 'longrail\[{extra}\]'"
    ):
        importlib.import_module(f"chunkflow.adapters.{adapter}")


def test_collators_without_labels_are_refused():
    with pytest.raises(SourceError, match=r"row 0 is \['input_ids'\] after the collator"):
        CollatedRows([{"input_ids": [1, 2]}], lambda batch: {"input_ids": batch[0]["input_ids"]})


@pytest.fixture
def fresh_accelerate():
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def accelerated(mixed_precision, rank=0, world_size=1):
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    model = tiny_model(dtype=torch.float32)
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    runner, losses = AcceleratedRunner(accelerator, model, retain=3), []
    for batch in batches(rank, world_size):
        losses.append(float(runner.forward_backward(batch)))
        optimizer.step()
        optimizer.zero_grad()
    return losses, weights_of(accelerator.unwrap_model(model))


def test_accelerate_equals_one_process(fresh_accelerate):
    losses, weights = one_process(dtype=torch.float32)
    ours, theirs = accelerated("no")
    assert ours == pytest.approx(losses, rel=TOLERANCE)
    assert furthest(theirs, weights) < TOLERANCE


def test_accelerate_in_bf16_stays_near(fresh_accelerate):
    losses, _ = one_process(dtype=torch.float32)
    assert accelerated("bf16")[0] == pytest.approx(losses, rel=0.01)


@contextmanager
def as_torchrun_has_it(info):
    """The environment of a rank, and nothing left in Accelerate of what ran in this process before."""
    states = (AcceleratorState, GradientState, PartialState)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            patch.setenv(name, str(info.world_size if "WORLD" in name else info.rank))
        for state in states:
            state._reset_state()
        yield
    for state in states:
        state._reset_state()


def rank_of_accelerate(info):
    with as_torchrun_has_it(info):
        assert Accelerator(cpu=True).num_processes == info.world_size
        return accelerated("no", info.rank, info.world_size)


def test_accelerate_on_two_ranks():
    losses, weights = one_process(dtype=torch.float32)
    for ours, theirs in run_ranks(rank_of_accelerate, 2):
        assert ours == pytest.approx(losses, rel=TOLERANCE)
        assert furthest(theirs, weights) < TOLERANCE


def with_lora(seed=1, **changes):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"], "init_lora_weights": False, **changes}
    return get_peft_model(tiny_model(), LoraConfig(**settings)).train()


@pytest.mark.parametrize("saved", [None, ["lm_head", "embed_tokens"]], ids=["adapters", "and a head of its own"])
def test_lora_equals_whole_sequences(saved):
    pytest.importorskip("peft", reason="the extra [peft] is not installed")
    whole, ours = (with_lora(modules_to_save=saved) for _ in "ab")
    losses = train_whole(whole, inner=whole.get_base_model())
    runner, optimizer = ChunkRunner(ours, retain=2, group=SINGLE), optimizer_of(ours)
    for batch, expected in zip(batches(retain=2), losses, strict=True):
        assert float(runner.forward_backward(batch)) == pytest.approx(expected, rel=1e-7)
        trained = [name for name, p in ours.named_parameters() if p.grad is not None]
        assert trained == [name for name, _ in ours.named_parameters() if "lora" in name or "modules_to_save" in name]
        optimizer.step()
        optimizer.zero_grad()
    assert furthest(weights_of(ours), weights_of(whole)) < 1e-7
    assert furthest(weights_of(ours), weights_of(with_lora(modules_to_save=saved))) > 1e-3


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("PromptTuningConfig", {"num_virtual_tokens": 3}, "is PROMPT_TUNING, which puts tokens or keys"),
        ("AdaLoraConfig", {"total_step": 100, "target_modules": ["q_proj"]}, "is ADALORA, which adds a loss"),
        ("LoraConfig", {"alora_invocation_tokens": [3, 4], "target_modules": ["q_proj"]}, "begins at certain tokens"),
    ],
)
def test_methods_that_do_more_than_change_weights_are_refused(kind, settings, message):
    peft = pytest.importorskip("peft", reason="the extra [peft] is not installed")
    model = peft.get_peft_model(tiny_model(), getattr(peft, kind)(task_type="CAUSAL_LM", **settings))
    with pytest.raises(UnsupportedModelError, match=rf"PEFT adapter 'default' .*{message}"):
        ChunkRunner(model, group=SINGLE)


def test_an_adapter_on_the_output_projection_is_refused():
    pytest.importorskip("peft", reason="the extra [peft] is not installed")
    with pytest.raises(UnsupportedModelError, match=r"is a Linear of PEFT, and .* name it in modules_to_save"):
        ChunkRunner(with_lora(target_modules=["lm_head", "q_proj"]), group=SINGLE)
