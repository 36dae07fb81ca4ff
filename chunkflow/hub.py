"""The Hub, asked once before anything is loaded from it: where there is no network, libraries try for minutes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_FILES = {".jsonl", ".json", ".parquet", ".csv", ".txt", ".arrow", ".gguf", ".safetensors"}
_ASK_S = 10.0


def is_name(text: str) -> bool:
    """Tell whether this can be the name of a repository, `name` or `owner/name`, and is no file's."""
    return _NAME.fullmatch(text) is not None and Path(text).suffix not in _FILES


def unreachable(name: str, kind: Literal["dataset", "model"]) -> str | None:
    """Ask the Hub for a repository; return why it does not answer, None when it does, whatever the answer.

    Where it does not, what is in the cache can still be loaded (`local_files_only`).
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=_ASK_S)
    except (HfHubHTTPError, HFValidationError):  # whoever loads it says what is wrong with the name
        return None
    except Exception as error:  # noqa: BLE001 (the network raises anything)
        return f"the Hub cannot be reached ({type(error).__name__}: {error}), and it is not in the cache"
    return None


@contextmanager
def offline(why: str | None) -> Iterator[None]:
    """Let nothing ask the Hub inside where `why` says that it does not answer: `local_files_only` reaches not all."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    try:
        constants.HF_HUB_OFFLINE = before or why is not None
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
