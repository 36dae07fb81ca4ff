"""The parts of the checkpoint benchmark, as each rank runs them: every function measures rounds and writes rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.checkpoint_raw import Meter, drop_caches, read_raw, sync_tree, warm_buffers, write_raw
from benchmarks.checkpoint_way import Way
from benchmarks.checkpoint_ways import Ours, open_way
from checkpointing import KeepLast, staging
from checkpointing.datafile import file_name

if TYPE_CHECKING:
    from benchmarks.checkpoint_rank import Bench

READ_THREADS = 8
WRITE_THREADS = 8


def _warm(bench: Bench, name: str, **settings: Any) -> Way:
    """Open a way, and save twice: whatever is made once, is made."""
    way = bench.open(name, **settings)
    if bench.work.optimizer is not None:
        bench.work.step(way.fence)
    for _ in range(2):
        with bench.kept(folder := bench.place(name)):
            _save(way, folder, bench.step)
    return way


def _save(way: Way, folder: Path, step: int) -> float:
    """Save; return the seconds until everything is written."""
    began = time.perf_counter()
    way.save(folder, step)
    way.fence()
    way.finish()
    return time.perf_counter() - began


def _load(way: Way, folder: Path, step: int) -> float:
    began = time.perf_counter()
    way.load(folder, step)
    return time.perf_counter() - began


def blocked(bench: Bench) -> None:
    """Windows of training steps, without a save and with one at their beginning, for each way in turn."""
    steps = bench.options["window"]
    for name in bench.names:
        _warm(bench, name)
    for number in bench.rounds():
        for name in bench.turns(number, bench.names):
            way, folder = bench.ways[name], bench.place(name)
            with bench.kept(folder):
                bench.mark()
                base_s = _train(bench, steps, lambda: None)[0]
                bench.barrier()
                began = time.perf_counter()
                way.save(folder, bench.step)
                call_s = time.perf_counter() - began
                step_s, fence_s = _train(bench, steps, way.fence)
                with_s = time.perf_counter() - began
                way.finish()
                written_s = time.perf_counter() - began
            found = bench.slowest(
                base_s=base_s, with_s=with_s, stop_s=call_s + fence_s, written_s=written_s, call_s=call_s, step_s=step_s
            )
            bench.row(
                way=name, round=number, steps=steps, **found, in_window=found["written_s"] < found["with_s"] + 0.05
            )


def _train(bench: Bench, steps: int, fence: Callable[[], None]) -> tuple[float, float]:
    """Run steps. Returns their seconds, and those in the fence among them."""
    began, fenced = time.perf_counter(), 0.0
    for _ in range(steps):
        fenced += bench.work.step(fence)
    return time.perf_counter() - began, fenced


def durable(bench: Bench) -> None:
    """Saves with nothing else going on, until everything is on the device; beside a raw writer of the same bytes."""
    names, probe = ["raw", *bench.names], _Probe()
    for name in bench.names:
        way = _warm(bench, name)
        if isinstance(way, Ours):
            probe.into(way)
    warm_buffers(WRITE_THREADS)
    for number in bench.rounds():
        for name in bench.turns(number, names):
            folder = bench.place(name)
            with bench.kept(folder):
                _durable_once(bench, name, folder, number, probe)


def _durable_once(bench: Bench, name: str, folder: Path, number: int, probe: _Probe) -> None:
    meter, way = Meter(), bench.ways.get(name)
    probe.reset()
    if way is None:
        folder.mkdir(exist_ok=True)
    bench.mark()
    with meter.running():
        began = time.perf_counter()
        if way is None:
            write_raw(folder / f"{bench.rank}", bench.work.num_bytes, WRITE_THREADS)
            call_s = written_s = time.perf_counter() - began
        else:
            way.save(folder, bench.step)
            call_s = time.perf_counter() - began
            way.fence()
            way.finish()
            written_s = time.perf_counter() - began
        bench.barrier()
        if not isinstance(way, Ours):
            sync_tree(folder)
        durable_s = time.perf_counter() - began
    on_disk = sync_tree(folder)
    found = bench.slowest(call_s=call_s, written_s=written_s, durable_s=durable_s, **probe.times())
    sums = bench.total(num_bytes=bench.work.num_bytes, cpu_s=meter.cpu_s, peak_bytes=meter.peak_bytes)
    if on_disk < sums["num_bytes"]:
        raise RuntimeError(f"{name} wrote {on_disk} bytes of {sums['num_bytes']}")
    bench.row(way=name, round=number, **found, **sums, on_disk=on_disk)


class _Probe:
    """Times two things inside our engine, from outside: the commit on rank 0, and the CPU time of hashing."""

    commit_s = hash_cpu_s = 0.0

    def into(self, way: Ours) -> None:
        """Look into an engine."""
        committer: Any = way.checkpointer._committer
        commit, hashed = committer.commit, staging._hashed

        def timed_commit(bodies: Any) -> Any:
            began = time.perf_counter()
            try:
                return commit(bodies)
            finally:
                self.commit_s += time.perf_counter() - began

        def timed_hashed(*arguments: Any) -> Any:
            began = time.thread_time()
            try:
                return hashed(*arguments)
            finally:
                self.hash_cpu_s += time.thread_time() - began

        committer.commit, staging._hashed = timed_commit, timed_hashed

    def reset(self) -> None:
        """Begin anew."""
        self.commit_s = self.hash_cpu_s = 0.0

    def times(self) -> dict[str, float]:
        """Return what was measured since."""
        return {"commit_s": self.commit_s, "hash_cpu_s": self.hash_cpu_s}


def train(bench: Bench) -> None:
    """Steps without saves, and with one before every step, in turn."""
    name, count, busy = bench.names[0], bench.options["window"], bench.options["busy"]
    settings: dict[str, Any] = {"keep": KeepLast(1), "busy": busy} if name == "ours" else {}
    way = bench.open(name, **settings)
    bench.work.step(lambda: None)
    for number in bench.rounds():
        bench.mark()
        plain = [_step(bench, lambda: None, lambda: None) for _ in range(count)]
        folders, handles, with_save = [], [], []
        began = time.perf_counter()
        for _ in range(count):
            folders.append(bench.place(name))
            with_save.append(_step(bench, partial(way.save, folders[-1], bench.step), way.fence))
            if isinstance(way, Ours):
                handles.append(way.handle)
        if not handles or not handles[-1].skipped:
            way.finish()
        late = time.perf_counter() - began - sum(one["step_s"] for one in with_save)
        skipped = sum(handle.skipped is not None for handle in handles)
        for folder in folders if name != "ours" else []:
            with bench.kept(folder):
                pass
        for kind, rows in (("without", plain), ("with", with_save)):
            for row in rows:
                bench.row(way=name, round=number, busy=busy, kind=kind, skipped=skipped, late_s=late, **row)


def _step(bench: Bench, save: Callable[[], None], fence: Callable[[], None]) -> dict[str, float]:
    bench.barrier()
    began = time.perf_counter()
    save()
    save_s = time.perf_counter() - began
    fence_s = bench.work.step(fence)
    return bench.slowest(step_s=time.perf_counter() - began, save_s=save_s, fence_s=fence_s)


def fence(bench: Bench) -> None:
    """What a fence costs that comes before the bytes are written: after each of several shares of that time."""
    budgets = {"default": {}, "whole state": {"staging_bytes": 2 * bench.work.num_bytes + 2**28}}
    for label, settings in budgets.items():
        name = f"ours {label}"
        way = bench.ways.setdefault(name, open_way("ours", bench.work, bench.folder / label.split()[0], **settings))
        assert isinstance(way, Ours)
        bench.work.step(way.fence)
        whole_s = 0.0
        for _ in range(2):  # the second counts
            with bench.kept(way.root / f"step-{bench.step + 1}"):
                bench.step += 1
                whole_s = bench.slowest(s=_save(way, Path(), bench.step))["s"]
        for number in range(bench.options["rounds"]):
            for share in (0.0, 0.25, 0.5, 0.75, 1.0):
                with bench.kept(way.root / f"step-{bench.step + 1}"):
                    bench.step += 1
                    bench.mark()
                    began = time.perf_counter()
                    way.save(Path(), bench.step)
                    time.sleep(share * whole_s)
                    fenced = time.perf_counter()
                    way.fence()
                    fence_s = time.perf_counter() - fenced
                    way.finish()
                    found = bench.slowest(fence_s=fence_s, durable_s=time.perf_counter() - began)
                bench.row(way=label, round=number, share=share, whole_s=whole_s, **found)


def small(bench: Bench) -> None:
    """Saves and loads of many small tensors: the first of a new checkpointer, and later ones."""
    names = [name for name in ("ours", "DCP", "torch.save") if name in bench.names]
    for number in bench.rounds():
        for name in bench.turns(number, names):
            way = open_way(name, bench.work, bench.folder / name)
            for call in ("first", "second", "third"):
                folder = bench.place(name)
                with bench.kept(folder):
                    bench.mark()
                    save_s = _save(way, folder, bench.step)
                    bench.barrier()
                    found = bench.slowest(save_s=save_s, load_s=_load(way, folder, bench.step))
                bench.row(way=name, round=number, call=call, **found)
            way.close()


def load(bench: Bench) -> None:
    """Loads of the whole state from a cold page cache; beside a raw reader of the files we wrote."""
    warm_buffers(READ_THREADS)
    with _saved(bench) as folders:
        names = ["raw", *bench.names]
        for number in bench.rounds():
            for name in bench.turns(number, names):
                folder, step = folders.get(name, folders["ours"])
                for cold in (True, False):
                    if cold:
                        drop_caches(folder)
                    elif name == "raw":
                        continue
                    meter = Meter()
                    bench.mark()
                    with meter.running():
                        began = time.perf_counter()
                        if name == "raw":
                            read_raw(folder / file_name(bench.rank), READ_THREADS)
                        else:
                            bench.ways[name].load(folder, step)
                        load_s = time.perf_counter() - began
                    found = bench.slowest(load_s=load_s)
                    sums = bench.total(num_bytes=bench.work.num_bytes, cpu_s=meter.cpu_s, peak_bytes=meter.peak_bytes)
                    bench.row(way=name, round=number, cold=cold, **found, **sums)


@contextmanager
def _saved(bench: Bench) -> Iterator[dict[str, tuple[Path, int]]]:
    folders: dict[str, tuple[Path, int]] = {}
    for name in bench.names:
        way: Way = bench.open(name)
        folder = bench.place(name)
        folders[name] = (folder, bench.step)
        way.save(folder, bench.step)
        way.finish()
        bench.barrier()
        sync_tree(folder)
    yield folders


PARTS: dict[str, Callable[[Bench], None]] = {
    "blocked": blocked,
    "durable": durable,
    "train": train,
    "fence": fence,
    "small": small,
    "load": load,
}
