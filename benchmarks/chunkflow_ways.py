"""The ways that `benchmarks.chunkflow` compares: each prepares one rank's part of the same step.

`ours`: ChunkLoader and ChunkRunner. The peers run transformers' own model and loss with activation checkpointing, their
gradients are added up once a step like ours, and every target counts the same: `padded` batches of similar lengths
(transformers' `LengthGroupedSampler`, batches dealt as accelerate deals them), `single` sequences dealt round-robin,
`packed` rows of TRL's `pack_dataset(strategy="bfd")`, which loses what is longer than a row, and needs no recompute
where its rows are short. Decoder layers of every way run as they are or compiled (`torch.compile`, sizes dynamic).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import get_length_grouped_indices

from benchmarks.chunkflow_work import Load, Work, causal
from chunkflow import ChunkLoader, ChunkRunner, MemorySource
from chunkflow.cost import num_pairs
from chunkflow.errors import ChunkflowError
from chunkflow.fit import CostFit
from chunkflow.program import operations
from chunkflow.records import StepBatch
from chunkflow.reduce import sum_gradients
from chunkflow.sources import Sample

Batch = Mapping[str, torch.Tensor]

Models = Mapping[tuple[bool, bool], PreTrainedModel]
"""By (whether layers recompute, whether they are compiled)."""


@dataclass(frozen=True, slots=True)
class Job:
    """What every way is given."""

    samples: Sequence[Sample]
    rank: int
    world_size: int
    models: Models
    """Equal weights."""
    pair_cost: float
    """Of the bare kernels: time of a pair over the rest of a token's."""

    def model(self, setting: Mapping[str, int], *, recompute: bool) -> PreTrainedModel:
        """Return the model of a setting, in which `compiled` is 1 or 0."""
        return self.models[recompute, bool(setting["compiled"])]


def ours(job: Job, setting: Mapping[str, int]) -> Work:
    """Plan and collate by our loader; `chunk_tokens` and `retain` are settings.

    The plan's pair cost is fitted to the chunks of one step, as `OnlineBalance` does while training.
    """
    model, retain = job.model(setting, recompute=False), setting["retain"]
    runner, fit = ChunkRunner(model, retain=retain), CostFit()
    runner.on_operation = fit.add
    runner.forward_backward(_planned(job, setting, job.pair_cost))
    model.zero_grad(set_to_none=True)
    runner.on_operation = None
    batch = _planned(job, setting, _fitted(fit, job.pair_cost))
    load = Load()
    for op, position in operations(batch.chunks, retain):
        tokens, pairs = batch.chunks[position].num_tokens, num_pairs(batch.chunks[position])
        load += (
            Load(backward_tokens=tokens, head_tokens=tokens, backward_pairs=pairs)
            if op == "B"
            else Load(forward_tokens=tokens, forward_pairs=pairs)
        )
    return Work(lambda: runner.forward_backward(batch).item(), load, sum(c.num_tokens for c in batch.chunks))


def _planned(job: Job, setting: Mapping[str, int], pair_cost: float) -> StepBatch:
    loader = ChunkLoader(
        MemorySource(job.samples), global_batch=len(job.samples), rank=job.rank, world_size=job.world_size,
        chunk_tokens=setting["chunk_tokens"], retain=setting["retain"], pair_cost=pair_cost, report=lambda _: None,
    )  # fmt: skip
    with loader:
        return next(iter(loader))


def _fitted(fit: CostFit, otherwise: float) -> float:
    """Return the pair cost of what all ranks measured, the same on each; `otherwise` after too few chunks."""
    sums = torch.from_numpy(fit.sums)
    if dist.is_initialized():
        dist.all_reduce(sums)
    try:
        return fit.solve(sums.numpy()).pair_cost
    except ChunkflowError:
        return otherwise


def padded(job: Job, setting: Mapping[str, int]) -> Work:
    """Batches of `batch` sequences of similar lengths."""
    lengths = [len(s.input_ids) for s in job.samples]
    size = setting["batch"]
    order = get_length_grouped_indices(lengths, size, generator=torch.Generator().manual_seed(0))
    batches = [order[at : at + size] for at in range(0, len(order), size)]
    mine = batches[job.rank :: job.world_size]
    load = Load()
    for batch in mine:
        longest = max(lengths[i] for i in batch)
        whole = all(lengths[i] == longest for i in batch)  # no padding: no mask, and the kernel skips what is hidden
        load += recomputed(len(batch) * longest, len(batch) * (causal(longest) if whole else longest**2))
    rows = [_padded_rows([job.samples[i] for i in batch]) for batch in mine]
    model = job.model(setting, recompute=True)
    return _work(model, rows, load, sum(lengths[i] for batch in mine for i in batch))


def single(job: Job, setting: Mapping[str, int]) -> Work:
    """One sequence after another, as they come."""
    mine = job.samples[job.rank :: job.world_size]
    load = Load()
    for sample in mine:
        load += recomputed(len(sample.input_ids), causal(len(sample.input_ids)))
    rows = [_padded_rows([s]) for s in mine]
    return _work(job.model(setting, recompute=True), rows, load, sum(len(s.input_ids) for s in mine))


def packed(job: Job, setting: Mapping[str, int]) -> Work:
    """Rows of at most `row_tokens`, by TRL; positions start anew at every sequence, as its collator has them."""
    from datasets import Dataset, disable_progress_bars
    from trl.data_utils import pack_dataset

    disable_progress_bars()
    table = Dataset.from_dict({"input_ids": [s.input_ids.tolist() for s in job.samples]})
    rows = pack_dataset(table, setting["row_tokens"], strategy="bfd", map_kwargs={"batch_size": len(job.samples)})
    mine = [rows[i] for i in range(job.rank, len(rows), job.world_size)]
    load, batches, loaded = Load(), [], recomputed if setting["recompute"] else kept
    for row in mine:
        tokens = len(row["input_ids"])
        load += loaded(tokens, tokens**2)  # the block mask hides pairs, and the kernel computes them all
        positions = np.concatenate([np.arange(n) for n in row["seq_lengths"]])
        ids = torch.tensor(row["input_ids"])
        labels = ids.masked_fill(torch.from_numpy(positions == 0), -100)
        batches.append(
            {"input_ids": ids[None], "labels": labels[None], "position_ids": torch.from_numpy(positions)[None]}
        )
    model = job.model(setting, recompute=bool(setting["recompute"]))
    return _work(model, batches, load, sum(len(row["input_ids"]) for row in mine))


WAYS: dict[str, Callable[[Job, Mapping[str, int]], Work]] = {
    "ours": ours,
    "padded": padded,
    "single": single,
    "packed": packed,
}


def kept(tokens: float, pairs: float) -> Load:
    """Return the load of rows whose layers run forward once."""
    return Load(tokens, tokens, tokens, pairs, pairs)


def recomputed(tokens: float, pairs: float) -> Load:
    """Return the load of rows whose layers run forward twice."""
    return Load(2 * tokens, tokens, tokens, 2 * pairs, pairs)


def _padded_rows(samples: Sequence[Sample]) -> Batch:
    """Return ids, labels [B, T] and, where there is padding, the mask."""
    longest = max(len(s.input_ids) for s in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.input_ids)] = torch.from_numpy(np.asarray(sample.input_ids))
        mask[row, : len(sample.input_ids)] = 1
    return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}


def _work(model: PreTrainedModel, rows: Sequence[Batch], load: Load, tokens: int) -> Work:
    targets = torch.tensor(sum(int((row["labels"][:, 1:] != -100).sum()) for row in rows))
    if dist.is_initialized():
        dist.all_reduce(targets)

    def run() -> float:
        total = torch.zeros((), dtype=torch.float64)
        for row in rows:
            options: dict[str, Any] = {"use_cache": False, "num_items_in_batch": targets}
            loss = model(**row, **options).loss
            loss.backward()
            total += loss.detach().double()
        if dist.is_initialized():
            world = dist.group.WORLD
            assert world is not None
            sum_gradients(model.parameters(), world)
            dist.all_reduce(total)
        return total.item()

    return Work(run, load, tokens)
