"""Two hosts with a slow link between them, on one machine: for tests and benchmarks of what links of two speeds do.

Two network namespaces and a veth pair shaped by `tc tbf` (the inter-node link); `lo` of each namespace is shaped too
(the intra-node link: peers of a host use the veth address, which the kernel routes through lo). Linux, as root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf

from moe.errors import MoeConfigError, MoeError

LO_BURST_BYTES = 96_000
VETH_BURST_BYTES = 24_000
"""Larger bursts put a kink into t(n) = alpha + n * beta: the first bytes pass unshaped."""
LIMIT_BYTES = 16_000_000
"""Queue in front of a shaped link: larger than any window in flight, so that nothing is dropped and sent again."""
COMMAND_TIMEOUT_S = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoHosts:
    """Two emulated hosts; `name` keeps several pairs apart (at most 8 letters and digits)."""

    name: str = "moe"
    inter_mbit: float = 400.0
    intra_mbit: float = 2000.0

    def __post_init__(self) -> None:
        if not (self.name.isalnum() and len(self.name) <= 8):
            raise MoeConfigError(f"name is {self.name!r}; use at most 8 letters and digits (interface names are short)")
        for speed in ("inter_mbit", "intra_mbit"):
            if not 1 <= getattr(self, speed) < inf:
                raise MoeConfigError(f"{speed} is {getattr(self, speed)!r}; give at least 1 Mbit/s")

    @property
    def hosts(self) -> tuple[str, str]:
        """The names of the two namespaces."""
        return f"{self.name}-a", f"{self.name}-b"

    @property
    def addresses(self) -> tuple[str, str]:
        """The address of each host."""
        return "10.77.0.1", "10.77.0.2"

    @property
    def interface(self) -> str:
        """The inter-node interface, of this name on both hosts: what `GLOO_SOCKET_IFNAME` must say."""
        return f"{self.name}0"

    def command(self, host: int, command: Sequence[str]) -> list[str]:
        """Return `command` as it runs on host 0 or 1."""
        return ["ip", "netns", "exec", self.hosts[host], *command]


def why_not() -> str | None:
    """Return why two hosts cannot be made here, or None."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"{' and '.join(missing)} not found; install iproute2" if missing else None


def up(net: TwoHosts) -> None:
    """Make the two hosts. Raises MoeConfigError where that cannot be; after any failure nothing is left behind."""
    if (reason := why_not()) is not None:
        raise MoeConfigError(f"cannot emulate two hosts: {reason}")
    there = [host for host in net.hosts if host in namespaces()]
    if there:
        raise MoeConfigError(f"{' and '.join(there)} exist already; `python -m moe netns down --name {net.name}` first")
    try:
        for host in net.hosts:
            _run(["ip", "netns", "add", host])
        a, b = net.hosts
        _run(["ip", "link", "add", net.interface, "netns", a, "type", "veth", "peer", net.interface, "netns", b])
        for host, address in zip(net.hosts, net.addresses, strict=True):
            _run(["ip", "-n", host, "address", "add", f"{address}/24", "dev", net.interface])
            for device in ("lo", net.interface):
                _run(["ip", "-n", host, "link", "set", device, "up"])
        _shape(net, "add")
    except BaseException:
        down(net)
        raise


def reshape(net: TwoHosts, *, inter_mbit: float, intra_mbit: float) -> TwoHosts:
    """Change the speeds of hosts that are up; returns what they are now."""
    changed = replace(net, inter_mbit=inter_mbit, intra_mbit=intra_mbit)
    _shape(changed, "change")
    return changed


def down(net: TwoHosts) -> bool:
    """Remove the two hosts, whatever of them is there; returns whether anything was."""
    there = [host for host in net.hosts if host in namespaces()]
    for host in there:
        _run(["ip", "netns", "delete", host])
    return bool(there)


@contextmanager
def two_hosts(net: TwoHosts) -> Iterator[TwoHosts]:
    """Have the two hosts for as long as the block runs."""
    up(net)
    try:
        yield net
    finally:
        down(net)


def namespaces() -> list[str]:
    """Return the network namespaces that have a name."""
    return [line.split()[0] for line in _run(["ip", "netns", "list"]).splitlines() if line.strip()]


def _shape(net: TwoHosts, verb: str) -> None:
    for host in net.hosts:
        for device, mbit, burst in (
            (net.interface, net.inter_mbit, VETH_BURST_BYTES),
            ("lo", net.intra_mbit, LO_BURST_BYTES),
        ):
            shape = ["tbf", "rate", f"{mbit * 1000:.0f}kbit", "burst", f"{burst}", "limit", f"{LIMIT_BYTES}"]
            _run(["tc", "-n", host, "qdisc", verb, "dev", device, "root", *shape])


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise MoeError(f"`{' '.join(command)}` did not end within {COMMAND_TIMEOUT_S} s") from None
    if done.returncode != 0:
        raise MoeError(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
