"""Expert-parallel models to a Hugging Face folder, with a proof that every expert went round.

The ranks hash the experts they hold; what was written is read back and hashed again, tensor by tensor. So an expert
that was dropped, doubled or swapped on the way is an error here, and not a model that trains a little worse.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from moe.errors import MoeError
from moe.parallel import expert_layers
from moe.prints import print_of
from moe.state import state_dict
from moe.together import Together

_EXPERT = re.compile(r"^(.*\.)(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight$")
_BEAT_S = 0.5
"""How often the ranks ask the one that writes."""
_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}

Prints = dict[str, tuple[tuple[int, ...], str]]
"""Shape and xxh3-128 of tensors, by name; experts as `<block>.experts.<number>.<gate_proj|up_proj|down_proj>`."""


@dataclass(frozen=True)
class Proof:
    """What was written and compared with what the ranks held: names, shapes and hashes."""

    folder: str
    num_tensors: int
    num_expert_tensors: int
    digest: str
    """xxh3-128 over all names, shapes and hashes, in order."""


def save_pretrained(model: PreTrainedModel, folder: str | Path) -> Proof:
    """Write the whole model as transformers does, from the first rank of the mesh, and prove it. Every rank calls.

    Returns on every rank once the folder is complete and proven. Raises MoeError, on every rank, when writing failed or
    when a tensor on disk is missing, unknown, or differs from what a rank held; ExchangeError when a rank is lost or
    late. Writing itself may take any time: meanwhile the ranks tell each other that they are there. Families with names
    of their own on disk are read back by transformers, which takes the memory of another copy on the rank that writes.
    """
    together = Together(model, "save_pretrained")
    place = together.placement
    is_writer = all(c == 0 for c in place.mesh.get_coordinate() or [0])
    held = _held_everywhere(together.gather(_of_model(model)))
    whole = {name: _whole(value, together, keep=is_writer) for name, value in state_dict(model).items()}

    def write() -> Proof | str:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)  # transformers only logs that a file is in the way
            model.save_pretrained(folder, state_dict=whole)
            return _prove(folder, held, model)
        except Exception as error:  # noqa: BLE001 (the other ranks wait for this rank's answer)
            return f"{type(error).__name__}: {error}"

    outcome = _answer_of(write if is_writer else None, together)
    if isinstance(outcome, str):
        raise MoeError(f"{folder} is not a true copy of the model: {outcome}")
    return outcome


def _answer_of(work: Callable[[], Proof | str] | None, together: Together) -> Proof | str:
    """Return, on every rank, what `work` of the one that has any returned."""
    if work is None:
        while (answer := _first(together.gather(None))) is None:
            pass
        return answer
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        while True:
            wait((future,), timeout=_BEAT_S)
            if (answer := _first(together.gather(future.result() if future.done() else None))) is not None:
                return answer


def _first(answers: list[Any]) -> Any:
    return next((answer for answer in answers if answer is not None), None)


def _whole(value: Any, together: Together, *, keep: bool) -> Any:
    if not isinstance(value, DTensor):
        return value
    place = together.placement
    if value.device_mesh == place.mesh[place.ep] and value.placements == (Shard(0),):
        whole = torch.cat(together.join(value.to_local().detach(), place.ep))
    else:
        whole = value.full_tensor()
    return whole.cpu() if keep else None


def _of_model(model: nn.Module) -> Prints:
    """Return the prints of what this rank holds, with the experts numbered as in the whole model."""
    firsts = {block: layer.runner.lanes.position * layer.num_experts for block, layer in expert_layers(model).items()}
    return _of_state(state_dict(model), firsts)


def _of_state(state: Mapping[str, Tensor], firsts: Mapping[str, int]) -> Prints:
    """Return the prints of a state. `firsts` are its blocks of experts, and the first expert of each that it has."""
    prints: Prints = {}
    for name, value in state.items():
        block, _, stack = name.rpartition(".")
        if block not in firsts:
            prints[name] = _print(value)
            continue
        local = value.to_local() if isinstance(value, DTensor) else value
        for e, expert in enumerate(local, start=firsts[block]):
            parts = zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True)
            parts = dict(parts) if stack == "gate_up_proj" else {"down_proj": expert}
            prints |= {f"{block}.{e}.{part}": _print(weight) for part, weight in parts.items()}
    return prints


def _held_everywhere(every: list[Prints]) -> Prints:
    held: Prints = {}
    for rank, prints in enumerate(every):
        for name, value in prints.items():
            if held.setdefault(name, value) != value:
                raise MoeError(f"rank {rank} holds another {name} than the ranks before it; average gradients over dp")
    return held


def _prove(folder: str | Path, held: Prints, model: PreTrainedModel) -> Proof:
    written = _of_folder(Path(folder))
    if set(written) - set(held):
        written = _as_read(folder, model) or written
    tied = {name for name in held if name not in written and _has_twin(name, held, written)}
    missing, unknown = sorted(set(held) - set(written) - tied), sorted(set(written) - set(held))
    differing = sorted(name for name in set(held) & set(written) if held[name] != written[name])
    for what, names in (("missing", missing), ("unknown", unknown), ("different", differing)):
        if names:
            raise MoeError(f"{len(names)} tensors are {what}, the first {names[0]}")
    digest = xxhash.xxh3_128_hexdigest(repr(sorted(written.items())).encode())
    return Proof(str(folder), len(written), sum(".experts." in name for name in written), digest)


def _as_read(folder: str | Path, model: PreTrainedModel) -> Prints | None:
    """Return the prints of what transformers reads, of a family with names of its own; None where it does not fit."""
    try:
        found: Any = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    except RuntimeError:
        return None
    loaded, told = found
    if told["missing_keys"] or told["unexpected_keys"]:
        return None
    return _of_state(loaded.state_dict(), dict.fromkeys(expert_layers(model), 0))


def _has_twin(name: str, held: Prints, written: Prints) -> bool:
    """Whether a tensor that is not on disk is tied to one that is: only the LM head may be."""
    return name == "lm_head.weight" and held[name] in written.values()


def _of_folder(folder: Path) -> Prints:
    prints: Prints = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                prints[_canonical(name)] = _print(tensors.get_tensor(name))
    return prints


def _canonical(name: str) -> str:
    match = _EXPERT.match(name)
    if match:
        return f"{match[1]}mlp.experts.{match[2]}.{_PARTS.get(match[3], match[3])}"
    return name.replace(".block_sparse_moe.", ".mlp.")


def _print(value: Tensor) -> tuple[tuple[int, ...], str]:
    return tuple(value.shape), print_of(value)
