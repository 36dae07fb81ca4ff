"""kill -9 at random times, of random ranks, under torchrun's agent; what resumes is compared with an undisturbed run.

    python -m tests.soak_kill --rounds 200                 a small torch-only job, saving after every step
    python -m tests.soak_kill --rounds 5 --recipe          launch.finetune, scaled down

The agent is torchrun's own (`elastic_launch`, restarts and all). Its ranks come from a fork server, which has imported
torch and has no threads: forked from the agent itself, one rank in some hundred hangs before its first line. Prints one
line of JSON with the counts; exits 1 at the first difference.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from launch.env import Processes, end_with_launcher
from tests import kill_job
from tests.launch_jobs import settings as finetune_flags
from tests.launch_jobs import snapshot, write_corpus

RANKS = 2
DEADLINE_S = 180.0
SURVIVORS_S = 4.0
READY_S = 10.0
"""How long a round waits for its ranks to train."""
STEPS = 40
ENDED = "ended"
"""The name of a rank's process once it has done its part."""
OF_THE_MACHINE = ("seconds", "tokens_per_s", "peak_bytes")
VARIANTS: tuple[dict[str, Any], ...] = ({}, {"incremental": True}, {"mirror": True}, {"busy": "skip"})


class Agent:
    """torchrun's agent with its ranks, in a process of its own."""

    def __init__(self, log: Path, kills: int, entry: Callable[..., Any], *args: Any) -> None:
        # More than there are kills: a rank whose peer was killed while they connected fails by itself.
        self.log, restarts = log, 2 * kills
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(_serve(log, restarts, entry, args))

    def ranks(self) -> list[int]:
        """The processes of the ranks that are running."""
        return [pid for server in _children(self.pid) for pid in _children(server) if _alive(pid)]

    def ended(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.pid:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid == 0:
                return None
            self._code, self.pid = os.waitstatus_to_exitcode(status), 0
        return self._code

    def end(self) -> None:
        """kill -9, agent and ranks."""
        if self.ended() is None:
            for pid in [*self.ranks(), self.pid]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


def _serve(log: Path, restarts: int, entry: Callable[..., Any], args: tuple[Any, ...]) -> int:
    end_with_launcher(Processes(launched=True))
    multiprocessing.set_forkserver_preload(["__main__", "launch.finetune"])
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=RANKS, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=restarts, monitor_interval=0.02, start_method="forkserver",
    )  # fmt: skip
    try:
        elastic_launch(config, _rank)(entry, *args)
    except BaseException as error:  # noqa: BLE001 - a forked process has nowhere to raise to
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def _rank(entry: Callable[..., Any], *args: Any) -> None:
    end_with_launcher(Processes(launched=True))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)  # the agent's handlers, which a process of its own would not have
    faulthandler.register(signal.SIGUSR1)
    entry(*args)
    Path("/proc/self/comm").write_text(ENDED)


def _children(pid: int) -> list[int]:
    with suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _alive(pid: int) -> bool:
    with suppress(OSError):
        return _state(pid) != "Z"
    return False


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def disturb(
    agent: Agent, chance: random.Random, rounds: int, within_s: float, trains: Callable[[set[int]], bool]
) -> dict[str, int]:
    """Kill ranks up to `rounds` times, each time new ones; then wait for the end.

    One time in four at any moment of their start, else up to `within_s` after they `trains`.
    """
    counts = {"rounds": 0, "ranks_killed": 0, "both_ranks": 0}
    last: set[int] = set()
    deadline = time.monotonic() + DEADLINE_S
    while agent.ended() is None:
        if time.monotonic() > deadline:
            for pid in agent.ranks():
                os.kill(pid, signal.SIGUSR1)  # their stacks, into the log
            time.sleep(1)
            raise AssertionError(f"the job hangs:\n{agent.log.read_text()[-3000:]}")
        found = set(agent.ranks())
        if len(found) < RANKS or found & last or counts["rounds"] >= rounds:
            time.sleep(0.01)
            continue
        last = found
        if chance.random() < 0.75:
            give_up = time.monotonic() + READY_S
            while not trains(found) and time.monotonic() < give_up and any(map(_alive, found)):
                time.sleep(0.005)
        time.sleep(chance.uniform(0, within_s))
        victims = chance.choice([sorted(found)[:1], sorted(found)[1:], sorted(found)])
        killed = 0
        for pid in victims:
            killed += strike(pid)
        if killed:  # a rank may have ended well before, and the job with it
            end_survivors(found)
            counts["rounds"] += 1
            counts["ranks_killed"] += killed
            counts["both_ranks"] += killed == RANKS
        deadline = time.monotonic() + DEADLINE_S
    assert "IntegrityError" not in agent.log.read_text(), agent.log.read_text()[-4000:]
    if agent.ended() != 0:
        raise AssertionError(f"the job failed:\n{agent.log.read_text()[-3000:]}")
    return counts


def end_survivors(pids: set[int]) -> None:
    """Kill who is left of a round after a while, as whoever waits for a free machine does."""
    give_up = time.monotonic() + SURVIVORS_S
    while time.monotonic() < give_up and any(map(_alive, pids)):
        time.sleep(0.01)
    for pid in pids:
        strike(pid)


def strike(pid: int) -> bool:
    """kill -9, unless the rank has done its part; return whether it was killed.

    What follows is the closing handshake of torchrun's agent with functions, which deadlocks when a rank dies in it (as
    its source says). With scripts there is none.
    """
    with suppress(OSError):
        os.kill(pid, signal.SIGSTOP)
        while (state := _state(pid)) not in "TZ":
            time.sleep(0.001)
        ended = Path(f"/proc/{pid}/comm").read_text().strip() == ENDED
        os.kill(pid, signal.SIGCONT if ended else signal.SIGKILL)
        return state == "T" and not ended
    return False


def small_job(folder: Path, chance: random.Random, rounds: int) -> dict[str, int]:
    """Kill the small job in all its variants until there were enough rounds."""
    wanted = reference(folder / "reference")
    total = {"rounds": 0, "ranks_killed": 0, "both_ranks": 0, "runs": 0, "resumes": 0, "steps_checked": 0}
    while total["rounds"] < rounds:
        variant = dict(VARIANTS[total["runs"] % len(VARIANTS)])
        place = folder / f"run-{total['runs']}"
        place.mkdir()
        if variant.get("mirror"):
            variant["mirror"] = str(place / "safe")
        kills = min(rounds - total["rounds"], 20)
        agent = Agent(place / "log", kills, kill_job.run, place, STEPS, variant)
        try:
            found = disturb(agent, chance, kills, 0.7, partial(resumed, place))
        finally:
            agent.end()
        try:
            found |= check_notes(place, wanted, skips="busy" in variant)
        except AssertionError as error:
            raise AssertionError(f"{variant}: {error}\n{(place / 'log').read_text()[-4000:]}") from error
        for name, number in found.items():
            total[name] += number
        total["runs"] += 1
        print(json.dumps(total), file=sys.stderr, flush=True)
    return total


def reference(place: Path) -> list[dict[int, str]]:
    """The digest of every rank's state after every step, undisturbed."""
    place.mkdir()
    agent = Agent(place / "log", 0, kill_job.run, place, STEPS, {})
    try:
        disturb(agent, random.Random(0), 0, 0.0, bool)
    finally:
        agent.end()
    found: list[dict[int, str]] = []
    for rank in range(RANKS):
        notes = read_notes(place, rank)
        found.append({step: digest for event, step, digest, _ in notes if event in ("trained", "resumed")})
        assert sorted(found[-1]) == list(range(STEPS + 1))
    return found


def resumed(place: Path, pids: set[int]) -> bool:
    """Whether one of the processes has written a note."""
    return any(pid in pids for rank in range(RANKS) for *_, pid in read_notes(place, rank))


def read_notes(place: Path, rank: int) -> list[tuple[str, int, str, int]]:
    """What a rank wrote down, line by line."""
    path = place / f"notes-{rank}.jsonl"
    if not path.exists():
        return []
    return [tuple(json.loads(line)) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def check_notes(place: Path, wanted: list[dict[int, str]], *, skips: bool) -> dict[str, int]:
    """Every state is that of the undisturbed run, and no resume is older than what any rank was told is durable."""
    counts = {"resumes": 0, "steps_checked": 0}
    notes = [read_notes(place, rank) for rank in range(RANKS)]
    for rank, own in enumerate(notes):
        durable = 0
        for event, step, digest, _ in own:
            if event == "durable":
                durable = max(durable, step)
            else:
                assert digest == wanted[rank][step], f"rank {rank} {event} step {step}: another state"
                counts["steps_checked"] += 1
            if event == "resumed":
                assert step >= durable, f"rank {rank} resumed from step {step}, and {durable} was durable"
                counts["resumes"] += 1
        # Killed behind its last save, it resumes at the end, and has nothing left to do.
        ends = (("durable", STEPS), ("resumed", STEPS))
        assert own[-1][:2] in ends or skips, f"rank {rank} ended at {own[-1]}"
        assert max(step for event, step, *_ in own if event == "trained") == STEPS
    return counts


def recipe(folder: Path, chance: random.Random, rounds: int) -> dict[str, int]:
    """Kill `launch.finetune`; its metrics and its model must be those of an undisturbed run, byte for byte."""
    from launch.finetune import main

    corpus = write_corpus(folder / "corpus")

    def ended(run: Path, rounds: int) -> dict[str, int]:
        log, seen = folder / f"{run.name}.log", [0]

        def begun(_: set[int]) -> bool:
            starts = log.read_text().count("chunks of 64 tokens")  # the description of the job
            seen[0], more = max(seen[0], starts), starts > seen[0]
            return more

        flags = finetune_flags(corpus, run, checkpoint__every=1)
        agent = Agent(log, rounds, finetune_rank, main, flags)
        try:
            return disturb(agent, chance, rounds, 1.5, begun)
        finally:
            agent.end()

    ended(folder / "whole", 0)
    counts = ended(folder / "broken", rounds)
    text = (folder / "broken.log").read_text()
    assert curve(folder / "broken") == curve(folder / "whole")
    assert snapshot(folder / "broken" / "model") == snapshot(folder / "whole" / "model")
    return counts | {"resumes": text.count("Resuming after step")}


def finetune_rank(main: Callable[[list[str]], int], flags: list[str]) -> None:
    if code := main(flags):
        sys.exit(code)


def curve(run: Path) -> list[dict[str, Any]]:
    """Everything a run measured but the time and the memory it took."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in OF_THE_MACHINE} for line in lines]


def main() -> int:
    """Run the rounds; print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--recipe", action="store_true", help="launch.finetune instead of the small job")
    parser.add_argument("--seed", type=int, default=0, help="of the times and victims")
    given = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-kill-") as folder:
        try:
            job = recipe if given.recipe else small_job
            counts = job(Path(folder), random.Random(given.seed), given.rounds)
        except AssertionError as error:
            print(error, file=sys.stderr)
            return 1
    print(json.dumps(counts | {"seconds": round(time.monotonic() - begun)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
