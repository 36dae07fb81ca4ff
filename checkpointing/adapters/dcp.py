"""torch.distributed.checkpoint through this engine: `dcp.save`, `dcp.async_save` and `dcp.load` stay as they are.

    writer = DcpWriter("runs/a")
    reader = DcpReader("runs/a", writer.checkpointer)
    dcp.save(state, checkpoint_id="runs/a/step-10", storage_writer=writer)
    future = dcp.async_save(state, checkpoint_id="runs/a/step-20", storage_writer=writer)
    dcp.load(state, checkpoint_id="runs/a/step-20", storage_reader=reader)

What is written is a checkpoint as `Checkpointer` writes it, under DCP's own names, with the slice each rank holds:
committed or absent, verified on load, read by `checkpoint show` and its like. DCP pickles what is not a tensor; here
such values are plain types or refused, and nothing executes on load.
"""

from __future__ import annotations

import copy
import logging
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from checkpointing.adapters.dcp_reader import INNER, DcpReader
from checkpointing.checkpointer import Checkpointer
from checkpointing.config import Settings
from checkpointing.errors import SaveError, StateError
from checkpointing.fence import Owned, Owners, StepHook
from checkpointing.folder import split_step
from checkpointing.nested import flatten
from checkpointing.providers import Mutability, Provider, TensorProvider
from checkpointing.retention import Keep, KeepLast

__all__ = ["DcpReader", "DcpWriter"]

_EVERYTHING = KeepLast(2**31)
_LOOK_S = 0.25
_log = logging.getLogger("checkpointing")


class DcpWriter(StorageWriter, AsyncStager):
    """Writes DCP's checkpoints into the run folder `path`. Every rank makes one, once, and closes it.

    `checkpoint_id` is `path/step-N`. It is its own stager: `async_save` copies inside of the call only what no
    optimizer is known to step; parameters and moments are copied in the background, and the next optimizer step waits
    for what is left of that. Nothing is deleted unless `keep` says so. The other arguments are those of `Checkpointer`.

    A save never overwrites: the same `step-N` again is an error. Raises CheckpointError (from `dcp.save`, inside of
    DCP's own CheckpointException) when the save failed; then every earlier checkpoint is as it was.
    """

    _synchronize_after_execute = False

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        keep: Keep | None = None,
        group: dist.ProcessGroup | str | None = None,
        timeout_s: float = 600.0,
        **settings: Unpack[Settings],
    ) -> None:
        self._root, self._timeout_s = Path(path).absolute(), timeout_s
        keep = keep if keep is not None else _EVERYTHING
        self._checkpoints = Checkpointer(path, keep=keep, group=group, timeout_s=timeout_s, **settings)
        self._owners = Owners()
        self._hook = StepHook(self._owners, self.synchronize_staging)
        self._step: int | None = None
        self._staged, self._over = threading.Event(), threading.Event()
        self._staged.set()
        self._over.set()
        self._torn, self._begin = False, threading.Lock()
        self._worker: threading.Thread | None = None

    @property
    def checkpointer(self) -> Checkpointer:
        """The engine."""
        return self._checkpoints

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether it names a step."""
        return split_step(Path(checkpoint_id))[1] is not None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Choose the step of the next save. Raises StateError."""
        self._worker = threading.current_thread()
        self._step = None
        root, step = split_step(Path(checkpoint_id or "").absolute())
        if checkpoint_id is not None and (step is None or root != self._root):
            raise StateError(f"checkpoint_id is {checkpoint_id}; this writer saves to {self._root}/step-<number>")
        self._step = step

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the state with copies of what may change before the next optimizer step; waits for the save before."""
        ended = self._await(self._over)
        # DCP goes on in its thread, with collectives that the next save's would meet.
        if ended and self._worker is not None and self._worker is not threading.current_thread():
            self._worker.join(self._timeout_s)
            ended = not self._worker.is_alive()
        if not ended:
            raise SaveError(f"the save before has not ended within {self._timeout_s:g} s")
        staged = _staged(state_dict, self._owners.memory())
        self._torn, self._worker = False, None
        self._staged.clear()
        self._over.clear()
        return staged

    @property
    def should_synchronize_after_execute(self) -> bool:
        """Not inside of `async_save`: the optimizer's step does."""
        return False

    def synchronize_staging(self) -> None:
        """Return when live memory may change. Optimizer steps call it by themselves."""
        if not self._await(self._staged):
            with self._begin:  # no save begins to read from here on
                self._torn = True
            self._staged.set()
            _log.error("DCP has not copied the state within %g s; that save is given up", self._timeout_s)
            self._checkpoints.fence()

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Note who writes: the save itself makes its folder."""
        self._worker = threading.current_thread()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """DCP's plan is the plan."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """DCP's plan is the plan."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Save, and commit once every rank has."""
        try:
            step, self._step = self._step, None
            if step is None:
                raise StateError(f"give checkpoint_id='{self._root}/step-<number>'")
            with self._begin:
                if self._torn:
                    raise SaveError("given up: an optimizer step could not wait any longer for DCP to begin")
                handle = self._checkpoints.save(step, _Planned(plan, planner))
            handle.staged(self._timeout_s)
            self._staged.set()
            handle.wait()
        finally:
            self._staged.set()
            self._over.set()
        future: Future[list[WriteResult]] = Future()
        future.set_result([WriteResult(index=item.index, size_in_bytes=0, storage_data=None) for item in plan.items])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """The manifest is written already."""

    def close(self) -> None:
        """End; every rank must call, after its last save."""
        self._hook.remove()
        self._checkpoints.close()

    def _await(self, event: threading.Event) -> bool:
        """Return whether an event came; DCP may fail before it calls us, and then only its thread tells, by ending."""
        give_up = time.monotonic() + self._timeout_s
        while not event.wait(_LOOK_S):
            if self._worker is not None and not self._worker.is_alive():
                self._staged.set()
                self._over.set()
            elif time.monotonic() > give_up:
                return False
        return True

    def __reduce__(self) -> Any:
        raise StateError("this writer copies in the background by itself; use async_save with its default, THREAD")


class _Planned:
    """What DCP planned for this rank, as a state."""

    def __init__(self, plan: SavePlan, planner: SavePlanner) -> None:
        self._plan, self._planner = plan, planner

    def state_dict(self) -> dict[str, Any]:
        return self.state_providers()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        raise NotImplementedError("DCP loads through a DcpReader")

    def state_providers(self) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for item in self._plan.items:
            name = item.index.fqn
            if name in out:
                raise StateError(f"{name!r} has several pieces on this rank; one slice of a tensor a rank can be saved")
            data = self._planner.resolve_data(item)
            if item.type is WriteItemType.BYTE_IO:
                out.update(_value(name, data))
            else:
                out[name] = _slice(item, data)
        return out


def _slice(item: WriteItem, data: Any) -> Provider:
    assert item.tensor_data is not None
    whole, at = tuple(item.tensor_data.size), tuple(item.tensor_data.chunk.offsets)
    # What `stage` has left live changes behind the fence only; a synchronous save blocks.
    return TensorProvider(data.detach(), Mutability.STEP, whole, at)


def _value(name: str, data: Any) -> dict[str, Any]:
    data.seek(0)
    try:
        value = torch.load(data, weights_only=True)
    except Exception as error:
        raise StateError(f"{name!r} is no plain value (numbers, text, lists, dicts, tensors): {error}") from error
    tensors, encoded = flatten(value, f"{name}{INNER}")
    return {name: encoded, **{inner: TensorProvider(tensor) for inner, tensor in tensors.items()}}


def _staged(value: Any, owned: Owned) -> Any:
    """Return a copy that keeps the tensors whose memory is `owned`."""
    if isinstance(value, torch.Tensor):
        return value.detach() if owned.holds(value) else value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _staged(item, owned) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_staged(item, owned) for item in value)
    return copy.deepcopy(value)
