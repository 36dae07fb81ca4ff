"""A causal LM taken apart: what runs to the last hidden state, the layers in it, and the output projection."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from chunkflow.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class CausalParts:
    """A causal LM as we run it: everything up to the last hidden state, then the output projection."""

    model: PreTrainedModel
    base: nn.Module
    head: nn.Linear
    layers: dict[str, nn.Module]
    """The decoder layers by name, in order."""

    @property
    def vocabulary(self) -> int:
        """Rows of the input embedding."""
        embedding = self.model.get_input_embeddings()
        assert isinstance(embedding.weight, Tensor)
        return embedding.weight.shape[0]

    @property
    def num_positions(self) -> int | None:
        """Positions the model has learned embeddings for; None where it computes them, as with RoPE."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        tokens = self.model.get_input_embeddings()
        tables = [m.num_embeddings for m in self.base.modules() if isinstance(m, nn.Embedding) and m is not tokens]
        # Some keep a row or two for padding.
        return limit if limit is not None and any(0 <= rows - limit <= 2 for rows in tables) else None


def parts_of(model: nn.Module) -> CausalParts:
    """Take a model apart; raise UnsupportedModelError where it is not a transformers causal LM."""
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"{kind} is not a transformers model; pass a causal LM, plain or wrapped in DDP")
    head, base = model.get_output_embeddings(), model.base_model
    if not isinstance(head, nn.Linear) or base is model:
        raise UnsupportedModelError(f"{kind} has no linear output projection over a base model; it must be a causal LM")
    layers = _decoder_layers(model, base)
    sharded = [n for n, p in model.named_parameters() if type(p.data).__name__ == "DTensor"]
    if sharded:
        raise UnsupportedModelError(f"{sharded[0]} is sharded (DTensor); chunks run on plain or DDP models so far")
    return CausalParts(model, base, head, layers)


def _decoder_layers(model: PreTrainedModel, base: nn.Module) -> dict[str, nn.Module]:
    count = getattr(model.config, "num_hidden_layers", None)
    for name, module in base.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            prefix = f"{model.base_model_prefix}.{name}"
            return {f"{prefix}.{i}": layer for i, layer in enumerate(module)}
    raise UnsupportedModelError(f"{type(model).__name__}: no list of {count} decoder layers was found")
