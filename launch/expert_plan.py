"""The chunks of expert-parallel layers in a job: from settings, from a file, or measured and kept up to date.

T tokens of a chunk, K experts a token, D model width, E experts, P ranks of the ep axis
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from launch.errors import ConfigError
from launch.files import RunFolder, write_json
from moe.calibrate import measure_layer, with_overheads
from moe.config import ExpertsConfig
from moe.cost import LayerLoad, Profile
from moe.drift import LayerWatch, replan_reason
from moe.errors import PlanError
from moe.gradients import GradientReducer
from moe.issue import IssueQueue, own_group
from moe.measuring import ExpertShape, expert_jobs, made_experts
from moe.parallel import ParallelExperts, expert_layers
from moe.plan import LayerPlan
from moe.planner import plan_layer
from moe.profiler import MIN_BYTES, Links, ProfileConfig, agree_on_plans, make_profile
from moe.sliced import backward_order, ready_amounts, use_plans
from moe.spread import QUANTA, plan_model

MEASURE = "measure"
_MEMORY = 0.9
"""How much of the mean load of the steps before stays in it: one step's load is too uneven to plan by."""
_MOST_BYTES = 256 << 20
"""Nothing larger is measured, which would take minutes and the memory of the step: beyond, costs go on as they rise."""


def first_plan(config: ExpertsConfig) -> LayerPlan | dict[str, LayerPlan] | None:
    """Return what the settings say before anything is measured. Raises ConfigError for a bad file."""
    if config.chunks is not None:
        return LayerPlan(config.chunks, config.chunks, reasons=("set by moe.chunks",))
    return None if config.plan in (None, MEASURE) else read_plans(Path(config.plan))


def read_plans(path: Path) -> LayerPlan | dict[str, LayerPlan]:
    """Return the plan of all layers, or plans by layer name, from a JSON file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"moe.plan {path} cannot be read: {error}; give {MEASURE!r}, or a file as `python -m moe plan --out` writes"
        ) from error
    try:
        if not isinstance(values, dict) or "forward_chunks" in values:
            return LayerPlan.from_json(json.dumps(values))
        return {name: LayerPlan.from_json(json.dumps(plan)) for name, plan in values.items()}
    except PlanError as error:
        raise ConfigError(f"moe.plan {path}: {error}") from error


class ExpertPlanner:
    """Plans the layers of an expert-parallel model from a measured profile, and again when their loads drift.

    Made on every rank, with the profile of rank 0 for all; every rank calls `after_step`. The first step shows when
    dense gradients are ready, so from the second one on layers hide them. Where layers no longer take the time that
    the profile says, it is measured anew.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reducer: GradientReducer,
        *,
        tokens: int,
        slice_bytes: int,
        dtype: torch.dtype,
        folder: RunFolder,
    ) -> None:
        """`dtype` is that of the experts' products, and of the rows that travel."""
        self._model, self._reducer, self._folder = model, reducer, folder
        self._names = backward_order(model)
        self._layers = expert_layers(model)
        self._slice_bytes, self._dtype = slice_bytes, dtype
        top_k = getattr(model.config, "num_experts_per_tok", None)
        if not isinstance(top_k, int):
            raise ConfigError(
                f"moe.plan {MEASURE!r} needs the experts of a token, and {type(model).__name__}'s configuration has no "
                "num_experts_per_tok; give moe.chunks or a plan file"
            )
        self._rows = tokens * top_k
        first = self._layers[self._names[0]]
        self._mean_LE: Tensor | None = None
        self._ready: list[int] | None = None
        even = torch.ones(len(self._layers), first.placement.num_experts)
        self._planned = self._loads(even)
        self._gradients = own_group(None, timeout_s=first.runner.lanes.timeout_s)
        self._profile = self._measure()
        runners = {name: layer.runner for name, layer in self._layers.items()}
        self._watch = LayerWatch(runners, self._profile, slice_bytes=slice_bytes)
        self.ratio: float | None = None
        """What layers took over what was predicted, where the last step ended a comparison."""
        self._told = False
        self._plan()

    def describe(self) -> list[str]:
        """Return what was measured and the plans in words, equal ones once."""
        return [*self._profile.describe(), *self._plans()]

    def _plans(self) -> list[str]:
        return list(dict.fromkeys(str(self._layers[name].runner.plan) for name in self._names))

    def after_step(self, rows_LE: Tensor) -> tuple[str, ...]:
        """Look at the rows that each expert of each layer had in a step; return why layers were planned anew, if so."""
        mean = rows_LE.double() / rows_LE.sum(1, keepdim=True).clamp(min=1)
        self._mean_LE = mean if self._mean_LE is None else _MEMORY * self._mean_LE + (1 - _MEMORY) * mean
        loads = self._loads(self._mean_LE)
        found = {name: replan_reason(self._planned[name], loads[name]) for name in self._names}
        reasons = [f"{name}: {reason}" for name, reason in found.items() if reason is not None]
        if self._ready is None:
            self._ready = _least(ready_amounts(self._reducer))
            reasons = [f"dense gradients of {sum(self._ready):,} bytes are ready as backward reaches the layers"]
        told, why = self._compare(loads)
        if why is not None:
            reasons = [why, *reasons]
        if not reasons:
            return told
        self._planned = loads
        self._plan()
        self._write()
        path, measured = self._folder.expert_plans, [] if why is None else self._profile.describe()
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        anew = f"Experts planned anew: {reasons[0]}{more}; plans in {path}"
        return (*told, anew, *measured, *self._plans())

    def _compare(self, loads: dict[str, LayerLoad]) -> tuple[tuple[str, ...], str | None]:
        """Return what there is to say of the profile; and, where it no longer held and was made anew, why."""
        compared = self._watch.after_step()
        self.ratio = None if compared is None else compared.ratio
        if compared is None:
            return (), None
        if compared.reason is not None:
            self._planned, self._told = loads, False
            self._profile = self._measure()
            self._watch.renew(self._profile)
            return (), f"{compared.reason}: links and experts were measured again"
        if self._told:
            return (), None
        self._told = True
        return (f"Layers of experts take {compared.ratio:.2f} times what was predicted, in the median",), None

    def _write(self) -> None:
        if dist.get_rank() == 0:
            plans = {name: json.loads(layer.runner.plan.to_json()) for name, layer in self._layers.items()}
            write_json(self._folder.expert_plans, plans)
            write_json(self._folder.expert_profile, json.loads(self._profile.to_json()))

    def _measure(self) -> Profile:
        with torch.random.fork_rng(devices=[]):  # in the middle of a run its dropout must not feel it
            first = self._names[0]
            return _profile(self._layers[first], self._planned[first], self._rows, self._dtype, self._gradients)

    def _plan(self) -> None:
        loads = [self._planned[name] for name in self._names]
        if self._ready is None:
            plans = [plan_layer(self._profile, load) for load in loads]
        else:
            slices = -(-sum(self._ready) // (QUANTA * self._slice_bytes))  # whole ones, and few enough to plan with
            plans = plan_model(self._profile, loads, self._ready, quantum=max(1, slices) * self._slice_bytes)
        use_plans(self._model, agree_on_plans(dict(zip(self._names, plans, strict=True))))

    def _loads(self, rows_LE: Tensor) -> dict[str, LayerLoad]:
        """Return each layer's load on its busiest rank, for experts that share the rows of a chunk like this."""
        pairs = zip(self._layers.items(), rows_LE.double(), strict=True)
        return {name: self._load(layer, rows_E) for (name, layer), rows_E in pairs}

    def _load(self, layer: ParallelExperts, rows_E: Tensor) -> LayerLoad:
        lanes, down = layer.runner.lanes, layer.down_proj
        of_rank_P = rows_E.view(lanes.num_ranks, -1).sum(1)
        skew = float(of_rank_P.max() * lanes.num_ranks / of_rank_P.sum()) if of_rank_P.sum() else 1.0
        rows = self._rows * skew
        nbytes = rows * down.shape[1] * self._dtype.itemsize
        members = lanes.num_members
        return LayerLoad(
            exchange_bytes=nbytes,
            gather_bytes=members * nbytes if members > 1 else 0.0,
            expert_rows=rows * members,
            slice_bytes=self._slice_bytes,
        )


def _profile(
    layer: ParallelExperts, load: LayerLoad, rows: int, dtype: torch.dtype, gradients: dist.ProcessGroup
) -> Profile:
    """Measure links, experts of this layer's sizes, and the executor. Every rank calls."""
    lanes = layer.runner.lanes
    assert isinstance(lanes.inter, IssueQueue), "the settings refuse to measure where nothing moves between ranks"
    assert lanes.ep is not None
    count, width, inner = layer.down_proj.shape
    shape = ExpertShape(width=width, inner=inner, count=count, dtype=dtype)
    forward, backward = expert_jobs(shape)
    links = Links(
        inter=lanes.inter,
        ep=lanes.ep,
        intra=lanes.intra if isinstance(lanes.intra, IssueQueue) else None,
        esp=lanes.esp,
        gradients=gradients,
    )
    most_bytes = min(max(2 * int(load.exchange_bytes), 1 << 17), _MOST_BYTES)
    most_rows = min(max(2 * int(load.expert_rows), 256), max(256, _MOST_BYTES // (width * dtype.itemsize)))
    config = ProfileConfig(
        least_bytes=min(MIN_BYTES, most_bytes // 4), most_bytes=most_bytes, least_rows=16, most_rows=most_rows
    )
    profile = make_profile(links, expert_forward=forward, expert_backward=backward, config=config)
    stand_in = made_experts(shape)
    took = measure_layer(stand_in, lanes, rows=rows, width=width, like=stand_in.down_proj)
    return with_overheads(profile, load, *took)


def _least(amounts: Sequence[int]) -> list[int]:
    """Return the amounts that every rank has: the least over ranks of what is ready by each layer."""
    ready = torch.tensor(amounts).cumsum(0)
    dist.all_reduce(ready, dist.ReduceOp.MIN)
    return ready.diff(prepend=ready.new_zeros(1)).tolist()
