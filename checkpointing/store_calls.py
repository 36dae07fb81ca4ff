"""A TCPStore that is hosted by rank 0, and calls to it that cannot hang."""

from __future__ import annotations

import fcntl
import queue
import socket
import struct
import threading
import time
import uuid
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore  # torch.distributed has them, untyped

from checkpointing.errors import RankError

_CONNECT_S = 30.0
_REACH_S = 5.0
_SIOCGIFADDR = 0x8915
"""From linux/sockios.h: the address of an interface."""
_LOOK_S = 0.25


class StoreCalls:
    """Store calls with a deadline. A store whose host has stopped hangs in any of them, whatever its own timeout."""

    def __init__(self, store: Store, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._jobs: queue.SimpleQueue[tuple[str, tuple[Any, ...], queue.SimpleQueue[Any]] | None] = queue.SimpleQueue()
        self._lost: str | None = None
        # A daemon: should it hang, it must not keep the process from ending.
        threading.Thread(target=_serve, args=(store, self._jobs), name="checkpoint-control", daemon=True).start()

    def __call__(self, method: str, *args: Any) -> Any:
        """Call a method of the store. Raises RankError when it fails or gives no answer, and from then on."""
        if self._lost:
            raise RankError(self._lost)
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._jobs.put((method, args, done))
        ok, value = self._answer(done)
        if not ok:
            self._lost = f"rank 0, which hosts the control store, is gone or stopped: {value}"
            raise RankError(self._lost)
        return value

    def _answer(self, done: queue.SimpleQueue[Any]) -> tuple[bool, Any]:
        begun = time.monotonic()
        while True:
            limit = self._timeout_s  # which may become less while we wait
            try:
                return done.get(timeout=max(0.0, min(_LOOK_S, begun + limit - time.monotonic())))
            except queue.Empty:
                if time.monotonic() - begun >= limit:
                    return False, f"no answer for {limit:g} s"

    def hurry(self, timeout_s: float) -> None:
        """Wait no longer than this from now on, in calls under way too."""
        self._timeout_s = min(self._timeout_s, timeout_s)

    def stop(self) -> None:
        """End the thread; calls after this one fail."""
        self._lost = self._lost or "the checkpointer is closed"
        self._jobs.put(None)


def _serve(store: Store, jobs: queue.SimpleQueue[Any]) -> None:
    while (job := jobs.get()) is not None:
        method, args, done = job
        try:
            done.put((True, getattr(store, method)(*args)))
        except RuntimeError as error:  # torch's DistError and its children
            done.put((False, str(error).splitlines()[0]))


def open_store(group: dist.ProcessGroup, rank: int) -> Store:
    """Host a store on rank 0 and connect the others to it; a collective of the group. Raises RankError."""
    offer: list[Any] = [None]
    store = None
    if rank == 0:
        try:
            store, token = _host(), uuid.uuid4().hex
            store.set("token", token)
            offer = [{"hosts": _own_names(), "port": store.port, "token": token}]
        except RuntimeError as error:
            offer = [str(error).splitlines()[0]]
    dist.broadcast_object_list(offer, group=group, group_src=0)
    if isinstance(offer[0], str):
        raise RankError(f"rank 0 cannot host the control store: {offer[0]}")
    return store if store is not None else _connect(**offer[0])


def _host() -> TCPStore:
    return TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=_CONNECT_S), wait_for_workers=False)


def _own_names() -> list[str]:
    """Return the names and addresses others may reach this host by, its plain name first."""
    name = socket.gethostname()
    names = [name, socket.getfqdn()]
    with suppress(OSError):  # a name that does not resolve here may still do so on the other hosts
        names += [str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    return list(dict.fromkeys([*names, *_own_addresses()]))


def _own_addresses() -> list[str]:
    """Return the IPv4 addresses of this host's interfaces but loopback, which is all that its own name may give."""
    found: list[str] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has none
                answer = fcntl.ioctl(asked, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                found.append(socket.inet_ntoa(answer[20:24]))
    return [address for address in found if not address.startswith("127.")]


def _connect(hosts: list[str], port: int, token: str) -> Store:
    tried = ["127.0.0.1", *hosts] if hosts[0] == socket.gethostname() else hosts
    for host in tried:
        try:
            # It listens already: what refuses now is another host, which TCPStore would go on asking.
            socket.create_connection((host, port), _REACH_S).close()
            store = TCPStore(host, port, None, False, timedelta(seconds=_CONNECT_S), wait_for_workers=False)
            # Two hosts of one name: the port may belong to another job's store.
            if store.check(["token"]) and store.get("token").decode() == token:
                return store
        except (OSError, RuntimeError):
            continue
    raise RankError(
        f"cannot reach the control store of rank 0 at port {port} of any of {', '.join(tried)}; the ranks' hosts must "
        "resolve each other's names and allow connections between them"
    )
