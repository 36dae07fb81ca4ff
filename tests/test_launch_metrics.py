import json
import os
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.console import Output, Recorder, describe
from launch.errors import TrainingError
from launch.files import RunFolder, replace_folder, write_lines
from launch.finite import require_finite, require_finite_evaluation
from launch.metrics import MetricsLog, StepMetrics, read_metrics
from launch.summary import peak_resident_bytes, summarize, summed_up


def test_output_that_nobody_reads_any_more_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as stream:
        output = Output(stream)
        console = Console(file=output)
        console.print("no one")
        assert output.write("lost\n") == 5
        output.flush()
        assert os.readlink(f"/proc/self/fd/{writer}") == os.devnull
    with pytest.raises(OSError, match="No space left"), open("/dev/full", "w", buffering=1) as stream:
        Output(stream).write("a line\n")


def step(number, **values):
    settings = {"loss": 8.0 / number, "lr": 0.1, "grad_norm": 1.5, "tokens": 100, "seconds": 0.5, "fill": 0.8}
    return StepMetrics(
        step=number, supervised_tokens=90.0, split_tokens=40, longest=30 + number, **{**settings, **values}
    )


def written(path, numbers, after_step=None):
    with MetricsLog(path, after_step=after_step) as log:
        for number in numbers:
            log.write(step(number))
        log.sync()
        return log.missing


def test_lines_carry_exact_numbers(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, after_step=None) as log:
        log.write(StepMetrics(step=0, eval_loss=8.5))
        log.write(step(1, loss=0.1 + 0.2))
    first, second = read_metrics(path)
    assert first == {"step": 0, "eval_loss": 8.5}
    assert second["loss"] == 0.1 + 0.2
    assert second["tokens_per_s"] == 200
    assert "eval_loss" not in second


def test_a_resumed_run_takes_back_the_steps_it_repeats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written(path, [1, 2, 3, 4, 5])
    assert written(path, [4], after_step=3) == 0
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]
    assert written(path, [], after_step=None) == 0
    assert path.read_text() == ""


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written(path, [1, 2, 3])
    path.write_text(path.read_text()[:-20])
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    assert written(path, [4], after_step=3) == 1
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 4]


def test_a_damaged_line_and_all_behind_it_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written(path, [1, 2, 3])
    first, second, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b"\xff" + second + third)
    assert [line["step"] for line in read_metrics(path)] == [1]


def test_a_summary_is_of_the_steps_it_names(tmp_path):
    path = tmp_path / "summary.json"
    assert not summed_up(path, 4)
    for text, found in (('{"steps": 4}', True), ('{"steps": 3}', False), ('{"st', False), ("[]", False)):
        path.write_text(text)
        assert summed_up(path, 4) == found


def test_replacing_a_file_or_a_folder_leaves_no_rest(tmp_path):
    write_lines(tmp_path / "a" / "file", ["one"])
    write_lines(tmp_path / "a" / "file", ["two", "three"])
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["file"]
    assert (tmp_path / "a" / "file").read_text() == "two\nthree\n"
    for text in ("old", "new"):
        replace_folder(tmp_path / "b", lambda folder, text=text: (folder / text).write_text(text))
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["new"]
    replace_folder(tmp_path / "b", lambda folder: save_file({"a": torch.ones(1)}, str(folder / "new.safetensors")))
    assert (tmp_path / "b/new.safetensors").stat().st_mode == (tmp_path / "a/file").stat().st_mode
    replace_folder(tmp_path / "b", lambda folder: (folder / "new").touch())
    with pytest.raises(RuntimeError):
        replace_folder(tmp_path / "b", lambda folder: (_ for _ in ()).throw(RuntimeError))
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["new"]


def test_a_run_is_moved_aside_never_deleted(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert folder.move_aside() is None
    for number in (1, 2):
        folder.path.mkdir()
        (folder.path / "file").write_text(str(number))
        assert folder.move_aside() == tmp_path / f"run.old-{number}"
    assert (tmp_path / "run.old-1" / "file").read_text() == "1"


def test_the_summary_counts_every_step_once():
    lines = [json.loads(m.to_json()) for m in (step(1), step(2, tokens=300, fill=0.6, eval_loss=5.0))]
    lines = [{"step": 0, "eval_loss": 9.0}, *lines]
    places = {"checkpoint": Path("c"), "model": Path("m")}
    summary = summarize(lines, steps=2, resumed_from=None, peak_memory_bytes=7, **places)
    assert summary == {
        "loss_first": 8.0,
        "loss_last": 4.0,
        "eval_loss_first": 9.0,
        "eval_loss_last": 5.0,
        "tokens": 400,
        "tokens_per_s": 400.0,
        "fill": 400 / (100 / 0.8 + 300 / 0.6),
        "split_token_share": 0.2,
        "longest_sequence": 32,
        "peak_memory_bytes": 7,
        "steps": 2,
        "resumed_from": None,
        "checkpoint": "c",
        "model": "m",
    }
    assert summarize([], steps=0, resumed_from=1, peak_memory_bytes=7, **places)["loss_first"] is None


def test_peak_memory_is_in_bytes():
    assert 50e6 < peak_resident_bytes() < 20e9


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (1.0, float("inf"))])
def test_a_loss_that_is_no_number_ends_the_training(loss, norm):
    require_finite(3, 1.0, 0.0)
    with pytest.raises(TrainingError, match=r"step 3: the loss is .*; the last checkpoint is intact: resume with"):
        require_finite(3, loss, norm)
    assert require_finite_evaluation(3, 1.0) == 1.0
    with pytest.raises(TrainingError, match=r"step 3: the held-out loss behind it is .*, and are not saved; resume"):
        require_finite_evaluation(3, loss * norm)


def test_a_report_prints_lines_where_there_is_no_terminal_and_feeds_tensorboard(tmp_path, capsys):
    folder = RunFolder(tmp_path)
    settings = {"log_every": 2}
    with Recorder(Console(soft_wrap=True), folder, 4, after_step=None, **settings) as report:
        for number in (1, 2, 3):
            report.write(step(number, eval_loss=7.0 if number == 3 else None))
        report.sync()
    with Recorder(Console(soft_wrap=True), folder, 4, after_step=2, **settings) as report:
        report.write(step(3, loss=0.5))
        report.write(step(4))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/4", "step 2/4", "step 3/4", "step 4/4"]
    assert lines[2] == describe(step(3, eval_loss=7.0), 4)
    assert lines[2].endswith("held out 7.0000")
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 8.0), (2, 4.0), (3, 0.5), (4, 2.0)]


def test_other_ranks_record_nothing(tmp_path):
    quiet = Console(quiet=True)
    with Recorder(quiet, RunFolder(tmp_path / "run"), 4, after_step=None, log_every=1) as report:
        report.write(step(1))
        report.sync()
    assert not (tmp_path / "run").exists()
