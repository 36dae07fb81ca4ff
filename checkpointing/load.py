"""From a checkpoint into memory: the plan of `reshard`, carried out. Every byte is verified as it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from checkpointing.datafile import bytes_of, octets
from checkpointing.errors import IntegrityError
from checkpointing.exchange import Exchange
from checkpointing.folder import Folder
from checkpointing.memory import fresh
from checkpointing.reading import Fill, fit_slabs, read_fills
from checkpointing.records import Manifest, TensorEntry
from checkpointing.reshard import (
    Box,
    LoadPlan,
    Task,
    Wants,
    box_of,
    entries_by_name,
    is_box,
    plan_load,
    whole,
)
from checkpointing.slabs import SlabRing
from checkpointing.targets import LEAST_BYTES
from checkpointing.torch_dtypes import DTYPES
from checkpointing.verify import check_head

_ALIGN = 4096
_ARENA_BYTES = 64 * 2**20
_GENERATOR_BYTES = 64 * 2**10


@dataclass(frozen=True, slots=True)
class LiveTensor:
    """Live memory, row-major, for a box of a tensor."""

    tensor: torch.Tensor
    box: Box

    def part(self, entry: TensorEntry) -> torch.Tensor:
        """Return the memory of an entry that is inside of the box; a view."""
        return self.tensor if is_box(entry, self.box) else self.tensor[box_of(entry).within(self.box)]

    def takes(self, entry: TensorEntry) -> bool:
        """Return whether the bytes of an entry can go there as they lie in the file."""
        if is_box(entry, self.box):
            return True
        return box_of(entry).overlap(self.box) == box_of(entry) and self.part(entry).is_contiguous()


class Buffers:
    """Memory for the tasks in which a rank takes part: a fresh block for each, or live tensors where there are some.

    Live ones are used where all of their entries are in tasks that are this rank's alone.
    """

    def __init__(self, tasks: Sequence[Task], live: Mapping[str, LiveTensor] | None = None) -> None:
        others = {entry.name for task in tasks if live and task.takers != (task.reader,) for entry in task.entries}
        self._targets = {name: one for name, one in (live or {}).items() if name not in others}
        self._live, blocks = dict[int, tuple[TensorEntry, torch.Tensor]](), list[Task]()
        for task in tasks:
            for is_live, entries in groupby(task.entries, lambda entry: entry.name in self._targets):
                if is_live:
                    self._live |= {id(entry): (entry, self._targets[entry.name].part(entry)) for entry in entries}
                else:
                    blocks.append(task._replace(entries=tuple(entries)))
        self.blocks = list(zip(blocks, _blocks(blocks), strict=True))
        self._tensors: dict[int, torch.Tensor] = {}

    @property
    def live_names(self) -> set[str]:
        """Names of what is filled where it lies."""
        return {*self._targets}

    def filled(self, name: str) -> torch.Tensor | None:
        """Return a live tensor, all of which is filled where it lies."""
        return self._targets[name].tensor if name in self._targets else None

    def fills(self, rank: int) -> list[Fill]:
        """Return where the bytes go that a rank reads."""
        fresh_ones = [Fill(task.entries, block.numpy().data) for task, block in self.blocks if task.reader == rank]
        return fresh_ones + [Fill((entry,), bytes_of(tensor), live=True) for entry, tensor in self._live.values()]

    def tensor(self, entry: TensorEntry) -> torch.Tensor:
        """Return an entry as the tensor it is; only after what is broadcast is there."""
        if not self._tensors:
            for task, block in self.blocks:
                self._tensors.update(zip(map(id, task.entries), _typed_run(block, task.entries), strict=True))
            self._tensors |= {key: tensor for key, (_, tensor) in self._live.items()}
        return self._tensors[id(entry)]


def _blocks(tasks: Sequence[Task]) -> Iterator[torch.Tensor]:
    """Yield the memory of each task, aligned as its place in the file is; cut from larger pieces, for huge pages."""
    cuts, size = list[tuple[int, int]](), 0
    for number, task in enumerate(tasks, 1):
        begin = size + -size % _ALIGN + task.entries[0].begin % _ALIGN
        size = begin + task.num_bytes
        cuts.append((begin, size))
        if size >= _ARENA_BYTES or number == len(tasks):
            memory = fresh(size)
            yield from (memory[low:high] for low, high in cuts)
            cuts, size = [], 0


def typed(data: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
    """Return bytes as the tensor an entry is; a view where its alignment allows, and its own storage if small uint8."""
    dtype = DTYPES[entry.dtype]
    # torch's generators read the states they are given from the start of the storage, whatever the view's offset.
    is_generator_state = dtype == torch.uint8 and data.numel() <= _GENERATOR_BYTES
    if data.storage_offset() % dtype.itemsize or is_generator_state:
        data = data.clone()
    return data.view(dtype).reshape(entry.shape)


def _typed_run(data: torch.Tensor, run: Sequence[TensorEntry]) -> Sequence[torch.Tensor]:
    """Return the bytes of neighbours as the tensors they are; many of one dtype are cut by one call."""
    dtype = DTYPES[run[0].dtype]
    alike = len(run) > 1 and dtype != torch.uint8 and len({entry.dtype for entry in run}) == 1
    if not alike or data.storage_offset() % dtype.itemsize:
        at = run[0].begin
        return [typed(data[entry.begin - at : entry.end - at], entry) for entry in run]
    parts = data.view(dtype).split([(entry.end - entry.begin) // dtype.itemsize for entry in run])
    return [part if len(entry.shape) == 1 else part.view(entry.shape) for part, entry in zip(parts, run, strict=True)]


def buffers_for(plan: LoadPlan, rank: int, live: Mapping[str, LiveTensor] | None = None) -> Buffers:
    """Return memory for all that this rank reads or is given."""
    return Buffers([task for task in plan.tasks if task.reader == rank or rank in task.takers], live)


def live_tensors(manifest: Manifest, wants: Wants, targets: Mapping[str, torch.Tensor]) -> dict[str, LiveTensor]:
    """Return, by name, the live tensors that can take what is wanted as it was saved: as one, or in rows."""
    if not fit_slabs(manifest.piece_bytes):
        return {}
    found, unfit = dict[str, LiveTensor](), set[str]()
    for entry in manifest.tensors:
        name = entry.name
        box, tensor = wants.get(name), targets.get(name)
        if box is None or tensor is None or name in unfit or name in manifest.objects:
            continue
        if box_of(entry).overlap(box) is None:
            continue  # another rank's
        one = found.get(name) or LiveTensor(tensor, box)
        if tuple(tensor.shape) == box.shape and tensor.dtype == DTYPES[entry.dtype] and one.takes(entry):
            found[name] = one
        else:
            unfit.add(name)
    return {name: one for name, one in found.items() if name not in unfit}


def read_part(
    folder: Folder,
    manifest: Manifest,
    plan: LoadPlan,
    rank: int,
    buffers: Buffers,
    alive: Callable[[], None],
    ring: SlabRing | None = None,
) -> None:
    """Read and verify what the plan gives to this rank. Raises IntegrityError naming file and tensor.

    A rank that reads the first bytes of a file verifies its header, too. Live memory is filled by way of `ring`.
    """
    heads = {file for file, reader in first_readers(plan).items() if reader == rank}
    place = folder.at(manifest.step)
    read_fills(folder.storage, place, manifest.piece_bytes, buffers.fills(rank), alive, ring)
    # Last: format 1 has one hash for header and tensors together, and then a tensor is the better name.
    _check_heads(folder, manifest, heads)


def first_readers(plan: LoadPlan) -> dict[str, int]:
    """Return which rank verifies the header of each file: the one that reads its first bytes."""
    readers: dict[str, int] = {}
    for task in plan.tasks:
        readers.setdefault(task.entries[0].file, task.reader)
    return readers


def hand_over(exchange: Exchange, plan: LoadPlan, buffers: Buffers, wants: Sequence[Wants]) -> None:
    """Give every rank what it needs of what others read. Every rank must call, in this order of tasks."""
    for task, block in buffers.blocks:
        if task.shared and block.numel():
            exchange.broadcast(block, task.reader)
    for task, _ in buffers.blocks:
        for taker in () if task.shared else task.takers:
            if taker != task.reader and exchange.rank in (taker, task.reader):
                for entry in task.entries:
                    _pass_on(exchange, entry, task.reader, taker, wants[taker][entry.name], buffers)


def _pass_on(exchange: Exchange, entry: TensorEntry, reader: int, taker: int, want: Box, buffers: Buffers) -> None:
    """Give the part of an entry that a rank wants to it; from both ranks."""
    shared = box_of(entry).overlap(want)
    if shared is None:
        return
    # Read-only slices of what may be a larger entry: only the part a rank needs goes over the wire.
    part = buffers.tensor(entry)[shared.within(box_of(entry))]
    if exchange.rank == reader:
        exchange.send(octets(part.contiguous()), taker)
    else:
        received = torch.empty(shared.shape, dtype=part.dtype, device="cpu")
        exchange.receive(octets(received), reader)
        part.copy_(received)


def assemble(name: str, box: Box, entries: Sequence[TensorEntry], buffers: Buffers) -> torch.Tensor:
    """Return the wanted box of a tensor, made of the entries that overlap it; no copy when it is one entry, or live."""
    if (filled := buffers.filled(name)) is not None:
        return filled
    if len(entries) == 1 and is_box(entries[0], box):
        return buffers.tensor(entries[0])
    made = torch.empty(box.shape, dtype=DTYPES[entries[0].dtype], device="cpu")
    for entry in entries:
        shared = box_of(entry).overlap(box)
        if shared is not None:
            made[shared.within(box)] = buffers.tensor(entry)[shared.within(box_of(entry))]
    return made


def load_wants(
    folder: Folder,
    manifest: Manifest,
    wants: Wants,
    alive: Callable[[], None] = lambda: None,
) -> dict[str, torch.Tensor]:
    """Read boxes of tensors in one process. Raises IntegrityError; nothing is returned then."""
    plan = plan_load(manifest, [wants])
    buffers = buffers_for(plan, 0)
    read_part(folder, manifest, plan, 0, buffers, alive)
    by_name = entries_by_name(manifest)
    return {name: assemble(name, box, by_name[name], buffers) for name, box in wants.items()}


def read_global(folder: Folder, manifest: Manifest, name: str) -> torch.Tensor:
    """Read one whole tensor. Raises IntegrityError."""
    entries = entries_by_name(manifest)[name]
    return load_wants(folder, manifest, {name: whole(entries[0].global_shape)})[name]


def load_into(
    folder: Folder, step: int, tensors: Mapping[str, torch.Tensor], alive: Callable[[], None] = lambda: None
) -> None:
    """Read whole tensors straight into the memory of the given ones, without another copy; one process.

    Raises IntegrityError when bytes are not what was saved (`tensors` hold undefined numbers then), and before
    anything is changed when a name, dtype or shape differs or a tensor is not contiguous in host memory.
    """
    manifest = folder.inspect(step)
    by_name = entries_by_name(manifest)
    fills = []
    for name, tensor in tensors.items():
        if not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise IntegrityError(f"{name!r} is not contiguous host memory; give one that is, or use restore")
        entries, into = by_name.get(manifest.aliases.get(name, name), []), LiveTensor(tensor, whole(tensor.shape))
        shapes = {(entry.global_shape, DTYPES[entry.dtype]) for entry in entries}
        if shapes != {(tuple(tensor.shape), tensor.dtype)} or not all(map(into.takes, entries)):
            raise IntegrityError(f"{name!r} is not saved as one {tensor.dtype} of shape {list(tensor.shape)}")
        live = is_live(manifest, tensor)
        fills += [Fill((entry,), bytes_of(into.part(entry)), live=live) for entry in entries]
    read_fills(folder.storage, folder.at(step), manifest.piece_bytes, fills, alive)
    _check_heads(folder, manifest, {fill.entries[0].file for fill in fills})


def is_live(manifest: Manifest, tensor: torch.Tensor) -> bool:
    """Return whether a tensor that is filled where it lies is worth a buffer that its bytes are verified in first."""
    return fit_slabs(manifest.piece_bytes) and tensor.nbytes >= LEAST_BYTES


def _check_heads(folder: Folder, manifest: Manifest, files: set[str]) -> None:
    for file in manifest.files:
        if file.path in files:
            check_head(folder.storage, folder.at(manifest.step), file)
