"""A job put together around a tiny model and made-up data, trained leg by leg: every engine against one process."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch

from checkpointing import SINGLE, Checkpointer, KeepLast
from chunkflow import MemorySource
from chunkflow.reference import float64_throughout
from launch.data import Data
from launch.env import World
from launch.job import assemble
from launch.lora import with_adapters
from launch.pipeline_job import find_place
from launch.recipe import read_config
from tests.flat_states import Flat
from tests.moe_models import FAMILIES, tiny_moe
from tests.tiny import VOCABULARY, sequence, tiny_model

LENGTHS = [10, 9, 75, 30, 12, 7, 66, 25, 14, 90, 8, 31]
"""Of samples; chunks have 16 tokens, so that some samples are groups of up to six."""
SHORT = [10, 9, 16, 3, 12, 7, 6, 15, 14, 9, 8, 11]
FLAGS = {
    "chunks.chunk_tokens": 16, "chunks.retain": 2, "chunks.global_batch": 3, "chunks.pair_cost": 0.01,
    "optimizer.lr": 0.01, "optimizer.clip_norm": 0.5, "run.epochs": 4, "pipeline.timeout_s": 30,
}  # fmt: skip


def job_of(info, flags, *, dtype=torch.float64, lengths=LENGTHS, layers=2, family="llama", changes=None):
    """A job on this rank; `flags` are by dotted key, `changes` are of the model's configuration."""
    config = read_config([f"--{key}={value}" for key, value in {**FLAGS, **flags}.items()], prog="x", description="")
    torch.manual_seed(1)
    sizes = {"dtype": dtype, "tie_word_embeddings": True, "num_hidden_layers": layers, **(changes or {})}
    if family in FAMILIES:
        model = tiny_moe(family, vocab_size=VOCABULARY, max_position_embeddings=4096, **sizes)
    else:
        model = tiny_model(family, **sizes)
    model = with_adapters(model.train(), config.lora)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)  # zero, they would hide the gradient of the other half
        if "lora" in name:
            p.data = p.data.to(dtype)
    source = MemorySource([sequence(n, length) for n, length in enumerate(lengths)])
    held_out = MemorySource([sequence(100 + n, length) for n, length in enumerate((5, 8, 3))])
    world = World(info.rank, info.world_size, torch.device("cpu"), None)
    place = find_place(config.pipeline, config.moe, world)
    return assemble(config, world, Data(source, held_out, None, ()), model, place)


def rank_trains(info, folder, until, flags, options=None):
    """Resume from `folder`, train to step `until`, saving every step; losses, norms and held-out losses."""
    options = options or {}
    exact = float64_throughout() if options.get("dtype", torch.float64) is torch.float64 else nullcontext()
    with exact, Checkpointer(folder, keep=KeepLast(99)) as checkpoints:
        job = job_of(info, flags, **options)
        with job.loader:
            checkpoints.restore(job.state)
            steps, told = iter(job.loader), []
            while job.state.step < until:
                metrics = job.train_step(next(steps))
                told.append((metrics.loss, metrics.grad_norm, job.evaluate()))
                checkpoints.save(job.state.step, job.state)  # and train on beside it
    getattr(job.runner, "close", lambda: None)()  # pipelines have threads
    return told


def saved(folder, step):
    """What a checkpoint holds, but for random numbers: whole tensors by name."""
    back = Flat({})
    with Checkpointer(folder, group=SINGLE) as checkpoints:
        assert checkpoints.restore(back, step=step).step == step
    tensors = {name: x for name, x in back.loaded.items() if isinstance(x, torch.Tensor)}
    return {name: x for name, x in tensors.items() if not name.startswith("rng.")}


def assert_near(ours, theirs, tolerance):
    """The same names and shapes; values to `tolerance` of the largest of each."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].shape == value.shape, name
        scale = float(value.abs().max()) or 1.0
        assert float((ours[name].double() - value.double()).abs().max()) <= tolerance * scale, name


def assert_told(ours, theirs, tolerance):
    np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=tolerance)
