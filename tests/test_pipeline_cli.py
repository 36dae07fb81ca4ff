"""`python -m pipeline`: real output, exit codes, and the files it writes."""

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.costs import Costs
from pipeline.errors import PlanError
from pipeline.render import gantt_svg, perfetto, trace_events
from pipeline.schedule import Schedule
from pipeline.schedules import SCHEDULES
from pipeline.simulate import simulate
from pipeline.torch_csv import load_csv


def call(*words, exit_code=0):
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == exit_code, result.output
    return result.output


@pytest.fixture
def costs_file(tmp_path):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"forward_s": [1, 1, 1, 1, 2], "backward_s": [2, 2, 2, 2, 4], "activation_bytes": 10}))
    return path


def test_show_prints_the_table_of_the_docs():
    assert call("show", "1f1b", "--ranks", 3, "--microbatches", 3).splitlines() == [
        "      device 0 device 1 device 2",
        "   0: 0F0      1F0      2F0",
        "   1: 0F1      1F1      2B0",
        "   2: 0F2      1B0      2F1",
        "   3: 0B0      1F2      2B1",
        "   4: 0B1      1B1      2F2",
        "   5: 0B2      1B2      2B2",
    ]


def test_every_form_is_read_back_from_a_file(tmp_path):
    made = SCHEDULES["interleaved"](devices=2, microbatches=4)
    for form, read in (("json", Schedule.from_json), ("text", Schedule.from_text), ("csv", load_csv)):
        text = call("show", "interleaved", "--ranks", 2, "--microbatches", 4, "--form", form)
        assert read(text).devices == made.devices
        path = tmp_path / f"s.{'txt' if form == 'text' else form}"
        path.write_text(text)
        got = json.loads(call("simulate", path, "--json"))
        assert got["makespan"] == simulate(made, Costs.uniform(4)).makespan_s


def test_simulate_gives_the_golden_value():
    got = json.loads(call("simulate", "1f1b", "--ranks", 4, "--microbatches", 4, "--json"))
    assert got["makespan"] == 21
    assert round(100 * got["bubble"]["total"], 2) == 42.86
    assert got["bubble"].keys() == {"total", "fill", "switch", "drain", "imbalance", "transfer"}
    assert len(got["peak_bytes"]) == 4
    assert got["critical_path"][0] == "0F0@0"


def test_simulate_exits_1_over_the_cap_and_2_on_bad_input(costs_file, tmp_path):
    call("simulate", "gpipe", "--ranks", 2, "--costs", costs_file, "--memory-cap", "1KiB")
    over = call("simulate", "gpipe", "--ranks", 2, "--costs", costs_file, "--memory-cap", "60", exit_code=1)
    assert "240 bytes are on device 0, and the cap is 60: 180 too many. Recompute activations" in over
    assert "<-- here, device 0" in over
    assert "there is no schedule 'nosuch'" in call("simulate", "nosuch", exit_code=2)
    for cap in ("much", "1.2.3", "1e999", "nan"):
        assert "write 24GiB" in " ".join(call("simulate", "1f1b", "--memory-cap", cap, exit_code=2).split())
    assert "cannot read costs" in call("simulate", "1f1b", "--costs", tmp_path / "none.json", exit_code=2)
    assert "a multiple of 4" in call("simulate", "interleaved", "--stages", 6, exit_code=2)
    assert "5 layers do not fill 8 stages" in call("simulate", "1f1b", "--ranks", 8, "--costs", costs_file, exit_code=2)


def test_over_the_cap_there_is_json_too(costs_file):
    words = ("simulate", "gpipe", "--ranks", 2, "--costs", costs_file, "--json", "--memory-cap")
    over = CliRunner().invoke(app, [*map(str, words), "60"])
    assert over.exit_code == 1
    found = json.loads(over.stdout)
    assert (found["peak_bytes"], found["memory_cap"], found["over_cap"]) == ([240, 160], 60, True)
    assert found["reason"].startswith("240 bytes are on device 0, and the cap is 60")
    within = json.loads(call(*words, 240))
    assert (within["memory_cap"], within["over_cap"], within["reason"]) == (240, False, None)
    said = call(
        "simulate", "gpipe", "--ranks", 2, "--costs", costs_file, "--recompute", "--memory-cap", 10, exit_code=1
    )
    assert "Nothing is left to recompute: use shorter micro-batches, more ranks, or roundpipe" in said


def test_times_have_the_unit_of_the_costs(costs_file, tmp_path):
    for words, unit in ((("--costs", costs_file), "s"), ((), "units")):
        for command in (("simulate", "1f1b"), ("compare",)):
            svg = tmp_path / "a.svg"
            assert f"makespan ({unit})" in call(*command, "--ranks", 2, *words, "--svg", svg)
            assert re.search(rf"makespan \d+ {unit},", svg.read_text())
            assert json.loads(call(*command, "--ranks", 2, *words, "--json"))["unit"] == unit


def test_a_file_is_what_it_is(tmp_path, costs_file):
    """Settings that it has are taken as said, others refused."""
    path = tmp_path / "two.json"
    path.write_text(call("show", "1f1b", "--ranks", 2, "--microbatches", 3, "--form", "json"))
    same = ("--ranks", 2, "--microbatches", 3, "--stages", 2, "--rounds", 1)
    assert call("simulate", path, *same) == call("simulate", path)
    for command in (("show",), ("simulate",), ("trace", "--out", tmp_path / "trace.json")):
        for words, said in (
            (("--ranks", 4), f"{path} has 2 ranks, and --ranks is 4; leave it out"),
            (("--microbatches", 4), "has 3 microbatches, and --microbatches is 4"),
            (("--stages", 4), "has 2 stages, and --stages is 4"),
            (("--rounds", 2), "has 1 rounds, and --rounds is 2"),
            (("--open-slots", 2), "has its actions already, and --open-slots changes none"),
            (("--recompute",), "has its actions already, and --recompute changes none"),
        ):
            assert said in call(*command, path, *words, exit_code=2)
    assert "has 2 layers, and the costs are of 5" in call("simulate", path, "--costs", costs_file, exit_code=2)
    said = call("show", path, "--costs", costs_file, exit_code=2)
    assert "cut already" in " ".join(said.replace("│", " ").split())


def test_a_plan_is_a_schedule(tmp_path, costs_file):
    path = tmp_path / "plan.json"
    words = ("--ranks", 2, "--costs", costs_file)
    path.write_text(call("plan", *words, "--microbatches", 4, "--effort", 0.01, "--json"))
    plan = json.loads(path.read_text())
    assert json.loads(call("simulate", path, *words, "--json"))["makespan"] == pytest.approx(plan["makespan_s"])
    first = plan["order"][0][0]
    assert call("show", path).splitlines()[1].split()[1] == f"{first['slot']}F{first['microbatch']}"
    path.write_text(json.dumps({**plan, "order": 3}))
    assert "no plan of RoundPipe" in call("show", path, exit_code=2)
    assert "this JSON is no schedule: it has activation_bytes, backward_s" in call("show", costs_file, exit_code=2)


def test_an_option_is_not_completed_and_the_nearest_is_named():
    assert "--ranks" in call("show", "1f1b", "--rank", 3, exit_code=2)


@pytest.mark.parametrize("command", ["show", "simulate"])
@pytest.mark.parametrize(
    ("name", "text"),
    [("a.json", "{"), ("b.json", "[1, 2]"), ("c.csv", "0F0,,x"), ("d.txt", "schedule x\nmicrobatches 1 colour 2"),
     ("e.json", '{"format_version": 1, "name": "x", "num_microbatches": 1, "stages": [[0, 1]], "devices": {"0": 1}}')],
)  # fmt: skip
def test_a_file_that_is_no_schedule_is_bad_input(tmp_path, command, name, text):
    (tmp_path / name).write_text(text)
    assert call(command, tmp_path / name, exit_code=2).startswith("error: ")


@pytest.mark.parametrize(
    "text",
    ["[", "[]", "3", '{"forward_s": 1}', '{"forward_s": "a", "backward_s": "b"}', '{"forward_s": [], "backward_s": []}',
     '{"forward_s": [null], "backward_s": [1]}', '{"forward_s": [NaN], "backward_s": [1]}',
     '{"forward_s": [1], "backward_s": [Infinity]}', '{"forward_s": [1e308, 1e308], "backward_s": [1, 1]}',
     '{"forward_s": [1, 1], "backward_s": [1, 1], "hop_s": 1' + "0" * 400 + "}", "[" * 10**6,
     '{"forward_s": [1], "backward_s": [1], "hop_s": [1]}',
     '{"forward_s": [1], "backward_s": [1], "hop_s": "1"}', '{"forward_s": [1], "backward_s": [1], "pcie_roots": [0]}',
     '{"forward_s": [1, 1], "backward_s": [1, 1], "link_bytes_per_s": 0}',
     '{"forward_s": [1, 1], "backward_s": [1, 1], "chunk_bytes": 0}',
     '{"forward_s": [1, 1], "backward_s": [1, 1], "boundary_bytes": []}',
     '{"forward_s": [1, 1], "backward_s": [1, 1], "input_share": 2}',
     '{"forward_s": [1, 1], "backward_s": [1, 1], "colour": 1}',
     '{"forward_s": [1, 1], "backward_s": [1, 1], "weight_bytes": [1, 1, 1]}',
     '{"forward_s": [1, 1], "backward_s": [1, 1], "activation_bytes": [[1, 1], []]}',
     '{"forward_s": [[1, 1], null], "backward_s": [1, 1]}',
     '{"forward_s": [1, 1], "backward_s": [1, 1], "hop_s": null}',
     '{"forward_s": [1, 1], "backward_s": [1, 1], "weight_bytes": null}'],
)  # fmt: skip
def test_costs_that_are_none_are_bad_input(tmp_path, text):
    (tmp_path / "costs.json").write_text(text)
    words = ("1f1b", "--ranks", 2, "--microbatches", 2, "--costs", tmp_path / "costs.json")
    said = call("simulate", *words, exit_code=2)
    assert said.startswith("error: ")
    assert len(said) < 1000


def test_a_broken_file_is_a_failed_check(tmp_path):
    broken = tmp_path / "broken.csv"
    broken.write_text("0F0,0B0\n1F0\n")
    assert "nothing makes its output gradient" in call("simulate", broken, exit_code=1)


def test_files_that_cannot_be_written_are_one_line(tmp_path):
    nowhere = tmp_path / "none" / "x"
    for words in (("simulate", "1f1b", "--svg"), ("compare", "--svg"), ("trace", "1f1b", "--out")):
        said = call(*words, nowhere, exit_code=2)
        assert said.startswith(f"error: cannot write {nowhere}: ")
        assert len(said.splitlines()) == 1


def test_costs_say_what_is_wrong_with_them(tmp_path):
    path, rows = tmp_path / "costs.json", {"forward_s": [1, 1], "backward_s": [2, 2]}
    cases = [
        ({**rows, "boundary_bytes": [1, 2, 3]}, "numbers for 3 micro-batches; the schedule has a micro-batch"),
        ({**rows, "activations": 1}, "costs hold ['activations']"),
        ({"forward_s": [1]}, "costs lack ['backward_s']"),
        ({"forward_s": [], "backward_s": []}, "holds no layers"),
        ([1, 2], "costs are a list"),
    ]
    for given, expected in cases:
        path.write_text(json.dumps(given))
        assert expected in call("simulate", "1f1b", "--ranks", 2, "--microbatches", 4, "--costs", path, exit_code=2)


def test_settings_that_would_be_ignored_are_refused(tmp_path, costs_file):
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps({"forward_s": [1, 1], "backward_s": [2, 2]}))
    for words in (("simulate", "1f1b", "--ranks", 2), ("compare", "--ranks", 2), ("plan", "--ranks", 2)):
        said = call(*words, "--costs", bare, "--memory-cap", "1GiB", exit_code=2)
        assert "weight_bytes or activation_bytes" in " ".join(said.replace("│", " ").split())
    assert "roundpipe always recomputes" in call("show", "roundpipe", "--recompute", exit_code=2)
    for command in ("compare", "plan"):
        said = call(command, "--costs", costs_file, "--layers", 7, exit_code=2)
        assert "those of --costs" in " ".join(said.split())
    assert "leave the stages out" in call("show", "roundpipe", "--costs", costs_file, "--stages", 3, exit_code=2)


def test_compare_where_nothing_fits_or_costs_anything(tmp_path, costs_file):
    said = call("compare", "--ranks", 2, "--costs", costs_file, "--memory-cap", 1, exit_code=1)
    assert "makespan" not in said
    assert said.count("the cap is 1:") == len(SCHEDULES)
    assert said.count("gpipe") == 1
    free = tmp_path / "free.json"
    free.write_text(json.dumps({"forward_s": [0] * 4, "backward_s": [0] * 4}))
    assert "makespan" in call("compare", "--ranks", 2, "--costs", free)


def test_stages_are_balanced_by_all_microbatches(tmp_path):
    """The first micro-batch alone would have the heavy layer elsewhere."""
    path = tmp_path / "costs.json"
    rows = [[9, 1, 1, 1], *[[1, 1, 1, 9]] * 3]
    path.write_text(json.dumps({"forward_s": rows, "backward_s": rows}))
    shown = call("show", "1f1b", "--ranks", 2, "--microbatches", 4, "--costs", path, "--form", "json")
    assert json.loads(shown)["stages"] == [[0, 3], [3, 4]]


def test_compare_lists_all_schedules_best_first(costs_file, tmp_path):
    svg = tmp_path / "compare.svg"
    words = ("--ranks", 2, "--microbatches", 6, "--costs", costs_file, "--recompute", "--rounds", 6, "--open-slots", 3)
    got = json.loads(call("compare", *words, "--svg", svg, "--json"))
    assert {r["name"] for r in got["results"]} == SCHEDULES.keys()
    spans = [r["makespan"] for r in got["results"]]
    assert spans == sorted(spans)
    assert ET.fromstring(svg.read_text()).tag.endswith("svg")
    narrow = json.loads(call("compare", "--ranks", 4, "--costs", costs_file, "--json"))
    assert narrow["refused"].keys() == {"interleaved", "looped_bfs", "zbv"}
    assert "roundpipe" in call("compare", *words)


def test_trace_puts_the_measured_run_beside_the_prediction(tmp_path):
    schedule = SCHEDULES["1f1b"](devices=2, microbatches=3)
    events = trace_events(schedule, simulate(schedule, Costs.uniform(2)))
    measured = [{**e, "t0_ns": 10**12 + 2 * e["t0_ns"], "t1_ns": 10**12 + 2 * e["t1_ns"]} for e in events]
    lines, out = tmp_path / "events.jsonl", tmp_path / "trace.json"
    lines.write_text("\n".join(map(json.dumps, measured)))
    call("trace", "1f1b", "--ranks", 2, "--microbatches", 3, "--out", out, "--measured", lines)
    found = [e for e in json.loads(out.read_text())["traceEvents"] if e["ph"] == "X"]
    run = [e for e in found if e["pid"] == 1]
    assert len(run) == 12
    assert min(e["ts"] for e in run) == 0
    assert max(e["ts"] + e["dur"] for e in run) == 2 * 12e6  # microseconds
    assert {e["args"]["predicted_us"] for e in run} == {1e6, 2e6}
    folder = tmp_path / "trace"
    folder.mkdir()
    words = ("trace", "1f1b", "--ranks", 2, "--microbatches", 3, "--out", out, "--measured", folder)
    assert "the folder has no rank-*.jsonl" in call(*words, exit_code=2)
    for rank in range(2):
        mine = [json.dumps(e) for e in measured if e["rank"] == rank]
        (folder / f"rank-{rank:05}.jsonl").write_text("\n".join(mine))
    call(*words)
    ranks = [e for e in json.loads(out.read_text())["traceEvents"] if e["ph"] == "X" and e["pid"] == 1]
    assert sorted(e["name"] for e in ranks) == sorted(e["name"] for e in run)
    for text, error in (
        ('{"rank": 0}', "lacks"),
        ("[1, 2]", "lacks"),
        (json.dumps({**measured[0], "t0_ns": "now"}), "t0_ns now; rank and times are numbers"),
        (json.dumps({**measured[0], "predicted_ns": [1]}), "predicted_ns [1]"),
        ("[" * 10**6, "cannot read events"),
    ):
        lines.write_text(text + "\n")
        said = call("trace", "1f1b", "--ranks", 2, "--out", out, "--measured", lines, exit_code=2)
        assert said.startswith("error: ")
        assert error in said


def test_a_gantt_chart_has_a_bar_for_every_compute_action():
    result = simulate(SCHEDULES["zb_h1"](devices=3, microbatches=4), Costs.uniform(3))
    root = ET.fromstring(gantt_svg([result]))
    bars = [e.get("fill") for e in root.iter() if e.tag.endswith("rect") and len(e)]
    legend = [e.get("fill") for e in root.iter() if e.tag.endswith("rect") and not len(e)]
    assert len(bars) == 3 * 4 * 3
    assert set(bars) <= set(legend)
    assert len(legend) == 3
    assert root.get("viewBox") == f"0 0 {root.get('width')} {root.get('height')}"
    with pytest.raises(PlanError, match="lacks"):
        perfetto({"x": [{"rank": 0}]})


def test_costs_read_themselves_back_and_refuse_what_they_do_not_know():
    costs = Costs.uniform(3, hop_s=0.5, pcie_roots=(0, 0, 1), weight_bytes=(1, 2, 3)).scaled((1, 2))
    assert Costs.from_json(json.dumps(costs.to_json())) == costs
    assert costs.forward(1, (0, 2)) == 4
    for text, message in (
        ('{"forward_s": 1}', "need forward_s and backward_s"),
        ('{"forward_s": [1, 1], "backward_s": [1]}', "all need 2"),
        ('{"forward_s": 1, "backward_s": -1}', "negative"),
        ('{"forward_s": 1, "backward_s": 1, "colour": 3}', "may have"),
    ):
        with pytest.raises(PlanError, match=message):
            Costs.from_json(text)
    with pytest.raises(PlanError, match="costs have rows for 2 micro-batches; the schedule has a micro-batch 2"):
        simulate(SCHEDULES["1f1b"](devices=3, microbatches=3), costs)
    with pytest.raises(PlanError, match="costs have 2 layers; the schedule has a stage of layers 2:3"):
        simulate(SCHEDULES["1f1b"](devices=3, microbatches=3), Costs.uniform(2))


def test_the_docs_show_real_output():
    text = (Path(__file__).parent.parent / "docs" / "pipeline.md").read_text()
    blocks = re.findall(r"```\n\$ python -m pipeline (.*)\n((?:.*\n)*?)```", text)
    assert len(blocks) == 2
    for command, output in blocks:
        printed = [line.rstrip() for line in call(*command.split()).splitlines()]
        assert printed == output.splitlines()
