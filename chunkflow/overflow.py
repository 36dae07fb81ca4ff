"""What becomes of sequences longer than the limit, and how much of the data each policy keeps: no loss is silent.

The limit is `max_tokens`; without one it is a chunk, but for `split`, which has none: it trains everything with state.
Sequences between a chunk and the limit are split with state under every policy.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from chunkflow.errors import PlanError, SourceError
from chunkflow.sources import NO_TARGET, Sample, Selection, Source, manifest_of


class Overflow(StrEnum):
    """What to do with a sequence that is longer than the limit."""

    SPLIT = "split"
    """Train it whole, in dependent chunks: exact."""
    SPLIT_INDEPENDENT = "split_independent"
    """Cut it into pieces that do not see each other; no target is lost, only context."""
    TRUNCATE = "truncate"
    """Keep its beginning."""
    DROP = "drop"
    """Leave it out."""
    RAISE = "raise"
    """Refuse the data."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What one policy leaves of a data set, in tokens; targets are sums of loss weights."""

    policy: Overflow
    samples: int
    """Sequences after it; pieces count one each."""
    kept_tokens: int
    split_tokens: int
    """Of the kept ones: in sequences that are longer than a chunk and so trained in dependent chunks."""
    cut_tokens: int
    """Of sequences that lose a part."""
    dropped_tokens: int
    """Of sequences that are left out whole."""
    kept_targets: float
    lost_targets: float


def parse_overflow(name: str) -> Overflow:
    """Return a policy by its name. Raises PlanError with all names."""
    try:
        return Overflow(name)
    except ValueError:
        raise PlanError(f"overflow is {name!r}; it must be one of {', '.join(Overflow)}") from None


def limit_of(policy: Overflow, *, chunk_tokens: int, max_tokens: int | None) -> int | None:
    """Return the longest sequence that a policy leaves alone; None when it leaves all."""
    return max_tokens if max_tokens is not None or policy is Overflow.SPLIT else chunk_tokens


def apply_overflow(source: Source, policy: Overflow, *, chunk_tokens: int, max_tokens: int | None) -> Source:
    """Return the source as a policy leaves it; the very same one where nothing is too long.

    Raises SourceError, naming the longest, under `raise`, under `split` beyond `max_tokens`, and where nothing is left.
    """
    limit = limit_of(policy, chunk_tokens=chunk_tokens, max_tokens=max_tokens)
    too_long = np.flatnonzero(source.lengths > limit) if limit is not None else np.empty(0, dtype=np.int64)
    if limit is None or not len(too_long):
        return source
    if policy in (Overflow.SPLIT, Overflow.RAISE):
        longest = too_long[np.argmax(source.lengths[too_long])]
        raise SourceError(
            f"{len(too_long)} of {len(source)} samples have more than {limit} tokens, the longest of them, sample "
            f"{longest}, {source.lengths[longest]}; raise {'chunk_tokens' if max_tokens is None else 'max_tokens'}, or "
            "choose overflow split_independent, truncate or drop"
        )
    if policy is Overflow.DROP:
        rest = np.flatnonzero(source.lengths <= limit)
        if not len(rest):
            raise SourceError(f"every sample has more than {limit} tokens, so overflow=drop leaves none; raise it")
        return Selection(source, rest)
    return Pieces(source, limit, first_only=policy is Overflow.TRUNCATE)


class Pieces:
    """Another source whose longer samples are cut at `limit` tokens; a `Source`.

    With `first_only` what is behind the limit is gone, the target across the cut included. Without, every piece is a
    sample of its own, and its last token keeps its target: the token that comes next in the data. So only
    `ChunkRunner`'s loss, which takes shifted labels, can train them.
    """

    def __init__(self, base: Source, limit: int, *, first_only: bool) -> None:
        self._base, self._limit = base, limit
        self.open_ended = not first_only
        pieces = np.ones(len(base), dtype=np.int64) if first_only else -(-np.asarray(base.lengths) // limit)
        self._sample = np.repeat(np.arange(len(base)), pieces)
        first = np.cumsum(pieces) - pieces
        self._start = (np.arange(len(self._sample)) - first[self._sample]) * limit
        self.lengths = np.minimum(np.asarray(base.lengths)[self._sample] - self._start, limit)
        self.weights = np.asarray(base.weights)[self._sample].astype(np.float64)
        for sample in np.flatnonzero(np.asarray(base.lengths) > limit).tolist():
            mine = slice(int(first[sample]), int(first[sample] + pieces[sample]))
            loss_weights = base.read(sample).loss_weights.astype(np.float64)
            if first_only:
                self.weights[mine] = loss_weights[: limit - 1].sum()
            else:
                self.weights[mine] = np.add.reduceat(loss_weights, self._start[mine])
        self.description = {**base.description, "cut": f"{'first' if first_only else 'each'} {limit} tokens"}
        self.manifest = manifest_of(self.description)
        self.min_token_id, self.max_token_id = base.min_token_id, base.max_token_id
        self.skipped = base.skipped

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, index: int) -> Sample:
        """Return one piece."""
        whole = self._base.read(int(self._sample[index]))
        start, stop = int(self._start[index]), int(self._start[index] + self.lengths[index])
        labels, weights = whole.shift_labels[start:stop].copy(), whole.loss_weights[start:stop].copy()
        if not self.open_ended:
            labels[-1], weights[-1] = NO_TARGET, 0
        return Sample(whole.input_ids[start:stop], labels, weights)

    def select(self, indices: Iterable[int]) -> Selection:
        """Return these pieces, in this order."""
        return Selection(self, indices)


def account(source: Source, *, chunk_tokens: int, max_tokens: int | None) -> tuple[Kept, ...]:
    """Return what every policy but `raise` would keep. Reads each sample that one of them cuts."""
    return tuple(
        _kept(source, policy, chunk_tokens=chunk_tokens, max_tokens=max_tokens)
        for policy in Overflow
        if policy is not Overflow.RAISE
    )


def _kept(source: Source, policy: Overflow, *, chunk_tokens: int, max_tokens: int | None) -> Kept:
    limit = limit_of(policy, chunk_tokens=chunk_tokens, max_tokens=max_tokens)
    lengths, weights = np.asarray(source.lengths), np.asarray(source.weights)
    too_long = lengths > limit if limit is not None else np.zeros(len(lengths), dtype=bool)
    if policy is Overflow.DROP or (policy is Overflow.SPLIT and too_long.any()):
        kept, targets = lengths[~too_long], float(weights[~too_long].sum())
    elif policy is Overflow.TRUNCATE and limit is not None and too_long.any():
        pieces = Pieces(source, limit, first_only=True)
        kept, targets = pieces.lengths, float(pieces.weights.sum())
    else:
        kept, targets = lengths, float(weights.sum())
    lost = int(lengths.sum() - kept.sum())
    cut = policy is Overflow.TRUNCATE
    return Kept(
        policy=policy,
        samples=len(kept) if policy is not Overflow.SPLIT_INDEPENDENT else int((-(-lengths // (limit or 1))).sum()),
        kept_tokens=int(kept.sum()),
        split_tokens=0 if limit == chunk_tokens else int(kept[kept > chunk_tokens].sum()),
        cut_tokens=lost if cut else 0,
        dropped_tokens=0 if cut else lost,
        kept_targets=targets,
        lost_targets=max(0.0, float(weights.sum()) - targets),
    )


def accounting_table(rows: Iterable[Kept], chosen: Overflow) -> str:
    """Return the accounts for people, the chosen policy marked."""
    head = f"{'overflow':<20}{'samples':>10}{'kept':>14}{'of it split':>14}{'cut':>12}{'dropped':>12}"
    lines = [f"{head}{'targets kept':>16}{'lost':>12}"]
    for row in rows:
        name = f"{'>' if row.policy is chosen else ' '} {row.policy}"
        lines.append(
            f"{name:<20}{row.samples:>10}{row.kept_tokens:>14}{row.split_tokens:>14}{row.cut_tokens:>12}"
            f"{row.dropped_tokens:>12}{row.kept_targets:>16.0f}{row.lost_targets:>12.0f}"
        )
    return "\n".join(lines)
