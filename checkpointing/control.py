"""How ranks agree: each reports, rank 0 decides, every rank gets its answer. Every wait has a deadline.

No collectives: a group does not survive a timed-out one. Keys live in a store of their own (`control_store`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Protocol

from checkpointing.errors import (
    CheckpointError,
    IntegrityError,
    NotBegunError,
    PassedOverError,
    RankError,
    SaveError,
    StateError,
    VersionError,
)

_ALL = (
    CheckpointError, StateError, SaveError, IntegrityError, VersionError, RankError, NotBegunError, PassedOverError,
)  # fmt: skip
_KINDS = {kind.__name__: kind for kind in _ALL}

Decide = Callable[[Sequence[Mapping[str, Any]]], Sequence[Mapping[str, Any]]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one rank fared: a JSON object, or an error."""

    what: str
    """The call: `save of step 20`. Every rank must be in the same one."""
    body: Mapping[str, Any] | None = None
    error: str | None = None
    kind: str = "CheckpointError"
    cause: BaseException | None = None
    """The exception itself, where it was raised; it does not travel."""

    @classmethod
    def failed(cls, what: str, error: BaseException) -> Outcome:
        """Make an outcome of an exception; ours are told by their text, others by type and text."""
        if isinstance(error, CheckpointError):
            return cls(what, error=str(error), kind=type(error).__name__, cause=error)
        return cls(what, error=f"{type(error).__name__}: {error}", cause=error)

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as it travels."""
        return {"what": self.what, "body": self.body, "error": self.error, "kind": self.kind}

    def throw(self) -> NoReturn:
        """Raise the error every rank raises; on the rank it came from, the real one is its cause."""
        raise _KINDS.get(self.kind, CheckpointError)(self.error) from self.cause


@contextmanager
def told_as(kind: type[CheckpointError], who: str = "") -> Iterator[None]:
    """Turn what is raised inside, and is not ours, into one of our errors."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise kind(f"{who}{type(error).__name__}: {error}") from error


class Control(Protocol):
    """The ranks of one checkpointer."""

    rank: int
    world_size: int
    pulse: float
    """When this rank last looked for the others' reports, in seconds of `time.monotonic`."""

    def begin(self, what: str) -> None:
        """Begin a call; every rank must begin the same ones in the same order."""
        ...

    def exchange(self, phase: str, outcome: Outcome, decide: Decide) -> Outcome:
        """Report, and return what rank 0 answers. `decide` runs on rank 0, with the bodies of all ranks."""
        ...

    def tell(self, phase: str, outcome: Outcome) -> None:
        """Report without waiting for an answer, on the way out."""
        ...

    def alive(self) -> None:
        """Give a sign of life, at most once in a while."""
        ...

    def lead(self, value: bool) -> bool:
        """Return rank 0's value. Every rank must call; unlike the other calls, from any one thread."""
        ...

    def leave(self) -> None:
        """Wait for no other rank any more, in calls under way too; from any thread."""
        ...

    def close(self) -> None:
        """Let go of the store, once the others have read their answers."""
        ...


class Alone:
    """The control of one process."""

    rank = 0
    world_size = 1
    pulse = 0.0

    def begin(self, what: str) -> None:
        """Nobody to begin with."""

    def exchange(self, phase: str, outcome: Outcome, decide: Decide) -> Outcome:
        """Decide at once."""
        return settle(outcome.what, [outcome], decide)[0]

    def tell(self, phase: str, outcome: Outcome) -> None:
        """Nobody to tell."""

    def alive(self) -> None:
        """Nobody is waiting."""

    def lead(self, value: bool) -> bool:
        """Return the value."""
        return value

    def leave(self) -> None:
        """Nobody is waited for."""

    def close(self) -> None:
        """Nothing to let go of."""


def run_round(
    control: Control, what: str, phase: str, work: Callable[[], Mapping[str, Any]], decide: Decide
) -> Mapping[str, Any]:
    """Do `work` on every rank, let rank 0 decide, and return its answer, or raise the same error on every rank."""
    try:
        outcome = Outcome(what, body=work())
    except Exception as error:  # noqa: BLE001 - raised again below, once the other ranks know
        outcome = Outcome.failed(what, error)
    except BaseException as error:
        control.tell(phase, Outcome.failed(what, error))
        raise
    answer = control.exchange(phase, outcome, decide)
    if answer.error is not None:
        replace(answer, cause=outcome.cause or answer.cause).throw()
    return answer.body or {}


def settle(what: str, outcomes: Sequence[Outcome | None], decide: Decide) -> list[Outcome]:
    """Return the answer of each rank: what `decide` says, or one error for all. None is a rank that was silent."""
    silent = [rank for rank, outcome in enumerate(outcomes) if outcome is None]
    there = {rank: outcome for rank, outcome in enumerate(outcomes) if outcome is not None}
    failed = {rank: outcome for rank, outcome in there.items() if outcome.error is not None}
    lost = {rank: outcome for rank, outcome in there.items() if outcome.what != what}
    if lost:
        rank, other = next(iter(lost.items()))
        error = f"rank {rank} is in: {other.what}; every rank must make the same calls in the same order"
        answer = Outcome(what, error=f"{what} failed: {error}", kind="RankError")
    elif failed:
        kind = next(iter(failed.values())).kind
        answer = Outcome(what, error=f"{what} failed: {_gathered(failed, len(outcomes))}", kind=kind)
    elif silent:
        answer = Outcome(what, error=f"{what} failed: {ranks_text(silent)} did not report in time", kind="RankError")
    else:
        return _decided(what, [outcome.body or {} for outcome in there.values()], decide)
    if silent and answer.kind != "RankError":
        answer = Outcome(what, error=f"{answer.error}; {ranks_text(silent)} did not report in time", kind="RankError")
    return [answer] * len(outcomes)


def ranks_text(ranks: Sequence[int]) -> str:
    """Return `rank 1` or `ranks 1, 3`."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _decided(what: str, bodies: Sequence[Mapping[str, Any]], decide: Decide) -> list[Outcome]:
    try:
        return [Outcome(what, body=body) for body in decide(bodies)]
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks wait for an answer
        failed = Outcome.failed(what, error)
        return [replace(failed, error=f"{what} failed: {failed.error}")] * len(bodies)


def _gathered(failed: Mapping[int, Outcome], world_size: int) -> str:
    by_text: dict[str, list[int]] = {}
    for rank, outcome in failed.items():
        by_text.setdefault(str(outcome.error), []).append(rank)
    if world_size == 1:
        return next(iter(by_text))
    return "; ".join(
        f"{'every rank' if len(ranks) == world_size else ranks_text(ranks)}: {text}" for text, ranks in by_text.items()
    )
