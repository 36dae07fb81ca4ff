"""Whether a restart would go on from another run's checkpoint instead of what is to be saved."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection
from pathlib import Path

from checkpointing.errors import IntegrityError, StateError
from checkpointing.folder import Folder

_log = logging.getLogger("checkpointing")
_Found = tuple[int, Path, str]


def check_first(tier: Folder, step: int, run_id: str, known_bad: Collection[int], *, all_steps: bool) -> None:
    """Look in the first tier; with `all_steps` for what is older than `step`, too, which is said. Raises StateError."""
    _judge(_newest(tier, run_id, step if not all_steps else 0, known_bad), step)


class Look:
    """A look into the second tier by a process that has not restored, while its first save is written."""

    def __init__(self, second: Folder, run_id: str) -> None:
        self._second, self._run_id = second, run_id
        self._found: _Found | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint-look", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # no more threads; what is there cannot be told without holding up the save
            _log.warning("%s is not looked at, as there can be no more threads", second.root)

    def check(self, step: int, wait_s: float) -> None:
        """Raise StateError where another run's checkpoint there is as new as `step`. Waits for at most `wait_s`."""
        if self._thread.ident is None:
            return
        self._thread.join(wait_s)
        if self._thread.is_alive():
            _log.warning("%s gives no answer for %g s; other runs there are not looked for", self._second.root, wait_s)
            return
        _judge(self._found, step)

    def _run(self) -> None:
        try:
            self._found = _newest(self._second, self._run_id, 0, ())
        except OSError:  # it cannot be reached; copying to it says so
            self._found = None


def _newest(tier: Folder, run_id: str, least: int, ignored: Collection[int]) -> _Found | None:
    """Return the newest checkpoint of another run that a restore would try; those of a newer version are let be."""
    for other in reversed(tier.candidates()):
        if other >= least and other not in ignored:
            try:
                whose = tier.summary(other).run_id
            except (IntegrityError, OSError):
                continue
            if whose != run_id:
                return other, tier.at(other), whose
    return None


def _judge(found: _Found | None, step: int) -> None:
    if found is None:
        return
    other, place, run_id = found
    if other >= step:
        raise StateError(
            f"{place} is of another run ({run_id[:8]}), and a restart would go on from it instead of step {step}; "
            "restore it first, or save into another folder, or move it away"
        )
    _log.warning(
        "%s is of a run (%s) that this process has not restored; it stays, and what is saved is a run of its own",
        place,
        run_id[:8],
    )
