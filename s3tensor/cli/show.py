"""``s3tensor show``: a pattern in words, numbers and a picture."""

from __future__ import annotations

import json
from pathlib import Path

import click

from s3tensor.cli.group import PATTERN, SHAPE, as_usage, main
from s3tensor.pattern import Pattern, grammar


@main.command(
    epilog=f"""Patterns:

\b
{grammar()}

Examples:

\b
  s3tensor show pair4:8
  s3tensor show "block=1,2; scope=1,4; keep=2" --shape 8x32 --out pattern.png"""
)
@click.argument("pattern", type=PATTERN)
@click.option("--shape", type=SHAPE, help="ROWSxCOLUMNS of the weight [a small shape that fits]")
@click.option(
    "--out",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="draw it to this file (.png)",
)
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def show(pattern: Pattern, shape: tuple[int, ...] | None, path: Path | None, as_json: bool) -> None:
    """Explain PATTERN in words and numbers, and draw it with --out."""
    from s3tensor import draw

    with as_usage():
        said = json.dumps(draw.facts(pattern, shape)) if as_json else draw.describe(pattern, shape)
        click.echo(said)
        if path is not None:
            draw.save_picture(pattern, shape, path)
            click.echo(f"picture in {path}", err=as_json)
