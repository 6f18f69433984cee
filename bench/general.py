"""Matmul by any N:M and by dense blocks beside cuBLAS: answers checked, then microseconds and GB/s.

    python bench/general.py                                  # every pattern, batch and shape of the table
    python bench/general.py --patterns 4:8/bfloat16 --batches 1,16 --shapes 4096x4096
    python bench/general.py --tune                           # every configuration, the best first

Each time is the median of CUDA graph replays; a graph runs the product with enough copies of the weight
(400 MB of them) that none is found in L2. The rival is ``F.linear`` on the dense weight in the same dtype,
under the same conditions, without TF32 in float32. The floor is the bytes of the weight, x and y at the
bandwidth of a device copy or of a reduction, whichever is higher.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from measure import (
    DTYPES,
    KernelTable,
    compile_all,
    copies_of,
    exact_product,
    gpu,
    integers,
    kernel_parser,
    microseconds,
    relative_error,
    shapes,
)
from s3tensor.kernels import blocks, columns
from s3tensor.kernels.blocks import Blocks
from s3tensor.kernels.gather import Gather
from s3tensor.kernels.gpu import processors
from torch import Tensor

from s3tensor.mask.packing import unpack
from s3tensor.pattern import BoundPattern, Pattern

PATTERNS = (
    "1:4/bfloat16,4:8/bfloat16,2:8/bfloat16,8:16/bfloat16,2:4/float32,4:8/float32,1:4/float32,"
    "block:16x16@0.5/bfloat16,block:32x32@0.5/bfloat16,block:16x16@0.25/bfloat16"
)
SHAPES = "4096x4096,14336x4096,4096x14336"
BATCHES = "1,2,4,8,16,32,64"


def random_packed(bound: BoundPattern, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Values and indices of a random packed weight, and the dense weight."""
    values = torch.randn(bound.packed_shape, device="cuda", dtype=dtype)
    n = bound.blocks_per_scope
    order = torch.rand(bound.scopes, n, device="cuda").argsort(1)
    numbers = order[:, : bound.keep].sort(1).values
    if bound.index_code == "index":
        codes, width = numbers.flatten(), bound.index_bits
    else:
        kept = torch.zeros(bound.scopes, n, dtype=torch.int64, device="cuda")
        codes, width = kept.scatter_(1, numbers, 1).flatten(), 1
    bits = (codes.unsqueeze(-1) >> torch.arange(width, device="cuda") & 1).flatten()
    bits = F.pad(bits, (0, -len(bits) % 8)).reshape(-1, 8)
    indices = (bits << torch.arange(8, device="cuda")).sum(1).to(torch.uint8)
    return values, indices, unpack(values, indices, bound)


def product(bound: BoundPattern, config: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """``linear`` on x, values and indices."""
    rows, width = bound.shape
    if bound.block == (1, 1):
        return partial(
            _columns, keep=bound.keep, group=bound.blocks_per_scope, rows=rows, columns=width,
            config=config,
        )  # fmt: skip
    height, across = bound.block
    return partial(
        _blocks, block_rows=height, block_columns=across, keep=bound.keep, rows=rows, columns=width,
        config=config,
    )  # fmt: skip


def _columns(x: Tensor, values: Tensor, indices: Tensor, **ints: Any) -> Tensor:
    return columns.linear(x, values, indices, None, **ints)


def _blocks(x: Tensor, values: Tensor, indices: Tensor, **ints: Any) -> Tensor:
    return blocks.linear(x, values, indices, None, **ints)


def chosen(bound: BoundPattern, dtype: torch.dtype, n: int) -> Any:
    count = processors(gpu())
    rows, width = bound.shape
    if bound.block != (1, 1):
        return blocks.choose(dtype, n, rows, count)
    return columns.choose(bound.keep, bound.blocks_per_scope, dtype, n, rows, width, count)


def configurations(bound: BoundPattern, dtype: torch.dtype, n: int, tune: bool) -> list[Any]:
    """The one chosen for ``n`` rows of x; with ``tune`` all others worth trying, too."""
    found: list[Any] = [chosen(bound, dtype, n)]
    if not tune:
        return found
    if bound.block != (1, 1):
        batch = min(64, max(8, 1 << (n - 1).bit_length()))
        if dtype == torch.float32:
            found += [Blocks(w, 16, 32, min(batch, 32), s) for w in (4, 8) for s in (3, 4)]
        elif n <= 16:
            found += [Blocks(w, r, 64, batch, s) for w in (4, 8) for r in (16, 32) for s in (5, 7)]
            found += [Blocks(4, 16, 128, batch, 5), Blocks(16, 16, 64, batch, 5)]
        else:
            found += [Blocks(4, r, 64, batch, s) for r in (16, 32) for s in (4, 5)]
            found += [Blocks(8, 32, 64, batch, 4), Blocks(8, 64, 64, min(batch, 32), 4)]
        return list(dict.fromkeys(found))
    group, width = bound.blocks_per_scope, bound.shape[1]
    if columns.runs_take(bound.keep, group, dtype, width):
        from s3tensor.kernels.runs import RUNS, Runs

        full = 32 // RUNS[bound.keep, group]
        if n <= 16:
            batch = 8 if n <= 8 else 16
            cuts = [(8, 1, full), (8, 1, 2 * full), (4, 1, full), (4, 1, 2 * full), (2, 1, full)]
            cuts += [(4, 2, full)]
            ahead = (False, True) if n <= 8 else (False,)
            found += [Runs(*cut, batch, a) for cut in cuts for a in ahead]
        else:
            found += [Runs(w, t, 1, 32) for w in (2, 4, 8) for t in (1, 2)]
            found += [Runs(4, 1, 1, 16), Runs(4, 2, 1, 16), Runs(4, 4, 1, 16)]
    if n <= 2 or not columns.runs_take(bound.keep, group, dtype, width):
        batch = min(8, 1 << (n - 1).bit_length())
        found += [Gather(w, batch, lanes) for w in (2, 4, 8) for lanes in (4, 8)]
        if n > 4:
            found += [Gather(4, 4), Gather(8, 4)]
    return list(dict.fromkeys(found))


Job = tuple[str, tuple[int, int], str, int, Any]  # pattern, shape, dtype, rows of x, configuration


def compile_one(job: Job) -> None:
    """Run a product on memory of any content."""
    pattern, shape, dtype, n, config = job
    bound = Pattern.parse(pattern).bind(shape)
    x = torch.zeros(n, shape[1], device="cuda", dtype=DTYPES[dtype])
    values = torch.zeros(bound.packed_shape, device="cuda", dtype=DTYPES[dtype])
    indices = torch.full((bound.index_bytes,), 0x55, device="cuda", dtype=torch.uint8)
    product(bound, config)(x, values, indices)


def by_width(jobs: list[Job]) -> list[list[Job]]:
    """Each kernel once, those of one number of columns together: the next need mostly the same kernels."""
    first: dict[Any, Job] = {}
    for job in jobs:
        pattern, shape, dtype, _, config = job
        first.setdefault((pattern, shape[1], dtype, config), job)
    widths = sorted({shape[1] for _, shape, *_ in jobs})
    return [[job for job in first.values() if job[1][1] == width] for width in widths]


def measure(
    bound: BoundPattern, dtype: str, batches: list[int], dense_us: dict[int, float], bandwidth: float,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of the table for one weight; ``dense_us`` keeps the rival's times for this shape and dtype."""
    kind = DTYPES[dtype]
    rows, width = bound.shape
    values, indices, weight = random_packed(bound, kind)
    packed_bytes = values.nbytes + indices.nbytes
    copies = copies_of(packed_bytes, options.megabytes)
    packed = [(values.clone(), indices.clone()) for _ in range(copies)]
    inputs = {n: torch.randn(n, width, device="cuda", dtype=kind) for n in batches}
    missing = [n for n in batches if n not in dense_us]
    if missing:
        count = copies_of(weight.nbytes, options.megabytes)
        dense = [weight.clone() for _ in range(count)]
        for n in missing:
            x = inputs[n]
            call = partial(_dense, x=x, dense=dense)
            dense_us[n] = microseconds(call, count, options.repeats)
    found = []
    for n in batches:
        x = inputs[n]
        exact = exact_product(x, weight)
        moved = packed_bytes + x.nbytes + n * rows * x.element_size()
        mine = []
        for config in configurations(bound, kind, n, options.tune):
            run = product(bound, config)
            try:
                error = relative_error(run(x, *packed[0]), exact)
                us = microseconds(
                    partial(_packed, run=run, x=x, packed=packed), copies, options.repeats
                )
            except Exception as failure:
                if not options.tune:
                    raise
                print(f"  {config}: {str(failure)[:120]}")
                continue
            if not error < (1e-5 if dtype == "float32" else 5e-3):
                raise SystemExit(f"wrong: {bound} {dtype} batch {n} {config}: error {error:.2e}")
            mine.append(
                {
                    "pattern": str(bound.pattern), "dtype": dtype, "rows": rows, "columns": width,
                    "batch": n, "config": str(config), "us": us, "gb_per_s": moved / us / 1e3,
                    "floor_us": moved / bandwidth * 1e6, "dense_us": dense_us[n],
                    "ratio": dense_us[n] / us, "error": error,
                }
            )  # fmt: skip
        found += mine
        for r in sorted(mine, key=lambda r: r["us"])[: options.best]:
            is_chosen = r["config"] == str(chosen(bound, kind, n))
            print(
                f"{r['pattern']:15} {dtype:8} {rows}x{width} batch {n:2}: {r['us']:7.2f} us "
                f"{r['gb_per_s']:5.0f} GB/s floor {r['floor_us']:6.2f} dense {r['dense_us']:7.2f} = "
                f"{r['ratio']:.2f}x  {'*' if is_chosen else ' '} {r['config']}",
                flush=True,
            )
    return found


def _dense(i: int, x: Tensor, dense: list[Tensor]) -> Tensor:
    return F.linear(x, dense[i])


def _packed(
    i: int, run: Callable[..., Tensor], x: Tensor, packed: list[tuple[Tensor, Tensor]]
) -> Tensor:
    return run(x, *packed[i])


def main() -> None:
    parser = kernel_parser(__doc__, best=2, megabytes=400, repeats=7)
    parser.add_argument("--patterns", default=PATTERNS, help="PATTERN/DTYPE,...")
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--batches", default=BATCHES)
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    began = time.time()
    cases = [tuple(case.rsplit("/", 1)) for case in options.patterns.split(",")]
    batches = integers(options.batches)
    jobs = [
        (pattern, shape, dtype, n, config)
        for (pattern, dtype), shape, n in itertools.product(cases, shapes(options.shapes), batches)
        for config in configurations(
            Pattern.parse(pattern).bind(shape), DTYPES[dtype], n, options.tune
        )
    ]
    compile_all(compile_one, *by_width(jobs))
    table = KernelTable("general", options, began)
    bandwidth = max(table.copy, table.read)
    dense_us: dict[Any, dict[int, float]] = {}
    for shape, (pattern, dtype) in table.within(itertools.product(shapes(options.shapes), cases)):
        bound = Pattern.parse(pattern).bind(shape)
        rival = dense_us.setdefault((shape, dtype), {})
        table.add(measure(bound, dtype, batches, rival, bandwidth, options))
    print("\ngeometric mean over the shapes of the ratio to dense, of the fastest configuration")
    for pattern, dtype in cases:
        print(f"{pattern:15} {dtype:8}  {table.means(batches, pattern=pattern, dtype=dtype)}")
    print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
