"""The control of several ranks, over a TCPStore which rank 0 hosts.

The store's address is the one thing shared by a collective, at construction.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from checkpointing.control import Decide, Outcome, settle
from checkpointing.errors import RankError
from checkpointing.store_calls import StoreCalls, open_store

_PART_BYTES = 4 * 2**20  # TCPStore drops the connection on values over 8 MiB
_GOODBYE_S = 10.0
_LEAVING_S = 1.0


class StoreControl:
    """Reports and answers as keys of a store; a key is deleted by the rank that reads it."""

    def __init__(self, group: dist.ProcessGroup, timeout_s: float) -> None:
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self._timeout_s = timeout_s
        self._calls = StoreCalls(open_store(group, self.rank), timeout_s)
        self._call, self._what = 0, "joining the others"
        self._first: str | None = None
        self._beats, self._beat_at, self._leads = 0, 0.0, 0
        self._unread: dict[str, int] = {}
        self.pulse = time.monotonic()
        self._leaving = False
        self._store("set", self._life(self.rank), "0")

    def begin(self, what: str) -> None:
        """Begin a call; calls are numbered, so that a rank that gave one up does not answer the next with it."""
        self._call, self._what, self._first = self._call + 1, what, None

    def tell(self, phase: str, outcome: Outcome) -> None:
        """Report this rank's outcome; on rank 0, which decides, it becomes everyone's answer."""
        if self.rank:
            self._post(self._key(phase, "report", self.rank), outcome.to_json())
        else:
            self._answer(phase, settle(self._what, [outcome] * self.world_size, lambda bodies: bodies))

    def exchange(self, phase: str, outcome: Outcome, decide: Decide) -> Outcome:
        """Report, and return what rank 0 answers. Raises RankError when rank 0 is silent or gone."""
        if self.rank:
            self.tell(phase, outcome)
            mine = {0: self._key(phase, "answer", self.rank)}
            found = self._collect(mine)
            if 0 not in found:
                why = "before this rank gave up" if self._leaving else f"for {self._timeout_s:g} s"
                raise RankError(f"{self._what} failed: rank 0 gave no answer {why}")
            return found[0]
        wanted = {rank: self._key(phase, "report", rank) for rank in range(1, self.world_size)}
        found = {0: outcome, **self._collect(wanted)}
        answers = settle(self._what, [found.get(rank) for rank in range(self.world_size)], decide)
        self._answer(phase, answers)
        return answers[0]

    def alive(self) -> None:
        """Give a sign of life, a few times per deadline at most."""
        self.pulse = now = time.monotonic()
        if now - self._beat_at >= min(1.0, self._timeout_s / 4):
            self._beats, self._beat_at = self._beats + 1, now
            # With the number of the call: a rank that has gone on to another call is no sign of life in this one.
            self._store("set", self._life(self.rank), f"{self._call} {self._beats}")

    def lead(self, value: bool) -> bool:
        """Return rank 0's value. Raises RankError when rank 0 does not come to this call in time."""
        self._leads += 1
        key, give_up = f"lead/{self._leads}", time.monotonic() + self._timeout_s
        if self.rank == 0:
            self._calls("set", key, str(int(value)))
            if self._leads > 2:  # no rank is two calls behind: the saves between could not have ended
                self._calls("delete_key", f"lead/{self._leads - 2}")
            return value
        while not self._calls("check", [key]):
            if time.monotonic() > give_up:
                raise RankError(f"rank 0 did not call save within {self._timeout_s:g} s of this rank")
            time.sleep(0.0005)
        return self._calls("get", key) == b"1"

    def leave(self) -> None:
        """Give up on ranks that are silent: from now on nobody is waited for, in calls under way too."""
        self._leaving = True
        self._calls.hurry(_LEAVING_S)

    def close(self) -> None:
        """Let go of the store; its host waits a little until the others have read their answers, or left."""
        give_up = time.monotonic() + min(self._timeout_s, _LEAVING_S if self._leaving else _GOODBYE_S)
        with suppress(RankError):  # the store is gone already
            if self.rank:
                self._store("set", f"left/{self.rank}", "")
            while time.monotonic() < give_up and any(self._awaited(*one) for one in self._unread.items()):
                time.sleep(0.01)
        self._calls.stop()

    def _awaited(self, key: str, rank: int) -> bool:
        return self._store("check", [key]) and not self._store("check", [f"left/{rank}"])

    def _answer(self, phase: str, answers: Sequence[Outcome]) -> None:
        self._unread = {key: rank for key, rank in self._unread.items() if self._store("check", [key])}
        for rank in range(1, self.world_size):
            key = self._key(phase, "answer", rank)
            self._post(key, answers[rank].to_json())
            self._unread[key] = rank

    def _store(self, method: str, *args: Any) -> Any:
        try:
            return self._calls(method, *args)
        except RankError as error:
            raise RankError(f"{self._what} failed: {error}") from error

    def _collect(self, keys: Mapping[int, str]) -> dict[int, Outcome]:
        """Wait for a key of each rank, as long as that rank is alive. Returns what came."""
        found: dict[int, Outcome] = {}
        start = time.monotonic()
        deadline = dict.fromkeys(keys, start + self._timeout_s)
        seen = {rank: self._life_of(rank) for rank in keys}
        while deadline:
            self.alive()
            for rank in list(deadline):
                if self._store("check", [keys[rank]]):
                    found[rank] = Outcome(**self._take(keys[rank]))
                    del deadline[rank]
                elif self._leaving:
                    del deadline[rank]
                elif time.monotonic() > deadline[rank]:
                    life = self._life_of(rank)
                    if life == seen[rank] or not life.startswith(f"{self._call} "):
                        del deadline[rank]
                    else:
                        seen[rank], deadline[rank] = life, time.monotonic() + self._timeout_s
            # A share of the wait so far: what is over soon is seen soon, and a long wait costs no CPU.
            time.sleep(min(max(0.001, (time.monotonic() - start) / 100), 0.05))
        return found

    def _post(self, key: str, value: Mapping[str, Any]) -> None:
        data = zlib.compress(json.dumps(value).encode(), 1)
        parts = [data[at : at + _PART_BYTES] for at in range(0, len(data), _PART_BYTES)]
        for index, part in enumerate(parts):
            self._store("set", f"{key}.{index}", part)
            self.alive()
        self._store("set", key, str(len(parts)))

    def _take(self, key: str) -> dict[str, Any]:
        names = [f"{key}.{index}" for index in range(int(self._store("get", key)))]
        data = b"".join(self._store("get", name) for name in names)
        for name in (*names, key):
            self._store("delete_key", name)
        return json.loads(zlib.decompress(data))

    def _key(self, phase: str, kind: str, rank: int) -> str:
        # The first phase has one name in all calls: ranks that make different ones meet there, and are told.
        self._first = self._first or phase
        return f"{self._call}/{'first' if phase == self._first else phase}/{kind}/{rank}"

    def _life(self, rank: int) -> str:
        return f"alive/{rank}"

    def _life_of(self, rank: int) -> str:
        # `get` blocks on a missing key, which a rank that died while joining never sets.
        return self._store("get", self._life(rank)).decode() if self._store("check", [self._life(rank)]) else ""
