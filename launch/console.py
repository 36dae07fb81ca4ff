"""What a person sees of a run: lines and a progress bar on rank 0, metrics.jsonl and TensorBoard behind them."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import ExitStack
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from chunkflow.positions import beyond_positions
from launch.files import RunFolder
from launch.metrics import MetricsLog, StepMetrics

if TYPE_CHECKING:
    from launch.job import Job


def make_console(rank: int) -> Console:
    """Return where a rank prints: only rank 0 is heard, as long as someone is there to hear it."""
    output = cast(IO[str], Output(sys.stdout))
    return Console(file=output, quiet=rank != 0, soft_wrap=True, highlight=False, markup=False)


class Output:
    """A stream whose reader may go away, a terminal that is closed, say: what is written then is lost, and no error."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """See `IO.write`."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._silence(error)
            return len(text)

    def flush(self) -> None:
        """See `IO.flush`."""
        try:
            self._stream.flush()
        except OSError as error:
            self._silence(error)

    def _silence(self, error: OSError) -> None:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise error
        with open(os.devnull, "wb") as nothing:  # what is buffered still, and whoever else prints, ends there too
            os.dup2(nothing.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Recorder:
    """The records of a running job on rank 0; on other ranks every call does nothing."""

    def __init__(
        self, console: Console, folder: RunFolder, total_steps: int, *, after_step: int | None, log_every: int
    ) -> None:
        self._console, self._total, self._every = console, total_steps, log_every
        self._open = ExitStack()
        self._log: MetricsLog | None = None
        if not console.quiet:
            self._start(folder, after_step)

    def _start(self, folder: RunFolder, after_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # seconds to import, and one rank needs it

        self._log = self._open.enter_context(MetricsLog(folder.metrics, after_step=after_step))
        if self._log.missing > 0:
            self._console.print(f"metrics.jsonl lacks {self._log.missing} earlier steps; the summary is without them")
        purge = 0 if after_step is None else after_step + 1
        self._board = self._open.enter_context(SummaryWriter(folder.tensorboard, purge_step=purge))
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[now]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._open.enter_context(self._bar)
        self._task = self._bar.add_task("training", total=self._total, completed=after_step or 0, now="")

    def write(self, metrics: StepMetrics) -> None:
        """Record one step everywhere."""
        if self._log is None:
            return
        self._log.write(metrics)
        for name, value in metrics.values().items():
            if name != "step":
                self._board.add_scalar(name, value, metrics.step)
        self._bar.update(self._task, completed=metrics.step, now=describe_now(metrics))
        plain = not self._console.is_terminal and (metrics.step % self._every == 0 or metrics.step in (1, self._total))
        if plain or metrics.eval_loss is not None:
            self._console.print(describe(metrics, self._total))
        for note in metrics.notes:
            self._console.print(note)

    def note(self, text: str) -> None:
        """Print a line."""
        self._console.print(text)

    def sync(self) -> None:
        """Make what was recorded durable."""
        if self._log is not None:
            self._log.sync()
            self._board.flush()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)


def describe_now(metrics: StepMetrics) -> str:
    """Return the few words beside the progress bar."""
    if metrics.loss is None or metrics.tokens_per_s is None:
        return ""
    return f"loss {metrics.loss:.3f}  {metrics.tokens_per_s:,.0f} tokens/s"


def describe(metrics: StepMetrics, total_steps: int) -> str:
    """Return a step as one line for people."""
    parts = [f"step {metrics.step}/{total_steps}"]
    if metrics.loss is not None:
        parts += [f"loss {metrics.loss:.4f}", f"lr {metrics.lr:.2e}", f"gradient {metrics.grad_norm:.3f}"]
        parts += [f"{metrics.tokens} tokens", f"{metrics.tokens_per_s:,.0f} tokens/s", f"fill {metrics.fill:.0%}"]
    if metrics.eval_loss is not None:
        parts.append(f"held out {metrics.eval_loss:.4f}")
    return "  ".join(parts)


def describe_job(job: Job, console: Console) -> None:
    """Say what will be trained, and what was left out."""
    for note in job.data.notes:
        console.print(note)
    lengths, held_out = job.data.train.lengths, job.data.held_out
    console.print(
        f"{len(lengths)} samples, {lengths.sum():,} tokens, the longest {lengths.max():,}; "
        f"{0 if held_out is None else len(held_out)} more held out"
    )
    beyond = beyond_positions(job.loader.source.lengths, job.model)
    if beyond is not None:
        console.print(beyond)
    console.print(
        f"{job.whole.kind} of {job.whole.num_parameters:,} parameters on {job.world.world_size} x "
        f"{job.world.device.type}; {job.total_steps} steps, "
        f"chunks of {job.config.chunks.chunk_tokens} tokens, retain {job.config.chunks.retain}"
    )
    if job.pipeline is not None:
        console.print(job.pipeline)
