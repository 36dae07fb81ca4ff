"""A few tokens run whole, with the model's own attention, and in chunks with ours.

A layer that mixes tokens behind our back gives other hidden states, and is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from chunkflow.attention.base import ChunkView, Span
from chunkflow.attention.interface import attention_of
from chunkflow.errors import ChunkflowError, UnsupportedModelError
from chunkflow.parts import CausalParts
from chunkflow.rng import replay, rng_state
from chunkflow.state import GroupState

_TOKENS, _BORDER, _STRANGER = 12, 5, 4
_NARROW = 3
_LARGE_LOGIT, _MOST_SCALE = 256.0, 1000.0
"""Logits are looked at this large: at their size in a fresh model a cap of 15 is less than the rounding."""
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Behind the first layer, relative to the norm of a token's values; it grows with the root of the depth, as rounding
does. About five times what exact models show; fp64 allows for norms that cast to fp32 inside."""
_REROUTED = 2
"""Tokens that a router may send elsewhere for a rounding of 16 bits; fewer than the reach of a short convolution."""


@torch.no_grad()
def probe(parts: CausalParts) -> None:
    """Run a few tokens whole and in chunks; raise for the first layer that sees a difference."""
    model = parts.model
    device = parts.device
    if device.type == "meta":
        raise UnsupportedModelError(f"{type(model).__name__} is on the meta device; load its weights first")
    vocabulary = min(parts.vocabulary, parts.num_targets)
    ids = (torch.arange(_TOKENS, device=device) * 7 + 3) % vocabulary
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with replay(rng_state(device), device), _narrow_windows(model):
            with _failing_is_refused(
                f"{type(model).__name__} failed on a few tokens, whole and with its own attention"
            ):
                whole = _run_whole(parts, ids)
                _check_finite(parts, whole)
                _compare_head(parts, ids, whole[-1])
            state = GroupState(capacity=_BORDER)
            pieces = _run_chunks(parts, ids, state)
    finally:
        for module, mode in modes.items():
            module.training = mode
    _check_called(parts, state)
    with _failing_is_refused(f"{type(model).__name__}'s layers do not give hidden states [..., tokens, width]"):
        chunked = [torch.cat([a, b[..., : _TOKENS - _BORDER, :]], dim=-2) for a, b in zip(*pieces, strict=True)]
        _compare_layers(parts, whole, chunked)


def _run_whole(parts: CausalParts, ids: Tensor) -> list[Tensor]:
    """Return the output of every layer and of the base model."""
    positions = torch.arange(len(ids), device=ids.device)
    with _outputs_of(parts) as outputs:
        hidden = parts.hidden(input_ids=ids[None], position_ids=positions[None])
    return [*outputs, hidden]


def _run_chunks(parts: CausalParts, ids: Tensor, state: GroupState) -> tuple[list[Tensor], list[Tensor]]:
    """Run the tokens as two dependent chunks, with a stranger packed behind the second; outputs of each, as in
    `_run_whole`.
    """
    tail = len(ids) - _BORDER
    first = _run_chunk(parts, ids[:_BORDER], (Span(0, _BORDER, 0, 0),), state)
    tokens = torch.cat([ids[_BORDER:], ids.flip(0)[:_STRANGER]])
    second = _run_chunk(parts, tokens, (Span(0, tail, _BORDER, 0), Span(tail, _STRANGER, 0, 1)), state)
    return first, second


def _run_chunk(parts: CausalParts, tokens: Tensor, spans: tuple[Span, ...], state: GroupState) -> list[Tensor]:
    positions = torch.cat([torch.arange(s.length, device=tokens.device) + s.prefix for s in spans])
    with attention_of(parts.model), _outputs_of(parts) as outputs:
        names = [*parts.layers, f"{parts.model.base_model_prefix}, after the last layer,"]
        with _failing_is_refused(lambda: f"{names[min(len(outputs), len(names) - 1)]} failed with our attention"):
            view = ChunkView(spans, state)
            hidden = parts.hidden(input_ids=tokens[None], position_ids=positions[None], chunk_view=view)
    return [*outputs, hidden]


@contextmanager
def _failing_is_refused(what: str | Callable[[], str]) -> Iterator[None]:
    """Whatever a model's code raises, the model is refused with it."""
    try:
        yield
    except ChunkflowError:
        raise
    except Exception as error:
        said = what() if callable(what) else what
        raise UnsupportedModelError(f"{said}: {type(error).__name__}: {error}") from error


def _check_called(parts: CausalParts, state: GroupState) -> None:
    for index, (name, layer) in enumerate(parts.layers.items()):
        if index not in state.layers:
            raise UnsupportedModelError(
                f"{name} ({type(layer).__name__}) did not call our attention: it mixes tokens in another way, or does "
                "not take its attention from transformers' AttentionInterface"
            )


def _check_finite(parts: CausalParts, whole: list[Tensor]) -> None:
    if not bool(whole[-1].isfinite().all()):
        raise UnsupportedModelError(
            f"{type(parts.model).__name__} gives hidden states that are not finite for a few tokens, whole and with "
            "its own attention; its weights are damaged, or were never loaded"
        )


def _compare_head(parts: CausalParts, ids: Tensor, hidden: Tensor) -> None:
    """Compare the model's logits with what our loss makes them from: hidden states, weight, bias and `LogitRule`."""
    head = parts.head
    size = parts.at_head(lambda x: nn.functional.linear(x, head.weight, head.bias), hidden).abs().max().float()
    scale = (_LARGE_LOGIT / size).clamp(max=_MOST_SCALE).to(hidden.dtype)
    positions = torch.arange(len(ids), device=ids.device)
    enlarge = head.register_forward_pre_hook(lambda _module, args: (args[0] * scale, *args[1:]))
    try:
        logits = parts.logits(input_ids=ids[None], position_ids=positions[None])
    finally:
        enlarge.remove()
    ours = parts.at_head(lambda x: nn.functional.linear(x * scale, head.weight, head.bias), hidden)
    ours, _ = parts.rule.apply_(ours)
    precision = _precision(parts.device, logits.dtype)
    if ours.shape != logits.shape or _error(ours, logits, precision) > _tolerance(precision, depth=1):
        raise UnsupportedModelError(
            f"{type(parts.model).__name__}: its logits are not what its output projection gives for the last hidden "
            f"state under {parts.rule} (it does something else to them), so our loss would be another one"
        )


def _compare_layers(parts: CausalParts, whole: list[Tensor], chunked: list[Tensor]) -> None:
    names = [*parts.layers, f"{parts.model.base_model_prefix}, after the last layer"]
    for depth, (name, a, b) in enumerate(zip(names, whole, chunked, strict=True), start=1):
        precision = _precision(parts.device, a.dtype)
        if (error := _error(b, a, precision)) > _tolerance(precision, depth):
            raise UnsupportedModelError(
                f"{name}: hidden states of {a.shape[-2]} tokens in two chunks differ from the whole run by "
                f"{error:.1e}; something in it depends on tokens or positions outside the chunk"
            )


def _precision(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that products are rounded to."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype


def _tolerance(dtype: torch.dtype, depth: int) -> float:
    return _TOLERANCE.get(dtype, _TOLERANCE[torch.bfloat16]) * depth**0.5


def _error(a: Tensor, b: Tensor, precision: torch.dtype) -> float:
    """Return how far the values of the worst token are from those in b, relative to their norm; [..., tokens, D]."""
    narrow = torch.finfo(precision).bits == 16
    a, b = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (a, b))
    errors = (a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=torch.finfo(b.dtype).tiny)
    of_tokens = errors.nan_to_num(nan=torch.inf).flatten(0, -2).amax(0)
    worst = of_tokens.sort(descending=True).values
    return float(worst[_REROUTED if narrow else 0])


@contextmanager
def _narrow_windows(model: nn.Module) -> Iterator[None]:
    """Make sliding windows narrow enough for a few tokens to show whether the attention we are called with has them."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    texts = [text for config in configs.values() if (text := config.get_text_config()) is not config]
    wide = [
        (owner, owner.sliding_window)
        for owner in [*configs.values(), *texts, *model.modules()]
        if isinstance(getattr(owner, "sliding_window", None), int)
    ]
    try:
        for owner, window in wide:
            owner.sliding_window = min(window, _NARROW)
        yield
    finally:
        for owner, window in reversed(wide):
            owner.sliding_window = window


@contextmanager
def _outputs_of(parts: CausalParts) -> Iterator[list[Tensor]]:
    """Collect what each decoder layer gives out, in order."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple | list) else output)

    handles = [layer.register_forward_hook(keep) for layer in parts.layers.values()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
