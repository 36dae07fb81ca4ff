"""Which weights are there, and which gradients: the contract between slots and optimizer, checked at every upload.

Version v of a layer holds the gradients of the optimizer steps 0 to v - 1 of a run. The host keeps staleness + 1
versions, so while version v is read, at most version v + staleness may have been made.
"""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.errors import StalenessError
from pipeline.roundpipe.host_plan import rounds_done
from pipeline.roundpipe.host_store import HostStore


class Versions:
    """Versions and gradient counts of one run, which begins with turn `base`."""

    def __init__(self, store: HostStore, *, base: int) -> None:
        self.base = base
        self._words, self._map, self._staleness = store.words, store.plan.words, store.plan.staleness
        self._owners = store.plan.owners
        self._trained = {p.home for p in store.plan.parameters.values() if p.trained}

    def word(self, home: int, version: int) -> tuple[int, int]:
        """Return the word that says a version is made, and the value it then has. Frozen layers have one version."""
        return self._map.version(home), self.base + (version if home in self._trained else 0)

    def missing(self, homes: Iterable[int], version: int) -> str | None:
        """Return what is not made yet, and by which rank; None when all is there."""
        for home in homes:
            word, value = self.word(home, version)
            if self._words[word] < value:
                return f"version {version} of layer {home} from the optimizer of rank {self._owners[home]}"
        return None

    def check(self, homes: Iterable[int], version: int, *, slot: int, step: int) -> None:
        """Raise StalenessError unless `version` may be read in `step` and nothing has overwritten it."""
        if not step - self._staleness <= version <= step:
            raise StalenessError(
                f"slot {slot}, step {step}: weights of version {version} are asked for; the declared staleness "
                f"{self._staleness} allows {max(0, step - self._staleness)} to {step}"
            )
        for home in homes:
            word, value = self.word(home, version)
            ahead = self._words[word] - value
            if not 0 <= ahead <= self._staleness:
                raise StalenessError(
                    f"slot {slot}, step {step}: layer {home} is at version {version + ahead} while version {version} "
                    f"is read; with staleness {self._staleness} the host holds no more than {1 + self._staleness}"
                )

    def publish(self, home: int, version: int) -> None:
        """Say that a version is made. By the rank that owns the layer."""
        self._words.publish(*self.word(home, version))

    def gradients(self, layer: int, step: int, rounds: int) -> tuple[int, int]:
        """Return the word that counts a layer's gradients, and its value after so many rounds of a step."""
        return self._map.gradients(layer), rounds_done(self.base + step + 1, rounds)
