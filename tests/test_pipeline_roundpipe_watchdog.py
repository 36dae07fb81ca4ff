"""A rank of RoundPipe that dies, stops, fails or is slow: an error on every rank, in bounded time, that says where."""

import json
import os
import re
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch.distributed as dist

from pipeline.errors import WatchdogError
from pipeline.roundpipe.lowering import slot_schedule, without_optimizer
from pipeline.schedules.roundpipe import Slots
from tests.pipeline_cases import Words, end_stopped, ragged, stop
from tests.roundpipe_cases import open_worker, slot_layers
from tests.spawn import SpawnError, run_ranks

SLOTS = Slots(forward=(2, 2), fused=1, backward=(2, 2))
TIMEOUT_S = {"fails": 60.0, "dies": 60.0, "stops": 4.0, "is slow": 1.5}
PROMPT_S = 20.0


def rank_meets_trouble(info, folder, trouble):
    """Three ranks; the last gets into trouble in its second run. What a rank saw is told through a file."""
    model, batch = Words(5), ragged(3)
    layers = slot_layers(model, batch)
    worker = open_worker(
        layers, SLOTS, group=dist.group.WORLD, rank=info.rank, ranks=3, microbatches=3, timeout_s=60
    )  # fmt: skip
    schedule = without_optimizer(slot_schedule(SLOTS, devices=3, microbatches=3))
    worker.run(schedule)
    worker.peers.timeout_s = TIMEOUT_S[trouble]
    if info.rank == 2:
        worker.layers = [
            *layers[:-1],
            type(layers[-1])("head", layers[-1].parameters, in_trouble(layers[-1], trouble, folder)),
        ]
    begun = time.monotonic()
    try:
        worker.run(schedule, first_step=6)
    except (WatchdogError, ValueError) as error:
        found = [type(error).__name__, str(error), time.monotonic() - begun]
        (Path(folder) / str(info.rank)).write_text(json.dumps(found))
        end_stopped(Path(folder))
    worker.close()


def in_trouble(layer, trouble, folder):
    def run(x, mb):
        if mb == 1:
            if trouble == "fails":
                raise ValueError("no more")
            if trouble == "dies":
                os._exit(7)
            if trouble == "stops":
                stop(Path(folder))
            time.sleep(4)
        return layer.run(x, mb)

    return run


@pytest.mark.parametrize(
    "trouble", [pytest.param(t, marks=pytest.mark.slow if t == "is slow" else ()) for t in TIMEOUT_S]
)
def test_the_trouble_of_one_rank_ends_the_others_in_bounded_time(tmp_path, trouble):
    """The fused slot is the third, so it runs on rank 2; others wait for its gradient."""
    match = {"dies": "exited with code 7", "stops": "killed by SIGKILL"}.get(trouble)
    with pytest.raises(SpawnError, match=match) if match else nullcontext():
        run_ranks(rank_meets_trouble, 3, str(tmp_path), trouble, fresh=match is not None, timeout_s=18)
    texts = []
    for rank in (0, 1):
        kind, text, seconds = json.loads((tmp_path / str(rank)).read_text())
        assert kind == "WatchdogError"
        assert text.startswith(f"rank {rank}, ")
        assert seconds < PROMPT_S
        texts.append(text)
    everything = " ".join(texts)
    if TIMEOUT_S[trouble] > PROMPT_S:  # else a busy machine may be late, and heard of, somewhere before
        assert re.search(
            r"rank 0, step 6, slot 3, micro-batch 1 \(3B1\): waiting for the gradient of slot 2", everything
        )
    assert re.search(r"waiting for the \w+ of slot \d, micro-batch \d, from rank \d: ", everything)
    expected = {
        "fails": "rank 2 gave up: no more",
        "dies": "rank 2 is gone: its process ended",
        "stops": "nothing came within 4 s",  # whichever of the two is first to say so
        "is slow": "nothing came within 1.5 s",
    }
    assert expected[trouble] in everything
    if trouble == "fails":
        assert json.loads((tmp_path / "2").read_text())[:2] == ["ValueError", "no more"]
    if trouble == "is slow":  # it hears that the others have given up
        assert "gave up: rank " in json.loads((tmp_path / "2").read_text())[1]
