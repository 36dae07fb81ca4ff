"""From the command line to a `FinetuneConfig`: recipes as YAML, every setting as a flag."""

from __future__ import annotations

import json
import re
from argparse import ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, get_loader, set_loader, set_parsing_settings

from chunkflow.errors import ChunkflowError
from launch.board import Board
from launch.config import FinetuneConfig
from launch.errors import KNOWN_ERRORS, ConfigError
from launch.files import write_json
from moe.errors import MoeError
from pipeline.errors import PipelineError

_UNKNOWN = re.compile(
    r"unrecognized arguments: --([^\s=]+)|Option '(\S+)' is not accepted|Group '(\S+)' does not accept option '(\S+)'"
)
"""How jsonargparse names what it does not know: a flag, a key of a recipe, a key of one of its sections."""


_read_yaml = get_loader("yaml")


class _Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of the description, which are commands."""


def read_config(argv: Sequence[str] | None, *, prog: str, description: str) -> FinetuneConfig:
    """Return the job that a command line describes; flags override the recipe.

    Leaves the process after `--help` and `--print_config`. Raises ConfigError on anything unknown or impossible.
    """
    # Process-wide in jsonargparse, and harmless: the strings under the fields become the help.
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader("yaml", _load_yaml, exceptions=(yaml.YAMLError,))
    parser = ArgumentParser(
        prog=prog, description=description, formatter_class=_Help, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="A recipe: a YAML file of the settings below.")
    parser.add_class_arguments(FinetuneConfig)
    try:
        parsed = parser.parse_args(None if argv is None else list(argv))
        _check_filled(FinetuneConfig, parsed)
        values = parser.instantiate(parsed)
        return FinetuneConfig(**{entry.name: values[entry.name] for entry in fields(FinetuneConfig)})
    except (ArgumentError, ChunkflowError, MoeError, PipelineError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{text}; {_nearest(text)}see --help for the settings") from error


def _load_yaml(text: str) -> Any:
    """Return what YAML says. Raises ConfigError for a key given twice, of which YAML's own reader takes the last."""
    waiting: list[tuple[str, yaml.Node | None]] = [("", yaml.compose(text, Loader=yaml.SafeLoader))]
    seen = set[int]()  # an alias may stand inside of what it names
    for prefix, node in waiting:
        lines: dict[str, int] = {}
        if not isinstance(node, yaml.MappingNode) or id(node) in seen:
            continue
        seen.add(id(node))
        for key, value in node.value:
            name, line = f"{prefix}{key.value}", key.start_mark.line + 1
            if name in lines:
                raise ConfigError(f"{name} is given twice, in lines {lines[name]} and {line} of a recipe; take one")
            lines[name] = line
            waiting.append((f"{name}.", value))
    return _read_yaml(text)


def _nearest(text: str) -> str:
    """Return a question for the setting that is meant, where an error of the parser names one that it does not know."""
    found = _UNKNOWN.search(text)
    given = ".".join(part for part in found.groups() if part) if found else ""
    near = get_close_matches(given, flatten_config(FinetuneConfig()), n=1, cutoff=0.75)
    return f"did you mean {near[0]}? " if near else ""


def _check_filled(section: type, values: Namespace, prefix: str = "") -> None:
    """Raise ConfigError on what the parser lets through: null where a value is needed, and sections that are none."""
    for name, kind in get_type_hints(section).items():
        key, value = f"{prefix}{name}", values[name]
        if isinstance(kind, type) and is_dataclass(kind):
            if not isinstance(value, Namespace):
                raise ConfigError(f"{key} is {value!r}; it must be a section with the settings {key}.*; see --help")
            _check_filled(kind, value, f"{key}.")
        elif value is None and NoneType not in get_args(kind):
            raise ConfigError(f"{key} is null; give it a value, or leave it out for its default")


def agreed_config(argv: Sequence[str] | None, board: Board, *, prog: str, description: str) -> FinetuneConfig:
    """Return `read_config`, having made sure that every rank read the same. Every rank calls.

    Raises the same ConfigError on every rank: the error of the first rank that could not read its own, or the keys in
    which two ranks differ.
    """
    config, failure = None, None
    try:
        config = read_config(argv, prog=prog, description=description)
    except KNOWN_ERRORS as error:
        failure = str(error)
    answers = board.gather("config", [failure, flatten_config(config) if config else {}])
    require_agreement([(text, settings) for text, settings in answers])
    assert config is not None
    return config


def require_agreement(answers: Sequence[tuple[str | None, Mapping[str, Any]]]) -> None:
    """Raise one ConfigError for what the ranks answered: (error text or None, flat settings), by rank. Pure."""
    failures = [text for text, _ in answers if text is not None]
    if failures:
        everywhere = len(set(failures)) == 1 and len(failures) == len(answers)
        first = next(rank for rank, (text, _) in enumerate(answers) if text is not None)
        raise ConfigError(failures[0] if everywhere else f"on rank {first}: {failures[0]}")
    _, ours = answers[0]
    for rank, (_, theirs) in enumerate(answers):
        keys = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
        if keys:
            parts = ", ".join(f"{key} is {ours.get(key)!r} and {theirs.get(key)!r}" for key in keys)
            raise ConfigError(
                f"ranks 0 and {rank} were started with different settings: {parts}; give every rank the same "
                "recipe and flags"
            )


def flatten_config(config: FinetuneConfig) -> dict[str, Any]:
    """Return the settings by dotted key, as JSON values."""
    return _dotted(asdict(config))


def _dotted(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        for key, entry in value.items() if isinstance(value, dict) else [(None, value)]:
            flat[name if key is None else f"{name}.{key}"] = list(entry) if isinstance(entry, tuple) else entry
    return flat


def record_config(path: Path, config: FinetuneConfig) -> list[str]:
    """Write the settings to `path`, as a recipe, and return `changed_settings` from what was there. One rank."""
    changed = changed_settings(path, config)
    write_json(path, asdict(replace(config, fresh=False)))
    return changed


def changed_settings(path: Path, config: FinetuneConfig) -> list[str]:
    """Return in words how settings differ from those that `record_config` wrote to `path`; of none there, nothing."""
    before: dict[str, Any] = {}
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            before = {}  # cut off: nothing to compare with
    old, new = _dotted(before), flatten_config(replace(config, fresh=False))
    return [f"{key} was {old[key]!r} and is {new[key]!r}" for key in new if key in old and old[key] != new[key]]
