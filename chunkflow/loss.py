"""Cross entropy over a large vocabulary without the logits of a whole chunk in memory.

N supervised tokens, V vocabulary, D model width

The loss is a weighted *sum*; whoever calls divides by the loss weights of the whole optimizer step. Gradients are made
together with the loss, tile by tile, so the logits are computed once and only one tile of them exists at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chunkflow.in_place import gradient_of, grows_in_place

TILE_ROWS = 512
"""Rows of logits in memory at once; the gradient of the weight is read and written once for each."""
TILE_BYTES = 2**28
"""Fewer rows where they would take more."""


@dataclass(frozen=True, slots=True)
class LogitRule:
    """What a model does to the logits of its output projection: cap * tanh(scale * logits / cap)."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitRule:
        """Read the rule from a configuration: Granite divides, Cohere multiplies, Gemma 2 and its like cap."""
        text = config.get_text_config()
        divisor, factor = (getattr(text, name, None) or 1.0 for name in ("logits_scaling", "logit_scale"))
        return cls(factor / divisor, getattr(text, "final_logit_softcapping", None))

    def apply_(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the model's logits, in place of the projection's, and d(those)/d(projection's) where not 1."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.cap is None:
            return logits, None if self.scale == 1.0 else logits.new_tensor(self.scale)
        capped = logits.div_(self.cap).tanh_()
        slope = (1 - capped.square()).mul_(self.scale)
        return capped.mul_(self.cap), slope


@dataclass(slots=True)
class Tile:
    """Memory of logits, for one loss after another: a fresh one costs more in page faults than its softmax does."""

    memory: Tensor | None = None

    def rows_of(self, rows: int, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return [R, V] for the next tile of so many rows: R of them, or as many as a tile has."""
        most = min(TILE_ROWS, max(1, TILE_BYTES // (weight.shape[0] * dtype.itemsize)))
        rows, held = min(rows, most), self.memory
        if held is None or len(held) < rows or (held.shape[1], held.dtype) != (weight.shape[0], dtype):
            held = self.memory = weight.new_empty(rows, weight.shape[0], dtype=dtype)
        return held[:rows]


def tiled_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    loss_weights: Tensor,
    rule: LogitRule = LogitRule(),
    *,
    denominator: float | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Return sum(loss_weights * cross entropy) as a 0-d tensor, fp32 or wider.

    hidden [T, D]; weight [V, D] and bias [V] of the output projection; labels int64 [T], shifted already, -100 for no
    target; loss_weights [T]. Sums run in fp32 or wider whatever the model's dtype.

    With `denominator`, the gradient of loss / denominator by `weight` is added to `weight.grad` at once, where
    `chunkflow.in_place` allows it and the dtype is the sums': backward of that quotient, which must follow, has the
    other gradients. `tile` lends its memory.
    """
    supervised = (labels != -100) & (loss_weights != 0)
    kept = supervised.nonzero().squeeze(1)
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = None
    if denominator is not None and torch.is_grad_enabled() and weight.dtype == wide and grows_in_place(weight):
        total = _Total(gradient_of(weight), 1 / denominator)
    lent = tile or Tile()
    loss = _TiledCrossEntropy.apply(hidden[kept], weight, bias, labels[kept], loss_weights[kept], rule, total, lent)
    assert isinstance(loss, Tensor)
    return loss


@dataclass(frozen=True, slots=True)
class _Total:
    """Where the gradient of the weight is added up, and by what each part is multiplied."""

    grad: Tensor
    scale: float = 1.0


class _TiledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, loss_weights: Tensor,
        rule: LogitRule, total: _Total | None, lent: Tile,
    ) -> Tensor:  # fmt: skip
        ctx.dtypes = (hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
        hidden, weight, bias = _autocast(hidden, weight, bias)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        wanted = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if wanted[0] else None
        d_weight = torch.zeros_like(weight, dtype=wide) if wanted[1] and total is None else None
        total = total if d_weight is None else _Total(d_weight)
        d_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and wanted[2] else None
        tile = lent.rows_of(max(1, hidden.shape[0]), weight, wide)
        for start in range(0, hidden.shape[0], len(tile)):
            rows = slice(start, start + len(tile))
            logits, slope = rule.apply_(_projected(hidden[rows], weight, bias, tile))
            losses, d_logits = _tile(logits, slope, labels[rows])
            # Gradients are weighted where they are as wide as the model, not as the vocabulary.
            weights = loss_weights[rows].to(wide)
            loss += (losses * weights).sum()
            if d_hidden is not None:
                d_hidden[rows] = (d_logits.to(weight.dtype) @ weight).mul_(weights.unsqueeze(1))
            if total is not None:
                _add_product(total, d_logits, hidden[rows] * weights.unsqueeze(1).to(hidden.dtype))
            if d_bias is not None:
                d_bias += (d_logits * weights.unsqueeze(1)).sum(0)
        ctx.gradients = (d_hidden, d_weight, d_bias)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (
            None if g is None else g.mul_(grads[0].to(g.dtype)).to(dtype)
            for g, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        )
        ctx.gradients = None  # scaled in place: a second backward is an error, and the memory is free now
        return (*scaled, None, None, None, None, None)


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return them in the dtype of the autocast that is on, cast once and not for each product of each tile."""
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind) or hidden.dtype == torch.float64:  # which autocast leaves alone
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _projected(hidden: Tensor, weight: Tensor, bias: Tensor | None, tile: Tensor) -> Tensor:
    """Return the projection [rows, V] of hidden [rows, D], written to the first rows of `tile`."""
    logits = tile[: hidden.shape[0]]
    same = hidden.dtype == weight.dtype == tile.dtype and not torch.is_autocast_enabled(hidden.device.type)
    if not same:
        return logits.copy_(torch.nn.functional.linear(hidden, weight, bias))
    torch.mm(hidden, weight.t(), out=logits)
    return logits if bias is None else logits.add_(bias)


def _tile(logits: Tensor, slope: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses [rows] of one tile, and their gradients by the projection [rows, V] in the logits' memory.

    Few passes over the logits, in place: they are what a loss costs beside its products.
    """
    labels = labels.unsqueeze(1)
    picked, top = logits.gather(1, labels), logits.amax(1, keepdim=True)
    chances = torch.softmax(logits, 1, out=logits)
    losses = top - picked - chances.amax(1, keepdim=True).log()  # the largest is 1 / sum(exp(logits - top))
    chances.scatter_add_(1, labels, torch.full_like(picked, -1.0))
    return losses.squeeze(1), chances if slope is None else chances.mul_(slope)


def _add_product(total: _Total, d_logits: Tensor, hidden: Tensor) -> None:
    """Add d_logits^T @ hidden [V, D] to the fp32 (or wider) total; the product itself runs in the model's dtype."""
    if total.grad.dtype == hidden.dtype:
        total.grad.addmm_(d_logits.t(), hidden, alpha=total.scale)
    else:
        total.grad.add_(d_logits.to(hidden.dtype).t() @ hidden, alpha=total.scale)
