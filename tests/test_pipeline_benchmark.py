"""The ways of `benchmarks.pipeline` do the same work, its peers are the best of their kind, and plans are kept."""

import json

import pytest
import torch

from benchmarks.pipeline import main
from benchmarks.pipeline_model import Shape, build, one_step
from benchmarks.pipeline_peers import FixedOrder, best_peer, best_peers
from benchmarks.pipeline_plans import PlanFile
from benchmarks.pipeline_real import claims_of_real, imbalance, speedups
from benchmarks.pipeline_ways import RoundPipe, TorchPipeline, gradient_apart
from launch.slot_layers import SlotLayers
from launch.split import DecoderArguments
from pipeline.comms import complete
from pipeline.costs import Costs
from pipeline.roundpipe.planner import evaluate
from pipeline.roundpipe.search import Problem
from pipeline.roundpipe.slots import LayerCosts
from pipeline.schedules import SCHEDULES
from pipeline.schedules.build import balanced_stages, with_recompute
from pipeline.schedules.roundpipe import Slots
from pipeline.simulate import simulate
from tests.spawn import run_ranks

FORWARD_S = (0.5, 1.0, 1.5, 1.0, 2.0, 1.0, 5.0)
COSTS = Costs(forward_s=(FORWARD_S,), backward_s=(tuple(2 * t for t in FORWARD_S),), hop_s=0.1)


def running(row):
    return [sum(row[:n]) for n in range(len(row) + 1)]


@pytest.mark.parametrize(("name", "stages"), [("1f1b", 2), ("interleaved", 4)])
def test_the_longest_path_is_what_the_simulator_says(name, stages):
    more = {"stages_per_device": 2} if name == "interleaved" else {}
    bounds = balanced_stages(FORWARD_S, stages)
    schedule = SCHEDULES[name](devices=2, microbatches=4, layers=bounds, **more)
    schedule = with_recompute(schedule, keep_last_stage=True)
    found = FixedOrder(schedule).makespan_s(bounds, running(FORWARD_S), running(COSTS.backward_s[0]), 0.1)
    assert found == pytest.approx(simulate(complete(schedule), COSTS).makespan_s, rel=1e-9)


def test_peers_get_the_best_split_of_all_and_keep_what_they_need_at_once():
    best = best_peer("1f1b", COSTS, devices=2, microbatches=4, stages=2, keep_last=True)
    assert best.exhaustive
    every = []
    for border in range(1, 7):
        schedule = SCHEDULES["1f1b"](devices=2, microbatches=4, layers=((0, border), (border, 7)))
        every.append(simulate(complete(with_recompute(schedule, keep_last_stage=True)), COSTS).makespan_s)
    assert best.makespan_s == pytest.approx(min(every))
    assert {str(a.op.value) for a in best.schedule.of(1)} == {"RECV", "F", "B", "SEND"}  # the last recomputes nothing
    both = best_peers(COSTS, devices=2, microbatches=4, keep_last=True)
    assert {peer.name for peer in both} == {"1f1b", "interleaved"}
    assert both[0].makespan_s <= best.makespan_s
    assert both[0].makespan_s < best_peers(COSTS, devices=2, microbatches=4, keep_last=False)[0].makespan_s


def test_a_plan_is_searched_once(tmp_path):
    costs = LayerCosts(forward_s=FORWARD_S, backward_s=COSTS.backward_s[0])
    settings = {"num_devices": 2, "num_microbatches": 2, "effort": 0.001}
    first = PlanFile(tmp_path / "plans.json").plan(costs, **settings)
    again = PlanFile(tmp_path / "plans.json")
    assert again.plan(costs, **settings) == first
    assert again.kept({"plan": "other"}, lambda: [1]) == [1]
    assert again.kept({"plan": "other"}, lambda: [2]) == [1]


def rank_trains(info):
    """Two steps of each way; losses, and how far gradients are apart."""
    torch.set_num_threads(1)
    shape = Shape(name="tiny", layers=3, head=0.1, tokens=16, microbatches=4)
    model = build(shape)
    batch = one_step(shape, model.config.vocab_size)
    arguments, layers = DecoderArguments(model), SlotLayers(model, torch.device("cpu"))
    splits = [((0, 2), (2, 6)), ((0, 1), (1, 3), (3, 4), (4, 6))]
    peers = [TorchPipeline(layers.pieces, arguments, batch, split, width=256) for split in splits]
    costs = LayerCosts(forward_s=(1.0,) * 6, backward_s=(2.0,) * 6)
    problem = Problem(costs=costs, rounds=(2, 2), num_devices=2, open_slots=2)
    plan = evaluate(problem, Slots(forward=(2, 2), fused=2, backward=(2, 2)))
    ours = RoundPipe(layers, plan, batch, room=16 * 256 * 4, cap_bytes=None)
    first = [way.step() for way in (ours, *peers)]
    apart = [gradient_apart(ours, peer) for peer in peers]
    second = [way.step() for way in (ours, *peers)]
    ours.close()
    return first, second, apart


def test_every_way_does_the_same_work():
    for first, second, apart in run_ranks(rank_trains, 2):
        assert first == pytest.approx([first[0]] * 3, rel=1e-5)
        assert second == pytest.approx([second[0]] * 3, rel=1e-4)
        assert second[0] < first[0]
        assert max(apart) < 1e-3


def test_the_target_depends_on_whether_the_peer_can_balance():
    way = {"losses": [2.0, 1.0], "seconds": [3.0, 3.3]}
    row = {
        "part": "real", "model": "x", "gradients_apart": {"1f1b": 1e-6}, "copies_s": 0.1, "loads": {"1f1b": [3.0, 1.0]},
        "ways": {"ours": {**way, "seconds": [2.0, 2.0], "simulated_s": 2.0}, "1f1b": {**way, "simulated_s": 3.0}},
    }  # fmt: skip
    assert (imbalance(row), speedups(row)) == (1.5, [1.5, 1.65])
    speed, losses, gradients = claims_of_real([row])
    assert (speed.target, speed.met, losses.value, gradients.met) == (">= 1.1", True, 0.0, True)
    speed = claims_of_real([{**row, "loads": {"1f1b": [1.0, 1.0]}}])[0]
    assert speed.target == ">= 0.97"


def test_the_command_reports_what_was_measured_and_fails_where_a_target_is_missed(tmp_path, capsys):
    row = {
        "part": "capped", "model": "deep", "quick": True, "model_bytes": 800, "cap_bytes": 100, "peak_bytes": 90,
        "peer_bytes": 400, "seconds": [1.0], "losses": [2.0], "peer_losses": [2.0],
    }  # fmt: skip
    path = tmp_path / "rows.json"
    for peak, code in ((90, 0), (110, 1)):
        path.write_text(json.dumps({"rows": [{**row, "peak_bytes": peak}]}))
        with pytest.raises(SystemExit) as ended:
            main(["--report", "--json", str(path), "--plans", str(tmp_path / "plans.json")])
        assert ended.value.code == code
        assert "what a peer's rank needs over the cap: 4.000 x (target >= 2): met" in capsys.readouterr().out
        assert [claim["met"] for claim in json.loads(path.read_text())["claims"]] == [True, not code, True]
