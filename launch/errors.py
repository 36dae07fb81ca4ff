"""What can go wrong in a job, as one tree, and how a command says so.

LaunchError
├── ConfigError      a setting is missing, unknown, impossible, or not the same on every rank
├── WorldError       the processes of the job did not find each other, or one stopped answering
├── DataError        there is nothing to train on, or the model does not know its tokens
├── ModelError       the model or its tokenizer cannot be loaded
├── FolderError      the run's folder cannot be written: no room, no rights, no folder
├── FolderInUseError another job is writing to the run's folder
├── ResumeError      a checkpoint belongs to another model, optimizer or run
└── TrainingError    training itself went wrong: the loss is no number any more
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from checkpointing.errors import CheckpointError
from chunkflow.errors import ChunkflowError
from moe.errors import ContractError, ExchangeError, MoeError
from pipeline.errors import PipelineError, WatchdogError

if TYPE_CHECKING:
    from launch.board import Board


class LaunchError(Exception):
    """Base of everything launch raises on purpose."""


class ConfigError(LaunchError):
    """A setting is missing, unknown, impossible, or not the same on every rank; the message names the key."""


class WorldError(LaunchError):
    """The processes of the job did not find each other, or one stopped answering; the message names the rank."""


class DataError(LaunchError):
    """There is nothing to train on, or the model does not know its tokens."""


class ModelError(LaunchError):
    """The model or its tokenizer cannot be loaded; the message names the path."""


class FolderError(LaunchError):
    """The run's folder cannot be written; the message names it, and says why."""


class FolderInUseError(LaunchError):
    """Another job is writing to the run's folder; the message names it."""


class ResumeError(LaunchError):
    """A checkpoint belongs to another model, optimizer or run; the message names the first differences."""


class TrainingError(LaunchError):
    """Training went wrong; the last checkpoint is intact."""


KNOWN_ERRORS = (LaunchError, ChunkflowError, CheckpointError, MoeError, PipelineError)
"""What a command prints as one line; anything else is a mistake of ours and keeps its traceback."""

_WENT_WRONG = (TrainingError, WatchdogError, ContractError, ExchangeError)
"""What happens to a job whose input was well."""

_ROLL_CALL_S = 5.0
"""How long a rank waits to see which others fail too: all that were in the same collective do, about when it does."""

_TOLD = "This error was reported when it was raised."

EXIT_WELL, EXIT_CHECK_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130


def as_program(main: Callable[[], int]) -> NoReturn:
    """Run a command that only looks and prints, and end the process by its exit code.

    It ends as other programs do, by SIGPIPE when what reads its output has ended (`| head`), and by one line and exit
    code 130 after Ctrl-C.
    """
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


@contextmanager
def told_at_once(board: Board) -> Iterator[None]:
    """Report a known error raised inside before it leaves: what is around may take a while to end without its peers.

    Where a collective lost one of several ranks, the line names those that have no error to report.
    """
    try:
        yield
    except KNOWN_ERRORS as error:
        lost = isinstance(error, (WatchdogError, ExchangeError)) and board.world_size > 2
        silent = board.failing(timeout_s=_ROLL_CALL_S if lost else None)
        report_error(board.rank, error, f" (no error so far from ranks {silent})" if silent else "")
        raise


def report_error(rank: int, error: Exception, hint: str = "") -> int:
    """Print an error as a rank's one line, once, and return the exit code that belongs to it."""
    if _TOLD not in getattr(error, "__notes__", ()):
        # One write with its newline: torchrun's ranks are unbuffered, and share a terminal.
        sys.stderr.write(f"rank {rank}: error: {error}{hint}\n")
        sys.stderr.flush()
        error.add_note(_TOLD)
    return EXIT_CHECK_FAILED if isinstance(error, _WENT_WRONG) else EXIT_BAD_INPUT
