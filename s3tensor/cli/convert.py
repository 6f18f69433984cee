"""``s3tensor convert``: between dense weights with zeros and compressed ones."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from s3tensor.cli.group import DTYPES, PATTERN, load, main, megabytes
from s3tensor.errors import ModelError
from s3tensor.pattern import Pattern

if TYPE_CHECKING:
    from torch import nn

# Tried on a weight with zeros, in order of bytes, then of speed.
_LIKELY = ("1:4", "2:8", "rowpair16", "coupled2:4", "pair4:8", "2:4", "4:8")


@main.command(
    epilog="""Examples:

\b
  s3tensor convert sparse --to dense --out plain      # for use without s3tensor
  s3tensor convert plain --to compressed --out sparse # a model pruned by any tool
  s3tensor convert plain --to compressed --pattern block:16x16@0.5 --out sparse
  s3tensor convert sparse --to compressed --int8 --out small  # half the bytes, for small batches"""
)
@click.argument("model")
@click.option("--to", "form", type=click.Choice(["compressed", "dense"]), required=True)
@click.option(
    "--pattern",
    type=PATTERN,
    help=f"pattern of the weights [the smallest that fits of {', '.join(_LIKELY)}]",
)
@click.option(
    "--int8", is_flag=True, help="round compressed values to int8, with one scale per row"
)
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
@click.option("--overwrite", is_flag=True, help="replace an existing model")
@click.option("--out", "directory", required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def convert(
    model: str,
    form: str,
    pattern: Pattern | None,
    int8: bool,
    dtype: str,
    overwrite: bool,
    directory: Path,
    as_json: bool,
) -> None:
    """Rewrite MODEL with dense or compressed weights; only --int8 and --dtype change values."""
    from s3tensor.io import pretrained as hf
    from s3tensor.model.quantize import quantize_
    from s3tensor.tensor.base import Compressed

    if int8 and form == "dense":
        raise click.UsageError("--int8 applies to compressed values; use it with --to compressed")
    hf.refuse_existing(directory, overwrite, "give --overwrite")
    loaded, tokenizer = load(model, dtype)
    card = _card(Path(model).expanduser(), directory.expanduser())
    rounded = int8 or dtype != "auto"
    found: dict[str, int] = {}
    if form == "compressed":
        before = any(isinstance(weight, Compressed) for weight in loaded.parameters())
        found = _compress(loaded, pattern)
        if not found and (pattern is not None or not before):
            wanted = str(pattern) if pattern else ", ".join(_LIKELY)
            raise ModelError(
                f"no weight of {model} satisfies {wanted}; prune it with s3tensor prune, or give its pattern"
            )
        if found:
            words = ", ".join(f"{count} to {name}" for name, count in found.items())
            click.echo(f"compressed {words}", err=as_json)
        elif not rounded:
            raise ModelError(
                f"{model} is compressed already; use --int8 or --dtype to change its values"
            )
        if int8:
            click.echo(str(quantize_(loaded)), err=as_json)
    if card and (found or int8):
        card["pattern"] = None  # read from the weights
    if card and rounded and "pruned_perplexity" in card:
        options = (" --int8" if int8 else "") + (f" --dtype {dtype}" if dtype != "auto" else "")
        card["pruned_perplexity"] += f", before convert{options}"
    saved = hf.save_pretrained(
        loaded, directory, tokenizer, dense=form == "dense", overwrite=overwrite, card=card
    )
    now, dense = hf.weight_bytes(loaded)
    size = dense if form == "dense" else now
    if as_json:
        figures = {
            "model": model,
            "saved": str(saved),
            "newly_compressed": found,  # weights by pattern
            "int8": int8,
            "bytes": size,
            "dense_bytes": dense,
        }
        click.echo(json.dumps(figures))
        return
    click.echo(f"saved {saved}: weights of {megabytes(size)}, dense {megabytes(dense)}")


def _card(source: Path, target: Path) -> dict[str, Any] | None:
    """The source's model card section with this command added; None if neither folder has a section.

    If only the target, which is replaced, has one, a new section replaces it.
    """
    from s3tensor.io.card import read_card

    known = read_card(source)
    if known is None:
        if read_card(target) is None:
            return None
        known = {}
    return {
        **known,
        "command": [*known.get("command", ()), shlex.join(["s3tensor", *sys.argv[1:]])],
    }


def _compress(model: nn.Module, pattern: Pattern | None) -> dict[str, int]:
    """Compress the linears that satisfy a pattern, in place; how many for each pattern."""
    from s3tensor.errors import PatternError
    from s3tensor.mask.projection import satisfies
    from s3tensor.model.sparsify import sparsify_
    from s3tensor.model.weights import is_conv1d
    from s3tensor.tensor.base import Compressed

    found: dict[str, int] = {}
    for candidate in (pattern,) if pattern else map(Pattern.parse, _LIKELY):

        def fits(module: Any, name: str, candidate: Pattern = candidate) -> bool:
            if isinstance(module.weight, Compressed):
                return False  # compressed already
            try:
                weight = module.weight.detach()
                upright = weight.t() if is_conv1d(module) else weight
                return bool((weight != 0).any()) and satisfies(upright, candidate)
            except PatternError:
                return False

        rows = sparsify_(model, candidate, filter_fn=fits)
        count = sum(row.action == "compressed" for row in rows)
        if count:
            found[str(candidate)] = count
    return found
