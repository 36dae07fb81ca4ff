"""What a saved loader position belongs to, and whether it may be continued here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from operator import index
from typing import Any

from chunkflow.config import PlannerConfig
from chunkflow.errors import StateError
from chunkflow.sources import Source


@dataclass(frozen=True, slots=True)
class Balance:
    """The pair cost of each step: it may be measured anew while training, and every rank must change at one step.

    Once a step has a pair cost it keeps it: one rank may have planned it, and another not yet.
    """

    changes: tuple[tuple[int, float], ...]
    """(step, pair cost), ascending: what steps from that one on are planned with. The first holds for all before."""

    @property
    def pair_cost(self) -> float:
        """The last pair cost, of steps that may be still to come."""
        return self.changes[-1][1]

    def at(self, step: int) -> float:
        """Return the pair cost that a step is planned with."""
        return next((cost for since, cost in reversed(self.changes) if since <= step), self.changes[0][1])

    def then(self, step: int, pair_cost: float, *, now: int) -> Balance:
        """Return the balance with another pair cost from `step` on; a change that was to come later is overtaken.

        What only steps before `now` were planned with is forgotten.
        """
        last = max((n for n, (since, _) in enumerate(self.changes) if since <= now), default=0)
        return Balance((*((since, cost) for since, cost in self.changes[last:] if since < step), (step, pair_cost)))

    def to_json(self) -> list[Any]:
        """Return JSON values."""
        return [list(change) for change in self.changes]

    @classmethod
    def from_json(cls, values: Any) -> Balance:
        """Read it back. Raises StateError when it is none."""
        try:
            changes = tuple((index(since), float(cost)) for since, cost in values)
            if not changes:
                raise ValueError("no pair cost")
            return cls(changes)
        except (TypeError, ValueError) as error:
            raise StateError(
                f"balance is {values!r} in the loader's saved state; it is not one of a ChunkLoader"
            ) from error


def flat_identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by dotted key."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat.update({f"{name}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {name: value})
    return flat


def identity(source: Source, config: PlannerConfig, *, seed: int, global_batch: int, weighting: str) -> dict[str, Any]:
    """Return what decides the steps, as JSON values. World size and prefetch do not."""
    return {
        "manifest": source.manifest,
        "description": dict(source.description),
        "planner": asdict(config),
        "seed": seed,
        "global_batch": global_batch,
        "weighting": weighting,
    }


def resume_step(state: Mapping[str, Any], expected: Mapping[str, Any], steps_per_epoch: int, num_steps: int) -> int:
    """Return the step to go on with, counted over all epochs. Raises StateError when the state is of another job."""
    missing = [key for key in (*expected, "epoch", "step") if key not in state]
    if missing:
        raise StateError(f"the loader's saved state lacks {', '.join(missing)}; it is not the state of a ChunkLoader")
    kinds = {"description": Mapping, "planner": Mapping, "epoch": int, "step": int}
    for key, kind in kinds.items():
        if not isinstance(state[key], kind):
            raise StateError(
                f"{key} is {state[key]!r} in the loader's saved state; it is not the state of a ChunkLoader"
            )
    changes = list(_changes(state, expected))
    if changes:
        raise StateError(
            "the saved loader state belongs to other steps: " + "; ".join(changes) + ". Go back to the saved values, "
            "or start a loader of its own without the state"
        )
    epoch, place = state["epoch"], state["step"]
    step = epoch * steps_per_epoch + place
    if epoch < 0 or not 0 <= place < steps_per_epoch or step > num_steps:
        raise StateError(
            f"the saved loader state stands at step {place} of epoch {epoch}; this loader has epochs of "
            f"{steps_per_epoch} steps and {num_steps} steps in all; raise epochs"
        )
    return step


def _changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    if saved["manifest"] != now["manifest"]:
        parts = list(_differences("data", saved["description"], now["description"]))
        yield from parts or [f"manifest was {saved['manifest']} and is {now['manifest']}"]
    yield from _differences("planner", saved["planner"], now["planner"])
    for key in ("seed", "global_batch", "weighting"):
        if saved[key] != now[key]:
            yield f"{key} was {saved[key]!r} and is {now[key]!r}"


def _differences(name: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted({*saved, *now}):
        if saved.get(key) != now.get(key):
            yield f"{name}.{key} was {saved.get(key)!r} and is {now.get(key)!r}"
