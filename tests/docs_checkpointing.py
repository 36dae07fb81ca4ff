"""What runs the blocks of docs/checkpointing.md."""

import os
import re
import warnings

import pytest
import torch
from typer.testing import CliRunner

from checkpointing import SINGLE, Checkpointer, cli
from tests.docs_blocks import Run, commands, execute
from tests.flat_states import Flat
from tests.spawn import ROOT, run_ranks

PAGE = "docs/checkpointing.md"


def code(folder, texts):
    model = torch.nn.Linear(300, 100)
    optimizer = torch.optim.AdamW(model.parameters())
    state = Flat({"w": model.weight, "step": 3})
    known = {"torch": torch, "model": model, "optimizer": optimizer, "state": state, "dcp_state": {"w": torch.ones(9)}}
    known |= {"rank": 0, "world_size": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DCP warns that it is alone
        for text in texts:
            if "ckpt.requested()" in text:
                (folder / "runs/b/checkpoints").mkdir(parents=True)
                (folder / "runs/b/checkpoints/request").touch()
            execute(PAGE, text, known)
    known["ckpt"].close()
    written = {str(path) for path in folder.rglob("step-*") if path.is_dir()}
    assert written == {str(folder / "runs" / name) for name in (
        "a/checkpoints/step-1", "a/checkpoints/step-2", "b/checkpoints/step-4", "second/step-4", "c/step-10",
        "c/step-20", "d/checkpoints/step-1",
    )}  # fmt: skip


def plain(text):
    """Without the id of the run and spaces at the end of lines."""
    return "\n".join(re.sub(r"\b[0-9a-f]{8}\b", "RUN", line).rstrip() for line in text.strip().splitlines())


def save_two(folder):
    torch.manual_seed(0)
    weight = torch.randn(512, 256)
    with Checkpointer(folder / "runs/a/checkpoints", group=SINGLE) as ckpt:
        for step in (100, 200):
            state = {
                "model.embed.weight": weight, "model.head.weight": weight, "model.norm.weight": torch.ones(256),
                "optim.embed.weight.exp_avg": torch.full((512, 256), step / 1000), "progress": {"step": step},
            }  # fmt: skip
            ckpt.save(step, Flat(state)).wait()


def command(folder, texts):
    save_two(folder)
    for words, expected in commands(texts[0]):
        found = CliRunner().invoke(cli.app, words.split()[1:], env={**os.environ, "COLUMNS": "120"})
        assert plain(found.output) == plain(expected), words
    file = folder / "runs/a/checkpoints/step-200/rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[300_000] ^= 1
    file.write_bytes(data)
    found = CliRunner().invoke(cli.app, ["verify", "runs/a/checkpoints"])
    assert found.exit_code == 1
    assert found.output.splitlines()[1] in " ".join((ROOT / PAGE).read_text().split())


def deepspeed_rank(info, code, folder):
    from tests.docs_chunkflow import deepspeed_names

    names = deepspeed_names(info)
    names["config"]["zero_optimization"]["stage"] = 1
    names["config"]["datastates_ckpt"] = {"host_cache_size": 0.125}
    names["optimizer"] = torch.optim.SGD(names["model"].parameters(), lr=0.1)
    before, then = code
    execute(PAGE, before, names)
    engine = names["deepspeed"].initialize(
        model=names["model"], optimizer=names["optimizer"], config=names["config"]
    )[0]  # fmt: skip
    kinds = [type(engine.checkpoint_engine).__name__]
    execute(PAGE, then, {"engine": engine})
    engine.save_checkpoint(folder, tag="last")
    engine.destroy()
    return [*kinds, type(engine.checkpoint_engine).__name__]


def deepspeed(folder, texts):
    pytest.importorskip("deepspeed", reason="the extra [deepspeed] is not installed")
    env = {"DS_ACCELERATOR": "cpu"}
    kinds = run_ranks(deepspeed_rank, 2, texts, str(folder), fresh=True, timeout_s=150, env=env)
    assert kinds == [["LongrailCheckpointEngine"] * 2] * 2
    assert (folder / "latest").read_text().strip() == "last"


def trainer(folder, texts):
    from transformers import Trainer

    from tests.docs_chunkflow import arguments
    from tests.test_checkpointing_adapter_transformers import Rows
    from tests.tiny import tiny_model

    args = arguments(folder, max_steps=2)
    args.save_strategy, args.save_steps = "steps", 1
    names = {"Trainer": Trainer, "model": tiny_model(dtype=torch.float32), "args": args, "dataset": Rows()}
    found = execute(PAGE, texts[0], names)
    assert found["trainer"].state.global_step == 2
    with Checkpointer(folder / "runs/a/checkpoints", group=SINGLE) as saved:
        assert saved.steps()[-1] == 2


CODE = (
    "keep=KeepLast(3))\nckpt.restore", "class Mine:", 'busy="skip"', "ckpt.requested()", "import DcpReader, DcpWriter",
    "import AppState",
)  # fmt: skip
RUNS = [
    Run(PAGE, ("use_for_datastates()\n", "engine.checkpoint_engine ="), deepspeed, slow=True),
    Run(PAGE, ("callback = CheckpointCallback(",), trainer),
    Run(PAGE, CODE, code),
    Run(PAGE, ("$ checkpoint ls runs/a/checkpoints",), command),
]
