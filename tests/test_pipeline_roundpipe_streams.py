"""Weights on their way to a device that has room for few of them: no error while there is something to send away."""

import threading
from dataclasses import replace

import pytest
import torch

from pipeline.errors import MemoryCapError
from pipeline.roundpipe.arena import Arena
from pipeline.roundpipe.streams import Streams
from pipeline.roundpipe.versions import Versions
from pipeline.roundpipe.visit import Visit
from pipeline.schedules.roundpipe import Slots
from tests.pipeline_cases import Words, ragged
from tests.roundpipe_cases import open_worker, slot_layers

SLOTS = Slots(forward=(2, 3), fused=2, backward=(1, 2, 2))
BLOCK_BYTES = 8 * (12 * 20 + 20 + 20 * 12 + 2 * 12)


class LateArena(Arena):
    """Once armed, the lane takes room just when the rank looks for the second time, if nothing keeps it from that."""

    def __init__(self, cap_bytes):
        super().__init__(device=0, cap_bytes=cap_bytes)
        self.armed, self.looks = False, 0
        self.lane_asks, self.rank_looks, self.lane_has = threading.Event(), threading.Event(), threading.Event()

    def try_lease(self, nbytes):
        if self.armed and threading.current_thread().name.startswith("roundpipe-lane"):
            self.lane_asks.set()
            self.rank_looks.wait(0.5)  # not before the lane has its room, where the rank waits for the lane
            lease = super().try_lease(nbytes)
            self.lane_has.set()
            return lease
        self.looks += self.armed
        if self.looks == 2:
            self.rank_looks.set()
            assert self.lane_has.wait(5)
        return super().try_lease(nbytes)


class Bench:
    """Streams of one rank, in one process, by hand."""

    def __init__(self, arena):
        layers = slot_layers(Words(7), ragged(3))
        self.worker = open_worker(layers, SLOTS, group=None, rank=0, ranks=1, microbatches=3)
        self.arena = arena
        self.versions = Versions(self.worker.store, base=1)
        self.streams = Streams(
            layers, self.worker.store, self.arena, self.worker.lane, self.worker.peers, self.versions,
            stepped=False, device=torch.device("cpu"),
        )  # fmt: skip

    def visit(self, slot):
        """The first step's visit of a slot of one layer, whose number is the slot's."""
        return Visit(slot, (slot, slot + 1), 0, 0, 0, frozenset({slot}))

    def waited(self, visit):
        self.streams.uploaded(visit, lambda: "test")


@pytest.fixture
def bench(request):
    made = Bench(request.param)
    yield made
    made.worker.close()


@pytest.mark.parametrize("bench", [Arena(device=0, cap_bytes=BLOCK_BYTES * 3 // 2)], indirect=True)
def test_weights_that_came_too_early_give_way_to_those_that_are_waited_for(bench):
    """The next slot's weights are made first, and take the room while the rank waits for this one's."""
    now, then = bench.visit(1), bench.visit(2)
    assert (str(now), str(replace(now, first_step=7))) == ("slot 1, step 0, round 0", "slot 1, step 7, round 0")
    bench.streams.upload(now)
    bench.streams.upload(then)

    def make_versions():
        while not now.upload.needed:
            pass
        bench.versions.publish(2, 0)
        assert then.upload.done.wait(10)
        bench.versions.publish(1, 0)

    thread = threading.Thread(target=make_versions)
    thread.start()
    bench.waited(now)
    thread.join(10)
    assert now.weights
    assert not then.weight_leases
    assert bench.arena.peak_bytes == BLOCK_BYTES
    now.drop_weights()
    bench.waited(then)
    assert then.weights


@pytest.mark.parametrize("bench", [Arena(device=0, cap_bytes=BLOCK_BYTES - 1)], indirect=True)
def test_weights_that_never_fit_are_an_error(bench):
    now = bench.visit(1)
    bench.versions.publish(1, 0)
    bench.streams.upload(now)
    with pytest.raises(MemoryCapError, match=f"slot 1: {BLOCK_BYTES:,} bytes for weights, with 0 in use already"):
        bench.waited(now)


@pytest.mark.parametrize("bench", [LateArena(BLOCK_BYTES * 5 // 2)], indirect=True)
def test_no_weights_come_while_room_is_made(bench):
    """The lane is about to take room for weights that nobody waits for, while the rank sends others away."""
    first, second = bench.visit(1), bench.visit(2)
    bench.versions.publish(1, 0)
    bench.streams.upload(first)
    assert first.upload.done.wait(10)
    bench.arena.armed = True
    bench.streams.upload(second)
    bench.versions.publish(2, 0)
    assert bench.arena.lane_asks.wait(10)
    bench.arena.lease(2 * BLOCK_BYTES, slot=3, what="a gradient").free()
    assert not first.weight_leases
    assert not second.weight_leases
