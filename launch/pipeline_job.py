"""A pipeline in a job: who is where, and the runner made of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from chunkflow import ChunkLoader, StepBatch
from chunkflow.engine import WholeParameters
from chunkflow.support import require_exact
from launch.bounded import lost_rank_told
from launch.compose import active, cell
from launch.config import FinetuneConfig
from launch.env import World
from launch.errors import ConfigError
from launch.mesh import limit_waits, make_mesh, met_within
from launch.pipeline_parts import cut
from launch.pipeline_runner import PipelineRunner
from launch.step_times import StepTimes
from moe.config import ExpertsConfig
from pipeline.config import PipelineConfig
from pipeline.transport import GroupTransport, Transport


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this rank stands on the axes of the job."""

    pipeline_rank: int
    pipeline_group: dist.ProcessGroup
    data_rank: int
    data_size: int
    data_group: dist.ProcessGroup
    mesh: DeviceMesh
    transport: Transport | None
    """Between the ranks of the pipeline; None without one, and where they share memory."""
    device: torch.device
    times: StepTimes
    shares_memory: bool = False
    """The ranks of the pipeline have one copy of the weights, in memory of their machine: the first fills it."""

    @property
    def in_pipeline(self) -> bool:
        """Whether this rank trains some layers only, so that one rank builds the weights for others."""
        return self.shares_memory or self.transport is not None

    @property
    def holds_weights(self) -> bool:
        """Whether this rank builds the model's weights: the first of the world, or of ranks that share memory."""
        return not self.in_pipeline or (self.pipeline_rank == 0 and (self.shares_memory or self.data_rank == 0))


def find_place(config: PipelineConfig, experts: ExpertsConfig, world: World) -> Place:
    """Make the mesh and, with a pipeline, the connections along it. A collective: every rank calls.

    Raises ConfigError when the processes do not divide over the axes.
    """
    bound = config.schedule != "roundpipe"
    esp, everyone = experts.esp, dist.group.WORLD
    assert everyone is not None, "the world is joined before its ranks are placed"
    mesh = make_mesh(world.device.type, world.world_size, pp=config.ranks, ep=experts.ep or 1, esp=esp)
    group = mesh.get_group("pp")
    data_size = world.world_size // config.ranks
    return Place(
        pipeline_rank=mesh.get_local_rank("pp"),
        pipeline_group=group,
        data_rank=world.rank % data_size,
        data_size=data_size,
        data_group=mesh.get_group("dp") if experts.ranks == 1 else everyone,
        mesh=mesh,
        transport=GroupTransport(group, device=world.device) if bound and config.ranks > 1 else None,
        device=world.device,
        times=StepTimes(world.rank),
        shares_memory=not bound,
    )


def take_place(config: FinetuneConfig, world: World) -> Place:
    """Return where this rank stands, once all ranks have made their groups. Every rank calls.

    Raises ConfigError when the processes do not divide over the axes; WorldError naming a rank that does not come.
    """
    patience_s = config.patience_s

    def find() -> Place:
        # Half of it, so that the others still wait for who finds a rank missing in a group.
        with lost_rank_told(f"rank {world.rank}, making groups", patience_s / 2), met_within(patience_s / 2):
            return find_place(config.pipeline, config.moe, world)

    place = world.board.together("groups of ranks", find, timeout_s=patience_s)
    limit_waits(place.mesh, patience_s)
    return place


def check_whole_samples(config: FinetuneConfig, longest: int) -> None:
    """Raise ConfigError when a sample would be split into dependent chunks and the schedule knows none."""
    if longest <= config.chunks.chunk_tokens:
        return
    for name in active(config):
        found = cell("split", name)
        if found is not None and found.reason is not None:
            needed, _, advice = found.reason.partition("; ")
            raise ConfigError(
                f"pipeline.schedule {config.pipeline.schedule} {needed}, and the longest has {longest} tokens where "
                f"chunks.chunk_tokens is {config.chunks.chunk_tokens}; {advice}"
            )


def check_microbatches(config: FinetuneConfig, loader: ChunkLoader, held_out: Sequence[StepBatch], steps: int) -> None:
    """Raise ConfigError when a step has more chunks than pipeline.microbatches, or none as many as pipeline.rounds.

    Plans the steps only where a setting could be wrong.
    """
    pipeline = config.pipeline
    room, rounds, always = pipeline.microbatches, pipeline.rounds or 1, config.chunks.global_batch

    def counts() -> Iterator[int]:
        return (len(loader.plan(step).ranks[loader.rank]) for step in range(steps))

    if room is not None and room < always:
        most = max([*counts(), *(len(batch.chunks) for batch in held_out)])
        if most > room:
            raise ConfigError(
                f"pipeline.microbatches is {room}, and a step has {most} chunks; make it {most}, or leave it out for "
                f"chunks.global_batch, {always}"
            )
    if rounds > 1 and not any(count >= rounds for count in counts()):
        raise ConfigError(
            f"pipeline.rounds is {rounds}, and no step has as many chunks to pass in them; lower it, or make "
            "chunks.global_batch larger"
        )


def pipeline_runner(model: PreTrainedModel, config: FinetuneConfig, place: Place) -> PipelineRunner:
    """Return the runner of this rank's part of the model. Raises for a model that cannot be trained so."""
    assert place.transport is not None
    num_positions = require_exact(model, WholeParameters(None)).num_positions
    return PipelineRunner(
        cut(model, config.pipeline, rank=place.pipeline_rank),
        config.pipeline,
        place.transport,
        retain=config.chunks.retain,
        group=place.pipeline_group,
        data_group=place.data_group if place.data_size > 1 else None,
        seed=config.run.seed,
        pair_cost=config.chunks.pair_cost,
        num_positions=num_positions,
        times=place.times,
        build_timeout_s=config.run.timeout_s,
    )
