"""Plans that are kept in a file: a full search takes seconds a row, and gives the same every time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pipeline
from pipeline.roundpipe.planner import RoundPipePlan, plan
from pipeline.roundpipe.slots import LayerCosts

_SOURCES = ("roundpipe/*.py", "schedules/*.py")


class PlanFile:
    """Plans by what was asked for, and by the sources of those who search: what changed searches anew."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def plan(self, costs: LayerCosts, **settings: Any) -> RoundPipePlan:
        """Return what `pipeline.roundpipe.planner.plan` returns. Raises PlanError as it does."""
        asked = {"plan": asdict(costs), **settings}
        return RoundPipePlan.from_json(self.kept(asked, lambda: plan(costs, **settings).to_json()))

    def kept(self, asked: dict[str, Any], make: Callable[[], Any]) -> Any:
        """Return plain values that are in the file, or make them and write them down."""
        key = _digest(json.dumps([_planner(), asked]).encode())
        if key not in self._known:
            self._known[key] = json.loads(json.dumps(make()))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside = self.path.with_suffix(f".{os.getpid()}")
            beside.write_text(json.dumps(self._known))
            beside.replace(self.path)
        return self._known[key]


@cache
def _planner() -> str:
    """Return a digest of what decides a plan, ours or a peer's."""
    root = Path(next(iter(pipeline.__path__)))
    sources = [path for glob in _SOURCES for path in sorted(root.glob(glob))]
    sources.append(Path(__file__).with_name("pipeline_peers.py"))
    return _digest(b"".join(path.read_bytes() for path in sources))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
