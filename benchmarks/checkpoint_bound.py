"""What the parts of a save take from training that computes on every core without a pause: its floor on such a machine.

    python -m benchmarks.checkpoint_bound [--gb N] [--rounds N] [--json FILE]

Two ranks of one thread multiply matrices; beside each, a plain thread does one part of what a save has to do with N GB
(default: 0.8, half the state of SmolLM2-135M with AdamW): copy it into buffers, hash it, write buffers past the page
cache, all three, or hash and write memory where it lies, without a copy. Nothing of this library is in it. Parts take
turns, round by round; what is lost is the work that a window has less than the window without a part beside it.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing as mp
import os
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import median
from typing import Any

import torch
import xxhash

from benchmarks.checkpoint_raw import PART_BYTES, warm_buffers
from benchmarks.claims import write_report

WINDOW_S = 2.0
DEADLINE_S = 120.0
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


def run_rank(rank: int, gb: float, rounds: int, folder: str, barrier: Barrier, rows: Any) -> None:
    """Measure one rank's side of every round."""
    torch.set_num_threads(1)
    num_bytes = int(gb * 1e9) // PART_BYTES * PART_BYTES
    source = torch.zeros(num_bytes + SECTOR, dtype=torch.uint8, device="cpu").fill_(3)
    x, weight, wide = torch.randn(128, 576), torch.randn(576, 1536), torch.randn(128, 1536)

    def compute() -> None:  # some 5 ms: a product, and work that is bound by memory, as in a step
        torch.mm(x, weight)
        torch.nn.functional.silu(wide)

    fd = os.open(f"{folder}/{rank}", os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o666)
    os.posix_fallocate(fd, 0, num_bytes)
    for round_ in range(-1, rounds):
        for name, part in parts(source, fd).items():
            barrier.wait(DEADLINE_S)
            done = work_beside(part, num_bytes, compute)
            if round_ >= 0:
                rows.put({"rank": rank, "round": round_, "part": name, "done": done})
    os.close(fd)


def lost_ms(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return, by part, what every round lost, in milliseconds of the slower rank."""
    done = {(row["round"], row["part"], row["rank"]): row["done"] for row in rows}
    rounds = sorted({row["round"] for row in rows})
    ranks = sorted({row["rank"] for row in rows})
    return {
        part: [max(1e3 * WINDOW_S * (1 - done[r, part, k] / done[r, PARTS[0], k]) for k in ranks) for r in rounds]
        for part in PARTS[1:]
    }


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=0.8, help="of each rank (default: 0.8)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/checkpoint_bound.json"), metavar="FILE")
    given = parser.parse_args()
    barrier, queue = mp.Barrier(2), mp.Queue()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        arguments = (given.gb, given.rounds, folder, barrier, queue)
        ranks = [mp.Process(target=run_rank, args=(rank, *arguments), daemon=True) for rank in range(2)]
        for rank in ranks:
            rank.start()
        rows = [queue.get(timeout=DEADLINE_S) for _ in range(2 * given.rounds * len(PARTS))]
        for rank in ranks:
            rank.join(DEADLINE_S)
    print(f"| part, {given.gb:g} GB beside each of 2 computing ranks | lost, ms | least to most |\n|---|---|---|")
    for part, lost in lost_ms(rows).items():
        print(f"| {part} | {median(lost):.0f} | {min(lost):.0f} to {max(lost):.0f} |")
    write_report(given.json, rows=rows, claims=[])


if __name__ == "__main__":
    main()
