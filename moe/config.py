"""Settings of expert-parallel layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.errors import MoeConfigError

EXCHANGES = ("direct", "1d", "2d")


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """How a job makes experts and spreads them. No slots: defaults of nested settings are read through `vars`."""

    num_experts: int | None = None
    """Make a mixture of so many experts of each MLP of a dense Llama or Qwen3 model; null trains the model as it is."""
    top_k: int = 2
    """Experts of one token in a model made so; a model that has experts already keeps its own. With 1 routers
    learn nothing, for the weight of a token's only expert is always one."""
    ep: int | None = None
    """Ranks that divide the experts among them; null: 1 for a model made here, and a model with experts of its own
    keeps its layers as they are, whole on every rank."""
    esp: int = 1
    """Ranks of one host that share each expert, a slice of its inner width each."""
    chunks: int | None = None
    """Parts in which every layer moves and computes its tokens, forward and backward; null: as plan says, else 1."""
    plan: str | None = None
    """`measure` times links and experts, and plans; or a file, as `python -m moe plan --out` or an earlier run writes
    it; null: no plan."""
    slice_bytes: int = 1 << 20
    """Dense gradients are summed over ranks in slices of this size."""
    exchange: Literal["direct", "1d", "2d"] = "direct"
    """The all-to-all: straight, or over two levels, hosts and their ranks."""
    node_ranks: int = 1
    """Ranks of ep on one host, for the two-level exchanges."""
    grouped_mm: bool = True
    """Use grouped_mm where dtype and sizes allow; false: one product an expert."""
    timeout_s: float = 300.0
    """Seconds after which a rank that waits for another in a layer gives up, naming it."""

    def __post_init__(self) -> None:
        least = {"num_experts": 1, "top_k": 1, "ep": 1, "esp": 1, "chunks": 1, "slice_bytes": 64}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise MoeConfigError(f"moe.{name} is {value}; it must be at least {low}")
        if self.num_experts is not None and self.top_k > self.num_experts:
            raise MoeConfigError(f"moe.top_k is {self.top_k} of moe.num_experts = {self.num_experts}; lower it")
        if self.plan is not None and self.chunks is not None:
            raise MoeConfigError(f"moe.chunks is {self.chunks} and moe.plan {self.plan!r}; give one of them")
        if self.plan == "measure" and (self.ep or 1) == 1:
            raise MoeConfigError(
                f"moe.plan is 'measure' and moe.ep {self.ep}: nothing moves between ranks; set moe.ep, or leave it out"
            )
        if self.esp > 1 and not self.wanted:
            raise MoeConfigError(f"moe.esp is {self.esp} and moe.ep null; set moe.ep, 1 or more")
        _ = self.layers

    @property
    def wanted(self) -> bool:
        """Whether the job has expert-parallel layers."""
        return self.num_experts is not None or self.ep is not None

    @property
    def ranks(self) -> int:
        """Ranks that together hold every expert once."""
        return (self.ep or 1) * self.esp

    @property
    def layers(self) -> MoeConfig:
        """Settings of the layers."""
        return MoeConfig(
            exchange=self.exchange, node_ranks=self.node_ranks, timeout_s=self.timeout_s, grouped_mm=self.grouped_mm
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeConfig:
    """How the experts of a model are spread; the axes themselves come with the mesh."""

    exchange: Literal["direct", "1d", "2d"] = "direct"
    """The all-to-all: straight, or over two levels through one rank a node (1d) or all of them (2d)."""
    node_ranks: int = 1
    """Ranks of the `ep` axis on one node; read by the two-level exchanges only."""
    timeout_s: float = 300.0
    """After this a collective whose peer does not come is an error that names rank, layer and operation."""
    grouped_mm: bool = True
    """Use `torch.nn.functional.grouped_mm` where the dtype and the sizes allow; False: one product an expert."""

    def __post_init__(self) -> None:
        if self.exchange not in EXCHANGES:
            raise MoeConfigError(f"exchange is {self.exchange!r}; choose one of {', '.join(EXCHANGES)}")
        if self.node_ranks < 1:
            raise MoeConfigError(f"node_ranks is {self.node_ranks}; it must be at least 1")
        if not self.timeout_s > 0:
            raise MoeConfigError(f"timeout_s is {self.timeout_s}; it must be positive, in seconds")
