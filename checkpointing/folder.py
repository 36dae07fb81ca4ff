"""A folder of checkpoints: its names, and what of it is committed.

step-20/                        committed: manifest.json and the files it lists
step-30.tmp-<run>-<nonce>/      being written, or left by a crash; <run> is the beginning of the run id
step-30.bad-<nonce>/            did not verify and stood in the way of a save of the same step; never touched again
request                         asks a running job to save now (`Checkpointer.requested`); gone once it has
latest                          the name of the newest checkpoint: a hint for people and scripts, never read here
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from checkpointing import manifest as manifests
from checkpointing.errors import IntegrityError, StateError
from checkpointing.records import Manifest, Summary
from checkpointing.storage.local import LocalStorage
from checkpointing.transfer import check_length
from checkpointing.verify import damages, raise_first

_Found = TypeVar("_Found", Manifest, Summary)

REQUEST = "request"
_MAX_STEP = 10**18
_STEP = re.compile(r"step-(0|[1-9][0-9]{0,18})", re.ASCII)
_ASIDE = re.compile(r"step-(0|[1-9][0-9]{0,18})\.aside-[0-9a-f]{8}", re.ASCII)
_OURS = re.compile(r"step-[0-9]+(?:\.(?:tmp|bad|aside)-.*)?", re.ASCII)
_BESIDE = frozenset({REQUEST, "latest", "lost+found"})
_TMP = re.compile(r"(?:step-[0-9]+|latest)\.tmp-([0-9a-f]{8})-[0-9a-f]{8}", re.ASCII)


def check_step(step: object) -> None:
    """Raise StateError unless `step` can be that of a checkpoint."""
    if type(step) is not int or not 0 <= step < _MAX_STEP:
        raise StateError(f"step is {step!r}; it must be an int from 0 to 10**18 - 1")


def split_step(path: Path) -> tuple[Path, int | None]:
    """Return (run folder, step) of a path that may be a run folder, or `run/step-20`."""
    match = _STEP.fullmatch(path.name)
    return (path.parent, int(match[1])) if match else (path, None)


@dataclass(frozen=True, slots=True)
class Folder:
    """The folder, read through a storage. Scans anew on every call: the folder is the only truth."""

    root: Path
    storage: LocalStorage

    def at(self, step: int) -> Path:
        """Return the place of a committed step."""
        return self.root / f"step-{step}"

    def candidates(self) -> list[int]:
        """Return every step that has a folder of the right name, oldest first, whatever is in it."""
        matches = (_STEP.fullmatch(name) for name in self.storage.names(self.root))
        return sorted(int(match[1]) for match in matches if match)

    def is_of_a_run(self) -> bool:
        """Return whether a folder that is there holds checkpoints of a run, or nothing yet; of other things, no run."""
        names = [name for name in self.storage.names(self.root) if name not in _BESIDE and not name.startswith(".")]
        return not names or any(_OURS.fullmatch(name) for name in names)

    def aside(self) -> list[tuple[int, Path]]:
        """Return what was set aside when a run went back behind it: the step, and its place now."""
        matches = (_ASIDE.fullmatch(name) for name in self.storage.names(self.root))
        return [(int(match[1]), self.root / match[0]) for match in matches if match]

    def leftovers(self, run_id: str) -> list[Path]:
        """Return what saves of this run have begun and not finished."""
        matches = [(name, _TMP.fullmatch(name)) for name in self.storage.names(self.root)]
        return [self.root / name for name, match in matches if match and match[1] == run_id[:8]]

    def set_aside(self, step: int, kind: str) -> Path:
        """Move a step out of the way of restores, durably, as `step-N.<kind>-<nonce>`. Returns its new place."""
        place = self.at(step)
        new = place.with_name(f"{place.name}.{kind}-{uuid.uuid4().hex[:8]}")
        self.storage.rename(place, new)
        self.storage.sync_folder(self.root)
        return new

    def has_manifest(self, step: int) -> bool:
        """Return whether there is a file of that name; a folder without one is not a checkpoint of ours."""
        try:
            return manifests.FILE_NAME in self.storage.names(self.at(step))
        except NotADirectoryError:
            return False

    def inspect(self, step: int) -> Manifest:
        """Return the manifest of a step whose files are all there with their lengths.

        Reads no tensor. Raises IntegrityError.
        """
        return self._checked(step, manifests.loads)

    def summary(self, step: int) -> Summary:
        """Return what `inspect` does, without the tensors. Raises IntegrityError."""
        return self._checked(step, manifests.loads_summary)

    def _checked(self, step: int, loads: Callable[[bytes], _Found]) -> _Found:
        place = self.at(step)
        try:
            found = loads(self.storage.read(place / manifests.FILE_NAME))
        except OSError as error:
            raise IntegrityError(f"{place.name}/{manifests.FILE_NAME}: {error.strerror}") from error
        except IntegrityError as error:
            raise type(error)(f"{place.name}/{manifests.FILE_NAME}: {error}") from error
        if found.step != step:
            raise IntegrityError(f"{place.name}: the manifest is that of step {found.step}; was the folder renamed?")
        for file in found.files:
            check_length(self.storage, place, file)
        return found

    def verify(self, step: int, alive: Callable[[], None]) -> Manifest:
        """Read every byte of a checkpoint, calling `alive` on the way. Raises IntegrityError naming file and tensor."""
        found = self.inspect(step)
        for file in found.files:
            raise_first(damages(self.storage, self.at(step), found, file, lambda _: alive()))
        return found

    def committed(self, known: dict[int, tuple[tuple[int | str, ...], Summary]] | None = None) -> dict[int, Summary]:
        """Return the steps whose manifest proves itself and whose files have their lengths, oldest first.

        `known` remembers manifests that were read, by what the file system says of them; it is brought up to date.
        """
        known = {} if known is None else known
        found, old = {}, dict(known)
        known.clear()
        for step in self.candidates():
            try:
                stamp = self.storage.stamp(self.at(step) / manifests.FILE_NAME)
                if step in old and old[step][0] == stamp:
                    for file in old[step][1].files:
                        check_length(self.storage, self.at(step), file)
                    found[step] = old[step][1]
                else:
                    found[step] = self.summary(step)
            except (IntegrityError, OSError):
                continue
            known[step] = (stamp, found[step])
        return found
