"""What a layout costs, from sizes and a machine: seconds of each layer and chunk, bytes on a device, bytes on links.

T tokens of a chunk, D model width, P parameters, d data-parallel ranks
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from chunkflow.cost import num_pairs
from chunkflow.records import Chunk
from launch.compose import EngineName
from launch.plan_sizes import LayerSize, ModelSizes
from moe.cost import FREE, LayerLoad, Line, Profile
from moe.plan import LayerPlan
from moe.planner import plan_layer
from pipeline.costs import Costs

BACKWARD = 2.0
"""Backward over forward, where weights are trained."""
FP32, BF16, ADAM = 4, 2, 8
AUTOCAST, WHOLLY_BF16 = 0.7, 0.55
"""Of the bytes that fp32 keeps for backward."""
MAX_LIVE = 10**9
"""Parameters that DeepSpeed's stage 3 keeps gathered at a time, by its own default."""
ASSUMPTIONS = (
    "products and attention run at --flops, sustained, and each layer of a chunk takes --overhead besides; a backward "
    "costs two forwards; norms, the optimizer's step, data and evaluation cost nothing",
    "--link is what each device sends and receives at once, to whichever other; nothing else is on it; gradients are "
    "reduced after the last backward, not beside it",
    "weights, gradients and AdamW's moments are fp32 (DeepSpeed in bf16: bf16 weights and gradients, fp32 the rest); "
    "checkpoints, buffers of the runtime and fragmentation are not counted: leave some room below --device-memory",
    "activations by a count of what a layer keeps, within 10% of what launch.layer_costs measures in fp32; under "
    "autocast 0.7 of that and a bf16 copy of the weights with every chunk, within 15%; under DeepSpeed's bf16 0.55 of "
    "it",
    "experts are evenly loaded; LoRA's adapters weigh nothing, and their backward costs one forward",
    "each step is predicted from the data-parallel rank that has most work, over some steps of the recipe's own order; "
    "its memory also with the longest sample of all in the first of them",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Equal devices, each connected to all."""

    devices: int
    memory_bytes: float
    flops: float
    """Sustained, in the recipe's precision."""
    link_bytes_per_s: float
    latency_s: float
    overhead_s: float
    """Of a layer's forward, whatever the size of the chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Of one model on one machine."""

    sizes: ModelSizes
    machine: Machine
    bf16: bool
    lora: bool

    @property
    def backward(self) -> float:
        """Backward over forward."""
        return BACKWARD / 2 if self.lora else BACKWARD

    @property
    def pair_cost(self) -> float:
        """Of a (query, key) pair, relative to the rest of a token's forward: `chunks.pair_cost`."""
        decoders = sum(layer.kind == "decoder" for layer in self.sizes.layers)
        return 2 * self.sizes.query_width * decoders / sum(layer.products for layer in self.sizes.layers)

    @property
    def token_s(self) -> float:
        """Forward of a token without its attention, all layers."""
        return 2 * sum(layer.products for layer in self.sizes.layers) / self.machine.flops

    @property
    def layer_s(self) -> tuple[float, ...]:
        """Of one token and each layer, relative: what stages are balanced by."""
        return tuple(layer.products for layer in self.sizes.layers)

    def _kept_bytes(self, layer: LayerSize, tokens: int, engine: EngineName) -> float:
        """Return what a layer keeps of a chunk; autocast keeps bf16 copies of its weights, too, with every chunk."""
        if not self.bf16:
            return layer.kept * tokens * FP32
        if engine.startswith("zero"):
            return layer.kept * tokens * FP32 * WHOLLY_BF16
        return layer.kept * tokens * FP32 * AUTOCAST + layer.products * BF16

    def costs(self, chunks: Sequence[Chunk], *, ep: int, chunk_tokens: int, engine: EngineName) -> Costs:
        """Return one row a chunk, for the simulator."""
        exchange = _exchange(self, chunk_tokens, ep) if ep > 1 else None
        forward, backward = [], []
        for chunk in chunks:
            part = chunk.num_tokens / chunk_tokens
            pairs_s = 4 * self.sizes.query_width * num_pairs(chunk) / self.machine.flops
            forward.append(tuple(self._forward_s(one, chunk.num_tokens, pairs_s) for one in self.sizes.layers))
            backward.append(tuple(self.backward * s for s in forward[-1]))
            if exchange is not None:
                more = (exchange.predicted_forward_s * part, exchange.predicted_backward_s * part)
                for rows, extra in zip((forward, backward), more, strict=True):
                    rows[-1] = tuple(
                        s + extra * bool(one.experts) for s, one in zip(rows[-1], self.sizes.layers, strict=True)
                    )
        state = 2 * self.sizes.key_width * ((BF16 if self.bf16 else FP32) + FP32)
        states = tuple(state * (one.kind == "decoder") for one in self.sizes.layers)
        tokens = [chunk.num_tokens for chunk in chunks]
        return Costs(
            forward_s=tuple(forward),
            backward_s=tuple(backward),
            activation_bytes=tuple(
                tuple(self._kept_bytes(one, n, engine) for one in self.sizes.layers) for n in tokens
            ),
            state_bytes=tuple(tuple(n * b for b in states) for n in tokens),
            boundary_bytes=tuple(n * self.sizes.width * FP32 for n in tokens),
            hop_s=self.machine.latency_s,
            link_bytes_per_s=self.machine.link_bytes_per_s,
        )

    def held_bytes(self, layers: Sequence[LayerSize], *, engine: EngineName, ranks: int, ep: int) -> float:
        """Return bytes of weights, gradients and moments of some layers on one device; `ranks` share the data."""
        number = sum(layer.dense + layer.experts / ep for layer in layers)
        if self.lora:
            return number * FP32 / (ranks if engine in ("zero3",) else 1)
        half = engine.startswith("zero") and self.bf16
        weight, master = (BF16, FP32) if half else (FP32, FP32 * engine.startswith("zero"))
        rest = ADAM + master
        if engine == "ddp":
            return number * (2 * FP32 + ADAM)
        if engine == "fsdp2":  # gathered once a step, gradients whole until its end
            return number * (2 * FP32 + (2 * FP32 + ADAM) / ranks)
        if engine == "zero3":
            return number * (2 * weight + rest) / ranks + min(number, MAX_LIVE) * weight
        return number * (2 * weight + rest / ranks)

    def reduce_s(self, layers: Sequence[LayerSize], *, engine: EngineName, ranks: int, ep: int, passes: int) -> float:
        """Return seconds of moving weights and gradients in a step; `passes` are its forwards and twice its backwards.

        Experts of expert-parallel layers are summed over their copies only.
        """
        dense, experts = (sum(getattr(layer, name) for layer in layers) for name in ("dense", "experts"))
        width = BF16 if engine.startswith("zero") and self.bf16 else FP32
        if self.lora and engine != "zero3":
            return 0.0
        if engine == "zero3":
            return self._moved(dense + experts, ranks) * width * passes
        twice = 2 * FP32 if engine in ("ddp", "fsdp2") else 2 * width
        return self._moved(dense, ranks) * twice + self._moved(experts / ep, ranks // ep) * twice

    def _moved(self, number: float, ranks: int) -> float:
        """Return seconds a byte of each of `number` values takes to be gathered or scattered over ranks."""
        return number * (ranks - 1) / ranks / self.machine.link_bytes_per_s if ranks > 1 else 0.0

    def _forward_s(self, layer: LayerSize, tokens: int, pairs_s: float) -> float:
        own = self.machine.overhead_s if layer.products else 0.0
        return own + 2 * layer.products * tokens / self.machine.flops + pairs_s * (layer.kind == "decoder")

    def exchange_s(self, tokens: int, ep: int) -> float:
        """Return what spreading experts over `ep` ranks adds to forward and backward of a full chunk."""
        plan = _exchange(self, tokens, ep)
        return sum(layer.experts > 0 for layer in self.sizes.layers) * plan.predicted_s


@lru_cache(maxsize=256)
def _exchange(model: CostModel, tokens: int, ep: int) -> LayerPlan:
    """Return what an expert-parallel layer adds to a layer whose experts are local: `moe`'s own planner."""
    sizes, machine = model.sizes, model.machine
    layer = next(one for one in sizes.layers if one.experts)
    row_s = 2 * layer.experts / sizes.num_experts / machine.flops
    profile = Profile(
        all_to_all=Line(machine.latency_s, (ep - 1) / ep / machine.link_bytes_per_s),
        all_reduce=FREE,
        expert_forward=Line(0.0, row_s),
        expert_backward=Line(0.0, model.backward * row_s),
    )
    rows = tokens * sizes.top_k
    width = BF16 if model.bf16 else FP32
    plan = plan_layer(profile, LayerLoad(exchange_bytes=rows * sizes.width * width, expert_rows=rows))
    local = row_s * rows
    return LayerPlan(
        plan.forward_chunks,
        plan.backward_chunks,
        predicted_forward_s=max(0.0, plan.predicted_forward_s - local),
        predicted_backward_s=max(0.0, plan.predicted_backward_s - model.backward * local),
        reasons=plan.reasons,
    )
