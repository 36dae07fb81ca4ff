"""One action of a schedule: what is done, to which layers, for which micro-batch, on which device.

An action prints itself and reads itself back: `2F0` is stage 2, forward, micro-batch 0; `2SEND_F0[peer=3]` sends what
stage 2 made of micro-batch 0 to device 3. `stage` is a contiguous range of layers; in RoundPipe it is a slot, and a
forward and a backward slot may have different ranges. The device is an attribute of the action, not of the stage.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from enum import Enum

from pipeline.errors import ScheduleError


class Op(Enum):
    """What an action does."""

    __hash__ = object.__hash__  # members are single; Enum hashes their names, in Python

    F = "F"
    """Forward. Keeps activations unless an R of the same stage and micro-batch follows on the device."""
    B = "B"
    """Backward: gradients of the input and of the weights."""
    I = "I"  # noqa: E741
    """The input-gradient half of a backward."""
    W = "W"
    """The weight-gradient half of a backward."""
    R = "R"
    """Forward again from the saved input, just before the backward."""
    FB = "FB"
    """Forward, loss and backward of the last layers, per micro-batch and without recompute."""
    UPLOAD = "UPLOAD"
    """Weights of the stage, host to device."""
    DOWNLOAD = "DOWNLOAD"
    """Weight gradients of the stage, device to host."""
    SEND = "SEND"
    """Output activation (phase F) or input gradient (phase B) of the stage, to device `peer`."""
    RECV = "RECV"
    """Input activation (phase F) or output gradient (phase B) of the stage, from device `peer`."""
    PUT = "PUT"
    """Output activation or input gradient of the stage, device to host."""
    GET = "GET"
    """Input activation or output gradient of the stage, host to device."""
    OPT = "OPT"
    """Optimizer step of the layers on the host; makes weights of `version`."""
    FREE = "FREE"
    """With a micro-batch: the state of the chunk group that begins there. Without: the uploaded weights."""


class Phase(Enum):
    """Which way a message goes: F with the activations, B with the gradients."""

    __hash__ = object.__hash__

    F = "F"
    B = "B"


COMPUTE = frozenset({Op.F, Op.B, Op.I, Op.W, Op.R, Op.FB})
FORWARD = frozenset({Op.F, Op.FB})
MESSAGES = frozenset({Op.SEND, Op.RECV, Op.PUT, Op.GET})

_OPS = "|".join(sorted((op.value for op in Op), key=len, reverse=True))
_TEXT = re.compile(rf"(\d{{1,9}})({_OPS})(?:_([FB]))?(\d{{0,9}})(?:\[([^\]]*)\])?")


@dataclass(frozen=True, slots=True)
class Action:
    """One entry of a device's list. What follows `microbatch` is optional and defaults to what the schedule says."""

    op: Op
    stage: int
    microbatch: int | None = None
    phase: Phase | None = None
    """Of messages only."""
    layers: tuple[int, int] | None = None
    """First layer and one past the last; None: those of the stage."""
    device: int | None = None
    """Filled in by `Schedule` from the row that holds the action."""
    version: int | None = None
    """Of the weights: the optimizer steps in them. For OPT, the version it makes."""
    bytes: int | None = None
    """Of a transfer; None: as the costs say."""
    peer: int | None = None
    """Device at the other end of a SEND or RECV."""

    def __post_init__(self) -> None:
        if (self.op in MESSAGES) != (self.phase is not None):
            need = "needs a phase, F or B" if self.op in MESSAGES else "has no phase"
            raise ScheduleError(f"{self.op.value} of stage {self.stage} {need}; got {self.phase}")
        if self.layers is not None and not 0 <= self.layers[0] < self.layers[1]:
            raise ScheduleError(f"{self.label} has layers {self.layers}; a stage holds at least one layer")
        if self.microbatch is None and (self.op in COMPUTE or self.op in MESSAGES):
            raise ScheduleError(f"{self.label} names no micro-batch; write for example {self.label}0")

    @property
    def label(self) -> str:
        """The short form, `2F0`, without the optional fields."""
        phase = "" if self.phase is None else f"_{self.phase.value}"
        return f"{self.stage}{self.op.value}{phase}{'' if self.microbatch is None else self.microbatch}"

    def text(self, *, device: bool = True) -> str:
        """The full form, which `parse` reads back; without the device where a row already says it."""
        extra = []
        for name in _EXTRAS:
            value = getattr(self, name)
            if value is not None and (device or name != "device"):
                extra.append(f"{name}={value[0]}:{value[1]}" if name == "layers" else f"{name}={value}")
        return self.label + (f"[{','.join(extra)}]" if extra else "")

    def __str__(self) -> str:
        return self.text()

    @staticmethod
    def parse(text: str) -> Action:
        """Read `2F0` or `2SEND_F0[peer=3,bytes=64]`.

        Raises ScheduleError for anything else.
        """
        match = _TEXT.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None:
            raise ScheduleError(
                f"{str(text)[:80]!r} is no action; an action reads [stage][op][micro-batch], such as 2F0 or "
                f"1SEND_B3[peer=0], with op one of {', '.join(op.value for op in Op)}"
            )
        stage, op, phase, microbatch, extra = match.groups()
        return Action(
            Op(op),
            int(stage),
            int(microbatch) if microbatch else None,
            Phase(phase) if phase else None,
            **_parse_extra(text, extra or ""),
        )


_EXTRAS = tuple(f.name for f in fields(Action) if f.name not in ("op", "stage", "microbatch", "phase"))


def _parse_extra(text: str, extra: str) -> dict:
    values = {}
    for item in filter(None, extra.split(",")):
        match = re.fullmatch(r"(\w+)=(\d{1,18})(?::(\d{1,18}))?", item.strip())
        name = match[1] if match else None
        if match is None or name not in _EXTRAS or (name == "layers") != (match[3] is not None):
            raise ScheduleError(f"{item[:80]!r} in {text[:80]!r} is none of layers=LO:HI, {'=N, '.join(_EXTRAS[1:])}=N")
        values[name] = int(match[2]) if match[3] is None else (int(match[2]), int(match[3]))
    return values
