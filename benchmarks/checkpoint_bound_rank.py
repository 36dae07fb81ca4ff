"""One rank of `benchmarks.checkpoint_bound`: it trains, and a thread does one part of a save beside it.

python -m benchmarks.checkpoint_bound_rank RANK FOLDER OPTIONS        (started by benchmarks.checkpoint_bound)
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from benchmarks.checkpoint_raw import PART_BYTES, warm_buffers
from benchmarks.checkpoint_state import Work, smollm
from checkpointing import Checkpointer, KeepLast

RANKS = 2
TOKENS = 128
"""Of a step and rank, as in `benchmarks.checkpoint --only blocked`."""
SECTOR = 512
Part = Callable[[int, int], object]
PLAIN = ("nothing", "copy", "hash", "write", "copy and hash", "copy, hash and write", "hash and write in place")
SAVE = "a save of this library"
PARTS = (*PLAIN, SAVE)


def parts(source: torch.Tensor, fd: int) -> dict[str, Part]:
    """Return, by name, what is done with the piece of `source` of number i at byte `at`."""
    memory, buffers = source.numpy().data, warm_buffers(8)
    places = [ctypes.addressof(ctypes.c_char.from_buffer(buffer)) for buffer in buffers]
    start, skew = source.data_ptr(), -source.data_ptr() % SECTOR

    def copy(i: int, at: int) -> None:
        ctypes.memmove(places[i % 8], start + at, PART_BYTES)

    def hash_(i: int, at: int) -> None:
        xxhash.xxh3_64_digest(memory[at : at + PART_BYTES])

    def write(i: int, at: int) -> None:
        os.pwrite(fd, buffers[i % 8], at)

    def copied(i: int, at: int) -> None:
        copy(i, at)
        xxhash.xxh3_64_digest(buffers[i % 8])

    def everything(i: int, at: int) -> None:
        copied(i, at)
        write(i, at)

    def in_place(i: int, at: int) -> None:
        hash_(i, at)
        os.pwrite(fd, memory[at + skew : at + skew + PART_BYTES], at)

    return dict(zip(PLAIN, (lambda i, at: None, copy, hash_, write, copied, everything, in_place), strict=True))


def step_beside(part: Part, num_bytes: int, work: Work) -> float:
    """Return the seconds of a training step at whose beginning a thread begins to do `part` once for every piece.

    As with a save, the parameters are updated once the thread has done everything.
    """
    thread = threading.Thread(target=lambda: [part(i, at) for i, at in enumerate(range(0, num_bytes, PART_BYTES))])
    began = time.perf_counter()
    thread.start()
    work.step(thread.join)
    return time.perf_counter() - began


def step_beside_save(saves: Checkpointer, numbers: Iterator[int], work: Work) -> float:
    """Return the seconds of a training step at whose beginning a save begins."""
    began = time.perf_counter()
    handle = saves.save(next(numbers), work)
    work.step(saves.fence)
    took = time.perf_counter() - began
    folder = handle.wait(300)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
        os.sync()
    return took


def measure(rank: int, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Run every part in turn, round by round; return how long this rank's steps beside them were."""
    work = smollm(rank, RANKS, tokens=TOKENS)
    num_bytes = work.num_bytes // PART_BYTES * PART_BYTES
    source = torch.zeros(num_bytes + SECTOR, dtype=torch.uint8, device="cpu").fill_(3)
    rows = []
    fd = os.open(folder / f"bytes-{rank}", os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o666)
    try:
        os.posix_fallocate(fd, 0, num_bytes)
        saves = Checkpointer(folder / "run", keep=KeepLast(1000))
        steps = {name: partial(step_beside, part, num_bytes, work) for name, part in parts(source, fd).items()}
        steps[SAVE] = partial(step_beside_save, saves, count(1), work)
        for round_ in range(-2, rounds):  # two to warm up: before the first step a save does not know the optimizer
            for name in PARTS:
                dist.barrier()
                step_s = steps[name]()
                row = {"rank": rank, "round": round_, "part": name, "step_s": step_s, "num_bytes": num_bytes}
                rows += [row] if round_ >= 0 else []
        saves.close()
    finally:
        os.close(fd)
    return rows


def main() -> None:
    """Join the world of two, measure, let rank 0 write the rows."""
    rank, folder, options = int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder.resolve() / 'store'}", rank=rank, world_size=RANKS,
        timeout=timedelta(seconds=120),
    )  # fmt: skip
    found: list[Any] = [None] * RANKS
    dist.all_gather_object(found, measure(rank, options["rounds"], folder))
    if rank == 0:
        lines = (json.dumps(row) + "\n" for rows in found for row in rows)
        (folder / "rows.jsonl").write_text("".join(lines))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
