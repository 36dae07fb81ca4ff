"""Six places where code of the user's runs inside a layer, as in FSMoE (section 3.1).

The outer two see tokens and are ordinary autograd. The four inner ones run once a chunk, in forward and in backward
(`info.backward`), outside autograd: what `before_dispatch` does to a chunk `after_dispatch` must undo, and the same for
combine (compression, say); gradients pass straight through the pair.
"""

from __future__ import annotations

from torch import Tensor

from moe.records import ChunkInfo


class Hooks:
    """Hooks that change nothing; derive from it and replace some. N rows of one chunk."""

    def before_moe_start(self, x_TD: Tensor) -> Tensor:
        """Return the tokens that the gate and the experts see."""
        return x_TD

    def before_dispatch(self, rows_ND: Tensor, info: ChunkInfo) -> Tensor:
        """Return what is sent: `[N, ...]`, of any width and dtype that all ranks agree on."""
        return rows_ND

    def after_dispatch(self, rows_N: Tensor, info: ChunkInfo) -> Tensor:
        """Return the rows `[N, D]` that the experts get, in the dtype of the layer's input."""
        return rows_N

    def before_combine(self, rows_ND: Tensor, info: ChunkInfo) -> Tensor:
        """Return what is sent back: `[N, ...]`. With shared experts these are parts, which are added on the way."""
        return rows_ND

    def after_combine(self, rows_N: Tensor, info: ChunkInfo) -> Tensor:
        """Return the rows `[N, D]` of the experts' output."""
        return rows_N

    def before_moe_end(self, y_TD: Tensor) -> Tensor:
        """Return the layer's output."""
        return y_TD
