"""The writing threads: how many write at once, that nothing is left lying, and that nobody wakes for nothing."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest

from checkpointing.flush import FlushFile, FlushPool
from checkpointing.handle import Meter
from checkpointing.pieces import PIECE_BYTES
from checkpointing.slabs import SlabRing
from checkpointing.storage.local import LocalStorage

CALM, HURRIED = 2, 5


class Slow(LocalStorage):
    """A disk of which every write takes a while; it counts those that are under way."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.now, self.most, self.writes = seconds, 0, 0, 0
        self.guard = threading.Lock()

    def write_at(self, fd: int, data: memoryview, offset: int) -> None:
        with self.guard:
            self.now, self.writes = self.now + 1, self.writes + 1
            self.most = max(self.most, self.now)
        time.sleep(self.seconds)
        super().write_at(fd, data, offset)
        with self.guard:
            self.now -= 1


class Bench:
    """A pool, its ring, and a file."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.disk = Slow(seconds)
        self.ring = SlabRing(16 * PIECE_BYTES)
        self.pool = FlushPool(self.disk, self.ring, calm=CALM, hurried=HURRIED, max_bytes_per_s=None)
        self.fd = self.disk.create_direct(folder / "file", 0)
        self.file = FlushFile(self.fd, Meter())

    def submit(self, count: int) -> None:
        for index in range(count):
            slab = self.ring.acquire(10)
            assert slab is not None
            slab.view[:] = bytes([index % 256]) * PIECE_BYTES
            self.pool.submit(self.file, slab, PIECE_BYTES, index * PIECE_BYTES)

    def close(self) -> None:
        self.pool.close()
        self.disk.close(self.fd)
        self.ring.close()


@pytest.mark.parametrize("hurry", [False, True])
def test_no_more_write_at_once_than_may_and_no_fewer(tmp_path: Path, hurry: bool) -> None:
    bench = Bench(tmp_path, 0.02)
    if hurry:
        bench.pool.hurry(True)
    bench.submit(24)
    assert bench.file.drained(30)
    assert bench.file.error is None
    bench.close()
    assert bench.disk.most == (HURRIED if hurry else CALM)
    found = (tmp_path / "file").read_bytes()
    assert [found[i * PIECE_BYTES] for i in range(24)] == list(range(24))
    assert len(found) == 24 * PIECE_BYTES


def test_someone_who_comes_to_wait_sets_the_others_to_work(tmp_path: Path) -> None:
    bench = Bench(tmp_path, 0.05)
    bench.submit(16)
    with bench.pool.hurried():
        assert bench.file.drained(30)
    bench.close()
    assert bench.disk.most == HURRIED


def test_nothing_is_left_lying_however_hurry_comes_and_goes(tmp_path: Path) -> None:
    bench = Bench(tmp_path, 0.0)
    rng = random.Random(5)
    over = threading.Event()

    def fickle() -> None:
        while not over.is_set():
            with bench.pool.hurried():
                time.sleep(rng.random() * 0.002)
            time.sleep(rng.random() * 0.002)

    nervous = threading.Thread(target=fickle)
    nervous.start()
    try:
        for _ in range(20):
            bench.submit(rng.randrange(1, 12))
            assert bench.file.drained(30)
    finally:
        over.set()
        nervous.join()
        bench.close()


def test_a_thread_that_has_nothing_to_write_sleeps(tmp_path: Path) -> None:
    bench = Bench(tmp_path, 0.0)
    bench.submit(1)
    assert bench.file.drained(30)
    before = _wakes()
    bench.submit(100)
    assert bench.file.drained(30)
    after = _wakes()
    bench.close()
    # Each of the 100 wakes the thread that writes it, which may sleep for the disk and for a lock; it woke all five.
    idle = sorted(after[one] - before.get(one, 0) for one in after)[: HURRIED - CALM]
    assert sum(idle) < 100


def test_several_slabs_come_together_and_fewer_where_the_rest_is_held() -> None:
    ring = SlabRing(8 * PIECE_BYTES)
    slabs = ring.acquire_several(6, 0.0)
    assert len(slabs) == 6
    assert len(ring.acquire_several(6, 0.01)) == 2  # the others are held
    assert ring.acquire_several(6, 0.01) == []
    got: list[int] = []
    waiting = threading.Thread(target=lambda: got.append(len(ring.acquire_several(4, 30))))
    waiting.start()
    for slab in slabs:
        ring.release(slab)
    waiting.join(30)
    assert got == [4]


def test_one_who_wants_one_slab_is_not_kept_by_one_who_wants_several() -> None:
    ring = SlabRing(8 * PIECE_BYTES)
    slabs = ring.acquire_several(8, 0.0)
    got: list[str] = []

    def several() -> None:
        got.append(f"{len(ring.acquire_several(8, 0.5))} of 8")

    def one() -> None:
        slab = ring.acquire(30)
        assert slab is not None
        got.append("one")

    threads = [threading.Thread(target=several), threading.Thread(target=one)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    for slab in slabs[:3]:
        ring.release(slab)
    for thread in threads:
        thread.join(30)
    assert got == ["one", "2 of 8"]


def _wakes() -> dict[str, int]:
    """Return how often each writing thread has slept."""
    found = {}
    for one in threading.enumerate():
        if one.name.startswith("checkpoint-flush"):
            text = Path(f"/proc/self/task/{one.native_id}/status").read_text()
            found[one.name] = int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
    return found
