"""The small model of `pipeline_cases` as layers of RoundPipe, and ranks that train it."""

import torch
from torch import nn

from pipeline.roundpipe.host_plan import plan_host
from pipeline.roundpipe.host_store import exchange_pids, open_store
from pipeline.roundpipe.layers import SlotLayer
from pipeline.roundpipe.peers import Peers
from pipeline.roundpipe.worker import SlotWorker
from tests.pipeline_cases import Words


def slot_layers(model, batch):
    """One a layer; the embedding reads the rows that a micro-batch uses. `batch`: words and targets, [2, T] each, the
    same in every step."""
    count = len(batch)
    targets = sum(words.shape[1] for words in batch)
    embedding, *blocks, head = model.layers
    tied = head.weight is embedding.weight
    table = nn.Parameter(embedding.weight.detach(), requires_grad=embedding.weight.requires_grad)
    embedding.weight = table

    def embed(x, mb):
        rows = batch[mb % count][0].unique()
        return embedding(torch.searchsorted(rows, batch[mb % count][0]))

    def loss(x, mb):
        return nn.functional.cross_entropy(head(x), batch[mb % count][1], reduction="sum") / targets

    layers = [SlotLayer("0", {"0.weight": table}, embed, lambda mb: batch[mb % count][0].unique())]
    for i, block in enumerate(blocks, start=1):
        parameters = {f"{i}.{name}": p for name, p in block.named_parameters()}
        layers.append(SlotLayer(str(i), parameters, lambda x, mb, block=block: block(x)))
    last = len(layers)
    name = "0.weight" if tied else f"{last}.weight"
    return [*layers, SlotLayer(str(last), {name: head.weight}, loss)]


def open_worker(layers, slots, *, group, rank, ranks, microbatches, timeout_s=20.0, staleness=0, **others):
    """A worker of a new store, filled with the weights of the layers."""
    room = 64 * 12 * 8
    plan = plan_host(layers, slots, ranks=ranks, microbatches=microbatches, boundary_bytes=room, staleness=staleness)
    store = open_store(plan, group)
    if rank == 0:
        values = {name: p for layer in reversed(layers) for name, p in layer.parameters.items()}
        store.fill(lambda name: values[name].detach())
    peers = Peers(store, exchange_pids(group), rank=rank, timeout_s=timeout_s)
    make_optimizer = others.pop("make_optimizer", None)
    if make_optimizer is not None:
        others["optimizer"] = make_optimizer(store, peers)
    return SlotWorker(layers, store, peers, **others)


def model_of(num_layers, **changes):
    """`Words`, in fp64."""
    return Words(num_layers, **changes)
