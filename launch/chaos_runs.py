"""The runs of a session: one undisturbed, then disturbed ones until every strike of every round has fallen."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.chaos_compare import disk_use, largest_difference, median_seconds, require_comparable, require_same
from launch.chaos_disk import Ballast, can_mount, committed, small_disk
from launch.chaos_job import ChaosError, Job
from launch.chaos_kinds import KINDS, SHRINK, Scene
from launch.chaos_table import Strikes, Tally
from launch.files import RunFolder

_MARGIN_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True)
class Chaos:
    """A session. `flags` and `settings` are the job's, by dotted key; `say` tells a person what happens."""

    flags: Sequence[str]
    settings: dict[str, Any]
    kinds: Sequence[str]
    rounds: int
    ranks: int
    work: Path
    reference: Path | None
    tally: Tally
    chance: random.Random
    deadline_s: float
    stopped_s: float | None
    patience_s: float
    tolerance: float
    say: Callable[[str], None]

    def run(self) -> None:
        """Run it all. Raises ChaosError at the first job that does not survive, hangs, or ends with other weights."""
        self.work.mkdir(parents=True, exist_ok=True)
        wanted = self._undisturbed()
        strikes = [kind for _ in range(self.rounds) for kind in self._shuffled() if kind != SHRINK]
        with ExitStack() as stack:
            place = self.work
            if "full-disk" in strikes and can_mount():
                place = self.work / "disk"
                stack.enter_context(small_disk(place, self._room(wanted)))
            while strikes:
                self._disturbed(strikes, place, wanted)
        for _ in range(self.rounds * (SHRINK in self.kinds)):
            self._shrunk(wanted)

    def _shuffled(self) -> list[str]:
        return self.chance.sample(list(self.kinds), len(self.kinds))

    def _undisturbed(self) -> RunFolder:
        if self.reference is not None:
            require_comparable(RunFolder(self.reference), self.settings, self.ranks)
            return RunFolder(self.reference)
        folder, begun = RunFolder(self.work / "undisturbed"), time.monotonic()
        job = self._start(folder, restarts=0)
        try:
            self._finish(job)
        finally:
            job.kill()
        self.say(f"undisturbed: {time.monotonic() - begun:.1f} s")
        return folder

    def _disturbed(self, strikes: list[str], place: Path, wanted: RunFolder) -> None:
        """Run a job once, taking strikes off the list while it goes on."""
        folder = RunFolder(place / f"run-{self.tally.runs}")
        job, before = self._start(folder, restarts=4 * len(strikes) + 4), len(strikes)
        used: set[str] = set()
        try:
            scene = self._scene(job, folder, wanted, Ballast(place) if place != self.work else None)
            while strikes and self._strike(strikes[0], scene):
                used.add(strikes.pop(0))
            self._finish(job)
        finally:
            job.kill()
        if len(strikes) == before:
            raise ChaosError(
                f"the job ends before it can be disturbed by {strikes[0]}; give it more steps; {job.tail()}"
            )
        self._count(job)
        output = job.output()
        for kind in used:
            if not any(text in output for text in KINDS[kind].evidence):
                raise ChaosError(f"nothing in its output tells of {kind}: {job.tail()}")
        require_same(folder, wanted)
        self.tally.identical += 1
        shutil.rmtree(folder.path)

    def _shrunk(self, wanted: RunFolder) -> None:
        """Run a job on hosts of one rank each, and lose one of them."""
        folder = RunFolder(self.work / f"run-{self.tally.runs}")
        job = self._start(folder, restarts=4, hosts=self.ranks)
        try:
            scene = self._scene(job, folder, wanted, None)
            if not self._strike(SHRINK, scene):
                raise ChaosError(f"the job ends before it loses a host; give it more steps; {job.tail()}")
            self._finish(job)
        finally:
            job.kill()
        self._count(job)
        found = largest_difference(folder, wanted)
        if found > self.tolerance:
            raise ChaosError(f"{folder.path}: a loss differs by {found:.1e}, and --tolerance is {self.tolerance:g}")
        self.tally.largest_difference = max(found, self.tally.largest_difference or 0.0)

    def _strike(self, kind: str, scene: Scene) -> bool:
        """Strike once and wait until the job trains again, or has ended well; return whether it came to that."""
        job = scene.job
        if not scene.moment(KINDS[kind].checkpoints):
            return False
        begun, starts = time.monotonic(), job.starts()
        said = KINDS[kind].strike(scene)
        if said is None:
            return False
        counted = self.tally.kinds.setdefault(kind, Strikes())
        counted.struck += 1
        again = scene.until(lambda: job.starts() > starts and job.step() > 0, f"a step after {kind}: {said}")
        if not again and job.ended() != 0:
            raise ChaosError(f"the job did not survive {kind} ({said}); {job.tail()}")
        counted.recovered += 1
        counted.seconds.append(time.monotonic() - begun)
        self.say(f"run {self.tally.runs}, {kind}: {said}; trains again after {counted.seconds[-1]:.1f} s")
        return True

    def _finish(self, job: Job) -> None:
        job.wait_until(lambda: False, what="the end of the job", timeout_s=self.patience_s)
        if job.ended() != 0:
            raise ChaosError(f"the job ended with {job.ended()}; {job.tail()}")

    def _count(self, job: Job) -> None:
        output = job.output()
        self.tally.runs += 1
        self.tally.resumes += output.count("Resuming after step ")
        self.tally.skipped += output.count("Skipped ")

    def _start(self, folder: RunFolder, *, restarts: int, hosts: int = 1) -> Job:
        waits = {f"{name}.timeout_s": self.deadline_s for name in ("run", "checkpoint", "pipeline", "moe")}
        keep = max(2, self.settings["checkpoint.keep"])  # one has to be left when one is damaged
        changes = {"run.folder": folder.path, "run.log_every": 1, "checkpoint.keep": keep, **waits}
        changes["checkpoint.mirror"] = "null"  # the runs would go on from each other
        flags = [*self.flags, *(word for key, value in changes.items() for word in (f"--{key}", str(value)))]
        log = self.work / f"{folder.path.name}.log"
        return Job(flags, log, ranks=self.ranks, restarts=restarts, hosts=hosts)

    def _scene(self, job: Job, folder: RunFolder, wanted: RunFolder, ballast: Ballast | None) -> Scene:
        return Scene(
            job=job, folder=folder, chance=self.chance, patience_s=self.patience_s, stopped_s=self.stopped_s,
            within_s=2 * median_seconds(wanted), ballast=ballast,
        )  # fmt: skip

    def _room(self, wanted: RunFolder) -> int:
        """Return how large a disk is that a run fits on: what is set aside, and a checkpoint under way, included."""
        one = max((disk_use(step) for step in committed(wanted.checkpoints)), default=0)
        aside = 3 + self.rounds + self.settings["checkpoint.keep"]
        return disk_use(wanted.path) + aside * one + _MARGIN_BYTES
