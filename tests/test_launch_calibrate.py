"""launch.calibrate: a machine is found again from what it was predicted to do, and a real run is compared."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from chunkflow.lengths import llama3_sft
from launch.calibrate import FEWEST_STEPS, MOST_STEPS, chosen, fitted, layout_of, least_squares, main, show
from launch.config import ChunksConfig, FinetuneConfig, ModelConfig
from launch.errors import ConfigError
from launch.files import RunFolder
from launch.plan_costs import CostModel, Machine
from launch.plan_layouts import Planner
from launch.plan_records import Layout
from launch.plan_sizes import sizes_of
from launch.recipe import read_config

MACHINE = Machine(devices=2, memory_bytes=np.inf, flops=3e10, link_bytes_per_s=1e9, latency_s=1e-5, overhead_s=2e-4)


def planner(machine):
    sizes = sizes_of(FinetuneConfig(model=ModelConfig(num_layers=6)))
    model = CostModel(sizes=sizes, machine=machine, bf16=False, lora=False)
    return Planner(model, np.minimum(llama3_sft(400, seed=0), 3000), 8, 0, ("ddp", "checkpoints"))


def layout(**changes):
    same = {"pp": 1, "ep": 1, "data": 2, "engine": "ddp", "schedule": "state_aware_1f1b"}
    return Layout(**{**same, "chunk_tokens": 512, "retain": 1, **changes})


def lines_of(machine, at):
    """Metrics of a run that takes exactly what is predicted on a machine; the second rank is late."""
    found = planner(machine)
    reduce_s, lines = found.reduce_s(at, 1), []
    for number in range(1, 12):
        step = found.step(at, found.cut(number, at))
        parts = {"compute": [0.1 * step.seconds, step.seconds], "bubble": [0.0, 0.0], "exchange": [reduce_s] * 2}
        lines.append({"step": number + 1, "ranks": {**parts, "peak_bytes": [step.memory_bytes + 5e8, 1e8]}})
    return lines


@pytest.mark.parametrize("at", [layout(), layout(engine="zero3", retain=2)], ids=["ddp", "zero3"])
def test_a_machine_is_found_again(at):
    found = fitted(planner(Machine(**{**vars_of(MACHINE), "flops": 1.0})), at, lines_of(MACHINE, at))
    assert found.machine.flops == pytest.approx(MACHINE.flops, rel=1e-6)
    assert found.machine.overhead_s == pytest.approx(MACHINE.overhead_s, rel=1e-6)
    assert abs(found.errors).max() < 1e-9
    assert found.beyond_bytes == pytest.approx([5e8] * 11)


def vars_of(machine):
    return {name: getattr(machine, name) for name in Machine.__slots__}


def test_of_a_pipeline_it_is_near():
    """Its step is no sum of what computes and what starts: each is fitted as if it were."""
    at = layout(pp=2, data=1)
    found = fitted(planner(MACHINE), at, lines_of(MACHINE, at))
    assert found.machine.flops == pytest.approx(MACHINE.flops, rel=0.05)
    assert abs(found.errors).max() < 0.05


def test_neither_factor_is_below_zero():
    work, starts = np.array([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]])
    assert least_squares(np.array([work, starts]), 2 * work + 3 * starts) == pytest.approx((2, 3))
    assert least_squares(np.array([work, starts]), np.array([0.2, 1.5, 3.0])) == pytest.approx((12.2 / 14, 0))
    assert least_squares(np.array([work, starts]), np.array([1.1, 1.0, 0.9])) == pytest.approx((0, 1))


def test_a_run_that_tells_no_flops_says_so():
    lines = lines_of(Machine(**{**vars_of(MACHINE), "flops": np.inf}), layout())
    found = fitted(planner(MACHINE), layout(), lines)
    assert found.to_json()["flops"] is None or found.to_json()["flops"] > 1e16
    console = Console(record=True, width=120, file=io.StringIO())
    show(console, replace(found, machine=replace(found.machine, flops=np.inf)))
    said = console.export_text()
    assert "for launch.plan: --overhead 0.0002s" in said
    assert "--flops cannot be told" in said


def test_steps_are_taken_evenly_behind_the_first():
    lines = [{"step": 0}, *({"step": n, "ranks": {}} for n in range(1, 400))]
    taken = [line["step"] for line in chosen(lines, whole_steps=300)]
    assert (taken[0], taken[-1], len(taken)) == (2, 300, MOST_STEPS)
    assert [line["step"] for line in chosen(lines[:5], whole_steps=300)] == [2, 3, 4]


@pytest.mark.parametrize(("flags", "text"), [
    (["--pipeline.schedule=roundpipe"], "no job with pipeline.schedule roundpipe"),
    (["--pipeline.ranks=2", "--pipeline.schedule=interleaved", "--pipeline.stages=6"], "no job with 6 pipeline.stages"),
    (["--model.library=megatron"], "no job with model.library megatron"),
    (["--moe.num_experts=4", "--moe.ep=1", "--moe.esp=2"], "no job with moe.esp"),
])  # fmt: skip
def test_what_is_not_planned_is_refused(flags, text):
    with pytest.raises(ConfigError, match=text):
        layout_of(read_config(flags, prog="x", description=""), 4)


def test_a_layout_is_that_of_the_settings():
    found = layout_of(FinetuneConfig(chunks=ChunksConfig(chunk_tokens=128, retain=2), engine="zero2"), 4)
    assert found == layout(engine="zero2", data=4, chunk_tokens=128, retain=2)


def test_a_real_run_is_compared(undisturbed, capsys):
    folder = RunFolder(undisturbed[0])
    assert main([str(folder.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [step["step"] for step in found["steps"]] == list(range(2, 1 + len(found["steps"]) + 1))
    assert found["flops"] is None or found["flops"] > 0  # of so small a model, beside other work
    assert found["overhead_s"] >= 0
    assert all(step["measured_s"] > 0 < step["predicted_bytes"] < step["measured_bytes"] for step in found["steps"])
    assert main([str(folder.path)]) == 0
    flops = "" if found["flops"] is None else f"--flops {found['flops']:.3g} "
    assert f"for launch.plan: {flops}--overhead {found['overhead_s']:.3g}s" in capsys.readouterr().out


def test_what_is_no_run_is_told(tmp_path, undisturbed, capsys):
    assert main([str(tmp_path)]) == 2
    assert "has no config.json and job.json; give the folder of a run" in capsys.readouterr().err
    run = RunFolder(tmp_path / "short")
    run.path.mkdir()
    whole = RunFolder(undisturbed[0])
    for name in ("config", "facts"):
        getattr(run, name).write_bytes(getattr(whole, name).read_bytes())
    run.metrics.write_text("".join(whole.metrics.read_text().splitlines(keepends=True)[: FEWEST_STEPS + 1]))
    assert main([str(run.path)]) == 2
    assert f"has {FEWEST_STEPS - 1} steps that were timed by rank" in capsys.readouterr().err
