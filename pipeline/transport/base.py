"""The seam: messages by name, delivered in whatever order the schedule asks for them."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pipeline.actions import Phase
from pipeline.errors import WatchdogError


@dataclass(frozen=True, slots=True)
class Message:
    """Which tensor: the input of `stage` (phase F), or the gradient of its output (phase B), in a step."""

    step: int
    phase: Phase
    stage: int
    """The stage that receives."""
    microbatch: int

    def __str__(self) -> str:
        what = "activation" if self.phase is Phase.F else "gradient"
        return f"{what} of micro-batch {self.microbatch} for stage {self.stage}, step {self.step}"


def reason_of(error: BaseException) -> str:
    """Return what an error of a connection says, on one line, without the line of gloo's source and its advice."""
    text = re.sub(r"\[\S+\.(?:cc|cpp|h):\d+\] ", "", " ".join(str(error).split()))
    return text.partition(". This ")[0][:200]


class Transport(Protocol):
    """Carries tensors of any shape between the ranks of a pipeline. One object a rank; peers are pipeline ranks."""

    def begin(self, expected: Mapping[int, int]) -> None:
        """Say how many messages of each peer will be received in this step."""
        ...

    def send(self, message: Message, tensor: Tensor, *, peer: int) -> None:
        """Hand a tensor over and return at once; it must not be changed afterwards."""
        ...

    def receive(self, message: Message, *, peer: int, timeout_s: float) -> Tensor:
        """Return a tensor. Raises WatchdogError after the deadline, or when the peer is gone or gave up."""
        ...

    def end(self, timeout_s: float) -> None:
        """Return when everything sent has left. Raises WatchdogError after the deadline."""
        ...

    def abort(self, reason: str) -> None:
        """Tell the peers that this rank gives up, as far as they still listen. Does not raise."""
        ...

    def close(self) -> None:
        """End the transport; it is of no use afterwards."""
        ...


class Mailbox:
    """Where messages wait for the action that needs them; filled by any thread."""

    def __init__(self) -> None:
        self._arrived: dict[Message, Tensor] = {}
        self._failed: dict[int, str] = {}
        self._changed = threading.Condition()

    def put(self, message: Message, tensor: Tensor) -> None:
        """Add a message."""
        with self._changed:
            self._arrived[message] = tensor
            self._changed.notify_all()

    def fail(self, peer: int, reason: str) -> None:
        """Say that nothing more will come from a peer."""
        with self._changed:
            self._failed.setdefault(peer, reason)
            self._changed.notify_all()

    def take(self, message: Message, *, peer: int, timeout_s: float) -> Tensor:
        """Wait for a message, remove and return it; what arrived before a failure still counts."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while message not in self._arrived:
                if peer in self._failed:
                    raise WatchdogError(f"waiting for the {message}, from rank {peer}: {self._failed[peer]}")
                left = deadline - time.monotonic()
                if left <= 0:
                    raise WatchdogError(
                        f"waiting for the {message}, from rank {peer}: nothing came within {timeout_s:g} s; rank "
                        f"{peer} is stopped, hangs or is slower than that: see its output, or raise the timeout"
                    )
                # A failure of any other peer ends the wait too: this one may be waiting for that one.
                if self._failed:
                    other, reason = next(iter(self._failed.items()))
                    raise WatchdogError(f"waiting for the {message}, from rank {peer}: rank {other} {reason}")
                self._changed.wait(left)
            return self._arrived.pop(message)

    def leftover(self) -> list[Message]:
        """Return what nobody took."""
        with self._changed:
            return list(self._arrived)
