"""Data and places of small jobs whose experts are spread over ranks."""

from __future__ import annotations

import torch

from chunkflow import ChunkLoader, MemorySource
from launch.mesh import make_mesh
from launch.pipeline_job import Place
from launch.step_times import StepTimes
from tests.moe_models import VOCABULARY
from tests.tiny import sequence

LENGTHS = [10, 9, 75, 30, 12, 7, 66, 25, 14, 90, 8, 31] * 2
"""Of samples; chunks have 16 tokens, so that some samples are groups of up to six."""


def source():
    return MemorySource([shortened(sequence(n, length)) for n, length in enumerate(LENGTHS)])


def shortened(sample):
    """The same sample in the small vocabulary of the MoE models."""
    ids, labels = sample.input_ids % VOCABULARY, sample.shift_labels
    return type(sample)(ids, labels.clip(max=VOCABULARY - 1), sample.loss_weights)


def loader_of(rank, size):
    return ChunkLoader(source(), chunk_tokens=16, global_batch=3, rank=rank, world_size=size, retain=2, pair_cost=0.01)


def place_of(info, ep, esp):
    mesh = make_mesh("cpu", info.world_size, ep=ep, esp=esp)
    world = torch.distributed.group.WORLD
    return Place(
        pipeline_rank=0, pipeline_group=mesh.get_group("pp"), data_rank=info.rank, data_size=info.world_size,
        data_group=world, mesh=mesh, transport=None, device=torch.device("cpu"),
        times=StepTimes(info.rank),
    )  # fmt: skip
