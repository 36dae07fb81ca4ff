"""Large plans, huge epochs, and jobs whose ranks or disks misbehave."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from chunkflow.config import PlannerConfig
from chunkflow.errors import PlanError, SourceError
from chunkflow.layout import make_layout
from chunkflow.lengths import DISTRIBUTIONS
from chunkflow.loader import ChunkLoader
from chunkflow.runner import ChunkRunner
from chunkflow.sampler import global_batch
from chunkflow.sources import Sample
from chunkflow.sources_memory import MemorySource
from tests.long_tail import long_tail
from tests.spawn import SpawnError, run_ranks
from tests.tiny import sequence, tiny_model


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_large_step_is_packed_and_assigned_whole(name):
    lengths = DISTRIBUTIONS[name](16_384, seed=1)
    layout = make_layout(np.arange(16_384), lengths, config=PlannerConfig(chunk_tokens=8192), world_size=8)
    filled = np.add.reduceat(np.append(layout.lengths[layout.packed], 0), layout.ends[:-1])
    filled[layout.ends[:-1] == layout.ends[1:]] = 0
    tails = (layout.lengths[: layout.num_groups] - 1) % 8192 + 1
    filled[: layout.num_groups] += tails
    assert filled.max() <= 8192
    assert sorted(layout.packed.tolist()) == list(range(layout.num_groups, 16_384))
    assert layout.loads.max() <= 1.001 * layout.bound
    whole = filled.sum() + 8192 * (layout.counts[: layout.num_groups] - 1).sum()
    assert whole == lengths.sum()


def test_an_epoch_of_a_billion_samples_is_never_materialised():
    """Two batches far apart, and every place of a window goes to one sample: nothing of size 10^9 exists."""
    num = 10**9
    code = (
        "import numpy as np; from chunkflow.memory import peak_resident_bytes\n"
        "from chunkflow.sampler import global_batch\n"
        f"a = [global_batch(3, 2, s, num_samples={num}, global_batch=4096) for s in (0, 1, 122_000, 244_140)]\n"
        "print(len(set(np.concatenate(a).tolist())), min(map(np.min, a)) >= 0, max(map(np.max, a)),\n"
        "      peak_resident_bytes() >> 20)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    distinct, inside, largest, mebibytes = done.stdout.split()
    assert int(distinct) == 3 * 4096 + num - 244_140 * 4096
    assert inside == "True"
    assert 0.9 * num < int(largest) < num
    assert int(mebibytes) < 400


def test_a_source_of_a_billion_samples_is_planned_without_them():
    class Endless(MemorySource):
        """Lengths and weights as one repeated value each: 10^9 samples in 8 bytes."""

        def __init__(self):
            super().__init__([sequence(0, 12)])
            self.lengths = np.broadcast_to(self.lengths[:1], 10**9)
            self.weights = np.broadcast_to(self.weights[:1], 10**9)

        def __len__(self):
            return 10**9

        def read(self, index):
            return super().read(0)

    source = Endless()
    samples = global_batch(0, 0, 99, num_samples=len(source), global_batch=64)
    layout = make_layout(samples, source.lengths[samples], config=PlannerConfig(chunk_tokens=64), world_size=2)
    assert layout.num_chunks == 13


def disagreeing_loader(rank_info):
    source = MemorySource([sequence(n, 20) for n in range(8)])
    loader = ChunkLoader(source, chunk_tokens=8 + 8 * rank_info.rank, global_batch=4, seed=7 * rank_info.rank)
    try:
        next(iter(loader))
    except PlanError as error:
        return str(error)
    return None


def test_ranks_with_other_settings_are_named_on_every_rank():
    for text in run_ranks(disagreeing_loader, 2):
        assert text == (
            "the loaders of ranks 0 and 1 differ: planner.chunk_tokens is 8 and 16, seed is 0 and 7; give every rank "
            "the same data and settings"
        )


def loader_with_a_dying_rank(rank_info):
    source = MemorySource([sequence(n, 20) for n in range(8)])
    if rank_info.rank == 1:
        os._exit(7)
    next(iter(ChunkLoader(source, chunk_tokens=8, global_batch=4)))


def test_a_rank_that_dies_before_the_first_step_hangs_nobody():
    with pytest.raises(SpawnError):
        run_ranks(loader_with_a_dying_rank, 2, fresh=True, timeout_s=60)


def runner_with_a_dying_rank(rank_info, folder):
    source = MemorySource([sequence(n, 20) for n in range(8)])
    runner, there, told = ChunkRunner(tiny_model()), Path(folder, "there"), Path(folder, "told")
    for batch in ChunkLoader(source, chunk_tokens=8, global_batch=4):
        if batch.step == 1 and rank_info.rank == 1:
            while not there.exists():
                time.sleep(0.01)
            os._exit(7)
        if batch.step == 1:
            there.touch()
        try:
            runner.forward_backward(batch)
        except RuntimeError as error:
            told.write_text("".join(error.__notes__))
            raise


def test_a_rank_that_dies_later_is_told_with_rank_and_step(tmp_path):
    with pytest.raises(SpawnError):
        run_ranks(runner_with_a_dying_rank, 2, str(tmp_path), fresh=True, timeout_s=60)
    told = (tmp_path / "told").read_text()
    assert told.startswith("rank 0 of 2, step 1: where this is a connection that was closed or timed out, another rank")


FULL = """
import sys
from chunkflow.errors import SourceError
from chunkflow.sources_jsonl import JsonLines
try:
    JsonLines(sys.argv[1], None, cache_dir=sys.argv[2])
except SourceError as error:
    print(error)
"""


@pytest.fixture
def small_disk(tmp_path):
    """A file system with no more room than 256 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system takes root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_under_the_cache(tmp_path, small_disk):
    path = tmp_path / "x.jsonl"
    path.write_text('{"input_ids": [' + ", ".join(["7"] * 2000) + "]}\n" + '{"input_ids": [1, 2]}\n' * 10)
    with path.open("a") as file:
        file.writelines('{"input_ids": [' + ", ".join(["7"] * 2000) + "]}\n" for _ in range(100))
    done = subprocess.run(
        [sys.executable, "-c", FULL, path, small_disk], capture_output=True, text=True, check=True, timeout=60
    )
    assert f"the token store cannot be written under {small_disk}" in done.stdout
    assert "make it a folder with room" in done.stdout
    assert not list(small_disk.glob("*/index.json"))
    assert not list(small_disk.glob(".*/tokens.arrow"))  # the room is given back


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"input_ids": np.array([1.5, 2.0])},
            r"sample 1: input_ids is float64 \(2,\); it must be a flat numpy array",
        ),
        ({"shift_labels": np.array([2.0, -100.0])}, "sample 1: shift_labels is float64"),
        ({"input_ids": [1, 2]}, "sample 1: input_ids is list"),
        ({"loss_weights": np.array([1, 0])}, "sample 1: loss_weights must be a numpy array of finite floats"),
        ({"loss_weights": np.array([np.nan, 0])}, "sample 1: loss_weights must be a numpy array of finite floats"),
        ({"loss_weights": np.array([-1.0, 0])}, r"sample 1: a loss weight is -1\.0; it must be 0 or more"),
    ],
)
def test_arrays_that_would_be_cut_silently_are_refused(change, message):
    good = {"input_ids": np.array([1, 2]), "shift_labels": np.array([2, -100]), "loss_weights": np.array([1.0, 0.0])}
    with pytest.raises(SourceError, match=message):
        MemorySource([Sample(**good), Sample(**{**good, **change})])


@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("after", [1, 4])
def test_resuming_anywhere_gives_the_batches_of_the_uninterrupted_run(tmp_path, before, after):
    source = long_tail(tmp_path)
    options = {"chunk_tokens": 16, "global_batch": 5, "seed": 3, "epochs": 2, "report": lambda text: None}
    whole = [(b.step, b.samples, b.denominator) for b in ChunkLoader(source, rank=0, world_size=1, **options)]
    for stop in range(len(whole)):
        with ChunkLoader(source, rank=before - 1, world_size=before, prefetch=3, **options) as first:
            for _ in zip(range(stop), first, strict=False):
                pass
            state = first.state_dict()
        with ChunkLoader(source, rank=after - 1, world_size=after, prefetch=2, **options) as second:
            second.load_state_dict(state)
            assert [(b.step, b.samples, b.denominator) for b in second] == whole[stop:]
