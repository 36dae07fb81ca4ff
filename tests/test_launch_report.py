"""A run as one page: what is on it, that it needs nothing else, and that a browser draws it."""

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from base64 import b64decode
from dataclasses import asdict, replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from chunkflow.histogram import histogram
from launch.files import RunFolder
from launch.report import main, make_page, write_report
from launch.report_parts import draw_timeline
from launch.report_plots import _finish, beside_saves
from launch.report_timeline import make_timeline, read_timeline
from pipeline.comms import complete
from pipeline.costs import Costs
from pipeline.schedules import SCHEDULES
from pipeline.simulate import simulate
from pipeline.tracing import TraceEvent

OF_TRAINING = ["loss", "lr", "grad_norm", "throughput", "seconds", "fill", "lengths", "memory"]
OF_RANKS = ["parts", "timeline", "straggler", "compute_ranks", "memory_ranks", "experts"]
PLOTS = [*OF_TRAINING, *OF_RANKS]


def line(step, **changes):
    return {
        "step": step, "loss": 5.0 / step, "lr": 0.1, "grad_norm": 1.0, "tokens": 100 * step, "supervised_tokens": 90.0,
        "seconds": 2.0, "fill": 0.9, "split_tokens": 10, "longest": 64 * step, "peak_bytes": 2**30 + step,
        "tokens_per_s": 50.0 * step, **changes,
    }  # fmt: skip


def job_line(step, **changes):
    """With what every rank measured, and experts."""
    ranks = {"compute": [1.0, 1.0 + 0.1 * step], "peak_bytes": [2.0**30, 2.0**29 * step]}
    parts = {"seconds.data": 0.1, "seconds.compute": 1.1, "seconds.exchange": 0.4, "seconds.checkpoint": 0.05 * step}
    experts = {f"moe/layer{layer}/expert_{n}": 0.25 * (1 + 0.1 * n) for layer in (0, 1) for n in range(4)}
    return line(step, ranks=ranks, straggler=1.0 + 0.05 * step, **parts, **experts, **changes)


def write_trace(run):
    """Two ranks, of which the second is late; the clocks of the older step must not matter."""
    run.trace.mkdir()
    for rank in (0, 1):
        events = [
            TraceEvent(rank, "compute", op, step, n, at + 300 * rank, at + 900, 850)
            for step in (2, 3) for n, op in enumerate("FBFB") for at in (step * 9000 + n * 1000,)
        ]  # fmt: skip
        run.trace_of(rank).write_text("".join(json.dumps(asdict(event)) + "\n" for event in events))


def facts(**changes):
    lengths = histogram(np.array([3, 70, 900, 5000])).to_json()
    return {
        "total_steps": 4, "model": "LlamaForCausalLM", "parameters": 1234567, "world_size": 2, "device": "cpu",
        "threads": 1, "pipeline": None, "lengths": lengths, "held_out": 7, "host": "Linux",
        "notes": ["2 <left> & out", "3 are short."], "versions": {"torch": "2.13.0"}, **changes,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    run = RunFolder(tmp_path / "my run")
    run.path.mkdir()
    lines = [{"step": 0, "eval_loss": 6.5}, *(job_line(n) for n in (1, 2, 3)), job_line(4, eval_loss=4.25)]
    run.metrics.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    run.facts.write_text(json.dumps(facts()))
    run.config.write_text(json.dumps({"fresh": False, "chunks": {"chunk_tokens": 512}, "data": {"path": "<script>"}}))
    write_trace(run)
    return run


def pictures(html):
    found = re.findall(r'<section id="(\w+)">.*?src="data:image/svg\+xml;base64,([^"]+)"', html, re.DOTALL)
    return {name: ET.fromstring(b64decode(data)) for name, data in found}


def test_every_plot_is_there_and_drawn(folder):
    drawn = pictures(write_report(folder).read_text())
    assert list(drawn) == PLOTS
    for name, svg in drawn.items():
        assert svg.tag.endswith("}svg")
        assert len(list(svg.iter("{http://www.w3.org/2000/svg}path"))) > 10, name


@pytest.mark.parametrize("most", [3, 40])
def test_a_job_that_went_on_with_another_number_of_ranks(folder, most):
    lines = [job_line(n) for n in (1, 2, 3, 4)]
    for entry, count in zip(lines, (2, most, 1, 2), strict=True):
        entry["ranks"] = {"compute": [1.0] * count, "peak_bytes": [2.0**30] * count}
    folder.metrics.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    drawn = pictures(write_report(folder).read_text())
    assert list(drawn) == PLOTS


def test_the_page_needs_nothing_from_outside(folder):
    html = write_report(folder).read_text()
    assert "default-src 'none'" in html
    assert not re.search(r"<(script|link|iframe|object)\b", html)
    assert all(source.startswith("data:") for source in re.findall(r'(?:src|href)="([^"]*)"', html))
    assert "url(" not in html
    assert "@import" not in html


def test_numbers_settings_and_what_was_left_out(folder):
    html = write_report(folder).read_text()
    for text in (
        "<title>my run</title>", "LlamaForCausalLM of 1,234,567 parameters, on 2 x cpu", "4 samples of 5,973 tokens",
        "7 more held out", "<b>6.500 → 4.250</b><span>held-out loss", "<b>5.000 → 1.250</b>", "<b>1,000</b>",
        "<b>125</b><span>tokens/s", "<b>1.00 GiB</b>", "<td>chunks.chunk_tokens</td><td>512</td>",
        "<td>data.path</td><td>&lt;script&gt;</td>", "2 &lt;left&gt; &amp; out. 3 are short.<",
        "<td>fresh</td><td>false</td>",
    ):  # fmt: skip
        assert text in html, text
    assert "Not finished" not in html


def test_what_a_save_costs_the_steps_beside_it_is_told(folder):
    assert "Beside a save" not in write_report(folder).read_text()
    lines = [job_line(n, tokens=100, seconds=1.5 if n % 2 else 1.0, beside_save=float(n % 2)) for n in range(1, 8)]
    folder.metrics.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    assert "Beside a save that is being written, a token takes 1.50 times as long." in write_report(folder).read_text()
    few = [*lines[:3], *lines[3:8:2]]
    assert beside_saves(few) is None  # two are no median


def test_the_same_run_makes_the_same_page(folder, tmp_path):
    first = write_report(folder).read_bytes()
    assert write_report(folder, tmp_path / "other.html").read_bytes() == first


def test_a_run_under_way_shows_what_there_is(folder):
    lines = folder.metrics.read_text().splitlines()
    folder.metrics.write_text("\n".join(lines[:3]) + '\n{"step": 3, "lo')
    html = write_report(folder).read_text()
    assert "Not finished: 2 of 4 steps." in html
    assert list(pictures(html)) == PLOTS


@pytest.mark.parametrize(
    ("lines", "known", "expected"),
    [
        ([{"step": 0, "eval_loss": 6.5}], facts(), ["loss", "lengths"]),
        ([line(1, peak_bytes=None)], {}, ["loss", "lr", "grad_norm", "throughput", "seconds", "fill"]),
        ([line(1, tokens_per_s=0.0, seconds=0.0)], {}, [name for name in OF_TRAINING if name != "lengths"]),
        ([job_line(1)], facts(), [name for name in PLOTS if name != "timeline"]),
    ],
)
def test_what_was_not_measured_has_no_plot(lines, known, expected):
    page = make_page(lines, name="x", settings={}, facts=known, summary={})
    assert [plot.name for plot in page.plots] == expected
    assert page.html()


def test_the_command(folder, tmp_path, capsys):
    assert main([str(folder.path)]) == 0
    assert capsys.readouterr().out.strip() == str(folder.report)
    assert main([str(folder.path), "--output", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_bytes() == folder.report.read_bytes()
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "has no step in metrics.jsonl; give the folder of a run" in capsys.readouterr().err
    with pytest.raises(SystemExit) as leaving:
        main([])
    assert leaving.value.code == 2


def test_an_output_that_cannot_be_written(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([str(folder.path), "--output", str(tmp_path / "file" / "page.html")]) == 2
    assert "the report cannot be written to" in capsys.readouterr().err


def test_a_step_in_time_is_the_newest_of_which_there_are_events(folder):
    found = read_timeline(folder.trace)
    assert found.step == 3
    assert [(bar.rank, bar.backward) for bar in found.measured] == [(r, b) for r in (0, 1) for b in (False, True) * 2]
    assert found.measured[0].start_s == 0
    assert found.measured[4].start_s == pytest.approx(300e-9)
    predicted = [bar for bar in found.predicted if bar.rank == 1]
    assert [bar.start_s for bar in predicted] == pytest.approx([n * 850e-9 for n in range(4)])
    assert [bar.end_s for bar in predicted] == pytest.approx([(n + 1) * 850e-9 for n in range(4)])


def test_a_pipeline_is_predicted_by_its_schedule():
    schedule = complete(SCHEDULES["1f1b"](devices=2, microbatches=3))
    spans = simulate(schedule, Costs.uniform(2, forward_s=1, backward_s=2)).spans
    late = 5  # seconds that the second rank lost on the way
    ranks = [
        [
            TraceEvent(rank, "compute", s.action.label, 7, s.action.microbatch, *(
                round(1e9 * (at + late * rank)) for at in (s.start_s, s.end_s)))
            for s in spans if s.device == rank and s.action.op.value in "FB"
        ]
        for rank in (0, 1)
    ]  # fmt: skip
    found = make_timeline(ranks, schedule)
    ends = [max(bar.end_s for bar in bars) for bars in (found.measured, found.predicted)]
    assert ends == pytest.approx([late + max(s.end_s for s in spans if s.device == 1), simulate(
        schedule, Costs.uniform(2, forward_s=1, backward_s=2)).makespan_s])  # fmt: skip
    assert sum(bar.backward for bar in found.predicted) == 6
    assert found.how.startswith("the schedule simulated")
    twice = [[replace(event, rank=rank) for event in ranks[rank // 2]] for rank in range(4)]
    two = make_timeline(twice, schedule)
    assert two.how.startswith("the first pipeline's schedule simulated")
    assert {bar.rank for bar in two.predicted} == {0, 2}


def test_ranks_without_a_chunk_have_a_row_and_those_of_an_older_step_none():
    now, older = ([TraceEvent(0, "compute", "F", step, 0, 0, 900, None)] for step in (7, 3))
    found = make_timeline([now, [], older, now], None)
    assert found.ranks == (0, 1, 3)
    axes = Figure().subplots()
    draw_timeline(axes, found)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["rank 0", "rank 1", "rank 3"]


def test_whole_steps_are_marked_and_one_point_is_a_point():
    axes = Figure().subplots()
    axes.plot([1, 3], [5.0, 6.0])
    axes.plot([1, 3], [np.nan, 6.0])
    axes.set_xlabel("step")
    _finish(axes)
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
    assert [line.get_marker() for line in axes.lines] == ["None", "o"]


@pytest.mark.parametrize("text", ["", "no json\n", '{"rank": 0}\n'])
def test_a_trace_that_is_cut_off_is_left_out(folder, text):
    folder.trace_of(0).write_text(text)
    if text:
        assert read_timeline(folder.trace) is None
    assert ("timeline" in pictures(write_report(folder).read_text())) == (not text)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
def test_a_browser_draws_every_plot_and_fetches_nothing(folder, tmp_path):
    page, log = write_report(folder, tmp_path / "report.html"), tmp_path / "net.json"
    probe = tmp_path / "probe.html"
    script = (
        "<script>addEventListener('load', () => { document.body.dataset.seen = JSON.stringify("
        "[...document.images].map(i => i.complete && i.naturalWidth > 100)); });</script></body>"
    )
    allowed = page.read_text().replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
    probe.write_text(allowed.replace("</body>", script))
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}",
        "--virtual-time-budget=5000", "--dump-dom", probe.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    seen = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert seen, done.stderr[-2000:]
    assert json.loads(seen.group(1).replace("&quot;", '"')) == [True] * len(PLOTS)
    asked = set(re.findall(r'"url":"(https?://[^"]+)"', log.read_text(errors="replace")))
    assert not {url for url in asked if "google" not in url and "gvt1" not in url}  # the browser's own, of its updates
