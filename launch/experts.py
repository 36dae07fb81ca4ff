"""Experts in a job: made from a dense model, spread over ranks, trained in step, and put together again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

import moe
from chunkflow import ChunkRunner, StepBatch
from chunkflow.engine import InStep
from launch.config import FinetuneConfig
from launch.expert_plan import MEASURE, ExpertPlanner, first_plan
from launch.files import RunFolder, replace_folder
from launch.partial import WholeModel
from launch.pipeline_job import Place
from launch.precision import autocast, dtype_of
from moe.config import ExpertsConfig
from moe.gradients import GradientReducer
from moe.metrics import load_balance
from moe.parallel import ParallelExperts
from moe.sliced import attach_reducer
from moe.state import state_dict, to_global, to_local
from moe.sync import grad_norm

_IDLE = (
    "Routers learn nothing: with moe.top_k 1 the weight of a token's only expert is always one, so their gradient is "
    "zero; 2 trains them",
)
STARVED_STEPS = 16
"""Steps without a row after which an expert is told of: routers seldom come back to it."""


def with_experts(model: PreTrainedModel, config: ExpertsConfig, *, seed: int) -> PreTrainedModel:
    """Return the model to train: `model`, or a mixture of experts made of it. The same on every rank.

    It has no auxiliary loss, which is no sum over tokens: chunks could not train it exactly.
    """
    if config.num_experts is None:
        return model
    made = moe.upcycle(model, config.num_experts, top_k=config.top_k, seed=seed)
    made.config.output_router_logits = False
    return made


class ExpertEngine(InStep):
    """Chunkflow's `Engine` of an expert-parallel model: in step, experts summed over their copies only."""

    def __init__(self, group: dist.ProcessGroup | None, model: nn.Module, reducer: GradientReducer) -> None:
        super().__init__(group)
        self._layers, self._reducer = moe.expert_layers(model), reducer
        self._rows: Tensor | None = None

    def call(self, forward: Callable[..., Tensor], **inputs: Any) -> Tensor:
        """See `Engine.call`; counts the rows of every chunk once, at the forward that has a backward."""
        hidden = forward(**inputs)
        view = inputs.get("chunk_view")
        is_dummy = view is None or view.spans[0].sample < 0
        if torch.is_grad_enabled() and not is_dummy:
            rows_LE = torch.stack([_rows_of(layer) for layer in self._layers.values()])
            self._rows = rows_LE if self._rows is None else self._rows + rows_LE
        return hidden

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Engine.backward`: layers hide dense gradients in the last one, when they are whole."""
        if last:
            loss.backward()
            return
        with self._reducer.accumulate():
            loss.backward()

    def reduce(self, parameters: Sequence[nn.Parameter]) -> None:
        """See `WholeParameters.reduce`."""
        self._reducer.flush()

    def take_rows(self) -> Tensor:
        """Return the rows `[L, E]` that each expert of each layer had since the last call, over all ranks; int64."""
        layer = next(iter(self._layers.values()))
        empty = torch.zeros(len(self._layers), layer.placement.num_experts, dtype=torch.int64)
        rows, self._rows = self._rows, None
        rows = empty.to(layer.down_proj.device) if rows is None else rows
        dist.all_reduce(rows)
        return rows.cpu()


class Starving:
    """Tells once of each expert that gets no row, step after step."""

    def __init__(self) -> None:
        self._steps_LE: Tensor | None = None

    def after_step(self, rows_LE: Tensor) -> tuple[str, ...]:
        """Return a note on experts without a row in so many steps, `rows_LE` of this one included."""
        before_LE = torch.zeros_like(rows_LE) if self._steps_LE is None else self._steps_LE
        self._steps_LE = torch.where(rows_LE == 0, before_LE + 1, 0)
        starved = (self._steps_LE == STARVED_STEPS).nonzero().tolist()
        if not starved:
            return ()
        names = ", ".join(f"layer {layer} expert {expert}" for layer, expert in starved)
        return (
            f"No token chose {names} in {STARVED_STEPS} steps, and nothing brings a router back: a lower "
            "optimizer.lr or fewer experts may help (moe/dead counts them)",
        )


def _rows_of(layer: ParallelExperts) -> Tensor:
    assert layer.rows_per_expert_E is not None, "the forward that was just run fills it"
    return layer.rows_per_expert_E


class ExpertRunner:
    """Runs a job's steps with the experts of its model spread over ranks; dense layers are whole on every rank.

    Every rank makes one, with the same whole model, and calls every method. Raises MoeConfigError, on every rank alike,
    where experts do not divide.
    """

    def __init__(self, model: PreTrainedModel, config: FinetuneConfig, place: Place) -> None:
        settings, self._mesh = config.moe, place.mesh
        self.model, self.whole = model, WholeModel.of(model)
        esp = "esp" if settings.esp > 1 else None
        plan, layers = first_plan(settings), settings.layers
        on_span = place.times.experts.append
        moe.parallelize(model, place.mesh, ep="ep", esp=esp, dp="dp", plan=plan, config=layers, on_span=on_span)
        reducer = attach_reducer(model, slice_bytes=settings.slice_bytes, average=False)
        self._engine = ExpertEngine(place.data_group, model, reducer)
        self._precision = partial(autocast, config.model.precision, model.device)
        with self._precision():
            self._runner = ChunkRunner(
                model,
                retain=config.chunks.retain,
                group=place.data_group,
                seed=config.run.seed,
                engine=lambda _: self._engine,
            )
        self._runner.on_operation = place.times.operation
        self.num_positions = self._runner.num_positions
        self._planner = None
        if settings.plan == MEASURE:
            self._planner = ExpertPlanner(
                model,
                reducer,
                tokens=config.chunks.chunk_tokens,
                slice_bytes=settings.slice_bytes,
                dtype=dtype_of(config.model.precision),
                folder=RunFolder(Path(config.run.folder)),
            )
        self._starving = Starving()
        self._idle = _IDLE if settings.num_experts is not None and settings.top_k == 1 else ()
        self.loads: dict[str, float] = {}
        """Of the last step: how evenly the experts of each layer were loaded, and each expert's share."""
        self.notes: tuple[str, ...] = ()
        """Of the last step: why layers were planned anew, and which experts have starved."""

    @property
    def description(self) -> str:
        """Return where the experts are, and the plans of the layers, in words."""
        layers = moe.expert_layers(self.model)
        first = next(iter(layers.values()))
        sizes = " x ".join(f"{axis} {self._mesh[axis].size()}" for axis in ("dp", "ep", "esp"))
        text = f"{len(layers)} layers of {first.placement.num_experts} experts over {sizes}"
        plans = dict.fromkeys(str(layer.runner.plan) for layer in layers.values())
        told = plans if self._planner is None else self._planner.describe()
        return "\n".join([text, *told, *self._idle])

    def forward_backward(self, batch: StepBatch) -> Tensor:
        """Run one step; return its mean loss. Every rank calls."""
        with self._precision():
            loss = self._runner.forward_backward(batch)
        rows_LE = self._engine.take_rows()
        self.loads, self.notes = _loads(rows_LE), self._starving.after_step(rows_LE)
        if self._planner is not None:
            self.notes = (*self.notes, *self._planner.after_step(rows_LE))
            if self._planner.ratio is not None:
                self.loads["moe/measured_over_predicted"] = self._planner.ratio
        return loss

    def evaluate(self, batch: StepBatch) -> Tensor:
        """Return the mean loss of a step. Every rank calls."""
        with self._precision():
            return self._runner.evaluate(batch)

    def grad_norm(self) -> Tensor:
        """Return the norm of the whole model's gradient: all experts, copies of them once. Every rank calls."""
        return grad_norm(self.model)

    def gather(self, build: Callable[[], PreTrainedModel]) -> PreTrainedModel | None:
        """Return the whole model on rank 0, filled into the one that `build` makes there. Every rank calls."""
        state = {name: _whole(value) for name, value in state_dict(self.model).items()}
        if dist.get_rank():
            return None
        model = build()
        model.load_state_dict(state)
        return model

    def write(self, folder: Path, beside: Callable[[Path], None]) -> None:
        """Write the whole model to `folder`, prove it, and let `beside` add to it. Every rank calls; rank 0 writes."""
        if dist.get_rank():
            moe.save_pretrained(self.model, folder)
            return

        def fill(partial: Path) -> None:
            moe.save_pretrained(self.model, partial)
            beside(partial)

        replace_folder(folder, fill)

    def to_global(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """Return a state with experts as DTensors: `launch.state.Spread`."""
        return to_global(self.model, flat, prefix="model.")

    def to_local(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """Return a state with the experts of this rank: `launch.state.Spread`."""
        return to_local(self.model, flat, prefix="model.")


def _loads(rows_LE: Tensor) -> dict[str, float]:
    layers = [load_balance(rows, prefix=f"moe/layer{i}") for i, rows in enumerate(rows_LE.tolist())]
    worst = {
        "moe/imbalance": max(one[f"moe/layer{i}/imbalance"] for i, one in enumerate(layers)),
        "moe/entropy": min(one[f"moe/layer{i}/entropy"] for i, one in enumerate(layers)),
        "moe/dead": sum(one[f"moe/layer{i}/dead"] for i, one in enumerate(layers)),
    }
    return {**worst, **{name: value for one in layers for name, value in one.items()}}


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
