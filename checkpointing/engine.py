"""The thread behind a checkpointer: one save at a time, while training goes on."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from pathlib import Path

from checkpointing.commit import Committer
from checkpointing.config import CheckpointConfig
from checkpointing.control import Control
from checkpointing.errors import CheckpointError, NotBegunError, PassedOverError, SaveError, StateError
from checkpointing.fence import Owners, StepHook
from checkpointing.flush import FlushPool
from checkpointing.folder import Folder, check_step
from checkpointing.handle import SaveHandle
from checkpointing.save import SaveJob, Saver
from checkpointing.slabs import SlabRing
from checkpointing.snapshot import Snapshotter
from checkpointing.state import State

_log = logging.getLogger("checkpointing")
_GOODBYE_S = 5.0


class Engine:
    """Takes saves one after the other. Every rank must give it the same ones in the same order."""

    def __init__(self, control: Control, folder: Folder, committer: Committer, config: CheckpointConfig) -> None:
        self._control, self._config, self._committer = control, config, committer
        owners, arena_bytes = Owners(), config.staging_bytes // 4
        self._snapshots = Snapshotter(owners, arena_bytes, check=config.check)
        self.ring = SlabRing(config.staging_bytes - arena_bytes)
        self.pool = FlushPool(
            folder.storage,
            self.ring,
            calm=config.flush_threads,
            hurried=config.hurried_threads,
            max_bytes_per_s=config.max_bytes_per_s,
        )
        self._saver = Saver(control, folder, committer, config, self.ring, self.pool)
        self._jobs: queue.SimpleQueue[SaveJob | None] = queue.SimpleQueue()
        self._open: list[SaveJob] = []  # not over, chores behind them included; the oldest first
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._beat_at = 0.0
        self._hook = StepHook(owners, self.fence)
        self._pid = os.getpid()
        self.torn: str | None = None
        """Why the state is neither what it was nor what was saved; None when it is whole."""

    def save(self, what: str, step: int, state: State) -> SaveHandle:
        """Begin a save. Returns once everything is copied that may change before the next fence.

        Raises StateError, the same on every rank, when this rank's state or step cannot be saved.
        """
        job = SaveJob(what, step, SaveHandle(what, self.pool.hurry, self._stalled))
        try:
            self.fence()  # live memory is read by one save at a time
            self._apply_policy(job)
            check_step(step)
            if self.torn is not None:
                raise StateError(
                    f"the state is not one to save, as {self.torn}; restore again, or make another Checkpointer for a "
                    "state that is made anew"
                )
            job.snapshot = self._snapshots.take(state)
        except PassedOverError as reason:
            job.handle.fail(reason, owed=False, passed_over=str(reason))
            return job.handle
        except Exception as error:  # noqa: BLE001 - the other ranks are told first
            job.error = error
        except BaseException as error:  # Ctrl-C, say; or the next call of this rank would be in the place of this one
            job.error = SaveError(f"interrupted by {type(error).__name__}")
            self.submit(job)
            raise
        self.submit(job)
        if isinstance(job.error, StateError):
            job.handle.wait()
        return job.handle

    def submit(self, job: SaveJob) -> None:
        """Give a job to the thread, and wait for what is urgent in it."""
        returned = threading.Event()
        job.urgent_done = returned.set
        job.beat = self._beat
        with self._changed:
            if not self._open:
                self._beat()
            self._open.append(job)
        if not self._start():
            self._serve_one(job)
            return
        self._jobs.put(job)
        if job.snapshot is not None and job.snapshot.structure.urgent - job.snapshot.made.keys():
            with self.pool.hurried():
                while not returned.wait(1.0):  # the deadlines of the jobs end it, but for calls that do not return
                    if (reason := self._stalled()) is not None:
                        job.give_up(SaveError(f"{job.what} failed: {reason}"))
                        return

    def fence(self) -> None:
        """Return when live memory may change. Never raises: what goes wrong is told by the save's handle."""
        if self.is_forked():
            return
        limit = 2 * self._config.timeout_s  # behind the deadlines of the job itself
        for job in list(self._open):
            if not job.handle.is_staged:
                with self.pool.hurried():
                    if not job.handle.await_staged(limit):
                        job.give_up(SaveError(f"not staged within {limit:g} s at the fence; given up"))

    def is_forked(self) -> bool:
        """Return whether this is a child of the process that saves: its threads and its store are not here."""
        return os.getpid() != self._pid

    @property
    def is_busy(self) -> bool:
        """Whether a save of this rank is under way, chores included."""
        return bool(self._open)

    def idle(self, timeout_s: float | None = None) -> bool:
        """Return whether every save is over, chores included, after waiting for it."""
        with self.pool.hurried(), self._changed:
            return self._changed.wait_for(lambda: not self._open, timeout_s)

    def close(self, timeout_s: float) -> None:
        """End. A save in flight is finished or, after `timeout_s`, given up; either is said."""
        self._hook.remove()
        flying = [job for job in list(self._open) if not job.handle.is_over]
        if flying and not self.idle(timeout_s):
            for job in flying:
                job.give_up(SaveError(f"not durable {timeout_s:g} s after the close; given up"))
            if not self.idle(_GOODBYE_S):  # it is another rank that is waited for
                self._control.leave()
                self.idle(_GOODBYE_S)
        for job in flying:
            if job.handle.progress.done:
                _log.info("%s: finished on the way out", job.what)
            elif not job.handle.is_over:
                _log.error("%s: given up on the way out; the checkpoints before it are intact", job.what)
        self.idle(timeout_s if not flying else _GOODBYE_S)
        self._jobs.put(None)
        if self._thread is not None and not self._open:
            self._thread.join(_GOODBYE_S)
        self.pool.close()
        self._control.close()
        self._snapshots.forget()
        self.ring.close()

    def _apply_policy(self, job: SaveJob) -> None:
        """Raise PassedOverError when this save is skipped; give up the one before when this one replaces it."""
        if self._config.busy == "wait":
            return
        # Rank 0 decides: a rank may know a moment later than another that a save is durable.
        flying = [one for one in list(self._open) if not one.handle.is_over]
        if not self._control.lead(bool(flying)):
            return
        if self._config.busy == "skip":
            before = flying[0].what if flying else "the save before"
            raise PassedOverError(f"{job.what} was skipped: {before} is not durable yet")
        for one in flying:
            one.give_up(PassedOverError(f"{job.what} replaces it"))

    def _beat(self) -> None:
        self._beat_at = time.monotonic()

    def _stalled(self) -> str | None:
        """Return why the save in hand will not end by itself: a call of the operating system does not return."""
        silent_s = time.monotonic() - max(self._beat_at, self._control.pulse)
        if silent_s < 2 * self._config.timeout_s:
            return None
        return f"no sign of life for {silent_s:.0f} s, as of a disk that has stopped; the checkpoints before are intact"

    def _start(self) -> bool:
        """Return whether there is a thread; where there can be none, a save runs inside of its call."""
        if self._thread is not None and self._thread.is_alive():
            return True
        thread = threading.Thread(target=self._serve, name="checkpoint-engine", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            _log.warning("saving without a thread, as there can be no more: %s", error)
            return False
        self._thread = thread
        return True

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._serve_one(job)

    def _serve_one(self, job: SaveJob) -> None:
        try:
            path = self._run(job)
            if path is not None and self._control.rank == 0:
                self._tidy(job)
        finally:
            with self._changed:
                self._open.remove(job)
                self._changed.notify_all()

    def _run(self, job: SaveJob) -> Path | None:
        path, job.staged = None, lambda: self._staged(job)
        try:
            job.beat()
            self._control.begin(job.what)
            path = self._saver.run(job)
            job.handle.finish(path)
        except PassedOverError as error:
            _log.warning("%s", error)
            job.handle.fail(error, owed=False, passed_over=str(error))
        except CheckpointError as error:
            # Not begun: the rank that could not has raised why, and this one must not hold up the next save for it.
            job.handle.fail(error, owed=not isinstance(error, NotBegunError))
        except BaseException as error:
            job.handle.fail(SaveError(f"{job.what} failed: {type(error).__name__}: {error}"))
            raise
        finally:
            self._staged(job)
            job.urgent_done()
        return path

    def _staged(self, job: SaveJob) -> None:
        if job.snapshot is not None:
            self._snapshots.give_back(job.snapshot)
            job.snapshot = None
        job.handle.set_staged()

    def _tidy(self, job: SaveJob) -> None:
        try:
            self._committer.tidy()
        except Exception as error:  # noqa: BLE001 - the checkpoint is durable; nobody waits for this
            _log.warning("after %s: %s: %s", job.what, type(error).__name__, error)
