"""Ranks that a benchmark has started as processes."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence


def wait_for(ranks: Sequence[subprocess.Popen[bytes]], *, deadline_s: float) -> None:
    """Wait for all ranks; raise RuntimeError as soon as one fails, or after `deadline_s`."""
    deadline = time.monotonic() + deadline_s
    while True:
        codes = [r.poll() for r in ranks]
        failed = [i for i, code in enumerate(codes) if code]
        if failed or time.monotonic() > deadline:
            raise RuntimeError(f"ranks {failed} failed" if failed else f"not done after {deadline_s} s")
        if None not in codes:
            return
        time.sleep(0.2)
