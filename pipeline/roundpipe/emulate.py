"""Devices of any speed on any machine: the real runtime, with calibrated waits in the place of layers.

    costs = Costs(...)
    compute = WaitCompute(waits(schedule, costs), num_layers)
    worker = SlotWorker(emulated_layers(num_layers), store, peers, compute=compute, trace=trace)

Slots, words, uploads and downloads are the real ones, of a weight of one number a layer. The trace has the actions of
the simulator, so that `python -m pipeline trace --measured` lays one over the other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from pipeline.actions import Action, Op
from pipeline.costs import Costs
from pipeline.roundpipe.layers import SlotLayer
from pipeline.schedule import Schedule
from pipeline.simulate import duration

BOUNDARY_BYTES = 64
"""Room for what an emulated slot hands on."""


def emulated_layers(num: int) -> list[SlotLayer]:
    """Return layers with a weight of one number, which compute nothing: for `WaitCompute`."""
    return [SlotLayer(str(i), {f"{i}.weight": nn.Parameter(torch.zeros(1))}, _none) for i in range(num)]


def waits(schedule: Schedule, costs: Costs) -> Callable[[Op, int, int], float]:
    """Return the seconds of an action by op, slot and micro-batch of the run, as the simulator counts them."""

    def seconds(op: Op, slot: int, microbatch: int) -> float:
        return duration(schedule, Action(op, slot, microbatch), costs)

    return seconds


def _none(x: object, microbatch: int) -> torch.Tensor:
    raise NotImplementedError("an emulated layer computes nothing; give the worker a WaitCompute")
