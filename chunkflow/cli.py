"""The command `chunkflow`: what is in a data set, how it would be planned, and whether that is exact.

DATA is a `.jsonl` or `.parquet` file, a folder or a name on the Hub. Exit codes: 0 well, 1 a check failed, 2 bad input.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from chunkflow.cli_data import open_data, progress_bar, read_lengths
from chunkflow.config import CACHE_DIR
from chunkflow.errors import ChunkflowError

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, rich_markup_mode=None)

Data = Annotated[str | None, typer.Argument(help="file, folder or Hub name", show_default=False)]
Lengths = Annotated[Path | None, typer.Option("--lengths", help="a .npy file of whole numbers instead of DATA")]
Tokenizer = Annotated[str | None, typer.Option(help="folder or name of the tokenizer; not needed for input_ids")]
Cache = Annotated[Path, typer.Option(help="folder for token stores")]
Split = Annotated[str, typer.Option(help="of a Hub data set")]
Field = Annotated[str, typer.Option(help="the column that holds a text")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON, for programs")]
ChunkTokens = Annotated[int, typer.Option(help="tokens in a full chunk")]
Batch = Annotated[int, typer.Option(help="samples in an optimizer step, over all ranks")]
World = Annotated[int, typer.Option(help="data-parallel ranks")]
Retain = Annotated[int, typer.Option(help="chunks of a long sequence that keep their activations (K)")]
Policy = Annotated[str, typer.Option(help="split, split_independent, truncate, drop or raise")]
Seed = Annotated[int, typer.Option(help="of the order of the samples")]
MaxTokens = Annotated[int | None, typer.Option(help="longest sequence that fits into memory (default: no limit)")]


@contextmanager
def _errors() -> Iterator[None]:
    """Turn known errors into one line and exit code 2."""
    try:
        yield
    except (ChunkflowError, OSError) as error:
        typer.echo(f"chunkflow: {error}", err=True)
        raise typer.Exit(2) from error


@app.command()
def lengths(
    data: Data = None,
    lengths: Lengths = None,
    tokenizer: Tokenizer = None,
    cache: Cache = CACHE_DIR,
    split: Split = "train",
    field: Field = "text",
    png: Annotated[Path, typer.Option(help="where the picture goes")] = Path("lengths.png"),
    chunk_tokens: Annotated[int | None, typer.Option(help="marked in the picture")] = None,
    as_json: AsJson = False,
) -> None:
    """Show how long the sequences are, and where the tokens are."""
    with _errors():
        from chunkflow.config import PlannerConfig
        from chunkflow.histogram import draw, histogram

        if chunk_tokens is not None:
            PlannerConfig(chunk_tokens=chunk_tokens)  # raises on what no chunk has
        found = histogram(read_lengths(lengths, data, tokenizer, cache, split, field))
        draw(found, png, chunk_tokens=chunk_tokens)
        typer.echo(json.dumps(found.to_json()) if as_json else "\n".join([*found.lines(), f"picture: {png}"]))


@app.command()
def plan(
    data: Data = None,
    lengths: Lengths = None,
    chunk_tokens: ChunkTokens = 8192,
    global_batch: Batch = 256,
    world_size: World = 1,
    retain: Retain = 1,
    overflow: Policy = "split",
    seed: Seed = 0,
    max_tokens: MaxTokens = None,
    tokenizer: Tokenizer = None,
    cache: Cache = CACHE_DIR,
    split: Split = "train",
    field: Field = "text",
    as_json: AsJson = False,
) -> None:
    """Plan one epoch and say how good the plan is."""
    with _errors():
        from chunkflow.config import PlannerConfig
        from chunkflow.errors import PlanError
        from chunkflow.overflow import Overflow, parse_overflow
        from chunkflow.survey import overflowed, survey

        policy = parse_overflow(overflow)
        if world_size < 1:
            raise PlanError(f"world_size is {world_size}; it must be at least 1")
        config = PlannerConfig(chunk_tokens=chunk_tokens, retain=retain, max_tokens=max_tokens)
        given = read_lengths(lengths, data, tokenizer, cache, split, field)
        kept = overflowed(given, policy, chunk_tokens=chunk_tokens, max_tokens=max_tokens)
        limit = max_tokens or chunk_tokens
        if policy is Overflow.RAISE and (kept > limit).any():
            raise PlanError(f"{(kept > limit).sum()} sequences have more than {limit} tokens, and overflow is raise")
        with progress_bar("planning") as progress:
            found = survey(kept, config=config, progress=progress, batch=global_batch, world_size=world_size, seed=seed)
        if found.idle_ranks:
            typer.echo(
                f"{found.idle_ranks} of {world_size} ranks have nothing to train in some batches, which have fewer "
                "groups and standalone chunks than ranks; raise --global-batch, or lower --chunk-tokens",
                err=True,
            )
        if found.long_batches:
            typer.echo(
                f"in {found.long_batches} of {found.batches} batches one sequence, the longest of {found.long_tokens} "
                "tokens, takes longer than the mean of the ranks, and the others wait for its rank (straggler_ratio); "
                "raise --global-batch, or lower --world-size",
                err=True,
            )
        if as_json:
            typer.echo(json.dumps(found.to_json()))
            return
        if len(kept) != len(given) or kept.sum() != given.sum():
            typer.echo(f"{overflow}: {kept.sum()} of {given.sum()} tokens, {len(kept)} of {len(given)} sequences")
        table = Table("what", "value", title=f"{len(kept)} sequences in chunks of {chunk_tokens}")
        for name, value in found.to_json().items():
            table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
        Console().print(table)


@app.command()
def audit(
    data: Data = None,
    chunk_tokens: ChunkTokens = 8192,
    global_batch: Batch = 256,
    world_size: World = 2,
    resume_world_size: Annotated[int, typer.Option(help="ranks after the resume")] = 3,
    resume_at: Annotated[int | None, typer.Option(help="step to stop and resume at (default: the middle)")] = None,
    retain: Retain = 1,
    overflow: Policy = "split",
    seed: Seed = 0,
    max_tokens: MaxTokens = None,
    weighting: Annotated[str, typer.Option(help="token, sequence or longalign")] = "token",
    tokenizer: Tokenizer = None,
    cache: Cache = CACHE_DIR,
    split: Split = "train",
    field: Field = "text",
    as_json: AsJson = False,
) -> None:
    """Prove that an epoch, resumed at another world size, scores every target once."""
    with _errors():
        from chunkflow.audit import audit as prove
        from chunkflow.loader import ChunkLoader

        source, told = open_data(data, tokenizer, cache, split, field), set[str]()

        def tell(text: str) -> None:  # every loader has the same to tell
            if text not in told:
                typer.echo(text, err=True)
            told.add(text)

        def make(rank: int, world: int) -> ChunkLoader:
            return ChunkLoader(
                source, chunk_tokens=chunk_tokens, global_batch=global_batch, rank=rank, world_size=world,
                retain=retain, seed=seed, overflow=overflow, max_tokens=max_tokens, weighting=weighting,
                report=tell,
            )  # fmt: skip

        if min(world_size, resume_world_size) < 1:
            raise ChunkflowError(f"world sizes are {world_size} and {resume_world_size}; both must be at least 1")
        with progress_bar("steps") as progress:
            found = prove(
                make, world_size=world_size, resumed_world_size=resume_world_size, resume_at=resume_at,
                progress=progress,
            )  # fmt: skip
        typer.echo(json.dumps(found.to_json()) if as_json else str(found))
        raise typer.Exit(0 if found.exact else 1)


Model = Annotated[str, typer.Argument(help="folder or name of a causal LM, or a config.json: random weights")]


@app.command()
def check(
    model: Model,
    chunk_tokens: ChunkTokens = 16,
    as_json: AsJson = False,
) -> None:
    """Compare a model's gradients in chunks with whole sequences."""
    with _errors():
        from dataclasses import asdict

        from chunkflow.check import check_exact
        from chunkflow.model_open import open_model

        report = check_exact(open_model(model), chunk_tokens=chunk_tokens)
        typer.echo(json.dumps({**asdict(report), "exact": report.exact}) if as_json else str(report))
        raise typer.Exit(0 if report.exact else 1)


@app.command()
def families(
    names: Annotated[list[str] | None, typer.Argument(help="model types, such as llama (default: all)")] = None,
    as_json: AsJson = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="print the table of the documentation")] = False,
) -> None:
    """Try transformers' causal LM families: exact, or refused and why."""
    with _errors():
        from dataclasses import asdict

        from chunkflow.families import WRONG, counts, family_names, markdown, table, try_families

        wanted = names or family_names()
        found, unknown = [], None
        with progress_bar("families") as progress:
            try:
                for verdict in try_families(wanted):
                    found.append(verdict)
                    progress(len(found), len(wanted))
            except ChunkflowError as error:
                unknown = error
        if unknown is not None and not found:
            raise unknown
        if as_json:
            typer.echo(json.dumps({"families": [asdict(verdict) for verdict in found], "counts": counts(found)}))
        elif as_markdown:
            typer.echo(markdown(found), nl=False)
        else:
            Console().print(table(found), ", ".join(f"{count} {state}" for state, count in counts(found).items()))
        if unknown is not None:
            raise unknown
        raise typer.Exit(1 if counts(found)[WRONG] else 0)


@app.command()
def tune(
    model: Model,
    cap_mib: Annotated[float, typer.Option(help="memory of one rank, with weights, gradients and AdamW's state")],
    longest: Annotated[int, typer.Option(help="tokens of the longest sequence to be trained")],
    chunk_tokens: Annotated[list[int] | None, typer.Option(help="a size to choose from; may be repeated")] = None,
    retain: Annotated[list[int] | None, typer.Option(help="a K to choose from; may be repeated")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float64")] = "float32",
    as_json: AsJson = False,
) -> None:
    """Measure, fit and propose the best (chunk_tokens, retain) under a cap."""
    with _errors():
        from chunkflow.tune import tune as search

        if not 0 < cap_mib < float("inf"):
            raise ChunkflowError(f"cap_mib is {cap_mib}; it must be a number above 0")
        with progress_bar("measuring") as progress:
            found = search(
                model, cap_bytes=int(cap_mib * 2**20), longest=longest, chunk_tokens=chunk_tokens or (),
                retain=retain or (), dtype=dtype, progress=progress,
            )  # fmt: skip
        typer.echo(json.dumps(found.to_json()) if as_json else str(found))
        raise typer.Exit(0 if found.holds else 1)


def main() -> None:
    """Run the command line."""
    app()
