"""The facade: checkpoints of a training run, in one folder."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Unpack

import torch.distributed as dist

from checkpointing import requests
from checkpointing.commit import Committer
from checkpointing.config import CheckpointConfig, Settings
from checkpointing.control import Alone, Control, run_round, told_as
from checkpointing.control_store import StoreControl
from checkpointing.engine import Engine
from checkpointing.errors import CheckpointError, NotBegunError
from checkpointing.exchange import open_exchange
from checkpointing.folder import Folder, check_step
from checkpointing.handle import SaveHandle
from checkpointing.mirror import Mirror
from checkpointing.records import RestoreInfo
from checkpointing.restore import Torn, restore
from checkpointing.retention import Keep, KeepLast
from checkpointing.save import SaveJob
from checkpointing.state import State
from checkpointing.storage import is_store
from checkpointing.storage.local import LocalStorage

SINGLE = "single"
"""As `group`: this one process saves and restores alone."""

_log = logging.getLogger("checkpointing")
_AFTER_ERROR_S = 20.0
"""For saves in flight when an exception leaves the block."""


class Checkpointer:
    """Saves and restores the state of a run, whole or not at all.

        ckpt = Checkpointer("runs/a/checkpoints", keep=KeepLast(3))
        ckpt.restore(state)
        path = ckpt.save(step, state).wait()

    `state` is one Stateful, or a mapping of prefix to Stateful, whose `state_dict()` is flat: names to tensors or JSON
    values. Every rank of the group must make this object, and every rank must make the same `save`, `restore` and
    `close` calls in the same order, with a folder all of them see.

    `group` is the default group when torch.distributed is initialised, else this process alone; SINGLE for one process.
    `mirror` is a second tier, a folder or `s3://bucket/prefix`: rank 0 copies every durable checkpoint there in the
    background, and a restore takes from it what the first tier has lost. The other arguments are those of
    CheckpointConfig. The folder is created by the first save. Raises CheckpointError when torchrun started this process
    and there is no group yet.

    From the construction on, every optimizer step of this process waits until what is being saved is copied.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        keep: Keep | None = None,
        group: dist.ProcessGroup | str | None = None,
        timeout_s: float = 600.0,
        mirror: str | os.PathLike[str] | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        keep = keep if keep is not None else KeepLast(3)
        config = CheckpointConfig(keep=keep, timeout_s=timeout_s, **settings)
        self._config = config
        self._folder = Folder(_local(path), LocalStorage())
        self._control = _open_control(group, config.timeout_s)
        self._exchange = open_exchange(group, self._control.world_size, config.timeout_s)
        self._committer = Committer(self._folder, config.keep)
        self._engine = Engine(self._control, self._folder, self._committer, config)
        self._owed: list[SaveHandle] = []
        self._closing = self._listens = False
        # At exit too: a save in flight is finished, others may not have read rank 0's last answer, and a failed save
        # must not go unheard.
        self._end = weakref.finalize(self, _at_exit, self._engine, self._owed, self._committer, config.timeout_s)
        self._control.begin("opening the checkpointer")

        def join() -> dict[str, str]:
            if mirror is not None and self._control.rank == 0:
                self._committer.mirror = Mirror(self._folder, os.fspath(mirror), config.timeout_s)
            return {"path": str(self._folder.root)}

        run_round(self._control, "opening the checkpointer", "join", join, _same_path)

    def save(self, step: int, state: State) -> SaveHandle:
        """Begin to save `state` as step `step`, and return in milliseconds; every rank must call.

        What changes in forward or backward (small tensors, values, and whatever no optimizer is known to step) is
        copied inside of this call; parameters and moments in the background, and the next optimizer step waits for
        what is left of that.

        Returns a handle whose `wait()` is the only proof: it gives the folder, or raises what went wrong. What nobody
        waited for is raised by the next `save` or `close`. A state or step that cannot be saved raises StateError
        here. A failed save leaves every earlier checkpoint as it was, and training can go on.
        """
        what = f"save of step {step!r}"
        self._check_open(what)
        owed = self._owed_error()
        if owed is not None:
            # Ranks that have raised it already are in this save by now.
            error = NotBegunError(f"not begun, as an earlier one: {owed}")
            self._engine.submit(SaveJob(what, step, SaveHandle(what, self._engine.pool.hurry), error=error))
            raise owed
        self._listens = self._listens or self._control.rank == 0
        handle = self._engine.save(what, step, state)
        self._owed.append(handle)
        return handle

    def leave_latest(self) -> None:
        """Leave the file `latest` to another tool, which names something of its own there. Every rank calls."""
        self._committer.points_latest = False

    def requested(self) -> bool:
        """Return whether someone asked for a save, by a file `request` in the folder: `checkpoint request`.

        A look by this rank alone: let rank 0 look, and all save together. Not while a save is under way, which may be
        the answer. The next durable save, and `close`, take the file away. Makes the folder, for the first request.
        """
        with told_as(CheckpointError):
            if not self._listens:
                self._folder.storage.make_folders(self._folder.root)
                self._listens = True
            return not self._engine.is_busy and requests.is_asked(self._folder)

    def restore(self, state: State, step: int | None = None) -> RestoreInfo | None:
        """Restore the newest checkpoint that verifies, or exactly `step`; every rank must call.

        Each byte is read and verified by one rank, and handed to those that need it; when one is wrong, all ranks fall
        back to the next older checkpoint. `skipped` says why, and damaged ones are set aside. Then each Stateful is
        given every saved name under its prefix, from all ranks: as a DTensor where its live tensor is one, sharded as
        that is. A state with `restores_own_names = True` is not given tensors that only other ranks' states have.
        Tensors of more than 256 KiB that one rank alone needs, and has in host memory, are filled as they are read,
        with verified bytes only, if `state_dict()` gives them out and not copies. So a state is neither the one nor the
        other when this raises after that: `save` refuses until a restore has succeeded. After going back to a `step`,
        newer checkpoints are set aside by the next save.

        Returns None when there is no checkpoint. Raises IntegrityError when there are and none verifies, and
        CheckpointError when `step` is not there. What a `load_state_dict` raises reaches the other ranks as an error
        too.
        """
        what = "restore" if step is None else f"restore of step {step!r}"
        self._check_open(what)
        self._engine.idle()  # the saves before this call, as on every other rank
        self._control.begin(what)
        torn, ring = Torn(), self._engine.ring
        try:
            info = restore(self._control, self._exchange, self._folder, self._committer, what, state, step, torn, ring)
        except BaseException as error:
            if torn.names:
                self._engine.torn = f"{what} failed in the middle: {str(error).partition(chr(10))[0]}"
            raise
        if info is not None:
            self._engine.torn = None
        return info

    def adopt(self, step: int) -> None:
        """Go on with the run of a committed step that was loaded by other means than `restore`; every rank calls.

        Retention then counts its checkpoints, too. Raises CheckpointError when there is no such step, or it does not
        read.
        """
        what = f"adopting step {step!r}"
        self._check_open(what)
        self._engine.idle()
        with told_as(CheckpointError):
            check_step(step)
            if step not in (there := self._folder.candidates()):
                raise CheckpointError(f"there is no step {step} in {self._folder.root}; there are: {there or 'none'}")
            self._committer.goes_on_from(self._folder.inspect(step))  # rank 0's counts

    def latest(self) -> int | None:
        """Return the newest committed step, or None. A look at the folder by this rank alone; reads no tensor."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """Return the committed steps, oldest first. A look at the folder by this rank alone; reads no tensor."""
        with told_as(CheckpointError):
            return list(self._folder.committed())

    def fence(self) -> None:
        """Return when parameters may be changed by hand: when nothing that is being saved is read from them any more.

        Optimizer steps call it by themselves. Never raises for a failed save; the next `save` or `wait` does.
        """
        self._engine.fence()

    def close(self) -> None:
        """End, once the saves in flight have; every rank must call. May be called twice.

        What is not durable after `timeout_s` is given up, and a request that no save has met is taken away. Raises what
        no `wait` has raised.
        """
        self._close(self._config.timeout_s)

    def _close(self, timeout_s: float, *, well: bool = True) -> None:
        if not self._end.alive or self._engine.is_forked():
            return
        self._closing = True
        try:
            self._engine.close(timeout_s)
            lacks = self._committer.end(timeout_s)
        except BaseException:  # Ctrl-C, say: what is left is done at exit, where it is said what became of it
            if self._end.detach() is not None:
                limit = min(timeout_s, _AFTER_ERROR_S)
                self._end = weakref.finalize(self, _at_exit, self._engine, self._owed, self._committer, limit)
            raise
        if self._end.detach() is None:  # another thread closes, too
            return
        if well and self._listens:  # after an error the job may be started again, and answer it
            with suppress(OSError):
                if requests.withdraw(self._folder):
                    _log.info("a request for a save came too late and was taken away: %s", self._folder.root)
        owed = self._owed_error() or lacks  # what the second tier lacks is in the log as well
        if owed is not None:
            raise owed

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        timeout_s = self._config.timeout_s
        if error is not None:
            # What ended the block may be a lost rank, with which no save in flight can be finished; and it is not seen
            # before this returns.
            timeout_s = min(timeout_s, _AFTER_ERROR_S)
            if not self._engine.is_forked() and not self._engine.idle(0):
                told = str(error).partition("\n")[0]
                _log.error("%s: %s; ending within %g s the save in flight", type(error).__name__, told, timeout_s)
        try:
            self._close(timeout_s, well=error is None)
        except CheckpointError as owed:
            if error is None:
                raise
            _log.error("%s", owed)  # what ended the block is the one to raise

    def _check_open(self, what: str) -> None:
        if self._closing or not self._end.alive:
            raise CheckpointError(f"{what}: this checkpointer is closed; make another")
        if self._engine.is_forked():
            raise CheckpointError(f"{what}: this process was forked from the one that made the checkpointer")

    def _owed_error(self) -> CheckpointError | None:
        errors = [error for handle in self._owed if handle.is_over and (error := handle.take_unheard())]
        self._owed[:] = [handle for handle in self._owed if not handle.is_over]
        return errors[0] if errors else None


def _local(path: str | os.PathLike[str]) -> Path:
    if not os.fspath(path):
        raise CheckpointError("the folder is an empty text; give the folder that checkpoints go to")
    if is_store(path):
        raise CheckpointError(f"{path} is no folder; save into a folder, and give {path} as its mirror")
    return Path(path).absolute()


def _open_control(group: dist.ProcessGroup | str | None, timeout_s: float) -> Control:
    if group == SINGLE:
        return Alone()
    if isinstance(group, str):
        raise CheckpointError(f"group is {group!r}; give a process group, SINGLE, or nothing for the default group")
    if group is None and not (dist.is_available() and dist.is_initialized()):
        if dist.is_torchelastic_launched():
            raise CheckpointError(
                "torchrun started this process and there is no process group yet; call "
                "torch.distributed.init_process_group() first, or give group=SINGLE"
            )
        return Alone()
    members = group if group is not None else dist.group.WORLD
    if members is None or dist.get_rank(members) < 0:
        raise CheckpointError("this process is not in the group it was given; make the checkpointer on members only")
    return StoreControl(members, timeout_s) if dist.get_world_size(members) > 1 else Alone()


def _same_path(bodies: Sequence[Any]) -> Sequence[Any]:
    for rank, body in enumerate(bodies):
        if body != bodies[0]:
            raise CheckpointError(f"the folder is {bodies[0]['path']} on rank 0 and {body['path']} on rank {rank}")
    return bodies


def _at_exit(engine: Engine, owed: list[SaveHandle], committer: Committer, timeout_s: float) -> None:
    if engine.is_forked():
        return
    engine.close(timeout_s)
    lacks = committer.end(timeout_s)
    for error in (*(handle.take_unheard() for handle in owed), lacks):
        if error is not None:
            _log.error("%s", error)
