"""Input that is wrong or goes wrong: one clear error on every rank, before anything runs, and nothing left behind."""

import time

import numpy as np
import pytest
import torch
from transformers import Trainer

from chunkflow import (
    ChunkflowError,
    ChunkLoader,
    ChunkRunner,
    MemorySource,
    PlanError,
    PlannerConfig,
    Sample,
    SourceError,
)  # fmt: skip
from chunkflow.adapters.rows import CollatedRows
from chunkflow.adapters.trainer import ChunkMixin
from chunkflow.prefetch import Prefetcher
from tests.chunk_steps import batches
from tests.spawn import run_ranks
from tests.test_chunkflow_adapters_trainers import arguments, collator, rows, tokenizer
from tests.tiny import sequence, tiny_model


class Announced(MemorySource):
    """Says another length of its last sample than it has."""

    def __init__(self, length):
        super().__init__([sequence(n, 9) for n in range(3)])
        self.lengths = np.array([9, 9, length])


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (0, "sample 2 has 0 tokens; it needs at least 1: drop it before planning"),
        (-4, "sample 2 has -4 tokens; it needs at least 1"),
        (2**31, "sample 2 has 2147483648 tokens; at most 2147483647 can be counted in 32 bits: divide it"),
        (2**62, "sample 2 has 4611686018427387904 tokens; at most 2147483647"),
    ],
)
def test_lengths_that_no_sample_has(length, message):
    with pytest.raises(PlanError, match=message):
        ChunkLoader(Announced(length), chunk_tokens=8, global_batch=2, rank=0, world_size=1)


def test_empty_sequences_of_every_source():
    with pytest.raises(SourceError, match="sample 0 has 0 tokens"):
        MemorySource([Sample(*(np.array([], dtype=t) for t in (np.int64, np.int64, np.float32)))])
    with pytest.raises(SourceError, match="row 1 has no tokens; leave empty rows out"):
        CollatedRows([[1, 2], []], lambda batch: {"input_ids": batch, "labels": batch})


def test_rows_that_change_after_they_were_counted():
    """Lengths and numbers of targets stay what they were; only a token is another one."""
    data = [{"ids": [1, 2, 3, 4]}, {"ids": [5, 6, 7]}]
    source = CollatedRows(data, lambda batch: {"input_ids": [batch[0]["ids"]], "labels": [batch[0]["ids"]]})
    loader = ChunkLoader(source, chunk_tokens=8, global_batch=2, rank=0, world_size=1)
    data[1]["ids"][1] = 9
    with pytest.raises(SourceError, match="row 1 has other tokens or labels than when it was first read"):
        list(loader)


def test_a_worker_that_dies_is_an_error_and_not_an_end():
    def ended():
        yield 1
        raise SystemExit(0)

    with Prefetcher(ended(), depth=1) as ahead, pytest.raises(ChunkflowError, match=r"ended by SystemExit\(0\)"):
        list(ahead)


def test_a_worker_that_vanishes(monkeypatch):
    monkeypatch.setattr("chunkflow.prefetch._fill", lambda *_: None)
    with Prefetcher(iter([1]), depth=1) as ahead, pytest.raises(ChunkflowError, match="is gone without an error"):
        next(ahead)


def disagree(info):
    """Every rank sees the error, at once, and goes on to the next."""
    first = info.rank == 0
    model, seen = tiny_model(), []

    def fails(make):
        started = time.monotonic()
        with pytest.raises(ChunkflowError) as caught:
            make()
        assert time.monotonic() - started < 30
        assert all(p.grad is None for p in model.parameters())
        seen.append(str(caught.value))

    fails(lambda: ChunkRunner(model, retain=1 if first else 2))
    fails(lambda: ChunkRunner(model, retain=0))
    model.lm_head.weight.requires_grad_(first)
    fails(lambda: ChunkRunner(model))
    model.lm_head.weight.requires_grad_(True)

    runner, (step_0, step_1, _) = ChunkRunner(model), batches(info.rank, info.world_size, retain=1)
    source, same = MemorySource([sequence(n, 20) for n in range(8)]), {"global_batch": 4, "prefetch": 1}
    place = {"rank": info.rank, "world_size": info.world_size}  # said by hand: such loaders compare nothing
    for other in ({"chunk_tokens": 8 + info.rank}, {"chunk_tokens": 8, "pair_cost": 1e-3 * (1 + info.rank)}):
        with ChunkLoader(source, **same, **place, **other, report=lambda _: None) as loader:
            batch = next(iter(loader))
            fails(lambda batch=batch: runner.forward_backward(batch))

    fails(lambda: runner.forward_backward(step_0 if first else step_1))
    fails(lambda: runner.evaluate(step_0 if first else step_1))
    if not first:
        step_0.chunks[-1].tensors()["input_ids"][0, 0] = 1000
    fails(lambda: runner.forward_backward(step_0))
    return seen


def test_ranks_that_disagree_are_told_before_the_first_step():
    ours, theirs = run_ranks(disagree, 2)
    assert ours[:7] == theirs[:7]
    for text, message in zip(
        ours,
        [
            "the runners of ranks 0 and 1 differ: retain is 1 and 2; give every rank the same",
            "retain is 0; it must be at least 1",
            "the runners of ranks 0 and 1 differ: trained parameters is '21 (",
            "ranks 0 and 1 are about to train step 0 by different plans (of other data, chunk_tokens, ",
            "ranks 0 and 1 are about to train step 0 by different plans",
            "ranks 0 and 1 are about to train different steps: step 0 and 1, loss weights ",
            "ranks 0 and 1 are about to train different steps: step 0 and 1",
            "rank 1 cannot run its part of step 0; its own error says why",
        ],
        strict=True,
    ):
        assert text.startswith(message), text
    assert "id 1000 is outside the model's vocabulary" in theirs[7]


class Chunked(ChunkMixin, Trainer):
    chunks = PlannerConfig(chunk_tokens=16)


class Focal(Chunked):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) * 2


@pytest.mark.parametrize(
    ("kind", "changes", "given", "message"),
    [
        (Focal, {}, {}, r"Focal\.compute_loss makes the loss another one"),
        (Chunked, {}, {"compute_loss_func": lambda *_, **__: 0}, "compute_loss_func makes the loss another one"),
        (Chunked, {"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor makes the loss another one"),
        (Chunked, {"neftune_noise_alpha": 5.0}, {}, "neftune_noise_alpha makes the loss another one"),
    ],
)
def test_losses_that_are_no_cross_entropy_are_refused_by_name(tmp_path, kind, changes, given, message):
    model = tiny_model(dtype=torch.float32)
    with pytest.raises(ChunkflowError, match=message):
        kind(model=model, args=arguments(tmp_path, **changes), train_dataset=rows(), data_collator=collator(), **given)


def test_data_sets_without_rows_are_refused_when_the_trainer_is_made(tmp_path):
    settings = {"args": arguments(tmp_path, max_steps=1), "data_collator": collator()}
    with pytest.raises(
        SourceError, match=r"IterableDataset is not read by index, .*from_generator\), or train it with StreamLoader"
    ):
        Chunked(model=tiny_model(), train_dataset=rows().to_iterable_dataset(), **settings)
    source = MemorySource([sequence(n, 9) for n in range(3)])  # has no rows either, and is what chunks are made of
    assert len(Chunked(model=tiny_model(), train_dataset=source, **settings).get_train_dataloader()) == 1


@pytest.mark.parametrize("data", [rows(), rows().to_iterable_dataset(), [[1, 2, 3]]], ids=lambda d: type(d).__name__)
def test_what_is_no_source_is_named(data):
    with pytest.raises(SourceError, match=rf"{type(data).__name__} is no source: open_source.* StreamLoader trains"):
        ChunkLoader(data, chunk_tokens=16, global_batch=4)


def test_predictions_that_chunks_do_not_keep_are_refused_by_name(tmp_path):
    settings = {"train_dataset": rows(), "eval_dataset": rows(), "data_collator": collator()}
    model = tiny_model(dtype=torch.float32)
    message = "compute_metrics takes predictions, and chunks keep none"
    with pytest.raises(ChunkflowError, match=message):
        Chunked(model=model, args=arguments(tmp_path), compute_metrics=lambda _: {"x": 1}, **settings)
    trainer = Chunked(model=model, args=arguments(tmp_path), **settings)
    with pytest.raises(ChunkflowError, match="predict gives logits, and chunks keep none"):
        trainer.predict(rows())
    trainer.compute_metrics = lambda _: {"x": 1}
    for ask in (trainer.train, trainer.evaluate):
        with pytest.raises(ChunkflowError, match=message):
            ask()


def test_dpo_is_refused_by_name(tmp_path):
    trl = pytest.importorskip("trl", reason="the extra [trl] is not installed")
    from datasets import Dataset

    class ChunkedDPO(ChunkMixin, trl.DPOTrainer):
        chunks = PlannerConfig(chunk_tokens=16)

    args = trl.DPOConfig(**{**arguments(tmp_path).to_dict(), "bf16": False})
    pairs = Dataset.from_list([{"prompt": "def f(", "chosen": "x):", "rejected": "y"}] * 4)
    models = {"model": tiny_model(dtype=torch.float32), "ref_model": tiny_model(dtype=torch.float32)}
    with pytest.raises(ChunkflowError, match=r"DPOTrainer\.compute_loss makes the loss .* such as DPO"):
        ChunkedDPO(**models, args=args, train_dataset=pairs, processing_class=tokenizer())
