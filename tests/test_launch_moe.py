"""Jobs whose experts are spread over ranks; transformers' own model in one process is the oracle."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import moe
from checkpointing import Checkpointer, KeepLast
from chunkflow import SINGLE, ChunkRunner
from chunkflow.errors import UnsupportedModelError
from chunkflow.reference import float64_throughout
from launch import TrainState
from launch.config import ChunksConfig, FinetuneConfig, OptimizerConfig, RunConfig
from launch.errors import ConfigError, ResumeError
from launch.expert_plan import first_plan, read_plans
from launch.experts import STARVED_STEPS, ExpertRunner, Starving, with_experts
from launch.gradnorm import clip_, global_grad_norm
from launch.mesh import make_mesh
from launch.metrics import read_metrics
from launch.optimizer import build_optimizer
from launch.recipe import read_config
from moe.config import ExpertsConfig
from moe.cost import OPERATIONS, Line, Profile, Table
from moe.errors import MoeConfigError
from moe.plan import LayerPlan
from tests.launch_jobs import run_job, settings, write_corpus
from tests.moe_jobs import loader_of, place_of
from tests.moe_models import tiny_moe
from tests.spawn import ROOT, run_ranks
from tests.tiny import tiny_model

pytestmark = pytest.mark.timeout(240)


def spread_runner(info, model, ep, esp, folder, **changes):
    config = FinetuneConfig(
        run=RunConfig(folder=folder),
        chunks=ChunksConfig(chunk_tokens=16, retain=2),
        moe=ExpertsConfig(ep=ep, esp=esp, timeout_s=30, slice_bytes=1024, **changes),
    )
    return ExpertRunner(model, config, place_of(info, ep, esp))


def whole_tensors(state):
    tensors = {name: x for name, x in state.state_dict().items() if isinstance(x, torch.Tensor)}
    whole = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in tensors.items()}
    return {name: x.clone() for name, x in whole.items() if not name.startswith("rng.")}


def rank_trains(info, folder, family, ep, esp, until, changes):
    """Resume from `folder`, train to step `until` in fp64 and save; losses, norms, and the state as it is then."""
    model = tiny_moe(family).train()
    loader = loader_of(info.rank, info.world_size)
    if ep is None:  # the plain way: transformers' experts
        runner, whole, spread, group = ChunkRunner(model, group=SINGLE, retain=2), None, None, SINGLE
    else:
        runner = spread_runner(info, model, ep, esp, folder, **changes)
        whole, spread, group = runner.whole, runner, torch.distributed.group.WORLD
    settings = OptimizerConfig(lr=1e-2)
    optimizer = build_optimizer(model, settings, whole=whole)
    rank = {"rank": info.rank, "world_size": info.world_size}
    state = TrainState(model, optimizer, loader, whole=whole, spread=spread, **rank)
    told = []
    with Checkpointer(folder, keep=KeepLast(3), group=group) as checkpoints, float64_throughout(), loader:
        checkpoints.restore(state)
        steps = iter(loader)
        while state.step < until:
            batch = next(steps)
            score = float(runner.evaluate(batch))
            loss = float(runner.forward_backward(batch))
            norm = global_grad_norm(model.parameters()) if ep is None else runner.grad_norm()
            told += [loss, float(norm), score]
            clip_(model.parameters(), norm, 0.5)
            optimizer.step()
            optimizer.zero_grad()
            state.step += 1
        checkpoints.save(state.step, state).wait(timeout_s=60)
        loads = {} if ep is None else runner.loads
        return told, whole_tensors(state), loads


def assert_same(ours, theirs, tolerance=1e-9):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    ("family", "legs", "changes"),
    [
        ("mixtral", [(2, 2, 1), (2, 1, 2), (1, 1, 1), (2, 1, 1)], {}),
        ("qwen3_moe", [(4, 2, 1), (2, 2, 1)], {"chunks": 3}),
        ("mixtral", [(4, 2, 2), (4, 4, 1)], {"exchange": "2d", "node_ranks": 2}),
        ("deepseek_v3", [(2, 2, 1), (1, 1, 1)], {}),
        ("olmoe", [(2, 1, 2), (2, 2, 1)], {"chunks": 2}),
    ],
    ids=["mixtral", "qwen3", "two levels", "deepseek", "olmoe"],
)
def test_any_spread_trains_as_one_process_and_resumes_another(tmp_path, family, legs, changes):
    """Two steps on each (ranks, ep, esp): losses, norms, scores, weights, moments are those of plain transformers."""
    expected, final, _ = run_ranks(rank_trains, 1, str(tmp_path / "plain"), family, None, 1, 2 * len(legs), {})[0]
    told, states = [], []
    for leg, (ranks, ep, esp) in enumerate(legs, start=1):
        fits = {} if changes.get("node_ranks", 1) > ep else changes
        found = run_ranks(rank_trains, ranks, str(tmp_path / "spread"), family, ep, esp, 2 * leg, fits)
        told += found[0][0]
        states = [state for _, state, _ in found]
        assert all(one[0] == found[0][0] for one in found)
    assert told == pytest.approx(expected, rel=1e-9)
    for state in states:
        assert_same(state, final)


def test_loads_are_those_of_every_token_once(tmp_path):
    """A step of known tokens: shares add up, and agree for any spread, dummies and second forwards left out."""
    loads = [run_ranks(rank_trains, ranks, str(tmp_path / f"{ranks}{ep}"), "mixtral", ep, 1, 1, {})[-1][2]
             for ranks, ep in ((1, 1), (2, 2))]  # fmt: skip
    assert loads[0] == pytest.approx(loads[1], abs=1e-12)
    for layer in range(2):
        assert sum(loads[0][f"moe/layer{layer}/expert_{e}"] for e in range(4)) == pytest.approx(1)
    assert loads[0]["moe/imbalance"] >= 1


def rank_measures(info, folder):
    """Three steps by measured plans; what was planned, and the losses beside those without a plan."""
    losses = []
    for plan in (None, "measure"):
        model = tiny_moe("mixtral", dtype=torch.float32).train()
        runner = spread_runner(info, model, 2, 1, folder, plan=plan)
        with loader_of(info.rank, 2) as loader:
            steps = iter(loader)
            notes = []
            for _ in range(3):
                losses.append(float(runner.forward_backward(next(steps))))
                notes.append(runner.notes)
                model.zero_grad()
    one_expert = torch.tensor([[9, 0, 0, 0]] * 2)  # from now on, all rows of both layers
    notes.append([note for _ in range(6) for note in runner._planner.after_step(one_expert)])
    plans = {name: layer.runner.plan.to_json() for name, layer in moe.expert_layers(model).items()}
    return losses, notes, plans, runner.description


def test_measured_plans_are_agreed_written_and_change_no_loss(tmp_path):
    found = run_ranks(rank_measures, 2, str(tmp_path))
    losses, notes, plans, description = found[0]
    assert all(plans == other for _, _, other, _ in found)
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-5)
    assert "dense gradients of" in notes[0][0]
    assert all(other == notes[3] for _, (*_, other), _, _ in found)
    assert "Experts planned anew: model.layers.1.mlp.experts: exchange_bytes went from" in notes[3][0]
    assert "2 layers of 4 experts over dp 1 x ep 2 x esp 1" in description
    assert "limited by" in description
    written = read_plans(tmp_path / "moe_plan.json")
    assert {name: plan.to_json() for name, plan in written.items()} == plans


def scaled(cost, factor):
    return Line(cost.alpha_s * factor, cost.beta_s * factor) if isinstance(cost, Line) else Table(
        cost.sizes, tuple(t * factor for t in cost.times_s)
    )  # fmt: skip


def rank_drifts(info, folder):
    """A job whose links and experts are a thousand times slower than when they were measured, as far as it knows."""
    losses, notes, loads = [], [], []
    for plan in (None, "measure"):
        model = tiny_moe("mixtral", dtype=torch.float32).train()
        runner = spread_runner(info, model, 2, 1, folder, plan=plan)
        planner = runner._planner
        with loader_of(info.rank, 2) as loader:
            for n, batch in zip(range(3), loader, strict=False):
                if planner is not None and n:
                    planner._watch._left = 1
                if planner is not None and n == 1:
                    fast = {op: scaled(getattr(planner._profile, op), 1e-3) for op in OPERATIONS}
                    planner._watch._profile = replace(planner._profile, **fast, layer_s=planner._profile.layer_s / 1e3)
                before = torch.get_rng_state()
                losses.append(float(runner.forward_backward(batch)))
                notes.append(runner.notes)
                loads.append(runner.loads)
                assert torch.equal(before, torch.get_rng_state())
                model.zero_grad()
    plans = {name: layer.runner.plan.to_json() for name, layer in moe.expert_layers(model).items()}
    return losses, notes[3:], loads[3:], plans, planner._profile.to_json()


def test_a_job_whose_layers_take_longer_than_was_measured_measures_again_and_says_so(tmp_path):
    found = run_ranks(rank_drifts, 2, str(tmp_path))
    losses, notes, loads, plans, profile = found[0]
    assert all((plans, profile, notes[1:]) == (p, q, n[1:]) for _, n, _, p, q in found)
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-5)
    anew, *words = notes[1]
    assert anew.startswith("Experts planned anew: layers take ")
    assert "times what the profile says, more than 25% apart: links and experts were measured again; " in anew
    assert any(line.startswith("all_to_all: ") for line in words)
    assert loads[1]["moe/measured_over_predicted"] > 1.25
    # What the new profile does not explain is told once, and is no reason for the next.
    ratio = loads[2]["moe/measured_over_predicted"]
    assert f"Layers of experts take {ratio:.2f} times what was predicted, in the median" in notes[2]
    assert "moe/measured_over_predicted" not in loads[0]
    written = Profile.from_json((tmp_path / "moe_profile.json").read_text())
    assert written.to_json() == profile
    assert {name: plan.to_json() for name, plan in read_plans(tmp_path / "moe_plan.json").items()} == plans


def rank_refuses(info, folder):
    """What is refused, on every rank alike, and nothing hangs."""
    errors = []
    for family, ep, changes in (("mixtral", 4, {"esp": 1}), ("olmoe", 2, {"plan": folder + "/none.json"})):
        if ep > info.world_size:
            continue
        try:
            spread_runner(info, tiny_moe(family), ep, changes.pop("esp", 1), folder, **changes)
        except (MoeConfigError, ConfigError) as error:
            errors.append(str(error))
    try:
        spread_runner(info, tiny_model(), 2, 1, folder)
    except MoeConfigError as error:
        errors.append(str(error))
    try:
        spread_runner(info, tiny_moe("mixtral", output_router_logits=True), 2, 1, folder)
    except UnsupportedModelError as error:
        errors.append(str(error))
    model = tiny_moe("mixtral")
    runner = spread_runner(info, model, 2, 1, folder)
    state = TrainState(model, build_optimizer(model, OptimizerConfig(), whole=runner.whole), loader_of(info.rank, 2),
                       whole=runner.whole, spread=runner, rank=info.rank, world_size=2)  # fmt: skip
    before = whole_tensors(state)
    saved = dict(state.state_dict())
    name = "model.model.layers.1.mlp.experts.down_proj"
    for wrong in (torch.zeros(6, 16, 8, dtype=torch.float64), torch.zeros(4, 16, 9, dtype=torch.float64)):
        try:
            state.load_state_dict({**saved, name: wrong})
        except (MoeConfigError, ResumeError) as error:
            errors.append(str(error))
    assert_same(whole_tensors(state), before)
    return errors


def test_what_cannot_be_is_refused_alike_on_every_rank(tmp_path):
    first, second = run_ranks(rank_refuses, 2, str(tmp_path))
    assert first == second
    texts = ["none.json cannot be read", "has no stacked experts", "output_router_logits", "has 6 experts, the layer 4",
             "is [4, 16, 9] (torch.strided), but all experts of the layer together are [4, 16, 8]"]  # fmt: skip
    assert len(first) == len(texts)
    for error, text in zip(first, texts, strict=True):
        assert text in error


def test_an_upcycled_model_has_no_auxiliary_loss():
    made = with_experts(tiny_model("llama"), ExpertsConfig(num_experts=4), seed=3)
    again = with_experts(tiny_model("llama"), ExpertsConfig(num_experts=4), seed=3)
    assert (type(made).__name__, made.config.output_router_logits) == ("MixtralForCausalLM", False)
    assert_same(made.state_dict(), again.state_dict(), 0)
    dense = tiny_model("llama")
    assert with_experts(dense, ExpertsConfig(), seed=0) is dense


def rank_idles(info, folder):
    """One step with one expert a token, and one with two: what the job says, and the router's gradient beside another.

    Experts are made to differ: while they are equal, as right after upcycling, no router has a gradient.
    """
    found = []
    for top_k in (1, 2):
        changes = {"num_experts": 2, "top_k": top_k}
        model = with_experts(tiny_model("llama", dtype=torch.float32), ExpertsConfig(ep=1, **changes), seed=0)
        block = model.model.layers[0].mlp
        block.experts.down_proj.data[1].neg_()
        runner = spread_runner(info, model, 1, 1, folder, **changes)
        with loader_of(0, 1) as loader:
            runner.forward_backward(next(iter(loader)))
        found.append((runner.description, float(block.gate.weight.grad.norm() / block.experts.down_proj.grad.norm())))
    return found


def test_routers_that_get_no_gradient_are_told(tmp_path):
    (one, nothing), (two, something) = run_ranks(rank_idles, 1, str(tmp_path))[0]
    assert "Routers learn nothing: with moe.top_k 1 " in one
    assert "Routers learn" not in two
    assert nothing < 1e-6 < 1e-3 < something


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--moe.ep", "0"], "moe.ep is 0; it must be at least 1"),
        (["--moe.num_experts", "2", "--moe.top_k", "3"], "moe.top_k is 3 of moe.num_experts = 2"),
        (["--moe.esp", "2"], "moe.esp is 2 and moe.ep null"),
        (["--moe.ep", "2", "--moe.chunks", "2", "--moe.plan", "x.json"], "give one of them"),
        (["--moe.ep", "1", "--moe.plan", "measure"], "nothing moves between ranks"),
        (["--moe.ep", "2", "--moe.exchange", "3d"], "moe.exchange"),
        (["--moe.ep", "2", "--moe.timeout_s", "0"], "timeout_s is 0"),
    ],
)
def test_settings_that_cannot_be(flags, text):
    with pytest.raises(ConfigError, match=text):
        read_config(flags, prog="x", description="")


def test_plans_are_read_from_files(tmp_path):
    plan, path = LayerPlan(3, 2), tmp_path / "plan.json"
    path.write_text(plan.to_json())
    assert first_plan(ExpertsConfig(ep=2, plan=str(path))) == plan
    path.write_text(json.dumps({"a": json.loads(plan.to_json())}))
    assert first_plan(ExpertsConfig(ep=2, plan=str(path))) == {"a": plan}
    assert first_plan(ExpertsConfig(ep=2, chunks=4)).backward_chunks == 4
    assert first_plan(ExpertsConfig(ep=2)) is first_plan(ExpertsConfig(ep=2, plan="measure")) is None
    path.write_text('{"forward_chunks": 0, "backward_chunks": 1}')
    with pytest.raises(ConfigError, match=r"moe\.plan .*plan\.json: forward_chunks is 0"):
        read_plans(path)


def test_processes_that_do_not_divide_are_told():
    with pytest.raises(ConfigError, match=r"4 processes do not divide into groups of moe\.ep = 3 times moe\.esp = 1"):
        make_mesh("cpu", 4, ep=3)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    write_corpus(folder / "corpus", files=24)
    return folder


def run(place, name, **changes):
    flags = settings(place / "corpus", place / name, run__steps=6, checkpoint__every=3, **changes)
    code, output = run_job(flags, place / f"{name}.log")
    assert code == 0, output
    return read_metrics(place / name / "metrics.jsonl"), output


def test_an_upcycled_job_trains_resumes_at_another_ep_and_exports(place):
    """fp32: sums in another order, and six steps of Adam on them."""
    spread, output = run(place, "spread", moe__num_experts=4, moe__ep=2, moe__chunks=2)
    assert "MixtralForCausalLM of" in output
    assert "2 layers of 4 experts over dp 1 x ep 2 x esp 1" in output
    assert "chunks of a layer: forward r=2, backward r=2; order fifo" in output
    shutil.copytree(place / "spread" / "checkpoints", place / "whole" / "checkpoints")
    shutil.rmtree(place / "whole" / "checkpoints" / "step-6")
    whole, output = run(place, "whole", moe__num_experts=4, moe__ep=1)
    assert "Resuming after step 3" in output
    assert [line["step"] for line in whole] == [4, 5, 6]
    for ours, theirs in zip(spread[4:], whole, strict=True):
        assert ours.keys() == theirs.keys()
        assert {f"moe/layer1/expert_{e}" for e in range(4)} < ours.keys()
        for key in {"loss", "grad_norm", "eval_loss"} & ours.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3), key
    ours, theirs = (AutoModelForCausalLM.from_pretrained(place / name / "model") for name in ("spread", "whole"))
    assert type(ours).__name__ == "MixtralForCausalLM"
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=2e-3, msg=name)
    assert (place / "spread" / "model" / "tokenizer.json").exists()
    assert list((place / "spread" / "tensorboard").iterdir())


def test_a_bad_spread_is_one_line_a_rank_and_exit_2(place):
    flags = settings(place / "corpus", place / "divide", moe__num_experts=3, moe__ep=2)
    code, output = run_job(flags, place / "divide.log")
    assert code != 0
    assert "exitcode  : 2" in output
    for rank in (0, 1):
        assert output.count(f"rank {rank}: error: ") == 1, output
    assert "3 experts do not split over 2 ranks" in output
    assert not (place / "divide").exists()


@pytest.mark.parametrize("name", ["moe_upcycled", "moe_quickstart"])
def test_the_recipes_read(name):
    config = read_config(["--config", str(ROOT / "recipes" / f"{name}.yaml")], prog="x", description="")
    assert config.moe.wanted
    assert config.moe.ep == 2


def test_experts_that_starve_are_told_of_once():
    starving, rows = Starving(), torch.tensor([[5, 0, 3], [0, 4, 4]])
    fed = torch.tensor([[5, 0, 3], [1, 4, 4]])
    told = [starving.after_step(rows if step != 3 else fed) for step in range(2 * STARVED_STEPS)]
    assert [step for step, notes in enumerate(told) if notes] == [STARVED_STEPS - 1, STARVED_STEPS + 3]
    assert "layer 0 expert 1 in" in told[STARVED_STEPS - 1][0]
    assert "layer 1 expert 0 in" in told[STARVED_STEPS + 3][0]
