"""The command `chunkflow`: what it prints, its JSON, its exit codes. In this process, but for one real start."""

import json
import subprocess
import sys
from dataclasses import replace

import huggingface_hub
import numpy as np
import pytest
from typer.testing import CliRunner

from chunkflow.cli import app
from chunkflow.config import PlannerConfig
from chunkflow.errors import ChunkflowError
from chunkflow.lengths import DISTRIBUTIONS
from chunkflow.model_open import open_model
from chunkflow.pack import lower_bound_chunks
from chunkflow.plan import plan_step
from chunkflow.sampler import global_batch
from tests.long_tail import long_tail

PLAN_KEYS = [
    "batches", "chunks", "lower_bound_chunks", "max_over_bound", "share_within_1", "fill", "split_sequences",
    "recomputed_tokens", "straggler_ratio", "makespan_over_bound", "plan_seconds", "idle_ranks",
    "long_batches", "long_tokens",
]  # fmt: skip


def run(*args, code=0):
    done = CliRunner().invoke(app, [str(arg) for arg in args])
    assert done.exit_code == code, (done.output, done.exception)
    return done


@pytest.fixture
def lengths(tmp_path):
    np.save(tmp_path / "lengths.npy", DISTRIBUTIONS["lmsys"](700, seed=0))
    return tmp_path / "lengths.npy"


@pytest.fixture
def data(tmp_path):
    long_tail(tmp_path)
    return tmp_path / "tail.jsonl"


def test_plan_adds_up_what_the_plans_of_the_steps_are(lengths):
    options = ["--chunk-tokens", 2048, "--global-batch", 64, "--world-size", 3, "--retain", 2, "--seed", 5]
    found = json.loads(run("plan", "--lengths", lengths, "--json", *options).stdout)
    assert list(found) == PLAN_KEYS
    every, config = np.load(lengths), PlannerConfig(chunk_tokens=2048, retain=2)
    stats, over = [], []
    for step in range(11):
        samples = global_batch(5, 0, step, num_samples=700, global_batch=64)
        stats.append(plan_step(step, samples, every[samples], config=config, world_size=3, denominator=1.0).stats())
        over.append(stats[-1].chunks - lower_bound_chunks(every[samples], chunk_tokens=2048))
    assert found["batches"] == 11
    assert found["chunks"] == sum(s.chunks for s in stats)
    assert found["lower_bound_chunks"] == found["chunks"] - sum(over)
    assert found["max_over_bound"] == max(over)
    assert found["share_within_1"] == np.mean([x <= 1 for x in over])
    assert found["fill"] == pytest.approx(every.sum() / (found["chunks"] * 2048))
    assert found["split_sequences"] == (every > 2048).sum()
    assert found["recomputed_tokens"] == sum(s.recomputed_tokens for s in stats)
    slowest, mean = sum(max(s.costs) for s in stats), sum(sum(s.costs) / 3 for s in stats)
    assert found["straggler_ratio"] == pytest.approx(slowest / mean)
    assert found["makespan_over_bound"] == pytest.approx(max(max(s.costs) / s.cost_bound for s in stats))
    assert found["plan_seconds"] > 0
    assert found["idle_ranks"] == 0


def test_plan_says_when_ranks_have_nothing_to_train(lengths):
    options = ["--lengths", lengths, "--chunk-tokens", 2**19, "--global-batch", 64, "--world-size", 4]
    for more in ([], ["--json"]):
        assert "3 of 4 ranks have nothing to train in some batches" in run("plan", *options, *more).stderr
    assert json.loads(run("plan", *options, "--json").stdout)["idle_ranks"] == 3
    assert "nothing to train" not in run("plan", *options[:-1], 1).stderr


def test_plan_says_when_one_sequence_is_longer_than_a_rank(tmp_path):
    np.save(tmp_path / "l.npy", np.array([9000] + [100] * 30))
    options = ["plan", "--lengths", tmp_path / "l.npy", "--chunk-tokens", 512, "--global-batch", 31, "--world-size"]
    for more in ([], ["--json"]):
        shown = run(*options, 4, *more)
        assert "in 1 of 1 batches one sequence, the longest of 9000 tokens, takes longer than the mean" in shown.stderr
    found = json.loads(shown.stdout)
    assert (found["long_batches"], found["long_tokens"], found["straggler_ratio"] > 1.5) == (1, 9000, True)
    alone = run(*options, 1, "--json")
    assert not alone.stderr
    assert (json.loads(alone.stdout)["long_batches"], json.loads(alone.stdout)["long_tokens"]) == (0, 0)


def test_plan_for_people_and_under_policies(lengths, data, tmp_path):
    shown = run("plan", "--lengths", lengths, "--overflow", "drop", "--chunk-tokens", 1024)
    assert "share_within_1" in shown.stdout
    assert "drop: " in shown.stdout
    assert json.loads(run("plan", data, "--cache", tmp_path / "cache", "--json").stdout)["batches"] == 1
    run("plan", "--lengths", lengths, "--overflow", "raise", "--chunk-tokens", 1024, code=2)


def test_lengths_draws_a_picture_and_counts(lengths, tmp_path):
    shown = run("lengths", "--lengths", lengths, "--png", tmp_path / "x.png", "--chunk-tokens", 1024).stdout
    assert "█" in shown
    assert "700 sequences" in shown
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(run("lengths", "--lengths", lengths, "--png", tmp_path / "x.png", "--json").stdout)
    every = np.load(lengths)
    assert sum(bar["sequences"] for bar in found["bars"]) == 700
    assert sum(bar["tokens"] for bar in found["bars"]) == found["tokens"] == every.sum()
    for bar in found["bars"]:
        assert bar["sequences"] == ((every >= bar["low"]) & (every < bar["high"])).sum()
    assert found["percentiles"]["50"] == np.sort(every)[349]


def test_audit(data, tmp_path):
    options = ["--cache", tmp_path / "cache", "--chunk-tokens", 16, "--global-batch", 4]
    assert "every target scored exactly once" in run("audit", data, *options).stdout
    found = json.loads(run("audit", data, *options, "--resume-at", 1, "--resume-world-size", 1, "--json").stdout)
    assert found["exact"]
    assert (found["steps"], found["resumed_at"], found["world_size"]) == (6, 1, 2)
    weighted = run("audit", data, *options, "--weighting", "sequence").stdout
    assert f" {found['targets']} targets; " in weighted  # as many as without; their weights are others
    assert isinstance(found["targets"], int)


def config_of(tmp_path, **changes):
    config = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, **changes,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path / "config.json"


def test_check(tmp_path):
    assert "exact to 1e-10" in run("check", config_of(tmp_path), "--chunk-tokens", 6).stdout
    assert "no causal LM could be loaded" in run("check", tmp_path / "absent", code=2).stderr
    refused = run("check", config_of(tmp_path, model_type="bloom", n_head=2, n_layer=1), code=2).stderr
    assert "did not call our attention" in refused or "Bloom" in refused


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([5, 0]), "sample 1 has 0 tokens; it needs at least 1"),
        (np.array([-5, 1]), "sample 0 has -5 tokens"),
        (np.array([5, 2**31 + 1]), "sample 1 has 2147483649 tokens; at most 2147483647 can be counted"),
        (np.array([2**63 + 9], dtype=np.uint64), "holds 9223372036854775817"),
        (np.array([1.5]), "lengths are a flat array of at least one whole number"),
        (np.array([], dtype=np.int64), "at least one whole number"),
        (np.ones((2, 2), dtype=np.int64), "lengths are a flat array"),
    ],
)
def test_bad_lengths(tmp_path, array, message):
    np.save(tmp_path / "bad.npy", array)
    for command in ("plan", "lengths"):
        assert message in run(command, "--lengths", tmp_path / "bad.npy", code=2).stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["plan"], "no data was named"),
        (["plan", "no/such/data"], "neither a file nor a folder"),
        (
            ["plan", "CHATS"],
            "chats.jsonl:1: messages, and no tokenizer was given; give one, or records with input_ids "
            "(--tokenizer names a folder",
        ),
        (["plan", "x", "--lengths", "LENGTHS"], "both x and --lengths were given"),
        (["plan", "--lengths", "absent.npy"], "absent.npy cannot be read as lengths"),
        (["plan", "--lengths", "LENGTHS", "--chunk-tokens", "0"], "chunk_tokens is 0"),
        (["plan", "--lengths", "LENGTHS", "--global-batch", "0"], "global_batch is 0"),
        (["plan", "--lengths", "LENGTHS", "--world-size", "0"], "world_size is 0"),
        (["plan", "--lengths", "LENGTHS", "--max-tokens", "100"], "max_tokens, what fits into memory"),
        (["plan", "--lengths", "LENGTHS", "--overflow", "x"], "overflow is 'x'; it must be one of"),
        (["audit", "DATA", "--world-size", "0"], "both must be at least 1"),
        (["audit", "DATA", "--weighting", "dpo"], "a loss over whole sequences"),
        (["audit", "DATA", "--tokenizer", "/absent"], "no tokenizer could be loaded"),
        (["tune", "x", "--cap-mib", "1", "--longest", "1"], "longest must be at least 2"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(lengths, data, tmp_path, monkeypatch, args, message):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"messages": [{"role": "user", "content": "hi"}]}')
    args = [{"LENGTHS": lengths, "DATA": data, "CHATS": chats}.get(arg, arg) for arg in args]
    done = run(*args, code=2)
    assert message in done.stderr
    assert "Traceback" not in done.output
    assert run("plan", "--no-such-option", code=2)


def test_it_starts_as_a_module_without_torch(lengths):
    code = (
        "import sys; from chunkflow.cli import app\n"
        f"sys.argv = ['chunkflow', 'plan', '--lengths', {str(lengths)!r}, '--json']\n"
        "try: app()\n"
        "except SystemExit as done: print(done.code, sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
    done = subprocess.run([sys.executable, "-m", "chunkflow", "--help"], capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in ("lengths", "plan", "audit", "check", "tune"))


def test_max_tokens_is_the_memory_cap(lengths):
    every = np.load(lengths)
    config = replace(PlannerConfig(chunk_tokens=1024), max_tokens=int(every.max()))
    plan_step(0, range(700), every, config=config, world_size=2, denominator=1.0)
    run("plan", "--lengths", lengths, "--max-tokens", int(every.max()), "--chunk-tokens", 1024)


def test_odd_values_are_one_line_and_no_json(tmp_path):
    np.save(tmp_path / "l.npy", np.array([5, 9]))
    (tmp_path / "zip.npy").write_bytes(b"PK\x03\x04no archive")
    good = ["--lengths", tmp_path / "l.npy"]
    for args, message in [
        (["plan", "--lengths", tmp_path / "zip.npy"], "zip.npy cannot be read as lengths"),
        (["plan", *good, "--chunk-tokens", 2**70], "both must be at most 2147483647"),
        (["plan", *good, "--retain", 2**70], "both must be at most 2147483647"),
        (["plan", *good, "--overflow", "drop", "--chunk-tokens", 1], "leaves no sequence to plan"),
        (["lengths", *good, "--png", tmp_path / "x.foo"], "no picture can be written to"),
        (["lengths", *good, "--chunk-tokens", 0], "chunk_tokens is 0; it must be at least 1"),
        (["tune", "absent", "--cap-mib", "nan", "--longest", 9], "cap_mib is nan"),
    ]:
        done = run(*args, code=2)
        assert message in done.stderr
        assert not done.stdout
        assert done.stderr.count("\n") == 1


def test_what_is_left_out_and_what_is_no_model_is_told(tmp_path):
    rows = tmp_path / "x.jsonl"
    rows.write_text('{"input_ids": [1, 2, 3]}\n{"input_ids": [1, 2], "labels": [-100, -100]}\n')
    done = CliRunner().invoke(app, ["plan", str(rows), "--global-batch", "1", "--cache", str(tmp_path / "c"), "--json"])
    assert json.loads(done.stdout)["batches"] == 1
    assert "1 left out" in done.stderr
    with pytest.raises(ChunkflowError, match="is a file; give a model's folder"):
        open_model(str(rows))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ChunkflowError, match=r"for random weights give .*config\.json"):
        open_model(str(tmp_path))


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    """`local_files_only` does not reach all that loading a model asks for, and each of it is tried six times."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("chunkflow.model_open.unreachable", lambda name, kind: "no network")
    asked = []

    def no_name(host, *_, **__):
        asked.append(host)
        raise OSError("no network")

    monkeypatch.setattr("socket.getaddrinfo", no_name)
    with pytest.raises(ChunkflowError, match=r"no causal LM could be loaded from 'no-such': no network"):
        open_model("no-such")
    assert not asked
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False
