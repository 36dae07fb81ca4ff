"""Weights of a visit to the device, its gradients to the host: the jobs of a rank's lane."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from pipeline.errors import WatchdogError
from pipeline.roundpipe.arena import Arena
from pipeline.roundpipe.host_plan import HostParameter
from pipeline.roundpipe.host_store import HostStore
from pipeline.roundpipe.layers import SlotLayer
from pipeline.roundpipe.peers import Peers
from pipeline.roundpipe.transfers import Job, Lane, pieces
from pipeline.roundpipe.versions import Versions
from pipeline.roundpipe.visit import Key, Visit


class Streams:
    """Brings weights and takes gradients of one run's visits. One object a rank and run."""

    def __init__(
        self,
        layers: Sequence[SlotLayer],
        store: HostStore,
        arena: Arena,
        lane: Lane,
        peers: Peers,
        versions: Versions,
        *,
        stepped: bool,
        device: torch.device,
    ) -> None:
        self._layers, self._store, self._arena, self._lane, self._peers = layers, store, arena, lane, peers
        self._versions, self._stepped, self._device = versions, stepped, device
        self._ahead: list[Visit] = []
        """Visits whose weights are queued or here, and which have not begun."""
        self._paused = False
        """Weights that nobody waits for stay away, since the slot at work needs the room."""
        self._pausing = threading.Lock()
        """Held while that changes, and from a look at it until the room is taken."""
        arena.make_room = self._make_room

    def upload(self, visit: Visit) -> None:
        """Queue the weights of a visit. They come when their version is made, and when there is room for them."""
        self._ahead.append(visit)
        self._queue_upload(visit)

    def uploaded(self, visit: Visit, what: Callable[[], str]) -> None:
        """Wait for the weights of a visit, which begins now."""
        assert visit.upload is not None
        if visit in self._ahead:
            self._ahead.remove(visit)
            self._paused = False
        if not visit.upload.done.is_set():
            self._wait(visit.upload, lambda: f"{what()}: waiting for {self._missing(visit)}")

    def _queue_upload(self, visit: Visit) -> None:
        nbytes = self._weight_bytes(visit)

        def ready(needed: bool) -> bool:
            if self._versions.missing(visit.homes, visit.version) is not None:
                return False
            if self._take_room(visit, nbytes, needed=needed):
                return True
            # The rank waits for them: what is here now stays, but for gradients on their way and what came too early.
            if needed and not self._downloads() and not self._send_away_one():
                raise self._arena.refusal(nbytes, slot=visit.slot, what="weights")
            return False

        def work() -> Iterator[None]:
            self._versions.check(visit.homes, visit.version, slot=visit.slot, step=visit.step)
            for layer, name in self._keys(visit):
                host = self._store.weights(name, visit.version)
                visit.weights[layer, name] = torch.empty(host.shape, dtype=host.dtype, device=self._device)
                yield from pieces(host, visit.weights[layer, name], lambda into, part: into.copy_(part))
            # Once more: whoever overwrote them while they were read has said so before.
            self._versions.check(visit.homes, visit.version, slot=visit.slot, step=visit.step)

        visit.upload = self._lane.submit(Job(f"upload of {visit}", ready, work))

    def _take_room(self, visit: Visit, nbytes: int, *, needed: bool) -> bool:
        with self._pausing:
            lease = None if self._paused and not needed else self._arena.try_lease(nbytes)
            visit.weight_leases += [] if lease is None else [lease]
        return lease is not None

    def _make_room(self, nbytes: int) -> None:
        """Wait for gradients on their way down; then send away weights that came ahead of their time."""
        with self._pausing:
            self._paused = True
        for job in self._downloads():
            if not self._arena.fits(nbytes):
                self._wait(job, lambda job=job: f"rank {self._peers.rank}: waiting for the {job.what}, to have room")
        for visit in reversed(self._ahead):
            if self._arena.fits(nbytes):
                break
            assert visit.upload is not None
            if visit.weight_leases:
                self._wait(visit.upload, lambda: f"rank {self._peers.rank}: waiting for an upload, to have room")
                self._send_away(visit)

    def _send_away_one(self) -> bool:
        """Send away the weights that are needed last of those that came too early; by the lane, between two jobs."""
        visit = next((visit for visit in reversed(self._ahead) if visit.weight_leases), None)
        if visit is not None:
            self._send_away(visit)
        return visit is not None

    def _send_away(self, visit: Visit) -> None:
        visit.drop_weights()
        self._queue_upload(visit)

    def _weight_bytes(self, visit: Visit) -> int:
        return sum(self._parameter(name).nbytes for _, name in self._keys(visit))

    def want_gradients(self, visit: Visit) -> None:
        """Take memory for the gradients of a visit, zero."""
        if visit.gradients:
            return
        keys = [(layer, name) for layer, name in self._keys(visit) if self._parameter(name).trained]
        for layer, name in keys:
            host = self._store.gradient(name, layer)
            lease = self._arena.lease(host.nbytes, slot=visit.slot, what=f"the gradient of {name}")
            visit.gradient_leases.append(lease)
            visit.gradients[layer, name] = torch.zeros(host.shape, dtype=host.dtype, device=self._device)

    def download(self, visit: Visit) -> None:
        """Queue the gradients of a visit: added to those of earlier rounds, in their order."""

        def ready(needed: bool) -> bool:
            return self._missing_before(visit) is None

        def work() -> Iterator[None]:
            for (layer, name), grad in visit.gradients.items():
                host = self._store.gradient(name, layer)
                yield from pieces(grad, host, _add if visit.round > 0 else _copy)
            for layer, name in self._tables(visit):
                if visit.round == 0 and (layer, name) not in visit.tables:  # no micro-batch used it
                    self._store.gradient(name, layer).zero_()
            visit.drop_gradients()
            for layer in range(*visit.layers):
                word, value = self._versions.gradients(layer, visit.step, visit.round + 1)
                self._store.words.publish(word, value)

        visit.download = self._lane.submit(Job(f"download of {visit}", ready, work))

    def drain(self, what: Callable[[], str]) -> None:
        """Wait until nothing moves any more."""
        for job in self._lane.pending:
            self._wait(job, lambda job=job: f"{what()}: waiting for the {job.what}")

    def read(self, visit: Visit, layer: int, rows: Tensor) -> Tensor:
        """Return rows of a table. See `compute.Tables`."""
        (name,) = self._layers[layer].parameters
        home = self._parameter(name).home
        word, value = self._versions.word(home, visit.version)
        self._peers.wait(word, value, lambda: f"rank {self._peers.rank}, {visit}: waiting for {self._missing(visit)}")
        self._versions.check((home,), visit.version, slot=visit.slot, step=visit.step)
        return self._store.weights(name, visit.version)[rows.cpu()].to(self._device)

    def add(self, visit: Visit, layer: int, mb: int, rows: Tensor, grad: Tensor) -> None:
        """Add to rows of a table's gradient on the host. See `compute.Tables`."""
        (name,) = self._layers[layer].parameters
        host = self._store.gradient(name, layer)
        if (layer, name) not in visit.tables:
            visit.tables.add((layer, name))
            self._wait_before(visit)
            if visit.round == 0:
                host.zero_()
        host.index_add_(0, rows.cpu(), grad.cpu())

    def _wait_before(self, visit: Visit) -> None:
        deadline = time.monotonic() + self._peers.timeout_s
        while (missing := self._missing_before(visit)) is not None:
            text = f"rank {self._peers.rank}, {visit}: waiting for {missing}"
            self._peers.check(lambda text=text: text)
            if time.monotonic() > deadline:
                raise WatchdogError(f"{text}: nothing came within {self._peers.timeout_s:g} s")
            time.sleep(0.0005)

    def _missing_before(self, visit: Visit) -> str | None:
        """Return what has to happen before gradients of this visit may be written."""
        if visit.round > 0:
            for layer in range(*visit.layers):
                word, value = self._versions.gradients(layer, visit.step, visit.round)
                if self._store.words[word] < value:
                    return f"the gradients of layer {layer}, round {visit.round - 1}"
        elif self._stepped:  # the optimizer may still read those of the step before
            return self._versions.missing(visit.homes, visit.step)
        return None

    def _missing(self, visit: Visit) -> str:
        return self._versions.missing(visit.homes, visit.version) or f"room for the weights of slot {visit.slot}"

    def _downloads(self) -> list[Job]:
        return [job for job in self._lane.pending if job.what.startswith("download")]

    def _wait(self, job: Job, what: Callable[[], str]) -> None:
        deadline = time.monotonic() + self._peers.timeout_s

        def waited(text: Callable[[], str]) -> None:
            if time.monotonic() > deadline:
                raise WatchdogError(f"{text()}: nothing came within {self._peers.timeout_s:g} s")

        self._lane.wait(job, what, waited)

    def _keys(self, visit: Visit) -> list[Key]:
        """Return what is brought: all but tables, of which rows are read."""
        layers = range(*visit.layers)
        return [(i, name) for i in layers if self._layers[i].rows is None for name in self._layers[i].parameters]

    def _tables(self, visit: Visit) -> list[Key]:
        """Return the tables that are trained."""
        layers = [i for i in range(*visit.layers) if self._layers[i].rows is not None]
        keys = [(i, name) for i in layers for name in self._layers[i].parameters]
        return [key for key in keys if self._parameter(key[1]).trained]

    def _parameter(self, name: str) -> HostParameter:
        return self._store.plan.parameters[name]


def _copy(into: Tensor, part: Tensor) -> None:
    into.copy_(part)


def _add(into: Tensor, part: Tensor) -> None:
    into.add_(part.to(into.device))
