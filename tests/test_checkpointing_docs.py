"""docs/checkpointing.md: its code runs, and its command says what it shows."""

import os
import re
import warnings

import pytest
import torch
from typer.testing import CliRunner

from checkpointing import SINGLE, Checkpointer, cli
from tests.flat_states import Flat
from tests.spawn import ROOT

PAGE = (ROOT / "docs" / "checkpointing.md").read_text()


def blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(300, 100)
    optimizer = torch.optim.AdamW(model.parameters())
    state = Flat({"w": model.weight, "step": 3})
    known = {"torch": torch, "model": model, "optimizer": optimizer, "state": state, "dcp_state": {"w": torch.ones(9)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DCP warns that it is alone
        for block in blocks("python"):
            exec(compile(block, "docs/checkpointing.md", "exec"), known)
    known["ckpt"].close()
    written = {str(path) for path in tmp_path.rglob("step-*") if path.is_dir()}
    assert written == {str(tmp_path / "runs" / name) for name in (
        "a/checkpoints/step-1", "a/checkpoints/step-2", "c/step-10", "c/step-20", "d/checkpoints/step-1",
    )}  # fmt: skip


@pytest.fixture
def shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    weight = torch.randn(512, 256)
    with Checkpointer("runs/a/checkpoints", group=SINGLE) as ckpt:
        for step in (100, 200):
            state = {
                "model.embed.weight": weight, "model.head.weight": weight, "model.norm.weight": torch.ones(256),
                "optim.embed.weight.exp_avg": torch.full((512, 256), step / 1000), "progress": {"step": step},
            }  # fmt: skip
            ckpt.save(step, Flat(state)).wait()
    return tmp_path


def plain(text):
    """Without the id of the run and spaces at the end of lines."""
    return "\n".join(re.sub(r"\b[0-9a-f]{8}\b", "RUN", line).rstrip() for line in text.strip().splitlines())


def test_the_command_says_what_the_page_shows(shown):
    (console,) = blocks("console")
    for part in re.split(r"^\$ checkpoint ", console, flags=re.MULTILINE)[1:]:
        command, _, expected = part.partition("\n")
        found = CliRunner().invoke(cli.app, command.split(), env={**os.environ, "COLUMNS": "120"})
        assert plain(found.output) == plain(expected), command
    file = shown / "runs/a/checkpoints/step-200/rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[300_000] ^= 1
    file.write_bytes(data)
    found = CliRunner().invoke(cli.app, ["verify", "runs/a/checkpoints"])
    assert found.exit_code == 1
    assert found.output.splitlines()[1] in " ".join(PAGE.split())
