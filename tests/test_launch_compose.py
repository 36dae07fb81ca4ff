"""Every cell of what composes with what is tested or refused, and README and docs print that table."""

import ast

import pytest
import torch

from launch.compose import FEATURES, active, cell, require_composable
from launch.compose_table import BEGIN, markdown, replaced
from launch.config import FinetuneConfig
from launch.errors import ConfigError
from launch.pipeline_job import check_whole_samples
from launch.recipe import read_config
from tests.job_cases import SHORT, assert_near, assert_told, rank_trains, saved
from tests.spawn import ROOT, run_ranks

PAIRS = [(one, other) for n, one in enumerate(FEATURES) for other in list(FEATURES)[n:]]


def read(*features):
    flags = {key: value for name in features for key, value in FEATURES[name].settings.items()}
    return read_config([f"--{key}={value}" for key, value in flags.items()], prog="x", description="")


def functions(file):
    return {node.name for node in ast.parse((ROOT / "tests" / file).read_text()).body if hasattr(node, "name")}


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=lambda name: name)
def test_every_cell_is_tested_or_refused_at_start(one, other):
    found = cell(one, other)
    assert found == cell(other, one)
    if found is None:
        assert one == other or FEATURES[one].choice == FEATURES[other].choice
        return
    if found.test is not None:
        file, _, name = found.test.partition("::")
        assert name in functions(file), found.test
        assert {one, other} - {"split"} <= set(active(read(one, other)))
    elif "split" in (one, other) and not {"tensor", "context"} & {one, other}:
        config = read(one, other)
        needed, _, advice = found.reason.partition("; ")
        with pytest.raises(ConfigError, match=needed) as told:
            check_whole_samples(config, config.chunks.chunk_tokens + 1)
        assert advice in str(told.value)
    else:
        with pytest.raises(ConfigError) as told:
            read(one, other)
        reasons = [cell(a, b).reason for a in (one, other) for b in (one, other, "checkpoints") if cell(a, b)]
        assert any(reason and reason in " ".join(str(told.value).split()) for reason in reasons)
        assert FEATURES[one].label in str(told.value) or FEATURES[other].label in str(told.value)


def test_a_refusal_names_both_and_comes_with_the_settings():
    with pytest.raises(ConfigError, match=r"engine fsdp2 and pipeline, state_aware_1f1b: the ranks of a pipeline keep"):
        read("fsdp2", "state_aware")
    require_composable(FinetuneConfig())
    assert active(FinetuneConfig()) == ["ddp", "checkpoints"]


@pytest.mark.parametrize("file", ["docs/launch.md", "README.md"])
def test_the_documents_hold_the_table(file):
    text = (ROOT / file).read_text()
    if file != "README.md" or BEGIN in text:
        assert text == replaced(text), "run python -m launch.compose_table and put what it prints there"
    assert markdown().count("\n| ") == len(FEATURES) + 1


PIPE = {"pipeline.ranks": 2}
LORA = {"lora.rank": 2}
WHOLE = {"lengths": SHORT, "layers": 4}
CASES = {
    "ddp": ({}, {}),
    "ddp lora": (LORA, {}),
    "pipeline lora": ({**LORA, **PIPE}, {"layers": 4}),
    "1f1b lora": ({**LORA, **PIPE, "pipeline.schedule": "1f1b"}, WHOLE),
    "pipeline, each stage its experts": (PIPE, {"layers": 4, "family": "mixtral"}),
    "roundpipe": ({**PIPE, "pipeline.schedule": "roundpipe"}, WHOLE),
    "roundpipe lora": ({**LORA, **PIPE, "pipeline.schedule": "roundpipe"}, WHOLE),
    **{
        name: ({**PIPE, "pipeline.schedule": name}, WHOLE)
        for name in ("gpipe", "interleaved", "looped_bfs", "zb_h1", "zbv")
    },
}


@pytest.mark.parametrize("case", CASES)
def test_together_they_train_as_one_process(tmp_path, case):
    """Two steps on two ranks, two on one without any of it: losses, norms, weights, moments; fp64."""
    flags, options = CASES[case]
    plain = {key: value for key, value in flags.items() if key.startswith("lora")}
    (expected,) = run_ranks(rank_trains, 1, str(tmp_path / "one"), 4, plain, options)
    found = run_ranks(rank_trains, 2, str(tmp_path / "legs"), 2, flags, options)
    assert found[0] == found[1]
    (rest,) = run_ranks(rank_trains, 1, str(tmp_path / "legs"), 4, plain, options)
    assert_told([*found[0], *rest], expected, 1e-9)
    for step in (2, 4):
        assert_near(saved(tmp_path / "legs", step), saved(tmp_path / "one", step), 1e-7)


FOUR = {
    "state_aware_1f1b": ({**PIPE, "pipeline.schedule": "state_aware_1f1b"}, {"layers": 4}),
    "1f1b": ({**PIPE, "pipeline.schedule": "1f1b"}, WHOLE),
    "roundpipe": ({**PIPE, "pipeline.schedule": "roundpipe"}, WHOLE),
    "lora": ({**PIPE, **LORA}, {"layers": 4}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", FOUR)
def test_several_pipelines_share_the_data(tmp_path, case):
    flags, options = FOUR[case]
    on_four_ranks(tmp_path, flags, options)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, LORA, {**LORA, "engine": "fsdp2"}], ids=["ddp", "lora", "fsdp2 lora"])
def test_four_ranks_share_the_data(tmp_path, flags):
    """Three samples a step: at least one rank has no chunk of its own."""
    on_four_ranks(tmp_path, flags, {})


def on_four_ranks(tmp_path, flags, options):
    plain = {key: value for key, value in flags.items() if key.startswith("lora")}
    (expected,) = run_ranks(rank_trains, 1, str(tmp_path / "one"), 3, plain, options)
    found = run_ranks(rank_trains, 4, str(tmp_path / "four"), 3, flags, options)
    for told in found:
        assert_told(told, expected, 1e-9)
    assert_near(saved(tmp_path / "four", 3), saved(tmp_path / "one", 3), 1e-7)


@pytest.mark.parametrize("more", [{}, LORA], ids=["full", "lora"])
def test_bf16_stays_near_one_process_in_fp32(tmp_path, more):
    options, flags = {"dtype": torch.float32}, {**more, "model.precision": "bf16"}
    (expected,) = run_ranks(rank_trains, 1, str(tmp_path / "one"), 3, more, options)
    found = run_ranks(rank_trains, 2, str(tmp_path / "two"), 3, flags, options)
    assert found[0] == found[1]
    assert_told([loss for loss, *_ in found[0]], [loss for loss, *_ in expected], 0.02)
    assert_told(found[0][0], expected[0], 0.05)
    ours, theirs = saved(tmp_path / "two", 3), saved(tmp_path / "one", 3)
    assert {tensor.dtype for tensor in ours.values() if tensor.is_floating_point()} == {torch.float32}
    assert ours.keys() == theirs.keys()
    assert found[0] != expected
