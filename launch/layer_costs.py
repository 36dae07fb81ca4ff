"""What each layer of a model costs on this machine, as the JSON that `python -m pipeline simulate --costs` reads.

    python -m launch.layer_costs --config recipes/pipeline_1f1b.yaml --tokens 512 --output costs.json

Rows are by layer as `launch.split` gives them: embedding, decoder layers, norm, head with the loss. One process; run it
with nothing else on the machine. Exit codes: 0 well, 2 bad input.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.costs import Costs


@dataclass(frozen=True, slots=True)
class LayerCost:
    """Of one layer and one micro-batch."""

    forward_s: float
    backward_s: float
    saved_bytes: int
    """Kept from the forward to the backward, weights left out."""
    weight_bytes: int


def measure_costs(model: Any, *, tokens: int, repeats: int = 5) -> Costs:
    """Return the costs of a causal LM's layers for micro-batches of one sequence of `tokens`; medians of `repeats`.

    Raises ModelError for a model that cannot be split.
    """
    import torch

    from launch.split import DecoderArguments, call_decoder, split
    from pipeline.costs import Costs

    layers, device = split(model), next(model.parameters()).device
    ids = (torch.arange(tokens, device=device) * 7 + 3)[None] % layers[0].module.weight.shape[0]  # type: ignore[union-attr]
    positions = torch.arange(tokens, device=device)[None]
    hidden = layers[0].module(ids).detach()
    arguments = iter(DecoderArguments(model).of(hidden, positions))
    found = []
    for layer in layers:
        keywords = next(arguments) if layer.kind == "decoder" else {}
        runs: dict[str, Callable[[Tensor], Tensor]] = {
            "embedding": lambda _, m=layer.module: m(ids),
            "decoder": lambda x, m=layer.module, k=keywords: call_decoder(m, x, k),
            "norm": lambda x, m=layer.module: m(x),
            "head": lambda x, m=layer.module: _loss(m, x, ids),
        }
        found.append(measure_layer(runs[layer.kind], hidden, layer.module, repeats=repeats))
    return Costs(
        forward_s=(tuple(cost.forward_s for cost in found),),
        backward_s=(tuple(cost.backward_s for cost in found),),
        activation_bytes=(tuple(cost.saved_bytes for cost in found),),
        boundary_bytes=(hidden.nbytes,),
        weight_bytes=tuple(cost.weight_bytes for cost in found),
    )


def _loss(head: Any, hidden: Tensor, ids: Tensor) -> Tensor:
    import torch

    from chunkflow.loss import tiled_cross_entropy

    return tiled_cross_entropy(hidden[0], head.weight, head.bias, ids[0], torch.ones_like(ids[0], dtype=hidden.dtype))


def measure_layer(run: Callable[[Tensor], Tensor], hidden: Tensor, module: Any, *, repeats: int) -> LayerCost:
    """Return what `run` costs for an input like `hidden`, medians of `repeats`; `module` has the weights it uses.

    Gradients of the module's parameters are dropped.
    """
    import torch

    forwards, backwards, saved = [], [], {}
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    for repeat in range(repeats + 1):  # the first warms up
        x = hidden.detach().requires_grad_(True)
        begun = time.perf_counter()
        out = run(x)
        forwards.append(time.perf_counter() - begun)
        if not out.requires_grad:  # frozen
            backwards.append(0.0)
            continue
        grad, begun = torch.ones_like(out), time.perf_counter()
        out.backward(grad)
        backwards.append(time.perf_counter() - begun)
        if repeat == repeats:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: _counted(t, saved), lambda t: t):
                run(x)
    for p in module.parameters():
        p.grad = None
    kept = sum(size for place, size in saved.items() if place not in own)
    weights = sum(p.nbytes for p in module.parameters())
    return LayerCost(median(forwards[1:]), median(backwards[1:]), kept, weights)


def _counted(tensor: Tensor, saved: dict[int, int]) -> Tensor:
    """Note a storage that the graph keeps; several views of it count once."""
    storage = tensor.untyped_storage()
    saved[storage.data_ptr()] = storage.nbytes()
    return tensor


app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def command(
    config: Annotated[Path, typer.Option(help="A recipe; its model is measured.")],
    output: Annotated[Path | None, typer.Option(help="Where to write the JSON; printed without it.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a micro-batch.")] = 512,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each layer; the median counts.")] = 5,
) -> None:
    """Measure the layers of a recipe's model."""
    import torch

    from launch.errors import EXIT_BAD_INPUT, KNOWN_ERRORS
    from launch.model import build_model
    from launch.recipe import read_config

    try:
        settings = read_config(["--config", str(config)], prog="python -m launch.layer_costs", description="")
        model = build_model(settings.model, None, torch.device("cpu"))
        text = json.dumps(measure_costs(model, tokens=tokens, repeats=repeats).to_json(), indent=1)
    except KNOWN_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_BAD_INPUT) from error
    if output is None:
        print(text)
    else:
        output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
