"""``s3tensor verify``: the contents of a folder, and whether they are intact."""

from __future__ import annotations

import json
from pathlib import Path

import click

from s3tensor.cli.group import main


@main.command(
    epilog="""Example:

\b
  s3tensor verify sparse"""
)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="print JSON, one row per weight")
def verify(directory: Path, as_json: bool) -> None:
    """Check the checksums in DIRECTORY, and that every sparse weight satisfies its pattern."""
    from s3tensor.io import pretrained as hf

    rows = hf.verify(directory)
    if as_json:
        names = ("name", "pattern", "density")
        click.echo(json.dumps([dict(zip(names, row, strict=True)) for row in rows]))
        return
    if not rows:
        click.echo("all checksums match; the model has no sparse weights")
        return
    patterns = ", ".join(sorted({pattern for _, pattern, _ in rows}))
    density = sum(row[2] for row in rows) / len(rows)
    click.echo(
        f"all checksums match; {len(rows)} sparse weights satisfy {patterns}; mean density {density:.4f}"
    )
