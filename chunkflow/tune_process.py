"""Measurements of `chunkflow.tune_case` in a process of their own, followed while they run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from chunkflow.errors import ChunkflowError

TRAINED = "trained "
"""Begins a line that says how far the measurements are."""
DEADLINE_S = 3600
_POLL_S = 0.2


def measured(
    model: str, dtype: str, grid: Sequence[tuple[int, int, int]], told: Callable[[int], None], *, longest: int
) -> dict[str, Any]:
    """Return what `tune_case.measure` finds for (chunk_tokens, retain, tokens); `told` is given the tokens trained.

    `longest` is what all of it is for. Raises ChunkflowError when it fails, or takes longer than an hour.
    """
    request = json.dumps({"model": model, "dtype": dtype, "cases": grid, "longest": longest})
    with TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        with out.open("wb") as stdout, err.open("wb") as stderr:
            command = [sys.executable, "-m", "chunkflow.tune_case", request]
            process = subprocess.Popen(command, stdout=stdout, stderr=stderr)
        try:
            _follow(process, out, told, f"measuring {list(grid)}")
        finally:
            process.kill()
            process.wait()
        if process.returncode != 0:
            last = err.read_text(errors="replace").strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
            raise ChunkflowError(
                f"measuring {list(grid)} failed: {last[0].removeprefix('chunkflow.errors.ChunkflowError: ')}"
            )
        return json.loads(out.read_text().splitlines()[-1])


def _follow(process: subprocess.Popen[bytes], out: Path, told: Callable[[int], None], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        try:
            process.wait(timeout=_POLL_S)
            return
        except subprocess.TimeoutExpired:
            lines = [line for line in out.read_text().splitlines()[:-1] if line.startswith(TRAINED)]
            told(int(lines[-1].removeprefix(TRAINED)) if lines else 0)
    raise ChunkflowError(f"{what} took more than {DEADLINE_S} s; choose smaller sizes")
