"""Gradients in slices: the plan of who sends how much, and real gradients in a plain loop on two ranks."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moe.cost import LayerLoad, Line, Profile
from moe.errors import MoeConfigError, PlanError
from moe.gradients import GradientReducer
from moe.issue import IssueQueue, own_group
from moe.plan import LayerPlan
from moe.slices import cut
from moe.spread import plan_model, spread
from tests.spawn import run_ranks


def brute(ready, cost, flush):
    """The least time over every way to send whole units."""
    limits = list(itertools.accumulate(ready[:-1]))
    best = float("inf")
    for sent in itertools.product(*(range(limit + 1) for limit in limits)):
        if all(total <= limit for total, limit in zip(itertools.accumulate(sent), limits, strict=True)):
            time_s = sum(c(x) for c, x in zip(cost, sent, strict=True)) + flush(sum(ready) - sum(sent))
            best = min(best, time_s)
    return best


TABLES = st.lists(st.lists(st.integers(0, 9), min_size=13, max_size=13), min_size=1, max_size=3)


@given(TABLES, st.lists(st.integers(0, 3), min_size=4, max_size=4), st.integers(0, 3))
def test_spread_is_exact_for_any_costs(tables, amounts, alpha):
    ready = amounts[: len(tables) + 1]
    cost = [lambda x, row=row: float(row[x]) for row in tables]
    flush = Line(float(alpha), 1.0)
    sent = spread(ready, cost, flush, quantum=1)
    limits = list(itertools.accumulate(ready[:-1]))
    assert all(a <= b for a, b in zip(itertools.accumulate(sent), limits, strict=True))
    found = sum(c(x) for c, x in zip(cost, sent, strict=True)) + flush(sum(ready) - sum(sent))
    assert found == pytest.approx(brute(ready, cost, flush))


def test_gaps_fill_first_and_earlier_layers_win_ties():
    gap = [lambda x, room=room: 10.0 + max(0, x - room) for room in (3, 2, 8)]
    assert spread([5, 0, 6, 4], gap, Line(0.5, 1.0), quantum=1) == [3, 2, 6]
    flat = [lambda x: 1.0] * 3
    assert spread([4, 4, 4, 0], flat, Line(0.5, 1.0), quantum=2) == [4, 4, 4]


def test_amounts_that_do_not_fit_are_refused():
    with pytest.raises(PlanError, match=r"1 amounts for 1 layers.*one amount before each layer and one after the last"):
        spread([3], [lambda x: 0.0], Line(0, 1), quantum=1)
    with pytest.raises(PlanError, match="none negative"):
        spread([3, -1], [lambda x: 0.0], Line(0, 1), quantum=1)


def test_a_model_plan_hides_what_one_layer_after_another_allows():
    profile = Profile(all_to_all=Line(1e-4, 1e-8), all_reduce=Line(1e-4, 1e-8), expert_forward=Line(0, 2e-5),
                      expert_backward=Line(0, 4e-5))  # fmt: skip
    loads = [LayerLoad(exchange_bytes=1e6, expert_rows=1000)] * 3
    plans = plan_model(profile, loads, [1_000_000] * 4)
    sent = [p.gradient_bytes for p in plans]
    assert all(a <= 1_000_000 * (i + 1) for i, a in enumerate(itertools.accumulate(sent)))
    assert sum(sent) > 2_500_000
    alone = plan_model(profile, loads, [0, 0, 0, 4_000_000])
    assert [p.gradient_bytes for p in alone] == [0, 0, 0]
    total = sum(p.predicted_s for p in plans) + profile.all_reduce(4_000_000 - sum(sent))
    assert total < sum(p.predicted_s for p in alone) + profile.all_reduce(4_000_000)
    with pytest.raises(PlanError, match="leave them 0"):
        plan_model(profile, [LayerLoad(exchange_bytes=1, expert_rows=1, gradient_bytes=2)], [1, 1])


def test_slices_hold_every_element_once():
    named = {"a": torch.zeros(10), "b": torch.zeros(40), "c": torch.zeros(3, dtype=torch.float64), "d": torch.zeros(2)}
    slices = cut(named.items(), 64)
    assert all(s.nbytes <= 64 for s in slices)
    assert [s.index for s in slices] == list(range(len(slices)))
    for name, p in named.items():
        covered = [
            i for s in slices for piece in s.pieces if piece.name == name for i in range(piece.start, piece.stop)
        ]
        assert covered == list(range(p.numel()))
    for s in slices:
        assert len({named[piece.name].dtype for piece in s.pieces}) == 1
    assert slices[0].pieces[0].name == "d"


class Drain(torch.autograd.Function):
    """What an MoE layer's backward does as far as gradients go."""

    @staticmethod
    def forward(ctx, x, reducer, nbytes):
        ctx.reducer, ctx.nbytes = reducer, nbytes
        return x.clone()

    @staticmethod
    def backward(ctx, *grads):
        if ctx.reducer is not None:
            ctx.reducer.drain("moe", LayerPlan(1, 1, gradient_bytes=ctx.nbytes))
        return grads[0], None, None


class Toy(nn.Module):
    """Tied head, a parameter used on one rank only, one that is never used, and an expert of this rank alone."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(17, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.sometimes = nn.Linear(6, 6)
        self.never = nn.Linear(6, 6)
        self.expert = nn.Linear(6, 6)
        self.head = nn.Linear(6, 17, bias=False)
        self.head.weight = self.embed.weight
        for p in self.expert.parameters():
            p.is_expert = True
        self.double()

    def forward(self, x, *, rank, reducer=None, plan=(0, 0, 0, 0)):
        h = self.embed(x)
        for layer, nbytes in zip(self.layers, plan, strict=True):
            h = Drain.apply(torch.tanh(layer(h)), reducer, nbytes)
        if rank == 1:
            h = h + self.sometimes(h)
        return self.head(h + (rank + 1) * self.expert(h))


def toy(seed=0):
    torch.manual_seed(seed)
    return Toy()


def batches(rank):
    generator = torch.Generator().manual_seed(100 + rank)
    return [torch.randint(0, 17, (5,), generator=generator) for _ in range(3)]


def loss_of(model, x, **kwargs):
    return nn.functional.cross_entropy(model(x, **kwargs), x.roll(1))


def reduced(info, plan, slice_bytes):
    """Three micro-batches, two of them accumulated; returns gradients, their norm, and what was ready when."""
    queue = IssueQueue(own_group(None, timeout_s=20), "inter", timeout_s=20)
    model = toy()
    reducer = GradientReducer(
        model.named_parameters(), group=queue.group, queue=queue, slice_bytes=slice_bytes, average=True
    )
    *early, last = batches(info.rank)
    with reducer.accumulate():
        for x in early:
            loss_of(model, x, rank=info.rank, reducer=reducer, plan=plan).backward()
    loss_of(model, last, rank=info.rank, reducer=reducer, plan=plan).backward()
    reducer.flush()
    assert model.never.weight.grad is None  # as in plain PyTorch: the optimizer shall not touch it
    used = {name: p for name, p in model.named_parameters() if "never" not in name}
    grads = {name: p.grad.clone() for name, p in used.items()}
    norm = reducer.clip_grad_norm_(0.01, ep_group=queue.group)
    clipped = {name: p.grad.clone() for name, p in used.items()}
    ready = reducer.ready_bytes
    reducer.close()
    queue.close()
    return grads, norm, clipped, ready


def oracle():
    """One process: the mean over ranks of each rank's gradients, experts a copy a rank."""
    per_rank = []
    for rank in range(2):
        model = toy()
        for x in batches(rank):
            loss_of(model, x, rank=rank).backward()
        used = [(n, p) for n, p in model.named_parameters() if "never" not in n]
        per_rank.append({n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in used})
    dense = {n: (per_rank[0][n] + per_rank[1][n]) / 2 for n in per_rank[0] if "expert" not in n}
    return [{**dense, **{n: g / 2 for n, g in mine.items() if "expert" in n}} for mine in per_rank]


@pytest.mark.parametrize(
    ("plan", "slice_bytes"),
    [
        ((0, 0, 0, 0), 1 << 20),
        ((0, 0, 0, 0), 128),
        ((400, 400, 400, 400), 128),
        ((10**6,) * 4, 128),  # far too early: most slices are sent again
        ((0, 10**6, 0, 300), 64),
    ],
)
def test_gradients_do_not_depend_on_the_plan(plan, slice_bytes):
    results = run_ranks(reduced, 2, plan, slice_bytes)
    expected = oracle()
    for (grads, norm, clipped, ready), mine in zip(results, expected, strict=True):
        assert grads.keys() == mine.keys()
        for name, grad in grads.items():
            assert torch.equal(grad, mine[name]), name
        squares = [g.square().sum() for n, g in mine.items() if "expert" not in n]
        squares += [g.square().sum() for other in expected for n, g in other.items() if "expert" in n]
        assert norm == pytest.approx(sum(squares).sqrt().item(), rel=1e-12)
        for name, grad in clipped.items():
            torch.testing.assert_close(grad, mine[name] * min(1.0, 0.01 / (norm.item() + 1e-6)))
        assert len(ready) == 4


def test_a_slice_of_less_than_nothing_is_refused():
    with pytest.raises(MoeConfigError, match="slice_bytes is 8"):
        GradientReducer([], group=None, queue=IssueQueue(None, "inter"), slice_bytes=8)


def experts_with_copies(info):
    """Four ranks, EP 2 and two copies of each expert: experts are summed over their copies and nobody else."""
    queue = IssueQueue(own_group(None, timeout_s=20), "inter", timeout_s=20)
    import torch.distributed as dist

    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    dense, expert = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    expert.is_expert = True
    reducer = GradientReducer(
        [("dense", dense), ("expert", expert)], group=queue.group, queue=queue, expert_group=pairs[info.rank % 2]
    )
    dense.grad, expert.grad = torch.full((3,), 4.0 * info.rank), torch.full((3,), 10.0**info.rank)
    reducer.flush()
    queue.close()
    return dense.grad[0].item(), expert.grad[0].item()


def test_experts_are_summed_over_their_copies_only():
    assert run_ranks(experts_with_copies, 4) == [(6.0, 101 / 4), (6.0, 1010 / 4), (6.0, 101 / 4), (6.0, 1010 / 4)]


def unusual(info):
    """What a loop may do between a backward and the flush; returns gradients, and what flush said of a new weight."""
    queue = IssueQueue(own_group(None, timeout_s=20), "inter", timeout_s=20)
    model, plan, x = toy(), (10**6,) * 4, batches(info.rank)[0]
    reducer = GradientReducer(model.named_parameters(), group=queue.group, queue=queue, slice_bytes=128, model=model)

    def fail(grad):
        raise ZeroDivisionError

    handle = model.embed.weight.register_hook(fail)
    with pytest.raises(ZeroDivisionError):  # on every rank alike, when all slices were sent
        loss_of(model, x, rank=1, reducer=reducer, plan=plan).backward()
    handle.remove()
    model.zero_grad()
    loss_of(model, x, rank=0, reducer=reducer, plan=plan).backward()  # `sometimes` has no gradient now
    for p in model.parameters():
        if p.grad is not None:
            p.grad *= 3
    reducer.flush()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.extra = nn.Linear(2, 2)
    with pytest.raises(MoeConfigError, match=r"extra\.weight was added or unfrozen after this reducer was made"):
        reducer.flush()
    reducer.close()
    loss_of(model, x, rank=0, reducer=reducer, plan=plan).backward()
    assert not reducer._sent
    queue.close()
    return grads


def test_what_was_sent_by_a_backward_that_failed_or_changed_later_is_sent_again():
    expected = []
    for rank in range(2):
        model = toy()
        loss_of(model, batches(rank)[0], rank=0).backward()
        expected.append({n: p.grad * 3 for n, p in model.named_parameters() if p.grad is not None})
    for rank, grads in enumerate(run_ranks(unusual, 2)):
        assert grads.keys() == expected[0].keys()
        assert not any(n.startswith("sometimes") for n in grads)
        for name, grad in grads.items():
            one = expected[rank][name] / 2 if "expert" in name else (expected[0][name] + expected[1][name]) / 2
            torch.testing.assert_close(grad, one)
