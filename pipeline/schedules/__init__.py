"""Generators of schedules, by name. Each gives compute actions only; `comms.with_messages` completes them."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.schedule import Schedule
from pipeline.schedules.classic import gpipe, looped_bfs, one_f_one_b
from pipeline.schedules.interleaved import interleaved
from pipeline.schedules.roundpipe import roundpipe
from pipeline.schedules.state_aware import state_aware_1f1b
from pipeline.schedules.zero_bubble import zb_h1, zbv

SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "looped_bfs": looped_bfs,
    "zb_h1": zb_h1,
    "zbv": zbv,
    "state_aware_1f1b": state_aware_1f1b,
    "roundpipe": roundpipe,
}

__all__ = ["SCHEDULES"]
