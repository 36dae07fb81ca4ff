"""The `checkpoint` command: look at checkpoints, verify them, compare them, and turn formats into each other.

Exits 0 when all is well, 1 when a check failed, 2 on bad input. `--json` prints one JSON document instead of text.

\b
    checkpoint ls runs/a/checkpoints
    checkpoint verify runs/a/checkpoints@200
    checkpoint diff runs/a/checkpoints@100 model.pt --only "model.*"
    checkpoint restore runs/a/checkpoints@200 hf-model --format hf --dtype bfloat16
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from checkpointing import cli_output as out
from checkpointing.errors import CheckpointError, IntegrityError
from checkpointing.folder import REQUEST, Folder, split_step
from checkpointing.storage import open_storage

app = typer.Typer(
    name="checkpoint", help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Run = Annotated[str, typer.Argument(help="Folder of a run's checkpoints (or s3://bucket/prefix).")]
Ours = Annotated[str, typer.Argument(help="A run's folder, RUN@STEP or RUN/step-N.")]
One = Annotated[
    str,
    typer.Argument(
        help="A run's folder (its newest), RUN@STEP or RUN/step-N; or another tool's checkpoint: a Hugging Face "
        "folder, .safetensors, .pt, DCP, DeepSpeed or torchsnapshot."
    ),
]


@app.command()
def ls(run: Run, json: Json = False) -> None:
    """List the checkpoints of a run."""
    from checkpointing.show import list_steps

    rows = list_steps(_folder(run)[0])
    out.show_steps(rows, json)
    raise typer.Exit(0 if all(row["ok"] for row in rows) else 1)


@app.command()
def show(
    source: One,
    only: Annotated[str, typer.Option(help="Names to show, as a shell pattern.")] = "*",
    json: Json = False,
) -> None:
    """Show the tensors, shapes, sizes and shards of a checkpoint, and its values."""
    from checkpointing.show import describe, describe_source

    if _is_ours(source):
        folder, step = _folder(source)
        if step is None:
            step = _newest(folder)
            _say_passed_over(folder, step)
        found = describe(folder.inspect(step), only)
    else:
        found = describe_source(_source(source), only)
    if only != "*" and not (found["tensors"] or found["aliases"] or found["values"]):
        raise CheckpointError(f"no name of {source} matches {only!r}")
    out.show_checkpoint(found, json)


@app.command()
def verify(source: Ours, json: Json = False) -> None:
    """Read every byte of a checkpoint (of all of a run's, without a step); name file, tensor and piece that differ."""
    from checkpointing.verify import damages

    folder, step = _folder(source)
    steps = [step] if step is not None else folder.candidates()
    if not steps:
        raise CheckpointError(f"there is no checkpoint in {source}")
    found: dict[int, list[Any]] = {}
    with out.progress(json) as bar:
        for one in steps:
            try:
                manifest = folder.inspect(one)
            except IntegrityError as error:
                found[one] = [str(error)]
                continue
            task = bar.bytes(f"step {one}", sum(file.length for file in manifest.files))
            found[one] = [
                damage
                for file in manifest.files
                for damage in damages(folder.storage, folder.at(one), manifest, file, task)
            ]
    out.show_damages(found, json)
    raise typer.Exit(1 if any(found.values()) else 0)


@app.command()
def diff(
    a: One,
    b: One,
    only: Annotated[str | None, typer.Option(help="Names to compare, as a shell pattern.")] = None,
    json: Json = False,
) -> None:
    """Compare two checkpoints of any two formats, tensor by tensor."""
    from checkpointing.diff import compare

    left, right = (_source(one) for one in (a, b))
    if only is not None:
        left, right = left.only(only), right.only(only)
    with out.progress(json) as bar:
        found = list(compare(left, right, bar.names("comparing", {*left.tensors, *right.tensors})))
    out.show_differences(found, json)
    raise typer.Exit(1 if found else 0)


@app.command()
def save(
    source: One,
    dest: Annotated[Path, typer.Argument(help="Folder of a run; created if missing.")],
    step: Annotated[int | None, typer.Option(help="Step to save as; by default that of the source, or 0.")] = None,
    json: Json = False,
) -> None:
    """Turn a checkpoint of another tool into a committed, verified one."""
    from checkpointing.convert import save_source

    opened = _source(source)
    with out.progress(json) as bar:
        place = save_source(opened, dest, step, bar.bytes("reading", opened.num_bytes))
    done = {"path": str(place), "tensors": len(opened.tensors)}
    out.show_done(done, json, f"committed {place}, with {len(opened.tensors)} tensors")


@app.command()
def restore(
    source: One,
    dest: Annotated[Path, typer.Argument(help="Destination; must not exist.")],
    format_: Annotated[str, typer.Option("--format", help="hf, torch, dcp, deepspeed or torchsnapshot.")],
    world_size: Annotated[
        int, typer.Option(help="Ranks to write for (deepspeed), or files (dcp); for these only.", min=1)
    ] = 1,
    only: Annotated[str | None, typer.Option(help="Names to write, as a shell pattern.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Dtype of the model's floating-point tensors.")] = None,
    json: Json = False,
) -> None:
    """Write a checkpoint in the format of another tool, every byte verified on the way."""
    from checkpointing.convert import restore_source

    notes: list[str] = []
    opened = _source(source)
    try:
        with out.progress(json) as bar:
            restore_source(
                opened, dest, format_, world_size=world_size, only=only, dtype=dtype, note=notes.append,
                wrote=bar.bytes("writing", None if only else opened.num_bytes),
            )  # fmt: skip
    except IntegrityError as error:
        folder, named = _folder(source) if opened.kind == "longrail" else (None, None)
        others = [step for step in folder.candidates() if step != opened.step] if folder and named is None else []
        if not others:
            raise
        raise IntegrityError(f"{error}; another step: {source}@{max(others)}") from error
    out.show_done({"path": str(dest), "format": format_, "notes": notes}, json, f"wrote {dest}", *notes)


@app.command()
def request(run: Run, json: Json = False) -> None:
    """Ask a running job to save now; it does at its next step."""
    folder, _ = _folder(run)
    asked = REQUEST in folder.storage.names(folder.root)
    if not asked:
        folder.storage.write_new(folder.root / REQUEST, b"")
    said = "was asked already" if asked else "asked: a job that saves there does at its next step"
    out.show_done({"path": str(folder.root / REQUEST), "already": asked}, json, said)


@app.command()
def prune(
    run: Run,
    keep: Annotated[int, typer.Option(help="How many of the newest checkpoints stay.", min=1)],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    json: Json = False,
) -> None:
    """Delete older checkpoints, and what crashed saves have left. The newest one that verifies always stays."""
    from checkpointing.prune import prune_run

    with out.progress(json) as bar:
        gone = prune_run(_folder(run)[0], keep, dry_run=dry_run, read=bar.bytes("verifying", None))
    said = [f"{'would remove' if dry_run else 'removed'} {one}" for one in gone] or ["nothing to remove"]
    out.show_done({"removed": gone, "dry_run": dry_run}, json, *said)


@app.command()
def doctor(run: Run, json: Json = False) -> None:
    """Check that a folder is fit for checkpoints and that nothing is wrong in it."""
    from checkpointing.doctor import examine

    findings = list(examine(_folder(run)[0]))
    out.show_findings(findings, json)
    raise typer.Exit(1 if any(finding.level == "problem" for finding in findings) else 0)


def main() -> None:
    """Run the command; bad input is one line on stderr and exit code 2."""
    try:
        app()
    except IntegrityError as error:
        print(f"checkpoint: {error}", file=sys.stderr)
        sys.exit(1)
    except (CheckpointError, OSError) as error:
        print(f"checkpoint: {error}", file=sys.stderr)
        sys.exit(2)


def _split(text: str) -> tuple[str, int | None]:
    """Return (path, step) of `path` or `path@step`."""
    path, at, step = text.rpartition("@")
    if at and step.isascii() and step.isdigit():
        return path, int(step)
    if at and Path(path).exists() and not Path(text).exists():
        raise CheckpointError(f"{step!r} is no step of {path}; give a number, as in {path}@20")
    return text, None


def _folder(text: str) -> tuple[Folder, int | None]:
    path, step = _split(text)
    if Path(path).is_file():
        raise CheckpointError(f"{path} is a file; give the folder of a run")
    root, storage = open_storage(path)
    root, named = split_step(root)
    folder = Folder(root, storage)
    if "://" in path and not storage.names(root):
        raise CheckpointError(f"{path} does not exist or is empty; give the folder of a run")
    if "://" not in path and not root.is_dir():
        raise CheckpointError(f"{path} does not exist; give the folder of a run")
    if not folder.is_of_a_run():
        raise CheckpointError(f"{path} is no folder of a run: {_said_of(folder)}")
    step, there = step if step is not None else named, folder.candidates()
    if step is not None and step not in there:
        raise CheckpointError(f"there is no step {step} in {root}; there are: {there or 'none'}")
    return folder, step


def _said_of(folder: Folder) -> str:
    """Say what a folder that is none of a run holds, and which one inside of it may have been meant."""
    names = sorted(folder.storage.names(folder.root))
    if "manifest.json" in names:
        return "it is one checkpoint, under another name; give the folder it was in"
    meant = folder.root / "checkpoints" if "checkpoints" in names else "the folder that a job saves to"
    return f"it holds {', '.join(names[:3])} and no step-N; give {meant}"


def _is_ours(text: str) -> bool:
    """Return whether it is for the readers that need no torch: ours, or nothing that is there."""
    path = Path(_split(text)[0])
    if "://" in text or not path.exists():
        return True
    return path.is_dir() and any(one.name == "manifest.json" or one.name.startswith("step-") for one in path.iterdir())


def _newest(folder: Folder) -> int:
    committed = folder.committed()
    if not committed:
        raise CheckpointError(f"there is no committed checkpoint in {folder.root}")
    return max(committed)


def _source(text: str) -> Any:
    from checkpointing.formats import open_source

    path, step = _split(text)
    opened = open_source(path if "://" in path else Path(path), step=step)
    if opened.kind == "longrail":
        folder, named = _folder(text)
        if named is None and opened.step is not None:
            _say_passed_over(folder, opened.step)
    return opened


def _say_passed_over(folder: Folder, taken: int) -> None:
    """Say on stderr which newer steps are no whole checkpoints, where the newest was asked for."""
    for step in folder.candidates():
        if step > taken:
            try:
                folder.inspect(step)
            except IntegrityError as error:
                print(f"checkpoint: passed over, for step {taken}: {error}", file=sys.stderr)
