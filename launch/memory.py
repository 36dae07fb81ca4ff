"""How much memory a step needs: the resident set on a CPU, what torch allocates on an accelerator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from chunkflow.memory import reset_peak
from launch.errors import ModelError
from launch.summary import peak_resident_bytes


class PeakMemory:
    """The largest memory of this rank, of each step and of the whole process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._resident = 0
        self._counted = True

    def begin(self) -> None:
        """Begin to measure a step."""
        self._resident = self.resident_bytes()
        if self._device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(self._device)
            return
        try:
            reset_peak()
        except OSError:  # only Linux can
            self._counted = False

    def of_step(self) -> int:
        """Return this rank's largest memory since `begin`; 0 where that is not counted."""
        if self._device.type != "cpu":
            return torch.accelerator.max_memory_allocated(self._device)
        return peak_resident_bytes() if self._counted else 0

    def resident_bytes(self) -> int:
        """Return the largest resident set this process has had, whatever was measured in between."""
        return max(self._resident, peak_resident_bytes())


@contextmanager
def too_large_told(what: str) -> Iterator[None]:
    """Raise ModelError, one line that begins with `what`, where the block asks for more memory than there is."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error).partition("\n")[0]
        known = isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in text for sign in _TOO_LARGE)
        if not known:
            raise
        raise ModelError(f"{what} does not fit into the memory that is here; make it smaller: {text}") from error


_TOO_LARGE = ("can't allocate memory", "Storage size calculation overflowed")
"""What torch says of sizes, where the class of its error does not tell; the last beyond 64 bits."""
