"""Pruning by hand: what the retention of a run would delete, and what crashes have left, of whichever run."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable

from checkpointing.errors import IntegrityError
from checkpointing.folder import Folder
from checkpointing.retention import KeepLast, plan_pruning
from checkpointing.verify import damages, raise_first

_LEFT = re.compile(r"step-[0-9]+\.tmp-[0-9a-f]{8}-[0-9a-f]{8}", re.ASCII)


def prune_run(folder: Folder, keep: int, *, dry_run: bool, read: Callable[[int], None]) -> list[str]:
    """Delete all but the newest `keep` checkpoints of each run, and leftovers nobody holds a lock on; return the names.

    The newest checkpoint of each run is read in full first; one that does not verify is not counted and stays.
    """
    committed = folder.committed()
    gone: list[str] = []
    for run_id in sorted({found.run_id for found in committed.values()}):
        steps = [step for step, found in committed.items() if found.run_id == run_id]
        bad = _bad_newest(folder, steps, read)
        good = [step for step in steps if step not in bad]
        if good:
            gone += [folder.at(step).name for step in plan_pruning(KeepLast(keep), steps, bad, saved=max(good))]
    left = [name for name in sorted(folder.storage.names(folder.root)) if _LEFT.fullmatch(name)]
    if dry_run:
        return [*gone, *left]
    for name in gone:
        aside = f"{name}.tmp-{'0' * 8}-{uuid.uuid4().hex[:8]}"
        folder.storage.remove_committed(folder.root / name, folder.root / aside)
    return [*gone, *(name for name in left if _remove_unlocked(folder, name))]


def _bad_newest(folder: Folder, steps: list[int], read: Callable[[int], None]) -> set[int]:
    """Return the newest steps that do not verify, up to the first that does."""
    bad: set[int] = set()
    for step in sorted(steps, reverse=True):
        manifest = folder.inspect(step)
        try:
            for file in manifest.files:
                raise_first(damages(folder.storage, folder.at(step), manifest, file, read))
        except IntegrityError:
            bad.add(step)
            continue
        break
    return bad


def _remove_unlocked(folder: Folder, name: str) -> bool:
    try:
        lock = folder.storage.lock(folder.root / name)
    except FileNotFoundError:  # it was finished meanwhile, or given up
        return False
    if lock is None:  # a save is writing in it; or nobody can tell on this file system
        return False
    try:
        folder.storage.remove_tree(folder.root / name)
    except FileNotFoundError:
        return False
    finally:
        folder.storage.close(lock)
    return True
