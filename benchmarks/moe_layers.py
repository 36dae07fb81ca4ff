"""The layers of `benchmarks.moe`: what each moves, with its dense gradients in the ratio its attention gives.

N bytes a rank sends in one dispatch; G dense gradients of the attention that the layer above leaves to hide. With equal
dtypes and one micro-batch G/N = attention parameters / (tokens per rank * k * H), and only that ratio is kept when a
layer is scaled down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

SHARES = (0.3, 0.5, 0.7)
"""Of communication in the serial layer; the links' speeds are swept to get there, the experts stay as they are."""
ROW_BYTES = 1024
"""One row of fp32 activations, 256 wide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A model's attention and routing."""

    name: str
    hidden: int
    attention_parameters: int
    top_k: int

    def gradient_ratio(self, tokens: int) -> float:
        """Return G/N with this many tokens a rank."""
        return self.attention_parameters / (tokens * self.top_k * self.hidden)


FAMILIES = (
    Family(name="GPT-2-XL-MoE", hidden=1600, attention_parameters=4 * 1600**2, top_k=2),
    Family(name="Mixtral-8x7B", hidden=4096, attention_parameters=2 * 4096**2 + 2 * 4096 * 1024, top_k=2),
    Family(name="Qwen3-30B-A3B", hidden=2048, attention_parameters=2 * 2048 * 4096 + 2 * 2048 * 512, top_k=8),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchLayer:
    """One layer, scaled down to `exchange_bytes`; every expert is sharded over the two ranks of a host."""

    name: str
    exchange_bytes: int
    gradient_bytes: int
    slice_bytes: int

    @property
    def rows(self) -> int:
        """Rows a rank dispatches."""
        return self.exchange_bytes // ROW_BYTES

    @property
    def gather_bytes(self) -> int:
        """Rows of both ranks of a host."""
        return 2 * self.exchange_bytes


def scaled(family: Family, *, tokens: int, exchange_bytes: int) -> BenchLayer:
    """Return a layer of `family` with its G/N kept. Gradients go in slices of a quarter, at least 128 KiB."""
    gradient = round(family.gradient_ratio(tokens) * exchange_bytes) // 4096 * 4096
    return BenchLayer(
        name=f"{family.name} {tokens} tokens, N {exchange_bytes / 2**20:.2f} MiB",
        exchange_bytes=exchange_bytes,
        gradient_bytes=gradient,
        slice_bytes=max(128 << 10, -(-gradient // 4 // 4096) * 4096),
    )


def grid(*, quick: bool) -> list[BenchLayer]:
    """Return 18 layers (3 in the quick form); each runs at every link speed."""
    sizes = [768 << 10] if quick else [768 << 10, 1536 << 10]
    tokens = [4096] if quick else [2048, 4096, 8192]
    return [scaled(f, tokens=t, exchange_bytes=n) for f in FAMILIES for t in tokens for n in sizes]


def models(*, quick: bool) -> list[list[BenchLayer]]:
    """Return the three model-shaped stacks: equal layers, 4096 tokens a rank."""
    depth, size = (2, 512 << 10) if quick else (4, 1 << 20)
    return [[scaled(f, tokens=4096, exchange_bytes=size)] * depth for f in FAMILIES]


def common_slices(layers: Sequence[BenchLayer]) -> list[BenchLayer]:
    """Return the layers with one slice size, as one reducer has."""
    least = min(layer.slice_bytes for layer in layers)
    return [replace(layer, slice_bytes=least) for layer in layers]
