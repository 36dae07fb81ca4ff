"""torchrun on two hosts: two network namespaces of this machine, with a link between them and nothing else."""

import os
import subprocess
import sys

import pytest

from launch.chaos_compare import require_same
from launch.files import RunFolder
from moe import netns
from moe.netns import TwoHosts, two_hosts
from tests.launch_jobs import kill_job, settings
from tests.spawn import ROOT

needs_root = pytest.mark.skipif(netns.why_not() is not None, reason=f"{netns.why_not()}")


def start_host(net, number, flags, log):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--node-rank",
        str(number), "--master-addr", net.addresses[0], "--master-port", "29511", "-m", "launch.finetune", *flags,
    ]  # fmt: skip
    env = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": net.interface,
        "PYTHONUNBUFFERED": "1", "RES_OPTIONS": "timeout:1 attempts:1",  # no name server is reached from there
    }  # fmt: skip
    with log.open("w") as output:
        return subprocess.Popen(net.command(number, command), env=env, stdout=output, stderr=subprocess.STDOUT)


@needs_root
@pytest.mark.timeout(170)
def test_a_job_on_two_hosts_is_the_job_on_one(place, undisturbed):
    net = TwoHosts(name=f"l{os.getpid() % 10**6}")
    with two_hosts(net):
        logs = [place / f"host{number}.log" for number in (0, 1)]
        flags = settings(place / "corpus", place / "two-hosts", run__epochs=2)
        hosts = [start_host(net, number, flags, log) for number, log in enumerate(logs)]
        try:
            for host in hosts:
                assert host.wait(timeout=120) == 0, "\n".join(log.read_text()[-3000:] for log in logs)
        finally:
            for host in hosts:
                kill_job(host)
    assert "on 2 x cpu" in logs[0].read_text()
    require_same(RunFolder(place / "two-hosts"), RunFolder(undisturbed[0]))
