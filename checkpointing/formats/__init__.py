"""Checkpoints of other tools, in and out: one file a format, imported when it is used."""

from checkpointing.formats.base import Lazy, Source, Target, model_names
from checkpointing.formats.detect import FORMATS, detect, open_source, write_target

__all__ = ["FORMATS", "Lazy", "Source", "Target", "detect", "model_names", "open_source", "write_target"]
