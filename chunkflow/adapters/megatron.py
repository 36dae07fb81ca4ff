"""Megatron-core: a `GPTModel` of the local layer spec, its core attention replaced, trained in chunks.

    spec = chunked(get_gpt_layer_local_spec())
    model = GPTModel(config, spec, vocab_size, max_sequence_length, position_embedding_type="learned_absolute")
    runner = MegatronRunner(model, retain=1); loss = runner.forward_backward(batch)

One tensor, pipeline and context parallel rank; data-parallel ranks are the runner's `group`. Megatron's rotary
positions count from the first token of a call, which in a chunk is another one: positions must be learned, or none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from chunkflow.attention.base import ChunkView
from chunkflow.attention.function import ChunkAttention, LayerCall
from chunkflow.engine import Engine, WholeParameters
from chunkflow.errors import UnsupportedModelError
from chunkflow.loss import LogitRule
from chunkflow.recompute import LayerCheckpoints
from chunkflow.runner import ChunkRunner
from chunkflow.world import resolve_group

try:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import MegatronModule
    from megatron.core.transformer.attention import SelfAttention
    from megatron.core.transformer.spec_utils import ModuleSpec
except ImportError as error:
    raise ImportError(f"{__name__} needs Megatron-core: pip install 'longrail[megatron]' ({error})") from error


class ChunkCoreAttention(MegatronModule):
    """`core_attention` of a layer spec: query [T, 1, H, D], key and value [T, 1, Hk, D] -> [T, 1, H * D]."""

    def __init__(
        self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str,
        attention_dropout: float | None = None, softmax_scale: float | None = None, cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(config=config)
        self._layer = max(1, layer_number) - 1
        self._scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5
        # Not apply_query_key_layer_scaling: what it divides scores by, Megatron's softmax multiplies them by.
        self._dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.view: ChunkView | None = None
        """The chunk that is running; set by the runner."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """Attend to the chunk and the keys and values before it."""
        if self.view is None:
            raise UnsupportedModelError("chunked core attention was called outside a MegatronRunner; train with one")
        q, k, v = (x[:, 0].transpose(0, 1) for x in (query, key, value))
        call = LayerCall(self.view, self._layer, self._scale, self._dropout if self.training else 0.0)
        out = ChunkAttention.apply(q, k, v, None, call)
        assert isinstance(out, Tensor)
        return out.transpose(0, 1).reshape(query.shape[0], 1, -1)


def chunked(spec: ModuleSpec) -> ModuleSpec:
    """Return a layer spec with `ChunkCoreAttention` in it."""
    changed: Any = copy.deepcopy(spec)
    changed.submodules.self_attention.submodules.core_attention = ChunkCoreAttention
    return changed


@dataclass(frozen=True, slots=True)
class MegatronParts:
    """A `GPTModel` as the executor runs it; see `chunkflow.parts.Runnable`."""

    model: GPTModel
    engine: Engine
    rule: LogitRule = LogitRule()  # noqa: RUF009 (frozen)

    @property
    def head(self) -> Any:
        """The output projection; tied, its weight is the embedding's."""
        tied = self.model.share_embeddings_and_output_weights
        weight = self.model.shared_embedding_or_output_weight() if tied else self.model.output_layer.weight
        assert weight is not None
        return _Head(weight, getattr(self.model.output_layer, "bias", None))

    @property
    def device(self) -> torch.device:
        """Where the chunks have to be."""
        return self.head.weight.device

    @property
    def vocabulary(self) -> int:
        """Tokens the model knows."""
        return self.model.vocab_size

    @property
    def num_targets(self) -> int:
        """Tokens the model can give."""
        return self.model.vocab_size

    @property
    def num_positions(self) -> int | None:
        """Learned positions."""
        return self.model.max_sequence_length if self.model.position_embedding_type == "learned_absolute" else None

    def hidden(self, *, input_ids: Tensor, position_ids: Tensor, chunk_view: ChunkView) -> Tensor:
        """Run embedding and decoder; return [1, T, D]."""
        for attention in _core_attentions(self.model):
            attention.view = chunk_view
        embedded = self.model.embedding(input_ids=input_ids, position_ids=position_ids)
        return self.model.decoder(hidden_states=embedded, attention_mask=None).transpose(0, 1)

    def at_head(self, compute: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """Return `compute(hidden)`."""
        return compute(hidden)


@dataclass(frozen=True, slots=True)
class _Head:
    weight: Tensor
    bias: Tensor | None


class MegatronRunner(ChunkRunner):
    """`ChunkRunner` for a `GPTModel` whose layers have `ChunkCoreAttention`; arguments as there.

    Raises UnsupportedModelError, naming the setting, for a model that could not be trained exactly.
    """

    def __init__(
        self, model: GPTModel, *, retain: int = 1, group: dist.ProcessGroup | str | None = None, seed: int = 0
    ) -> None:
        _require_exact(model)
        ranks = resolve_group(group)
        engine = WholeParameters(ranks)
        parts, checkpoints = MegatronParts(model, engine), LayerCheckpoints(())
        self._begin(parts, engine, ranks, checkpoints, retain=retain, seed=seed, offload=False)


def _core_attentions(model: nn.Module) -> list[ChunkCoreAttention]:
    return [m for m in model.modules() if isinstance(m, ChunkCoreAttention)]


def _require_exact(model: GPTModel) -> None:
    config = model.config
    needed = {
        "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "context_parallel_size": 1,
        "recompute_granularity": None, "num_moe_experts": None, "mtp_num_layers": None, "window_size": None,
        "multi_latent_attention": False, "fp8": None, "softmax_type": "vanilla",
    }  # fmt: skip
    for name, value in needed.items():
        if getattr(config, name, value) != value:
            raise UnsupportedModelError(
                f"GPTModel with config.{name} = {getattr(config, name)!r} is not trained exactly in chunks; set it to "
                f"{value!r}"
            )
    if model.position_embedding_type not in ("learned_absolute", "none"):
        raise UnsupportedModelError(
            f"GPTModel with position_embedding_type {model.position_embedding_type!r}: Megatron counts its positions "
            "from the first token of a call, which in a chunk is another one; use 'learned_absolute' or 'none'"
        )
    layers = sum(isinstance(m, SelfAttention) for m in model.modules())
    if layers == 0 or len(_core_attentions(model)) != layers:
        raise UnsupportedModelError(
            f"{len(_core_attentions(model))} of {layers} attention layers of the GPTModel have ChunkCoreAttention; "
            "build it from chunked(get_gpt_layer_local_spec())"
        )
