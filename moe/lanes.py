"""The links of a layer: one queue and one process group for each link class, shared by all layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch.distributed as dist

from moe.config import MoeConfig
from moe.dispatch import DirectExchange, Exchange, TwoLevelExchange, stay
from moe.errors import MoeConfigError
from moe.issue import IssueQueue, Result, Span, Ticket, group_of, own_group


class Lane(Protocol):
    """Runs what is submitted in order."""

    def submit(self, fn: Callable[..., Any], *, needs: Result | None = None, layer: str = "", op: str = "") -> Result:
        """Return a handle at once; `fn` gets the value of `needs`, where that is given."""
        ...

    def call(self, fn: Callable[..., Any], *, needs: Result | None = None, layer: str = "", op: str = "") -> Any:
        """Return the value."""
        ...

    def fail(self, error: BaseException, *, layer: str = "", op: str = "") -> None:
        """Let everything submitted from now on fail with this cause."""
        ...


class Later:
    """A value that is computed when it is first asked for."""

    def __init__(self, fn: Callable[[], Any]) -> None:
        self._fn: Callable[[], Any] | None = fn
        self._value: Any = None

    def result(self) -> Any:
        """Return the value."""
        if self._fn is not None:
            self._value, self._fn = self._fn(), None
        return self._value


class NoLink:
    """The lane of an axis of one rank: nothing moves, so nothing has an order."""

    def submit(self, fn: Callable[..., Any], *, needs: Result | None = None, layer: str = "", op: str = "") -> Result:
        """Return the value, computed when asked for."""
        return Later(lambda: self.call(fn, needs=needs))

    def call(self, fn: Callable[..., Any], *, needs: Result | None = None, layer: str = "", op: str = "") -> Any:
        """Return the value."""
        return fn() if needs is None else fn(needs.result())

    def fail(self, error: BaseException, *, layer: str = "", op: str = "") -> None:
        """Do nothing: no peer waits."""


class Axis(NamedTuple):
    """The ranks of one axis of a mesh, and the thread that runs their collectives."""

    lane: IssueQueue
    group: dist.ProcessGroup


@dataclass(frozen=True)
class Lanes:
    """Everything a layer needs to reach the other ranks of its experts; `ep` and `esp` are None for one rank."""

    inter: Lane
    intra: Lane
    ep: dist.ProcessGroup | None
    esp: dist.ProcessGroup | None
    exchange: Exchange
    timeout_s: float
    rank: int
    on_span: Callable[[Span], None] | None = None
    """Told when each operation ran: those of the links by their threads, the experts' by the thread that computes."""
    beside: Mapping[str, Axis] = field(default_factory=dict[str, Axis])
    """The other axes of the mesh that have ranks, by name: no rows cross them, but gradients and answers do."""

    @property
    def num_ranks(self) -> int:
        """Ranks among which experts are spread."""
        return 1 if self.ep is None else self.ep.size()

    @property
    def num_members(self) -> int:
        """Ranks that share an expert."""
        return 1 if self.esp is None else self.esp.size()

    @property
    def position(self) -> int:
        """This rank's place on the `ep` axis."""
        return 0 if self.ep is None else self.ep.rank()

    @property
    def member(self) -> int:
        """This rank's place on the `esp` axis."""
        return 0 if self.esp is None else self.esp.rank()

    def ticket(self, layer: str, op: str) -> Ticket:
        """Return a handle for the lanes to wait for a computation of the calling thread."""
        return Ticket(f"rank {self.rank}, layer {layer or '?'}, {op}", self.timeout_s)

    def close(self) -> None:
        """End the threads; the layers cannot be used afterwards."""
        for lane in (self.inter, self.intra, *(axis.lane for axis in self.beside.values())):
            if isinstance(lane, IssueQueue):
                lane.close()


ALONE = Lanes(NoLink(), NoLink(), None, None, stay, timeout_s=0.0, rank=0)
"""Every expert on this rank, whole."""


def make_lanes(
    ep: dist.ProcessGroup | None,
    esp: dist.ProcessGroup | None,
    config: MoeConfig,
    *,
    on_span: Callable[[Span], None] | None = None,
    beside: Mapping[str, dist.ProcessGroup] | None = None,
) -> Lanes:
    """Return the lanes over two axes, each with groups and a thread of its own. Every rank of all groups calls.

    `beside` are the groups of the other axes, by name, on every rank in the same order.

    `on_span` is called with every operation that ended, from the thread that ran it.
    Raises MoeConfigError when the nodes do not divide the `ep` axis.
    """

    def own(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
        return None if group is None or group.size() == 1 else own_group(group, timeout_s=config.timeout_s)

    ep, esp = own(ep), own(esp)
    others = {name: made for name, group in (beside or {}).items() if (made := own(group)) is not None}
    return lanes_over(ep, esp, config, on_span=on_span, beside=others)


def lanes_over(
    ep: dist.ProcessGroup | None,
    esp: dist.ProcessGroup | None,
    config: MoeConfig,
    *,
    on_span: Callable[[Span], None] | None = None,
    beside: Mapping[str, dist.ProcessGroup],
) -> Lanes:
    """Return the lanes over groups of two ranks at least that nothing else uses: as `make_lanes`, which makes them."""
    timeout_s = config.timeout_s
    return Lanes(
        inter=NoLink() if ep is None else IssueQueue(ep, "inter", timeout_s=timeout_s, on_span=on_span),
        intra=NoLink() if esp is None else IssueQueue(esp, "intra", timeout_s=timeout_s, on_span=on_span),
        ep=ep,
        esp=esp,
        exchange=stay if ep is None else _exchange(ep, config),
        timeout_s=timeout_s,
        rank=dist.get_rank() if dist.is_initialized() else 0,
        on_span=on_span,
        beside={name: Axis(IssueQueue(group, name, timeout_s=timeout_s), group) for name, group in beside.items()},
    )


def _exchange(ep: dist.ProcessGroup, config: MoeConfig) -> Exchange:
    if config.exchange == "direct":
        return DirectExchange(ep)
    local, size = config.node_ranks, ep.size()
    if size % local:
        raise MoeConfigError(
            f"node_ranks is {local}, but the ep axis has {size} ranks; give how many of them are on one node, a divisor"
        )
    ranks, place = dist.get_process_group_ranks(ep), ep.rank()
    node, number = divmod(place, local)
    intra = group_of(ranks[node * local : (node + 1) * local], config.timeout_s)
    inter = group_of(ranks[number::local], config.timeout_s)
    return TwoLevelExchange(intra, inter, levels=config.exchange)
