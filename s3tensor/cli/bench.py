"""``s3tensor bench``: the speed of compressed weights against dense ones, on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import click

from s3tensor.cli.group import (
    COUNT,
    DEVICE,
    DTYPES,
    PATTERN,
    SHAPE,
    Refused,
    as_usage,
    check_writable,
    default_device,
    err,
    main,
)
from s3tensor.pattern import Pattern


@main.command(
    epilog="""Examples:

\b
  s3tensor bench
  s3tensor bench --pattern 2:4 --shape 4096x4096 --batch 1 --batch 16
  s3tensor bench --calibrate    # measure this GPU; later runs choose kernels by these times"""
)
@click.option(
    "--pattern",
    "patterns",
    type=PATTERN,
    multiple=True,
    help="pattern to time [2:4; with --calibrate all that have kernels]",
)
@click.option("--shape", "shapes", type=SHAPE, multiple=True, help="ROWSxCOLUMNS of the weight")
@click.option("--batch", "batches", type=COUNT, multiple=True, help="rows of the input")
@click.option("--dtype", type=click.Choice(DTYPES[1:]), help="[bfloat16; float32 on a CPU]")
@click.option("--device", type=DEVICE, help="[cuda if available, else cpu]")
@click.option(
    "--calibrate", is_flag=True, help="time every kernel and store the times for this GPU"
)
@click.option(
    "--out", "path", type=click.Path(path_type=Path, dir_okay=False), help="write JSON to this file"
)
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def bench(
    patterns: tuple[Pattern, ...],
    shapes: tuple[tuple[int, ...], ...],
    batches: tuple[int, ...],
    dtype: str | None,
    device: str | None,
    calibrate: bool,
    path: Path | None,
    as_json: bool,
) -> None:
    """Time compressed against dense linear layers on this machine.

    lean holds only the compressed weight, fast may hold a second form of it (set_memory_).
    """
    from s3tensor import benchmark
    from s3tensor.files import write_output

    place = device or default_device()
    if any(len(shape) != 2 for shape in shapes):
        raise Refused("--shape needs two dims, such as 4096x4096")
    if calibrate and not place.startswith("cuda"):
        raise Refused("--calibrate needs a CUDA device; on a CPU there is nothing to choose")
    suite = benchmark.Suite(
        tuple(str(pattern) for pattern in patterns)
        or (benchmark.CALIBRATED if calibrate else benchmark.FORMS[:1]),
        tuple((shape[0], shape[1]) for shape in shapes)
        or (benchmark.SHAPES if calibrate else benchmark.SHAPES[5:7]),
        tuple(sorted(set(batches))) or benchmark.BATCHES[: None if place != "cpu" else 5],
        dtype or ("float32" if place == "cpu" else "bfloat16"),
        place,
    )
    say = err.print if err.is_terminal or not as_json else (lambda line: None)
    with as_usage():
        suite.check()
    if path is not None:
        check_writable(path)
    if calibrate:
        saved = benchmark.calibrate(suite, say)
        click.echo(f"stored times of {place} in {saved}; they are used from now on")
        if path is not None:
            write_output(path, saved.read_text(encoding="utf-8"))
        return
    record = benchmark.run(suite, say)
    click.echo(json.dumps(record) if as_json else benchmark.table(record))
    if path is not None:
        write_output(path, json.dumps(record, indent=1) + "\n")
