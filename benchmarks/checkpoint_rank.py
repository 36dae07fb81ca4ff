"""One rank of `benchmarks.checkpoint`: run one part's rounds, and let rank 0 write a row for each.

python -m benchmarks.checkpoint_rank RANK FOLDER OPTIONS        (started by benchmarks.checkpoint)
"""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import checkpoint_state as states
from benchmarks.checkpoint_parts import PARTS
from benchmarks.checkpoint_raw import machine_user_s, own_user_s
from benchmarks.checkpoint_state import Work
from benchmarks.checkpoint_way import Way
from benchmarks.checkpoint_ways import open_way


class Bench:
    """What the parts share."""

    def __init__(self, rank: int, folder: Path, options: dict[str, Any]) -> None:
        self.rank, self.world, self.folder, self.options = rank, dist.get_world_size(), folder, options
        self.quick: bool = options["quick"]
        self.names: list[str] = options["ways"]
        self.began, self.step = time.monotonic(), 0
        self._longest, self._round_at = 0.0, 0.0
        self._marked = (0.0, 0.0, 0.0)
        self.work = self._make_work()
        self.ways: dict[str, Way] = {}

    def _make_work(self) -> Work:
        name = self.options["state"]
        if name == "smollm":
            return states.smollm(self.rank, self.world, tokens=self.options["tokens"])
        if name == "small":
            return states.small(self.rank, self.world, count=2000 if self.quick else 20_000)
        return states.synthetic(self.rank, self.world, total_bytes=int(float(name) * 1e9))

    def open(self, name: str, **settings: Any) -> Way:
        """Open a way, once."""
        if name not in self.ways:
            self.ways[name] = open_way(name, self.work, self.folder / name.replace(" ", "-"), **settings)
        return self.ways[name]

    def close(self) -> None:
        """Close every way."""
        for way in self.ways.values():
            way.close()
        self.ways.clear()

    def rounds(self) -> Iterator[int]:
        """Yield the numbers of rounds, until there were enough or one more would not end in time."""
        for number in range(self.options["rounds"]):
            now = time.monotonic()
            if number:
                self._longest = max(self._longest, now - self._round_at)
            self._round_at = now
            go = torch.tensor([now - self.began + self._longest < self.options["seconds"]], dtype=torch.int64)
            dist.broadcast(go, 0)
            if not go.item():
                return
            yield number

    def turns(self, number: int, names: list[str]) -> list[str]:
        """Return the names in the order of this round: each is first as often as the others."""
        at = number % len(names)
        return names[at:] + names[:at]

    def place(self, name: str) -> Path:
        """Return the folder of a new save."""
        self.step += 1
        root = self.folder / name.replace(" ", "-")
        root.mkdir(exist_ok=True)
        return root / (f"step-{self.step}" if name == "ours" else f"{self.step}")

    @contextmanager
    def kept(self, folder: Path) -> Iterator[None]:
        """Remove a folder afterwards, and let the disk come to rest."""
        try:
            yield
        finally:
            self.barrier()
            if self.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
                os.sync()
            gc.collect()
            self.barrier()

    def mark(self) -> None:
        """Begin to watch what other processes do: the next rows tell."""
        self.barrier()
        self._marked = (time.perf_counter(), machine_user_s(), own_user_s())

    def _others(self) -> dict[str, float]:
        began, machine, own = self._marked
        spent = self.total(own=own_user_s() - own)["own"]
        return {"span_s": time.perf_counter() - began, "others_s": max(0.0, machine_user_s() - machine - spent)}

    def barrier(self) -> None:
        """Wait for the other rank."""
        dist.barrier()

    def slowest(self, **values: float) -> dict[str, float]:
        """Return the largest of all ranks."""
        return self._reduced(dist.ReduceOp.MAX, values)

    def total(self, **values: float) -> dict[str, float]:
        """Return the sums over all ranks."""
        return self._reduced(dist.ReduceOp.SUM, values)

    def _reduced(self, how: Any, values: dict[str, float]) -> dict[str, float]:
        found = torch.tensor(list(values.values()), dtype=torch.float64)
        dist.all_reduce(found, how)
        return dict(zip(values, found.tolist(), strict=True))

    def row(self, **fields: Any) -> None:
        """Write a row; every rank must call. It tells how much CPU time others took since the mark."""
        others = self._others()
        if self.rank == 0:
            row = {"part": self.options["part"], "state": self.work.title, **fields, **others}
            with (self.folder / "rows.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            if self.options["verbose"]:
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in fields.items()}, flush=True)


def main() -> None:
    """Join the world of two, and run a part."""
    rank, folder, options = int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=180)
    )
    bench = Bench(rank, folder, options)
    PARTS[options["part"]](bench)
    bench.close()
    bench.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
