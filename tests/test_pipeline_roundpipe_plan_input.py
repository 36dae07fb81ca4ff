"""What the planner of RoundPipe refuses, in costs, files and on the command line; and the command."""

import json

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.errors import PlanError
from pipeline.roundpipe.planner import RoundPipePlan, evaluate, plan
from pipeline.roundpipe.search import Problem
from pipeline.roundpipe.slots import LayerCosts
from pipeline.schedules.roundpipe import Slots
from tests.roundpipe_plans import uniform


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partition": 3}, "no plan of RoundPipe as JSON: TypeError"),
        ({"partition": {"forward": [10**15], "fused": 1, "backward": [1]}}, "no plan|ends|layers"),
        ({"partition": {"forward": [1.5], "fused": 1, "backward": [1]}}, "no plan of RoundPipe as JSON: TypeError"),
        ({"order": [[{"round": 0, "slot": 0}]]}, "no plan of RoundPipe as JSON: TypeError"),
        ({"order": [[]]}, "the order has 0 pairs on 1 devices"),
        ({"rounds": [10**4]}, "micro-batches once, on 2 devices"),
        ({"rounds": [10**12]}, "micro-batches; their product may be"),
        ({"rounds": []}, "no plan|at least one"),
        ({"num_devices": -1}, "no plan|devices"),
        ({"colour": 3}, "no plan of RoundPipe as JSON: TypeError"),
        ({"order": None}, "no plan of RoundPipe as JSON: TypeError"),
    ],
)
def test_whatever_is_in_a_file_is_a_plan_or_one_clear_error(changes, message):
    good = plan(uniform(4), num_devices=2, num_microbatches=3, effort=0.01).to_json()
    assert RoundPipePlan.from_json(good).num_devices == 2
    with pytest.raises(PlanError, match=message):
        RoundPipePlan.from_json(good | changes)
    with pytest.raises(PlanError, match="no plan of RoundPipe"):
        RoundPipePlan.from_json([1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"forward": (1,), "fused": 1, "backward": (2,)}, "runs 2 layers backward and 1 forward"),
        ({"forward": (2, 0), "fused": 1, "backward": (2,)}, "every slot holds at least one"),
        ({"forward": (2,), "fused": 0, "backward": (2,)}, "every slot holds at least one"),
    ],
)
def test_partitions_that_are_none_are_refused(arguments, message):
    with pytest.raises(PlanError, match=message):
        Slots(**arguments)


def test_costs_that_are_none_are_refused():
    with pytest.raises(PlanError, match="3 forward and 2 backward costs"):
        LayerCosts(forward_s=(1.0,) * 3, backward_s=(1.0,) * 2)
    with pytest.raises(PlanError, match="positive finite"):
        LayerCosts(forward_s=(1.0, float("nan")), backward_s=(1.0, 1.0))
    problem = Problem(costs=uniform(4), rounds=(2,), num_devices=2, open_slots=1)
    with pytest.raises(PlanError, match="the partition cuts 3 layers, the costs are of 4"):
        evaluate(problem, Slots(forward=(2,), fused=1, backward=(2,)))
    with pytest.raises(PlanError, match="leave nothing to deal"):
        plan(uniform(1), num_devices=2, num_microbatches=2)


def test_the_plan_command(tmp_path):
    (tmp_path / "costs.json").write_text(json.dumps({"forward_s": [1] * 5 + [3], "backward_s": [2] * 5 + [6]}))
    words = ["plan", "--costs", str(tmp_path / "costs.json"), "--ranks", "2", "--microbatches", "4", "--effort", "0.01"]
    text = CliRunner().invoke(app, words)
    assert text.exit_code == 0
    assert "round(s)" in text.output
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).output)
    again = RoundPipePlan.from_json(found)
    assert again.num_devices == 2
    assert " s, " in text.output
    words = ["plan", "--layers", "4", "--ranks", "2", "--microbatches", "2", "--effort", "0.001"]
    text = CliRunner().invoke(app, words)
    assert " units, bubble" in text.output
    assert " s, " not in text.output


def test_the_plan_command_tells_bad_input_from_no_plan(tmp_path):
    costs = tmp_path / "costs.json"
    good = {"forward_s": [1] * 4, "backward_s": [2] * 4, "weight_bytes": 100}
    for numbers, words, code, said in (
        (good, ["--memory-cap", "150"], 1, "layer 0 has 200 of them); the cap is 150; raise it to 300"),
        (good, ["--memory-cap", "210"], 1, "the cap is 210; raise it to 300"),
        (good | {"forward_s": [0] * 4}, [], 2, "costs are positive finite seconds"),
        (good | {"boundary_bytes": [1, 2]}, [], 2, "boundary_bytes of the costs is of 2 micro-batches; 8 were asked"),
        ({"forward_s": [1], "backward_s": [2]}, [], 2, "the costs are of one layer"),
        ({}, [], 2, "cannot read costs"),
    ):
        costs.write_text(json.dumps(numbers))
        done = CliRunner().invoke(app, ["plan", "--costs", str(costs), "--ranks", "2", "--effort", "0.01", *words])
        assert done.exit_code == code, done.output
        assert said in done.output
        assert len(done.output.splitlines()) == 1
