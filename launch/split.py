"""A transformers causal LM as a row of layers: embedding, decoder layers, norm, head. No model code is copied.

T tokens, D model width, V vocabulary

A model computes rotary embeddings and masks itself, and hands them to its layers as keyword arguments. A skeleton of
the model, with recorders in the place of its layers, is called for them: `DecoderArguments`. Then each layer can be
called on its own, on any rank, as the model would have called it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from chunkflow.engine import WholeParameters
from chunkflow.errors import UnsupportedModelError
from chunkflow.parts import CausalParts, parts_of
from chunkflow.rng import replay, rng_state
from launch.errors import ModelError

_PROBE_TOKENS = 8

Kind = Literal["embedding", "decoder", "norm", "head"]


@dataclass(frozen=True, slots=True)
class Layer:
    """One piece of a model, by its name there."""

    name: str
    kind: Kind
    module: nn.Module
    param_names: tuple[str, ...]
    """Original names in the whole model; a tied weight has the first of its names in every layer that uses it."""


def split(model: nn.Module) -> list[Layer]:
    """Return the layers of a causal LM, in order; they are the model's own modules, not copies.

    Raises ModelError, naming the reason, for a model that the layers, called one after another, do not make up: it is
    tried on a few tokens, bit by bit.
    """
    try:
        parts = parts_of(model, WholeParameters(None))
    except UnsupportedModelError as error:
        raise ModelError(f"this model cannot be split into layers: {error}") from error
    layers = _layers_of(parts)
    _require_separable(parts.model)
    _probe(parts, layers)
    return layers


class DecoderArguments:
    """Keyword arguments of a model's decoder layers, computed by the model's own code.

    Keeps the parts of the model between the layers (rotary embeddings), and no layer.
    """

    def __init__(self, model: nn.Module) -> None:
        parts = parts_of(model, WholeParameters(None))
        self._recorders = [_Recorder() for _ in parts.layers]
        self._after = _Recorder()
        place = next(iter(parts.layers)).rpartition(".")[0].removeprefix(f"{parts.model.base_model_prefix}.")
        assert isinstance(parts.base, PreTrainedModel)
        self.skeleton = copy.copy(parts.base)
        """The base model without its weights: its `config` decides which attention the layers call."""
        norm = _norm_of(parts)[0]
        # The copy is shallow: its modules need a dictionary of their own, or the model would lose its layers.
        self.skeleton._modules = {
            **{name: m for name, m in parts.base._modules.items() if m is not parts.model.get_input_embeddings()},
            place: nn.ModuleList(self._recorders),
            norm: self._after,
        }

    def of(self, hidden: Tensor, position_ids: Tensor, **extra: Any) -> list[Mapping[str, Any]]:
        """Return the arguments of every decoder layer for hidden states [1, T, D] at positions int64 [1, T].

        `extra` are keyword arguments of the model's forward. Raises ModelError when the model does something to the
        hidden states on their way to the layers.
        """
        hidden = hidden.detach()
        with torch.no_grad():
            self.skeleton(inputs_embeds=hidden, position_ids=position_ids, use_cache=False, **extra)
        for place, recorder in enumerate([*self._recorders, self._after]):
            if recorder.hidden is not hidden:
                raise ModelError(
                    f"{type(self.skeleton).__name__} changes the hidden states before its decoder layer {place}, "
                    "outside of any layer, so it is not the row of its layers; it cannot be split"
                )
            recorder.hidden = None
        return [recorder.arguments for recorder in self._recorders]


class _Recorder(nn.Module):
    """Stands in the place of a layer: passes the hidden states on, and keeps the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None
        self.arguments: Mapping[str, Any] = {}

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        """Keep the arguments."""
        self.hidden, self.arguments = hidden, arguments
        return hidden


def call_decoder(module: nn.Module, hidden: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Return the hidden states [1, T, D] behind one decoder layer."""
    output = module(hidden, **arguments)
    return output[0] if isinstance(output, tuple | list) else output


def _layers_of(parts: CausalParts) -> list[Layer]:
    model = parts.model
    first = {id(p): name for name, p in model.named_parameters()}
    names = {id(module): name for name, module in model.named_modules()}
    norm = _norm_of(parts)[1]
    pieces: list[tuple[Kind, nn.Module]] = [
        ("embedding", model.get_input_embeddings()),
        *(("decoder", module) for module in parts.layers.values()),
        ("norm", norm),
        ("head", parts.head),
    ]
    layers = []
    for kind, module in pieces:
        owned = tuple(dict.fromkeys(first[id(p)] for p in module.parameters()))
        layers.append(Layer(names[id(module)], kind, module, owned))
    missing = set(first.values()) - {name for layer in layers for name in layer.param_names}
    if missing:
        raise ModelError(
            f"{type(model).__name__} has parameters outside of its embedding, decoder layers, norm and head: "
            f"{', '.join(sorted(missing)[:3])}; it cannot be split into layers"
        )
    return layers


def _norm_of(parts: CausalParts) -> tuple[str, nn.Module]:
    """Return the base model's child behind the decoder layers: the one other that has weights."""
    embedding, inside = parts.model.get_input_embeddings(), {id(m) for m in parts.layers.values()}
    others = [
        (name, module)
        for name, module in parts.base.named_children()
        if module is not embedding
        and not any(id(m) in inside for m in module.modules())
        and any(True for _ in module.parameters())
    ]
    if len(others) != 1:
        raise ModelError(
            f"{type(parts.model).__name__} has {[name for name, _ in others]} beside its embedding and decoder layers, "
            "and splitting knows models with one norm there (Llama, Qwen3, Mistral, Mixtral and their like)"
        )
    return others[0]


def _require_separable(model: PreTrainedModel) -> None:
    if getattr(model.config, "output_router_logits", False):
        raise ModelError(
            f"{type(model).__name__}: config.output_router_logits adds the routers' auxiliary loss, one product over "
            "all layers, which no stage can compute alone; set output_router_logits=False"
        )


def _probe(parts: CausalParts, layers: Sequence[Layer]) -> None:
    """Run a few tokens through the model and through its layers; they must agree to the bit."""
    device = parts.head.weight.device
    if device.type == "meta":
        return  # nothing to compare; the ranks that hold weights do
    ids = (torch.arange(_PROBE_TOKENS, device=device) * 7 + 3)[None] % min(parts.vocabulary, parts.head.weight.shape[0])
    positions = torch.arange(_PROBE_TOKENS, device=device)[None]
    state = rng_state(device)
    with torch.no_grad():
        with replay(state, device):
            whole = parts.model(input_ids=ids, position_ids=positions, use_cache=False).logits
        with replay(state, device):
            pieces = _tried(parts, layers, ids, positions)
    if not torch.equal(whole, pieces):
        raise ModelError(
            f"{type(parts.model).__name__}: its layers one after another do not give its logits (largest difference "
            f"{(whole - pieces).abs().max():.1e}); something between them, or behind the head, is not a layer"
        )


def _tried(parts: CausalParts, layers: Sequence[Layer], ids: Tensor, positions: Tensor) -> Tensor:
    """Return the logits of the layers. Raises ModelError where they are called in a way that recorders do not know."""
    try:
        return _run(layers, DecoderArguments(parts.model), ids, positions)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"{type(parts.model).__name__}: its layers cannot be called one after another, each with the hidden states "
            f"and keyword arguments: {type(error).__name__}: {error}"
        ) from error


def _run(layers: Sequence[Layer], arguments: DecoderArguments, ids: Tensor, positions: Tensor) -> Tensor:
    """Return the logits [1, T, V]."""
    hidden = layers[0].module(ids)
    keywords = iter(arguments.of(hidden, positions))
    for layer in layers[1:]:
        decodes = layer.kind == "decoder"
        hidden = call_decoder(layer.module, hidden, next(keywords)) if decodes else layer.module(hidden)
    return hidden
