"""launch.chaos: what it refuses, what it finds, and many rounds of it."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from checkpointing import SINGLE, Checkpointer
from launch import chaos, chaos_runs
from launch.chaos_compare import largest_difference, require_comparable, require_same
from launch.chaos_disk import Ballast, can_mount, committed, damage, small_disk
from launch.chaos_job import ChaosError, Job
from launch.errors import ConfigError
from launch.files import RunFolder
from tests.flat_states import Flat
from tests.launch_jobs import settings
from tests.spawn import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks are found and limited by what only Linux has")


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--kind", "kill,flood"], "--kind has flood; choose from kill, stop, full-disk, corrupt, shrink"),
        (["--rounds", "0"], "--rounds is 0; it must be at least 1"),
        (["--ranks", "1"], "--ranks is 1: a stopped rank is found by another one"),
        (["--chunks.chunk_tokens", "0"], "chunk_tokens is 0; it must be at least 1"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--reference", "/nowhere"], "/nowhere is no finished run"),
        (["--tolerance", "nan"], "--tolerance is nan; it must be at least 0"),
        (["--patience-s", "inf"], "--patience-s is inf; it must be at least 1, and at most 1e+08"),
        (["--work", "/proc/nowhere"], "--work /proc/nowhere cannot be used: "),
        (["--moe.plan", "measure", "--moe.ep", "2"], "moe.plan is measure, by which a resumed run is the undisturbed"),
        (["--work", "tests"], "tests is not empty; give a new folder, or none"),
    ],
)
def test_bad_input(flags, text, capsys, tmp_path):
    code = chaos.main(["--work", str(tmp_path / "work"), *flags])
    assert code == 2
    assert text in capsys.readouterr().err


def test_bad_input_leaves_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert chaos.main(["--rounds", "0"]) == 2
    assert list(tmp_path.iterdir()) == []


def run_folder(path, losses=(2.0, 1.0), weights=b"weights", **settings):
    run = RunFolder(path)
    run.model.mkdir(parents=True)
    lines = [{"step": n, "loss": loss, "tokens": 10 * n, "seconds": 0.1 * n} for n, loss in enumerate(losses, start=1)]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.config.write_text(json.dumps({"run": {"folder": str(path), "seed": 0}, **settings}))
    run.summary.write_text("{}")
    run.facts.write_text(json.dumps({"world_size": 2}))
    (run.model / "model.safetensors").write_bytes(weights)
    return run


def test_a_run_that_differs_is_told_by_step_and_name(tmp_path):
    whole = run_folder(tmp_path / "whole")
    require_same(run_folder(tmp_path / "same"), whole)
    for name, changes, text in (
        ("loss", {"losses": (2.0, 1.0000001)}, "step 2 differs from .* in loss"),
        ("short", {"losses": (2.0,)}, "has 1 lines of metrics, and .* has 2"),
        ("weights", {"weights": b"other"}, "model.safetensors; another model than"),
    ):
        with pytest.raises(ChaosError, match=text):
            require_same(run_folder(tmp_path / name, **changes), whole)


def test_fewer_ranks_may_round_otherwise_and_no_more(tmp_path):
    whole = run_folder(tmp_path / "whole")
    assert largest_difference(run_folder(tmp_path / "near", losses=(2.0, 1.001)), whole) == pytest.approx(1e-3)
    other = run_folder(tmp_path / "other")
    other.metrics.write_text(whole.metrics.read_text().replace('"tokens": 20', '"tokens": 21'))
    with pytest.raises(ChaosError, match="step 2 has another tokens"):
        largest_difference(other, whole)


def test_a_reference_of_another_job_is_refused(tmp_path):
    whole = run_folder(tmp_path / "whole")
    require_comparable(whole, {"run.seed": 0, "run.folder": "elsewhere", "checkpoint.every": 5}, 2)
    with pytest.raises(ConfigError, match=r"run with run.seed = 0, and this is 1"):
        require_comparable(whole, {"run.seed": 1}, 2)
    with pytest.raises(ConfigError, match="run on 2 ranks, and these are 3"):
        require_comparable(whole, {}, 3)


@pytest.mark.parametrize("seed", range(12))
def test_every_damage_is_found_on_load(tmp_path, seed):
    with Checkpointer(tmp_path / "run", group=SINGLE) as ckpt:
        for step in (1, 2):
            ckpt.save(step, Flat({"weight": torch.full((5000,), step), "step": step})).wait()
    newest = committed(tmp_path / "run")[-1]
    assert newest.name == "step-2"
    said = damage(newest, random.Random(seed))
    assert said.startswith("step-2/")
    with Checkpointer(tmp_path / "run", group=SINGLE) as ckpt:
        info = ckpt.restore(Flat({}))
    assert info.step == 1
    assert [Path(path).name for path, _ in info.skipped] == ["step-2"]


@pytest.mark.skipif(not can_mount(), reason="a file system in memory is mounted by root only")
def test_a_small_disk_is_full_and_has_room_again(tmp_path):
    with small_disk(tmp_path / "disk", 1 << 20):
        ballast = Ballast(tmp_path / "disk")
        ballast.fill()
        with pytest.raises(OSError) as caught:
            (tmp_path / "disk" / "file").write_bytes(b"x" * 5000)
        assert caught.value.errno == errno.ENOSPC
        ballast.release()
        (tmp_path / "disk" / "file").write_bytes(b"x" * 5000)
    assert not (tmp_path / "disk" / "file").exists()


WITHOUT_CAP_SYS_ADMIN = """
import ctypes
from launch.chaos_disk import can_mount
PR_CAPBSET_DROP, CAP_SYS_ADMIN = 24, 21
assert ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_SYS_ADMIN, 0, 0, 0) == 0
print(can_mount())
"""


@pytest.mark.skipif(not can_mount(), reason="root only can give it up")
def test_root_of_a_container_may_not_mount(tmp_path):
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", WITHOUT_CAP_SYS_ADMIN], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert found.stdout == "False\n"
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_prints_nothing_hangs(tmp_path):
    job = Job(["--help"], tmp_path / "log", ranks=1, restarts=0)
    try:
        os.kill(job.hosts[0].pid, signal.SIGSTOP)
        with pytest.raises(ChaosError, match=r"waiting for a miracle: nothing new for 0.3 s; the end of .*log"):
            job.wait_until(lambda: False, what="a miracle", timeout_s=0.3)
    finally:
        job.kill()
    assert job.ended() == signal.SIGKILL


def counts_of(capsys, place, undisturbed, *flags):
    job = settings(place / "corpus", place / "unused", run__epochs=2, checkpoint__every=1)
    code = chaos.main([*flags, "--reference", str(undisturbed[0]), "--deadline-s", "5", "--json", *job])
    said = capsys.readouterr()
    assert code == 0, said.err
    return json.loads(said.out)


@pytest.mark.parametrize("kinds", ["kill", pytest.param("kill,stop,full-disk,corrupt", marks=pytest.mark.slow)])
@pytest.mark.timeout(240)
def test_one_round_of_each_kind(place, undisturbed, capsys, kinds):
    # Without an end, torchrun would wait half a minute for the rank that is stopped.
    counts = counts_of(capsys, place, undisturbed, "--kind", kinds, "--stopped-s", "0")
    assert {kind: (found["struck"], found["recovered"]) for kind, found in counts["kinds"].items()} == dict.fromkeys(
        kinds.split(","), (1, 1)
    )
    assert counts["identical"] == counts["runs"] >= 1
    assert counts["skipped"] >= ("corrupt" in kinds)


@pytest.mark.slow
@pytest.mark.timeout(390)
@pytest.mark.parametrize("changes", [
    {"engine": "fsdp2"}, {"engine": "zero2"}, {"engine": "zero3"}, {"pipeline__ranks": 2},
    {"moe__num_experts": 2, "moe__ep": 2},
    {"pipeline__ranks": 2, "pipeline__schedule": "roundpipe", "chunks__chunk_tokens": 128, "data__long_files": [],
     "data__max_file_bytes": 120},
], ids=["fsdp2", "zero2", "zero3", "pipeline", "experts", "roundpipe"])  # fmt: skip
def test_whatever_keeps_the_model_survives(place, capsys, changes):
    """Killed and with a damaged checkpoint, to the bit, beside an undisturbed run of its own; engines and pipelines
    stopped too, whose ranks wait for each other in ways of their own."""
    # Not importorskip: what DeepSpeed prints when it is imported would stand before the JSON.
    if changes.get("engine", "").startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("the extra [deepspeed] is not installed")
    job = settings(place / "corpus", place / "unused", run__epochs=2, checkpoint__every=1, **changes)
    kinds = "kill,corrupt" if "moe__ep" in changes else "kill,stop,corrupt"
    assert chaos.main(["--kind", kinds, "--stopped-s", "0", "--deadline-s", "20", "--json", *job]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert {kind: found["recovered"] for kind, found in counts["kinds"].items()} == dict.fromkeys(kinds.split(","), 1)
    assert counts["identical"] == counts["runs"] >= 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_job_that_loses_a_host_goes_on_without_it(place, undisturbed, capsys):
    counts = counts_of(capsys, place, undisturbed, "--kind", "shrink")
    assert counts["kinds"]["shrink"]["recovered"] == 1
    assert counts["largest_difference"] < 1e-3
    assert counts["resumes"] >= 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_without_root_files_may_not_grow(place, undisturbed, capsys, monkeypatch):
    monkeypatch.setattr(chaos_runs, "can_mount", lambda: False)
    counts = counts_of(capsys, place, undisturbed, "--kind", "full-disk")
    assert counts["kinds"]["full-disk"]["recovered"] == counts["identical"] == 1


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_rounds(place, undisturbed, capsys):
    counts = counts_of(capsys, place, undisturbed, "--rounds", "10")
    assert {found["recovered"] for found in counts["kinds"].values()} == {10}
    assert counts["identical"] == counts["runs"]
