"""One rank of `benchmarks.checkpoint_bound`: it computes, and a thread does one part of a save beside it.

python -m benchmarks.checkpoint_bound_rank RANK FOLDER OPTIONS        (started by benchmarks.checkpoint_bound)
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from benchmarks.checkpoint_raw import PART_BYTES, warm_buffers

RANKS = 2
WINDOW_S = 2.0
SECTOR = 512
Part = Callable[[int, int], object]
PARTS = ("nothing", "copy", "hash", "write", "copy and hash", "copy, hash and write", "hash and write in place")


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

    return dict(zip(PARTS, (lambda i, at: None, copy, hash_, write, copied, everything, in_place), strict=True))


def work_beside(part: Part, num_bytes: int, compute: Callable[[], None]) -> int:
    """Return how often `compute` ran in a window in which a thread did `part` once for every piece."""
    thread = threading.Thread(target=lambda: [part(i, at) for i, at in enumerate(range(0, num_bytes, PART_BYTES))])
    end, count = time.perf_counter() + WINDOW_S, 0
    thread.start()
    while time.perf_counter() < end:
        compute()
        count += 1
    thread.join()
    return count


def measure(rank: int, gb: float, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Run every part in turn, round by round; return how much this rank has computed beside each."""
    num_bytes = int(gb * 1e9) // PART_BYTES * PART_BYTES
    source = torch.zeros(num_bytes + SECTOR, dtype=torch.uint8, device="cpu").fill_(3)
    x, weight, wide = torch.randn(128, 576), torch.randn(576, 1536), torch.randn(128, 1536)

    def compute() -> None:  # some 5 ms: a product, and work that is bound by memory, as in a step
        torch.mm(x, weight)
        torch.nn.functional.silu(wide)

    rows = []
    fd = os.open(folder / f"bytes-{rank}", os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o666)
    try:
        os.posix_fallocate(fd, 0, num_bytes)
        for round_ in range(-1, rounds):  # one to warm up
            for name, part in parts(source, fd).items():
                dist.barrier()
                done = work_beside(part, num_bytes, compute)
                rows += [{"rank": rank, "round": round_, "part": name, "done": done}] if round_ >= 0 else []
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
    dist.all_gather_object(found, measure(rank, options["gb"], options["rounds"], folder))
    if rank == 0:
        lines = (json.dumps(row) + "\n" for rows in found for row in rows)
        (folder / "rows.jsonl").write_text("".join(lines))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
