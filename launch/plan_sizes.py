"""What a model weighs and computes, from its configuration alone: no weight is read, none is made.

D model width, I inner width, Dk width of keys, E experts, K experts a token
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from launch.config import FinetuneConfig
from launch.errors import ModelError
from launch.model import llama_config
from launch.pretrained import locate
from launch.split import Layer, split


@dataclass(frozen=True, slots=True)
class LayerSize:
    """One layer as `launch.split` gives it. Parameters are numbers, not bytes."""

    kind: str
    dense: int
    experts: int
    """Of all experts."""
    products: float
    """Multiplications of one token, attention to other tokens left out."""
    kept: float
    """Numbers that a token's forward keeps for its backward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """A model in the numbers that a plan needs."""

    name: str
    layers: tuple[LayerSize, ...]
    width: int
    key_width: int
    """Of keys, and of values, over all their heads."""
    query_width: int
    num_experts: int
    top_k: int
    tied: int
    """Parameters of the head that are the embedding's too."""

    @property
    def parameters(self) -> int:
        """All of them."""
        return sum(layer.dense + layer.experts for layer in self.layers)


def sizes_of(config: FinetuneConfig) -> ModelSizes:
    """Return the sizes of a recipe's model. Raises ModelError where it has none, or cannot be split into layers."""
    if config.model.library != "transformers":
        raise ModelError(
            f"model.library is {config.model.library}, and only models of transformers are planned: others are trained "
            "whole on every rank, so choose the ranks and chunks.chunk_tokens in the recipe"
        )
    found = _model_config(config)
    with warnings.catch_warnings(action="ignore"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(found, attn_implementation="eager")
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    made = config.moe.num_experts
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    own = next((value for name in names if (value := getattr(text, name, None))), 1)
    experts, top_k = (made, config.moe.top_k) if made else (own, getattr(text, "num_experts_per_tok", None) or 1)
    shape = _Shape(
        text.hidden_size, head * (getattr(text, "num_key_value_heads", None) or heads), head * heads, experts, top_k
    )
    layers = split(model)
    tied = model.get_input_embeddings().weight is layers[-1].module.weight
    return ModelSizes(
        name=f"{type(model).__name__} of {config.model.path or 'the recipe'}",
        layers=tuple(_size(layer, shape, made, tied) for layer in layers),
        width=shape.width,
        key_width=shape.key_width,
        query_width=shape.query_width,
        num_experts=experts,
        top_k=top_k,
        tied=layers[-1].module.weight.numel() if tied else 0,  # pyright: ignore[reportCallIssue]
    )


@dataclass(frozen=True, slots=True)
class _Shape:
    width: int
    key_width: int
    query_width: int
    num_experts: int
    top_k: int


def _model_config(config: FinetuneConfig) -> Any:
    path = config.model.path
    if path is None:
        return llama_config(config.model, None)
    found = locate(path)
    try:
        return AutoConfig.from_pretrained(found.folder, **found.options())
    except Exception as error:
        raise ModelError(f"model.path {path!r} has no configuration that transformers can load: {error}") from error


def _size(layer: Layer, shape: _Shape, made: int | None, tied: bool) -> LayerSize:
    numbers = dict(layer.module.named_parameters())
    experts = sum(p.numel() for name, p in numbers.items() if ".experts." in f".{name}")
    if made and layer.kind == "decoder":  # each MLP becomes so many
        mlp = sum(p.numel() for name, p in numbers.items() if name.startswith("mlp."))
        experts, dense = made * mlp, _numel(layer.module) - mlp
    else:
        dense = _numel(layer.module) - experts
    matrices = sum(p.numel() for name, p in numbers.items() if p.ndim >= 2) if layer.kind != "embedding" else 0
    share = shape.top_k / shape.num_experts
    through = dense + experts * share if layer.kind == "decoder" else float(matrices)
    if layer.kind == "embedding" and tied:
        dense = 0  # counted with the head
    kept = _kept(layer, shape, experts, through)
    return LayerSize(layer.kind, dense, experts, 0.0 if layer.kind in ("embedding", "norm") else through, kept)


def _kept(layer: Layer, shape: _Shape, experts: int, through: float) -> float:
    """Return numbers a token keeps: what the products, the two norms, attention and the gated MLP read again.

    6.5 D around norms and residuals, queries, what attention gives and what goes into its product, keys and values, and
    of each MLP that a token passes its two inner products, the activation and what it is multiplied to. Within 10% of
    what `launch.layer_costs` measures on Llama, in fp32.
    """
    if layer.kind != "decoder":
        return {"embedding": 0.0, "norm": 2.0, "head": 1.0}[layer.kind] * shape.width
    attention = 2 * shape.query_width * shape.width + 2 * shape.key_width * shape.width
    inner = max(0.0, through - attention) / (3 * shape.width)  # of all experts that a token passes
    rows = shape.top_k * shape.width if experts else 0
    return 6.5 * shape.width + 3 * shape.query_width + 2 * shape.key_width + 4 * inner + 2 * rows


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
