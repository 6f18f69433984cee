"""``s3tensor compare``: models side by side."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from s3tensor.cli.group import (
    COUNT,
    DEVICE,
    DTYPES,
    Refused,
    bar,
    default_device,
    load,
    main,
    megabytes,
    out,
)

if TYPE_CHECKING:
    from s3tensor.evaluate.compare import Side


@main.command(
    epilog="""Examples:

\b
  s3tensor compare HuggingFaceTB/SmolLM2-135M sparse
  s3tensor compare dense sparse-a sparse-b --text wikitext2 --samples 32 --json"""
)
@click.argument("models", nargs=-1, required=True)
@click.option(
    "--text", default="pydoc", show_default=True, help="pydoc, c4, wikitext2 or a path to text"
)
@click.option("--samples", type=COUNT, default=8, show_default=True, help="windows of text")
@click.option(
    "--seq-len",
    type=click.IntRange(min=2),
    default=512,
    show_default=True,
    help="tokens in a window",
)
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
@click.option("--device", type=DEVICE, help="[cuda if available, else cpu]")
@click.option("--json", "as_json", is_flag=True, help="print JSON, one row per model")
def compare(
    models: tuple[str, ...],
    text: str,
    samples: int,
    seq_len: int,
    dtype: str,
    device: str | None,
    as_json: bool,
) -> None:
    """Compare MODELS that share a vocabulary: size, density, perplexity, agreement with the first."""
    from s3tensor import llm
    from s3tensor.evaluate.compare import compare as side_by_side

    if len(models) < 2:
        raise Refused("give two models or more; the first is the reference")
    where = device or default_device()
    loaded = [load(model, dtype) for model in models]
    tokens = llm.tokenize(llm.load_text(text, "held-out"), loaded[0][1])
    windows = llm.windows(tokens, samples, seq_len)
    names = [Path(model).name if Path(model).exists() else model for model in models]
    if len(set(names)) < len(names):
        names = list(models)
    pairs = [(name, model.to(where)) for name, (model, _) in zip(names, loaded, strict=True)]
    with bar("comparing") as advance:
        sides = side_by_side(pairs, windows, advance)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(side) for side in sides]))
        return
    out.print(_table(sides, out.width))
    out.print(
        f"{windows.numel():,} held-out tokens of {text}. share: of the first model's bytes; KL: divergence "
        "from the first model's next token, in nats; top-1: share of equal most likely next tokens"
    )


def _table(sides: list[Side], width: int) -> Table:
    """One row per model: names fold on a narrow terminal, figures do not."""
    space = int(width >= 80)
    table = Table(padding=(0, space))
    rows = [
        (
            side.name,
            megabytes(side.weight_bytes),
            f"{side.weight_bytes / sides[0].weight_bytes:.3f}",
            f"{side.sparse_weights} {', '.join(side.patterns)}".strip(),
            f"{side.density:.3f}",
            f"{side.perplexity:.2f}",
            f"{side.divergence:.4f}",
            f"{100 * side.agreement:.1f}%",
        )
        for side in sides
    ]
    headings = ("model", "weights", "share", "sparse", "density", "ppl", "KL", "top-1")
    for heading, cells in zip(headings, zip(*rows, strict=True), strict=True):
        if heading in ("model", "sparse"):
            table.add_column(heading, overflow="fold", min_width=len(heading))
        else:
            widest = max(map(len, (heading, *cells)))
            table.add_column(heading, justify="right", no_wrap=True, min_width=widest)
    table.columns[1].justify = table.columns[2].justify = "left"
    least = sum((column.min_width or 0) + 2 * space + 1 for column in table.columns) + 1
    if least > width:  # lines wrap; otherwise rich would drop columns
        table.width = least
    for row in rows:
        table.add_row(*row)
    return table
