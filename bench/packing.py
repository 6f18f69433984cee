"""Between dense and packed: answers checked, then microseconds, GB/s and the ratio to a device copy.

    python bench/packing.py            # unpack, pack and gather, and unpack followed by cuBLAS
    python bench/packing.py --tune     # every configuration of every kernel, the best first

Each time is the median of CUDA graph replays over enough copies (450 MB read and written) that nothing is
found in L2; every copy has an output of its own. GB/s counts each byte of values, codes, mask and dense
weight once; of rowpair16 and of blocks only what is kept is read of the dense weight, and counts. The
rivals are the torch code of ``s3tensor.mask.packing`` and, for 2:4, torch's own conversions; as they may wait
for the device, they run without a graph.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from measure import KernelTable, compile_all, copies_of, eager_microseconds, kernel_parser, shapes
from measure import microseconds as replayed
from s3tensor.kernels import pack as pack_kernels
from s3tensor.kernels import tiles
from s3tensor.kernels import unpack as unpack_kernels
from torch import Tensor

import s3tensor as s3
from s3tensor.mask import packing
from s3tensor.pattern import BoundPattern, Pattern

microseconds = partial(replayed, keep=True)  # each copy has an output of its own

SHAPES = "4096x4096,14336x4096,2560x9728,28672x8192"
PACK_SHAPE = (14336, 4096)
TUNE_SHAPES = ((4096, 4096), (14336, 4096))
OTHERS = ("1:4", "4:8", "8:16")
BLOCKS = ("block:16x16@0.5", "block:32x32@0.5")
BATCHES = (128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Case:
    """One operation: its name, pattern and order, and the configurations that it may run under."""

    what: str  # unpack, pack or gather
    pattern: str
    tiled: bool = False

    @property
    def configs(self) -> list[Any]:
        if self.pattern in BLOCKS:
            return [None]
        if self.pattern not in tiles.FORMS:
            kind = unpack_kernels.Columns if self.what == "unpack" else pack_kernels.PackColumns
            return [kind(n, warps) for n in (1024, 2048, 4096, 8192) for warps in (4, 8)]
        if self.what == "unpack":
            return [unpack_kernels.Unpack(n, k) for n in (128, 256, 512) for k in (1, 2, 4)]
        return [pack_kernels.Pack(n) for n in (128, 256, 512)]

    def call(self, data: Data, config: Any = None) -> Any:
        keep, of = data.bound.keep, data.bound.blocks_per_scope
        form: Any = self.pattern
        rows, columns = data.bound.shape
        if self.pattern in BLOCKS:  # with the torch code that reads the indices
            if self.what == "unpack":
                return packing.unpack(data.values, data.codes, data.bound)
            return packing.gather(data.weight, data.codes, data.bound).flatten()
        if self.pattern in tiles.FORMS:
            if self.what == "unpack":
                return unpack_kernels.unpack(
                    data.values, data.codes, form=form, rows=rows, columns=columns,
                    tiled=self.tiled, config=config,
                )  # fmt: skip
            if self.what == "pack":
                return pack_kernels.pack(
                    data.weight, data.mask, form=form, tiled=self.tiled, config=config
                )
            return pack_kernels.gather(
                data.weight, data.codes, form=form, tiled=self.tiled, config=config
            )
        if self.what == "unpack":
            return unpack_kernels.columns(
                data.values, data.codes, keep=keep, of=of, config=config
            ).reshape(rows, columns)
        if self.what == "pack":
            return pack_kernels.pack_columns(
                data.weight, data.mask, keep=keep, of=of, config=config
            )
        return pack_kernels.gather_columns(data.weight, data.codes, keep=keep, of=of, config=config)

    def moved(self, data: Data) -> int:
        """Bytes read and written."""
        packed = data.values.nbytes + data.codes.nbytes
        if self.what == "unpack":
            return packed + data.weight.nbytes
        # All sectors of the dense tensor but those of rows that are not kept.
        rows = 2 if self.pattern == "rowpair16" else 1
        mask = 0 if self.what == "gather" else data.mask.nbytes
        return packed + mask + data.weight.nbytes // rows


@dataclass
class Data:
    """A weight that satisfies its pattern, its mask and its packed parts."""

    bound: BoundPattern
    weight: Tensor
    mask: Tensor
    values: Tensor
    codes: Tensor

    def copy(self) -> Data:
        return Data(self.bound, *(t.clone() for t in self.tensors))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.weight, self.mask, self.values, self.codes


def make(pattern: str, rows: int, columns: int, tiled: bool) -> Data:
    bound = Pattern.parse(pattern).bind((rows, columns))
    weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    mask = s3.project(weight, pattern)
    weight = torch.where(mask, weight, 0)
    with by_torch():
        values, codes = packing.pack(weight, mask, bound, tiled=tiled)
    return Data(bound, weight, mask, values, codes)


class by_torch:
    """Let ``packing`` use its torch code alone."""

    def __enter__(self) -> None:
        self.kernels = packing._kernels
        packing._kernels = lambda *tensors: None  # type: ignore[assignment]

    def __exit__(self, *error: object) -> None:
        packing._kernels = self.kernels


def check(case: Case, data: Data, config: Any = None) -> None:
    """Stop unless the kernel gives the reference's bytes."""
    found = case.call(data, config)
    if case.what == "unpack":
        good = torch.equal(found, data.weight)
    elif case.what == "pack":
        good = not int(found[2]) and torch.equal(found[0], data.values.flatten())
        good = good and torch.equal(found[1], data.codes)
    else:
        good = torch.equal(found, data.values.flatten())
    if not good:
        raise SystemExit(f"wrong: {case} on {data.bound} {config}")


def rivals(case: Case, data: Data) -> dict[str, float]:
    """Microseconds of other code for the same task; what fails is left out, with a line that says why."""
    calls: dict[str, Callable[[], Any]] = {}

    def reference() -> Any:
        with by_torch():
            if case.what == "unpack":
                return packing.unpack(data.values, data.codes, data.bound)
            if case.what == "pack":
                return packing.pack(data.weight, data.mask, data.bound)
            return packing.gather(data.weight, data.codes, data.bound)

    if not case.tiled:
        calls["torch_us"] = reference
    if case.pattern == "2:4" and not case.tiled and case.what == "pack":
        calls["cslt_compress_us"] = lambda: torch._cslt_compress(data.weight)
        calls["semi_structured_us"] = lambda: torch.sparse.to_sparse_semi_structured(data.weight)
    if case.pattern == "2:4" and not case.tiled and case.what == "unpack":
        calls["semi_structured_us"] = lambda made=[]: _semi_structured(data, made)
    found = {}
    for name, call in calls.items():
        try:
            found[name] = eager_microseconds(lambda _, call=call: call(), 1, 5)
        except Exception as error:
            print(f"  no {name}: {str(error)[:100]}")
    return found


def _semi_structured(data: Data, made: list[Any]) -> Tensor:
    """torch's own semi-structured tensor, CUTLASS's form of it, back to dense."""
    if not made:
        kind = torch.sparse.SparseSemiStructuredTensorCUTLASS
        made.append(kind.from_dense(data.weight))
    return made[0].to_dense()


def cases() -> Iterator[tuple[Case, tuple[int, int]]]:
    for form in tiles.FORMS:
        for tiled in (True, False):
            for shape in shapes(SHAPES):
                yield Case("unpack", form, tiled), shape
    for what in ("pack", "gather"):
        for form in tiles.FORMS:
            for tiled in (False, True):
                yield Case(what, form, tiled), PACK_SHAPE
    for pattern in OTHERS:
        for what in ("unpack", "pack", "gather"):
            yield Case(what, pattern), PACK_SHAPE
    for pattern in BLOCKS:
        for what in ("unpack", "gather"):
            yield Case(what, pattern), PACK_SHAPE


def compile_one(job: tuple[Case, Any]) -> None:
    """Run a kernel on a small weight."""
    case, config = job
    case.call(make(case.pattern, 64, 128, case.tiled), config)


def measure(
    case: Case, data: Data, options: argparse.Namespace, copy: float
) -> list[dict[str, Any]]:
    """Rows of the table, the fastest configuration first."""
    rows, columns = data.bound.shape
    moved = case.moved(data)
    copies = copies_of(moved, options.megabytes)
    all_data = [data] + [data.copy() for _ in range(copies - 1)]
    found: list[dict[str, Any]] = []
    for config in case.configs if options.tune else [None]:
        try:
            check(case, data, config)
            us = microseconds(
                lambda i, config=config: case.call(all_data[i], config), copies, options.repeats
            )
        except RuntimeError as error:
            print(f"  {case} {config}: {str(error)[:120]}")
            continue
        row = {
            "what": case.what, "pattern": case.pattern, "tiled": case.tiled, "rows": rows,
            "columns": columns, "config": str(config), "us": us, "gb_per_s": moved / us / 1e3,
            "of_copy": moved / us * 1e6 / copy,
        }  # fmt: skip
        found.append(row)
    found.sort(key=lambda row: row["us"])
    if not options.tune and (rows, columns) == PACK_SHAPE:
        found[0] |= rivals(case, data)
    for row in found[: options.best] if options.tune else found:
        others = "  ".join(f"{k[:-3]} {v:.0f} us" for k, v in row.items() if k[-3:] == "_us")
        print(
            f"{case.what:6} {case.pattern:10} {'tiles' if case.tiled else 'rows ':5} {rows}x{columns}: "
            f"{row['us']:7.2f} us {row['gb_per_s']:5.0f} GB/s = {row['of_copy']:.2f} of a copy  "
            f"{others}{row['config'] if options.tune else ''}",
            flush=True,
        )
    return found


def with_cublas(options: argparse.Namespace) -> list[dict[str, Any]]:
    """``F.linear`` on a weight that is unpacked for each call, beside the dense weight."""
    found = []
    case = Case("unpack", "2:4", tiled=True)
    for rows, columns in shapes(SHAPES):
        data = make("2:4", rows, columns, tiled=True)
        check(case, data)
        copies = copies_of(data.weight.nbytes, options.megabytes)
        all_data = [data] + [data.copy() for _ in range(copies - 1)]
        line = []
        for batch in BATCHES:
            x = torch.randn(batch, columns, device="cuda", dtype=torch.bfloat16)

            def dense(i: int, x: Tensor = x, weights: list[Data] = all_data) -> None:
                F.linear(x, weights[i].weight)

            def packed(i: int, x: Tensor = x, weights: list[Data] = all_data) -> None:
                F.linear(x, case.call(weights[i]))  # one scratch for all, as in a model

            times = microseconds(dense, copies, 5), microseconds(packed, copies, 5)
            found.append(
                {
                    "what": "unpack and cuBLAS", "pattern": "2:4", "rows": rows,
                    "columns": columns, "batch": batch, "dense_us": times[0], "us": times[1],
                    "ratio": times[0] / times[1],
                }
            )  # fmt: skip
            line.append(f"{batch}: {times[1]:.0f} / {times[0]:.0f} = {times[0] / times[1]:.2f}x")
        print(f"unpack + cuBLAS / dense, us, 2:4 {rows}x{columns}  " + "  ".join(line), flush=True)
        del data, all_data, dense, packed
        torch.cuda.empty_cache()
    return found


def main() -> None:
    options = kernel_parser(__doc__, best=3).parse_args()
    began = time.time()
    work = list(cases())
    if options.tune:
        work = [
            (case, shape)
            for case, at in work
            if at == PACK_SHAPE
            for shape in (TUNE_SHAPES if case.what == "unpack" else (PACK_SHAPE,))
        ]
    jobs = dict.fromkeys(
        (case, config) for case, _ in work for config in (case.configs if options.tune else [None])
    )
    compile_all(compile_one, jobs)
    table = KernelTable("packing", options, began)
    data: tuple[Any, Data] | None = None
    for case, shape in table.within(work):
        key = case.pattern, case.tiled, shape
        if data is None or data[0] != key:
            data = None  # before the next is made: the two may not fit
            torch.cuda.empty_cache()
            data = key, make(case.pattern, *shape, case.tiled)
        table.add(measure(case, data[1], options, table.copy))
    if not options.tune:
        data = None
        table.add(with_cublas(options))
    print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
