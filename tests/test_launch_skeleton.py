"""Ranks that share memory: only the first builds the weights, and the others train as if they had."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GraniteConfig, GraniteForCausalLM

from chunkflow import MemorySource
from chunkflow.errors import ChunkflowError
from launch.data import Data
from launch.env import World
from launch.errors import ModelError
from launch.job import assemble, build, share_model
from launch.pipeline_job import find_place
from launch.recipe import read_config
from launch.skeleton import without_weights
from tests.spawn import run_ranks
from tests.tiny import sequence, tiny_model

pytestmark = pytest.mark.timeout(240)
FLAGS = {"pipeline.schedule": "roundpipe", "chunks.chunk_tokens": 16, "model.vocab_size": 257, "model.num_layers": 3}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


def build_here(info, flags):
    config = read_config([f"--{key}={value}" for key, value in {**FLAGS, **flags}.items()], prog="x", description="")
    world = World(info.rank, info.world_size, torch.device("cpu"), None)
    place = find_place(config.pipeline, config.moe, world)
    data = Data(MemorySource([sequence(n, 4 + n % 9) for n in range(12)]), None, None, ())
    return config, world, data, place, build(config, world, data, place)


def rank_builds(info, flags, ranks):
    """Bytes of weights that this rank had before training; losses, all weights, and the model put together again."""
    config, world, data, place, model = build_here(info, {**flags, "pipeline.ranks": ranks})
    held = sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}.values())
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    share_model(model, config, place)
    job = assemble(config, world, data, model, place)
    with job.loader:
        losses = [job.train_step(batch).loss for _, batch in zip(range(2), job.loader, strict=False)]
    weights = {name: job.runner.store.weights(name).clone() for name in job.runner.store.plan.parameters}
    whole = job.whole_model()
    job.runner.close()
    return held, tied, losses, weights, None if whole is None else whole.state_dict()


@pytest.mark.parametrize(
    ("name", "flags", "kind", "changes"),
    [
        ("llama", {}, "llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
        ("random", {}, None, {}),
        pytest.param("yarn", {"lora.rank": 2}, "qwen3", {"rope_parameters": YARN}, marks=pytest.mark.slow),
    ],
)
def test_one_rank_builds_the_weights_and_all_train_them(tmp_path, name, flags, kind, changes):
    if kind is not None:
        tiny_model(kind, dtype=torch.float32, **changes).save_pretrained(tmp_path / name)
        flags = {**flags, "model.path": str(tmp_path / name)}
    ((held, tied, losses, weights, whole),) = run_ranks(rank_builds, 1, flags, 1)
    first, second = run_ranks(rank_builds, 2, flags, 2)
    assert (first[0], first[1]) == (held, tied)
    assert second[0] == 4 * len(weights)
    assert second[1] == tied
    for found in (first, second):
        assert found[2] == losses
        assert all(torch.equal(found[3][name], tensor) for name, tensor in weights.items())
    assert all(torch.equal(first[4][name], tensor) for name, tensor in whole.items())
    assert second[4] is None


def rank_four(info):
    """Two pipelines of two ranks: the first rank of each builds the weights, and has those of the very first."""
    config, *_, place, model = build_here(info, {"pipeline.ranks": 2, "run.seed": info.rank})
    share_model(model, config, place)
    held = [p.detach().clone() for p in model.parameters()] if place.holds_weights else None
    return held, {name: b.clone() for name, b in model.named_buffers()}


def test_the_first_rank_of_every_pipeline_has_the_same_weights():
    results = run_ranks(rank_four, 4)
    holders = [held for held, _ in results if held is not None]
    assert len(holders) == 2
    assert all(torch.equal(a, b) for a, b in zip(*holders, strict=True))
    assert all(torch.equal(b, results[0][1][name]) for _, buffers in results for name, b in buffers.items())


def rank_cuts(info, schedule, ranks):
    """Bytes of weights that this rank has when its stages are cut; losses, and the model put together again."""
    flags = {"pipeline.schedule": schedule, "pipeline.ranks": ranks, "pipeline.timeout_s": 30}
    config, world, data, place, model = build_here(info, flags)
    share_model(model, config, place)
    job = assemble(config, world, data, model, place)
    del model
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in job.model.parameters()}
    with job.loader:
        losses = [job.train_step(batch).loss for _, batch in zip(range(2), job.loader, strict=False)]
    whole = job.whole_model()
    if ranks > 1:
        job.runner.close()
    return sum(held.values()), losses, None if whole is None else whole.state_dict()


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_a_pipeline_s_ranks_get_the_weights_of_their_stages_only(schedule):
    ((whole, losses, state),) = run_ranks(rank_cuts, 1, schedule, 1)
    found = run_ranks(rank_cuts, 2, schedule, 2)
    tied = state["model.embed_tokens.weight"].nbytes  # held by the first and the last stage
    assert sum(held for held, *_ in found) == whole + (tied if schedule == "1f1b" else 0)
    for _, other, _ in found:
        assert other == pytest.approx(losses, rel=1e-5)
    for name, tensor in state.items():
        torch.testing.assert_close(found[0][2][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def rank_refuses(info, path):
    try:
        build_here(info, {"pipeline.ranks": 2, "model.path": path})
    except (ModelError, ChunkflowError) as error:
        return str(error)
    return None


def test_a_model_that_is_unfit_is_refused_where_its_weights_are(tmp_path):
    """The job then tells the other ranks, before any of them waits for shared memory."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 97}  # fmt: skip
    GraniteForCausalLM(GraniteConfig(**sizes, embedding_multiplier=2.0)).save_pretrained(tmp_path)
    first, second = run_ranks(rank_refuses, 2, str(tmp_path))
    assert "outside of any layer" in first
    assert second is None


def test_a_model_without_weights_keeps_shapes_ties_and_what_is_frozen(tmp_path):
    model = tiny_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        found = AutoModelForCausalLM.from_config(model.config)
    found.model.norm.weight.requires_grad_(False)
    without_weights(found, torch.device("cpu"))
    assert {n: p.shape for n, p in found.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert [n for n, p in found.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
    assert all(b.device.type == "cpu" for b in found.buffers())
