"""Staleness as a contract: which weights a step sees with 0 and 1, and that a breach is found at the upload."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline.errors import PlanError, ScheduleError, StalenessError, WatchdogError
from pipeline.roundpipe.host_plan import plan_host
from pipeline.roundpipe.host_store import open_store
from pipeline.roundpipe.lowering import slot_schedule
from pipeline.roundpipe.optimizer import HostOptimizer
from pipeline.roundpipe.versions import Versions
from pipeline.schedules.roundpipe import Slots
from tests.pipeline_cases import Words, one_process, ragged
from tests.roundpipe_cases import open_worker, slot_layers
from tests.spawn import run_ranks

SLOTS = Slots(forward=(2, 3), fused=2, backward=(1, 2, 2))
MICROBATCHES, STEPS = 4, 5


def adamw(store, peers):
    return HostOptimizer(store, peers, lambda ps: torch.optim.AdamW(ps.values(), lr=0.05), clip_norm=None, trace=None)


def rank_trains(info, staleness, runs, open_slots):
    worker = open_worker(
        slot_layers(Words(7, tied=True), ragged(MICROBATCHES)), SLOTS, group=dist.group.WORLD, rank=info.rank,
        ranks=info.world_size, microbatches=MICROBATCHES, staleness=staleness, make_optimizer=adamw,
    )  # fmt: skip
    losses = []
    for steps in runs:
        schedule = slot_schedule(
            SLOTS, devices=info.world_size, microbatches=MICROBATCHES, steps=steps, staleness=staleness, rounds=2,
            open_slots=open_slots,
        )  # fmt: skip
        losses.append(worker.run(schedule))
    weights = {name: worker.store.weights(name).clone() for name in worker.store.plan.parameters}
    worker.close()
    return torch.cat(losses), weights


def delayed(runs, staleness):
    """One process whose gradients are taken at weights `staleness` steps old; each run begins with the newest."""
    model = Words(7, tied=True)
    trained = list(model.parameters())
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    losses = []
    for steps in runs:
        versions = [[p.detach().clone() for p in trained]]
        for step in range(steps):
            newest = [p.detach().clone() for p in trained]
            put(trained, versions[max(0, step - staleness)])
            found = one_process(model, ragged(MICROBATCHES))
            losses += [found[mb] for mb in range(MICROBATCHES)]
            put(trained, newest)
            optimizer.step()
            optimizer.zero_grad()
            versions.append([p.detach().clone() for p in trained])
    return torch.stack(losses), {name: p.detach() for name, p in model.layers.named_parameters()}


def put(parameters, values):
    with torch.no_grad():
        for p, value in zip(parameters, values, strict=True):
            p.copy_(value)


@pytest.mark.parametrize(("staleness", "runs", "open_slots"), [(0, (2, 1), 2), (1, (STEPS,), 1), (1, (3, 2, 1), 2)])
def test_a_step_sees_the_weights_that_the_staleness_says(staleness, runs, open_slots):
    expected, weights = delayed(runs, staleness)
    first = None
    for ranks in (1, 2, 3):
        losses, found = run_ranks(rank_trains, ranks, staleness, runs, open_slots)[0]
        torch.testing.assert_close(losses, expected, rtol=1e-11, atol=1e-12)
        for name, p in weights.items():
            torch.testing.assert_close(found[name], p, rtol=1e-9, atol=1e-11, msg=name)
        first = first or (losses, found)
        assert torch.equal(losses, first[0])
        assert all(torch.equal(found[name], p) for name, p in first[1].items())


SIZES = (4, 1, 3, 2, 4)
"""Micro-batches of each step; the second has fewer than rounds."""


def rank_trains_ragged(info, staleness, open_slots):
    worker = open_worker(
        slot_layers(Words(7, tied=True), ragged(sum(SIZES))), SLOTS, group=dist.group.WORLD, rank=info.rank,
        ranks=info.world_size, microbatches=max(SIZES), staleness=staleness, make_optimizer=adamw,
    )  # fmt: skip
    schedule = slot_schedule(
        SLOTS, devices=info.world_size, microbatches=SIZES, staleness=staleness, rounds=2, open_slots=open_slots
    )  # fmt: skip
    losses = worker.run(schedule)
    weights = {name: worker.store.weights(name).clone() for name in worker.store.plan.parameters}
    worker.close()
    return losses, weights


@pytest.mark.parametrize(("staleness", "open_slots"), [(0, 1), (1, 2)])
def test_steps_of_one_run_may_have_any_number_of_microbatches_and_data_of_their_own(staleness, open_slots):
    model, data = Words(7, tied=True), ragged(sum(SIZES))
    trained = list(model.parameters())
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    expected, versions, first = {}, [[p.detach().clone() for p in trained]], 0
    for step, size in enumerate(SIZES):
        put(trained, versions[max(0, step - staleness)])
        expected |= one_process(model, data, list(range(first, first + size)))
        put(trained, versions[-1])
        optimizer.step()
        optimizer.zero_grad()
        versions.append([p.detach().clone() for p in trained])
        first += size
    same = None
    for ranks in (1, 2, 3):
        losses, found = run_ranks(rank_trains_ragged, ranks, staleness, open_slots)[0]
        torch.testing.assert_close(losses, torch.stack([expected[mb] for mb in range(sum(SIZES))]), rtol=1e-11, atol=0)
        for name, p in model.layers.named_parameters():
            torch.testing.assert_close(found[name], p.detach(), rtol=1e-9, atol=1e-11, msg=name)
        same = same or (losses, found)
        assert torch.equal(losses, same[0])
        assert all(torch.equal(found[name], p) for name, p in same[1].items())


ODD = Slots(forward=(5,), fused=2, backward=(5,))


def rank_is_overtaken(info):
    """Three slots on four ranks: a slot of one step is on another rank than that of the next, and need not be first."""
    *layers, head = slot_layers(Words(7, tied=True), ragged(MICROBATCHES))

    def late(x, mb):
        time.sleep(0.03 if mb // MICROBATCHES % 2 == 0 else 0)
        return head.run(x, mb)

    worker = open_worker(
        [*layers, replace(head, run=late)], ODD, group=dist.group.WORLD, rank=info.rank, ranks=info.world_size,
        microbatches=MICROBATCHES, staleness=1, make_optimizer=adamw,
    )  # fmt: skip
    schedule = slot_schedule(ODD, devices=info.world_size, microbatches=MICROBATCHES, steps=4, staleness=1)
    losses = worker.run(schedule)
    weights = {name: worker.store.weights(name).clone() for name in worker.store.plan.parameters}
    worker.close()
    return losses, weights


def test_a_step_that_overtakes_the_one_before_it_is_not_taken_for_it():
    expected, weights = delayed((4,), 1)
    losses, found = run_ranks(rank_is_overtaken, 4)[0]
    torch.testing.assert_close(losses, expected, rtol=1e-11, atol=1e-12)
    for name, p in weights.items():
        torch.testing.assert_close(found[name], p, rtol=1e-9, atol=1e-11, msg=name)


def rank_refuses_to_step(info):
    """The optimizer of rank 0 gives up in the second step; every rank hears of it, long before the deadline."""

    def before_step(step, norm):
        if info.rank == 0 and step == 1:
            raise ValueError(f"no further than a norm of {float(norm) > 0}")

    def make(store, peers):
        return HostOptimizer(
            store, peers, lambda ps: torch.optim.SGD(ps.values(), lr=0.1), clip_norm=None, trace=None,
            before_step=before_step,
        )  # fmt: skip

    worker = open_worker(
        slot_layers(Words(7), ragged(2)), SLOTS, group=dist.group.WORLD, rank=info.rank, ranks=info.world_size,
        microbatches=2, make_optimizer=make, timeout_s=100,
    )  # fmt: skip
    begun = time.monotonic()
    with pytest.raises((ValueError, WatchdogError)) as raised:
        worker.run(slot_schedule(SLOTS, devices=info.world_size, microbatches=2, steps=4))
    worker.close()
    return type(raised.value).__name__, str(raised.value), time.monotonic() - begun


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_optimizer_that_fails_ends_every_rank_with_its_reason(ranks):
    first, *others = run_ranks(rank_refuses_to_step, ranks)
    assert first[:2] == ("ValueError", "no further than a norm of True")
    assert all(kind == "WatchdogError" and "rank 0 gave up: no further" in text for kind, text, _ in others)
    assert all(seconds < 60 for *_, seconds in (first, *others))


@pytest.mark.parametrize("staleness", [0, 1])
def test_every_upload_is_held_to_the_contract(staleness):
    layers = slot_layers(Words(7), ragged(2))
    plan = plan_host(layers, SLOTS, ranks=1, microbatches=2, boundary_bytes=4096, staleness=staleness)
    store = open_store(plan, None)
    versions = Versions(store, base=10)
    assert versions.missing((3,), 0) == "version 0 of layer 3 from the optimizer of rank 0"
    versions.publish(3, 0)
    assert versions.missing((3,), 0) is None
    versions.check((3,), 0, slot=1, step=staleness)
    with pytest.raises(StalenessError, match=f"slot 1, step {staleness + 1}: weights of version 0 are asked for"):
        versions.check((3,), 0, slot=1, step=staleness + 1)
    with pytest.raises(StalenessError, match="layer 3 is at version 0 while version 1 is read"):
        versions.check((3,), 1, slot=1, step=1)
    for version in range(1, staleness + 1):  # as many as the host holds beside it
        versions.publish(3, version)
        versions.check((3,), 0, slot=1, step=staleness)
    versions.publish(3, staleness + 1)
    with pytest.raises(StalenessError, match=f"is at version {staleness + 1} while version 0 is read; with staleness"):
        versions.check((3,), 0, slot=1, step=staleness)


def rank_overwrites(info):
    """An optimizer that runs ahead of its gradients is found by the upload that reads what it wrote."""
    worker = open_worker(
        slot_layers(Words(7), ragged(2)), SLOTS, group=dist.group.WORLD, rank=info.rank, ranks=1, microbatches=2,
        make_optimizer=adamw,
    )  # fmt: skip
    missing = Versions.missing

    def missing_and_hurry(self, homes, version):
        answer = missing(self, homes, version)
        if answer is None and 3 in homes:
            self.publish(3, version + 1)
        return answer

    Versions.missing = missing_and_hurry
    try:
        with pytest.raises(StalenessError) as raised:
            worker.run(slot_schedule(SLOTS, devices=1, microbatches=2))
    finally:
        Versions.missing = missing
        worker.close()
    return str(raised.value)


def test_weights_that_change_under_an_upload_are_an_error():
    (text,) = run_ranks(rank_overwrites, 1)
    assert text.startswith("slot 1, step 0: layer 3 is at version 1 while version 0 is read; with staleness 0")


def rank_asks_for_stale(info):
    worker = open_worker(
        slot_layers(Words(7), ragged(2)), SLOTS, group=dist.group.WORLD, rank=info.rank, ranks=1, microbatches=2,
        make_optimizer=adamw,
    )  # fmt: skip
    with pytest.raises(ScheduleError, match="its staleness is 1; the store holds one version of the weights"):
        worker.run(slot_schedule(SLOTS, devices=1, microbatches=2, steps=2, staleness=1))
    worker.close()


def test_a_store_without_a_second_version_refuses_stale_schedules():
    run_ranks(rank_asks_for_stale, 1)


def test_a_store_that_has_no_room_is_an_error_before_anything_runs(tmp_path):
    layers = slot_layers(Words(7), ragged(2))
    plan = plan_host(layers, SLOTS, ranks=1, microbatches=2, boundary_bytes=4096)
    with pytest.raises(PlanError, match=r"need .* bytes of shared memory.*: .* has .* bytes free\. Make it larger"):
        open_store(plan, None, folders=(tmp_path,), spare_bytes=2**60)
    with pytest.raises(PlanError, match="No such file"):
        open_store(plan, None, folders=(tmp_path / "none",))
    store = open_store(plan, None, folders=(tmp_path / "none", tmp_path))  # the second has room
    assert store.folder == tmp_path
    assert list(tmp_path.iterdir()) == []  # without a name once it is mapped
    store.weights("0.weight").fill_(2)
    assert float(store.weights("0.weight").sum()) == 2 * store.weights("0.weight").numel()


def rank_has_no_room(info, folder):
    plan = plan_host(slot_layers(Words(7), ragged(2)), SLOTS, ranks=2, microbatches=2, boundary_bytes=4096)
    with pytest.raises(PlanError, match=r"need .* bytes of shared memory") as raised:
        open_store(plan, dist.group.WORLD, folders=(Path(folder),), spare_bytes=2**60)
    return str(raised.value)


def test_every_rank_hears_that_there_is_no_room(tmp_path):
    first, second = run_ranks(rank_has_no_room, 2, str(tmp_path))
    assert first == second
    assert list(tmp_path.iterdir()) == []


def test_plans_that_do_not_fit_the_layers_are_refused():
    layers = slot_layers(Words(6), ragged(2))
    with pytest.raises(PlanError, match="the slots hold 7 layers and the model has 6"):
        plan_host(layers, SLOTS, ranks=1, microbatches=2, boundary_bytes=64)
