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
from checkpointing.cli_places import folder_of, inside, is_ours, newest, other_whole, say_passed_over, source_of
from checkpointing.errors import CheckpointError, IntegrityError
from checkpointing.folder import REQUEST
from checkpointing.storage import is_store

app = typer.Typer(
    name="checkpoint", help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Run = Annotated[
    str, typer.Argument(help="Folder of a run's checkpoints, or of the job around it (or s3://bucket/prefix).")
]
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

    rows = list_steps(folder_of(run)[0])
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

    if is_ours(source):
        folder, step = folder_of(source)
        if step is None:
            step = newest(folder)
            say_passed_over(folder, step)
        found = describe(folder.inspect(step), only)
    else:
        found = describe_source(source_of(source), only)
    if only != "*" and not (found["tensors"] or found["aliases"] or found["values"]):
        raise CheckpointError(f"no name of {source} matches {only!r}")
    out.show_checkpoint(found, json)


@app.command()
def verify(source: Ours, json: Json = False) -> None:
    """Read every byte of a checkpoint (of all of a run's, without a step); name file, tensor and piece that differ."""
    from checkpointing.verify import damages

    folder, step = folder_of(source)
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

    left, right = (source_of(one) for one in (a, b))
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

    opened = source_of(source)
    with out.progress(json) as bar:
        place = save_source(opened, Path(inside(str(dest))), step, bar.bytes("reading", opened.num_bytes))
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
    opened = source_of(source)
    try:
        with out.progress(json) as bar:
            restore_source(
                opened, dest, format_, world_size=world_size, only=only, dtype=dtype, note=notes.append,
                wrote=bar.bytes("writing", None if only else opened.num_bytes),
            )  # fmt: skip
    except IntegrityError as error:
        folder, named = folder_of(source) if opened.kind == "longrail" else (None, None)
        other = other_whole(folder, opened.step) if folder and named is None else None
        if other is None:
            raise
        raise IntegrityError(f"{error}; another step: {source}@{other}") from error
    out.show_done({"path": str(dest), "format": format_, "notes": notes}, json, f"wrote {dest}", *notes)


@app.command()
def request(
    run: Run,
    wait: Annotated[
        float | None, typer.Option(help="Wait so many seconds until it is committed; exit 1 when it is not.", min=0)
    ] = None,
    json: Json = False,
) -> None:
    """Ask a running job to save now; it does at its next step. For its local folder, which the job looks at."""
    from checkpointing import requests

    if is_store(run):
        raise CheckpointError(f"{run} is a second tier, which no job looks at; give the local folder of the run")
    if wait is not None and not wait <= 1e8:
        raise CheckpointError(f"--wait is {wait}; give seconds, at most 1e8")
    folder, _ = folder_of(run)
    before = requests.stamps(folder)
    asked = requests.ask(folder)
    told: dict[str, Any] = {"path": str(folder.root / REQUEST), "already": asked}
    if wait is None:
        said = "was asked already" if asked else "asked"
        out.show_done(told, json, f"{said}: is saved at the next step of a job that runs there")
        return
    lacks = "the job that was asked has ended without another save"
    try:
        step = requests.await_answer(folder, before, wait)
    except TimeoutError:
        step, lacks = None, f"nothing was saved within {wait:g} s; the request stays for a job that runs there"
    if step is None:
        print(f"checkpoint: {folder.root}: {lacks}", file=sys.stderr)
    place = None if step is None else str(folder.at(step))
    lines = [] if place is None else [f"saved step {step} as {place}"]
    out.show_done(told | {"step": step, "checkpoint": place}, json, *lines)
    raise typer.Exit(0 if place is not None else 1)


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
        gone = prune_run(folder_of(run)[0], keep, dry_run=dry_run, read=bar.bytes("verifying", None))
    said = [f"{'would remove' if dry_run else 'removed'} {one}" for one in gone] or ["nothing to remove"]
    out.show_done({"removed": gone, "dry_run": dry_run}, json, *said)


@app.command()
def doctor(run: Run, json: Json = False) -> None:
    """Check that a folder is fit for checkpoints and that nothing is wrong in it."""
    from checkpointing.doctor import examine

    findings = list(examine(folder_of(run)[0]))
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
