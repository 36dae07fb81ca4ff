"""The doctor on a healthy machine, for real, and each illness made on purpose."""

import json
import os
import sys

import pytest

from launch import doctor, doctor_checks, doctor_ranks
from launch.doctor_checks import (
    Check,
    build_locks,
    disk_space,
    needed_package,
    optional_package,
    passed,
    shared_memory,
    worst,
)
from launch.doctor_ranks import self_test

pytestmark = pytest.mark.timeout(240)


def test_a_healthy_machine(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor_checks, "FREE_BYTES", 2**20)
    code = doctor.main(["--json", "--folder", str(tmp_path / "runs" / "later")])
    report = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in report["checks"]}
    for name in ("python", "torch", "transformers", "devices", "backends", "threads", "disk", "self test"):
        assert checks[name]["status"] == "ok", checks[name]
    for name in ("deepspeed", "megatron-core", "trl", "peft", "accelerate", "torchsnapshot", "flash-attn", "obstore"):
        assert name in checks
    assert "gloo" in checks["backends"]["found"]
    assert "2 ranks, all-reduce, and gradients of chunks equal to the whole within" in checks["self test"]["found"]
    assert all(check["advice"] for check in report["checks"] if check["status"] != "ok")
    failed = [check for check in report["checks"] if check["status"] == "failed"]
    assert (report["status"] == "failed", code) == (bool(failed), int(bool(failed)))


def found(checks, capsys, monkeypatch, argv):
    monkeypatch.setattr(doctor, "host_checks", lambda folder: iter(checks))
    monkeypatch.setattr(doctor, "self_test", lambda: passed("self test", "fine"))
    return doctor.main(argv), capsys.readouterr().out


def test_a_table_with_what_to_do(capsys, monkeypatch):
    ill = Check(name="disk", status="failed", found="1 GiB free", advice="make room [here]")
    note = Check(name="trl", status="note", found="not installed", advice="pip install it")
    code, text = found([ill, note], capsys, monkeypatch, [])
    assert code == 1
    for words in ("1 GiB free", "make room [here]", "not installed", "1 failed: disk"):
        assert words in text
    assert found([note], capsys, monkeypatch, [])[0] == 0
    assert "Nothing failed" in found([note], capsys, monkeypatch, [])[1]


def test_bad_input():
    with pytest.raises(SystemExit) as leaving:
        doctor.main(["--nonsense"])
    assert leaving.value.code == 2


def test_worst():
    checks = [Check(name="x", status=status, found="") for status in ("ok", "note", "failed")]
    assert [worst(checks[:count]) for count in range(4)] == ["ok", "ok", "note", "failed"]


def test_packages_that_are_missing_old_or_broken(tmp_path, monkeypatch):
    assert needed_package("torch").status == "ok"
    gone = needed_package("no-such-package-here")
    assert (gone.status, gone.found) == ("failed", "not installed")
    monkeypatch.setattr(doctor_checks, "MIN_TORCH", (99, 0))
    assert needed_package("torch").advice == "pip install 'torch>=99.0'"
    assert optional_package("no-such-package-here", "x").status == "note"
    (tmp_path / "broken_module_here.py").write_text("raise RuntimeError('its library is of another version')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    broken = optional_package("numpy", "broken_module_here")
    assert broken.status == "failed"
    assert "its library is of another version" in broken.found


def test_no_room(tmp_path):
    assert disk_space(tmp_path / "a" / "b", 1).status == "ok"
    full = disk_space(tmp_path, 2**80)
    assert full.status == "failed"
    assert "make room" in full.advice
    assert shared_memory(tmp_path, 1).status == "ok"
    assert "--shm-size" in shared_memory(tmp_path, 2**80).advice
    assert shared_memory(tmp_path / "none", 1).status == "note"
    (tmp_path / "file").write_text("")
    assert disk_space(tmp_path / "file", 1).found.endswith("file cannot be written")


def started(monkeypatch, code):
    """Let the ranks run other code."""
    monkeypatch.setattr(doctor_ranks, "_command", lambda rank, *_: [sys.executable, "-c", f"rank = {rank}; {code}"])


def test_a_lock_that_a_killed_build_left(tmp_path):
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    assert build_locks(tmp_path / "absent").status == "ok"
    lock.touch()
    assert build_locks(tmp_path).status == "ok"  # one that is building
    os.utime(lock, (0, 0))
    left = build_locks(tmp_path)
    assert (left.status, left.found.startswith(f"{lock} is ")) == ("note", True)


def test_a_rank_that_fails_is_named(monkeypatch):
    started(monkeypatch, "import sys, time; sys.exit('no route to host' if rank else time.sleep(1000))")
    check = self_test(timeout_s=60)
    assert (check.status, check.found) == ("failed", "rank 1 ended with 1: no route to host")
    assert "GLOO_SOCKET_IFNAME" in check.advice


def test_a_rank_that_hangs_is_named_and_ended(monkeypatch):
    started(monkeypatch, "import time; time.sleep(1000)")
    check = self_test(timeout_s=1)
    assert (check.status, check.found) == ("failed", "ranks [0, 1] did not end within 1 s")
