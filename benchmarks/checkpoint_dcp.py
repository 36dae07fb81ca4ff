"""torch.distributed.checkpoint, in all its forms, as ways to save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import staging
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from benchmarks.checkpoint_state import Work
from benchmarks.checkpoint_way import Blocking


class Dcp(Blocking):
    """torch.distributed.checkpoint.save with cached plans, a file a rank, two writing threads, fsync of the files."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.group: Any = dist.new_group(backend="gloo")

    def writer(self, folder: Path) -> Any:
        """Return a writer at its best settings."""
        return FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, thread_count=2)

    def planner(self) -> Any:
        """Return a planner that keeps its plan from save to save."""
        return DefaultSavePlanner(enable_plan_caching=True)

    def save(self, folder: Path, step: int) -> None:
        """Write."""
        state = self.work.state_dict()
        dcp_save(state, storage_writer=self.writer(folder), planner=self.planner(), process_group=self.group)

    def load(self, folder: Path, step: int) -> None:
        """Read into the live tensors."""
        dcp_load(self.work.state_dict(), storage_reader=FileSystemReader(folder), process_group=self.group)


class DcpAsync(Dcp):
    """torch.distributed.checkpoint.async_save in one of its forms."""

    def __init__(self, work: Work, kind: str) -> None:
        super().__init__(work)
        self.response: Any = None
        process = kind == "process"
        self.type = AsyncCheckpointerType.PROCESS if process else AsyncCheckpointerType.THREAD
        self.stager: Any = None
        if kind != "thread":
            options = staging.StagingOptions(
                use_pinned_memory=False,
                use_shared_memory=process,
                use_async_staging=kind == "stager",
                use_non_blocking_copy=False,
            )
            self.stager = staging.DefaultStager(options)

    def save(self, folder: Path, step: int) -> None:
        """Stage, or begin to."""
        self.response = dcp_async_save(
            self.work.state_dict(),
            storage_writer=self.writer(folder),
            planner=self.planner(),
            process_group=self.group,
            async_checkpointer_type=self.type,
            async_stager=self.stager,
        )

    def fence(self) -> None:
        """Wait for the staging, where it goes on."""
        staged = getattr(self.response, "staging_completion", None)
        if staged is not None:
            staged.result()

    def finish(self) -> None:
        """Wait for the upload."""
        getattr(self.response, "upload_completion", self.response).result()

    def close(self) -> None:
        """Let go of the stager."""
        if self.stager is not None:
            self.stager.close()
