"""The runtime against one process that runs every micro-batch in turn. fp64; to the bit where the order is the same."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from pipeline.actions import Action, Op, Phase
from pipeline.comms import complete
from pipeline.errors import PipelineError, ScheduleError
from pipeline.runtime import PipelineRuntime
from pipeline.schedule import Schedule
from pipeline.schedules import SCHEDULES
from pipeline.stage import GraphStage
from pipeline.tracing import Trace, read_trace
from pipeline.transport import GroupTransport
from pipeline.trimmed import forward_only, without_frozen
from tests.pipeline_cases import Words, in_threads, one_process, ragged, random_schedule, stages_of
from tests.spawn import run_ranks

PLACES = {"2 ranks": (0, 1), "4 ranks": (0, 1, 2, 3), "virtual": (0, 1, 0, 1), "there and back": (0, 1, 1, 0)}


def backward_order(schedule, stage):
    device = schedule.devices_of_stage()[stage]
    return [a.microbatch for a in schedule.of(device) if a.stage == stage and a.op in (Op.B, Op.W)]


def assert_same_gradients(ours, reference, exact=1e-13):
    for (name, p), q in zip(ours.named_parameters(), reference.parameters(), strict=True):
        error = (p.grad - q.grad).abs().max() / q.grad.abs().max()
        assert error <= exact, f"{name} differs by {error}"


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_random_schedules_give_the_gradients_of_one_process(place, seed):
    num_microbatches = 1 + seed % 6  # fewer than stages, too
    halves, recompute = seed % 2 == 1, seed % 3 == 0
    batch = ragged(num_microbatches, seed)
    schedule = random_schedule(place, num_microbatches, seed, halves=halves, recompute=recompute)
    ours, reference = Words(len(place)), Words(len(place))
    losses, expected = in_threads(ours, place, batch, schedule, halves=halves), one_process(reference, batch)
    assert {mb: float(x) for mb, x in losses.items()} == {mb: float(x) for mb, x in expected.items()}
    assert_same_gradients(ours, reference)


@pytest.mark.parametrize("halves", [False, True])
def test_every_bit_is_that_of_one_process_in_the_same_order(halves):
    place, batch = PLACES["4 ranks"], ragged(5)
    ours = Words(4)
    schedule = random_schedule(place, 5, 3, halves=halves, recompute=True)
    in_threads(ours, place, batch, schedule, halves=halves)
    for stage in range(4):
        reference = Words(4)
        one_process(reference, batch, backward_order(schedule, stage) if not halves else None)
        for p, q in zip(ours.layers[stage].parameters(), reference.layers[stage].parameters(), strict=True):
            if halves:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-13, atol=1e-15)
            else:
                assert torch.equal(p.grad, q.grad)


def test_one_microbatch_in_halves_is_whole_to_the_bit():
    place, batch = PLACES["4 ranks"], ragged(1)
    ours, reference = Words(4), Words(4)
    in_threads(ours, place, batch, random_schedule(place, 1, 1, halves=True), halves=True)
    one_process(reference, batch)
    for p, q in zip(ours.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def under_autocast(layers, x):
    with torch.autocast("cpu", torch.bfloat16):
        return layers(x)


def clamp(p):
    p.grad.clamp_(max=0.01)


def with_hooks(layers, x):
    if not layers[1].weight._backward_hooks:
        layers[1].weight.register_hook(lambda grad: grad * 0.5)
        layers[3].weight.register_post_accumulate_grad_hook(clamp)
    return layers(x)


def checkpointed(layers, x):
    return checkpoint(layers, x, use_reentrant=False)


@pytest.mark.parametrize("call", [under_autocast, with_hooks, checkpointed])
def test_halves_are_whole_where_gradients_take_another_way(call):
    found = []
    for halves in (False, True):
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        stage = GraphStage(
            lambda x, mb, layers=layers: call(layers, x).float().square().sum(), input_grad=True, halves=halves
        )
        x = torch.randn(4, 6)
        stage.forward(x, mb=0, group=None, index=0, keep=True)
        found.append([stage.backward(0, None), *(p.grad for p in layers.parameters())])
    assert all(torch.equal(half, whole) for half, whole in zip(*found, strict=True))


def test_frozen_stages():
    """Of leading ones no backward is run and no gradient sent; a frozen one in the middle passes gradients on."""
    place, batch = PLACES["4 ranks"], ragged(3)
    ours, reference = Words(4), Words(4)
    for model in (ours, reference):
        model.layers[0].requires_grad_(False)
        model.layers[2].requires_grad_(False)
    schedule = without_frozen(random_schedule(place, 3, 0), 1)
    assert not [a for a in schedule.of(0) if a.op is Op.B or a.phase is Phase.B]
    assert not [a for a in schedule.of(1) if a.op is Op.SEND and a.phase is Phase.B]
    in_threads(ours, place, batch, schedule, first_trained=1)
    one_process(reference, batch)
    for p, q in zip(ours.parameters(), reference.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.allclose(p.grad, q.grad, rtol=1e-13)
    with pytest.raises(ScheduleError, match="none of the 4 stages of random 0 has a parameter that is trained"):
        without_frozen(random_schedule(place, 3, 0), 4)


def test_an_evaluation_runs_forward_only():
    place, batch = PLACES["virtual"], ragged(3)
    model = Words(4)
    schedule = forward_only(random_schedule(place, 3, 0, recompute=True))
    with torch.no_grad():
        expected = one_process(model, batch)
    losses = in_threads(model, place, batch, schedule, first_trained=4)
    assert losses == expected
    assert all(p.grad is None for p in model.parameters())


def test_a_trace_tells_what_was_done_and_when(tmp_path):
    place, batch = PLACES["2 ranks"], ragged(3)
    schedule, trace = random_schedule(place, 3, 0), Trace(0)
    in_threads(Words(2), place, batch, schedule, trace=trace)
    trace.write(tmp_path / "trace.jsonl")
    events = read_trace(tmp_path / "trace.jsonl")
    assert sorted(e.name for e in events) == sorted(a.label for d in range(2) for a in schedule.of(d))
    assert {e.lane for e in events} == {"compute", "send", "receive"}
    assert all(e.t1_ns >= e.t0_ns for e in events)
    assert not trace.events


def bad(rows, match):
    schedule = Schedule(name="bad", devices=(tuple(rows),), stages=((0, 1), (1, 2)), num_microbatches=1)
    with pytest.raises(ScheduleError, match=match):
        in_threads(Words(2), (0, 0), ragged(1), schedule)


def test_what_a_schedule_forgot_is_an_error_that_names_it():
    f0, f1, b0, b1 = (Action(op, s, 0) for op, s in [(Op.F, 0), (Op.F, 1), (Op.B, 0), (Op.B, 1)])
    bad([f1], r"1F0 needs the activation of micro-batch 0 for stage 1, step 0, which has not been received")
    bad([f0, f1, b0], "0B0 needs the gradient of micro-batch 0 for stage 0")
    bad([f0, f1, b1, b1], "without its forward|needs the")
    bad([f0], r"it leaves tensors that no action takes: \[Message")
    bad([f0, Action(Op.SEND, 0, 0, Phase.F)], "sends the activation .* not computed yet, or sent already")
    bad([f0, f1, Action(Op.RECV, 1, 0, Phase.B)], "names no peer; complete the schedule with its communication")
    bad([Action(Op.OPT, 0)], r"0OPT cannot run on rank 0, which holds stages \[0, 1\] and runs F, B")


def rank_meets_mistakes(info):
    """What an own loop gets wrong is told on each rank, and at once."""
    size, schedules = 2, {n: complete(SCHEDULES["1f1b"](devices=n, microbatches=2)) for n in (2, 3)}

    def wide(x, mb):
        return torch.ones(3, 4, requires_grad=True) if x is None else x

    mistakes = [
        (3, lambda x, mb: torch.ones(3, 4), f"this pipeline has {size} rank"),
        (2, lambda x, mb: (x, x), "gave tuple for micro-batch 0; it has to return one tensor"),
        (2, wide, r"gave \[3, 4\] numbers for micro-batch 0; `run` has to return the loss"),
    ]
    for number, run, expected in mistakes:
        stage = GraphStage(run, input_grad=info.rank > 0)
        runtime = PipelineRuntime({info.rank: stage}, GroupTransport(dist.group.WORLD), rank=info.rank, timeout_s=30)
        with pytest.raises(PipelineError, match=expected):
            runtime.run(schedules[number], step=0)
        runtime.close()


def test_mistakes_of_an_own_loop_are_told():
    run_ranks(rank_meets_mistakes, 2)


def rank_trains(info, place, dtype, dropout, steps):
    """Several steps of other sizes each, over one transport; returns losses and gradients by layer."""
    transport, model, seen = GroupTransport(dist.group.WORLD), Words(len(place), dropout=dropout).to(dtype), []
    for step in range(steps):
        batch = ragged(1 + 2 * step, step)
        schedule = random_schedule(place, len(batch), step, recompute=step % 2 == 0)
        stages = stages_of(model, place, info.rank, batch)
        runtime = PipelineRuntime(stages, transport, rank=info.rank, timeout_s=20)
        torch.manual_seed(step)
        seen.append({mb: float(x) for mb, x in runtime.run(schedule, step=step).items()})
        assert not any(stage.live for stage in stages.values())
    transport.close()
    held = [s for s in range(len(place)) if place[s] == info.rank]
    return seen, {s: [p.grad for p in model.layers[s].parameters()] for s in held}


@pytest.mark.parametrize("name", ["2 ranks", "virtual", "4 ranks"])
def test_real_ranks_over_several_steps(name):
    place = PLACES[name]
    results = run_ranks(rank_trains, max(place) + 1, place, torch.float64, 0.0, 3)
    reference = Words(len(place))
    expected = [one_process(reference, ragged(1 + 2 * step, step)) for step in range(3)]
    losses = results[place[-1]][0]
    assert losses == [{mb: float(x) for mb, x in step.items()} for step in expected]
    for _, grads in results:
        for stage, ours in grads.items():
            for grad, q in zip(ours, reference.layers[stage].parameters(), strict=True):
                torch.testing.assert_close(grad, q.grad, rtol=1e-12, atol=1e-15)


def rank_recomputes(info, recompute):
    """Each rank has dropout; micro-batches run in the same order, kept or recomputed."""
    place, batch, model = (0, 1, 0, 1), ragged(4), Words(4, dropout=0.4)
    schedule = random_schedule(place, 4, 1, recompute=True)
    if not recompute:
        rows = [[a for a in row if a.op is not Op.R] for row in schedule.devices]
        schedule = schedule.with_devices(rows)
    transport = GroupTransport(dist.group.WORLD)
    torch.manual_seed(info.rank)
    stages = stages_of(model, place, info.rank, batch)
    losses = PipelineRuntime(stages, transport, rank=info.rank, timeout_s=20).run(schedule, step=0)
    transport.close()
    grads = [p.grad for s in stages for p in model.layers[s].parameters()]
    return {mb: float(x) for mb, x in losses.items()}, grads, torch.get_rng_state()


def test_a_recompute_sees_the_dropout_of_its_first_forward():
    kept, again = run_ranks(rank_recomputes, 2, False), run_ranks(rank_recomputes, 2, True)
    for (losses, grads, rng), (losses2, grads2, rng2) in zip(kept, again, strict=True):
        assert losses == losses2
        assert all(torch.equal(a, b) for a, b in zip(grads, grads2, strict=True))
        assert torch.equal(rng, rng2)


def test_a_stage_that_does_not_use_its_input_still_has_a_gradient_for_it():
    weight = nn.Parameter(torch.ones(3))
    stage = GraphStage(lambda x, mb: weight.sum(), input_grad=True)
    stage.forward(torch.ones(2, 3), mb=0, group=None, index=0, keep=True)
    assert torch.equal(stage.backward(0, None), torch.zeros(2, 3))


def test_an_input_that_is_changed_cannot_be_run_again():
    stage = GraphStage(lambda x, mb: x.relu_().sum(), input_grad=False)
    with pytest.raises(
        PipelineError, match=r"changes its input in place \(micro-batch 4\), so it cannot run forward again"
    ):
        stage.forward(torch.ones(2), mb=4, group=None, index=0, keep=False)


def test_a_recompute_changes_buffers_again_as_torchs_own_does():
    ours, theirs = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    x = torch.randn(5, 3)
    stage = GraphStage(lambda _, mb: ours(x).square().sum(), input_grad=False)
    stage.forward(None, mb=0, group=None, index=0, keep=False)
    stage.backward(0, None)
    checkpoint(lambda x: theirs(x).square().sum(), x.requires_grad_(), use_reentrant=False).backward()
    assert int(ours.num_batches_tracked) == 2
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))
