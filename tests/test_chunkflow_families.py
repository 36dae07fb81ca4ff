"""Causal LM families of transformers, tiny and random: exact in chunks, or refused; none accepted and wrong."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from chunkflow.cli import app
from chunkflow.families import EXACT, REFUSED, UNTRIED, WRONG, family_names, markdown, tiny_model, try_families

PAGE = Path(__file__).parent.parent / "docs" / "chunkflow_families.md"
SOME = ["gemma2", "gpt_oss", "llama", "mamba", "mistral", "qwen3_moe"]


def rows_of_the_page():
    return {line.split("`")[1]: line for line in PAGE.read_text().splitlines() if line.startswith("| `")}


def run(*args, code=0):
    done = CliRunner().invoke(app, ["families", *args])
    assert done.exit_code == code, (done.output, done.exception)
    return done.stdout


def test_some_families_are_what_the_page_says():
    found = json.loads(run(*SOME, "--json"))
    states = {row["family"]: row["state"] for row in found["families"]}
    assert states == {name: REFUSED if name == "mamba" else EXACT for name in SOME}
    assert found["counts"] == {EXACT: 5, REFUSED: 1, WRONG: 0, UNTRIED: 0}
    page = rows_of_the_page()
    for line in run(*SOME[:2], "--markdown").splitlines()[2:]:
        assert line == page[line.split("`")[1]]
    assert all(row["error"] < 1e-6 for row in found["families"] if row["state"] == EXACT)


def test_tiny_models_keep_what_matters():
    """Windows shorter than the sequences that are tried, each kind of layer, caps, sinks, experts."""
    gemma, oss, moe = (tiny_model(name).config for name in ("gemma2", "gpt_oss", "qwen3_moe"))
    assert gemma.layer_types == oss.layer_types[::1] == ["sliding_attention", "full_attention"]
    assert gemma.sliding_window == oss.sliding_window == 7
    assert gemma.attn_logit_softcapping == 50.0
    assert moe.num_experts == 4


def test_what_is_accepted_and_wrong_is_a_failed_check(monkeypatch):
    """The prefix's gradients lost: the command must see it."""
    monkeypatch.setattr("chunkflow.state.GroupState.add_gradient", lambda *_: None)
    table = run("llama", code=1)
    assert WRONG in table


def test_names_that_are_none():
    done = CliRunner().invoke(app, ["families", "lama"])
    assert done.exit_code == 2
    assert "lama: no causal LM of the installed transformers has this model type" in done.stderr
    assert not done.stdout
    done = CliRunner().invoke(app, ["families", "lama", "llama", "--json"])
    assert done.exit_code == 2
    assert "lama: no causal LM" in done.stderr
    assert [row["family"] for row in json.loads(done.stdout)["families"]] == ["llama"]


def test_the_page_has_every_family_and_none_is_wrong():
    page = rows_of_the_page()
    assert sorted(page) == family_names()
    assert not any(WRONG in line for line in page.values())
    assert sum(f"| {EXACT} |" in line for line in page.values()) > 80


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_page_is_what_is_found():
    torch.manual_seed(0)
    found = list(try_families(family_names()))
    assert [v for v in found if v.state == WRONG] == []
    assert markdown(found) in PAGE.read_text()
