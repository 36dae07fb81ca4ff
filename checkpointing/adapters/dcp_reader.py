"""The reading side of `checkpointing.adapters.dcp`."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as records
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from checkpointing.checkpointer import Checkpointer
from checkpointing.datafile import bytes_of
from checkpointing.errors import CheckpointError
from checkpointing.folder import Folder, split_step
from checkpointing.load import is_live, read_global, typed
from checkpointing.nested import unflatten
from checkpointing.reading import Fill, read_fills
from checkpointing.records import Manifest, TensorEntry
from checkpointing.reshard import entries_by_name
from checkpointing.storage.local import LocalStorage
from checkpointing.torch_dtypes import DTYPES
from checkpointing.verify import check_head

INNER = "#"
"""Between the name of a value and those of the tensors inside of it."""

_BATCH_BYTES = 512 * 2**20


class DcpReader(StorageReader):
    """Reads a checkpoint of the run folder `path`, every byte verified: the newest, or that of `checkpoint_id`.

    Any checkpoint of this engine may be loaded by its names, whoever wrote it. Each rank reads what it needs; DTensors
    may be sharded otherwise than they were. What is wrong with a checkpoint is the last line of DCP's
    CheckpointException, and in its `failures` the CheckpointError of each rank that found it: it names folder, file,
    tensor and piece. As with every DCP reader, tensors are filled in place: after such an error they hold anything.

    With the `checkpointer` of this job's writer, the run that was loaded is the one that the writer goes on with: its
    retention counts the checkpoints of before, too.
    """

    def __init__(self, path: str | os.PathLike[str], checkpointer: Checkpointer | None = None) -> None:
        self._path, self._checkpointer = Path(path).absolute(), checkpointer
        self._root = split_step(self._path)[0]
        self._folder, self._found = Folder(self._path, LocalStorage()), None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether there is something."""
        return Path(checkpoint_id).is_dir()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Choose what is read next."""
        self._path, self._found = Path(checkpoint_id or self._path).absolute(), None

    def read_metadata(self) -> Metadata:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return what a checkpoint holds, as DCP describes it; of one that cannot be read, what raises the reason.

        Takes no `rank`: DCP would try again with it when this raises, log both, and let one rank go on without others.
        """
        try:
            with self._told():
                self._found = self._open()
        except CheckpointError as error:
            return _Unread(error)
        described: dict[str, Any] = dict.fromkeys(self._found.values, records.BytesStorageMetadata())
        inner = tuple(f"{name}{INNER}" for name in self._found.values)
        entries = entries_by_name(self._found)
        for name in [*entries, *self._found.aliases]:
            if not name.startswith(inner) and name not in self._found.objects:
                described[name] = _described(entries[self._found.aliases.get(name, name)])
        return Metadata(described, planner_data={name: (name,) for name in described}, storage_data={})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Raise CheckpointError when the checkpoint cannot be read: here DCP tells every rank."""
        if isinstance(metadata, _Unread):
            raise metadata.why.with_traceback(None)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """DCP's plan is the plan."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """DCP's plan is the plan."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read and verify what the plan says. Raises IntegrityError."""
        found = self._found
        if found is None:
            raise CheckpointError("read_metadata comes first")
        with self._told():
            self._read_plan(found, plan, planner)
        if self._checkpointer is not None and self._folder.root == self._root:
            self._checkpointer.adopt(found.step)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _open(self) -> Manifest:
        """Return the manifest of what is to be read. Raises CheckpointError."""
        root, step = split_step(self._path)
        self._folder = Folder(root, LocalStorage())
        there = self._folder.candidates()
        if step is None:
            step = max(self._folder.committed(), default=None)
        if step is None:
            raise CheckpointError("there is no committed checkpoint")
        if step not in there:
            raise CheckpointError(f"there is no step {step}; there are: {there or 'none'}")
        return self._folder.inspect(step)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Raise errors anew with the folder's name and without the way they came: DCP prints that, for each rank."""
        try:
            yield
        except (CheckpointError, OSError) as error:
            kind = type(error) if isinstance(error, CheckpointError) else CheckpointError
            why = kind(f"{self._folder.root}: {error}")
        else:
            return
        raise why

    def _read_plan(self, found: Manifest, plan: LoadPlan, planner: LoadPlanner) -> None:
        wanted: dict[tuple[str, tuple[int, ...]], list[ReadItem]] = {}
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, self._bytes(found, item.storage_index.fqn))
            else:
                name = item.storage_index.fqn
                at = tuple(item.storage_index.offset or ()) or (0,) * len(item.storage_offsets)
                wanted.setdefault((found.aliases.get(name, name), at), []).append(item)
        entries = {(one.name, one.offset): one for one in found.tensors}
        for batch in _batches([(entries[key], items) for key, items in wanted.items()]):
            self._read(found, batch, planner)
        for file in found.files:
            if any(entries[key].file == file.path for key in wanted):
                check_head(self._folder.storage, self._folder.at(found.step), file)

    def _read(
        self, found: Manifest, batch: Sequence[tuple[TensorEntry, Sequence[ReadItem]]], planner: LoadPlanner
    ) -> None:
        fills, copies, done = [], [], []
        for entry, items in batch:
            targets = [planner.resolve_tensor(item).detach() for item in items]
            done += zip(items, targets, strict=True)
            first = targets[0]
            if len(items) == 1 and _holds(first, entry):
                fills.append(Fill((entry,), bytes_of(first), live=is_live(found, first)))
                continue
            data = torch.empty(entry.end - entry.begin, dtype=torch.uint8, device="cpu")
            fills.append(Fill((entry,), data.numpy().data))
            copies += [(entry, data, item, target) for item, target in zip(items, targets, strict=True)]
        read_fills(self._folder.storage, self._folder.at(found.step), found.piece_bytes, fills, lambda: None)
        for entry, data, item, target in copies:
            places = zip(item.storage_offsets, item.lengths, strict=True)
            target.copy_(typed(data, entry)[tuple(slice(at, at + length) for at, length in places)])
        for item, target in done:
            planner.commit_tensor(item, target)

    def _bytes(self, found: Manifest, name: str) -> io.BytesIO:
        """Return a value as DCP's planner takes it; pickled here, from plain types."""
        value = unflatten(found.values[name], lambda inner: read_global(self._folder, found, inner))
        data = io.BytesIO()
        torch.save(value, data)
        data.seek(0)
        return data


class _Unread(Metadata):
    """Of a checkpoint that cannot be read: a look at what it holds raises why."""

    def __init__(self, why: CheckpointError) -> None:
        self.why = why

    def __getattr__(self, name: str) -> Any:
        raise self.why if name == "state_dict_metadata" else AttributeError(name)


def _described(entries: Sequence[TensorEntry]) -> records.TensorStorageMetadata:
    first = entries[0]
    return records.TensorStorageMetadata(
        records.TensorProperties(dtype=DTYPES[first.dtype]),
        torch.Size(first.global_shape),
        [records.ChunkStorageMetadata(torch.Size(one.offset), torch.Size(one.shape)) for one in entries],
    )


def _holds(tensor: torch.Tensor, entry: TensorEntry) -> bool:
    """Return whether a tensor's memory can take the bytes of an entry as they are."""
    same = (tuple(tensor.shape), tensor.dtype, tensor.device.type) == (entry.shape, DTYPES[entry.dtype], "cpu")
    return same and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _batches(
    wanted: Sequence[tuple[TensorEntry, Sequence[ReadItem]]],
) -> Iterator[list[tuple[TensorEntry, Sequence[ReadItem]]]]:
    """Yield what is read together: as much as may be in buffers at a time."""
    batch, size = [], 0
    for entry, items in wanted:
        if batch and size + entry.end - entry.begin > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append((entry, items))
        size += entry.end - entry.begin
    if batch:
        yield batch
