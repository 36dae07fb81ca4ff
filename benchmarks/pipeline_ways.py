"""The ways that real ranks of `benchmarks.pipeline` compare: RoundPipe, and torch.distributed.pipelining's schedules.

All run the very same layers (transformers' own, with chunkflow's attention and loss), the same micro-batches, and AdamW
behind them. A way trains one step at a call, and gives its loss; every rank calls.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.utils.checkpoint import checkpoint

from benchmarks.pipeline_peers import Bounds
from chunkflow import StepBatch
from chunkflow.attention.base import ChunkView, Span
from chunkflow.attention.interface import attention_of
from chunkflow.loss import tiled_cross_entropy
from launch.slot_layers import SlotLayers
from launch.split import DecoderArguments, Layer, call_decoder
from pipeline.roundpipe.host_plan import plan_host
from pipeline.roundpipe.host_store import exchange_pids, open_store
from pipeline.roundpipe.lowering import completed
from pipeline.roundpipe.optimizer import HostOptimizer
from pipeline.roundpipe.peers import Peers
from pipeline.roundpipe.planner import RoundPipePlan
from pipeline.roundpipe.worker import SlotWorker

TIMEOUT_S = 300.0
LR = 1e-4


def make_optimizer(parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer of every way."""
    return torch.optim.AdamW(parameters.values(), lr=LR, fused=True)


class RoundPipe:
    """Ours. Takes `layers` over; `cap_bytes` is what a device may hold."""

    def __init__(
        self, layers: SlotLayers, plan: RoundPipePlan, batch: StepBatch, *, room: int, cap_bytes: int | None
    ) -> None:
        group, rank = dist.group.WORLD, dist.get_rank()
        host = plan_host(
            layers.layers, plan.partition, ranks=plan.num_devices, microbatches=len(batch.chunks), boundary_bytes=room
        )
        self.store = open_store(host, group)
        if rank == 0:
            values = {name: p for layer in reversed(layers.layers) for name, p in layer.parameters.items()}
            self.store.fill(lambda name: values[name].detach())
        peers = Peers(self.store, exchange_pids(group), rank=rank, timeout_s=TIMEOUT_S)
        optimizer = HostOptimizer(self.store, peers, make_optimizer, clip_norm=None, trace=None)
        self.worker = SlotWorker(layers.layers, self.store, peers, cap_bytes=cap_bytes, optimizer=optimizer)
        self._layers, self._batch = layers, batch
        self._schedule = completed(plan.schedule())

    def step(self) -> float:
        """Train one step."""
        self._layers.begin([self._batch], seed=0)
        return float(self.worker.run(self._schedule).sum())

    def gradient(self, name: str) -> Tensor:
        """Return the gradient of the last step; a tied one has been added up in the place of its last layer's."""
        return self.store.gradient(name, self.store.plan.parameters[name].layers[-1])

    def close(self) -> None:
        """End the threads."""
        self.worker.close()


class _Stage(nn.Module):
    """Layers lo to hi - 1 of a model, copied; the head's part is in the loss function."""

    def __init__(self, pieces: Sequence[Layer], arguments: DecoderArguments, first: int, *, recompute: bool) -> None:
        super().__init__()
        self.kinds = [piece.kind for piece in pieces]
        self.pieces = nn.ModuleList(copy.deepcopy(piece.module) for piece in pieces)
        self.names = [name for piece in pieces for name in piece.param_names]
        self._arguments, self._first, self._recompute = arguments, first, recompute

    def forward(self, x: Tensor) -> Tensor:
        """Return hidden states [1, T, D] of tokens [1, T] or hidden states."""
        if self._recompute and torch.is_grad_enabled():
            return checkpoint(self._through, x, use_reentrant=False)
        return self._through(x)

    def _through(self, x: Tensor) -> Tensor:
        number, keywords = self._first, None
        with attention_of(self._arguments.skeleton):
            for kind, module in zip(self.kinds, self.pieces, strict=True):
                if kind == "decoder":
                    if keywords is None:
                        keywords = self._keywords(x)
                    x = call_decoder(module, x, keywords[number])
                    number += 1
                elif kind != "head":
                    x = module(x)
        return x

    def _keywords(self, x: Tensor) -> list[Mapping[str, object]]:
        tokens = x.shape[1]
        view = ChunkView((Span(0, tokens, 0, 0),), None, 0)
        return self._arguments.of(x, torch.arange(tokens)[None], chunk_view=view)


class TorchPipeline:
    """Stages of torch.distributed.pipelining, every stage but the last with activation checkpointing."""

    def __init__(
        self, pieces: Sequence[Layer], arguments: DecoderArguments, batch: StepBatch, bounds: Bounds, *, width: int
    ) -> None:
        rank, ranks, device = dist.get_rank(), dist.get_world_size(), torch.device("cpu")
        tensors = [chunk.tensors() for chunk in batch.chunks]
        self._ids = torch.cat([t["input_ids"] for t in tensors])
        self._labels = torch.cat([t["shift_labels"] for t in tensors])
        self._denominator, num, tokens = batch.denominator, len(tensors), self._ids.shape[1]
        hidden, stages = torch.empty(1, tokens, width), []
        self.modules: dict[int, _Stage] = {}
        for s in range(rank, len(bounds), ranks):
            lo, hi = bounds[s]
            before = sum(piece.kind == "decoder" for piece in pieces[:lo])
            self.modules[s] = _Stage(pieces[lo:hi], arguments, before, recompute=s + 1 < len(bounds))
            example = self._ids[:1] if s == 0 else hidden.clone().requires_grad_()
            stages.append(
                PipelineStage(
                    self.modules[s], s, len(bounds), device, input_args=example,
                    output_args=hidden.clone().requires_grad_(), group=dist.group.WORLD,
                )
            )  # fmt: skip
        options = {"n_microbatches": num, "loss_fn": self._loss, "scale_grads": False}
        one = len(bounds) == ranks
        self._schedule = Schedule1F1B(stages[0], **options) if one else ScheduleInterleaved1F1B(stages, **options)
        self._has_first, self._last = 0 in self.modules, len(bounds) - 1
        self.parameters = {name: p for m in self.modules.values() for name, p in _named(m)}
        self._tied = pieces[0].param_names[0] in pieces[-1].param_names
        self._optimizer = make_optimizer(self.parameters)

    def step(self) -> float:
        """Train one step. Raises what torch raises."""
        for p in self.parameters.values():
            p.grad = None
        losses: list[Tensor] = []
        inputs = (self._ids,) if self._has_first else ()
        if self._last in self.modules:
            self._schedule.step(*inputs, target=self._labels, losses=losses, return_outputs=False)
        else:
            self._schedule.step(*inputs, return_outputs=False)
        if self._tied:  # embedding and head are on different ranks
            for p in self._ends():
                dist.all_reduce(p.grad)
        self._optimizer.step()
        total = torch.stack([loss.detach().double() for loss in losses]).sum() if losses else torch.zeros(()).double()
        dist.all_reduce(total)
        return float(total)

    def _ends(self) -> list[nn.Parameter]:
        found = [self.modules[0].pieces[0]] if self._has_first else []
        found += [self.modules[self._last].pieces[-1]] if self._last in self.modules else []
        return [next(module.parameters()) for module in found]

    def _loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        head = self.modules[self._last].pieces[-1]
        assert isinstance(head, nn.Linear)
        weights = (labels[0] >= 0).to(hidden.dtype)
        return tiled_cross_entropy(hidden[0], head.weight, head.bias, labels[0], weights) / self._denominator


def _named(stage: _Stage) -> list[tuple[str, nn.Parameter]]:
    return list(zip(stage.names, stage.parameters(), strict=True))


Way = Callable[[], float]
"""One step; returns its loss."""


def gradient_apart(ours: RoundPipe, peer: TorchPipeline) -> float:
    """Return the largest difference of a gradient, relative to its largest entry, over the parameters held here."""
    worst = 0.0
    for name, p in peer.parameters.items():
        assert p.grad is not None
        theirs = ours.gradient(name)
        worst = max(worst, float((p.grad - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)))
    return worst


def turned(ways: Mapping[str, Way], number: int) -> list[tuple[str, Way]]:
    """Return the ways in the order of a round: each is first as often as the others."""
    names = list(ways)
    at = number % len(names)
    return [(name, ways[name]) for name in names[at:] + names[:at]]
