"""Which format a path is, and the one door to all of them."""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from checkpointing.errors import CheckpointError, FormatError
from checkpointing.formats.base import Source, Target
from checkpointing.storage import is_store
from checkpointing.storage.local import LocalStorage

FORMATS: dict[str, str] = {
    "longrail": "checkpointing.formats.own",
    "hf": "checkpointing.formats.hf",
    "torch": "checkpointing.formats.torch_pt",
    "dcp": "checkpointing.formats.dcp",
    "deepspeed": "checkpointing.formats.deepspeed",
    "torchsnapshot": "checkpointing.formats.torchsnapshot",
}
"""Name of a format to the module with its `read(path, step)` and, but for ours, its `write(source, target)`."""

_BY_RANK = ("dcp", "deepspeed")
_ZIP = b"PK\x03\x04"
"""How what torch.save writes begins."""


def detect(path: Path) -> str:
    """Return the format of what is at `path`. Raises FormatError when it is none we know."""
    if path.is_file():
        return _of_file(path)
    names = set(LocalStorage().names(path)) if path.is_dir() else set()
    if not names:
        raise FormatError(f"{path} {'is empty' if path.is_dir() else 'does not exist'}; give a checkpoint")
    if "manifest.json" in names or any(name.startswith("step-") for name in names):
        return "longrail"
    if ".metadata" in names:
        return "dcp"
    if ".snapshot_metadata" in names:
        return "torchsnapshot"
    if any(name.endswith("_model_states.pt") for name in names) or _tagged(path, names):
        return "deepspeed"
    if any(name.endswith(".safetensors") for name in names):
        return "hf"
    some = ", ".join(sorted(names)[:5])
    raise FormatError(f"{path} is no checkpoint we know: it holds {some}; formats: {', '.join(FORMATS)}")


def open_source(path: Path | str, *, step: int | None = None) -> Source:
    """Open a checkpoint of any format; in an object store (`s3://...`) one of ours, of which `step` chooses one.

    Raises FormatError or IntegrityError.
    """
    if isinstance(path, str) and "://" in path:
        return _module("longrail").read(path, step)
    path = Path(path)
    kind = detect(path)
    if step is not None and kind not in ("longrail", "deepspeed"):
        raise FormatError(f"{path} is a {kind} checkpoint, which has no steps; leave out @{step}")
    with _told(f"{path} cannot be read as a {kind} checkpoint"):
        return _module(kind).read(path, step)


def write_target(
    kind: str,
    source: Source,
    dest: Path,
    *,
    world_size: int = 1,
    note: Callable[[str], None] = lambda _: None,
    wrote: Callable[[int], None] = lambda _: None,
) -> None:
    """Write `source` in another format: whole at `dest`, durable, or not there at all.

    Raises FormatError when `dest` exists or the format cannot hold the source.
    """
    storage, module = LocalStorage(), _module(kind)
    if world_size != 1 and kind not in _BY_RANK:
        raise FormatError(f"--world-size {world_size} has no meaning for {kind}, only for {' and '.join(_BY_RANK)}")
    if is_store(dest):
        raise FormatError(f"{dest} is no folder; write to one, and copy that there")
    if dest.exists() or dest.is_symlink():
        raise FormatError(f"{dest} exists already and nothing is overwritten; choose another destination")
    storage.make_folders(dest.absolute().parent)
    tmp = dest.with_name(f"{dest.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        with _told(f"{source.path} cannot be written as {kind}"):
            module.write(source, Target(tmp, world_size, note, wrote))
        storage.sync_tree(tmp)
        storage.rename(tmp, dest)
        storage.sync_folder(dest.absolute().parent)
    except BaseException:
        storage.discard(tmp)
        raise


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Say in one line what odd contents have led to: they may be anybody's."""
    try:
        yield
    except CheckpointError:
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        why = next(iter(str(error).splitlines()), "")
        raise FormatError(f"{what}: {type(error).__name__}: {why}") from error


def _of_file(path: Path) -> str:
    if path.suffix == ".safetensors":
        return "hf"
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        return "torch"
    storage, head = LocalStorage(), bytearray(len(_ZIP))
    fd = storage.open(path)
    try:
        storage.read_into(fd, memoryview(head), 0)
    finally:
        storage.close(fd)
    if head == _ZIP:
        return "torch"
    raise FormatError(
        f"{path} is a file we cannot tell by its name or beginning; .safetensors, .pt, .pth, .bin and .ckpt are read"
    )


def _tagged(path: Path, names: set[str]) -> bool:
    folders = (path / name for name in names if (path / name).is_dir())
    return any((folder / "mp_rank_00_model_states.pt").exists() for folder in folders) or any(
        list((path / name).glob("*_model_states.pt")) for name in names if (path / name).is_dir()
    )


def _module(kind: str):
    if kind not in FORMATS:
        others = ", ".join(one for one in FORMATS if one != "longrail")
        raise FormatError(f"format {kind!r} is unknown; formats: {others}")
    return importlib.import_module(FORMATS[kind])
