"""Fine-tune a causal language model in uniform chunks, with exact gradients.

    torchrun --standalone --nproc-per-node 2 -m launch.finetune --config recipes/quickstart.yaml
    torchrun ... -m launch.finetune --config recipes/quickstart.yaml --optimizer.lr 1e-3 --run.folder runs/slower
    python -m launch.finetune --help            every setting; or --print_config, as a recipe

The same command again resumes from the last checkpoint in run.folder; --fresh true moves that folder aside and starts
over. SIGTERM, Ctrl-C and a terminal that is closed save and end after the step. Exit codes: 0 well, 1 training went
wrong, 2 bad input, 130 a second Ctrl-C.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from rich.console import Console

from checkpointing import Checkpointer, CheckpointError, KeepLast
from launch.claim import STARTED_OVER, claimed
from launch.config import FinetuneConfig
from launch.console import Recorder, describe_job, make_console
from launch.env import World, end_with_launcher, joined, read_processes
from launch.errors import EXIT_INTERRUPTED, EXIT_WELL, KNOWN_ERRORS, ResumeError, report_error, told_at_once
from launch.facts import job_facts
from launch.files import RunFolder, write_json
from launch.job import ALONE_TIMEOUT_S, Job, prepare
from launch.metrics import StepMetrics, read_metrics
from launch.recipe import agreed_config, changed_settings, record_config
from launch.saving import Saver, check_mirror
from launch.stale_steps import steps_together, train_together
from launch.stop import StopSignals
from launch.summary import print_summary, summarize, summed_up


def main(argv: Sequence[str] | None = None) -> int:
    """Run this rank of a job; return its exit code."""
    rank = 0
    try:
        processes = read_processes()
        rank = processes.rank
        end_with_launcher(processes)
        with StopSignals() as stop, joined(processes) as world:
            run(argv, world, stop, restarts=processes.restarts)
    except KNOWN_ERRORS as error:
        return report_error(rank, error)
    except KeyboardInterrupt:  # the second Ctrl-C, or one while a job begins
        print(f"rank {rank}: interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_WELL


def run(argv: Sequence[str] | None, world: World, stop: StopSignals, *, restarts: int = 0) -> None:
    """Run a command line in a world that exists. Every rank calls, and every rank gets the same error."""
    config = agreed_config(argv, world.board, prog="python -m launch.finetune", description=__doc__ or "")
    # torchrun's restarts are resumes, but for those before which the earlier run was not yet out of the way.
    started_over = world.board.noted(STARTED_OVER)
    resumes = restarts > 0 if started_over is None else started_over
    finetune(config, world, stop, fresh=config.fresh and not resumes)
    # Rank 0 may copy a checkpoint to the mirror still; nobody else would find that it stopped.
    world.board.leave(timeout_s=config.patience_s + config.checkpoint.timeout_s)


def finetune(config: FinetuneConfig, world: World, stop: StopSignals, *, fresh: bool) -> None:
    """Train a job from its last checkpoint, or its beginning, to its end or until it is asked to stop."""
    console, folder = make_console(world.rank), RunFolder.of(config.run.folder)
    world.board.together("mirror", lambda: check_mirror(config.checkpoint.mirror, fresh=fresh and world.rank == 0))
    job = prepare(config, world)
    describe_job(job, console)
    settings, timeout_s = config.checkpoint, config.checkpoint.timeout_s
    with (
        claimed(folder, world, fresh=fresh) as aside,
        Checkpointer(
            folder.checkpoints, keep=KeepLast(settings.keep), timeout_s=timeout_s, mirror=settings.mirror,
            incremental=settings.incremental,
        ) as checkpoints,
        told_at_once(world.board),
    ):  # fmt: skip
        if aside is not None:
            console.print(f"Starting over: the run that was in {folder.path} is now {aside}")
        saver = Saver(checkpoints, job.state, timeout_s=timeout_s)
        job.times.fence = checkpoints.fence
        if world.rank == 0:
            saver.requested()  # from here on `checkpoint request` finds the folder, and its end takes requests back
        resumed_from = resume(saver, console, changed_settings(folder.config, config))
        if resumed_from is not None and resumed_from >= job.total_steps and summed_up(folder.summary, resumed_from):
            console.print(
                f"This run is finished: see {folder.summary}. To start over: FRESH=1 make finetune, or --fresh true"
            )
            return
        if world.rank == 0:
            write_json(folder.facts, job_facts(job))
            for change in record_config(folder.config, config):
                console.print(f"Changed since this run last started: {change}")
        with Recorder(
            console, folder, job.total_steps, after_step=resumed_from, log_every=config.run.log_every
        ) as report:
            stopped = train(job, report, saver, stop, folder.trace_of(world.rank))
        if stopped:
            console.print(
                f"Asked to stop: saved after step {job.state.step} as {saver.path}. The same command resumes."
            )
            return
        finish(job, folder, saver, console, resumed_from=resumed_from)


def resume(saver: Saver, console: Console, changed: Sequence[str]) -> int | None:
    """Restore the last checkpoint that is whole, and say so; return its step, None when there is none.

    `changed` are the settings that are not what they were; an error about the state names them.
    """
    try:
        info = saver.restore()
    except CheckpointError as error:
        if not isinstance(error.__cause__, ResumeError):
            raise
        of_the_state = [change for change in changed if not change.startswith(("run.", "schedule.", "checkpoint."))]
        raise ResumeError("; ".join([*of_the_state, str(error)])) from error
    if info is None:
        return None
    for path, reason in info.skipped:
        console.print(f"Skipped {path}: {reason}")
    console.print(f"Resuming after step {info.step}, from {info.path}")
    for note in saver.state.notes:
        console.print(note)
    return info.step


def train(job: Job, report: Recorder, saver: Saver, stop: StopSignals, trace: Path) -> bool:
    """Train the steps that are left and save the last state; return whether it was asked to stop before the end."""
    run, stopped = job.config.run, False
    if job.state.step == 0:
        report.write(StepMetrics(step=0, eval_loss=job.evaluate()))
    with job.loader:
        steps, begun = iter(job.loader), time.perf_counter()
        while job.state.step < job.total_steps and not stopped:
            together = steps_together(job.config, job.state.step, job.total_steps)
            with job.times.part("data"):
                batches = list(islice(steps, together))
            beside_save = saver.under_way
            stale = job.config.pipeline.staleness > 0
            found = train_together(job, batches) if stale else [job.train_step(batches[0])]
            seconds = (time.perf_counter() - begun) / together
            last = job.state.step == job.total_steps
            if last or job.state.step % run.eval_every == 0:
                job.times.write(trace, pair_cost=job.config.chunks.pair_cost)
                found[-1] = replace(found[-1], eval_loss=job.evaluate())
            for metrics in found:
                report.write(replace(metrics, seconds=seconds, beside_save=beside_save))
            asked = job.world.rank == 0 and saver.requested()
            what = f"rank {job.world.rank}, step {job.state.step}, agreeing to go on"
            stopped, save = stop.agreed(job.world.device, save=asked, timeout_s=job.patience_s, what=what)
            stopped = stopped and not last
            if last or stopped or save or job.state.step % job.config.checkpoint.every == 0:
                report.sync()
                with job.times.part("checkpoint"):
                    saver.save()
                if save:
                    report.note(f"Saving step {job.state.step}, as `checkpoint request` asked")
            begun = time.perf_counter()
    saver.wait()
    return stopped


def finish(job: Job, folder: RunFolder, saver: Saver, console: Console, *, resumed_from: int | None) -> None:
    """Export the model and sum the run up. Every rank calls."""
    board = job.world.board
    told = board.gather("peak memory", job.memory.resident_bytes(), timeout_s=job.patience_s)
    wrote = job.write_model(folder.model)

    def tell() -> None:
        if wrote:
            sum_up(job, folder, saver, console, resumed_from=resumed_from, peak_memory_bytes=max(told))

    board.together("summing up", tell, timeout_s=ALONE_TIMEOUT_S)


def sum_up(
    job: Job, folder: RunFolder, saver: Saver, console: Console, *, resumed_from: int | None, peak_memory_bytes: int
) -> None:
    """Write and print what the run amounts to. Rank 0 calls."""
    from launch.report import write_report  # draws; nearly a second to import, and no start waits for it

    summary = summarize(
        read_metrics(folder.metrics),
        steps=job.state.step,
        resumed_from=resumed_from,
        peak_memory_bytes=peak_memory_bytes,
        checkpoint=saver.path,
        model=folder.model.absolute(),
    )
    report = write_report(folder, summary=summary)
    write_json(folder.summary, summary)  # last: with it the run is finished, and a resume adds nothing
    print_summary(console, summary)
    console.print(f"Report: {report}")


if __name__ == "__main__":
    sys.exit(main())
