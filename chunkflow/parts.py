"""A causal LM taken apart: what runs to the last hidden state, the layers in it, and the output projection."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from chunkflow.adapters import plain_head
from chunkflow.attention.base import ChunkView
from chunkflow.engine import Engine, forward_as
from chunkflow.errors import UnsupportedModelError
from chunkflow.in_place import embedding_in_place
from chunkflow.loss import LogitRule


class Runnable(Protocol):
    """What the executor and the runner need of a model."""

    @property
    def model(self) -> nn.Module:
        """The model itself, for its parameters."""
        ...

    @property
    def engine(self) -> Engine:
        """How its parameters come to be where they are used."""
        ...

    @property
    def head(self) -> Any:
        """What has the output projection's `weight` [V, D] and `bias` [V] or None."""
        ...

    @property
    def rule(self) -> LogitRule:
        """What the model does to the output projection's logits."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the chunks have to be."""
        ...

    @property
    def vocabulary(self) -> int:
        """Token ids are below this."""
        ...

    @property
    def num_targets(self) -> int:
        """Targets are below this."""
        ...

    @property
    def num_positions(self) -> int | None:
        """Positions the model has learned embeddings for; None where it computes them."""
        ...

    def hidden(self, *, input_ids: Tensor, position_ids: Tensor, chunk_view: ChunkView) -> Tensor:
        """Run the model without its head over ids and positions [1, T]; return the last hidden states [1, T, D]."""
        ...

    def at_head(self, compute: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """Return `compute(hidden)`, run where the head's weight is to be had."""
        ...


@dataclass(frozen=True, slots=True)
class CausalParts:
    """A causal LM as we run it: everything up to the last hidden state, then the output projection."""

    model: PreTrainedModel
    base: nn.Module
    head: nn.Linear
    layers: dict[str, nn.Module]
    """The decoder layers by name, in order."""
    rule: LogitRule
    """What the model does to the output projection's logits."""
    engine: Engine

    @property
    def device(self) -> torch.device:
        """Where the chunks have to be."""
        return self.head.weight.device

    @property
    def vocabulary(self) -> int:
        """Rows of the input embedding."""
        embedding = self.model.get_input_embeddings()
        rows = getattr(embedding, "num_embeddings", None)
        return rows if isinstance(rows, int) else _rows(embedding)

    @property
    def num_targets(self) -> int:
        """Rows of the output projection; its weight itself may be sharded, or not here."""
        return self.head.out_features

    @property
    def num_positions(self) -> int | None:
        """Positions the model has learned embeddings for; None where it computes them, as with RoPE."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        tokens = self.model.get_input_embeddings()
        tables = [m.num_embeddings for m in self.base.modules() if isinstance(m, nn.Embedding) and m is not tokens]
        # Some keep a row or two for padding.
        return limit if limit is not None and any(0 <= rows - limit <= 2 for rows in tables) else None

    def hidden(self, **inputs: Any) -> Tensor:
        """Run the model without its head; return the last hidden states [1, T, D]."""
        with embedding_in_place(self.model.get_input_embeddings()) if self.engine.in_place else nullcontext():
            return self.engine.call(lambda **kwargs: self.base(**kwargs).last_hidden_state, use_cache=False, **inputs)

    def logits(self, **inputs: Any) -> Tensor:
        """Run the whole model; return its logits [1, T, V]."""
        return self.engine.call(lambda **kwargs: type(self.model).forward(self.model, **kwargs).logits,
                                use_cache=False, **inputs)  # fmt: skip

    def at_head(self, compute: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """Return `compute(hidden)`, run as the forward of the output projection, where its weight is to be had."""
        with forward_as(self.head, compute):
            return self.head(hidden)


def parts_of(model: nn.Module, engine: Engine) -> CausalParts:
    """Take a model apart; raise UnsupportedModelError where it is not a transformers causal LM."""
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"{kind} is not a transformers model; pass a causal LM, plain or wrapped in DDP")
    head, base = plain_head(model.get_output_embeddings()), model.base_model
    if base is model:  # where the class has the name of another model's base
        base = getattr(model, "model", model)
    if not isinstance(head, nn.Linear) or base is model:
        raise UnsupportedModelError(f"{kind} has no linear output projection over a base model; it must be a causal LM")
    return CausalParts(model, base, head, _decoder_layers(model, base), LogitRule.of(model.config), engine)


def require_whole_head(parts: CausalParts) -> None:
    """Raise UnsupportedModelError when the output projection is a DTensor of its own, as under tensor parallelism."""
    if isinstance(parts.head.weight, DTensor):
        raise UnsupportedModelError(
            f"the output projection of {type(parts.model).__name__} is sharded (DTensor) and the model is not an FSDP2 "
            "root; leave it whole, or call fully_shard on the model itself"
        )


def _rows(embedding: nn.Module) -> int:
    assert isinstance(embedding.weight, Tensor)
    return embedding.weight.shape[0]


def _decoder_layers(model: PreTrainedModel, base: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of the text decoder by name; a model for images has other lists of layers beside it."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    inside = {id(module) for module in model.get_decoder().modules()} if hasattr(model, "get_decoder") else set()
    lists = [
        (name, module)
        for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    lists.sort(key=lambda found: id(found[1]) not in inside)
    for name, module in lists:
        prefix = f"{model.base_model_prefix}.{name}"
        return {f"{prefix}.{i}": layer for i, layer in enumerate(module)}
    raise UnsupportedModelError(f"{type(model).__name__}: no list of {count} decoder layers was found")
