"""What runs the blocks of docs/pipeline.md."""

import contextlib
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import torch
import torch.distributed as dist
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.comms import complete
from pipeline.schedules import SCHEDULES
from pipeline.schedules.roundpipe import Slots
from tests.docs_blocks import Run, commands, execute
from tests.pipeline_cases import Words, one_process, ragged, runner
from tests.roundpipe_cases import slot_layers
from tests.spawn import run_ranks

PAGE = "docs/pipeline.md"
MICROBATCHES = 8


def schedules(folder, texts):
    names = execute(PAGE, texts[0], {})
    assert names["result"].makespan_s > 0
    assert 0 < names["result"].useful < 1


def shown(folder, texts):
    for text in texts:
        ((command, output),) = commands(text)
        printed = CliRunner().invoke(app, command.removeprefix("python -m pipeline ").split()).output
        assert [line.rstrip() for line in printed.splitlines()] == output.splitlines()


def files(folder, texts):
    """The python block writes two files; each command reads what is there by then."""
    with contextlib.chdir(folder):
        execute(PAGE, texts[0], {})
        outputs = []
        for command, _ in commands(texts[1]):
            words, _, into = command.removeprefix("python -m pipeline ").partition(" > ")
            result = CliRunner().invoke(app, words.split())
            assert result.exit_code == 0, result.output
            if into:
                Path(into).write_text(result.output)
            outputs.append(result.output)
    assert ET.parse(folder / "plan.svg").getroot().get("viewBox")
    assert json.loads(outputs[0])["num_devices"] == 4
    assert outputs[1].splitlines()[1].split()[0] == "roundpipe"
    assert outputs[2].splitlines()[1].split()[0] == "state_aware_1f1b"


def stage_rank(info, code):
    model, batch = Words(4), ragged(MICROBATCHES)
    mine = model.layers[:2] if info.rank == 0 else model.layers[2:]
    names = {
        "group": dist.group.WORLD, "rank": info.rank, "step": 3, "run": runner(mine, batch),
        "schedule": complete(SCHEDULES["1f1b"](devices=2, microbatches=MICROBATCHES)),
    }  # fmt: skip
    losses = execute(PAGE, code, names)["losses"]
    return {mb: float(loss) for mb, loss in losses.items()}


def stages(folder, texts):
    expected = one_process(Words(4), ragged(MICROBATCHES))
    _, last = run_ranks(stage_rank, 2, texts[0])
    assert last == {mb: float(loss) for mb, loss in expected.items()}


def worker_rank(info, code):
    model = Words(7)
    layers = slot_layers(model, ragged(MICROBATCHES))
    names = {
        "torch": torch, "layers": layers, "slots": Slots(forward=(2, 3), fused=2, backward=(1, 2, 2)), "tokens": 64,
        "world": info.world_size, "rank": info.rank, "group": dist.group.WORLD, "width": 24,
        "weights": {name: p.detach() for layer in reversed(layers) for name, p in layer.parameters.items()},
    }  # fmt: skip
    code = code.replace("steps=100", "steps=3")
    found = execute(PAGE, code, names)
    found["worker"].close()
    return [float(loss) for loss in found["losses"]]


def worker(folder, texts):
    losses = [sum(found) for found in zip(*run_ranks(worker_rank, 2, texts[0]), strict=True)]
    steps = [sum(losses[n * MICROBATCHES : (n + 1) * MICROBATCHES]) for n in range(3)]
    assert steps[0] > steps[1] > steps[2]


RUNS = [
    Run(PAGE, ('SCHEDULES["1f1b"](devices=4',), schedules),
    Run(PAGE, ("$ python -m pipeline show", "$ python -m pipeline compare"), shown),
    Run(PAGE, ("plan_state_aware(units", "$ python -m pipeline plan"), files),
    Run(PAGE, ("transport = GroupTransport(group)",), stages),
    Run(PAGE, ("worker = SlotWorker(",), worker),
]
