"""Whole jobs under torchrun. The undisturbed run is the oracle of every disturbed one."""

import json
import math
import os
import signal

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from checkpointing import Checkpointer, cli
from launch import finetune
from launch.board import Board
from launch.chaos_compare import curve
from launch.env import World
from launch.errors import WorldError
from launch.files import RunFolder
from launch.metrics import read_metrics
from launch.stop import StopSignals
from tests.launch_jobs import kill_job, run_job, settings, snapshot, start, wait_for_step, workers
from tests.spawn import run_ranks

pytestmark = pytest.mark.timeout(240)
KEYS = {
    "loss_first", "loss_last", "tokens_per_s", "fill", "split_token_share", "longest_sequence", "peak_memory_bytes",
    "steps", "resumed_from", "checkpoint", "model",
}  # fmt: skip


def test_a_job_trains_and_sums_itself_up(undisturbed):
    run, output = undisturbed
    summary = json.loads((run / "summary.json").read_text())
    assert summary.keys() >= KEYS
    assert math.isfinite(summary["loss_last"])
    assert summary["loss_last"] < summary["loss_first"] - 0.5
    assert summary["eval_loss_last"] < summary["eval_loss_first"] - 0.5
    assert (summary["steps"], summary["resumed_from"]) == (22, None)
    assert summary["longest_sequence"] > 16 * 64
    assert 0 < summary["split_token_share"] < 1
    assert 0.4 < summary["fill"] <= 1
    assert summary["peak_memory_bytes"] > 100e6
    assert summary["checkpoint"].endswith("step-22")
    for text in ("41 samples", "4 more held out", "22 steps, chunks of 64 tokens, retain 2", "loss_last", "step 22/22"):
        assert text in output
    assert "error" not in output.lower()
    assert "Traceback" not in output


def test_its_metrics_are_one_line_a_step(undisturbed):
    run, _ = undisturbed
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(23))
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 4, 8, 12, 16, 20, 22]
    assert {"loss", "lr", "grad_norm", "tokens", "supervised_tokens", "seconds", "tokens_per_s", "fill"} <= lines[
        1
    ].keys()
    assert sum(line["tokens"] for line in lines[1:12]) == sum(line["tokens"] for line in lines[12:])


def test_its_model_loads_and_is_the_one_that_was_evaluated(undisturbed):
    run, _ = undisturbed
    summary = json.loads((run / "summary.json").read_text())
    folder = summary["model"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("value_3 = 3 * 1\nvalue_3 = 3 * 2\n", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    assert loss < summary["eval_loss_first"] - 0.5


def test_a_job_that_is_stopped_and_killed_ends_as_if_it_never_was(place, undisturbed):
    run, log = place / "broken", place / "broken.log"
    flags = settings(place / "corpus", run, run__epochs=2)
    whole, _ = undisturbed

    # Stopped politely, through one rank. No other checkpoint than the one asked for: it could be the answer.
    job = start(settings(place / "corpus", run, run__epochs=2, checkpoint__every=50), log)
    wait_for_step(job, run / "metrics.jsonl", 0, log)
    asked = CliRunner().invoke(cli.app, ["request", str(run)])  # before there is a first one
    assert asked.exit_code == 0, asked.exception
    wait_for_step(job, run / "metrics.jsonl", 4, log)
    os.kill(workers(job)[1], signal.SIGTERM)
    assert job.wait(timeout=60) == 0, log.read_text()
    assert "Asked to stop: saved after step" in log.read_text()
    assert "The same command resumes" in log.read_text()
    stopped = len(curve(RunFolder(run))) - 1
    assert 4 <= stopped < 22
    assert (run / "checkpoints" / f"step-{stopped}" / "manifest.json").exists()
    assert not (run / "checkpoints" / "request").exists()
    assert log.read_text().count(", as `checkpoint request` asked") == 1
    assert not (run / "summary.json").exists()

    job = start(flags, log)  # killed without warning, behind a checkpoint
    wait_for_step(job, run / "metrics.jsonl", stopped + 5, log)
    ranks = workers(job)
    os.kill(job.pid, signal.SIGKILL)  # torchrun alone: the ranks must not train on without it
    job.wait(timeout=10)
    assert f"Resuming after step {stopped}" in log.read_text()
    assert not (run / "summary.json").exists()

    code, output = run_job(flags, log)
    assert code == 0, output
    assert not [rank for rank in ranks if os.path.exists(f"/proc/{rank}/exe")]
    assert "Resuming after step" in output
    assert curve(RunFolder(run)) == curve(RunFolder(whole))
    summary = json.loads((run / "summary.json").read_text())
    assert stopped < summary["resumed_from"] < 22
    left, right = snapshot(run / "model"), snapshot(whole / "model")
    assert left == right


def test_a_finished_run_says_so_and_fresh_starts_over(place, undisturbed):
    run, _ = undisturbed
    before = snapshot(run)
    (run / "checkpoints" / "request").touch()  # which no step is left to meet
    code, output = run_job(settings(place / "corpus", run, run__epochs=2), place / "again.log")
    assert code == 0
    assert "This run is finished" in output
    assert "FRESH=1" in output
    assert snapshot(run) == before

    flags = settings(place / "corpus", run, run__epochs=2, run__steps=2, fresh=True, model__max_positions=1024)
    code, output = run_job(flags, place / "fresh.log")
    assert code == 0, output
    assert "1 of 41 samples have more tokens than the model's 1024 positions (max_position_embeddings)" in output
    aside = place / "whole.old-1"
    assert f"is now {aside}" in output
    assert snapshot(aside) == before
    assert [line["step"] for line in curve(RunFolder(run))] == [0, 1, 2]
    aside_curve = curve(RunFolder(aside))
    assert curve(RunFolder(run))[1]["loss"] == aside_curve[1]["loss"]
    run.rename(place / "two-steps")
    aside.rename(run)


def stop_behind_all(info, folder, flags):
    """Rank 0 stops when the checkpoints are closed, behind all that is written; what rank 1 says of it."""
    store = dist.FileStore(f"{folder}/store", info.world_size)
    board = Board(store, rank=info.rank, world_size=info.world_size, timeout_s=30)
    world, pids = World(info.rank, info.world_size, torch.device("cpu"), board), board.gather("process", os.getpid())
    close = Checkpointer.__exit__

    def close_and_stop(*args):
        close(*args)
        if info.rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)

    with pytest.MonkeyPatch.context() as patched, StopSignals() as stop:
        patched.setattr(Checkpointer, "__exit__", close_and_stop)
        os.kill(os.getpid(), signal.SIGTERM)  # one step is enough
        if info.rank == 0:
            return finetune.run(flags, world, stop)
        try:
            with pytest.raises(WorldError) as silent:
                finetune.run(flags, world, stop)
        finally:
            os.kill(pids[0], signal.SIGCONT)
    return str(silent.value)


def test_a_rank_that_stops_behind_all_that_is_written_is_named(place, tmp_path):
    flags = settings(
        place / "corpus", tmp_path / "run", data__held_out=0, chunks__global_batch=1, run__timeout_s=3,
        checkpoint__timeout_s=3,
    )  # fmt: skip
    _, told = run_ranks(stop_behind_all, 2, str(tmp_path), flags)
    assert told.startswith("rank 0 did not answer about 'leaving' within 6 s; it ended, hangs, or does something else")
    assert (tmp_path / "run" / "checkpoints" / "step-1" / "manifest.json").exists()


def test_bad_input_is_one_line_a_rank_and_exit_2(place):
    flags = settings(place / "corpus", place / "bad", chunks__chunk_tokens=0)
    job = start(flags, place / "bad.log")
    try:
        assert job.wait(timeout=60) != 0
    finally:
        kill_job(job)
    output = (place / "bad.log").read_text()
    for rank in (0, 1):
        assert output.count(f"rank {rank}: error: chunk_tokens is 0; it must be at least 1") == 1
    assert "exitcode  : 2" in output
    assert "launch/finetune.py" not in output
    assert not (place / "bad").exists()
