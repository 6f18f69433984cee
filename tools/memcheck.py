"""Run every kernel on small and odd sizes under a memory checker.

    python tools/memcheck.py --processes 8           # compile all kernels into the cache on disk
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tools/memcheck.py

Without PyTorch's cache each tensor is its own allocation, so that the checker sees a read past its end.
Results are also compared with the torch code.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
import time
from typing import Any

import torch
from torch import Tensor

import s3tensor as s3
from s3tensor.mask.packing import gather, pack, unpack
from s3tensor.tensor import linear as paths

FORMS = ("2:4", "coupled2:4", "pair4:8", "rowpair16")
ROWS = (1, 7, 8, 16, 17, 40, 64, 128)  # of x
Case = tuple[str, tuple[Any, ...]]


def cases() -> list[Case]:
    """(function, arguments) of every case."""
    found: list[Case] = []
    for form, shape in itertools.product(FORMS, ((16, 64), (48, 208), (272, 1088))):
        found += [("product", (form, shape, "bfloat16", ROWS))]
        found += [("product", (form, shape, "float16", ROWS[::3]))]
    for form, shape in itertools.product(FORMS, ((16, 64), (48, 192), (272, 1088))):
        found += [("product_group", (form, shape, "bfloat16", ROWS))]
    for form, shape in itertools.product(FORMS, ((16, 64), (48, 192), (272, 1088))):
        found += [("product_int8", (form, shape, "bfloat16", (*ROWS[:5], 32, 200)))]
        found += [("product_int8", (form, shape, "float16", (1, 16)))]
    for pattern, shape in (("2:4", (7, 176)), ("1:4", (19, 68)), ("block:16x16@0.5", (48, 112))):
        found += [("product_int8", (pattern, shape, "bfloat16", (1, 17)))]
    for form in FORMS[:3]:
        found += [("product", (form, (7, 176), "bfloat16", ROWS[::2]))]
    for pattern, columns in (("1:4", 68), ("4:8", 136), ("2:8", 200), ("8:16", 208), ("3:5", 65)):
        for dtype in ("bfloat16", "float32"):
            found += [("product", (pattern, (19, columns), dtype, (1, 3, 8, 16, 33)))]
    for pattern, shape in (
        *(
            ("block:16x16@0.5", (48, 112)),
            ("block:32x32@0.5", (64, 160)),
            ("block:4x8@0.5", (20, 72)),
        ),
    ):
        for dtype in ("bfloat16", "float32"):
            found += [("product", (pattern, shape, dtype, (1, 8, 16, 33)))]
    packings = (
        *FORMS,
        "1:4",
        "4:8",
        "8:16",
        "3:5",
        "7:32",
        "block:16x16@0.5",
        "row@0.5",
        "unstructured@0.3",
    )
    for pattern in packings:
        for dtype in ("bfloat16", "float32"):
            found += [("round_trip", (pattern, dtype))]
    for n, dtype in itertools.product(
        (1, 7, 64, 100, 1000, 8192, 20001), ("float32", "bfloat16", "float64", "int32")
    ):
        found += [("ranks", (n, dtype))]
    for pattern in (*packings, "12:24", "filter@0.5"):
        found += [("masks", (pattern,))]
    for n, dtype in itertools.product((4, 60, 4096, 20004), ("float32", "bfloat16")):
        found += [("weights_in_use", (n, dtype))]
    for shape, dtype in itertools.product(((64, 64), (192, 320)), ("float16", "bfloat16")):
        found += [("compressed_for_cores", (shape, dtype))]
    for shape, dtype in itertools.product(((4, 4), (12, 60), (64, 1028)), ("float32", "bfloat16")):
        found += [("transposable_masks", (shape, dtype))]
    return found


def _shape(pattern: str) -> tuple[int, ...]:
    """An odd shape that fits."""
    parsed = s3.Pattern.parse(pattern)
    if len(parsed.rule.inputs) == 4:
        return 6, 4, 3, 3
    steps = [parsed.step(dim)[0] for dim in range(2)]
    return tuple(step * -(-size // step) for step, size in zip(steps, (19, 75), strict=True))


def product(pattern: str, shape: tuple[int, int], dtype: str, batches: tuple[int, ...]) -> None:
    """Every path of linear but ``vendor``, in both orders."""
    kind = getattr(torch, dtype)
    weight = s3.StructuredSparseTensor.from_dense(
        torch.randn(shape, device="cuda").to(kind), pattern
    )
    dense = weight.to_dense()
    for order in {weight.tiled, False}:
        parts = weight.in_order(order).as_weight()
        for n in batches:
            x, bias = torch.randn(n, shape[1], device="cuda").to(kind), dense[:, 0].contiguous()
            exact = x.double() @ dense.double().t() + bias.double()
            for path in paths.possible(parts, n):
                y = paths.multiply(x, parts, bias, path)
                _same(y, exact, 0.02 if kind != torch.float32 else 1e-4)


def product_int8(
    pattern: str, shape: tuple[int, int], dtype: str, batches: tuple[int, ...]
) -> None:
    """int8 values, by the kernel where there is one and by the other paths."""
    kind = getattr(torch, dtype)
    dense = torch.randn(shape, device="cuda").to(kind)
    sparse = s3.StructuredSparseTensor.from_dense(dense, pattern)
    weight = s3.Int8SparseTensor.from_sparse(sparse)
    assert torch.equal(weight.to_dense(), weight.in_order(False).to_dense())
    assert torch.equal(weight.to_dense().cpu(), weight.cpu().to_dense())
    exact = weight.to_dense(torch.float64)
    for n in batches:
        x, bias = torch.randn(n, shape[1], device="cuda").to(kind), dense[:, 0].contiguous()
        y = torch.nn.functional.linear(x, weight, bias)
        _same(y, x.double() @ exact.t() + bias.double(), 0.02)


def product_group(
    pattern: str, shape: tuple[int, int], dtype: str, batches: tuple[int, ...]
) -> None:
    """Several weights of one x in one launch, as GroupLinears calls them."""
    from s3tensor.kernels import matmul

    rows, columns = shape
    heights = [rows, 16, 2 * rows]
    weights = [
        s3.StructuredSparseTensor.from_dense(
            torch.randn(height, columns, device="cuda").to(getattr(torch, dtype)), pattern
        ).in_order(True)
        for height in heights
    ]
    for n in batches:
        x = torch.randn(n, columns, device="cuda").to(weights[0].dtype)
        ys = matmul.linear_group(
            x,
            [(weight.packed, weight.indices) for weight in weights],
            form=pattern,
            rows=heights,
            columns=columns,
        )
        for y, weight in zip(ys, weights, strict=True):
            _same(y, x.double() @ weight.to_dense().double().t(), 0.02)


def round_trip(pattern: str, dtype: str) -> None:
    bound = s3.Pattern.parse(pattern).bind(_shape(pattern))
    weight = torch.randn(bound.shape, device="cuda").to(getattr(torch, dtype))
    mask = s3.project(weight, pattern)
    values, indices = pack(weight, mask, bound)
    expected = pack(weight.cpu(), mask.cpu(), bound)
    assert torch.equal(values.cpu(), expected[0]) and torch.equal(indices.cpu(), expected[1])
    assert torch.equal(unpack(values, indices, bound), weight * mask)
    assert torch.equal(gather(weight, indices, bound), values)


def ranks(n: int, dtype: str) -> None:
    x = (8 * torch.randn(5, n, device="cuda")).to(getattr(torch, dtype))
    for k in {1, (n + 1) // 2, n}:
        assert torch.equal(s3.kth_largest(x, k, 1).cpu(), s3.kth_largest(x.cpu(), k, 1))
        if k < n:
            _same(s3.mid_kth_largest(x, k, 1), s3.mid_kth_largest(x.cpu(), k, 1).cuda(), 1e-6)


def masks(pattern: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.randn(_shape(pattern), device="cuda").to(dtype)
        assert torch.equal(s3.project(weight, pattern).cpu(), s3.project(weight.cpu(), pattern))


def weights_in_use(n: int, dtype: str) -> None:
    """The kernels of training, of ``n`` weights in scopes of four."""
    from s3tensor.kernels import masked

    weight = torch.randn(n, device="cuda").to(getattr(torch, dtype))
    scale = torch.full((1,), 1.5, device="cuda")
    for keep in (1, 2, 3):
        found, mask = masked.masked(weight, keep, write=True)
        assert mask is not None and torch.equal(mask, s3.project(weight[None], f"{keep}:4")[0])
        assert torch.equal(found, weight * mask)
        assert torch.equal(masked.masked(weight, keep, mask)[0], found)
        dropped = weight.masked_fill(mask, 0).abs().view(-1, 4).amax(-1, keepdim=True)
        short = (weight.view(-1, 4).abs() - dropped).clamp_min(0).view(-1) * weight.sign() * 1.5
        _same(masked.masked(weight, keep, beta=scale)[0], short * mask, 1e-2)
        grad = torch.randn_like(weight)
        _same(masked.decayed(grad, weight, mask, 0.1), grad + 0.1 * weight * ~mask, 1e-2)


def compressed_for_cores(shape: tuple[int, int], dtype: str) -> None:
    """A dense 2:4 weight and its transpose in cuSPARSELt's form: it holds the kept values."""
    from s3tensor.kernels import cores

    weight = torch.randn(shape, device="cuda").to(getattr(torch, dtype))
    weight = torch.where(s3.project(weight, "2:4"), weight, 0)
    for given in (weight, weight.t().contiguous().t()):
        held = cores.compress(given).view(-1)[: weight.numel() // 2]
        assert torch.equal(held, weight[weight != 0])


def transposable_masks(shape: tuple[int, int], dtype: str) -> None:
    weight = torch.randn(shape, device="cuda").to(getattr(torch, dtype))
    for pattern in ("1:4", "2:4", "3:4"):
        assert torch.equal(
            s3.transposable(weight, pattern).cpu(), s3.transposable(weight.cpu(), pattern)
        )


def _same(found: Tensor, exact: Tensor, tolerance: float) -> None:
    error = (found.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30)
    assert error <= tolerance, f"relative error {error:.1e}"


def run(case: Case) -> str | None:
    """Run a case; its error as text, or None."""
    name, arguments = case
    torch.manual_seed(0)
    try:
        globals()[name](*arguments)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{name}{arguments}: {type(error).__name__}: {str(error)[:300]}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="functions of the cases to run [all]"
    )
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    began, every = time.time(), cases()
    if args.only:
        unknown = set(args.only) - {name for name, _ in every}
        if unknown:
            parser.error(f"unknown function {unknown.pop()!r}; there are {', '.join(dict(every))}")
        every = [case for case in every if case[0] in args.only]
    if args.processes > 1:
        with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
            failed = [text for text in pool.imap_unordered(run, every, 1) if text]
    else:
        failed = [text for text in map(run, every) if text]
    print("\n".join(failed))
    print(f"{len(every) - len(failed)} of {len(every)} cases right, {time.time() - began:.0f} s")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
