"""``F.linear`` by a compressed weight: the paths there are, and the fastest one for a call.

=========  ================================================================  =============================
path       what it does                                                      what it needs
=========  ================================================================  =============================
packed     reads the packed weight, decompresses in registers, tensor cores  one of four forms, 16 bits, up
                                                                             to 128 rows of x; int8 values
                                                                             in tile order, up to 32 rows
values     makes 16-bit packed values of int8 ones, then the path of those   the same, up to 128 rows
general    as packed, for any N:M of columns and rows of blocks, float32 too up to 64 rows of x
vendor     cuSPARSELt on its own compressed copy that is kept beside         ``memory="fast"``, 2:4, 16 bits
dense      cuBLAS on a dense copy that is kept beside                        ``memory="fast"``
scratch    makes the dense weight in a scratch on each call, then cuBLAS     nothing
=========  ================================================================  =============================

All but the last two need a CUDA device. Which one runs there follows from measured times
(:mod:`s3tensor.tensor.timings`) of the pattern, dtype, shape, batch and device, or from a guess by bytes
where a GPU was not measured. To add a path, add a row to ``PATHS``.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from s3tensor.mask import backend
from s3tensor.mask.packing import columns_of, form_of, unpack
from s3tensor.pattern import BoundPattern, Pattern
from s3tensor.pattern.layout import Layout
from s3tensor.tensor import cusparselt, int8_values, timings
from s3tensor.tensor.weight import Weight

_HALF = (torch.bfloat16, torch.float16)
_BATCHES = tuple(2**n for n in range(13))  # 1 to 4096
_SLOW = "each call unpacks the weight and runs the dense matmul, which is right but slow"


def multiply(x: Tensor, weight: Weight, bias: Tensor | None, path: str | None = None) -> Tensor:
    """``F.linear(x, W, bias)`` by the fastest path, or by the named one; contiguous.

    For plain tensors that nothing traces: it computes at once, without the dispatcher.

    Args:
        x: (..., in_features), in the dtype of the weight.
        weight: the compressed weight.
        bias: (out_features,), (1,) or None.
        path: a path of :func:`possible`; by default :func:`choose` decides.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not belong together, as ``F.linear`` does.
    """
    packed, shape = weight.packed, weight.bound.shape
    sound = x.ndim and len(shape) == 2 and x.shape[-1] == shape[0 if weight.transposed else 1]
    sound = sound and x.dtype == packed.dtype and x.device == packed.device
    sound = sound and packed.shape == weight.bound.packed_shape
    if not sound or bias is not None:
        # The whole check, which takes the host longer, for int8 values, a bias and the messages.
        check(x, weight, bias)
    if x.numel() == 0:
        empty = x.new_zeros(*x.shape[:-1], weight.features[0])
        return empty if bias is None else empty + bias
    if path is None and x.is_cuda:
        batch = x.numel() // x.shape[-1]
        path = choose(weight, batch, torch.cuda.is_current_stream_capturing())
        if path == "scratch":
            int8 = weight.scales is not None
            _warn_scratch(str(weight.bound.pattern), x.dtype, batch <= 128 or int8, int8)
    elif path is None:
        path = "scratch" if weight.dense is None else "dense"
    return PATHS[path].run(x, weight, bias)


def check(x: Tensor, weight: Weight, bias: Tensor | None) -> None:
    """Raise RuntimeError for sizes, dtypes or devices that do not belong together."""
    packed, scales, bound = weight.packed, weight.scales, weight.bound
    op = "linear" if scales is None else "linear_int8"
    torch._check(
        len(bound.shape) == 2,
        lambda: f"{op} takes a weight of 2 dims, got {bound}; call .to_dense()",
    )
    out_features, in_features = weight.features
    torch._check(
        x.ndim >= 1 and x.shape[-1] == in_features,
        lambda: f"{op}: x of shape {tuple(x.shape)} against in_features {in_features}",
    )
    torch._check(
        x.device == packed.device
        and (bias is None or bias.device == x.device)
        and (scales is None or scales.device == x.device),
        lambda: (
            f"{op}: x is on {x.device} and the weight on {packed.device}"
            + ("" if scales is None else f", its scales on {scales.device}")
            + ("" if bias is None else f", its bias on {bias.device}")
            + "; move them to one device"
        ),
    )
    dtype = weight.dtype
    torch._check(
        x.dtype == dtype,
        lambda: f"{op}: x is {x.dtype} and the weight {dtype}; convert one with .to()",
    )
    torch._check(
        tuple(packed.shape) == bound.packed_shape,
        lambda: (
            f"{op}: packed values of shape {tuple(packed.shape)}, {bound} has {bound.packed_shape}"
        ),
    )
    if scales is not None:
        _check_int8(x.dtype, packed, scales, bound)
    if bias is not None:
        torch._check(
            bias.dtype == x.dtype and bias.ndim == 1 and bias.shape[0] in (1, out_features),
            lambda: (
                f"{op}: bias {tuple(bias.shape)} {bias.dtype} for {out_features} {x.dtype} outputs"
            ),
        )


def _check_int8(dtype: torch.dtype, packed: Tensor, scales: Tensor, bound: BoundPattern) -> None:
    torch._check(
        dtype in int8_values.DTYPES
        and packed.dtype == torch.int8
        and scales.dtype == torch.float32,
        lambda: (
            f"linear_int8: x is {dtype}, values {packed.dtype}, scales {scales.dtype}; it takes float32, "
            "float16 and bfloat16, int8 and float32"
        ),
    )
    torch._check(
        tuple(scales.shape) == bound.shape[:1],
        lambda: (
            f"linear_int8: scales of shape {tuple(scales.shape)}; {bound} has {bound.shape[:1]}"
        ),
    )


def multiply_group(x: Tensor, weights: Sequence[Weight]) -> list[Tensor]:
    """:func:`multiply` of one x by several weights, without a bias: in one launch where there is one."""
    batch = x.numel() // x.shape[-1]
    graph = x.is_cuda and torch.cuda.is_current_stream_capturing()
    first = weights[0]
    form: Any = form_of(first.bound)
    columns = first.bound.shape[-1]
    alike = x.is_cuda and x.numel() > 0 and form is not None
    for weight in weights:
        alike = alike and weight.tiled and form_of(weight.bound) == form
        alike = alike and weight.bound.shape[-1] == columns
        alike = alike and choose(weight, batch, graph) == "packed"
    if not alike:
        return [multiply(x, weight, None) for weight in weights]
    ys: list[Tensor] = packed_kernels().linear_group(
        x.reshape(-1, columns), [(weight.packed, weight.indices) for weight in weights], form=form,
        rows=[weight.bound.shape[0] for weight in weights], columns=columns,
        overlap=not any(weight.packed.requires_grad for weight in weights),
    )  # fmt: skip
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]


# the choice -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """What a choice depends on: the weight without its tensors."""

    bound: BoundPattern
    dtype: torch.dtype  # of products
    device: torch.device
    tiled: bool
    transposed: bool
    dense: bool
    vendor: bool
    int8: bool = False

    @staticmethod
    def of(weight: Weight) -> Kept:
        return Kept(
            weight.bound,
            weight.dtype,
            weight.packed.device,
            weight.tiled,
            weight.transposed,
            dense=weight.dense is not None,
            vendor=weight.vendor is not None,
            int8=weight.scales is not None,
        )


def possible(weight: Weight, batch: int) -> list[str]:
    """The paths that can take ``batch`` rows of x."""
    return _possible(Kept.of(weight), batch)


def _possible(kept: Kept, batch: int) -> list[str]:
    return [name for name, path in PATHS.items() if path.takes(kept, batch)]


def choose(weight: Weight, batch: int, graph: bool) -> str:
    """The fastest path for ``batch`` rows of x; ``graph`` says whether a CUDA graph records the call.

    Outside a graph cuSPARSELt plans on each call, which takes the host longer than a small product takes
    the GPU. Products with int8 values are not in the tables: the first possible path in ``PATHS`` runs.
    """
    return _choose(Kept.of(weight), batch, graph)


@functools.lru_cache(maxsize=4096)
def _choose(kept: Kept, batch: int, graph: bool) -> str:
    paths = _possible(kept, batch)
    if kept.int8:
        return paths[0]
    times = predicted(kept.bound, kept.dtype, kept.device, batch)
    if "vendor" in paths and not graph:
        table = timings.of_device(kept.device)
        call = 2000.0 if table is None else table.vendor_call_us
        if times.get("vendor", 0) < call:
            paths.remove("vendor")
    return min(paths, key=lambda path: (times.get(path, math.inf), path))


def predicted(
    bound: BoundPattern, dtype: torch.dtype, device: torch.device, batch: int
) -> timings.Times:
    """Microseconds of each path, from the device's table or by guess; only their order has a meaning."""
    table = timings.of_device(device)
    rows, columns = bound.shape
    times = None
    if table is not None:
        name = form_of(bound) or str(bound.pattern)
        kind = "bfloat16" if dtype == torch.float16 else str(dtype).removeprefix("torch.")
        times = table.times(name, kind, rows, columns, max(batch, 1))
    return times or timings.guess(bound.density, rows, columns, max(batch, 1))


def worth_keeping(
    bound: BoundPattern, dtype: torch.dtype, device: torch.device, batches: tuple[int, int]
) -> tuple[bool, bool]:
    """Whether a dense copy and cuSPARSELt's make any product of ``batches`` (from, to) rows faster.

    A copy counts as faster from 3 % on. On a CPU, where there is no kernel for packed weights, a dense
    copy always is.
    """
    if device.type != "cuda":
        return True, False
    vendor = cusparselt.takes(bound, dtype, device)
    alone = Kept(bound, dtype, device, prefers_tiles(bound, dtype, device), *(False,) * 3)
    keep = {"dense": False, "vendor": False}
    first, last = batches
    for batch in sorted({first, last, *(n for n in _BATCHES if first <= n <= last)}):
        times = predicted(bound, dtype, device, batch)
        least = min(times[path] for path in _possible(alone, batch) if path in times)
        for path in ("dense", "vendor"):
            others = [least, times["dense"]] if path == "vendor" else [least]
            if (path == "dense" or vendor) and times.get(path, math.inf) < 0.97 * min(others):
                keep[path] = True
    return keep["dense"], keep["vendor"]


def kernel_key(
    pattern: str, shape: tuple[int, int], batch: int, dtype: torch.dtype, device: torch.device
) -> Any:
    """What tells the kernel of one product from others, so that each is compiled once; None without one."""
    bound = Pattern.parse(pattern).bind(shape)
    paths = possible(zero_weight(bound, dtype, device), batch)
    if "packed" not in paths:
        return (pattern, shape, dtype, batch) if "general" in paths else None
    form: Any = form_of(bound)
    cut = packed_kernels().default(form, batch, *shape, prefers_tiles(bound, dtype, device), device)
    return form, dtype, cut, shape[0] % cut.rows == 0, shape[1] % cut.columns == 0


def zero_weight(bound: BoundPattern, dtype: torch.dtype, device: torch.device) -> Weight:
    """A weight of zeros, as the device would keep it, to compile kernels with."""
    packed = torch.zeros(bound.packed_shape, dtype=dtype, device=device)
    indices = torch.zeros(bound.index_bytes, dtype=torch.uint8, device=device)
    return Weight(packed, indices, bound, tiled=prefers_tiles(bound, dtype, device))


def forget() -> None:
    """Read the tables again: one was just written."""
    timings.load.cache_clear()
    _choose.cache_clear()
    cusparselt.plan_of.cache_clear()


# packed: the four forms with a tile order -------------------------------------------------------------


def prefers_tiles(bound: BoundPattern, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device reads the packed parts of a weight best in tile order: where packed kernels run."""
    if (
        device.type != "cuda"
        or dtype not in _HALF
        or form_of(bound) is None
        or not packed_kernels()
        or not backend.tiles().can_tile(*bound.shape)
    ):
        return False
    if torch.cuda.is_available():  # else the device is that of a fake tensor
        packed_kernels().prepare(device)
    return True


def packed_kernels() -> Any:
    """The module of the packed kernels, or None where they cannot be had (Triton older than 3.6, ROCm)."""
    return backend.load("matmul", _SLOW)


def _has_packed_form(kept: Kept, batch: int) -> bool:
    return (
        not kept.transposed
        and kept.device.type == "cuda"
        and kept.dtype in _HALF
        and batch <= 128
        and form_of(kept.bound) is not None
        and packed_kernels() is not None
    )


def _takes_packed(kept: Kept, batch: int) -> bool:
    if not _has_packed_form(kept, batch):
        return False
    kernels, form = packed_kernels(), form_of(kept.bound)
    if kept.int8 and not (kept.tiled and batch <= kernels.MOST_ROWS_INT8):
        return False
    return kernels.refusal(form, kept.dtype, *kept.bound.shape, kept.device) is None


def _packed(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    form: Any = form_of(weight.bound)
    rows, columns = weight.bound.shape
    # A weight that is trained may be written by a kernel still in flight; one at rest is read early.
    y: Tensor = packed_kernels().linear(
        x.reshape(-1, columns), weight.packed, weight.indices, bias_of_rows(bias, rows), form=form,
        rows=rows, columns=columns, tiled=weight.tiled, overlap=not weight.packed.requires_grad,
        scales=weight.scales,
    )  # fmt: skip
    return y.view(*x.shape[:-1], rows)


def bias_of_rows(bias: Tensor | None, rows: int) -> Tensor | None:
    """The bias with an element for each row: F.linear takes one of a single element too, kernels do not."""
    return bias if bias is None or bias.shape[0] == rows else bias.expand(rows)


# values: int8 for more rows ---------------------------------------------------------------------------


def _takes_values(kept: Kept, batch: int) -> bool:
    form = form_of(kept.bound)
    if not (kept.int8 and kept.tiled and form != "rowpair16" and _has_packed_form(kept, batch)):
        return False
    return packed_kernels().refusal(form, kept.dtype, *kept.bound.shape, kept.device) is None


def _values(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    packed = int8_values.packed_of(weight, x.dtype)
    assert packed is not None
    wide = Weight(packed, weight.indices, weight.bound, tiled=True)
    graph = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return multiply(x, wide, bias, choose(wide, x.numel() // x.shape[-1], graph))


# general: any N:M of columns, and rows of blocks ------------------------------------------------------


def _takes_general(kept: Kept, batch: int) -> bool:
    if kept.transposed or kept.tiled or kept.int8 or kept.device.type != "cuda" or batch > 64:
        return False
    if _has_packed_form(kept, batch):
        return False
    return general(kept.bound, kept.dtype, kept.device) is not None


@functools.lru_cache(maxsize=1024)
def general(bound: BoundPattern, dtype: torch.dtype, device: torch.device) -> Any:
    """The kernel for any N:M of columns or for rows of blocks, its sizes given; or None."""
    blocks, columns = backend.load("blocks", _SLOW), backend.load("columns", _SLOW)
    if blocks is None or columns is None:
        return None
    rows, across = bound.shape if len(bound.shape) == 2 else (0, 0)
    of = columns_of(bound)
    if of is not None:
        if columns.refusal(*of, dtype, rows, across, device) is not None:
            return None
        names = {"keep": of[0], "group": of[1]}
        return functools.partial(columns.linear, **names, rows=rows, columns=across)
    tile = blocks_of(bound)
    if tile is None or blocks.refusal(*tile, bound.keep, dtype, rows, across, device) is not None:
        return None
    names = {"block_rows": tile[0], "block_columns": tile[1], "keep": bound.keep}
    return functools.partial(blocks.linear, **names, rows=rows, columns=across)


def blocks_of(bound: BoundPattern) -> tuple[int, int] | None:
    """(rows, columns) of a block where a scope is a row of blocks of the matrix as it lies; or None."""
    if len(bound.shape) != 2 or bound.view != Layout.row_major(bound.shape):
        return None
    if bound.scope != (1, bound.block_grid[1]):
        return None
    return bound.block[0], bound.block[1]


def _general(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    rows, columns = weight.bound.shape
    kernel = general(weight.bound, weight.packed.dtype, weight.packed.device)
    y: Tensor = kernel(
        x.reshape(-1, columns), weight.packed, weight.indices, bias_of_rows(bias, rows)
    )
    return y.view(*x.shape[:-1], rows)


# vendor: cuSPARSELt -----------------------------------------------------------------------------------


def _takes_vendor(kept: Kept, batch: int) -> bool:
    return kept.vendor and not kept.transposed and kept.device.type == "cuda"


def _vendor(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    rows, columns = weight.bound.shape
    flat = x.reshape(-1, columns)
    batch = flat.shape[0]
    plan = cusparselt.plan_of(weight.bound, weight.packed.device, batch)
    y = multiply_under(plan, cusparselt.pad_rows(flat), weight, bias_of_rows(bias, rows))
    return y[:batch].reshape(*x.shape[:-1], rows)


def multiply_under(
    plan: timings.Plan,
    x: Tensor,  # (batch, columns), batch in multiples of 16
    weight: Weight,
    bias: Tensor | None,  # (rows,)
) -> Tensor:  # (batch, rows), contiguous
    """The product by cuSPARSELt's copy of a weight, under a plan."""
    assert weight.vendor is not None
    x = cusparselt.order_columns(x, weight.bound).contiguous()
    bias = None if bias is None else bias.contiguous()
    return cusparselt.multiply(x, weight.vendor, bias, plan)


# dense and scratch: cuBLAS, or the CPU's matmul -------------------------------------------------------


def _dense(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    assert weight.dense is not None
    return F.linear(x, weight.dense.t() if weight.transposed else weight.dense, bias).contiguous()


def _scratch(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    if weight.scales is None:
        scratch = unpack(weight.packed, weight.indices, weight.bound, weight.tiled)
    else:
        scratch = int8_values.dense_of(weight, x.dtype)
    return F.linear(x, scratch.t() if weight.transposed else scratch, bias).contiguous()


@functools.lru_cache(maxsize=256)  # once for each
def _warn_scratch(pattern: str, dtype: torch.dtype, few: bool, int8: bool) -> None:
    remedy = 's3tensor.set_memory_(model, "fast") keeps a second form of such weights'
    if int8:
        why, remedy = f"there is no kernel for {pattern} in {dtype} with so many rows of x", ""
    else:
        why = f"there is no kernel for {pattern} in {dtype}" if few else "x has many rows"
    warnings.warn(
        f"{'an int8' if int8 else 'a compressed'} weight is unpacked to a scratch on each call, as {why}: "
        f"right, but slower than a dense layer{remedy and '; '}{remedy} (this warning is shown once)",
        UserWarning,
        stacklevel=2,
    )


@dataclass(frozen=True)
class Path:
    """One way to multiply."""

    takes: Callable[[Kept, int], bool]  # whether it can, given the weight and the rows of x
    run: Callable[[Tensor, Weight, Tensor | None], Tensor]  # (x, weight, bias), contiguous


PATHS: dict[str, Path] = {
    "packed": Path(_takes_packed, _packed),
    "values": Path(_takes_values, _values),
    "general": Path(_takes_general, _general),
    "vendor": Path(_takes_vendor, _vendor),
    "dense": Path(lambda kept, batch: kept.dense, _dense),
    "scratch": Path(lambda kept, batch: True, _scratch),
}
