"""What actions cost, in seconds and bytes: the input of the simulator, as JSON from a measured profile or by hand.

Times and activations are rows of one number per layer: one row for all micro-batches, or one row each. A stage costs
the sum over its layers. Recompute costs a forward.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Any

from pipeline.errors import PlanError

Rows = tuple[tuple[float, ...], ...]

MOST = 1e100
"""Of any number: sums over layers and micro-batches stay finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Of one model and one set of micro-batches. Rows: `[micro-batch or all][layer]`."""

    forward_s: Rows
    backward_s: Rows
    """Gradients of input and weights, without recompute."""
    input_share: float = 0.5
    """Of a backward that is its input-gradient half, I; the rest is W."""
    activation_bytes: Rows = ((0,),)
    """Kept from a forward to its backward, per layer; one entry stands for every layer."""
    state_bytes: Rows = ((0,),)
    """Of a chunk of a group (keys, values and their gradients), kept until the whole group is done, per layer."""
    boundary_bytes: tuple[float, ...] = (0,)
    """Of the activation between two layers: per micro-batch, or one for all. Its gradient is as big."""
    weight_bytes: tuple[float, ...] = (0,)
    """Per layer, or one for all. Gradients are as big."""
    hop_s: float = 0.0
    """Latency of whatever goes from one device to another."""
    link_bytes_per_s: float = float("inf")
    """Between two devices, each direction."""
    host_bytes_per_s: float = float("inf")
    """Between host and device, each direction."""
    pcie_roots: tuple[int, ...] | None = None
    """Root of each device; devices of one root share `host_bytes_per_s`. None: each has its own."""
    chunk_bytes: float = 64 * 2**20
    """Weights move in pieces of this size, between which an activation may go first."""
    optimizer_s: tuple[float, ...] = (0,)
    """Of one step on the host, per layer, or one for all."""
    kept_bytes: float = 0.0
    """Held on every device all the time."""

    def __post_init__(self) -> None:
        for f in fields(self):
            if not (f.name == "pcie_roots" and self.pcie_roots is None):
                self._check_numbers(f.name)
        layers = len(self.forward_s[0]) if self.forward_s else 0
        for name in _ROWS:
            lengths, one = [len(row) for row in getattr(self, name)], name in ("activation_bytes", "state_bytes")
            if not layers or not lengths:
                raise PlanError(f"{name} of the costs holds no layers; give one number a layer")
            if any(n != layers and not (one and n == 1) for n in lengths):
                raise PlanError(f"{name} has rows of {lengths[:8]} layers; all need {layers}")
        for name in ("weight_bytes", "optimizer_s"):
            if len(getattr(self, name)) not in (1, layers):
                raise PlanError(f"{name} has {len(getattr(self, name))} layers; it needs {layers}, or one for all")
        if not self.boundary_bytes:
            raise PlanError("boundary_bytes is empty; it needs one for every micro-batch, or one for all")

    def _check_numbers(self, name: str) -> None:
        most = 1.0 if name == "input_share" else MOST
        for x in _numbers(getattr(self, name)):
            if isinstance(x, bool) or not isinstance(x, Real):
                raise PlanError(f"{name} of the costs holds {str(x)[:60]}; it takes numbers")
            if x < 0:
                raise PlanError(f"{name} of the costs is negative: {str(x)[:60]}")
            endless = name in _RATES and x == float("inf")
            if not (x <= most or endless) or (x == 0 and name in _RATES):
                need = "more than 0" if name in _RATES and x == 0 else f"from 0 to {most:g}"
                raise PlanError(f"{name} of the costs holds {str(x)[:60]}; it has to be {need}")

    @property
    def count_bytes(self) -> bool:
        """Whether anything that a device holds has a size."""
        held = (self.weight_bytes, self.activation_bytes, self.state_bytes, self.boundary_bytes, self.kept_bytes)
        return any(_numbers(held))

    @property
    def num_layers(self) -> int:
        """Entries in a row."""
        return len(self.forward_s[0])

    @staticmethod
    def uniform(layers: int, *, forward_s: float = 1.0, backward_s: float = 2.0, **others: Any) -> Costs:
        """Every layer and micro-batch the same."""
        return Costs(forward_s=((forward_s,) * layers,), backward_s=((backward_s,) * layers,), **others)

    def scaled(self, factors: Sequence[float]) -> Costs:
        """Micro-batch m costs `factors[m]` times the first row, in time, activations and boundary."""

        def rows(r: Rows) -> Rows:
            return tuple(tuple(f * x for x in r[0]) for f in factors)

        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("forward_s", "backward_s", "activation_bytes", "state_bytes"):
            values[name] = rows(values[name])
        values["boundary_bytes"] = tuple(f * self.boundary_bytes[0] for f in factors)
        return Costs(**values)

    def mean_s(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the mean forward and backward seconds over the micro-batches, per layer."""
        forward, backward = (
            tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))
            for rows in (self.forward_s, self.backward_s)
        )
        return forward, backward

    def check_microbatches(self, number: int) -> None:
        """Raise PlanError unless every row and number that is given for each micro-batch is there for `number`."""
        for name in (*_ROWS, "boundary_bytes"):
            have = len(getattr(self, name))
            if have != 1 and have < number:
                raise PlanError(f"{name} of the costs is of {have} micro-batches; {number} were asked for")

    def forward(self, microbatch: int, layers: tuple[int, int]) -> float:
        """Seconds of a forward over layers lo to hi - 1."""
        return _total(_row(self.forward_s, microbatch), layers)

    def backward(self, microbatch: int, layers: tuple[int, int]) -> float:
        """Seconds of a backward, without recompute."""
        return _total(_row(self.backward_s, microbatch), layers)

    def activations(self, microbatch: int, layers: tuple[int, int]) -> float:
        """Bytes kept between a forward and its backward."""
        return _total(_row(self.activation_bytes, microbatch), layers)

    def state(self, microbatch: int, layers: tuple[int, int]) -> float:
        """Bytes of one chunk of a group."""
        return _total(_row(self.state_bytes, microbatch), layers)

    def boundary(self, microbatch: int) -> float:
        """Bytes of one activation between layers."""
        if len(self.boundary_bytes) == 1:
            return self.boundary_bytes[0]
        if microbatch >= len(self.boundary_bytes):
            raise PlanError(
                f"boundary_bytes has numbers for {len(self.boundary_bytes)} micro-batches; the schedule has a "
                f"micro-batch {microbatch}. Give one for each, or one for all"
            )
        return self.boundary_bytes[microbatch]

    def between_s(self, microbatch: int) -> float:
        """Seconds from one device to another."""
        return self.hop_s + self.boundary(microbatch) / self.link_bytes_per_s

    def weights(self, layers: tuple[int, int]) -> float:
        """Bytes of the weights of some layers."""
        return _total(self.weight_bytes, layers)

    def optimizer(self, layers: tuple[int, int]) -> float:
        """Seconds of an optimizer step of some layers on the host."""
        return _total(self.optimizer_s, layers)

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is at its default is left out."""
        values = asdict(self)
        defaults = {f.name: f.default for f in fields(self)}
        return {k: v for k, v in values.items() if v != defaults[k]}

    @staticmethod
    def from_json(value: Mapping[str, Any] | str) -> Costs:
        """Read JSON; a row may stand where rows do, and a number where a row of one does.

        Raises PlanError for names it does not know, and for missing ones.
        """
        given = json.loads(value) if isinstance(value, str) else dict(value)
        known = {f.name for f in fields(Costs)}
        if not isinstance(given, dict):
            raise PlanError(f"costs are a {type(given).__name__}; they have to be an object of names and numbers")
        unknown, missing = sorted(given.keys() - known), sorted({"forward_s", "backward_s"} - given.keys())
        if unknown or missing:
            what = f"hold {str(unknown)[:200]}" if unknown else f"lack {missing}"
            raise PlanError(f"costs {what}; they need forward_s and backward_s, and may have {sorted(known)}")
        lists = ("boundary_bytes", "weight_bytes", "optimizer_s", "pcie_roots")
        values = dict(given)
        for name in given.keys() & {*_ROWS, *lists}:
            values[name] = _as_rows(given[name]) if name in _ROWS else _as_row(given[name])
        return Costs(**values)


_ROWS = ("forward_s", "backward_s", "activation_bytes", "state_bytes")
_RATES = ("link_bytes_per_s", "host_bytes_per_s", "chunk_bytes")


def _numbers(value: Any) -> list[Any]:
    if isinstance(value, tuple):
        return [x for item in value for x in _numbers(item)]
    return [value]


def _row(rows: Rows, microbatch: int) -> tuple[float, ...]:
    if len(rows) == 1:
        return rows[0]
    if microbatch >= len(rows):
        raise PlanError(f"costs have rows for {len(rows)} micro-batches; the schedule has a micro-batch {microbatch}")
    return rows[microbatch]


def _total(row: tuple[float, ...], layers: tuple[int, int]) -> float:
    lo, hi = layers
    if len(row) == 1:
        return row[0] * (hi - lo)
    if hi > len(row):
        raise PlanError(f"costs have {len(row)} layers; the schedule has a stage of layers {lo}:{hi}")
    return sum(row[lo:hi])


def _as_row(value: Any) -> Any:
    return None if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)


def _as_rows(value: Any) -> Rows:
    rows = value if isinstance(value, list | tuple) else [value]
    return tuple(_as_row(r) for r in rows) if rows and isinstance(rows[0], list | tuple) else (_as_row(rows),)
