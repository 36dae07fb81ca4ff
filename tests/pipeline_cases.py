"""A small model in stages, and random schedules that are legal by construction, for tests of the runtime."""

import os
import random
import signal
import threading
from contextlib import suppress

import torch
from torch import nn

from pipeline.actions import Action, Op, Phase
from pipeline.runtime import PipelineRuntime
from pipeline.schedule import Schedule
from pipeline.stage import GraphStage
from pipeline.transport import LocalHub

WIDTH, WORDS = 12, 17


class Block(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH, bias=False)
        self.norm, self.dropout = nn.LayerNorm(WIDTH), nn.Dropout(dropout)

    def forward(self, x):
        return x + self.dropout(self.outer(torch.tanh(self.inner(self.norm(x)))))


class Words(nn.Module):
    """Embedding, blocks, head: `num_layers` pieces in `self.layers`."""

    def __init__(self, num_layers, *, dropout=0.0, tied=False):
        super().__init__()
        torch.manual_seed(0)
        blocks = [Block(dropout) for _ in range(num_layers - 2)]
        self.layers = nn.ModuleList([nn.Embedding(WORDS, WIDTH), *blocks, nn.Linear(WIDTH, WORDS, bias=False)])
        if tied:
            self.layers[-1].weight = self.layers[0].weight
        self.double()


def ragged(num_microbatches, seed=0):
    """Micro-batches of other lengths each: word numbers [T], and targets."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 9, (num_microbatches,), generator=generator).tolist()
    return [torch.randint(0, WORDS, (2, size), generator=generator) for size in sizes]


def runner(layers, batch):
    """The function of a stage: it takes micro-batches of `batch`, and divides the loss by all targets of it."""
    targets = sum(words.shape[1] for words in batch)

    def run(x, mb):
        for layer in layers:
            x = layer(batch[mb][0]) if isinstance(layer, nn.Embedding) else layer(x)
        if isinstance(layers[-1], nn.Linear):
            return nn.functional.cross_entropy(x, batch[mb][1], reduction="sum") / targets
        return x

    return run


def one_process(model, batch, order=None):
    """The plainest run: every micro-batch forward and backward in turn; its losses, gradients in `.grad`."""
    run, losses = runner(model.layers, batch), {}
    for mb in order or range(len(batch)):
        loss = run(None, mb)
        if loss.requires_grad:
            loss.backward()
        losses[mb] = loss.detach()
    return losses


def random_schedule(place, num_microbatches, seed, *, halves=False, recompute=False):
    """A random order of all actions that respects what depends on what; `place` is the device of each stage."""
    rng, stages = random.Random(seed), len(place)
    pairs = [(s, m) for s in range(stages) for m in range(num_microbatches)]
    again = {pair for pair in pairs if recompute and rng.random() < 0.6}
    split = {pair for pair in pairs if halves and rng.random() < 0.6}
    waits = {}
    for s, m in pairs:
        waits[Op.F, s, m] = [(Op.F, s - 1, m)] if s else []
        back = Op.I if (s, m) in split else Op.B
        waits[back, s, m] = [(Op.F, s, m)]
        if s + 1 < stages:
            waits[back, s, m].append((Op.I if (s + 1, m) in split else Op.B, s + 1, m))
        if (s, m) in again:
            waits[Op.R, s, m] = [(Op.F, s, m)]
            waits[back, s, m].append((Op.R, s, m))
        if (s, m) in split:
            waits[Op.W, s, m] = [(Op.I, s, m)]
    rows = [[] for _ in range(max(place) + 1)]
    while waits:
        ready = [key for key, on in waits.items() if not any(other in waits for other in on)]
        op, s, m = key = rng.choice(ready)
        del waits[key]
        _add(rows, place, op, s, m)
    bounds = tuple((s, s + 1) for s in range(stages))
    devices = tuple(tuple(row) for row in rows)
    return Schedule(name=f"random {seed}", devices=devices, stages=bounds, num_microbatches=num_microbatches)


def _add(rows, place, op, s, m):
    row, phase = rows[place[s]], Phase.F if op is Op.F else Phase.B
    forward = 1 if phase is Phase.F else -1
    source, target = s - forward, s + forward
    moves = op in (Op.F, Op.B, Op.I)
    if moves and 0 <= source < len(place) and place[source] != place[s]:
        row.append(Action(Op.RECV, s, m, phase, peer=place[source]))
    row.append(Action(op, s, m))
    if moves and 0 <= target < len(place) and place[target] != place[s]:
        row.append(Action(Op.SEND, s, m, phase, peer=place[target]))


def stages_of(model, place, rank, batch, *, halves=False, first_trained=0):
    """The stages of a rank, one layer a stage."""
    return {
        s: GraphStage(
            runner([model.layers[s]], batch), input_grad=s > first_trained, trained=s >= first_trained, halves=halves
        )
        for s in range(len(place))
        if place[s] == rank
    }


def in_threads(model, place, batch, schedule, *, halves=False, first_trained=0, trace=None):
    """Run a schedule with the ranks as threads over one model; its losses."""
    hub, losses, errors = LocalHub(max(place) + 1), {}, []

    def rank_runs(rank):
        try:
            stages = stages_of(model, place, rank, batch, halves=halves, first_trained=first_trained)
            runtime = PipelineRuntime(stages, hub.transport(rank), rank=rank, timeout_s=20, trace=trace)
            losses.update(runtime.run(schedule, step=0))
        except Exception as error:  # noqa: BLE001  (raised below, in the test's own thread)
            errors.append(error)

    threads = [threading.Thread(target=rank_runs, args=(rank,)) for rank in range(max(place) + 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return losses


def stop(folder):
    """Stop this rank, for good; `folder` is where the others find out which process it is."""
    (folder / "stopped").write_text(str(os.getpid()))
    os.kill(os.getpid(), signal.SIGSTOP)


def end_stopped(folder, survivors=2):
    """End the rank that stopped, once every survivor has told what it saw: then nobody has to wait for it."""
    told = [one for one in folder.iterdir() if one.name.isdecimal()]
    if len(told) == survivors and (folder / "stopped").exists():
        with suppress(ProcessLookupError):
            os.kill(int((folder / "stopped").read_text()), signal.SIGKILL)
