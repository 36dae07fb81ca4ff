"""The order of one rank's jobs."""

from __future__ import annotations

from collections.abc import Iterable

from chunkflow.records import Chunk

Job = tuple[Chunk, ...]
"""All chunks of a group in ascending order, or one standalone chunk."""


def order(jobs: Iterable[Job]) -> tuple[Chunk, ...]:
    """Return the chunks of one rank: groups first, those with the most chunks leading; then standalone chunks.

    With the same rule everywhere the op programs of the ranks are alike, so that few dummies align them; and the step
    that needs the most memory comes first.
    """
    ordered = sorted(jobs, key=lambda job: (-len(job), -sum(c.num_tokens for c in job), job[0].segments[0].sample))
    return tuple(chunk for job in ordered for chunk in job)
