"""What users get wrong: one clear error on every rank, no hang, nothing overwritten."""

import errno
import fcntl
import json
import os
import shutil
from types import SimpleNamespace
from uuid import uuid4

import pytest
import torch
import torch.distributed as dist

from launch.board import Board
from launch.claim import claimed
from launch.env import Processes, World, joined
from launch.errors import KNOWN_ERRORS, FolderError, LaunchError, TrainingError, report_error
from launch.files import RunFolder
from launch.finetune import run
from launch.stop import StopSignals
from tests.launch_jobs import settings, snapshot, write_corpus
from tests.spawn import run_ranks

TIMEOUT_S = 60


def attempt(info, store, flags):
    """Run the job in a world that exists already; return its error, None when it went well."""
    board = Board(dist.FileStore(store, info.world_size), rank=info.rank, world_size=info.world_size, timeout_s=20)
    world = World(info.rank, info.world_size, torch.device("cpu"), board)
    try:
        run(flags[info.rank], world, StopSignals())
    except KNOWN_ERRORS as error:
        return f"{error}"
    return None


def errors_of(tmp_path, flags, other=None):
    store = tmp_path / f"store-{uuid4().hex}"  # a FileStore must not find an earlier one's file
    return run_ranks(attempt, 2, str(store), [flags, other or flags], timeout_s=TIMEOUT_S)


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus", files=9)


def jsonl(tmp_path, *lines):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return {"data__kind": "jsonl", "data__path": path, "data__held_out": 0, "data__long_files": []}


def refused(tmp_path, flags, *words, other=None):
    """Both ranks must give an error with these words, twice in a row, and leave the run's folder as it was."""
    before = snapshot(tmp_path / "run")
    first, second = errors_of(tmp_path, flags, other)
    for error in (first, second):
        assert error is not None
        for word in words:
            assert word in error
    assert snapshot(tmp_path / "run") == before
    return first, second


GOOD = [{"text": f"value = {n}"} for n in range(6)]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([*GOOD, '{"text": "cut of\n'], ("data.jsonl", "7", "not JSON")),
        ([*GOOD[:2], {"txt": "x"}, *GOOD], ("data.jsonl", "3", "'text'", "field")),
        ([*GOOD, {"text": 5}], ("data.jsonl", "7", "must be a string")),
        ([*GOOD, [1]], ("data.jsonl", "7", "must be one JSON object")),
        ([], ("data.jsonl",)),
        (["\n", "\n"], ("data.jsonl",)),
        ([{"input_ids": [1, 2, 999]}], ("token id 999", "vocabulary of 300")),
        ([{"input_ids": [1, -2, 3]}], ("-2",)),
    ],
)
def test_bad_lines(tmp_path, corpus, lines, words):
    flags = settings(corpus, tmp_path / "run", **jsonl(tmp_path, *lines))
    first, second = refused(tmp_path, flags, *words)
    assert first == second
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"chunks__chunk_tokens": 0}, ("chunk_tokens is 0; it must be at least 1",)),
        ({"data__path": "/nowhere"}, ("/nowhere",)),
        ({"data__long_files": ["nope.py"]}, ("nope.py",)),
        ({"data__pattern": "*.md", "data__long_files": []}, ("no file of", "*.md")),
        ({"data__held_out": 100}, ("data.held_out is 100", "10 samples")),
        ({"model__path": "/nowhere"}, ("model.path '/nowhere'",)),
        ({"model__hidden_size": 1 << 40}, ("the model does not fit into the memory that is here",)),
        ({"model__hidden_size": 1 << 62}, ("the model does not fit into the memory that is here",)),
        ({"moe__num_experts": 1 << 62}, ("the model does not fit into the memory that is here",)),
        ({"lora__rank": 1 << 62}, ("the model does not fit into the memory that is here",)),
    ],
)
def test_bad_settings(tmp_path, corpus, changes, words):
    refused(tmp_path, settings(corpus, tmp_path / "run", **changes), *words)
    assert not (tmp_path / "run").exists()


def test_ranks_with_different_settings(tmp_path, corpus):
    flags = settings(corpus, tmp_path / "run", optimizer__lr=0.01)
    words = ("ranks 0 and 1", "optimizer.lr is 0.01 and 0.5")
    first, second = refused(tmp_path, flags, *words, other=[*flags, "--optimizer.lr", "0.5"])
    assert first == second
    refused(tmp_path, flags, "chunk_tokens is 0", other=settings(corpus, tmp_path / "run", chunks__chunk_tokens=0))


def test_a_checkpoint_of_something_else_is_refused_and_stays(tmp_path, corpus):
    def flags(**changes):
        return settings(corpus, tmp_path / "run", run__steps=2, **changes)

    assert errors_of(tmp_path, flags()) == [None, None]
    assert (tmp_path / "run" / "summary.json").exists()
    words = (
        "model.hidden_size was 32 and is 64; restore failed",
        "another model",
        "model.",
        "was [",
        "--fresh true",
    )
    refused(tmp_path, flags(model__hidden_size=64, run__log_every=7), *words)
    refused(tmp_path, flags(model__num_layers=3), "another model", "layers.2", "is not in it")
    refused(tmp_path, flags(chunks__global_batch=5), "global_batch was 4 and is 5")
    (corpus / "file00.py").write_text("changed = True\n" * 3)
    refused(tmp_path, flags(), "data.files was")


@pytest.mark.parametrize("name", ["run", "link"])
def test_a_folder_in_use_is_refused(tmp_path, corpus, name):
    """By whatever name."""
    (tmp_path / "link").symlink_to("run")
    with (tmp_path / "run.lock").open("w") as lock:
        lock.write("process 12 on host\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(tmp_path, settings(corpus, tmp_path / name, fresh=True), "another job (process 12 on host)")
    assert not (tmp_path / "run").exists()


def start_over(info, flags):
    """A start by torchrun that ends before it has the folder, and three that get further."""
    dist.destroy_process_group()
    for restarts in range(4):
        place = Processes(rank=0, world_size=1, restarts=restarts, launched=True, keeps_store=True)
        with joined(place, timeout_s=20) as world:
            if restarts:
                run(flags, world, StopSignals(), restarts=restarts)


def test_fresh_starts_over_once_whichever_start_of_the_ranks_gets_there(tmp_path, corpus):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").write_text("")
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    env = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    run_ranks(start_over, 1, settings(corpus, tmp_path / "run", fresh=True, run__steps=1), env=env)
    assert (tmp_path / "run.old-1" / "old").exists()
    assert (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run.old-2").exists()


def test_a_folder_that_cannot_be_is_refused(tmp_path, corpus):
    (tmp_path / "file").write_text("")
    words = (f"run.folder {tmp_path / 'file' / 'run'} cannot be written", "File exists")
    refused(tmp_path, settings(corpus, tmp_path / "file" / "run"), *words)
    refused(tmp_path, settings(corpus, tmp_path / "file"), f"run.folder {tmp_path / 'file'} is a file; give a folder")
    assert not (tmp_path / "file.lock").exists()


def test_what_the_system_refuses_while_writing_names_the_folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    words = r"run.folder .*run cannot be written: .*No space"
    with joined(Processes()) as world, pytest.raises(FolderError, match=words), claimed(folder, world, fresh=False):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_run_that_went_on_and_could_not_write_its_end_is_finished_again(tmp_path, corpus):
    """Every rank hears why, and the summary, by which a run is finished, stays that of the step before."""
    run = tmp_path / "run"
    assert errors_of(tmp_path, settings(corpus, run, run__steps=1)) == [None, None]
    first, flags = (run / "summary.json").read_text(), settings(corpus, run, run__steps=2)
    (run / "report.html.tmp").mkdir()
    for error in errors_of(tmp_path, flags):
        assert "the report cannot be written to" in error
    model = snapshot(run / "model")
    (run / "report.html.tmp").rmdir()
    (run / "model.tmp").write_text("in the way")
    for error in errors_of(tmp_path, flags):
        assert "File exists" in error
    assert (run / "summary.json").read_text() == first
    (run / "model.tmp").unlink()
    shutil.rmtree(run / "model")
    assert errors_of(tmp_path, flags) == [None, None]
    assert json.loads((run / "summary.json").read_text())["steps"] == 2
    assert "<td>steps</td><td>2</td>" in (run / "report.html").read_text()
    assert snapshot(run / "model") == model


def test_errors_are_printed_as_one_line(capsys):
    assert report_error(1, LaunchError("no data")) == 2
    assert report_error(0, TrainingError("nan")) == 1
    assert capsys.readouterr().err == "rank 1: error: no data\nrank 0: error: nan\n"


def test_lines_of_ranks_that_share_a_terminal_stay_whole(monkeypatch):
    """Each is one write, its newline included: torchrun runs its ranks unbuffered."""
    writes = []
    monkeypatch.setattr("sys.stderr", SimpleNamespace(write=writes.append, flush=lambda: None))
    report_error(1, LaunchError("no data"))
    assert writes == ["rank 1: error: no data\n"]
