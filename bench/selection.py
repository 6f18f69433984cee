"""Selection on a GPU: answers checked, then microseconds, GB/s and the ratio to a device copy.

    python bench/selection.py            # masks by projection, order statistics of rows and their rivals
    python bench/selection.py --tune     # every configuration of every case, the best first

Each time is the median of CUDA graph replays over enough copies (450 MB read) that nothing is found in
L2; every copy has an output of its own. GB/s counts each byte of weight and mask, or of rows and results,
once. A projection is the kernel with its flag of NaN and Inf; ``s3tensor.project`` then also waits to read
the flag. The rivals of ``kth_largest`` are torch.topk (its k largest, not sorted), torch.kthvalue and, where
it can be imported, the function of that name in sparsekit; one that a graph cannot hold runs without, and
its row says so.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import itertools
import math
import pkgutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from measure import KernelTable, compile_all, copies_of, eager_microseconds, kernel_parser
from measure import microseconds as replayed
from s3tensor.kernels import masks, select
from torch import Tensor

import s3tensor as s3
from s3tensor.mask import projection as masking
from s3tensor.pattern import Pattern

microseconds = partial(replayed, keep=True)  # each copy has an output of its own

BF16, F32 = torch.bfloat16, torch.float32
SHAPE = (14336, 4096)
PROJECTIONS = (
    ("2:4", BF16), ("2:4", F32), ("1:4", BF16), ("4:8", BF16), ("pair4:8", BF16), ("coupled2:4", BF16),
    ("rowpair16", BF16), ("8:16", BF16), ("8:32", BF16), ("unstructured@0.5", BF16),
)  # fmt: skip
LENGTHS = (64, 256, 1024, 8192)
MEGABYTES = 64  # of the rows of an order statistic
BAR = 0.7  # of the copy's bandwidth, for 2:4


# Projections ------------------------------------------------------------------------------------------


def projection(pattern: str, cut: Any = None) -> Callable[[Tensor], Tensor]:
    """The kernel that ``s3tensor.project`` takes for this pattern, without the look at its flag."""
    bound = Pattern.parse(pattern).bind(SHAPE)
    layout = masking.stretches(bound)
    assert layout is not None, pattern
    where = masks.Stretches(**layout)
    if masks.covers(where, BF16):
        return lambda weight: masks.project(weight, where, bound.keep, cut)[0]
    n = bound.blocks_per_scope
    return lambda weight: select.top_blocks(weight.view(-1, n), bound.keep, True, cut).view(SHAPE)


def projection_cuts(pattern: str, dtype: torch.dtype) -> list[Any]:
    bound = Pattern.parse(pattern).bind(SHAPE)
    layout = masking.stretches(bound)
    assert layout is not None, pattern
    where = masks.Stretches(**layout)
    if not masks.covers(where, dtype):
        return row_cuts(bound.blocks_per_scope, dtype)
    size = where.length * where.count
    found = []
    for warps in (2, 4, 8):
        for a_thread in (8, 16, 32, 64):
            scopes = 32 * warps * max(1, a_thread // size)
            if masks.Cut(scopes, warps) not in found:
                found.append(masks.Cut(scopes, warps))
    return found


def torch_mask(weight: Tensor, pattern: str) -> Tensor:
    """By the torch code, a part of the rows at a time."""
    on_gpu = masking.on_plain_gpu
    masking.on_plain_gpu = lambda x: False
    try:
        return torch.cat([s3.project(rows, pattern) for rows in weight.split(1024)])
    finally:
        masking.on_plain_gpu = on_gpu


def measure_projection(
    pattern: str, dtype: torch.dtype, options: argparse.Namespace, copy: float
) -> list[dict[str, Any]]:
    weight = torch.randn(SHAPE, device="cuda").to(dtype)
    copies = copies_of(weight.nbytes, options.megabytes)
    weights = [torch.randn(SHAPE, device="cuda").to(dtype) for _ in range(copies)]
    moved = weight.nbytes + weight.numel()
    expected = torch.cat([torch_mask(rows.double(), pattern) for rows in weight.split(1024)])
    torch_us = None
    if not options.tune and pattern == "2:4":
        torch_us = eager_microseconds(lambda i: torch_mask(weights[i], pattern), copies, 3)
    found = []
    for cut in projection_cuts(pattern, dtype) if options.tune else [None]:
        call = projection(pattern, cut)
        try:
            right = torch.equal(call(weight), expected)
            us = microseconds(lambda i, call=call: call(weights[i]), copies, options.repeats)
        except Exception as failure:
            if not options.tune:
                raise
            print(f"  {pattern} {cut}: {str(failure)[:120]}")
            continue
        if not right:
            raise SystemExit(f"wrong: project {pattern} {dtype} {cut}")
        found.append(
            {
                "what": "project", "pattern": pattern, "shape": SHAPE, "dtype": str(dtype), "cut": str(cut),
                "us": us, "gb_per_s": moved / us / 1e3, "of_copy": moved * 1e6 / us / copy,
                "torch_us": torch_us,
            }
        )  # fmt: skip
    found.sort(key=lambda row: row["us"])
    for row in found[: options.best] if options.tune else found:
        print(
            f"project {pattern:17} {dtype!s:15} {row['us']:8.1f} us {row['gb_per_s']:5.0f} GB/s "
            f"{row['of_copy']:.2f} of copy"
            + (f", torch code {torch_us:.0f} us" if torch_us else "")
            + (f"  {row['cut']}" if options.tune else ""),
            flush=True,
        )
    return found


# Order statistics -------------------------------------------------------------------------------------


def row_cuts(n: int, dtype: torch.dtype) -> list[Any]:
    vector = 16 // dtype.itemsize
    found = []
    for held in (8, 16, 32, 64):  # values a lane
        lanes = n // held if n >= held else 1
        if n & (n - 1) or lanes < 1 or lanes > 1024 or n // lanes < vector:
            continue
        for warps in (1, 2, 4) if lanes <= 32 else (1,):
            cut = select.Cut(lanes, vector, warps)
            if cut not in found:
                found.append(cut)
    return found or [select.choose(n, dtype.itemsize)]


def sparsekit_function() -> Callable[..., Any] | None:
    """Its ``kth_largest``, the one nearest to a kernel, or None."""
    try:
        package = importlib.import_module("sparsekit")
        names = [m.name for m in pkgutil.walk_packages(package.__path__, "sparsekit.")]
    except Exception:
        return None
    for name in sorted(names, key=lambda name: "kernel" not in name):
        try:
            found = getattr(importlib.import_module(name), "kth_largest", None)
            if found is not None and {"x", "k", "dim"} <= set(inspect.signature(found).parameters):
                return found
        except Exception:
            continue
    return None


def rivals(k: int, n: int) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    yield "topk", lambda x: x.topk(k, dim=1, sorted=False).values
    yield "kthvalue", lambda x: x.kthvalue(n - k + 1, dim=1).values
    theirs = sparsekit_function()
    if theirs is not None:
        yield "sparsekit", lambda x: theirs(x, k, dim=1)


def measure_rows(
    n: int, dtype: torch.dtype, options: argparse.Namespace, copy: float
) -> list[dict[str, Any]]:
    rows = int(MEGABYTES * 1e6) // (n * dtype.itemsize)
    copies = max(2, math.ceil(options.megabytes / MEGABYTES))
    tensors = [torch.randn(rows, n, device="cuda").to(dtype) for _ in range(copies)]
    moved = tensors[0].nbytes + rows * dtype.itemsize
    ranked = tensors[0].sort(dim=1, descending=True).values
    found = []
    for k in (n // 2, n // 8):
        times: dict[str, float] = {}
        if not options.tune:
            for name, call in rivals(k, n):
                times.update(rival_times(name, call, tensors, ranked[:, k - 1]))
        mine = []
        for cut in row_cuts(n, dtype) if options.tune else [None]:
            y = select.kth_largest(tensors[0], k, cut)
            if not torch.equal(y, ranked[:, k - 1]):
                raise SystemExit(f"wrong: kth_largest of {rows} x {n} {dtype}, k={k}, {cut}")
            us = microseconds(
                lambda i, k=k, cut=cut: select.kth_largest(tensors[i], k, cut),
                copies,
                options.repeats,
            )
            mine.append(
                {
                    "what": "kth_largest", "rows": rows, "n": n, "k": k, "dtype": str(dtype),
                    "cut": str(cut or select.choose(n, dtype.itemsize)), "us": us,
                    "gb_per_s": moved / us / 1e3, "of_copy": moved * 1e6 / us / copy, "rivals_us": times,
                }
            )  # fmt: skip
        mine.sort(key=lambda row: row["us"])
        for row in mine[: options.best] if options.tune else mine:
            fastest = f" fastest {min(times.values()) / row['us']:.1f}x" if times else ""
            print(
                f"kth_largest {rows:6} x {n:4} k={k:4} {dtype!s:15} {row['us']:7.1f} us "
                f"{row['gb_per_s']:5.0f} GB/s {row['of_copy']:.2f} of copy;"
                + "".join(f" {name} {us:.0f} us" for name, us in times.items())
                + (fastest if not times or min(times.values()) > row["us"] else " NOT THE FASTEST")
                + (f"  {row['cut']}" if options.tune else ""),
                flush=True,
            )
        if not options.tune:
            mine[0]["mid_us"] = microseconds(
                lambda i, k=k: select.two_largest(tensors[i], k), copies, options.repeats
            )
            print(f"  and the next, for mid_kth_largest: {mine[0]['mid_us']:.1f} us", flush=True)
        found += mine
    return found


def rival_times(
    name: str, call: Callable[[Tensor], Tensor], tensors: list[Tensor], expected: Tensor
) -> dict[str, float]:
    """By name, with a note where the answer or the conditions differ; empty where it fails."""
    try:
        y = call(tensors[0])
        kth = y.amin(1) if y.ndim == 2 and y.shape[1] > 1 else y.reshape(-1)
        if not torch.equal(kth, expected):
            off = (kth.float() - expected.float()).abs().max().item()
            name += f" (off by {off:.0e})"
        once = eager_microseconds(lambda i: call(tensors[i]), len(tensors), 1)
        if once > 20_000:  # launches no longer matter
            return {name: once}
        try:
            return {name: microseconds(lambda i: call(tensors[i]), len(tensors), 3)}
        except Exception:
            torch.cuda.synchronize()
            us = eager_microseconds(lambda i: call(tensors[i]), len(tensors), 5)
            return {f"{name} (no graph)": us}
    except Exception as failure:
        print(f"  no {name}: {type(failure).__name__}: {str(failure)[:100]}")
        return {}


# ------------------------------------------------------------------------------------------------------


def compile_one(job: tuple[Any, ...]) -> None:
    """Run a case on memory of any content."""
    what, key, dtype, cut = job
    if what == "project":
        projection(key, cut)(torch.zeros(SHAPE, device="cuda", dtype=dtype))
        return
    x = torch.zeros(4, key, device="cuda", dtype=dtype)
    select.kth_largest(x, 1, cut)
    if cut is None:
        select.two_largest(x, 1)


def main() -> None:
    options = kernel_parser(__doc__, best=4).parse_args()
    began = time.time()
    of_rows = list(itertools.product(LENGTHS, (F32, BF16)))
    jobs: list[tuple[Any, ...]] = []
    for kind, cases, cuts in (
        ("project", PROJECTIONS, projection_cuts),
        ("rows", of_rows, row_cuts),
    ):
        for case in cases:
            jobs += [(kind, *case, cut) for cut in (cuts(*case) if options.tune else [None])]
    compile_all(compile_one, jobs)
    table = KernelTable("selection", options, began)
    for pattern, dtype in table.within(PROJECTIONS):
        table.add(measure_projection(pattern, dtype, options, table.copy))
    for n, dtype in table.within(of_rows):
        table.add(measure_rows(n, dtype, options, table.copy))
    if not options.tune:
        missed = [r for r in table.rows if r.get("pattern") == "2:4" and r["of_copy"] < BAR]
        print(f"2:4 at {BAR:.0%} of copy or above: {'no' if missed else 'yes'}")
    print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
