"""Where the time of a step goes: parts add up, and what a job writes of them."""

import json
import time

import pytest
import torch

from chunkflow.records import Chunk, Segment
from launch.files import RunFolder
from launch.metrics import StepMetrics, read_metrics
from launch.step_times import PARTS, StepTimes, over_ranks, straggler_ratio
from pipeline.actions import Action
from pipeline.tracing import read_trace
from tests.spawn import run_ranks

CHUNK = Chunk((Segment(0, 0, 10, 0),))
LATER = Chunk((Segment(0, 10, 10, 0),), group=0, index=1, count=2)


def slept(seconds):
    begun = time.perf_counter()
    time.sleep(seconds)
    return time.perf_counter() - begun


def test_parts_of_chunks_add_up_to_the_step(tmp_path):
    times, begun = StepTimes(0), time.perf_counter()
    with times.part("data"):
        time.sleep(0.01)
    with times.training(4):
        for op, chunk in (("F", CHUNK), ("F", LATER), ("B", LATER), ("B", CHUNK)):
            times.operation(op, chunk, slept(0.01))
        time.sleep(0.03)  # gradients on their way
    with times.part("update"):
        time.sleep(0.005)
    whole, found = time.perf_counter() - begun, times.take()
    assert tuple(found) == PARTS
    assert 0.085 <= sum(found.values()) <= whole
    assert found["compute"] >= 0.04
    assert found["exchange"] >= 0.03
    assert found["bubble"] == 0
    assert not any(times.take().values())
    times.write(tmp_path / "trace" / "rank-00000.jsonl", pair_cost=1.0)
    events = read_trace(tmp_path / "trace" / "rank-00000.jsonl")
    assert [(event.name, event.step, event.mb) for event in events] == [
        ("F", 4, 0),
        ("F", 4, 1),
        ("B", 4, 2),
        ("B", 4, 3),
    ]
    costs = [event.predicted_ns / events[0].predicted_ns for event in events]
    assert costs == pytest.approx([1, 165 / 65, 330 / 65, 2], rel=1e-3)  # tokens and pairs: 10 + 55, 10 + 155
    assert sum(event.predicted_ns for event in events) == pytest.approx(
        sum(event.t1_ns - event.t0_ns for event in events), rel=1e-6
    )


def test_a_pipeline_waits_between_its_actions():
    times = StepTimes(1)
    with times.training(0):
        for text in ("1F0", "1B0"):
            time.sleep(0.02)
            with times.pipeline.timed(Action.parse(text), 0):
                time.sleep(0.01)
        time.sleep(0.01)
    found = times.take()
    assert found["bubble"] >= 0.04
    assert found["compute"] >= 0.02
    assert found["exchange"] >= 0.01


def test_a_rank_without_a_chunk_waits():
    times = StepTimes(0)
    with times.training(0):
        time.sleep(0.01)
    found = times.take()
    assert found["exchange"] >= 0.01
    assert found["bubble"] == found["compute"] == 0


def gathered(info):
    return over_ranks({"a": float(info.rank), "b": 10.0 + info.rank}, torch.device("cpu"))


def test_what_ranks_measure_is_by_rank():
    assert run_ranks(gathered, 2) == [{"a": (0.0, 1.0), "b": (10.0, 11.0)}] * 2
    assert straggler_ratio((1.0, 3.0)) == 1.5
    assert straggler_ratio((0.0, 0.0)) == 1.0


def test_metrics_have_means_and_the_ranks():
    ranks = {"compute": (1.0, 3.0), "data": (0.0, 1.0), "peak_bytes": (5.0, 7.0)}
    metrics = StepMetrics(step=1, loss=2.0).with_ranks(ranks).with_experts({"moe/dead": 0.0}, ("note",))
    values = metrics.values()
    assert (values["seconds.compute"], values["seconds.data"], values["straggler"]) == (2.0, 0.5, 1.5)
    assert (values["peak_bytes"], values["moe/dead"]) == (7, 0.0)
    assert "ranks" not in values
    assert json.loads(metrics.to_json())["ranks"] == {name: list(row) for name, row in ranks.items()}
    many = StepMetrics(step=1, loss=2.0).with_ranks(dict.fromkeys(ranks, (1.0,) * 65))
    assert "ranks" not in json.loads(many.to_json())
    assert StepMetrics(step=1, loss=2.0).with_ranks({**ranks, "peak_bytes": (0.0, 0.0)}).peak_bytes is None


def test_a_real_job_says_where_its_time_went(undisturbed):
    folder = RunFolder(undisturbed[0])
    lines = read_metrics(folder.metrics)[1:]
    for line in lines:
        parts = sum(line[f"seconds.{name}"] for name in PARTS if name != "checkpoint")
        assert 0 < line["seconds.compute"] < parts
        assert line["straggler"] >= 1
        assert set(line["ranks"]) == {*PARTS, "peak_bytes"}
        assert all(len(row) == 2 for row in line["ranks"].values())
    assert any(line["seconds.checkpoint"] > 0 for line in lines)
    for rank in (0, 1):
        events = read_trace(folder.trace_of(rank))
        assert {event.step for event in events} <= {22}  # a rank may have had no chunk
        assert all(event.predicted_ns > 0 for event in events)
        assert events or rank
    html = folder.report.read_text()
    assert all(f'<section id="{name}">' in html for name in ("parts", "timeline", "straggler", "memory_ranks"))
