"""The facade: checkpoints of a training run, in one folder."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from checkpointing.commit import Committer
from checkpointing.config import CheckpointConfig
from checkpointing.control import Alone, Control, Outcome, run_round, told_as
from checkpointing.control_store import StoreControl
from checkpointing.errors import CheckpointError, StateError
from checkpointing.folder import Folder
from checkpointing.handle import SaveHandle
from checkpointing.load import Exchange, GroupExchange, NoExchange
from checkpointing.records import RestoreInfo
from checkpointing.restore import restore
from checkpointing.retention import KeepLast
from checkpointing.save import Meter, save
from checkpointing.state import State
from checkpointing.storage.local import LocalStorage

SINGLE = "single"
"""As `group`: this one process saves and restores alone."""

_log = logging.getLogger("checkpointing")


class Checkpointer:
    """Saves and restores the state of a run, whole or not at all.

        ckpt = Checkpointer("runs/a/checkpoints", keep=KeepLast(3))
        ckpt.restore(state)
        path = ckpt.save(step, state).wait()

    `state` is one Stateful, or a mapping of prefix to Stateful, whose `state_dict()` is flat: names to tensors or JSON
    values. Every rank of the group must make this object, and every rank must make the same `save`, `restore` and
    `close` calls in the same order, with a folder all of them see.

    `group` is the default group when torch.distributed is initialised, else this process alone; SINGLE for one process.
    `timeout_s` is how long, in seconds, a rank may show no sign of life while others wait for it; see CheckpointConfig.
    The folder is created by the first save. Raises CheckpointError when torchrun started this process and there is no
    group yet.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        keep: KeepLast | None = None,
        group: dist.ProcessGroup | str | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        config = CheckpointConfig(keep=keep if keep is not None else KeepLast(3), timeout_s=timeout_s)
        self._folder = Folder(Path(path).absolute(), LocalStorage())
        self._control = _open_control(group, config.timeout_s)
        self._exchange = _open_exchange(group, self._control)
        self._committer = Committer(self._folder, config.keep)
        self._owed: list[SaveHandle] = []
        # At exit too: others may not have read rank 0's last answer, and a failed save must not go unheard.
        self._end = weakref.finalize(self, _at_exit, self._control, self._owed)
        self._control.begin("opening the checkpointer")
        mine = {"path": str(self._folder.root)}
        run_round(self._control, "opening the checkpointer", "join", lambda: mine, _same_path)

    def save(self, step: int, state: State) -> SaveHandle:
        """Save `state` as step `step`; every rank must call. In this form all the work is done on return.

        Returns a handle whose `wait()` is the only proof: it gives the folder, or raises what went wrong. What nobody
        waited for is raised by the next `save` or `close`. A state or step that cannot be saved raises StateError
        here, on every rank. A failed save leaves every earlier checkpoint as it was, and training can go on.
        """
        what = f"save of step {step!r}"
        self._begin(what)
        self._raise_owed(what)
        meter = Meter()
        try:
            handle = SaveHandle(
                meter, path=save(self._control, self._folder, self._committer, what, step, state, meter)
            )
        except StateError:
            raise
        except CheckpointError as error:
            handle = SaveHandle(meter, error=error)
        self._owed[:] = [handle]
        return handle

    def restore(self, state: State, step: int | None = None) -> RestoreInfo | None:
        """Restore the newest checkpoint that verifies, or exactly `step`; every rank must call.

        Rank 0 reads and hashes every byte first, and falls back to older checkpoints; `skipped` says why. Then each
        Stateful is given every saved name under its prefix, from all ranks. Nothing is changed before all bytes are
        read. Returns None when there is no checkpoint. Raises IntegrityError when there are and none verifies, and
        CheckpointError when `step` is not there. What a `load_state_dict` raises reaches the other ranks as an error
        too.
        """
        what = "restore" if step is None else f"restore of step {step!r}"
        self._begin(what)
        return restore(self._control, self._exchange, self._folder, self._committer.known_bad, what, state, step)

    def latest(self) -> int | None:
        """Return the newest committed step, or None. A look at the folder by this rank alone; reads no tensor."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """Return the committed steps, oldest first. A look at the folder by this rank alone; reads no tensor."""
        with told_as(CheckpointError):
            return list(self._folder.committed())

    def fence(self) -> None:
        """Return when parameters may be changed by hand: at once, as `save` copies nothing behind the caller's back."""

    def close(self) -> None:
        """Let go of the other ranks; every rank must call. Raises what no `wait` has raised. May be called twice."""
        if self._end.detach() is None:
            return
        self._control.close()
        owed = self._owed_error()
        if owed is not None:
            raise owed

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CheckpointError as owed:
            if error is None:
                raise
            _log.error("%s", owed)  # what ended the block is the one to raise

    def _begin(self, what: str) -> None:
        if not self._end.alive:
            raise CheckpointError(f"{what}: this checkpointer is closed; make another")
        self._control.begin(what)

    def _raise_owed(self, what: str) -> None:
        owed = self._owed_error()
        if owed is not None:
            # Ranks that have raised it already are in the next save by now.
            self._control.tell("plan", Outcome.failed(what, CheckpointError(f"not begun, as an earlier one: {owed}")))
            raise owed

    def _owed_error(self) -> CheckpointError | None:
        owed = [handle.take_unheard() for handle in self._owed]
        self._owed.clear()
        return owed[0] if owed else None


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


def _open_exchange(group: dist.ProcessGroup | str | None, control: Control) -> Exchange:
    if control.world_size == 1:
        return NoExchange()
    members = group if isinstance(group, dist.ProcessGroup) else dist.group.WORLD
    assert members is not None
    return GroupExchange(members)


def _same_path(bodies: Sequence[Any]) -> Sequence[Any]:
    for rank, body in enumerate(bodies):
        if body != bodies[0]:
            raise CheckpointError(f"the folder is {bodies[0]['path']} on rank 0 and {body['path']} on rank {rank}")
    return bodies


def _at_exit(control: Control, owed: list[SaveHandle]) -> None:
    control.close()
    for handle in owed:
        error = handle.take_unheard()
        if error is not None:
            _log.error("%s", error)
