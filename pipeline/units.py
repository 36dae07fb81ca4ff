"""What a planner is told of a micro-batch, and the shape of a stage that can run it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pipeline.errors import PlanError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Unit:
    """One micro-batch in integers: a chunk of a group, or a standalone one.

    The chunks of a group run forward in ascending order of `index` and backward in descending order on every stage.
    The last `retain` of the group keep their activations, the others run forward again before their backward.
    """

    tokens: int
    group: int | None = None
    """None: standalone."""
    index: int = 0
    count: int = 1
    """Chunks in the group."""
    retain: int = 1

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise PlanError(f"a unit of {self.tokens} tokens; it holds at least 1")
        if not 0 <= self.index < self.count:
            raise PlanError(f"unit {self.index} of a group of {self.count}; the index counts from 0 to count - 1")
        if self.retain < 1:
            raise PlanError(f"retain is {self.retain}; at least the last chunk of a group keeps its activations")
        if self.group is None and self.count != 1:
            raise PlanError(f"a standalone unit cannot be one of {self.count}; give it a group")

    @property
    def kept(self) -> bool:
        """Whether its first forward keeps the activations."""
        return self.index >= self.count - self.retain

    def __str__(self) -> str:
        if self.group is None:
            return str(self.tokens)
        return f"{self.tokens}@{self.group}.{self.index}/{self.count}k{self.retain}"

    @staticmethod
    def parse(text: str) -> Unit:
        """Read `2048`, or `2048@5.0/3k2`: the first of 3 chunks of group 5, of which 2 are retained."""
        match = re.fullmatch(r"(\d{1,12})(?:@(\d{1,12})\.(\d{1,9})/(\d{1,9})k(\d{1,9}))?", text.strip())
        if match is None:
            raise PlanError(f"{text!r} is no unit; a unit reads TOKENS or TOKENS@GROUP.INDEX/COUNTkRETAIN")
        tokens, *rest = match.groups()
        return Unit(int(tokens)) if rest[0] is None else Unit(int(tokens), *(int(x) for x in rest))


class StageModule(Protocol):
    """A stage that can run micro-batches, chunks of groups among them. Called by the runtime on the stage's rank."""

    def forward(self, x: Tensor, *, mb: int, group: int | None, index: int, keep: bool) -> Tensor:
        """Run micro-batch `mb`, the `index`-th chunk of `group`; with `keep` its activations stay for `backward`."""
        ...

    def backward(self, mb: int, grad: Tensor | None) -> Tensor | None:
        """Gradient of the input of `mb`, given that of its output (None on the last stage); weights accumulate."""
        ...

    def release(self, group: int) -> None:
        """Drop the state of a group whose last backward has run."""
        ...
