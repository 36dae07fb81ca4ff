"""A real Slurm of two nodes on one machine: munged, slurmctld and two slurmd of our own, in a folder of their own."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
NODES = ("n1", "n2")
UP_S = 60
KILL_WAIT_S = 40
CREDENTIALS_S = 5
"""A job that was requeued waits until its old credentials have expired."""


def why_not() -> str | None:
    """Why there can be no cluster here, or None."""
    if os.geteuid() != 0:
        return "slurmctld and slurmd of one's own need root"
    missing = [name for name in NEEDED if _found(name) is None]
    return f"{', '.join(missing)} not found (apt-get install slurm-wlm munge)" if missing else None


def _found(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


@dataclass(frozen=True)
class Cluster:
    """A cluster that is up."""

    folder: Path
    daemons: dict[str, subprocess.Popen]
    """By name; a node's slurmd is there under the node's."""

    def start(self, name: str, program: str, *arguments: str) -> None:
        with (self.folder / f"{name}.out.log").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                [str(_found(program)), *arguments], stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip

    def start_node(self, node: str) -> None:
        self.start(node, "slurmd", "-D", "-N", node, "-f", f"{self.folder}/slurm.conf")

    def lose(self, node: str) -> None:
        """End everything that runs on a node at once, as without power, and tell Slurm, which would take minutes."""
        self.daemons[node].kill()
        self.daemons[node].wait()
        running = _processes({"SLURMD_NODENAME": node, "SLURM_CONF": str(self.folder / "slurm.conf")})
        assert running, f"nothing runs on {node}"
        for pid in running:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")

    @property
    def env(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.env, cwd=self.folder, capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr or done.stdout}"
        return done.stdout.strip()

    def logs(self) -> str:
        return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')[-2500:]}" for p in self.folder.glob("*.log"))


def _processes(variables: dict[str, str]) -> set[int]:
    """Those that have these environment variables, and the slurmstepd that started them."""
    wanted = {f"{name}={value}".encode() for name, value in variables.items()}
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            if wanted <= set((path / "environ").read_bytes().split(b"\0")):
                parent = (path / "stat").read_text().rpartition(")")[2].split()[1]
                found.add(int(path.name))
                if (path.parent / parent / "comm").read_text() == "slurmstepd\n":
                    found.add(int(parent))
    return found


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Have two nodes, and partitions `low` and `high`, of which the latter preempts the former by requeueing."""
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    _configure(folder)
    found = Cluster(folder, {})
    try:
        found.start("munged", "munged", "-F", "--force", *(f"--{what}={folder}/{name}" for what, name in (
            ("key-file", "munge.key"), ("socket", "munge.sock"), ("pid-file", "munge.pid"), ("seed-file", "munge.seed"),
            ("log-file", "munge.log"),
        )))  # fmt: skip
        _until(lambda: (folder / "munge.sock").exists(), found)
        found.start("slurmctld", "slurmctld", "-D", "-f", f"{folder}/slurm.conf")
        for node in NODES:
            found.start_node(node)
        _until(lambda: found.run("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D") == str(len(NODES)), found)
        yield found
    finally:
        with suppress(AssertionError, subprocess.TimeoutExpired, FileNotFoundError):
            found.run("scancel", "--full", "--signal=KILL", "--user=root")
        for daemon in reversed(found.daemons.values()):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _until(ready, found: Cluster) -> None:
    deadline = time.monotonic() + UP_S
    while time.monotonic() < deadline:
        with suppress(AssertionError):
            if ready():
                return
        time.sleep(0.2)
    raise AssertionError(f"the cluster did not come up in {UP_S} s:\n{found.logs()}")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _configure(folder: Path) -> None:
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    for name in ("state", *NODES):
        (folder / name).mkdir()
    control, *ports = _free_ports(1 + len(NODES))
    host = socket.gethostname().partition(".")[0]
    nodes = "".join(
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory=2000 State=UNKNOWN\n"
        for node, port in zip(NODES, ports, strict=True)
    )
    (folder / "slurm.conf").write_text(f"""\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire={CREDENTIALS_S}
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/controller.log
SlurmdLogFile={folder}/node-%n.log
SlurmctldParameters=enable_configless
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait={KILL_WAIT_S}
ReturnToService=2
MpiDefault=none
{nodes}PartitionName=low Nodes=ALL Default=YES PriorityTier=1 MaxTime=INFINITE State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
""")
