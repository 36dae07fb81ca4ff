"""Deadlines of collectives. A group is of no use after one that timed out: the job has to end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from launch.errors import KNOWN_ERRORS
from moe.errors import ExchangeError
from pipeline.errors import WatchdogError
from pipeline.transport.base import reason_of


def all_reduce(
    tensor: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    timeout_s: float,
    what: str,
) -> None:
    """Reduce a tensor in place over a group, or over all ranks. Every rank of it calls.

    Raises WatchdogError, which begins with `what`, when a rank is gone or does not come within `timeout_s`.
    """
    work = dist.all_reduce(tensor, op=op, group=group, async_op=True)
    try:
        assert work is not None
        work.wait(timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise _lost(what, timeout_s, error, group) from error


@contextmanager
def lost_rank_told(what: str, timeout_s: float) -> Iterator[None]:
    """Raise WatchdogError, which begins with `what`, where a collective inside fails, of no matter which group.

    `timeout_s` is how long they wait, to be told. An error by which a package tells of a rank has `what` before it.
    """
    try:
        yield
    except (WatchdogError, ExchangeError) as error:
        if str(error).startswith(what):
            raise
        raise type(error)(f"{what}: {error}") from error
    except RuntimeError as error:
        of_ranks = isinstance(error, dist.DistError) or any(name in str(error) for name in _TRANSPORTS)
        if isinstance(error, KNOWN_ERRORS) or not of_ranks:
            raise
        raise _lost(what, timeout_s, error, None) from error


_TRANSPORTS = ("gloo", "NCCL", "Timed out waiting")
"""What the text of an error of a collective has, where its class does not tell."""


def _lost(what: str, timeout_s: float, error: RuntimeError, group: dist.ProcessGroup | None) -> WatchdogError:
    others = [rank for rank in dist.get_process_group_ranks(group) if rank != dist.get_rank()]
    who = f"rank {others[0]}" if len(others) == 1 else f"one of the ranks {others}"
    return WatchdogError(
        f"{what}: {who} is gone, stopped, hangs, or is later than {timeout_s:g} s: see its output ({reason_of(error)})"
    )
