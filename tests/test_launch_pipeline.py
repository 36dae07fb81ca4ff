"""Whole jobs under torchrun through a pipeline; the one-process job is the oracle."""

import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from transformers import AutoModelForCausalLM

from checkpointing import Checkpointer, KeepLast
from chunkflow import SINGLE, ChunkLoader, ChunkRunner, MemorySource
from chunkflow.reference import float64_throughout
from launch import TrainState
from launch.board import Board
from launch.config import FinetuneConfig, OptimizerConfig
from launch.data import load_data
from launch.env import World
from launch.errors import ConfigError, WorldError
from launch.files import RunFolder
from launch.finetune import finish
from launch.gather import gather_weights
from launch.job import assemble, build, prepare, share_model
from launch.mesh import limit_waits, make_mesh
from launch.metrics import read_metrics
from launch.optimizer import build_optimizer
from launch.pipeline_job import check_whole_samples, find_place, take_place
from launch.pipeline_parts import cut
from launch.pipeline_runner import PipelineRunner
from launch.recipe import read_config
from pipeline.config import PipelineConfig
from pipeline.errors import WatchdogError
from pipeline.transport import GroupTransport
from tests.launch_jobs import kill_job, run_job, settings, start, wait_for_step, workers, write_corpus
from tests.spawn import ROOT, run_ranks
from tests.tiny import sequence, tiny_model

pytestmark = pytest.mark.timeout(240)
SOURCE = MemorySource([sequence(n, 10 + 7 * n) for n in range(20)])
ONE = {"run__steps": 6, "checkpoint__every": 3}
TWO = {**ONE, "pipeline__ranks": 2, "pipeline__timeout_s": 30}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    write_corpus(folder / "corpus", files=24)
    return folder


def run(place, name, **changes):
    code, output = run_job(settings(place / "corpus", place / name, **changes), place / f"{name}.log")
    assert code == 0, output
    return read_metrics(place / name / "metrics.jsonl"), output


@pytest.fixture(scope="module")
def data_parallel(place):
    return run(place, "whole", **ONE)


@pytest.fixture(scope="module")
def pipelined(place):
    return run(place, "pipeline", **TWO)


def assert_same_curve(ours, theirs, tolerance=1e-5):
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for key in ("loss", "grad_norm", "eval_loss"):
            assert (key in a) == (key in b)
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=tolerance), (key, a["step"])
        assert a.get("tokens") == b.get("tokens")


def test_a_pipeline_trains_as_one_process_does(data_parallel, pipelined, place):
    """fp32: sums in another order, and six steps of Adam on them."""
    lines, output = pipelined
    assert_same_curve(lines, data_parallel[0])
    assert "pipeline state_aware_1f1b of 2 ranks and 2 stages, which hold the layers 0-" in output
    assert "LlamaForCausalLM of" in output
    ours, theirs = (AutoModelForCausalLM.from_pretrained(place / name / "model") for name in ("pipeline", "whole"))
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=2e-3, msg=name)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


def rank_trains(info, folder, ranks, until):
    """Resume from `folder`, train to step `until` in fp64 and save; losses, and the state as it is then."""
    model = tiny_model("llama", num_hidden_layers=4, tie_word_embeddings=True)
    loader = ChunkLoader(SOURCE, chunk_tokens=32, global_batch=3, rank=0, world_size=1)
    if ranks == 1:
        world, runner, whole, held = SINGLE, ChunkRunner(model, group=SINGLE), None, model
    else:
        world, config = dist.group.WORLD, PipelineConfig(ranks=ranks, timeout_s=30)
        parts = cut(model, config, rank=info.rank)
        runner = PipelineRunner(parts, config, GroupTransport(world), retain=1, group=world, data_group=None)
        whole, held = parts.whole, parts.model
    optimizer = build_optimizer(held, OptimizerConfig(), whole=whole)
    state = TrainState(held, optimizer, loader, whole=whole, rank=info.rank, world_size=ranks)
    losses = []
    with Checkpointer(folder, keep=KeepLast(3), group=world) as checkpoints, float64_throughout(), loader:
        checkpoints.restore(state)
        steps = iter(loader)
        while state.step < until:
            losses.append(float(runner.forward_backward(next(steps))))
            optimizer.step()
            optimizer.zero_grad()
            state.step += 1
        checkpoints.save(state.step, state).wait(timeout_s=60)
    return losses, {name: x for name, x in state.state_dict().items() if isinstance(x, torch.Tensor)}


@pytest.mark.parametrize("legs", [(1, 2, 1), (4, 2)])
def test_what_one_cut_saves_another_resumes(tmp_path, legs):
    """Two steps on each; names, losses and weights are those of one process throughout."""
    expected, final = run_ranks(rank_trains, 1, str(tmp_path / "whole"), 1, 2 * len(legs))[0]
    losses, states = [], {}
    for leg, ranks in enumerate(legs, start=1):
        results = run_ranks(rank_trains, ranks, str(tmp_path / "parts"), ranks, 2 * leg)
        losses += results[0][0]
        states = {name: x for _, state in results for name, x in state.items()}
    assert losses == pytest.approx(expected, rel=1e-10)
    final, states = ({n: x for n, x in s.items() if not n.startswith("rng.")} for s in (final, states))
    assert states.keys() == final.keys()
    for name, tensor in final.items():
        torch.testing.assert_close(states[name], tensor, rtol=1e-7, atol=1e-9, msg=name)


def test_a_stage_that_stops_ends_the_job(place):
    """Wherever in a step it stops, and with a save in flight, the other rank says so before it ends."""
    log = place / "stopped.log"
    changes = {**TWO, "run__steps": 200, "checkpoint__every": 1, "checkpoint__timeout_s": 10, "pipeline__timeout_s": 4}
    job = start(settings(place / "corpus", place / "stopped", **changes), log)
    try:
        wait_for_step(job, place / "stopped" / "metrics.jsonl", 1, log)
        os.kill(workers(job)[1], signal.SIGSTOP)
        deadline = time.monotonic() + 60
        while not (told := [line for line in log.read_text().splitlines() if line.startswith("rank 0: error: ")]):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        # In an action of the pipeline, in a sum over its ranks, or at the fence of a save: where it stopped.
        assert re.search(r"rank 0, step \d+, .*rank 1.* 4 s|save of step \d+ failed: rank 1 did not report", told[0])
    finally:
        for rank in workers(job):
            os.kill(rank, signal.SIGCONT)
        kill_job(job)


def begin(info, store, flags):
    board = Board(dist.FileStore(store, info.world_size), rank=info.rank, world_size=info.world_size, timeout_s=20)
    return World(info.rank, info.world_size, torch.device("cpu"), board), read_config(flags, prog="x", description="")


def rank_shares(info, store, flags):
    """Rank 1 leaves when its model is built; what rank 0 says of it."""
    world, config = begin(info, store, flags)
    if info.rank == 0:
        with pytest.raises(WatchdogError) as lost:
            prepare(config, world)
        return str(lost.value)
    place = take_place(config, world)
    data = world.board.rank0_first("data", lambda: load_data(config))
    world.board.together("model", lambda: build(config, world, data, place))
    return None


def rank_ends(info, store, flags):
    """Rank 1 leaves when there is nothing to train any more; what rank 0 says of it."""
    world, config = begin(info, store, flags)
    board = world.board
    place = find_place(config.pipeline, config.moe, world)
    data = board.rank0_first("data", lambda: load_data(config))
    model = build(config, world, data, place)
    share_model(model, config, place)
    job = assemble(config, world, data, model, place)
    if info.rank == 1:
        return {}
    limit_waits(place.mesh, 1.0)
    with pytest.raises(WatchdogError) as evaluating:
        job.evaluate()
    job = replace(job, config=replace(config, run=replace(config.run, timeout_s=1)))
    with pytest.raises(WorldError) as silent:
        finish(job, RunFolder(Path(store)), None, Console(quiet=True), resumed_from=None)
    with pytest.raises(WatchdogError) as lost:
        job.whole_model()
    return {"evaluating": str(evaluating.value), "silent": str(silent.value), "lost": str(lost.value)}


def rank_builds_too_long(info, folder):
    """Rank 0 does not come to the end of building the model until rank 1 has given up."""
    parts = cut(tiny_model("llama", num_hidden_layers=2), PipelineConfig(ranks=2, timeout_s=5), rank=info.rank)
    given_up = Path(folder) / "given-up"

    def build():
        while not given_up.exists():
            time.sleep(0.02)
        return tiny_model("llama", num_hidden_layers=2)

    begun = time.monotonic()
    with pytest.raises(WatchdogError if info.rank else RuntimeError) as error:
        gather_weights(parts, dist.group.WORLD, build, timeout_s=5, build_timeout_s=0.3)
    given_up.touch()
    return str(error.value), time.monotonic() - begun


def test_a_rank_that_waits_for_the_first_to_build_gives_up_in_time(tmp_path):
    _, (told, seconds) = run_ranks(rank_builds_too_long, 2, str(tmp_path))
    assert told.startswith("rank 0, which puts it together, is gone, stopped, hangs, or is later than 0.3 s: see its")
    assert seconds < 3


@pytest.mark.parametrize("schedule", ["1f1b", "roundpipe"])
def test_a_rank_that_is_lost_before_the_first_step_is_told(place, schedule):
    flags = settings(
        place / "corpus", place / "unused", pipeline__schedule=schedule, pipeline__ranks=2, pipeline__timeout_s=1
    )
    told, _ = run_ranks(rank_shares, 2, str(place / f"shares-{schedule}"), flags)
    assert told.startswith("rank 0, step 0, sharing the weights: rank 1 is gone, stopped, hangs")


@pytest.mark.parametrize("schedule", ["1f1b", "roundpipe"])
def test_a_rank_that_is_lost_behind_the_last_step_is_told(place, schedule):
    flags = settings(
        place / "corpus", place / "unused", pipeline__schedule=schedule, pipeline__ranks=2, pipeline__timeout_s=1,
        chunks__chunk_tokens=128, data__long_files=[], data__max_file_bytes=120,
    )  # fmt: skip
    told, _ = run_ranks(rank_ends, 2, str(place / f"store-{schedule}"), flags)
    assert told["silent"].startswith("rank 1 did not answer about 'peak memory' within 1 s")
    assert told["lost"].startswith("rank 0, step 0, gathering the model: rank 1 is gone, stopped, hangs")
    assert re.match(r"rank 0, step 0, evaluating: rank 0, .* rank 1\b", told["evaluating"])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--pipeline.stages", "3"], "pipeline.stages is 3; it must be a multiple of pipeline.ranks, 2"),
        (["--pipeline.schedule", "zb_h1", "--pipeline.stages", "4"], "zb_h1 on 2 ranks has 2; leave it out"),
        (["--pipeline.ranks", "0"], "pipeline.ranks is 0; it must be at least 1"),
        (["--pipeline.timeout_s", "0"], "pipeline.timeout_s is 0.0; it must be more than 0"),
        (["--pipeline.schedule", "2f2b"], "2f2b"),
    ],
)
def test_bad_settings_are_told_by_their_names(flags, expected):
    with pytest.raises(ConfigError, match=expected):
        read_config(["--pipeline.ranks", "2", *flags], prog="x", description="")


def test_samples_that_do_not_fit_a_schedule_are_told():
    config = FinetuneConfig(pipeline=PipelineConfig(ranks=2, schedule="1f1b"))
    check_whole_samples(config, 512)
    with pytest.raises(ConfigError, match=r"1f1b needs every sample within one chunk, and the longest has 513 tokens"):
        check_whole_samples(config, 513)
    check_whole_samples(FinetuneConfig(pipeline=PipelineConfig(ranks=2)), 513)


def test_processes_that_make_no_pipelines_are_told():
    with pytest.raises(ConfigError, match=r"2 processes do not make pipelines of pipeline\.ranks = 3"):
        make_mesh("cpu", 2, pp=3)


def test_the_recipe_reads():
    config = read_config(["--config", str(ROOT / "recipes" / "pipeline_1f1b.yaml")], prog="x", description="")
    assert (config.pipeline.schedule, config.pipeline.ranks, config.pipeline.num_stages) == ("state_aware_1f1b", 2, 2)
