"""A polite end, which a signal asks for; all ranks agree on the step after which it comes."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

from launch.bounded import all_reduce

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""The second is Ctrl-C, the last a terminal that was closed."""


def heeded() -> tuple[signal.Signals, ...]:
    """Return those of SIGNALS that are not ignored already: nohup has SIGHUP ignored."""
    return tuple(number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN)


class StopSignals:
    """Inside `with`, the first signal is noted instead of ending the process; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in heeded()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]  (what signal() gave us)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def agreed(
        self, device: torch.device, *, save: bool = False, timeout_s: float = 600.0, what: str = "agreeing to go on"
    ) -> tuple[bool, bool]:
        """Return whether any rank was asked to stop, and whether any was asked to save now.

        Every rank calls, once a step: a collective. Raises WatchdogError, `what` first, when a rank does not come in
        time.
        """
        asked = torch.tensor([float(self.received is not None), float(save)], device=device)
        all_reduce(asked, op=dist.ReduceOp.MAX, timeout_s=timeout_s, what=what)
        return bool(asked[0].item()), bool(asked[1].item())
