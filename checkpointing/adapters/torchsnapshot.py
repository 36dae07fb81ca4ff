"""Objects as torchsnapshot takes them, saved and restored by this engine; torchsnapshot itself is not needed.

    app_state = {"model": model, "optim": optimizer, "progress": StateDict(steps=0)}

    checkpoints.save(step, AppState(app_state))        # was: Snapshot.take(path, app_state)
    checkpoints.restore(AppState(app_state))           # was: Snapshot(path).restore(app_state)

Any object with `state_dict()` and `load_state_dict()` will do, nested as it likes: tensors, numbers, text, bytes,
lists, tuples, sets and dicts, whatever the keys. torchsnapshot's folders are read and written by `checkpoint save`
and `checkpoint restore --format torchsnapshot`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from checkpointing.errors import CheckpointError, StateError
from checkpointing.nested import flatten, unflatten
from checkpointing.records import Stateful
from checkpointing.values import TREES


class AppState:
    """A mapping of key to Stateful, each nested in any way, as one flat state.

    Where torchsnapshot keeps what is not `replicated` once a rank, a name here means the same on every rank, and is
    written once; keys that match a pattern of `per_rank` ("rng", "progress*") are kept for each rank, and `rank` says
    which this is. Restoring on other ranks than it was saved on is for what is not per rank.
    """

    def __init__(self, app_state: Mapping[str, Stateful], *, per_rank: Iterable[str] = (), rank: int = 0) -> None:
        self._parts, self._per_rank, self._rank = dict(app_state), tuple(per_rank), rank
        for key, part in self._parts.items():
            if not isinstance(part, Stateful):
                raise StateError(f"{key!r} is of type {type(part).__name__}, without state_dict and load_state_dict")
            if "/" in key or key.startswith("rank"):
                raise StateError(f"the key {key!r} has a slash or begins with 'rank'; choose another")

    def state_dict(self) -> dict[str, Any]:
        """Return every part, flat: `<key>.<path>` for tensors and `tree.<key>` for what holds them together."""
        out: dict[str, Any] = {}
        for key, part in self._parts.items():
            name = self._name(key)
            tensors, tree = flatten(part.state_dict(), name)
            whole = {**tensors, f"{TREES}{name}": tree}
            if both := out.keys() & whole.keys():
                raise StateError(f"{key!r} and another key both have something called {min(both)!r}; choose other keys")
            out |= whole
        return out

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Give every part what was saved under its key. Raises CheckpointError, before any part is changed."""
        trees = {key: f"{TREES}{self._name(key)}" for key in self._parts}
        missing = [key for key, name in trees.items() if name not in state_dict]
        if missing:
            there = sorted(name.removeprefix(TREES) for name in state_dict if name.startswith(TREES))
            raise CheckpointError(f"{missing[0]!r} was not saved for rank {self._rank}; there are: {', '.join(there)}")
        nested = {key: unflatten(state_dict[name], state_dict.__getitem__) for key, name in trees.items()}
        for key, part in self._parts.items():
            part.load_state_dict(nested[key])

    def _name(self, key: str) -> str:
        own = any(fnmatchcase(key, pattern) for pattern in self._per_rank)
        return f"rank{self._rank}.{key}" if own else key
