"""Room on the disk of a run, taken away and given back; and damage to a checkpoint."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_BLOCK = 1 << 20
_SMALLEST_LIMIT = 1 << 16


def can_mount() -> bool:
    """Return whether file systems in memory can be mounted here: root alone can, and not in every container."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        try:
            with small_disk(Path(folder), _BLOCK):
                return True
        except subprocess.CalledProcessError:
            return False


@contextmanager
def small_disk(folder: Path, nbytes: int) -> Iterator[None]:
    """Have a file system of so many bytes, in memory, at a folder, for as long as the block runs. Linux, as root."""
    folder.mkdir(parents=True, exist_ok=True)
    options = f"size={nbytes},mode=0700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)


class Ballast:
    """Takes all room of the file system that a folder is on."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "ballast"

    def fill(self) -> None:
        """Write until there is no room."""
        with self._path.open("ab", buffering=0) as file:
            for size in (_BLOCK, 1 << 12, 1):
                try:
                    while file.write(b"\0" * size):
                        pass
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise

    def release(self) -> None:
        """Give the room back."""
        self._path.unlink(missing_ok=True)


def limit_files(pids: Iterable[int], nbytes: int) -> None:
    """Let processes write no file beyond so many bytes: what a full disk is to them, without one. Linux."""
    for pid in pids:
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (max(nbytes, _SMALLEST_LIMIT), hard))


def committed(checkpoints: Path) -> list[Path]:
    """Return the checkpoints of a run that are whole by their names, oldest first."""
    found = [path for path in checkpoints.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted((p for p in found if (p / "manifest.json").exists()), key=lambda p: int(p.name.removeprefix("step-")))


def damage(checkpoint: Path, chance: random.Random) -> str:
    """Spoil one file of a checkpoint; return in words how. Files that others are linked to stay as they are."""
    files = sorted(path for path in checkpoint.iterdir() if path.is_file() and path.stat().st_size)
    file = chance.choice(files)
    data = bytearray(file.read_bytes())
    at = chance.randrange(len(data))
    how = chance.choice(["flipped", "cut", "gone"])
    if how == "gone" and file.name != "manifest.json":  # without one it is no checkpoint, and nobody would look
        file.unlink()
        return f"{checkpoint.name}/{file.name} removed"
    if how != "cut":
        data[at] ^= 1 << chance.randrange(8)
    else:
        del data[at:]
    partial = file.with_name("damaged")
    partial.write_bytes(data)
    partial.replace(file)
    return f"{checkpoint.name}/{file.name} {'cut at byte' if how == 'cut' else 'flipped at byte'} {at}"
