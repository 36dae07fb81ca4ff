"""RoundPipe's runtime against one process that runs every micro-batch in turn; the same bits on any number of ranks."""

import re
import threading

import pytest
import torch
import torch.distributed as dist

from pipeline.costs import Costs
from pipeline.errors import MemoryCapError, ScheduleError
from pipeline.roundpipe.arena import Arena
from pipeline.roundpipe.lowering import check_waits, scoring, slot_schedule, without_optimizer
from pipeline.roundpipe.optimizer import HostOptimizer
from pipeline.roundpipe.transfers import Link
from pipeline.schedules.roundpipe import Slots
from tests.pipeline_cases import Words, one_process, ragged
from tests.roundpipe_cases import open_worker, slot_layers
from tests.spawn import run_ranks

SLOTS = Slots(forward=(2, 3), fused=2, backward=(1, 2, 2))
MICROBATCHES, CLIP = 5, 0.3


def freeze(model, layers):
    for layer in layers:
        for p in model.layers[layer].parameters():
            p.requires_grad_(False)
    return model


def adamw(store, peers, clip_norm=CLIP):
    return HostOptimizer(
        store, peers, lambda ps: torch.optim.AdamW(ps.values(), lr=0.05), clip_norm=clip_norm, trace=None
    )


def rank_trains(info, slots, model, plan, options):
    """Train the steps of one run; losses, weights, optimizer state of what is owned here, and the random state."""
    model = freeze(Words(7, **model), options.get("frozen", ()))
    if options.get("dropout"):
        model.train()
    group = dist.group.WORLD
    worker = open_worker(
        slot_layers(model, ragged(MICROBATCHES)), slots, group=group, rank=info.rank, ranks=info.world_size,
        microbatches=MICROBATCHES, make_optimizer=adamw,
    )  # fmt: skip
    before = torch.get_rng_state()
    schedule = slot_schedule(slots, devices=info.world_size, microbatches=MICROBATCHES, **plan)
    losses = worker.run(schedule, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    weights = {name: worker.store.weights(name).clone() for name in worker.store.plan.parameters}
    state = {name: {k: v.clone() for k, v in slots.items()} for name, slots in worker.optimizer.state().items()}
    assert worker.arena.used_bytes == 0
    worker.close()
    return losses, weights, state


def plain(model, steps, frozen=()):
    """The plainest run: losses and weights after some steps of AdamW."""
    model = freeze(Words(7, **model), frozen)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    losses = []
    for _ in range(steps):
        found = one_process(model, ragged(MICROBATCHES))
        losses += [found[mb] for mb in range(MICROBATCHES)]
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses), {name: p.detach() for name, p in model.layers.named_parameters()}


CASES = {
    "plain": (SLOTS, {}, {}, {}),
    "tied, two rounds, open slots": (SLOTS, {"tied": True}, {"rounds": 2, "open_slots": 2}, {}),
    "three rounds, one slot for all": (Slots(forward=(), fused=7, backward=()), {"tied": True}, {"rounds": 3}, {}),
    "frozen in front": (Slots(forward=(1, 4), fused=2, backward=(2, 1)), {}, {"open_slots": 2}, {"frozen": (0, 1)}),
    "frozen in the middle": (SLOTS, {}, {"rounds": 2}, {"frozen": (3, 4)}),
    "dropout": (SLOTS, {"dropout": 0.3}, {"rounds": 2}, {"dropout": True}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_any_number_of_ranks_gives_the_same_bits_and_those_are_right(case):
    slots, model, plan, options = case
    plan = {"steps": 3} | plan
    first = None
    for ranks in (1, 2, 3, 4):
        results = run_ranks(rank_trains, ranks, slots, model, plan, options)
        states = {name: state for _, _, owned in results for name, state in owned.items()}
        assert sum(len(owned) for *_, owned in results) == len(states)
        losses, weights, _ = results[0]
        assert all(torch.equal(other, losses) for other, *_ in results)
        first = first or (losses, weights, states)
        assert torch.equal(losses, first[0])
        assert all(torch.equal(weights[name], p) for name, p in first[1].items())
        assert all(torch.equal(states[name][k], x) for name, slots in first[2].items() for k, x in slots.items())
    if not options.get("dropout"):
        losses, weights = plain(model, 3, options.get("frozen", ()))
        torch.testing.assert_close(first[0], losses, rtol=1e-12, atol=1e-13)
        for name, p in weights.items():
            torch.testing.assert_close(first[1][name], p, rtol=1e-10, atol=1e-12, msg=name)
    else:
        assert not torch.equal(first[0][:MICROBATCHES], plain({}, 1)[0])  # dropped out, indeed


def rank_runs_many(info):
    """Runs of other numbers of micro-batches on one store, evaluations among them; gradients are left to the caller."""
    model, batch = Words(7), ragged(MICROBATCHES)
    worker = open_worker(
        slot_layers(model, batch), SLOTS, group=dist.group.WORLD, rank=info.rank, ranks=info.world_size,
        microbatches=MICROBATCHES,
    )  # fmt: skip
    found = []
    for microbatches in (5, 1, 3, 5):
        schedule = slot_schedule(SLOTS, devices=info.world_size, microbatches=microbatches, open_slots=2)
        evaluated = worker.run(scoring(schedule), scoring=True)
        losses = worker.run(without_optimizer(schedule))
        assert torch.equal(evaluated, losses)
        names = worker.store.plan.parameters
        found.append((losses, {n: worker.store.gradient(n, p.layers[0]).clone() for n, p in names.items()}))
    worker.close()
    return found


def test_steps_may_have_any_number_of_microbatches():
    """Fewer than ranks, too; evaluations give the losses of training and leave no gradient."""
    for found in zip(*(run_ranks(rank_runs_many, ranks)[0] for ranks in (1, 3)), strict=True):
        (losses, grads), (losses_3, grads_3) = found
        assert torch.equal(losses, losses_3)
        model = Words(7)
        one_process(model, ragged(MICROBATCHES), list(range(len(losses))))
        for name, p in model.layers.named_parameters():
            assert torch.equal(grads[name], grads_3[name])
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-12, atol=1e-14, msg=name)


def rank_measures(info, num_layers, cap_bytes):
    model, batch = Words(num_layers), ragged(3)
    slots = Slots(forward=(2,) * ((num_layers - 1) // 2), fused=1, backward=(2,) * ((num_layers - 1) // 2))
    worker = open_worker(
        slot_layers(model, batch), slots, group=dist.group.WORLD, rank=info.rank, ranks=info.world_size,
        microbatches=3, cap_bytes=cap_bytes,
    )  # fmt: skip
    for _ in range(3):
        worker.run(without_optimizer(slot_schedule(slots, devices=info.world_size, microbatches=3)))
    worker.close()
    return worker.arena.peak_bytes, sum(p.numel() * 8 for p in Words(num_layers).parameters())


def test_device_memory_does_not_depend_on_the_number_of_layers():
    """The cap is what 11 layers take; a model of 35 layers, more than three times as large, runs under it."""
    small = run_ranks(rank_measures, 2, 11, None)
    cap = max(peak for peak, _ in small)
    large = run_ranks(rank_measures, 2, 35, cap)
    assert max(peak for peak, _ in large) <= cap
    assert large[0][1] > cap


def rank_exceeds(info, cap_bytes):
    with pytest.raises(MemoryCapError) as raised:
        rank_measures(info, 7, cap_bytes)
    return str(raised.value)


def test_more_than_the_cap_is_an_error_that_says_where():
    (text,) = run_ranks(rank_exceeds, 1, 5_000)
    assert text.startswith("device 0, slot ")
    assert "are over the cap of 5,000" in text
    arena = Arena(device=3, cap_bytes=100)
    lease = arena.lease(60, slot=1, what="weights")
    with pytest.raises(MemoryCapError, match=r"device 3, slot 2: 50 bytes for gradients, with 60 in use already"):
        arena.lease(50, slot=2, what="gradients")
    lease.free()
    lease.free()
    assert (arena.used_bytes, arena.peak_bytes) == (0, 60)


def test_pieces_of_weights_let_an_activation_go_first():
    """One that wants to move is next, whatever waits; nothing moves beside it."""
    link, order, inside = Link(), [], threading.Event()

    def move_pieces():
        for number in range(3):
            with link.piece():
                order.append(number)
                if number == 0:
                    inside.set()
                    while not link.urgent.locked():  # until the activation is there
                        pass

    thread = threading.Thread(target=move_pieces)
    thread.start()
    assert inside.wait(10)
    with link.urgent, link.moving:
        order.append("activation")
    thread.join(10)
    assert order == [0, "activation", 1, 2]


def rank_refuses(info):
    schedule = without_optimizer(slot_schedule(SLOTS, devices=1, microbatches=3))
    texts = []
    for wrong in (
        slot_schedule(SLOTS, devices=1, microbatches=3),
        without_optimizer(slot_schedule(SLOTS, devices=2, microbatches=3)),
        without_optimizer(slot_schedule(SLOTS, devices=1, microbatches=4)),
        slot_schedule(SLOTS, devices=1, microbatches=3, steps=2, staleness=1),
        schedule.with_devices([[a for a in schedule.of(0) if a.op.value != "GET"]]),
        schedule.with_devices([schedule.of(0)[:-9]]),
    ):
        # One each: a step that failed half-way has given out gradients.
        worker = open_worker(
            slot_layers(Words(7), ragged(3)), SLOTS, group=dist.group.WORLD, rank=info.rank, ranks=1, microbatches=3
        )  # fmt: skip
        with pytest.raises(Exception) as raised:
            worker.run(wrong)
        texts.append(f"{type(raised.value).__name__}: {raised.value}")
        worker.close()
    return texts


def test_schedules_that_do_not_fit_are_refused():
    expected = [
        r"PipelineError: .*steps the optimizer \(OPT\), and the worker was given none",
        "ScheduleError: .*it is for 2 devices, and there are 1",
        "ScheduleError: .*a step has 4 micro-batches; the store has room for 3",
        "PipelineError: .*steps the optimizer",
        "ScheduleError: .*there is no GET of what it needs",
        "ScheduleError: .*it leaves .* behind",
    ]
    for text, pattern in zip(run_ranks(rank_refuses, 1)[0], expected, strict=True):
        assert re.match(pattern, text), text


def test_an_order_in_which_the_runtime_would_wait_in_a_circle_is_refused():
    """Round 1 hands its gradients over after round 0; a device that does them the other way round never would."""
    slots = Slots(forward=(1,), fused=1, backward=(1,))
    schedule = slot_schedule(slots, devices=1, microbatches=2, rounds=2, costs=Costs.uniform(2))
    row = list(schedule.of(0))
    downloads = [i for i, a in enumerate(row) if a.op.value == "DOWNLOAD" and a.stage == 2]
    row[downloads[0]], row[downloads[1]] = row[downloads[1]], row[downloads[0]]
    with pytest.raises(ScheduleError):
        check_waits(schedule.with_devices([row]))


def test_where_waiting_for_room_would_close_a_circle_slots_run_in_strict_order():
    """Device 1 is through with the backward of round 1 before the head of round 0, which others of round 0 wait for."""
    slots = Slots(forward=(1,), fused=1, backward=(1,))
    plan = {"devices": 4, "microbatches": 2, "rounds": 2}
    ready = {**plan, "open_slots": 2, "costs": Costs(forward_s=((9, 1),), backward_s=((18, 2),))}
    with pytest.raises(ScheduleError, match=r"a deadlock, each waits for the next: .*DOWNLOAD"):
        check_waits(slot_schedule(slots, **ready), capped=True)
    found = slot_schedule(slots, **ready, capped=True)
    assert found == slot_schedule(slots, **plan)
    check_waits(found, capped=True)
    plan = {"devices": 3, "microbatches": 6, "rounds": 2}
    ready = {"open_slots": 2, "costs": Costs(forward_s=((1,) * 6 + (8,),), backward_s=((2,) * 6 + (16,),))}
    assert slot_schedule(SLOTS, **plan, **ready, capped=True) == slot_schedule(SLOTS, **plan, **ready)
    assert slot_schedule(SLOTS, **plan, **ready) != slot_schedule(SLOTS, **plan)
