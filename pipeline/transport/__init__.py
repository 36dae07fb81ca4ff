"""How activations and gradients travel between ranks."""

from pipeline.transport.base import Message, Transport
from pipeline.transport.group import GroupTransport
from pipeline.transport.local import LocalHub

__all__ = ["GroupTransport", "LocalHub", "Message", "Transport"]
