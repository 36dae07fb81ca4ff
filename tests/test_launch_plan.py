"""`python -m launch.plan`: sizes against real models, the search against trying everything, and a plan that is run."""

import json
import re

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Qwen3MoeConfig

from chunkflow.histogram import histogram
from chunkflow.lengths import llama3_sft
from chunkflow.records import Chunk, Segment
from chunkflow.sampler import global_batch
from launch.calibrate import layout_of
from launch.config import FinetuneConfig
from launch.experts import with_experts
from launch.layer_costs import measure_costs
from launch.metrics import read_metrics
from launch.model import build_model
from launch.plan import _lengths, flag_value, main, quantity, reasons
from launch.plan_costs import CostModel, Machine
from launch.plan_layouts import Planner
from launch.plan_records import Layout
from launch.plan_sizes import sizes_of
from launch.recipe import read_config
from tests.launch_jobs import run_job, settings, write_corpus
from tests.spawn import ROOT

QUICK = ["--config", str(ROOT / "recipes" / "quickstart.yaml")]
WIDE = ["--model.hidden_size=256", "--model.intermediate_size=1024", "--model.num_heads=4", "--model.num_kv_heads=4"]
DEVICES = {"latency_s": 1e-5, "overhead_s": 1e-4, "link_bytes_per_s": 50e9, "flops": 200e12}


def read(*flags):
    return read_config([*QUICK, *flags], prog="x", description="")


def planner(config, lengths, *, devices, memory, batch=64, **changes):
    machine = Machine(devices=devices, memory_bytes=memory, **{**DEVICES, **changes})
    model = CostModel(sizes=sizes_of(config), machine=machine, bf16=config.model.precision == "bf16", lora=False)
    features = ("bf16", "checkpoints") if model.bf16 else ("checkpoints",)
    return Planner(model, lengths, batch, 0, features)


@pytest.mark.parametrize("flags", [[], WIDE], ids=["narrow", "wide"])
def test_sizes_are_those_of_the_real_model(flags):
    config = read(*flags)
    sizes, model = sizes_of(config), build_model(config.model, None, torch.device("cpu"))
    assert sizes.parameters == sum(p.numel() for p in model.parameters())
    whole = measure_costs(model, tokens=256, repeats=1).activation_bytes[0]
    with torch.autocast("cpu", torch.bfloat16):
        half = measure_costs(model, tokens=256, repeats=1).activation_bytes[0]
    machine = Machine(devices=1, memory_bytes=1.0, **DEVICES)
    for bf16, measured, near in ((False, whole, 0.1), (True, half, 0.15)):
        model_costs = CostModel(sizes=sizes, machine=machine, bf16=bf16, lora=False)
        costs = model_costs.costs([Chunk((Segment(0, 0, 256, 0),), None, 0, 1)], ep=1, chunk_tokens=256, engine="ddp")
        for layer, ours, nbytes in zip(sizes.layers, costs.activation_bytes[0], measured, strict=True):
            if layer.kind == "decoder":
                assert ours == pytest.approx(nbytes, rel=near)


def test_sizes_of_experts_are_those_of_the_upcycled_model():
    config = read("--moe.num_experts=4")
    sizes = sizes_of(config)
    made = with_experts(build_model(config.model, None, torch.device("cpu")), config.moe, seed=0)
    experts = sum(p.numel() for name, p in made.named_parameters() if ".experts." in name)
    assert sum(layer.experts for layer in sizes.layers) == experts
    routers = sum(p.numel() for name, p in made.named_parameters() if ".experts." not in name and "gate" in name)
    assert sizes.parameters + routers == sum(p.numel() for p in made.parameters())


@pytest.mark.parametrize("memory", [2.4e9, 8e9])
@pytest.mark.parametrize("longest", [200, 6000])
def test_the_search_finds_what_trying_everything_finds(memory, longest):
    """A model of 0.1 billion parameters on four devices, each layout simulated."""
    config = read("--model.hidden_size=768", "--model.intermediate_size=2048", "--model.num_heads=12",
                  "--model.num_kv_heads=4", "--model.num_layers=10", "--model.vocab_size=32000")  # fmt: skip
    lengths = np.minimum(llama3_sft(500, seed=1), longest)
    quick, slow = (planner(config, lengths, devices=4, memory=memory, batch=12) for _ in range(2))
    best = quick.best()
    every = [slow.estimate(layout) for layout in slow.layouts()]
    for one in every:
        assert one.step_s >= slow.bound_s(one.layout) * (1 - 1e-9), one
    assert best.step_s == min(one.step_s for one in every if slow.fits(one))
    assert len(quick.known) < len(every)


def test_memory_has_room_for_the_longest_sample():
    """One of 3,000 is long. Where it is in no step that is simulated for its time, memory holds it all the same."""
    drawn = [global_batch(read().run.seed, 0, step, num_samples=3000, global_batch=4) for step in range(3)]
    near, far = (np.where(np.arange(3000) == drawn[step][0], 16_000, 100) for step in (0, 2))
    known, unknown = (planner(read(), lengths, devices=1, memory=8e9, batch=4) for lengths in (near, far))
    for layout in unknown.layouts():
        if layout.chunk_tokens in (512, 16384):
            one, other = known.estimate(layout), unknown.estimate(layout)
            assert other.memory_bytes == one.memory_bytes > 2 * (layout.chunk_tokens == 16384) * other.held_bytes
            assert other.step_s < one.step_s


@pytest.mark.slow
def test_a_thousand_devices(tmp_path):
    """70 billion parameters in fp32 fit a device only in a pipeline; few layouts of many are simulated."""
    LlamaConfig(
        vocab_size=128_256, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, tie_word_embeddings=False,
    ).save_pretrained(tmp_path)  # fmt: skip
    found = planner(read(f"--model.path={tmp_path}"), llama3_sft(20_000, seed=0), devices=1024, memory=80e9, batch=1024)
    best = found.best()
    assert found.model.sizes.parameters == pytest.approx(70.6e9, rel=0.01)
    assert best.layout.pp * best.layout.data == 1024
    assert best.layout.pp >= 16  # 16 bytes a parameter
    assert found.fits(best)
    assert len(found.known) < len(list(found.layouts())) / 2


def test_experts_are_spread_and_bf16_has_no_pipeline(tmp_path):
    Qwen3MoeConfig(
        vocab_size=32_000, hidden_size=1024, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=16,
        num_key_value_heads=4, head_dim=64, num_experts=64, num_experts_per_tok=4, moe_intermediate_size=512,
        tie_word_embeddings=False,
    ).save_pretrained(tmp_path)  # fmt: skip
    config = read(f"--model.path={tmp_path}", "--model.precision=bf16")
    found = planner(config, np.minimum(llama3_sft(5000, seed=0), 4000), devices=16, memory=3.53e9)
    assert {layout.pp for layout in found.layouts()} == {1}
    best = found.best()  # 21 GB of weights, gradients and moments; stage 3 keeps 2 GB gathered besides its shards
    assert best.layout.settings(config)["moe.ep"] == best.layout.ep > 1
    assert best.memory_bytes < 3.53e9


EXPERTS = ["--moe.num_experts=4", "--moe.ep=4", "--moe.esp=2", "--moe.plan=measure", "--moe.exchange=2d"]
LOOPED = ["--pipeline.ranks=2", "--pipeline.schedule=interleaved", "--pipeline.stages=4", "--pipeline.recompute=true"]
STREAMS = ["--pipeline.schedule=roundpipe", "--pipeline.rounds=2", "--pipeline.staleness=1", "--pipeline.ranks=4"]


@pytest.mark.parametrize(
    ("recipe", "pp", "ep", "engine", "schedule"),
    [
        (EXPERTS, 1, 1, "ddp", "state_aware_1f1b"),
        ([*EXPERTS, "--moe.node_ranks=2"], 1, 2, "ddp", "state_aware_1f1b"),
        ([*EXPERTS, "--moe.node_ranks=4", "--moe.exchange=2d"], 1, 2, "ddp", "state_aware_1f1b"),
        (LOOPED, 1, 1, "fsdp2", "state_aware_1f1b"),
        (LOOPED, 4, 1, "ddp", "zbv"),
        (STREAMS, 2, 1, "ddp", "state_aware_1f1b"),
        (["--engine=zero2"], 1, 1, "ddp", "state_aware_1f1b"),
    ],
)
def test_a_plans_settings_override_its_recipe(recipe, pp, ep, engine, schedule):
    """Whatever the recipe had: with the settings that the plan prints, the job is laid out as planned."""
    layout = Layout(pp=pp, ep=ep, data=8 // pp, engine=engine, schedule=schedule, chunk_tokens=64, retain=2)
    printed = [f"--{key}={flag_value(value)}" for key, value in layout.settings(read(*recipe)).items()]
    config = read(*recipe, *printed)
    assert layout_of(config, 8) == layout
    assert (config.moe.ep or 1) % config.moe.node_ranks == 0
    assert layout.settings(config).keys() == {"chunks.chunk_tokens", "chunks.retain"}


def command(capsys, *argv):
    code = main([*QUICK, *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


def test_what_the_reasons_find_to_be_faster_is_chosen(tmp_path, capsys):
    corpus = write_corpus(tmp_path / "corpus", files=24)
    flags = [f"{key}={value}" for key, value in zip(*[iter(settings(corpus, tmp_path / "x"))] * 2, strict=True)]
    asked = ["--devices", 2, "--device-memory", "20MB", "--link", "1GB/s", "--flops", "50GF"]
    code, out, err = command(capsys, *asked, "--json", *flags)
    assert code == 0, err
    plan = json.loads(out)
    assert plan["chosen"]["step_s"] == min(one["step_s"] for one in plan["tried"] if one["fits"])


def test_a_plan_is_a_job(tmp_path, capsys):
    """A device so small that the model has to be cut: what the plan says is run, and its chunks are the plan's."""
    corpus = write_corpus(tmp_path / "corpus", files=24)
    (corpus / "long.py").unlink()
    given = settings(corpus, tmp_path / "x", data__long_files=[])
    flags = [f"{key}={value}" for key, value in zip(*[iter(given)] * 2, strict=True)]
    asked = ["--devices", 2, "--device-memory", "0.8MB", "--link", "1GB/s", "--flops", "50GF"]
    code, out, err = command(capsys, *asked, "--json", *flags)
    assert code == 0, err
    plan = json.loads(out)
    assert plan["chosen"]["layout"]["pp"] == 2
    assert plan["chosen"]["memory_bytes"] <= 0.8e6
    assert any("pipeline ranks 2: 1 needs" in reason for reason in plan["why"])
    assert plan["chosen"]["step_s"] == min(one["step_s"] for one in plan["tried"] if one["fits"])
    code, out, _ = command(capsys, *asked, *flags)
    assert code == 0
    assert "settings: --chunks.chunk_tokens" in out
    assert "with all else as in the first" in out
    assert "devices of 0.8 MB" in out
    more = {key.replace(".", "__"): value for key, value in plan["settings"].items()}
    log = tmp_path / "job.log"
    code, output = run_job(settings(corpus, tmp_path / "run", run__steps=2, data__long_files=[], **more), log)
    assert code == 0, output
    assert f"pipeline {plan['chosen']['layout']['schedule']} of 2 ranks" in output
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 2


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["--devices", 4, "--device-memory", "1MB"], 1, "stays within 1.0 MB; the smallest needs 8."),
        (["--devices", 0], 2, "--devices, --device-memory, --flops and --link are more than 0"),
        (["--devices", 4, "--link", "fast"], 2, "--link: 'fast' is no quantity; write 80GB"),
        (["--devices", 4, "--lengths", "none.json"], 2, "--lengths none.json is no file, and none of llama3_sft"),
        (["--devices", 4, "--model.hidden_size=-1"], 2, "model.hidden_size is -1"),
        (["--devices", 4, "--model.library=megatron"], 2, "model.library is megatron, and only models of transformers"),
    ],
)
def test_what_cannot_be_planned_is_told(capsys, argv, code, text):
    lengths = [] if "--lengths" in argv else ["--lengths", "lmsys"]
    found, out, err = command(capsys, *argv, *lengths)
    assert (found, out) == (code, "")
    assert text in err


def test_what_is_said_of_other_pipelines_is_what_the_table_shows():
    plan = planner(read(), np.minimum(llama3_sft(300, seed=1), 17_000), devices=64, memory=80e9, batch=3)
    best = plan.best()
    told = reasons(plan, best)[0]
    assert told.startswith(f"pipeline ranks {best.layout.pp}: ")
    for pp, factor in re.findall(r"(\d+) takes ([0-9.]+) times", told):
        least = min(one.step_s for one in plan.known.values() if one.layout.pp == int(pp))
        assert factor == f"{least / best.step_s:.2f}"


def test_lengths_may_be_a_histogram(tmp_path, capsys):
    """What `chunkflow lengths --json` prints: as many samples and tokens in each bar, and the longest."""
    lengths = np.minimum(llama3_sft(3000, seed=2), 6000)
    file, plain = tmp_path / "bars.json", tmp_path / "lengths.npy"
    file.write_text(json.dumps(histogram(lengths).to_json()))
    np.save(plain, lengths)
    read_back = _lengths(FinetuneConfig(), str(file))
    assert (len(read_back), read_back.max()) == (3000, lengths.max())
    again = histogram(read_back)
    assert [bar.sequences for bar in again.bars] == [bar.sequences for bar in histogram(lengths).bars]
    assert again.tokens == pytest.approx(lengths.sum(), rel=0.01)
    asked = ["--devices", 4, "--device-memory", "8GB", "--json", "--lengths"]
    plans = [json.loads(command(capsys, *asked, path)[1])["chosen"] for path in (file, plain)]
    assert plans[0]["layout"] == plans[1]["layout"]
    assert plans[0]["step_s"] == pytest.approx(plans[1]["step_s"], rel=0.2)
    file.write_text('{"bars": [{"low": 1}]}')
    code, _, err = command(capsys, *asked, file)
    assert code == 2
    assert "is no histogram of chunkflow lengths --json: 'sequences'" in err


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [("80GB", "B", 80e9), ("64GiB", "B", 64 * 2**30), ("50GB/s", "B", 50e9), ("200TF", "F", 2e14),
     ("3 TFLOPS", "F", 3e12), ("10us", "s", 1e-5), ("1e9B", "B", 1e9), ("0", "s", 0)],
)  # fmt: skip
def test_quantities(text, unit, value):
    assert quantity(text, unit) == pytest.approx(value)


@pytest.mark.parametrize(("text", "unit"), [("80", "B"), ("10us", "B"), ("80GB", "s"), ("200T", "s"), ("1TB", "F")])
def test_quantities_of_no_or_another_unit(text, unit):
    with pytest.raises(ValueError, match="is not in"):
        quantity(text, unit)
