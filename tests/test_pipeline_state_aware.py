"""Chunks of transformers models through a pipeline of real ranks, against whole sequences in one process. fp64."""

import pytest
import torch.distributed as dist

from chunkflow.reference import float64_throughout, full_sequence_step
from launch.gradnorm import global_grad_norm
from launch.pipeline_parts import cut
from launch.pipeline_plan import STATE_BYTES, plan_order, units_of
from launch.pipeline_runner import PipelineRunner
from pipeline.config import PipelineConfig
from pipeline.errors import ScheduleError
from pipeline.schedules import SCHEDULES as MAKERS
from pipeline.simulate import simulate
from pipeline.transport import GroupTransport
from pipeline.unit_costs import UnitModel
from pipeline.units import Unit
from tests.spawn import run_ranks
from tests.test_chunkflow_exact import EXACT, batch_of, step_of
from tests.tiny import chunk, group_of, sequence, tiny_model

MODELS = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-attention-dropout": {"attention_dropout": 0.2, "tie_word_embeddings": True},
    "qwen3": {},
    "mistral": {},
}


def make(name):
    return tiny_model(name.split("-")[0], **{**MODELS[name], "num_hidden_layers": 4}).train()


def two_groups():
    """Sequences and chunks with two groups, one of them of seven chunks, between standalone chunks."""
    sequences = {0: sequence(0, 131), 1: sequence(1, 5), 2: sequence(2, 8), 3: sequence(3, 11), 4: sequence(4, 45)}
    chunks = [
        chunk(sequences, [(2, 0, 8)]),
        *group_of(sequences, 0, 20, group=0, tail=[(1, 0, 5)]),
        *group_of(sequences, 4, 20, group=1),
        chunk(sequences, [(3, 0, 11)]),
    ]
    return sequences, chunks


STEPS = {"one group": lambda: step_of(3), "two groups": two_groups, "no group": lambda: step_of(1)}


def rank_trains(info, name, step, config, retain, steps=1):
    model = make(name)
    if "frozen" in step:
        freeze(model)
    parts = cut(model, config, rank=info.rank)
    del model
    world = dist.group.WORLD
    transport = GroupTransport(world)
    runner = PipelineRunner(parts, config, transport, retain=retain, group=world, data_group=None)
    batch = batch_of(*STEPS[step.removesuffix(", frozen")]())
    with float64_throughout():
        scored = float(runner.evaluate(batch))
        losses = [float(runner.forward_backward(batch)) for _ in range(steps)]
    norm = float(runner.grad_norm())
    transport.close()
    assert not any(stage.live for stage in parts.stages.values())
    assert not any(layers._states for layers in parts.layers.values())
    return scored, losses, norm, {n: p.grad for n, p in runner.model.named_parameters()}


def freeze(model):
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[:2].requires_grad_(False)


@pytest.fixture(scope="module")
def oracle():
    known = {}

    def ask(name, step):
        if (name, step) not in known:
            model = make(name)
            if "frozen" in step:
                freeze(model)
            sequences, chunks = STEPS[step.removesuffix(", frozen")]()
            seed = 5 if "attention-dropout" in name else None
            with float64_throughout():
                denominator = batch_of(sequences, chunks).denominator
                loss = full_sequence_step(model, sequences, denominator=denominator, dropout_seed=seed)
            known[name, step] = float(loss), model
        return known[name, step]

    return ask


def check(results, loss, reference, *, times=1):
    gradients = {name: p.grad for name, p in reference.named_parameters()}
    norm = float(global_grad_norm(reference.parameters())) * times
    seen = set()
    for scored, losses, ours, held in results:
        assert abs(scored / loss - 1) < EXACT
        assert all(abs(x / loss - 1) < EXACT for x in losses)
        assert abs(ours / norm - 1) < EXACT
        for name, grad in held.items():
            seen.add(name)
            if gradients[name] is None:
                assert grad is None, name
            else:
                error = (grad - times * gradients[name]).abs().max() / gradients[name].abs().max()
                assert error < EXACT, f"{name} differs by {error}"
    assert seen == gradients.keys()


CASES = [
    *((name, "two groups", 2, 2) for name in MODELS),
    *(("llama-tied", "two groups", ranks, retain) for ranks, retain in [(2, 1), (2, 3), (2, 7), (4, 2)]),
    ("qwen3", "one group", 4, 1),
    ("llama", "no group", 4, 1),
]


@pytest.mark.parametrize(("name", "step", "ranks", "retain"), CASES)
def test_groups_through_a_pipeline_equal_whole_sequences(name, step, ranks, retain, oracle):
    loss, reference = oracle(name, step)
    results = run_ranks(rank_trains, ranks, name, step, PipelineConfig(ranks=ranks, timeout_s=30), retain)
    check(results, loss, reference)


SCHEDULES = [
    ("gpipe", 2), ("1f1b", 4), ("interleaved", 2), ("looped_bfs", 2), ("zb_h1", 4), ("zbv", 2),
]  # fmt: skip


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("schedule", "ranks"), SCHEDULES)
def test_every_weight_bound_schedule_trains_standalone_chunks(schedule, ranks, recompute, oracle):
    config = PipelineConfig(schedule=schedule, ranks=ranks, recompute=recompute, timeout_s=30)
    results = run_ranks(rank_trains, ranks, "llama-tied", "no group", config, 1)
    check(results, *oracle("llama-tied", "no group"))


def test_gradients_add_up_over_steps(oracle):
    config = PipelineConfig(ranks=2, timeout_s=30)
    results = run_ranks(rank_trains, 2, "llama-tied", "one group", config, 2, 3)
    check(results, *oracle("llama-tied", "one group"), times=3)


def test_frozen_first_layers_run_no_backward(oracle):
    config = PipelineConfig(ranks=4, timeout_s=30)
    results = run_ranks(rank_trains, 4, "llama", "two groups, frozen", config, 1)
    check(results, *oracle("llama", "two groups, frozen"))


def test_a_pipeline_is_cut_by_weight_and_names_what_it_holds():
    model = make("llama-tied")
    parts = [cut(model, PipelineConfig(ranks=2), rank=rank) for rank in range(2)]
    assert parts[0].bounds == ((0, 3), (3, 7))  # two layers, and two with the head
    assert parts[0].holders["model.embed_tokens.weight"] == (0, 1)
    assert parts[1].shared == ("model.embed_tokens.weight",)
    names = [set(dict(p.model.named_parameters())) for p in parts]
    assert names[0] & names[1] == {"model.embed_tokens.weight"}
    assert names[0] | names[1] == {n for n, _ in model.named_parameters()}
    counted = parts[0].counted() + parts[1].counted()
    assert sorted(counted) == sorted(n for n, _ in model.named_parameters())
    with pytest.raises(ScheduleError, match="7 layers do not fill 8 stages"):
        cut(model, PipelineConfig(ranks=8), rank=0)


def test_a_part_holds_no_weight_of_another():
    model = make("llama")
    total = sum(p.numel() for p in model.parameters())
    sizes = []
    for rank in range(4):
        parts = cut(model, PipelineConfig(ranks=4), rank=rank)
        sizes.append(sum(p.numel() for p in parts.model.parameters()))
        skeletons = {id(layers._arguments.skeleton): layers._arguments.skeleton for layers in parts.layers.values()}
        assert not [p for skeleton in skeletons.values() for p in skeleton.parameters()]
    assert sum(sizes) == total


def test_the_order_of_a_step_is_planned_and_takes_no_more_memory():
    """Groups and standalone chunks change places as a whole; where all are alike, nothing does."""
    _, chunks = two_groups()
    units = units_of(chunks, 2)
    found = plan_order(units, ranks=2, pair_cost=0.01)
    assert sorted(found.places) == list(range(len(chunks)))
    assert tuple(units[place] for place in found.places) == found.schedule.units
    assert [u.index for u in found.schedule.units if u.group == 0] == list(range(7))
    model = UnitModel(layers=2, attention_tokens=100, state_bytes=STATE_BYTES)
    given = simulate(MAKERS["state_aware_1f1b"](devices=2, units=units), model.costs(units))
    assert found.result.makespan_s < given.makespan_s
    assert max(found.result.peak_bytes) <= max(given.peak_bytes)
    alike = (Unit(20),) * 6
    assert plan_order(alike, ranks=2, pair_cost=0.0).places == tuple(range(6))
    assert plan_order(alike, ranks=2, pair_cost=0.0).ahead == "chunks"
