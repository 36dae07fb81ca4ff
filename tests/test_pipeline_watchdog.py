"""A rank that dies, stops, fails or is slow: an error on every other rank, in bounded time: who waited for what."""

import json
import os
import re
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline.actions import Phase
from pipeline.errors import PipelineError, WatchdogError
from pipeline.runtime import PipelineRuntime
from pipeline.stage import GraphStage
from pipeline.transport import GroupTransport, LocalHub, Message
from pipeline.transport.wire import decode, encode
from tests.pipeline_cases import Words, end_stopped, ragged, random_schedule, runner, stages_of, stop
from tests.spawn import SpawnError, run_ranks

TIMEOUT_S = {"fails": 60.0, "dies": 60.0, "stops": 4.0, "is slow": 2.0}
"""Of the waits in the step with the trouble; only a rank that is stopped or slow is noticed by it."""
PROMPT_S = 15.0


def rank_meets_trouble(info, folder, trouble):
    """Three stages; the last rank gets into trouble in its first forward of the second step.

    What a rank saw is told through a file: the rank in trouble brings `run_ranks` down with it.
    """
    place, batch = (0, 1, 2), ragged(4)
    transport, model = GroupTransport(dist.group.WORLD), Words(3)
    stages = stages_of(model, place, info.rank, batch)
    if info.rank == 2:
        stages[2] = GraphStage(in_trouble(runner([model.layers[2]], batch), trouble, folder), input_grad=True)
    schedule = random_schedule(place, 4, 0)
    PipelineRuntime(stages, transport, rank=info.rank, timeout_s=60).run(schedule, step=0)
    begun = time.monotonic()
    try:
        PipelineRuntime(stages, transport, rank=info.rank, timeout_s=TIMEOUT_S[trouble]).run(schedule, step=1)
    except (WatchdogError, ValueError) as error:
        found = [type(error).__name__, str(error), time.monotonic() - begun]
        (Path(folder) / str(info.rank)).write_text(json.dumps(found))
        end_stopped(Path(folder))


def in_trouble(run, trouble, folder):
    """The function of a stage, after four micro-batches."""
    calls = []

    def troubled(x, mb):
        calls.append(mb)
        if len(calls) > 4:
            trouble_of(trouble, folder)
        return run(x, mb)

    return troubled


def trouble_of(kind, folder):
    if kind == "fails":
        raise ValueError("no more")
    if kind == "dies":
        os._exit(7)
    if kind == "stops":
        stop(Path(folder))
    if kind == "is slow":
        time.sleep(5)


@pytest.mark.parametrize(
    "trouble", [pytest.param(t, marks=pytest.mark.slow if t == "is slow" else ()) for t in TIMEOUT_S]
)
def test_the_trouble_of_one_rank_ends_the_others_in_bounded_time(tmp_path, trouble):
    match = {"dies": "exited with code 7", "stops": "killed by SIGKILL"}.get(trouble)
    with pytest.raises(SpawnError, match=match) if match else nullcontext():
        run_ranks(rank_meets_trouble, 3, str(tmp_path), trouble, fresh=match is not None, timeout_s=25)
    for rank in (0, 1):
        kind, text, seconds = json.loads((tmp_path / str(rank)).read_text())
        assert kind == "WatchdogError"
        assert text.startswith(f"rank {rank}, step 1, action {rank}")
        assert seconds < PROMPT_S
        if trouble == "fails":
            assert re.search(r"rank 2:? gave up: no more", text)  # heard from rank 2, or from the other one
    if trouble == "is slow":  # on a busy machine another may be late, too, and all hear of the first that gave up
        assert "nothing came within 2 s" in text
        assert json.loads((tmp_path / "2").read_text())[0] == "WatchdogError"
    else:
        assert "rank 2" in text
    if trouble == "fails":
        assert json.loads((tmp_path / "2").read_text())[:2] == ["ValueError", "no more"]


def test_a_local_wait_has_a_deadline_too():
    transport = LocalHub(2).transport(0)
    with pytest.raises(WatchdogError, match=r"activation of micro-batch 3 for stage 1, step 7, from rank 1: nothing"):
        transport.receive(Message(7, Phase.F, 1, 3), peer=1, timeout_s=0.01)


@pytest.mark.parametrize("shape", [(), (3,), (1, 0, 4), (2, 1, 1, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_headers_read_back(shape, dtype):
    message = Message(12, Phase.B, 3, 45)
    assert decode(encode(message, torch.empty(shape, dtype=dtype)).tolist()) == (message, dtype, list(shape))


def test_what_cannot_travel_is_named():
    with pytest.raises(PipelineError, match=r"torch.complex64 with 1 dimensions"):
        encode(Message(0, Phase.F, 1, 0), torch.empty(2, dtype=torch.complex64))


def rank_sends_many(info):
    """All messages at once, of many shapes and dtypes, taken in another order than sent."""
    transport, total = GroupTransport(dist.group.WORLD), 40
    shapes = [(n % 5, 3, 1 + n % 7) for n in range(total)]
    peer = 1 - info.rank
    transport.begin({peer: total})
    for n, shape in enumerate(shapes):
        dtype = torch.float64 if n % 2 else torch.bfloat16
        transport.send(Message(0, Phase.F, 1, n), torch.full(shape, n + 100 * info.rank, dtype=dtype), peer=peer)
    for n in reversed(range(total)):
        got = transport.receive(Message(0, Phase.F, 1, n), peer=peer, timeout_s=20)
        assert got.shape == shapes[n]
        assert got.dtype == (torch.float64 if n % 2 else torch.bfloat16)
        assert bool((got == torch.tensor(n + 100 * peer, dtype=got.dtype)).all())
    transport.end(20)
    transport.close()


def test_messages_cross_in_any_order():
    run_ranks(rank_sends_many, 2)
