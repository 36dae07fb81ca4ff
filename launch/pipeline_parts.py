"""A model cut into the stages of a pipeline, and what one rank of it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from launch.chunk_stage import ChunkLayers
from launch.partial import PartialModel, WholeModel
from launch.split import DecoderArguments, Layer, split
from pipeline.config import PipelineConfig
from pipeline.schedules.build import balanced_stages
from pipeline.stage import GraphStage


@dataclass(frozen=True, kw_only=True)
class RankParts:
    """One rank's part of a model."""

    rank: int
    bounds: tuple[tuple[int, int], ...]
    """First layer and one past the last, of every stage."""
    layers: Mapping[int, ChunkLayers]
    """Of each stage held here."""
    stages: Mapping[int, GraphStage]
    model: PartialModel
    whole: WholeModel
    holders: Mapping[str, tuple[int, ...]]
    """For every name of the whole model, the ranks of the pipeline that hold it, ascending; two for a tied weight."""
    first_trained: int
    """The first stage that has something to train."""

    @property
    def shared(self) -> tuple[str, ...]:
        """Trained parameters that several ranks hold, in the model's order."""
        return tuple(name for name in self.whole.trained if len(self.holders[name]) > 1)

    def counted(self) -> list[str]:
        """Names of the trained parameters that this rank answers for where each may count once."""
        return [name for name in self.whole.trained if self.holders[name][0] == self.rank]


def cut(model: PreTrainedModel, config: PipelineConfig, *, rank: int) -> RankParts:
    """Return what a rank of the pipeline holds; what it does not is free once the caller drops `model`. Pure otherwise.

    Layers are cut where the heaviest stage is lightest, by the products a token passes through.
    Raises ModelError for a model that cannot be split, and ScheduleError for more stages than layers.
    """
    layers, whole = split(model), WholeModel.of(model)
    bounds = balanced_stages([layer_weight(layer) for layer in layers], config.num_stages)
    place = devices_of(config)
    pieces = [layers[lo:hi] for lo, hi in bounds]
    trained = [any(p.requires_grad for layer in piece for p in layer.module.parameters()) for piece in pieces]
    first_trained = trained.index(True) if any(trained) else len(pieces)
    arguments, mine, stages = DecoderArguments(model), {}, {}
    for stage in (s for s in range(len(pieces)) if place[s] == rank):
        before = sum(layer.kind == "decoder" for piece in pieces[:stage] for layer in piece)
        mine[stage] = ChunkLayers(pieces[stage], arguments, first_decoder=before)
        stages[stage] = GraphStage(
            mine[stage].run,
            input_grad=stage > first_trained,
            trained=stage >= first_trained,
            halves=config.schedule in ("zb_h1", "zbv"),
            device=mine[stage].device,
            on_release=mine[stage].release,
        )
    return RankParts(
        rank=rank,
        bounds=bounds,
        layers=mine,
        stages=stages,
        model=PartialModel([layer for s in mine for layer in pieces[s]], whole),
        whole=whole,
        holders=_holders(pieces, place, whole),
        first_trained=first_trained,
    )


def held_names(model: PreTrainedModel, config: PipelineConfig, *, rank: int) -> set[str]:
    """Return the parameters that a rank of the pipeline holds, tied ones by their first name. Raises as `cut`."""
    layers, place = split(model), devices_of(config)
    bounds = balanced_stages([layer_weight(layer) for layer in layers], config.num_stages)
    mine = [layer for stage, (lo, hi) in enumerate(bounds) if place[stage] == rank for layer in layers[lo:hi]]
    return {name for layer in mine for name in layer.param_names}


def layer_weight(layer: Layer) -> float:
    """Return the multiplications of a layer for one token, attention to other tokens left out.

    Of experts all weights count, though a token passes through few; the layers of a model are alike in that.
    """
    if layer.kind in ("embedding", "norm"):
        return 0.0
    return float(sum(p.numel() for p in layer.module.parameters() if p.ndim >= 2))


def devices_of(config: PipelineConfig) -> tuple[int, ...]:
    """Return the rank that holds each stage: in turns, or there and back for zbv."""
    if config.schedule == "zbv":
        return tuple(min(s, config.num_stages - 1 - s) for s in range(config.num_stages))
    return tuple(s % config.ranks for s in range(config.num_stages))


def _holders(pieces: Sequence[Sequence[Layer]], place: Sequence[int], whole: WholeModel) -> dict[str, tuple[int, ...]]:
    found: dict[str, set[int]] = {name: set() for name in whole.shapes}
    for stage, piece in enumerate(pieces):
        for layer in piece:
            buffers = (f"{layer.name}.{name}" for name, _ in layer.module.named_buffers())
            for name in (*layer.param_names, *buffers):
                if name in found:
                    found[name].add(place[stage])
    return {name: tuple(sorted(ranks)) for name, ranks in found.items()}
