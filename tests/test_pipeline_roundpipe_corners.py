"""Corners of RoundPipe's runtime: what one rank leaves to another, and layers that do what they may not."""

import fcntl
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline.costs import Costs
from pipeline.errors import PipelineError, PlanError, ScheduleError
from pipeline.roundpipe.host_plan import plan_host
from pipeline.roundpipe.host_store import open_store
from pipeline.roundpipe.lowering import completed, ready_order, slot_schedule, without_optimizer
from pipeline.roundpipe.optimizer import HostOptimizer, global_norm
from pipeline.roundpipe.peers import Peers
from pipeline.schedules.roundpipe import Slots, roundpipe
from tests.pipeline_cases import WIDTH, Words, ragged
from tests.roundpipe_cases import open_worker, slot_layers
from tests.spawn import run_ranks

THREE = Slots(forward=(3,), fused=1, backward=(1, 2))


def sgd(store, peers):
    return HostOptimizer(store, peers, lambda ps: torch.optim.SGD(ps.values(), lr=0.1), clip_norm=None, trace=None)


def rank_skips_its_table(info):
    """After one step, and after two, of which the second does not read the embedding."""
    tables = []
    for steps in (1, 2):
        batch = ragged(2)
        embedding, *others = slot_layers(Words(4), batch)

        def embed(x, mb, embedding=embedding, batch=batch):
            return embedding.run(x, mb) if mb < 2 else torch.ones(batch[mb - 2].shape[1], WIDTH, dtype=torch.float64)

        worker = open_worker(
            [replace(embedding, run=embed), *others], THREE, group=dist.group.WORLD, rank=info.rank, ranks=1,
            microbatches=2, make_optimizer=sgd,
        )  # fmt: skip
        before = worker.store.weights("0.weight").clone()
        worker.run(slot_schedule(THREE, devices=1, microbatches=2, steps=steps))
        tables.append(worker.store.weights("0.weight") - before)
        worker.close()
    return tables


def test_a_table_that_no_micro_batch_reads_has_no_gradient_of_an_earlier_step():
    one, two = run_ranks(rank_skips_its_table, 1)[0]
    assert one.abs().max() > 0
    assert torch.equal(one, two)


def test_every_step_under_the_callers_autocast_has_the_weights_of_that_step():
    losses = []
    for inside in (True, False):
        model, batch = Words(4).float(), ragged(2)
        layers = slot_layers(model, batch)
        if inside:
            layers = [replace(one, run=torch.autocast("cpu", torch.bfloat16)(one.run)) for one in layers]
        worker = open_worker(layers, THREE, group=None, rank=0, ranks=1, microbatches=2, make_optimizer=sgd)
        with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
            losses.append(worker.run(slot_schedule(THREE, devices=1, microbatches=2, steps=2)))
        worker.close()
    assert torch.equal(*losses)
    assert not torch.equal(losses[0][:2], losses[0][2:])


def rank_changes_in_place(info):
    embedding, block, other, head = slot_layers(Words(4), ragged(2))
    worker = open_worker(
        [embedding, block, replace(other, run=lambda x, mb: x.relu_()), head], THREE, group=dist.group.WORLD,
        rank=info.rank, ranks=1, microbatches=2,
    )  # fmt: skip
    with pytest.raises(PipelineError) as raised:
        worker.run(without_optimizer(slot_schedule(THREE, devices=1, microbatches=2)))
    worker.close()
    return str(raised.value)


def test_a_layer_that_changes_what_another_slot_needs_is_an_error():
    (text,) = run_ranks(rank_changes_in_place, 1)
    assert "layer 2, 2, changes its input in place, which is also what its backward runs again from" in text


class _Late(Peers):
    """Finds all norms there, and reads them only when the other rank has written the next."""

    def __init__(self, store, written):
        super().__init__(store, [0, 0], rank=1, timeout_s=20)
        self._written = written

    def wait(self, word, value, what):
        super().wait(word, value, what)
        assert self._written.wait(20)


def test_a_rank_that_is_a_norm_ahead_does_not_change_that_of_another():
    slots = Slots(forward=(1,), fused=1, backward=(1,))
    store = open_store(
        plan_host(slot_layers(Words(2), ragged(2)), slots, ranks=2, microbatches=2, boundary_bytes=64), None
    )
    mine, theirs = ({p.name: torch.full(p.shape, 2.0) for p in store.plan.owned(rank)} for rank in (0, 1))
    found, written = [], threading.Event()
    late = threading.Thread(target=lambda: found.append(global_norm(store, _Late(store, written), theirs, count=1)))
    late.start()
    ahead = Peers(store, [0, 0], rank=0, timeout_s=20)
    first = global_norm(store, ahead, mine, count=1)
    again = threading.Thread(
        target=lambda: global_norm(store, ahead, {name: 10 * g for name, g in mine.items()}, count=2)
    )
    again.start()
    while store.words[store.plan.words.normed(0)] < 2:
        time.sleep(0.001)
    written.set()
    late.join(20)
    store.words.publish(store.plan.words.normed(1), 2)
    again.join(20)
    assert float(first) == float(found[0])


def rank_opens_alone(info, folder):
    """Rank 1 does not come: rank 0 hears of it by its deadline, and takes back the file it has made."""
    group = dist.new_group(timeout=timedelta(seconds=1))
    if info.rank == 0:
        plan = plan_host(slot_layers(Words(4), ragged(2)), THREE, ranks=2, microbatches=2, boundary_bytes=64)
        with pytest.raises(RuntimeError):
            open_store(plan, group, folders=(Path(folder),))


def test_a_store_that_nobody_comes_to_leaves_no_file(tmp_path):
    run_ranks(rank_opens_alone, 2, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_rank_left_is_cleared_away_and_nothing_else(tmp_path):
    """A file whose maker lives is locked; one of another name is somebody's."""
    left, used, other = (tmp_path / f"longrail-{name}" for name in ("store-1-" + "a" * 16, "store-2-" + "b" * 16, "x"))
    for path in (left, used, other):
        path.touch()
    with used.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        plan = plan_host(slot_layers(Words(4), ragged(2)), THREE, ranks=1, microbatches=2, boundary_bytes=64)
        open_store(plan, None, folders=(tmp_path,))
        assert sorted(tmp_path.iterdir()) == sorted([used, other])


def rank_owns_nothing(info):
    """More ranks than layers with weights of their own: the last one is told late that a run has ended."""
    slots = Slots(forward=(2,), fused=1, backward=(2,))
    worker = open_worker(
        slot_layers(Words(3, tied=True), ragged(2)), slots, group=dist.group.WORLD, rank=info.rank, ranks=3,
        microbatches=2, make_optimizer=sgd,
    )  # fmt: skip
    schedule = slot_schedule(slots, devices=3, microbatches=2)
    if info.rank == 2:
        assert not worker.store.plan.owned(2)
        drain = worker.store.words.publish
        ended = worker.store.plan.words.ended(2)

        def publish(word, value):
            drain(word, value)
            if word == ended:
                time.sleep(0.2)

        worker.store.words.publish = publish
    losses = [worker.run(schedule) for _ in range(3)]
    worker.close()
    return torch.stack(losses)


def test_a_rank_that_reads_the_losses_late_has_those_of_its_run():
    first, second, third = run_ranks(rank_owns_nothing, 3)
    assert torch.equal(first, second)
    assert torch.equal(first, third)


def test_an_order_in_which_rounds_would_wait_for_each_other_gives_way_to_fewer_open_slots():
    """Ready-first, a device begins a round's slots before others have ended those of the round before."""
    costs = Costs(forward_s=((1.0, 2.0, 0.01),), backward_s=((2.0, 0.4, 0.02),))
    slots, numbers = Slots(forward=(1, 1), fused=1, backward=(1, 1)), {"devices": 3, "microbatches": 2, "rounds": 2}
    with pytest.raises(ScheduleError, match=r"a deadlock, each waits for the next: \dDOWNLOAD1@"):
        completed(roundpipe(slots=slots, order=ready_order(slots, 3, 2, 2, costs, 4), **numbers))
    found = slot_schedule(slots, costs=costs, open_slots=4, **numbers)
    fewer = [slot_schedule(slots, costs=costs, open_slots=count, **numbers) for count in (1, 2, 3)]
    assert found in fewer


def test_steps_that_all_have_fewer_micro_batches_than_rounds_have_fewer_rounds():
    schedule = slot_schedule(THREE, devices=2, microbatches=(1, 2), rounds=3)
    assert [schedule.rounds_of(step) for step in (0, 1)] == [1, 2]
    with pytest.raises((PlanError, ScheduleError), match="3 rounds for 2 micro-batches"):
        slot_schedule(THREE, devices=2, microbatches=2, rounds=3)
