"""RoundPipe in a job: transformers models through `launch.split`, on any number of ranks, against one process."""

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from checkpointing import Checkpointer, KeepLast
from chunkflow import SINGLE, ChunkLoader, ChunkRunner, MemorySource
from chunkflow.reference import float64_throughout
from launch import TrainState
from launch.config import ChunksConfig, FinetuneConfig, OptimizerConfig
from launch.errors import ConfigError
from launch.gradnorm import clip_
from launch.lora import LoraConfig, merge_adapters, with_adapters
from launch.mesh import make_mesh
from launch.metrics import read_metrics
from launch.optimizer import build_optimizer
from launch.pipeline_job import check_microbatches, check_whole_samples
from launch.recipe import read_config
from launch.report_timeline import read_timeline
from launch.roundpipe_runner import RoundPipeRunner
from pipeline.config import PipelineConfig
from pipeline.errors import PlanError
from tests.launch_jobs import run_job, settings, write_corpus
from tests.spawn import ROOT, run_ranks
from tests.tiny import sequence, tiny_model

pytestmark = pytest.mark.timeout(240)
SOURCE = MemorySource([sequence(n, 4 + 3 * (n % 9)) for n in range(24)])
TOKENS, BATCH = 32, 6
CHUNKS = ChunksConfig(chunk_tokens=TOKENS, global_batch=BATCH)


def job_model(*, frozen=(), padding=None, lora=None):
    model = tiny_model("llama", num_hidden_layers=4, tie_word_embeddings=True, pad_token_id=padding)
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(tuple(frozen)))
    if lora is not None:
        torch.manual_seed(1)
        with_adapters(model, lora)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)  # zero, they would hide the gradient of the other half
    return model


def rank_trains(info, folder, ranks, until, options):
    """Resume from `folder`, train to step `until` in fp64, save; losses, norms and the whole state."""
    options = dict(options)
    model = job_model(**{key: options.pop(key) for key in ("frozen", "padding", "lora") if key in options})
    loader = ChunkLoader(SOURCE, chunk_tokens=TOKENS, global_batch=BATCH, rank=0, world_size=1)
    if ranks == 0:
        world, runner, whole, held = SINGLE, ChunkRunner(model, group=SINGLE), None, model
    else:
        world = dist.group.WORLD
        config = PipelineConfig(schedule="roundpipe", ranks=ranks, timeout_s=30, **options)
        with float64_throughout():
            runner = RoundPipeRunner(
                model, config, microbatches=BATCH, tokens=TOKENS, group=world, data_group=None, rank=info.rank,
                device=torch.device("cpu"),
            )  # fmt: skip
        whole, held = runner.whole, runner.model
    optimizer = build_optimizer(held, OptimizerConfig(), whole=whole)
    state = TrainState(held, optimizer, loader, whole=whole, rank=info.rank, world_size=max(1, ranks))
    losses, norms = [], []
    with Checkpointer(folder, keep=KeepLast(3), group=world) as checkpoints, float64_throughout(), loader:
        checkpoints.restore(state)
        steps = iter(loader)
        while state.step < until:
            losses.append(float(runner.forward_backward(next(steps))))
            grads = [p.grad for p in held.parameters() if p.grad is not None]
            norm = runner.grad_norm() if ranks else torch.linalg.vector_norm(torch.stack([g.norm() for g in grads]))
            norms.append(float(norm))
            clip_(held.parameters(), norm, 0.5)
            optimizer.step()
            optimizer.zero_grad()
            state.step += 1
        checkpoints.save(state.step, state).wait(timeout_s=60)
        tensors = {name: x.clone() for name, x in state.state_dict().items() if isinstance(x, torch.Tensor)}
    if ranks:
        runner.close()
    return losses, norms, {name: x for name, x in tensors.items() if not name.startswith("rng.")}


def together(results):
    """The state of all ranks; none holds what another does."""
    states = {}
    for _, _, state in results:
        assert not [name for name in state if name in states and name.startswith(("model.", "optim."))]
        states |= state
    return results[0][0], results[0][1], states


CASES = {
    "tied": {"rounds": 1},
    "two rounds": {"rounds": 2, "open_slots": 3},
    "frozen in front": {"frozen": ("model.embed_tokens", "model.layers.0.", "model.layers.1.")},
    "adapters": {"lora": LoraConfig(rank=2), "open_slots": 1},
    "adapters behind": {"lora": LoraConfig(rank=2, first_layer=2, targets=("q_proj", "up_proj"))},
    "frozen in the middle": {"frozen": ("model.layers.2.",), "padding": 5},
}


QUICK = ("tied", "two rounds", "adapters behind")


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, case in CASES.items()],
)
def test_any_number_of_ranks_gives_the_same_bits_and_those_are_right(tmp_path, case):
    expected = run_ranks(rank_trains, 1, str(tmp_path / "plain"), 0, 3, case | {"rounds": 1})[0]
    first = None
    for ranks in (1, 2, 3):
        losses, norms, states = together(run_ranks(rank_trains, ranks, str(tmp_path / str(ranks)), ranks, 3, case))
        assert losses == pytest.approx(expected[0], rel=1e-12)
        assert norms == pytest.approx(expected[1], rel=1e-10)
        assert states.keys() == expected[2].keys()
        for name, tensor in expected[2].items():
            torch.testing.assert_close(states[name], tensor, rtol=1e-8, atol=1e-10, msg=name)
        first = first or (losses, norms, states)
        assert (losses, norms) == first[:2]
        assert all(torch.equal(tensor, first[2][name]) for name, tensor in states.items())


def test_what_any_number_of_ranks_saves_any_other_resumes(tmp_path):
    """One step on each of 1, 3 and 2 ranks, and then on a process that has the whole model."""
    *_, final = run_ranks(rank_trains, 1, str(tmp_path / "whole"), 0, 4, {})[0]
    for leg, ranks in enumerate((1, 3, 2, 0), start=1):
        results = run_ranks(rank_trains, max(1, ranks), str(tmp_path / "parts"), ranks, leg, {})
    *_, states = together(results)
    assert states.keys() == final.keys()
    for name, tensor in final.items():
        torch.testing.assert_close(states[name], tensor, rtol=1e-7, atol=1e-9, msg=name)


def rank_accumulates(info, ranks):
    """Two steps without a zero_grad between them, an evaluation, and the model put together again."""
    model = job_model()
    with float64_throughout():
        runner = RoundPipeRunner(
            model, PipelineConfig(schedule="roundpipe", ranks=ranks), microbatches=BATCH, tokens=TOKENS,
            group=dist.group.WORLD, data_group=None, rank=info.rank, device=torch.device("cpu"),
        )  # fmt: skip
        with ChunkLoader(SOURCE, chunk_tokens=TOKENS, global_batch=BATCH, rank=0, world_size=1) as loader:
            batches = [batch for _, batch in zip(range(2), loader, strict=False)]
        evaluated = [float(runner.evaluate(batch)) for batch in batches]
        assert all(p.grad is None for p in runner.model.parameters())
        losses = [float(runner.forward_backward(batch)) for batch in batches]
        assert losses == evaluated
        grads = {name: p.grad.clone() for name, p in runner.model.named_parameters()}
        whole = runner.gather(job_model)
    runner.close()
    return grads, None if whole is None else {name: p.detach() for name, p in whole.named_parameters()}, losses


def test_gradients_accumulate_over_steps_and_the_model_comes_together():
    results = run_ranks(rank_accumulates, 2, 2)
    model = job_model()
    runner = ChunkRunner(model, group=SINGLE)
    with float64_throughout(), ChunkLoader(SOURCE, chunk_tokens=TOKENS, global_batch=BATCH, rank=0, world_size=1) as ld:
        losses = [float(runner.forward_backward(batch)) for _, batch in zip(range(2), ld, strict=False)]
    assert results[0][2] == pytest.approx(losses, rel=1e-12)
    grads = {name: grad for owned, *_ in results for name, grad in owned.items()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-9, atol=1e-12, msg=name)
        assert torch.equal(results[0][1][name], p)
    assert results[1][1] is None


def rank_shares_data(info):
    """Two pipelines of two ranks each train half of every step's samples."""
    mesh = make_mesh("cpu", 4, pp=2)
    rank = mesh.get_local_rank("pp")
    with float64_throughout():
        runner = RoundPipeRunner(
            job_model(), PipelineConfig(schedule="roundpipe", ranks=2), microbatches=BATCH, tokens=TOKENS,
            group=mesh.get_group("pp"), data_group=mesh.get_group("dp"), rank=rank, device=torch.device("cpu"),
        )  # fmt: skip
        data_rank = mesh.get_local_rank("dp")
        with ChunkLoader(SOURCE, chunk_tokens=TOKENS, global_batch=BATCH, rank=data_rank, world_size=2) as loader:
            loss = float(runner.forward_backward(next(iter(loader))))
        norm = float(runner.grad_norm())
    runner.close()
    return loss, norm, {name: p.grad.clone() for name, p in runner.model.named_parameters()}


def test_several_pipelines_share_the_data():
    results = run_ranks(rank_shares_data, 4)
    model = job_model()
    with float64_throughout(), ChunkLoader(SOURCE, chunk_tokens=TOKENS, global_batch=BATCH, rank=0, world_size=1) as ld:
        loss = float(ChunkRunner(model, group=SINGLE).forward_backward(next(iter(ld))))
    norm = float(torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters()])))
    parameters = dict(model.named_parameters())
    for found, found_norm, grads in results:
        assert (found, found_norm) == (pytest.approx(loss, rel=1e-12), pytest.approx(norm, rel=1e-10))
        for name, grad in grads.items():
            torch.testing.assert_close(grad, parameters[name].grad, rtol=1e-9, atol=1e-12, msg=name)


def test_adapters_merge_into_a_plain_model():
    model, plain = job_model(lora=LoraConfig(rank=2, targets=("q_proj", "down_proj"))), job_model()
    ids = torch.arange(9)[None]
    with torch.no_grad():
        before = model(ids).logits
        assert not torch.allclose(before, plain(ids).logits)
        merged = merge_adapters(model)
        torch.testing.assert_close(merged(ids).logits, before, rtol=1e-12, atol=1e-12)
    assert merged.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({}, id="full"),
        pytest.param({"lora.rank": 2, "optimizer.lr": 0.01}, id="adapters", marks=pytest.mark.slow),
    ],
)
def test_a_job_by_one_setting(tmp_path, flags):
    """Two ranks under torchrun train, save and export; what is exported is a plain model that has moved."""
    changes = {
        "run.steps": 4, "pipeline.schedule": "roundpipe", "pipeline.ranks": 2, "chunks.chunk_tokens": 128,
        "data.long_files": [], "data.max_file_bytes": 120, **flags,
    }  # fmt: skip
    arguments = settings(write_corpus(tmp_path / "corpus"), tmp_path / "run")
    for key, value in changes.items():
        if f"--{key}" in arguments:
            at = arguments.index(f"--{key}")
            del arguments[at : at + 2]
        arguments += [f"--{key}", str(value)]
    code, output = run_job(arguments, tmp_path / "log")
    assert code == 0, output
    assert "pipeline roundpipe of 2 ranks" in output
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert not [name for name in model.state_dict() if "lora" in name]
    timeline = read_timeline(tmp_path / "run" / "trace")
    assert timeline is not None
    shown = [sorted((bar.rank, bar.backward) for bar in bars) for bars in (timeline.measured, timeline.predicted)]
    assert shown[0] == shown[1] != []
    assert {rank for rank, _ in shown[0]} == {0, 1}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ["--pipeline.stages", "2", "--pipeline.ranks", "2"],
            "roundpipe plans its slots from the layers; leave",
        ),
        (["--pipeline.stages", "4", "--pipeline.ranks", "2"], "roundpipe plans its slots from the layers; leave"),
        (["--pipeline.schedule", "1f1b", "--pipeline.device_memory_bytes", "9"], "1f1b keeps no cap; leave it out"),
        (["--pipeline.rounds", "0"], "rounds is 0; it must be at least 1"),
        (["--pipeline.device_memory_bytes", "0"], "pipeline.device_memory_bytes is 0; it must be at least 1"),
        (["--lora.rank", "0"], "lora.rank is 0; it must be at least 1, or null"),
    ],
)
def test_bad_settings_are_told_by_their_names(flags, expected):
    with pytest.raises(ConfigError, match=expected):
        read_config(["--pipeline.schedule", "roundpipe", *flags], prog="x", description="")


def test_samples_longer_than_a_chunk_are_refused_on_one_rank_too():
    with pytest.raises(ConfigError, match="roundpipe needs every sample within one chunk, and the longest has 513"):
        check_whole_samples(FinetuneConfig(pipeline=PipelineConfig(schedule="roundpipe")), 513)


def test_too_few_microbatches_and_too_many_rounds_are_refused_before_training():
    loader = ChunkLoader(SOURCE, chunk_tokens=TOKENS, global_batch=BATCH, rank=0, world_size=1)
    counts = [len(loader.plan(step).ranks[0]) for step in range(loader.num_steps)]
    most, held_out = max(counts), [next(iter(loader))]
    assert 1 < counts[0] < most < BATCH

    def check(steps, **pipeline):
        config = PipelineConfig(schedule="roundpipe", **pipeline)
        check_microbatches(FinetuneConfig(pipeline=config, chunks=CHUNKS), loader, held_out, steps)

    check(len(counts), microbatches=most, rounds=most)
    check(1, microbatches=counts[0])
    with pytest.raises(ConfigError, match=f"microbatches is {most - 1}, and a step has {most} chunks; make it {most}"):
        check(len(counts), microbatches=most - 1)
    with pytest.raises(ConfigError, match=f"microbatches is 1, and a step has {counts[0]} chunks"):
        check(0, microbatches=1)  # of what is held out
    with pytest.raises(ConfigError, match=f"rounds is {most + 1}, and no step has as many chunks"):
        check(len(counts), rounds=most + 1)


def test_adapters_that_fit_nothing_are_refused():
    with pytest.raises(ConfigError, match=r"lora.targets \['nothing'\] are not in the model"):
        with_adapters(job_model(), LoraConfig(rank=2, targets=("nothing",)))
    with pytest.raises(ConfigError, match=r"lora\.first_layer is 4; the model has 4 decoder layers"):
        with_adapters(job_model(), LoraConfig(rank=2, first_layer=4))


def rank_is_planned(info):
    """Rounds and open slots that are left open; a head of half the model's weight wants more than one of each."""
    torch.manual_seed(0)
    model = tiny_model("llama", num_hidden_layers=4, vocab_size=2000)
    runner = RoundPipeRunner(
        model, PipelineConfig(schedule="roundpipe", ranks=info.world_size, rounds=None, open_slots=None),
        microbatches=8, tokens=TOKENS, group=dist.group.WORLD, data_group=None, rank=info.rank,
        device=torch.device("cpu"),
    )  # fmt: skip
    with ChunkLoader(SOURCE, chunk_tokens=TOKENS, global_batch=8, rank=0, world_size=1) as loader, float64_throughout():
        loss = float(runner.forward_backward(next(iter(loader))))
    runner.close()
    return runner.plan.rounds, runner.plan.open_slots, runner.description, loss


def test_rounds_and_open_slots_are_planned_where_they_are_left_open():
    first, second = run_ranks(rank_is_planned, 2)
    assert first == second
    rounds, open_slots, words, _ = first
    assert rounds in (2, 4)
    assert open_slots in (2, 3)
    assert f"{rounds} rounds and {open_slots} open slots" in words
    assert "times no idling" in words


def rank_is_capped(info, cap_bytes):
    with float64_throughout():
        return RoundPipeRunner(
            job_model(), PipelineConfig(schedule="roundpipe", device_memory_bytes=cap_bytes), microbatches=2,
            tokens=TOKENS, group=dist.group.WORLD, data_group=None, rank=0, device=torch.device("cpu"),
        )  # fmt: skip


def rank_meets_caps(info):
    with pytest.raises(PlanError, match=r"need [\d,]+ bytes on a device .*; the cap is 10,000; raise it to [\d,]+, or"):
        rank_is_capped(info, 10_000)
    runner = rank_is_capped(info, 10_000_000)
    with ChunkLoader(SOURCE, chunk_tokens=TOKENS, global_batch=BATCH, rank=0, world_size=1) as loader:
        batch = next(iter(loader))
    assert len(batch.chunks) > 2
    expected = f"step 1 has {len(batch.chunks)} chunks, and there is host memory for pipeline.microbatches = 2; raise"
    for run in (runner.forward_backward, runner.evaluate):
        with pytest.raises(ConfigError, match=expected):
            run(batch)
    runner.close()


def test_a_micro_batch_that_no_device_has_room_for_is_an_error_before_training():
    run_ranks(rank_meets_caps, 1)


def test_the_recipe_reads():
    config = read_config(["--config", str(ROOT / "recipes" / "roundpipe.yaml")], prog="x", description="")
    assert (config.pipeline.schedule, config.pipeline.ranks, config.lora.rank) == ("roundpipe", 2, None)
