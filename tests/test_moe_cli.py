"""`python -m moe`: what a person and a program see, and how each command fails."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from moe import cli
from moe.cost import FREE, Line, Profile
from moe.issue import Span
from moe.measuring import ExpertShape, profile_world
from moe.metrics import covered, load_balance, union
from moe.plan import LayerPlan
from moe.profiler import ProfileConfig
from moe.tracing import chosen, from_spans, read_events, write_events
from tests.spawn import ROOT, run_ranks

LOAD = ["--exchange-bytes", "4e6", "--expert-rows", "2000", "--gather-bytes", "8e6", "--gradient-bytes", "6e6"]


@pytest.fixture
def profile(tmp_path):
    link = Line(1e-3, 1e-8)
    made = Profile(
        all_to_all=link, all_reduce=link, all_gather=Line(1e-3, 4e-9), reduce_scatter=Line(1e-3, 4e-9),
        expert_forward=Line(1e-5, 2e-5), expert_backward=Line(1e-5, 4e-5), residuals={"all_to_all": 0.03},
    )  # fmt: skip
    path = tmp_path / "profile.json"
    path.write_text(made.to_json())
    return str(path)


def run(*arguments):
    return CliRunner().invoke(cli.app, list(arguments))


def failing(monkeypatch, capsys, *arguments):
    """Run as a process would; return its exit code and what it said."""
    monkeypatch.setattr(sys, "argv", ["moe", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, capsys.readouterr().err


def test_plan_as_json_and_as_text(profile, tmp_path):
    done = run("plan", "--profile", profile, *LOAD, "--json", "--out", str(tmp_path / "plan.json"))
    assert done.exit_code == 0
    made = json.loads(done.stdout)
    assert {"forward_chunks", "backward_chunks", "predicted_s", "predicted_serial_s", "reasons"} <= made.keys()
    assert made["predicted_s"] < made["predicted_serial_s"]
    assert LayerPlan.from_json((tmp_path / "plan.json").read_text()) == LayerPlan.from_json(done.stdout)
    text = run("plan", "--profile", profile, *LOAD).stdout
    assert text.startswith(
        f"chunks of a layer: forward r={made['forward_chunks']}, backward r={made['backward_chunks']};"
    )
    assert all(reason in text for reason in made["reasons"])
    assert text in (Path(__file__).parent.parent / "docs" / "moe_planner.md").read_text()


def test_simulate_follows_the_plan_and_its_events_can_be_drawn(profile, tmp_path):
    plan, events = tmp_path / "plan.json", tmp_path / "events.jsonl"
    run("plan", "--profile", profile, *LOAD, "--out", str(plan))
    done = run("simulate", "--profile", profile, *LOAD, "--plan", str(plan), "--events", str(events), "--json")
    shown = json.loads(done.stdout)
    end_s = max(e["t1_s"] for e in shown["events"])
    assert end_s == pytest.approx(shown["plan"]["predicted_backward_s"])
    assert len(shown["events"]) == 5 * shown["plan"]["backward_chunks"] + 1
    assert "dispatch 0" in run("simulate", "--profile", profile, *LOAD).stdout

    measured = tmp_path / "measured.jsonl"
    spans = [Span("inter", "3", "dispatch 0", 5_000, 9_000), Span("compute", "3", "expert", 9_000, 20_000)]
    write_events(measured, from_spans(spans, rank=0, step=7))
    assert read_events(measured)[0].name == "dispatch 0 3"
    svg, perfetto = tmp_path / "lanes.svg", tmp_path / "lanes.json"
    written = run("trace", str(measured), "--predicted", str(events), "--svg", str(svg), "--perfetto", str(perfetto))
    assert written.exit_code == 0
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    made = json.loads(perfetto.read_text())["traceEvents"]
    names = {e["args"]["name"] for e in made if e["name"] == "process_name"}
    assert names == {"predicted", "rank 0"}
    bar = next(e for e in made if e["ph"] == "X" and e["name"] == "dispatch 0 3")
    assert (bar["ts"], bar["dur"], bar["args"]["step"]) == (0, 4.0, 7)


def test_simulate_shows_what_the_plan_predicts_also_where_it_hides_nothing(profile, tmp_path):
    path = Path(profile)
    made = replace(Profile.from_json(path.read_text()), layer_s=0.02, expert_forward=Line(1e-5, 2e-3))
    path.write_text(made.to_json())
    done = run("simulate", "--profile", profile, *LOAD[:4], "--gradient-bytes", "2e5", "--json")
    shown = json.loads(done.stdout)
    assert (shown["plan"]["backward_chunks"], shown["plan"]["gradient_bytes"]) == (1, 0)
    assert f"backward r = 1: {shown['plan']['predicted_backward_s'] * 1e3:.2f} ms" in shown["plan"]["reasons"][1]
    assert not any("gradient" in e["op"] for e in shown["events"])
    total_s = max(e["t1_s"] for e in shown["events"]) + shown["layer_s"] + shown["gradients_afterwards_s"]
    assert total_s == pytest.approx(shown["plan"]["predicted_backward_s"])
    text = run("simulate", "--profile", profile, *LOAD[:4], "--gradient-bytes", "2e5").stdout
    assert "gradients left for afterwards: 3.00 ms more" in text
    assert text.endswith(f"backward in all: {total_s * 1e3:.2f} ms\n")


def test_bad_input_is_2_and_says_what_to_do(profile, tmp_path, monkeypatch, capsys):
    code, said = failing(monkeypatch, capsys, "plan", "--profile", str(tmp_path / "none.json"), *LOAD)
    assert code == 2
    assert "No such file" in said
    (tmp_path / "bad.json").write_text("[]")
    code, said = failing(monkeypatch, capsys, "plan", "--profile", str(tmp_path / "bad.json"), *LOAD)
    assert code == 2
    assert f"{tmp_path}/bad.json: not a profile" in said
    code, said = failing(monkeypatch, capsys, "plan", "--profile", profile, *LOAD, "--memory-bytes", "100")
    assert code == 2
    assert "raise the limit or give each rank fewer tokens" in said
    code, said = failing(monkeypatch, capsys, "plan", "--profile", profile, *LOAD, "--slice-bytes", "-1")
    assert (code, "slice_bytes is -1.0" in said) == (2, True)
    plain = tmp_path / "plain.json"
    known = Profile.from_json(Path(profile).read_text())
    plain.write_text(replace(known, all_gather=FREE, reduce_scatter=FREE).to_json())
    for command in ("plan", "simulate"):
        code, said = failing(monkeypatch, capsys, command, "--profile", str(plain), *LOAD)
        assert (code, "plain.json was measured without ranks that share experts" in said) == (2, True)
    code, said = failing(monkeypatch, capsys, "profile")
    assert code == 2
    assert "torchrun --nproc-per-node 4 -m moe profile" in said
    (tmp_path / "events.jsonl").write_text('{"rank": 0}\n')
    code, said = failing(monkeypatch, capsys, "trace", str(tmp_path / "events.jsonl"), "--svg", str(tmp_path / "x.svg"))
    assert code == 2
    assert "events.jsonl line 1 is no trace event" in said
    code, said = failing(monkeypatch, capsys, "trace", str(tmp_path / "events.jsonl"))
    assert (code, "give --perfetto FILE, --svg FILE or both" in said) == (2, True)
    good = {"rank": 0, "lane": "inter", "name": "dispatch 0", "t0_ns": 1, "t1_ns": 2}
    for change, text in (
        ({"rank": "a"}, "rank is 'a'; it must be an integer"),
        ({"name": 5}, "name is 5; it must be a text"),
        ({"t0_ns": "a", "t1_ns": "b"}, "t0_ns is 'a'; it must be a number of nanoseconds"),
        ({"predicted_ns": []}, "predicted_ns is []"),
    ):
        (tmp_path / "e.jsonl").write_text(json.dumps(good | change))
        code, said = failing(monkeypatch, capsys, "trace", str(tmp_path / "e.jsonl"), "--svg", str(tmp_path / "x.svg"))
        assert (code, text in said) == (2, True), said
    (tmp_path / "e.jsonl").write_text(json.dumps(good))
    code, said = failing(monkeypatch, capsys, "trace", str(tmp_path / "e.jsonl"), "--svg", str(tmp_path / "x.xyz"))
    assert (code, "x.xyz has the suffix of no picture; use one of" in said) == (2, True)
    for option, value in (("--exchange-bytes", "nan"), ("--expert-rows", "inf"), ("--memory-bytes", "0")):
        code, said = failing(monkeypatch, capsys, "plan", "--profile", profile, *LOAD, option, value)
        assert code == 2
        assert f"{option[2:].replace('-', '_')} is {float(value)}" in said
    (tmp_path / "bad.json").write_bytes(bytes(range(256)))
    for command in (
        ["plan", "--profile", str(tmp_path / "bad.json"), *LOAD],
        ["simulate", "--profile", profile, *LOAD, "--plan", str(tmp_path / "bad.json")],
        ["trace", str(tmp_path / "bad.json"), "--svg", str(tmp_path / "x.svg")],
    ):
        code, said = failing(monkeypatch, capsys, *command)
        assert (code, said.startswith("error: "), said.count("\n")) == (2, True, 1)
    code, said = failing(monkeypatch, capsys, "profile", "--experts", "0")
    assert (code, "experts have count 0; it must be at least 1" in said) == (2, True)
    assert run("plan", "--profile", profile).exit_code == 2
    assert run("netns", "up", "--inter-mbit", "fast").exit_code == 2


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"all_to_all": {"alpha_s": -1, "beta_s": 0}}, "-1 is no cost"),
        ({"all_to_all": {"alpha_s": "1", "beta_s": 0}}, "'1' is no cost"),
        ({"expert_forward": {"sizes": [], "times_s": []}}, "are no table"),
        ({"expert_forward": {"sizes": [2, 1], "times_s": [1, 2]}}, "are no table"),
        ({"expert_forward": {"sizes": [1, 2], "times_s": [1]}}, "are no table"),
        ({"layer_s": "x"}, "not a profile"),
        ({"slowdowns": {"inter+intra": float("inf")}}, "give a factor of at least 1"),
        ({"slowdowns": {"inter+intra": 1e300}}, "give a factor of at least 1, and at most 1e+06"),
        ({"residuals": {"all_to_all": "x"}}, "'x' is no cost"),
        ({"all_to_all": {"alpha_s": 1e300, "beta_s": 1e300}}, "an all-to-all comes to 4e+306 s; look at the units"),
        ({"all_reduce": {"alpha_s": 0, "beta_s": 1e300}}, "s; look at the units of the profile and of the load"),
    ],
)
def test_a_profile_that_was_changed_by_hand_is_refused(profile, tmp_path, monkeypatch, capsys, change, text):
    (tmp_path / "changed.json").write_text(json.dumps(json.loads(Path(profile).read_text()) | change))
    code, said = failing(monkeypatch, capsys, "plan", "--profile", str(tmp_path / "changed.json"), *LOAD)
    assert (code, text in said) == (2, True), said


def test_a_plan_that_cannot_be_written_is_printed(profile, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["moe", "plan", "--profile", profile, *LOAD, "--out", str(tmp_path / "no" / "p")])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    said = capsys.readouterr()
    assert "No such file" in said.err
    assert LayerPlan.from_json(said.out.splitlines()[-1]).reasons


def test_one_pass_of_one_layer_is_taken_from_a_timeline(tmp_path, monkeypatch, capsys):
    ops = ["exchange of counts", "dispatch 0", "backward dispatch 0", "gradient 3", "dispatch 0", "dispatch 1"]
    spans = [Span("inter", "a.1", op, 10 * n, 10 * n + 5) for n, op in enumerate(ops)]
    spans += [Span("intra", "a.1", "exchange of counts", 5, 9), Span("inter", "flush", "gradient 4", 90, 99)]
    events = from_spans(reversed(spans), rank=0)
    assert [e.mb for e in events] == [0, 0, 0, 0, 0, 1, 1, 0]
    assert [e.t0_ns for e in chosen(events, layer="a.1", way="forward", mb=1)] == [40, 50]
    backward = chosen(events, layer="a.1", way="backward")
    assert [e.name for e in backward] == ["backward dispatch 0 a.1", "gradient 3 a.1"]
    path = tmp_path / "measured.jsonl"
    write_events(path, events)
    wanted = ["trace", str(path), "--perfetto", str(tmp_path / "x.json"), "--layer"]
    assert json.loads(run(*wanted, "a.1", "--way", "forward", "--mb", "0", "--json").stdout)["events"] == 3
    code, said = failing(monkeypatch, capsys, *wanted, "a.2", "--way", "forward")
    assert (code, "no event of layer a.2, forward, pass any; the layers are a.1, flush" in said) == (2, True)


def test_help_names_every_command():
    done = subprocess.run(
        [sys.executable, "-m", "moe", "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    assert all(name in done.stdout for name in ("profile", "plan", "simulate", "trace", "netns"))


def profiled(info, esp):
    config = ProfileConfig(most_bytes=1 << 18, most_rows=64, sizes=3, tries=1, repeats=1)
    return profile_world(config, esp=esp, experts=ExpertShape(width=16, inner=16, count=2)).to_json()


def test_profile_measures_links_and_real_experts():
    texts = run_ranks(profiled, 4, 2)
    assert len(set(texts)) == 1
    made = Profile.from_json(texts[0])
    assert made.all_gather(1e5) > 0
    assert made.expert_backward(64) > 0
    plain = Profile.from_json(run_ranks(profiled, 2, 1)[0])
    assert plain.all_gather(1e5) == 0


@pytest.mark.timeout(150)
def test_the_command_profiles_under_torchrun_and_the_plan_reads_it(tmp_path):
    out, run_under = tmp_path / "profile.json", [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    sizes = ["--width", "16", "--inner", "16", "--most-bytes", "262144", "--most-rows", "64", "--tries", "1"]
    command = [*run_under, "--nproc-per-node", "2", "-m", "moe", "profile", *sizes, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all_to_all") == 1  # of one rank
    assert "the executor itself" in done.stdout
    made = run("plan", "--profile", str(out), "--exchange-bytes", "1e5", "--expert-rows", "64", "--json")
    assert json.loads(made.stdout)["predicted_s"] > 0


def test_load_balance():
    even = load_balance([5, 5, 5, 5])
    assert (even["moe/imbalance"], even["moe/entropy"], even["moe/dead"]) == (1.0, pytest.approx(1.0), 0.0)
    one = load_balance([8, 0], prefix="layer 3")
    assert one == {
        "layer 3/imbalance": 2.0, "layer 3/entropy": 0.0, "layer 3/dead": 1.0, "layer 3/expert_0": 1.0,
        "layer 3/expert_1": 0.0,
    }  # fmt: skip
    assert load_balance([0, 0])["moe/dead"] == 2.0


def test_covered():
    assert union([(5, 6), (0, 2), (1, 3), (4, 4)]) == [(0, 3), (5, 6)]
    assert covered([(0, 10)], [(2, 3), (2, 4), (9, 12)]) == 3
    assert covered([], [(0, 1)]) == 0
