"""Matmul by a packed weight beside cuBLAS: answers checked, then microseconds, GB/s and the floor.

    python bench/matmul.py                              # every form, batch and shape of the table
    python bench/matmul.py --forms 2:4 --batches 1,16 --shapes 4096x4096
    python bench/matmul.py --tune --forms 2:4           # every configuration, the best first

Each time is the median of CUDA graph replays; a graph runs the product with enough copies of the weight
(400 MB of them) that none is found in L2. The rivals are ``F.linear`` on the dense weight, under the
same conditions, and for 2:4 cuSPARSELt through ``torch._cslt_sparse_mm`` where torch has it. ``overlap``
is programmatic dependent launch: a product starts to read its weight while the one before it drains; the
rivals do not use it. The floor is the bytes of the weight, x and y at the bandwidth of a device
copy or of a reduction, whichever is higher.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
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
from s3tensor.kernels import matmul, tiles
from s3tensor.kernels.gpu import processors
from s3tensor.kernels.skinny import Skinny
from s3tensor.kernels.wide import Wide
from torch import Tensor

from s3tensor.mask.packing import unpack
from s3tensor.pattern import Pattern

SHAPES = "4096x4096,14336x4096,4096x14336,2560x9728,28672x8192"
BATCHES = "1,2,4,8,16,32,64,128"
NIBBLES = torch.tensor([4, 8, 9, 12, 13, 14], dtype=torch.uint8)  # i0 | i1 << 2


def random_packed(
    form: str, rows: int, columns: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Values and codes of a random packed weight, in canonical order, and the dense weight."""
    bound = Pattern.parse(form).bind((rows, columns))
    values = torch.randn(bound.packed_shape, device="cuda", dtype=dtype)
    if form == "rowpair16":
        codes = torch.randint(0, 256, (bound.index_bytes,), device="cuda", dtype=torch.uint8)
    else:
        pick = torch.randint(0, 6, (2, bound.index_bytes), device="cuda", dtype=torch.uint8)
        low, high = NIBBLES.cuda()[pick.int()]
        codes = low | high << 4
    return values, codes, unpack(values, codes, bound)


def cut_choices(n: int) -> list[Skinny | Wide]:
    """Configurations worth trying for ``n`` rows of x."""
    found: list[Skinny | Wide] = []
    if n <= 16:
        batch = 8 if n <= 8 else 16
        cuts = [(8, 1, 2), (4, 1, 2), (2, 1, 2), (4, 1, 4), (8, 1, 4), (8, 2, 2), (4, 2, 2)]
        if n > 8:
            cuts += [(2, 2, 1), (4, 2, 1), (8, 2, 1)]
        for cut, ahead in itertools.product(cuts, (False, True)):
            found.append(Skinny(1, *cut, batch, 1, ahead))
        for warps, split in ((8, 2), (4, 2), (8, 4)):
            found.append(Skinny(1, warps, 1, 2, batch, split, True))
        if n > 8:
            found += [Wide(8, 2, 16), Wide(4, 2, 16), Wide(4, 2, 16, 2), Wide(8, 2, 16, 2)]
        return found
    batch = 32 if n <= 32 else 64 if n <= 64 else 128
    cuts = [(4, 2, 4), (4, 2, 5), (8, 2, 4), (16, 1, 4), (16, 2, 4)]
    for (warps, units, stages), split in itertools.product(cuts, (1, 2, 3, 4, 6, 8)):
        if batch == 128 and warps * units * stages > 64:
            continue  # more shared memory than there is
        found.append(Wide(warps, units, batch, split, stages))
    return found


Job = tuple[
    Any, int, int, int, str, Any, bool
]  # form, rows, columns, rows of x, dtype, config, overlap


def compile_one(job: Job) -> None:
    """Run a product on memory of any content."""
    form, rows, columns, n, dtype, config, overlap = job
    x = torch.zeros(n, columns, device="cuda", dtype=DTYPES[dtype])
    values = torch.zeros(rows * columns // 2, device="cuda", dtype=DTYPES[dtype])
    codes = torch.zeros(tiles.code_bytes(form, rows, columns), device="cuda", dtype=torch.uint8)
    matmul.linear(
        x, values, codes, None, form=form, rows=rows, columns=columns, tiled=True,
        overlap=overlap, config=config,
    )  # fmt: skip


def once(jobs: list[Job]) -> list[Job]:
    """Each kernel once."""
    first: dict[Any, Job] = {}
    for form, rows, columns, n, dtype, config, overlap in jobs:
        cut = config or chosen(form, n, rows, columns)
        even = rows % cut.rows == 0 and columns % cut.columns == 0
        job = form, rows, columns, n, dtype, cut, overlap
        first.setdefault((form, dtype, cut, overlap, even), job)
    return list(first.values())


def chosen(form: tiles.Form, n: int, rows: int, columns: int) -> Skinny | Wide:
    capability = torch.cuda.get_device_capability()
    count = processors(gpu())
    return matmul.choose(form, n, rows, columns, True, capability, count)


def rival_sparse(dense: list[Tensor], x: Tensor, repeats: int) -> float | None:
    """cuSPARSELt on the 2:4 weight; x is padded to 16 rows."""
    try:
        packed = [torch._cslt_compress(w) for w in dense]
        padded = F.pad(x, (0, 0, 0, -len(x) % 16)).t()
        return microseconds(
            lambda i: torch._cslt_sparse_mm(packed[i], padded), len(packed), repeats
        )
    except (AttributeError, RuntimeError) as error:
        print(f"  no cuSPARSELt: {str(error)[:100]}")
        return None


def measure(
    form: Any, rows: int, columns: int, batches: list[int], dtype: str, options: argparse.Namespace,
    bandwidth: float,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of the table for one weight."""
    values, codes, weight = random_packed(form, rows, columns, DTYPES[dtype])
    values = tiles.tile_values(values, form, rows, columns)
    codes = tiles.tile_codes(codes, form, rows, columns)
    packed_bytes = values.nbytes + codes.nbytes
    copies = copies_of(packed_bytes, options.megabytes)
    packed = [(values.clone(), codes.clone()) for _ in range(copies)]
    dense = [weight.clone() for _ in range(copies_of(weight.nbytes, options.megabytes))]
    found = []
    for n in batches:
        x = torch.randn(n, columns, device="cuda", dtype=DTYPES[dtype])
        exact = exact_product(x, weight)
        before, extra_us = x, 0.0
        if options.chain:
            before = x.neg()
            extra_us = microseconds(
                lambda _, x=x, before=before: torch.neg(before, out=x), copies, options.repeats
            )

        def make_x(x: Tensor = x, before: Tensor = before) -> None:
            if options.chain:
                torch.neg(before, out=x)

        def dense_call(i: int, x: Tensor = x, make_x: Callable[[], None] = make_x) -> Tensor:
            make_x()
            return F.linear(x, dense[i])

        dense_us = microseconds(dense_call, len(dense), options.repeats) - extra_us
        sparse_us = None
        if form == "2:4" and n >= 16 and not options.tune:
            sparse_us = rival_sparse(dense, x, options.repeats)
        moved = packed_bytes + x.nbytes + n * rows * x.element_size()
        for config, overlap in itertools.product(
            cut_choices(n) if options.tune else [None], options.overlaps
        ):

            def call(
                i: int,
                x: Tensor = x,
                config: Any = config,
                overlap: bool = overlap,
                make_x: Callable[[], None] = make_x,
            ) -> Tensor:
                make_x()
                return matmul.linear(
                    x, *packed[i], None, form=form, rows=rows, columns=columns, tiled=True,
                    overlap=overlap, config=config,
                )  # fmt: skip

            try:
                error = relative_error(call(0), exact)
                us = microseconds(call, copies, options.repeats) - extra_us
            except Exception as failure:
                if not options.tune:
                    raise
                print(f"  {config}: {str(failure)[:120]}")
                continue
            if not error < 5e-3:
                raise SystemExit(
                    f"wrong: {form} {rows}x{columns} batch {n} {config}: error {error:.2e}"
                )
            found.append(
                {
                    "form": form, "rows": rows, "columns": columns, "dtype": dtype, "batch": n,
                    "overlap": overlap, "config": str(config or chosen(form, n, rows, columns)),
                    "us": us, "gb_per_s": moved / us / 1e3, "floor_us": moved / bandwidth * 1e6,
                    "dense_us": dense_us, "ratio": dense_us / us, "cusparselt_us": sparse_us,
                    "error": error,
                }
            )  # fmt: skip
        mine = [r for r in found if r["batch"] == n]
        for r in sorted(mine, key=lambda r: r["us"])[: options.best] if options.tune else mine:
            print(
                f"{form:10} {rows}x{columns} {dtype} batch {n:3} overlap {r['overlap']:1}: {r['us']:7.2f} us "
                f"{r['gb_per_s']:5.0f} GB/s floor {r['floor_us']:6.2f} dense {dense_us:7.2f} = "
                f"{r['ratio']:.2f}x"
                + (f" cuSPARSELt {sparse_us:.1f}" if sparse_us else "")
                + (f"  {r['config']}" if options.tune else ""),
                flush=True,
            )
    return found


def main() -> None:
    parser = kernel_parser(__doc__, best=3)
    add = parser.add_argument
    add("--forms", default=",".join(tiles.FORMS))
    add("--shapes", default=SHAPES)
    add("--batches", default=BATCHES)
    add("--dtypes", default="bfloat16")
    add("--overlap", choices=("no", "yes", "both"), default="both")
    add(
        "--chain",
        action="store_true",
        help="an elementwise kernel writes x before each product, as in a model; its time is subtracted",
    )
    options = parser.parse_args()
    options.overlaps = {"no": [False], "yes": [True], "both": [False, True]}[options.overlap]
    began = time.time()
    batches = integers(options.batches)
    forms, dtypes = options.forms.split(","), options.dtypes.split(",")
    weights = list(itertools.product(forms, dtypes, shapes(options.shapes)))
    jobs = [
        (form, *shape, n, dtype, config, overlap)
        for (form, dtype, shape), n in itertools.product(weights, batches)
        for config in (cut_choices(n) if options.tune else [None])
        for overlap in options.overlaps
    ]
    compile_all(compile_one, once(jobs))
    table = KernelTable("matmul", options, began)
    bandwidth = max(table.copy, table.read)
    for form, dtype, (rows, columns) in table.within(weights):
        table.add(measure(form, rows, columns, batches, dtype, options, bandwidth))
    if not options.tune:
        print("\ngeometric mean of the ratio to dense over the shapes")
        for form, dtype, overlap in itertools.product(forms, dtypes, options.overlaps):
            means = table.means(batches, form=form, dtype=dtype, overlap=overlap)
            print(f"{form:10} {dtype} overlap {overlap:1}  {means}")


if __name__ == "__main__":
    main()
