"""Which checkpoints may go. Touches none of them; a rule may warn of itself."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from checkpointing.errors import CheckpointError

_log = logging.getLogger("checkpointing")


@runtime_checkable
class Keep(Protocol):
    """A retention rule. Rules add up: `KeepLast(3) | KeepEvery(1000)` keeps what either keeps."""

    def kept(self, steps: Mapping[int, Mapping[str, Any]]) -> set[int]:
        """Return those of `steps` that stay; each with the metrics it was saved with."""
        ...


class _Rule:
    def __or__(self, other: Keep) -> KeepAny:
        check_keep(other)
        return KeepAny((*_rules(self), *_rules(other)))  # pyright: ignore[reportArgumentType]  (every rule is a Keep)


@dataclass(frozen=True, slots=True)
class KeepLast(_Rule):
    """Keep the newest `count` checkpoints."""

    count: int

    def __post_init__(self) -> None:
        if type(self.count) is not int or self.count < 1:
            raise CheckpointError(f"KeepLast({self.count!r}): keep at least 1 checkpoint")

    def kept(self, steps: Mapping[int, Mapping[str, Any]]) -> set[int]:
        """Return those of `steps` that stay."""
        return set(sorted(steps)[-self.count :])


@dataclass(frozen=True, slots=True)
class KeepEvery(_Rule):
    """Keep the checkpoints whose step is a multiple of `steps`."""

    steps: int

    def __post_init__(self) -> None:
        if type(self.steps) is not int or self.steps < 1:
            raise CheckpointError(f"KeepEvery({self.steps!r}): give a number of steps, at least 1")

    def kept(self, steps: Mapping[int, Mapping[str, Any]]) -> set[int]:
        """Return those of `steps` that stay."""
        return {step for step in steps if step % self.steps == 0}


@dataclass(frozen=True, slots=True)
class KeepBest(_Rule):
    """Keep the `count` checkpoints with the best `metric`; a tie goes to the newer one.

    The metric is a number that the state holds under this global name, its prefix included, for example
    `train.eval_loss`: a value, or a number inside of one by its dotted path. Checkpoints without it are not among the
    best; as long as none has it, all of them stay, and every save warns of it.
    """

    metric: str
    count: int = 1
    largest: bool = False
    """Whether more is better."""

    def __post_init__(self) -> None:
        if type(self.count) is not int or self.count < 1 or not self.metric:
            raise CheckpointError(f"KeepBest({self.metric!r}, {self.count!r}): name a metric, and keep at least 1")

    def kept(self, steps: Mapping[int, Mapping[str, Any]]) -> set[int]:
        """Return those of `steps` that stay."""
        sign = -1 if self.largest else 1
        found = {step: number for step, values in steps.items() if (number := look_up(values, self.metric)) is not None}
        if not found:
            some = ", ".join(sorted({name for values in steps.values() for name in values})[:5]) or "none"
            _log.warning("no checkpoint has the metric %r, so none is pruned by it; values are: %s", self.metric, some)
            return set(steps)
        return set(sorted(found, key=lambda step: (sign * found[step], -step))[: self.count])


@dataclass(frozen=True, slots=True)
class KeepAny(_Rule):
    """Keep what any of the rules keeps; made by `|`."""

    rules: tuple[Keep, ...]

    def kept(self, steps: Mapping[int, Mapping[str, Any]]) -> set[int]:
        """Return those of `steps` that stay."""
        return {step for rule in self.rules for step in rule.kept(steps)}


def look_up(values: Mapping[str, Any], path: str) -> float | None:
    """Return the finite number that `values` holds under a dotted path, or None."""
    for name in sorted(values):
        if path == name or path.startswith(f"{name}."):
            found: Any = values[name]
            for part in path[len(name) + 1 :].split(".") if path != name else ():
                found = found.get(part) if isinstance(found, Mapping) else None
            if isinstance(found, int | float) and abs(found) < float("inf"):
                return float(found)
    return None


def plan_pruning(
    keep: Keep, intact: Mapping[int, Mapping[str, Any]] | Collection[int], known_bad: Collection[int], *, saved: int
) -> tuple[int, ...]:
    """Return the steps to delete, oldest first.

    `intact` are the steps of this run whose manifest reads and whose files have their lengths, with their values;
    `known_bad` those of them in which a full read found other bytes. Bad ones do not count towards `keep`, so that they
    never push a good one out, and are deleted only when they are older than everything kept. The newest good one always
    stays, and so does the one just `saved`: a run that went back to an earlier step saves below what it left behind.
    """
    values = intact if isinstance(intact, Mapping) else {step: {} for step in intact}
    good = {step: values[step] for step in values if step not in known_bad}
    if not good:
        return ()
    kept = keep.kept(good) | {max(good), saved}
    return tuple(sorted(step for step in values if step not in kept and (step in good or step < min(kept))))


def check_keep(keep: Any) -> None:
    """Raise CheckpointError on what is no rule."""
    if isinstance(keep, type) or not isinstance(keep, Keep):
        raise CheckpointError(f"keep is {keep!r}; give a retention rule, for example KeepLast(3)")


def _rules(rule: Any) -> tuple[Keep, ...]:
    return rule.rules if isinstance(rule, KeepAny) else (rule,)
