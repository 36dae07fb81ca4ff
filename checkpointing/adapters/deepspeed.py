"""DeepSpeed's checkpoint engine: `save_checkpoint` and `load_checkpoint` stay as they are, and training does not stop.

    use_for_datastates()                                # before deepspeed.initialize, where the config already says
                                                        # "datastates_ckpt": {...}
    engine.checkpoint_engine = LongrailCheckpointEngine()       # or after it, whatever the config says

`save_checkpoint(dir, tag)` begins a save of `dir/step-<N>` (N of `global_step<N>`) and returns; `step` waits until it
is copied, and not until it is durable. Once it is, the files DeepSpeed expects in `dir/<tag>/` appear, each a line that
names the checkpoint, and only then `dir/latest`. `load_checkpoint` verifies every byte. Nothing executes on load.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

import deepspeed.runtime.checkpoint_engine.datastates_checkpoint_engine as datastates
import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from checkpointing.checkpointer import Checkpointer
from checkpointing.config import Settings
from checkpointing.errors import CheckpointError, IntegrityError, StateError
from checkpointing.folder import Folder
from checkpointing.formats.plain_pickle import UnpicklingError
from checkpointing.handle import SaveHandle
from checkpointing.load import read_global
from checkpointing.nested import class_name, flatten, unflatten
from checkpointing.providers import Mutability, TensorProvider
from checkpointing.retention import Keep, KeepLast
from checkpointing.storage.local import LocalStorage
from checkpointing.transfer import write_small

CLASSES = {class_name(kind): kind for kind in (LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address)}
"""Of DeepSpeed's own, what may be in a checkpoint."""

_FILE = "file "
"""Before the name of a value that holds what was saved under a path."""
_STEP = re.compile(r"global_step([0-9]+)", re.ASCII)
_MARK = "longrail_checkpoint"
_EVERYTHING = KeepLast(2**31)
_log = logging.getLogger("checkpointing")


def use_for_datastates() -> None:
    """Let DeepSpeed use this engine where its config says `"datastates_ckpt"`; call before `deepspeed.initialize`.

    Of that entry, `host_cache_size` (GB) is the memory of the engine.
    """
    # DeepSpeed looks this name up when it makes an engine.
    datastates.DataStatesCheckpointEngine = _of_config  # pyright: ignore[reportAttributeAccessIssue]


def _of_config(deepspeed_config: Any, rank: int) -> LongrailCheckpointEngine:
    asked = deepspeed_config.datastates_config.config
    size = asked.get("host_cache_size") if isinstance(asked, Mapping) else None
    return LongrailCheckpointEngine(**({"staging_bytes": int(size * 2**30)} if size else {}))


# Its base has no annotations, from which pyright infers that its methods return what they return there.
class LongrailCheckpointEngine(CheckpointEngine):
    """DeepSpeed's seam, over one Checkpointer a folder. Every rank makes one.

    Nothing is deleted unless `keep` says so. The other arguments are those of `Checkpointer`. A save never overwrites:
    a tag that was saved already is an error. What went wrong with a save is raised by the next `save_checkpoint`, or by
    `destroy`.
    """

    def __init__(self, *, keep: Keep | None = None, timeout_s: float = 600.0, **settings: Unpack[Settings]) -> None:
        super().__init__()
        self.name = "LongrailCheckpointEngine"
        self._keep, self._timeout_s, self._settings = keep or _EVERYTHING, timeout_s, settings
        self._runs: dict[Path, Checkpointer] = {}
        self._loaded: dict[Path, int] = {}
        self._info: CheckpointCommitInfo | None = None
        self._files: dict[str, Any] | None = None
        self._latest = False
        self._pending: tuple[SaveHandle, threading.Thread] | None = None

    def create(self, info: CheckpointCommitInfo) -> None:
        """Begin to collect what DeepSpeed saves; waits until the save before is durable. Every rank calls."""
        self._finish()
        root = Path(info.save_dir).absolute()
        if root not in self._runs:
            self._runs[root] = Checkpointer(root, keep=self._keep, timeout_s=self._timeout_s, **self._settings)
            self._runs[root].leave_latest()  # DeepSpeed's says a tag, and is written below
        if root in self._loaded:  # what was loaded is the run that goes on
            self._runs[root].adopt(self._loaded.pop(root))
        # DeepSpeed would write `latest` as soon as the save is copied; it is written here, when it is durable.
        self._latest, info.save_latest = info.save_latest, False
        self._info, self._files = info, {}

    def save(self, state_dict: Any, path: str) -> None:
        """Take what belongs in one file; nothing is written yet. Raises StateError on what is not plain."""
        if self._info is None or self._files is None:
            raise StateError(f"{path} is saved outside of save_checkpoint; DeepSpeed calls create first")
        name = os.path.relpath(path, self._info.save_dir)
        if os.path.basename(name) == name:  # of `save_16bit_model`: below no tag, and for other tools
            _write_model(Path(path), state_dict)
            return
        try:
            self._files |= _providers(name, state_dict)
        except StateError as error:  # what there is so far is no checkpoint, and the other ranks wait for this one
            self._begin(error)
            raise

    def is_decoupled(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """DeepSpeed's own word for "does not stop training".

        The one call it makes on every rank after the last `save` of a checkpoint: the save begins here.
        """
        if self._files is not None:
            self._begin()
        return True

    def get_commit_info(self) -> CheckpointCommitInfo | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the checkpoint that `step` has to wait for."""
        return self._info

    def commit(self, info: CheckpointCommitInfo | None) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Wait, before an optimizer step, until everything is copied."""
        self._info = self._files = None  # there are files only behind `save_16bit_model`, which has written its own
        for run in self._runs.values():
            run.fence()
        return True

    def load(self, path: str, map_location: Any = None) -> Any:
        """Return what was saved under a path, verified; what DeepSpeed's own wrote, too. Raises IntegrityError."""
        mark = _read_mark(Path(path))
        if mark is None:
            return _load_plain(path, map_location)
        place, file = Path(path).absolute(), Path(mark["file"])
        if place.parts[-len(file.parts) :] != file.parts:
            raise IntegrityError(f"{path} says that it is {mark['file']}; was it moved?")
        root = place.parents[len(file.parts) - 1]
        folder = Folder(root, LocalStorage())
        found = folder.inspect(mark["step"])
        tree = found.values.get(f"{_FILE}{mark['file']}")
        if tree is None:
            raise IntegrityError(f"{folder.at(mark['step'])} holds nothing of {mark['file']}; was the folder mixed up?")

        def tensor(name: str) -> torch.Tensor:
            read = read_global(folder, found, found.aliases.get(name, name))
            return read if map_location is None or callable(map_location) else read.to(map_location)

        state = unflatten(tree, tensor, CLASSES)
        self._loaded[root] = mark["step"]
        return state

    def cleanup(self) -> None:
        """End, once what was saved is durable. Raises what went wrong with it."""
        self._info = None
        try:
            self._finish()
        finally:
            runs, self._runs = list(self._runs.values()), {}
            for run in runs:
                run.close()

    def preserves_storage_sharing(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Only what a tensor shows is written, so DeepSpeed need not clone it first."""
        return False

    def _begin(self, refused: StateError | None = None) -> None:
        assert self._info is not None
        assert self._files is not None
        root, files, self._files = Path(self._info.save_dir).absolute(), self._files, None
        run, match = self._runs[root], _STEP.fullmatch(self._info.tag)
        step = int(match[1]) if match else max(run.steps(), default=-1) + 1
        handle = run.save(step, _Files(files, refused))  # raises what is refused, on every rank
        tag = self._info.tag if self._latest else None
        # No daemon: the interpreter waits for it at exit, or a durable checkpoint would have no `latest`.
        after = threading.Thread(target=_publish, args=(handle, root, step, tag), name="deepspeed-latest")
        after.start()
        self._pending = (handle, after)

    def _finish(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            handle, after = pending
            handle.wait(self._timeout_s)
            after.join(self._timeout_s)


class _Files:
    """What DeepSpeed saved on this rank, as a state."""

    def __init__(self, files: dict[str, Any], refused: StateError | None) -> None:
        self._files, self._refused = files, refused

    def state_dict(self) -> dict[str, Any]:
        if self._refused is not None:
            raise self._refused
        return self._files

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        raise NotImplementedError("DeepSpeed loads file by file")


def _providers(file: str, state: Any) -> dict[str, Any]:
    try:
        tensors, tree = flatten(state, file, CLASSES)
    except StateError as error:
        raise StateError(f"{error} (client_state of save_checkpoint holds plain values and tensors)") from error
    buffers = set(state.get("buffer_names") or ()) if isinstance(state, Mapping) else set()
    module = f"{file}.module."

    def provider(name: str, tensor: torch.Tensor) -> TensorProvider:
        # Weights, master weights and moments change in `step`, which waits; what else there is may change before.
        stepped = name.startswith(f"{file}.optimizer_state_dict.") or (
            name.startswith(module) and name.removeprefix(module) not in buffers
        )
        return TensorProvider(tensor.detach(), Mutability.STEP if stepped else Mutability.ANYTIME)

    return {f"{_FILE}{file}": tree, **{name: provider(name, tensor) for name, tensor in tensors.items()}}


def _publish(handle: SaveHandle, root: Path, step: int, tag: str | None) -> None:
    """Once the save is durable: the files DeepSpeed looks for, and last of all `latest`."""
    try:
        handle.wait()
    except CheckpointError as error:
        _log.error("%s", error)  # raised by the next save, or by `destroy`, if there will be one
        return
    try:
        _write_marks(root, step, tag)
    except (CheckpointError, OSError) as error:
        _log.error("%s is durable, but its files for DeepSpeed cannot be written: %s", root / f"step-{step}", error)


def _read_mark(path: Path) -> dict[str, Any] | None:
    storage, head = LocalStorage(), bytearray(4096)
    fd = storage.open(path)
    try:
        count = storage.read_into(fd, memoryview(head), 0)
    finally:
        storage.close(fd)
    try:
        mark = json.loads(head[:count])[_MARK]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(mark, dict) or type(mark.get("step")) is not int or not isinstance(mark.get("file"), str):
        raise IntegrityError(f"{path} does not say which checkpoint it belongs to; it is damaged")
    return mark


def _load_plain(path: str, map_location: Any) -> Any:
    """Return what DeepSpeed's own engine wrote, if that is tensors, plain values and DeepSpeed's classes only."""
    try:
        with torch.serialization.safe_globals(list(CLASSES.values())):
            return torch.load(path, map_location=map_location, weights_only=True)
    except UnpicklingError as error:
        raise IntegrityError(
            f"{path} was not written by this engine, and holds more than tensors and plain values: {error}; load it "
            "once with DeepSpeed's own engine, and save it with this one"
        ) from error


def _write_marks(root: Path, step: int, tag: str | None) -> None:
    storage, folders = LocalStorage(), set()
    found = Folder(root, storage).inspect(step)
    for name in (name.removeprefix(_FILE) for name in found.values if name.startswith(_FILE)):
        storage.make_folders((root / name).parent)
        _write(storage, root / name, json.dumps({_MARK: {"step": step, "file": name}}).encode())
        folders.add((root / name).parent)
    for folder in folders:
        storage.sync_folder(folder)
    if tag is not None:
        _write(storage, root / "latest", tag.encode())
        storage.sync_folder(root)


def _write_model(path: Path, state_dict: Any) -> None:
    """Write a model as DeepSpeed's own engine does, and as tools that read `pytorch_model.bin` expect it; durable."""
    storage, new = LocalStorage(), path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        torch.save(state_dict, new)
        storage.sync_tree(new)
        storage.rename(new, path)
        storage.sync_folder(path.parent)
    except BaseException:
        storage.discard(new)
        raise


def _write(storage: LocalStorage, path: Path, data: bytes) -> None:
    """Replace a file; every rank of a shared folder may do so, with the same bytes."""
    new = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
    write_small(storage, new, data)
    storage.rename(new, path)
