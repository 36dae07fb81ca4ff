"""A transformers Trainer that saves through this engine, and resumes bit by bit with its own data order.

    callback = CheckpointCallback("runs/a/checkpoints")
    trainer = Trainer(..., callbacks=[callback])
    trainer.train(resume_from_checkpoint=callback.resume_from(trainer))     # None, from the start, when there is none

When to save stays with the Trainer (`save_strategy`, `save_steps`); its own checkpoints, which stop training, are not
written. The state is the model, the optimizer by parameter name, the scheduler, the gradient scaler, every rank's
random numbers and the Trainer's own state.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from checkpointing.checkpointer import Checkpointer
from checkpointing.config import Settings
from checkpointing.errors import StateError
from checkpointing.nested import flatten, unflatten
from checkpointing.retention import Keep, KeepLast
from checkpointing.storage.local import LocalStorage

_GROUPS = "optim_groups"
_log = logging.getLogger("checkpointing")


class CheckpointCallback(TrainerCallback):
    """Saves when the Trainer would, while training goes on. Every rank makes one.

    The arguments are those of `Checkpointer`; without `keep` the Trainer's `save_total_limit` counts. For one process
    and for DDP. When `train` returns, saves are durable, or what went wrong was raised. Give it the Trainer by
    `resume_from`: else it saves as soon as it hears of an evaluation, and what the Trainer makes of that (the best
    metric, `save_strategy="best"`) is not in the save.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        keep: Keep | None = None,
        timeout_s: float = 600.0,
        **settings: Unpack[Settings],
    ) -> None:
        self._path, self._keep, self._timeout_s, self._settings = path, keep, timeout_s, settings
        self._checkpoints: Checkpointer | None = None
        self._trainer: Trainer | None = None
        self._due, self._saved = False, -1

    def resume_from(self, trainer: Trainer) -> str | None:
        """Return a folder for `train(resume_from_checkpoint=...)`; None when nothing was saved yet. Every rank calls.

        The newest checkpoint that verifies is written there as the Trainer reads it, in `output_dir/resume`, by rank 0;
        every rank holds the state once more meanwhile. Raises what `Checkpointer.restore` raises.
        """
        self._trainer = trainer
        # Behind an evaluation the Trainer notes the best metric, and callbacks what they count, once all have heard.
        trainer._save_checkpoint = self._instead
        found = _Collected()
        info = self._opened(trainer.args).restore(found)
        if info is None:
            return None
        self._saved = info.step
        place = Path(str(trainer.args.output_dir)) / "resume" / f"checkpoint-{info.step}"
        if trainer.args.process_index == 0:
            _write_folder(place, found.state)
        trainer.accelerator.wait_for_everyone()
        return str(place)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the folder."""
        self._opened(args)
        if args.load_best_model_at_end:
            _log.warning(
                "load_best_model_at_end finds none of the checkpoints in %s, so the model stays that of the last step; "
                "with save_strategy='best' the newest of them is the best", self._path
            )  # fmt: skip

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take a save over from the Trainer; it is made once the step is logged and evaluated, as the Trainer would."""
        self._take_over(control)
        if not (control.should_log or control.should_evaluate):
            self._save_if_due(args, state, **kwargs)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save, unless an evaluation comes first."""
        if not control.should_evaluate:
            self._save_if_due(args, state, **kwargs)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save."""
        self._save_if_due(args, state, **kwargs)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save, at the latest."""
        self._save_if_due(args, state, **kwargs)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """As at the end of a step."""
        self.on_step_end(args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save, at the latest, and end once it is durable."""
        self._take_over(control)
        self._save_if_due(args, state, **kwargs)
        checkpoints, self._checkpoints = self._checkpoints, None
        if checkpoints is not None:
            checkpoints.close()

    def _instead(self, model: torch.nn.Module, trial: Any) -> None:
        """What the Trainer calls where it would save."""
        trainer, self._due = self._trainer, True
        assert trainer is not None
        self._save_if_due(
            trainer.args, trainer.state, model=trainer.model, optimizer=trainer.optimizer,
            lr_scheduler=trainer.lr_scheduler,
        )  # fmt: skip

    def _take_over(self, control: TrainerControl) -> None:
        if self._trainer is not None:
            return
        self._due, control.should_save = self._due or control.should_save, False

    def _opened(self, args: TrainingArguments) -> Checkpointer:
        if self._checkpoints is None:
            limit = args.save_total_limit
            keep = KeepLast(limit) if self._keep is None and limit is not None and limit > 0 else self._keep
            self._checkpoints = Checkpointer(self._path, keep=keep, timeout_s=self._timeout_s, **self._settings)
        return self._checkpoints

    def _save_if_due(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        due, self._due = self._due, False
        if not due or state.global_step == self._saved:
            return
        trainer, extra = self._trainer, {}
        if trainer is not None:
            trainer.store_flos()
            _note_callbacks(trainer, state)
            scaler = getattr(trainer.accelerator, "scaler", None)
            extra = {} if scaler is None else {"scaler": scaler.state_dict()}
        parts = extra | {"scheduler": kwargs["lr_scheduler"].state_dict()}
        whole = _TrainerParts(kwargs["model"], kwargs["optimizer"], parts, args, state)
        self._opened(args).save(state.global_step, whole)
        self._saved = state.global_step


class _TrainerParts:
    """What a Trainer trains with, as one flat state. Rank 0 speaks for what is the same on all."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Any,
        parts: Mapping[str, Any],
        args: TrainingArguments,
        state: TrainerState,
    ) -> None:
        self._model, self._optimizer, self._parts, self._args, self._state = model, optimizer, parts, args, state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        raise NotImplementedError("a Trainer loads the folder that resume_from gives")

    def state_dict(self) -> dict[str, Any]:
        rank = self._args.process_index
        out: dict[str, Any] = {f"model.{name}": tensor for name, tensor in self._model.state_dict().items()}
        names = {param: name for name, param in self._model.named_parameters()}
        values: dict[str, Any] = {f"rng.{rank}": _random_numbers()}
        for param, slots in self._optimizer.state.items():
            for slot, value in slots.items():
                if isinstance(value, torch.Tensor):
                    out[f"optim.{names[param]}.{slot}"] = value
                elif rank == 0:
                    values[f"optim.{names[param]}.{slot}"] = value
        if rank == 0:
            try:
                groups = [{**one, "params": [names[p] for p in one["params"]]} for one in self._optimizer.param_groups]
            except KeyError:
                raise StateError("the optimizer steps a parameter that is not the model's") from None
            values |= {_GROUPS: groups, "trainer": json.loads(json.dumps(dataclasses.asdict(self._state)))}
            values |= self._parts
        for name, value in values.items():
            tensors, out[name] = flatten(value, f"{name}#")
            out |= tensors
        return out


class _Collected:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.state = dict(state_dict)


def _note_callbacks(trainer: Trainer, state: TrainerState) -> None:
    """Note the state of the callbacks that have one, as the Trainer does when it saves."""
    found: dict[str, list[Any]] = {}
    for one in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(one, ExportableState):
            found.setdefault(type(one).__name__, []).append(one.state())
    noted: Any = state.stateful_callbacks  # a dict by now, whatever its annotation says
    for name, states in found.items():
        noted[name] = states if isinstance(noted.get(name), list) else states[-1]


def _random_numbers() -> dict[str, Any]:
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.random.get_rng_state(),
    }
    device = torch.accelerator.current_accelerator()
    if device is not None:
        module = torch.get_device_module(device)
        several = dist.is_available() and dist.is_initialized()
        state[device.type] = module.get_rng_state_all() if several else module.get_rng_state()
    return state


def _write_folder(place: Path, state: Mapping[str, Any]) -> None:
    """Write what was saved as the Trainer reads it: whole, or not at all."""
    storage = LocalStorage()
    new = place.with_name(f"{place.name}.{uuid.uuid4().hex[:8]}")
    storage.make_folders(new)
    # Copies: what was restored is cut from common pieces, which `torch.save` writes whole, or refuses for their dtypes.
    state = {name: one.clone() if isinstance(one, torch.Tensor) else one for name, one in state.items()}
    values = {name: unflatten(value, state.__getitem__) for name, value in state.items() if _is_value(name, value)}
    model = {name.removeprefix("model."): one for name, one in state.items() if name.startswith("model.")}
    whole = {name: one.clone().contiguous() for name, one in model.items()}
    save_file(whole, new / "model.safetensors", {"format": "pt"})
    torch.save(_numbered(values[_GROUPS], state, values), new / "optimizer.pt")
    torch.save(values["scheduler"], new / "scheduler.pt")
    if "scaler" in values:
        torch.save(values["scaler"], new / "scaler.pt")
    ranks = [name.removeprefix("rng.") for name in values if name.startswith("rng.")]
    for rank in ranks:
        torch.save(values[f"rng.{rank}"], new / (f"rng_state_{rank}.pth" if len(ranks) > 1 else "rng_state.pth"))
    storage.write_new(new / "trainer_state.json", json.dumps(values["trainer"], indent=2, sort_keys=True).encode())
    if place.exists():
        storage.discard(place)
    storage.rename(new, place)


def _is_value(name: str, value: Any) -> bool:
    return not isinstance(value, torch.Tensor) and "#" not in name


def _numbered(groups: list[dict[str, Any]], state: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the optimizer's state as torch has it, by number."""
    slots: dict[int, dict[str, Any]] = {}
    out, number = [], 0
    by_name: dict[str, dict[str, Any]] = {}
    for full in [*state, *values]:
        if full.startswith("optim.") and "#" not in full:
            name, _, slot = full.removeprefix("optim.").rpartition(".")
            one = state[full]
            by_name.setdefault(name, {})[slot] = one if isinstance(one, torch.Tensor) else values[full]
    for group in groups:
        first = number
        for name in group["params"]:
            if name in by_name:
                slots[number] = by_name[name]
            number += 1
        out.append({**group, "params": list(range(first, number))})
    return {"state": slots, "param_groups": out}
