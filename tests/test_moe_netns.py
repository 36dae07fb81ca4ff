"""Two emulated hosts: they are apart, shaped, reshaped, and gone afterwards, also after a failure."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from moe import cli, netns
from moe.errors import MoeConfigError, MoeError
from moe.netns import TwoHosts, two_hosts

needs_root = pytest.mark.skipif(netns.why_not() is not None, reason=f"{netns.why_not()}")


@pytest.fixture
def net():
    hosts = TwoHosts(name=f"t{os.getpid() % 10**6}", inter_mbit=80, intra_mbit=400)
    yield hosts
    if netns.why_not() is None:
        netns.down(hosts)


def qdiscs(net, host):
    return subprocess.run(["tc", "-n", net.hosts[host], "qdisc"], capture_output=True, text=True, check=True).stdout


@needs_root
def test_two_hosts_reach_each_other_over_shaped_links(net):
    with two_hosts(net):
        serve = (
            "import socket; s = socket.create_server(('10.77.0.1', 7000)); print('up', flush=True); "
            "c, _ = s.accept(); print(c.getpeername()[0])"
        )
        server = subprocess.Popen(net.command(0, [sys.executable, "-c", serve]), stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "up\n"
            call = "import socket; socket.create_connection(('10.77.0.1', 7000), 10)"
            subprocess.run(net.command(1, [sys.executable, "-c", call]), check=True, timeout=20)
            assert server.communicate(timeout=20)[0] == "10.77.0.2\n"
        finally:
            server.kill()
            server.wait()
        for host in (0, 1):
            assert f"dev {net.interface} root" in qdiscs(net, host)
            assert "rate 80Mbit" in qdiscs(net, host)
            assert "rate 400Mbit" in qdiscs(net, host)
        changed = netns.reshape(net, inter_mbit=160, intra_mbit=400)
        assert changed.inter_mbit == 160
        assert "rate 160Mbit" in qdiscs(net, 1)
        with pytest.raises(MoeConfigError, match=r"exist already; `python -m moe netns down --name"):
            netns.up(net)
    assert not set(net.hosts) & set(netns.namespaces())
    assert not netns.down(net)


@needs_root
def test_a_failure_half_way_leaves_nothing(net, monkeypatch):
    real = netns._run

    def failing(command):
        if command[0] == "tc":
            raise MoeError("no tbf in this kernel")
        return real(command)

    monkeypatch.setattr(netns, "_run", failing)
    with pytest.raises(MoeError, match="no tbf"):
        netns.up(net)
    assert not set(net.hosts) & set(netns.namespaces())


def test_without_root_it_says_so(net, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(MoeConfigError, match="cannot emulate two hosts: network namespaces need root"):
        netns.up(net)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "a b"}, "name is 'a b'"),
        ({"name": "muchtoolong"}, "at most 8"),
        ({"inter_mbit": 0}, "inter_mbit is 0"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(MoeConfigError, match=message):
        TwoHosts(**arguments)


@needs_root
def test_the_commands_bring_two_hosts_up_and_down(net):
    name = ["--name", net.name]
    made = CliRunner().invoke(cli.app, ["netns", "up", *name, "--inter-mbit", "80", "--intra-mbit", "400", "--json"])
    assert json.loads(made.stdout) == {
        "hosts": list(net.hosts), "addresses": ["10.77.0.1", "10.77.0.2"], "interface": net.interface,
    }  # fmt: skip
    assert set(net.hosts) <= set(netns.namespaces())
    assert "rate 80Mbit" in qdiscs(net, 0)
    for removed in (True, False):
        assert json.loads(CliRunner().invoke(cli.app, ["netns", "down", *name, "--json"]).stdout) == {
            "removed": removed
        }
    assert not set(net.hosts) & set(netns.namespaces())
