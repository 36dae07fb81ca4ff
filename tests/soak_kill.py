"""kill -9 at random times, of random ranks, under torchrun's agent; what resumes is compared with an undisturbed run.

    python -m tests.soak_kill --rounds 200                 a small torch-only job, saving after every step
    python -m tests.soak_kill --rounds 5 --recipe          launch.finetune, scaled down

The agent is torchrun's own, restarts and all (`torchrun_agent`). Prints one line of JSON with the counts; exits 1 at
the first difference, and when a round takes longer than its deadline.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from launch.chaos_compare import curve
from launch.files import RunFolder
from tests import kill_job
from tests.launch_jobs import settings as finetune_flags
from tests.launch_jobs import snapshot, write_corpus
from tests.torchrun_agent import RANKS, Agent, alive, strike

ROUND_S = 180.0
"""The longest that one round may take, on a machine that has much else to do: restart, training, kill."""
SURVIVORS_S = 4.0
READY_S = 10.0
"""How long a round waits for its ranks to train."""
STEPS = 40
VARIANTS: tuple[dict[str, Any], ...] = ({}, {"incremental": True}, {"mirror": True}, {"busy": "skip"})


def disturb(
    agent: Agent, chance: random.Random, rounds: int, within_s: float, trains: Callable[[set[int]], bool]
) -> dict[str, int]:
    """Kill ranks up to `rounds` times, each time new ones; then wait for the end.

    One time in four at any moment of their start, else up to `within_s` after they `trains`.
    """
    counts = {"rounds": 0, "ranks_killed": 0, "both_ranks": 0}
    last: set[int] = set()
    deadline = time.monotonic() + ROUND_S
    while agent.ended() is None:
        if time.monotonic() > deadline:
            raise AssertionError(hang(agent, counts["rounds"], rounds))
        found = set(agent.ranks())
        if len(found) < RANKS or found & last or counts["rounds"] >= rounds:
            time.sleep(0.01)
            continue
        last = found
        if chance.random() < 0.75:
            give_up = time.monotonic() + READY_S
            while not trains(found) and time.monotonic() < give_up and any(map(alive, found)):
                time.sleep(0.005)
        time.sleep(chance.uniform(0, within_s))
        victims = chance.choice([sorted(found)[:1], sorted(found)[1:], sorted(found)])
        killed = sum([strike(pid) for pid in victims])
        if killed:  # a rank may have ended well before, and the job with it
            end_survivors(found)
            counts["rounds"] += 1
            counts["ranks_killed"] += killed
            counts["both_ranks"] += killed == RANKS
        deadline = time.monotonic() + ROUND_S
    assert "IntegrityError" not in agent.log.read_text(), agent.log.read_text()[-4000:]
    if agent.ended() != 0:
        raise AssertionError(f"after {counts['rounds']} rounds the job failed:\n{agent.log.read_text()[-3000:]}")
    return counts


def hang(agent: Agent, done: int, rounds: int) -> str:
    """Say what hangs, with the stacks of the ranks there are."""
    ranks = agent.ranks()
    for pid in ranks:
        os.kill(pid, signal.SIGUSR1)  # their stacks, into the log
    time.sleep(1)
    where = f"round {done + 1} of {rounds}" if done < rounds else f"the end of the job behind {rounds} rounds"
    state = f"{len(ranks)} of {RANKS} ranks are alive" if ranks else "no rank is alive, and the agent does not end"
    return f"{where} is not over after {ROUND_S:g} s: {state}; the end of the log:\n{agent.log.read_text()[-4000:]}"


def end_survivors(pids: set[int]) -> None:
    """Kill who is left of a round after a while, as whoever waits for a free machine does."""
    give_up = time.monotonic() + SURVIVORS_S
    while time.monotonic() < give_up and any(map(alive, pids)):
        time.sleep(0.01)
    for pid in pids:
        strike(pid)


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
    """Kill `launch.finetune` until there were enough rounds.

    The metrics and the model of every job must be those of an undisturbed one, byte for byte.
    """
    corpus = write_corpus(folder / "corpus")
    whole = folder / "whole"
    finetune(corpus, whole, chance, 0)
    total = {"rounds": 0, "ranks_killed": 0, "both_ranks": 0, "runs": 0, "resumes": 0}
    while total["rounds"] < rounds:
        run = folder / f"run-{total['runs']}"
        found = finetune(corpus, run, chance, rounds - total["rounds"])
        assert curve(RunFolder(run)) == curve(RunFolder(whole))
        assert snapshot(run / "model") == snapshot(whole / "model")
        for name, number in found.items():
            total[name] += number
        total["runs"] += 1
        print(json.dumps(total), file=sys.stderr, flush=True)
    return total


def finetune(corpus: Path, run: Path, chance: random.Random, rounds: int) -> dict[str, int]:
    """Run one job to its end, killed up to `rounds` times."""
    from launch.finetune import main

    log, seen = run.with_name(f"{run.name}.log"), [0]

    def begun(_: set[int]) -> bool:
        starts = log.read_text().count("chunks of 64 tokens")  # the description of the job
        seen[0], more = max(seen[0], starts), starts > seen[0]
        return more

    agent = Agent(log, rounds, finetune_rank, main, finetune_flags(corpus, run, checkpoint__every=1))
    try:
        found = disturb(agent, chance, rounds, 1.5, begun)
    finally:
        agent.end()
    return found | {"resumes": log.read_text().count("Resuming after step")}


def finetune_rank(main: Callable[[list[str]], int], flags: list[str]) -> None:
    if code := main(flags):
        sys.exit(code)


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
