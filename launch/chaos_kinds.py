"""What is done to a job, by kind. Each waits for its moment, strikes, and undoes what would last for ever.

kill       kill -9 of one rank or of all, at any moment behind a step
stop       SIGSTOP of one rank: the others find it by their deadline
full-disk  no room on the run's disk until the job has failed of it
corrupt    the newest checkpoint is damaged while the job is down
shrink     a host of an elastic job is lost for good
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launch.chaos_disk import Ballast, committed, damage, limit_files
from launch.chaos_job import POLL_S, Job, alive, signal_process
from launch.files import RunFolder

SHRINK = "shrink"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """A job that is disturbed, and what it takes to do so."""

    job: Job
    folder: RunFolder
    chance: random.Random
    patience_s: float
    """How long a job may print nothing."""
    within_s: float
    """A strike falls so long after a step, at most."""
    stopped_s: float | None
    """A stopped rank goes on after so long; None leaves it to torchrun, which kills it 30 s after the failure."""
    ballast: Ballast | None
    """Fills the run's disk, where that is a small one of its own."""

    def moment(self, checkpoints: int = 0) -> bool:
        """Return True at a random moment behind a step of this start, with so many checkpoints; False at the end."""

        def come() -> bool:
            whole = len(self.job.ranks()) == self.job.num_ranks
            return whole and self.job.step() > 0 and len(committed(self.folder.checkpoints)) >= checkpoints

        if not self.until(come, f"a step, all ranks, and {checkpoints} checkpoints"):
            return False
        time.sleep(self.chance.uniform(0, self.within_s))
        return self.job.ended() is None

    def until(self, ready: Callable[[], bool], what: str) -> bool:
        """Return True once `ready()`, False when the job has ended."""
        return self.job.wait_until(ready, what=what, timeout_s=self.patience_s)


def kill(scene: Scene) -> str | None:
    """Kill one rank, or all."""
    ranks = sorted(scene.job.ranks())
    victims = ranks if scene.chance.random() < 0.25 else ranks[:1] if scene.chance.random() < 0.5 else ranks[-1:]
    killed = [pid for pid in victims if signal_process(pid, signal.SIGKILL)]
    return f"killed {len(killed)} of {scene.job.num_ranks} ranks" if killed else None


def stop(scene: Scene) -> str | None:
    """Stop one rank, and wait until the others have given up, and it has ended."""
    ranks, begun = scene.job.ranks(), time.monotonic()
    victim = scene.chance.choice(sorted(ranks)) if len(ranks) == scene.job.num_ranks else 0
    if not victim or not signal_process(victim, signal.SIGSTOP):
        return None

    def given_up() -> bool:
        return not all(alive(rank) for rank in ranks - {victim})

    def over() -> bool:
        if scene.stopped_s is not None and time.monotonic() - begun > scene.stopped_s:
            signal_process(victim, signal.SIGCONT)
        return not alive(victim)

    try:
        scene.until(given_up, "the other ranks to give up on a stopped one")
        found_s = time.monotonic() - begun
        scene.until(over, "the end of the stopped rank")
    finally:
        signal_process(victim, signal.SIGCONT)
    return f"stopped a rank; the others gave up after {found_s:.1f} s"


def full_disk(scene: Scene) -> str | None:
    """Leave no room until a rank has failed of it."""
    ranks = scene.job.ranks()
    if scene.ballast is not None:
        scene.ballast.fill()
    else:
        limit_files(ranks, _half_a_checkpoint(scene.folder.checkpoints))
    try:
        failed = scene.until(lambda: not ranks <= scene.job.ranks(), "a rank to fail of the full disk")
    finally:
        if scene.ballast is not None:
            scene.ballast.release()
    return "no room until the job failed" if failed else None


def corrupt(scene: Scene) -> str | None:
    """Kill all ranks and damage the newest checkpoint before the next ones look for it."""
    ranks = scene.job.ranks()
    killed = [pid for pid in ranks if signal_process(pid, signal.SIGKILL)]
    while any(alive(pid) for pid in ranks):
        time.sleep(POLL_S)
    if len(killed) < scene.job.num_ranks:  # one had done its part, and nothing may be looked for any more
        return None
    return damage(committed(scene.folder.checkpoints)[-1], scene.chance)


def shrink(scene: Scene) -> str | None:
    """Lose a host for good; not the first one, which has the store where hosts meet."""
    scene.job.lose_host(scene.chance.randrange(1, len(scene.job.hosts)))
    return f"lost a host; ranks left: {scene.job.num_ranks}"


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of disturbance."""

    strike: Callable[[Scene], str | None]
    """Strikes once, at a moment of the scene; returns in words what it did, None when the job had ended before."""
    evidence: tuple[str, ...]
    """Any of these is in the output of a job that survived one."""
    checkpoints: int = 0
    """How many have to be there."""


_GIVES_UP = (
    "is gone, stopped, hangs", "is gone or stopped", "is gone, stopped or hangs", "nothing came within",
    "did nothing for", "did not report", "did not answer",
)  # fmt: skip
"""Any of these is in what a rank says of one that is stopped, wherever it waits for it."""

KINDS = {
    "kill": Kind(kill, ("(exitcode: -9)",)),
    "stop": Kind(stop, _GIVES_UP),
    "full-disk": Kind(full_disk, ("No space left on device", "File too large")),
    "corrupt": Kind(corrupt, ("Skipped ",), checkpoints=2),
    SHRINK: Kind(shrink, ("Resuming after step",), checkpoints=1),
}


def _half_a_checkpoint(checkpoints: Path) -> int:
    return max((p.stat().st_size for step in committed(checkpoints) for p in step.iterdir()), default=0) // 2
