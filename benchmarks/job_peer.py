"""One rank of the same job on transformers' Trainer: group_by_length, activation checkpointing, its own checkpoints.

torchrun ... -m benchmarks.job_peer FOLDER OPTIONS        (started by benchmarks.job; OPTIONS are JSON)

B rows of a batch, T tokens of its longest row
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from benchmarks.chunkflow_ways import recomputed
from benchmarks.chunkflow_work import Load, causal
from benchmarks.job_data import Tokens, read_tokens
from benchmarks.job_runs import tell
from chunkflow.memory import peak_resident_bytes, reset_peak
from launch.env import read_processes

Batch = dict[str, torch.Tensor]


class Collator:
    """Pads a batch to its longest row, and remembers what it was."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, int, int]]] = []
        """Of each batch and row: the sample's number, its tokens, its targets."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """Return ids, labels [B, T] and, where there is padding, the mask."""
        lengths = [len(row["input_ids"]) for row in rows]
        ids = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for at, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            ids[at, :length] = torch.tensor(row["input_ids"])
            labels[at, :length] = torch.tensor(row["labels"])
            mask[at, :length] = 1
        scored = (labels[:, 1:] != -100).sum(1).tolist()
        self.batches.append([(row["number"], n, s) for row, n, s in zip(rows, lengths, scored, strict=True)])
        batch = {"input_ids": ids, "labels": labels}
        return batch if bool(mask.all()) else {**batch, "attention_mask": mask}


class Clock(TrainerCallback):
    """When the first batch is asked for, when steps end, and when the last checkpoint is written."""

    def __init__(self) -> None:
        self.began = self.ended = 0.0
        self.steps: list[float] = []
        self.peak_bytes = 0

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        """Before the first batch."""
        reset_peak()
        self.began = time.monotonic()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Behind the batches of a step, which are there."""
        self.steps.append(time.monotonic())

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        """Behind the last step and its checkpoint."""
        self.ended = time.monotonic()
        self.peak_bytes = peak_resident_bytes()


def rows_of(tokens: Tokens) -> list[dict[str, Any]]:
    """Return the data set, each sample with its number."""
    return [{**sample, "number": number} for number, sample in enumerate(tokens.samples)]


def load_of(batch: Sequence[tuple[int, int, int]]) -> Load:
    """Return the operations of one batch, padding and recompute included."""
    lengths = [length for _, length, _ in batch]
    longest = max(lengths)
    whole = min(lengths) == longest  # no padding: no mask, and the kernel skips what is hidden
    return recomputed(len(batch) * longest, len(batch) * (causal(longest) if whole else longest**2))


def by_step(batches: Sequence[Sequence[tuple[int, int, int]]], accumulate: int) -> list[Load]:
    """Return the load of each optimizer step."""
    return [
        sum((load_of(batch) for batch in batches[at : at + accumulate]), Load())
        for at in range(0, len(batches), accumulate)
    ]


def main() -> None:
    """Train; tell what was seen."""
    folder, options = sys.argv[1], json.loads(sys.argv[2])
    accumulate = options["global_batch"] // (options["world_size"] * options["batch"])
    model: Any = AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.float32)
    model.config.use_cache = False
    arguments = TrainingArguments(
        output_dir=options["run"], per_device_train_batch_size=options["batch"], num_train_epochs=1,
        gradient_accumulation_steps=accumulate, train_sampling_strategy="group_by_length",
        activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=options["lr"], lr_scheduler_type="cosine", warmup_steps=options["warmup_steps"],
        weight_decay=0.0, adam_beta2=0.95, max_grad_norm=1.0, bf16=options["precision"] == "bf16",
        save_strategy="steps", save_steps=options["save_every"], save_total_limit=3, logging_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True, ddp_backend="gloo", ddp_find_unused_parameters=False,
        remove_unused_columns=False, seed=0,
    )  # fmt: skip
    clock, collator = Clock(), Collator()
    rows: Any = rows_of(read_tokens(Path(options["data"])))
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator, callbacks=[clock])
    result = trainer.train()
    tell(folder, read_processes().rank, {
        "steps": clock.steps, "assembled": clock.began, "ended": clock.ended, "peak_bytes": clock.peak_bytes,
        "samples": [number for batch in collator.batches for number, _, _ in batch],
        "scored": sum(scored for batch in collator.batches for _, _, scored in batch),
        "loads": [asdict(load) for load in by_step(collator.batches, accumulate)],
        "loss": result.training_loss,
    })  # fmt: skip
    dist.barrier()
    dist.destroy_process_group()  # left alone, gloo's threads may abort a rank that ends


if __name__ == "__main__":
    main()
