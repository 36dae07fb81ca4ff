"""Ranks as threads of one process: the shipped fake, and the transport of a pipeline of one rank."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pipeline.transport.base import Mailbox, Message


class LocalHub:
    """The mailboxes of `num_ranks` ranks in this process."""

    def __init__(self, num_ranks: int) -> None:
        self.boxes = [Mailbox() for _ in range(num_ranks)]

    def transport(self, rank: int) -> LocalTransport:
        """Return the end that belongs to a rank."""
        return LocalTransport(self, rank)


class LocalTransport:
    """A rank's end of a `LocalHub`."""

    def __init__(self, hub: LocalHub, rank: int) -> None:
        self._hub, self._rank = hub, rank

    def begin(self, expected: Mapping[int, int]) -> None:
        """Nothing to prepare."""

    def send(self, message: Message, tensor: Tensor, *, peer: int) -> None:
        """Put the tensor itself into the peer's mailbox."""
        self._hub.boxes[peer].put(message, tensor.detach())

    def receive(self, message: Message, *, peer: int, timeout_s: float) -> Tensor:
        """Take from the own mailbox."""
        return self._hub.boxes[self._rank].take(message, peer=peer, timeout_s=timeout_s)

    def end(self, timeout_s: float) -> None:
        """Nothing is on its way."""

    def abort(self, reason: str) -> None:
        """Fail every other rank."""
        for rank, box in enumerate(self._hub.boxes):
            if rank != self._rank:
                box.fail(self._rank, f"gave up: {reason}")

    def close(self) -> None:
        """Nothing to end."""
