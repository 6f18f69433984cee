"""``linear`` by a compressed weight on a CUDA device: the ways there are, and the fastest one for a call.

=========  ================================================================  =============================
path       what it does                                                      what it needs
=========  ================================================================  =============================
packed     reads the packed weight, decompresses in registers, tensor cores  one of four forms, 16 bits, up
                                                                             to 128 rows of x
general    the same for any N:M of columns and rows of blocks, float32 too   up to 64 rows of x
dense      cuBLAS on a dense copy that is kept beside                        ``memory="fast"``
vendor     cuSPARSELt on its own compressed copy that is kept beside         ``memory="fast"``, 2:4, 16 bits
scratch    unpacks the weight to a scratch, then cuBLAS                      nothing
=========  ================================================================  =============================

Which one runs follows from measured times (:mod:`s3tensor.tensor.timings`) of the pattern, dtype, shape,
batch and device, or from a guess by bytes where a GPU was not measured.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from s3tensor.mask.packing import columns_of, form_of, unpack
from s3tensor.pattern import BoundPattern, Pattern
from s3tensor.pattern.layout import Layout
from s3tensor.tensor import timings

_HALF = (torch.bfloat16, torch.float16)
# Forms whose dense weight is 2:4 along each row, which is what cuSPARSELt takes, or is so once the even
# and the odd columns of every 8 are parted.
_FOR_VENDOR = ("2:4", "coupled2:4", "pair4:8")
_BATCHES = tuple(2**n for n in range(13))  # 1 to 4096


@dataclass(frozen=True)
class Weight:
    """A compressed weight as ``linear`` gets it: packed parts, and the copies that are kept beside."""

    packed: Tensor  # (scopes, keep, block_size)
    indices: Tensor  # (index_bytes,) uint8
    bound: BoundPattern
    tiled: bool = False  # packed and indices are in tile order
    transposed: bool = False
    dense: Tensor | None = None  # of the bound shape
    vendor: Tensor | None = None  # cuSPARSELt's

    @property
    def features(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        out, into = self.bound.shape
        return (into, out) if self.transposed else (out, into)


# tile order -------------------------------------------------------------------------------------------


def prefers_tiles(bound: BoundPattern, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the packed parts of a weight are best kept in tile order: where the packed kernels run."""
    if (
        device.type != "cuda"
        or dtype not in _HALF
        or form_of(bound) is None
        or not packed_kernels()
    ):
        return False
    from s3tensor.kernels import tiles  # type: ignore[import-not-found]

    if not tiles.can_tile(*bound.shape):
        return False
    if torch.cuda.is_available():  # else the device is that of a fake tensor
        packed_kernels().prepare(device)
    return True


@functools.lru_cache(maxsize=1)
def packed_kernels() -> Any:
    """The module of the packed kernels, or None where they cannot be had (Triton older than 3.6, ROCm)."""
    if torch.version.hip is not None:
        return None
    try:
        from s3tensor.kernels import matmul
    except ImportError as error:
        warnings.warn(
            f"s3tensor's matmul kernels need Triton 3.6 or later ({error}): each call unpacks the weight "
            "and runs the dense matmul, which is right but slow",
            UserWarning,
            stacklevel=2,
        )
        return None
    return matmul


# the choice -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """What a choice depends on: the weight without its tensors."""

    bound: BoundPattern
    dtype: torch.dtype
    device: torch.device
    tiled: bool
    transposed: bool
    dense: bool
    vendor: bool

    @staticmethod
    def of(weight: Weight) -> Kept:
        packed = weight.packed
        copies = weight.dense is not None, weight.vendor is not None
        where = packed.dtype, packed.device, weight.tiled, weight.transposed
        return Kept(weight.bound, *where, *copies)


def possible(weight: Weight, batch: int) -> list[str]:
    """The paths that can take ``batch`` rows of x."""
    return _possible(Kept.of(weight), batch)


def _possible(kept: Kept, batch: int) -> list[str]:
    bound, dtype, device = kept.bound, kept.dtype, kept.device
    found = ["scratch"]
    if kept.dense:
        found.append("dense")
    if kept.transposed or device.type != "cuda":
        return found
    if kept.vendor:
        found.append("vendor")
    form = form_of(bound)
    if form is not None and dtype in _HALF and batch <= 128 and packed_kernels():
        if packed_kernels().refusal(form, dtype, *bound.shape, device) is None:
            found.append("packed")
    elif batch <= 64 and not kept.tiled and general(bound, dtype, device) is not None:
        found.append("general")
    return found


def choose(weight: Weight, batch: int, graph: bool) -> str:
    """The fastest path for ``batch`` rows of x; ``graph`` says whether the call is recorded in a CUDA graph.

    Outside a graph cuSPARSELt plans on each call, which takes the host longer than a small product takes
    the GPU.
    """
    return _choose(Kept.of(weight), batch, graph)


@functools.lru_cache(maxsize=4096)
def _choose(kept: Kept, batch: int, graph: bool) -> str:
    paths = _possible(kept, batch)
    times = predicted(kept.bound, kept.dtype, kept.device, batch)
    if "vendor" in paths and not graph:
        table = _table(kept.device)
        call = 2000.0 if table is None else table.vendor_call_us
        if times.get("vendor", 0) < call:
            paths.remove("vendor")
    return min(paths, key=lambda path: (times.get(path, math.inf), path))


def predicted(
    bound: BoundPattern, dtype: torch.dtype, device: torch.device, batch: int
) -> timings.Times:
    """Microseconds of each path, from the device's table or by guess; only their order has a meaning."""
    table = _table(device)
    rows, columns = bound.shape
    times = None
    if table is not None:
        name = form_of(bound) or str(bound.pattern)
        kind = "bfloat16" if dtype == torch.float16 else str(dtype).removeprefix("torch.")
        times = table.times(name, kind, rows, columns, max(batch, 1))
    return times or timings.guess(bound.density, rows, columns, max(batch, 1))


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
    """A weight of zeros, as it would be kept on the device, to compile kernels with."""
    packed = torch.zeros(bound.packed_shape, dtype=dtype, device=device)
    indices = torch.zeros(bound.index_bytes, dtype=torch.uint8, device=device)
    return Weight(packed, indices, bound, prefers_tiles(bound, dtype, device))


def worth_keeping(
    bound: BoundPattern, dtype: torch.dtype, device: torch.device, batches: tuple[int, int]
) -> tuple[bool, bool]:
    """Whether a dense copy and cuSPARSELt's make any product of ``batches`` (from, to) rows faster.

    A copy counts as faster from 3 % on. On a CPU, where there is no kernel for packed weights, a dense
    copy always is.
    """
    if device.type != "cuda":
        return True, False
    vendor = can_vendor(bound, dtype, device)
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


def _table(device: torch.device) -> timings.Timings | None:
    if device.type != "cuda":
        return None
    return timings.load(*_identity(device))


@functools.lru_cache(maxsize=64)
def _identity(device: torch.device) -> tuple[str, tuple[int, int]]:
    return torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)


# the paths --------------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Weight, bias: Tensor | None, path: str | None = None) -> Tensor:
    """``F.linear(x, W, bias)`` by the fastest path, or by the named one; contiguous.

    Args:
        x: (..., in_features).
        weight: the compressed weight.
        bias: (out_features,), (1,) or None.
        path: a path of :func:`possible`; by default :func:`choose` decides.
    """
    if x.numel() == 0:
        empty = x.new_zeros(*x.shape[:-1], weight.features[0])
        return empty if bias is None else empty + bias
    batch = x.numel() // x.shape[-1]
    if path is None:
        path = choose(weight, batch, torch.cuda.is_current_stream_capturing())
        if path == "scratch":
            _warn_scratch(str(weight.bound.pattern), weight.packed.dtype, batch <= 128)
    return _PATHS[path](x, weight, bias)


def _dense(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    assert weight.dense is not None
    return F.linear(x, weight.dense.t() if weight.transposed else weight.dense, bias).contiguous()


def _scratch(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    scratch = unpack(weight.packed, weight.indices, weight.bound, weight.tiled)
    return F.linear(x, scratch.t() if weight.transposed else scratch, bias).contiguous()


@functools.lru_cache(maxsize=256)  # once for each
def _warn_scratch(pattern: str, dtype: torch.dtype, few: bool) -> None:
    why = f"there is no kernel for {pattern} in {dtype}" if few else "x has many rows"
    warnings.warn(
        f"a compressed weight is unpacked to a scratch on each call, as {why}: right, but slower than a "
        'dense layer; s3tensor.set_memory_(model, "fast") keeps a second form of such weights (this '
        "warning is shown once)",
        UserWarning,
        stacklevel=2,
    )


@functools.lru_cache(maxsize=1)
def _general_kernels() -> tuple[Any, Any] | None:
    """The modules ``blocks`` and ``columns``, or None without Triton, with one before 3.5, or on ROCm."""
    if torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return None
    try:
        from s3tensor.kernels import blocks, columns
    except ImportError as error:
        warnings.warn(
            f"{error}: each call unpacks the weight and runs the dense matmul, which is right but slow",
            UserWarning,
            stacklevel=2,
        )
        return None
    return blocks, columns


@functools.lru_cache(maxsize=1024)
def general(bound: BoundPattern, dtype: torch.dtype, device: torch.device) -> Any:
    """The kernel for any N:M of columns or for rows of blocks, its sizes given; or None."""
    kernels = _general_kernels()
    if kernels is None:
        return None
    blocks, columns = kernels
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


def bias_of_rows(bias: Tensor | None, rows: int) -> Tensor | None:
    """The bias with an element for each row: F.linear takes one of a single element too, kernels do not."""
    return bias if bias is None or bias.shape[0] == rows else bias.expand(rows)


def _packed(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    form: Any = form_of(weight.bound)
    rows, columns = weight.bound.shape
    # A weight that is trained may be written by a kernel still in flight; one at rest is read early.
    y: Tensor = packed_kernels().linear(
        x.reshape(-1, columns), weight.packed, weight.indices, bias_of_rows(bias, rows), form=form,
        rows=rows, columns=columns, tiled=weight.tiled, overlap=not weight.packed.requires_grad,
    )  # fmt: skip
    return y.view(*x.shape[:-1], rows)


def linear_group(x: Tensor, weights: Sequence[Weight]) -> list[Tensor]:
    """:func:`linear` of one x by several weights, without a bias: in one launch where there is one."""
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
        path = None if x.is_cuda else "scratch"
        return [linear(x, weight, None, path) for weight in weights]
    ys: list[Tensor] = packed_kernels().linear_group(
        x.reshape(-1, columns), [(weight.packed, weight.indices) for weight in weights], form=form,
        rows=[weight.bound.shape[0] for weight in weights], columns=columns,
        overlap=not any(weight.packed.requires_grad for weight in weights),
    )  # fmt: skip
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]


# cuSPARSELt -------------------------------------------------------------------------------------------


def can_vendor(bound: BoundPattern, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether cuSPARSELt takes the weight: one of three forms, 16 bits, whole tiles of 32, a GPU it knows."""
    return (
        form_of(bound) in _FOR_VENDOR
        and dtype in _HALF
        and all(n % 32 == 0 for n in bound.shape)
        and device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and torch.backends.cusparselt.is_available()
    )


def vendor_order(
    t: Tensor,  # (..., columns)
    bound: BoundPattern,
) -> Tensor:
    """``t`` with its columns in the order in which the weight is 2:4: a copy for pair4:8, else itself.

    A pair of neighbours is kept or pruned together, so that of every 8 columns 0, 2, 4, 6 are 2:4 and so are
    1, 3, 5, 7. The weight's columns are put so once, those of x on each call: a read and a write of x.
    """
    if form_of(bound) != "pair4:8":
        return t
    return t.reshape(*t.shape[:-1], -1, 4, 2).transpose(-1, -2).reshape(t.shape)


def vendor_copy(dense: Tensor, bound: BoundPattern) -> Tensor:
    """cuSPARSELt's compressed copy of a dense weight of the bound shape that satisfies the pattern."""
    whole = vendor_order(dense, bound).contiguous() + 0.0  # it takes -0.0 for a value
    with torch.cuda.device(dense.device):
        copy: Tensor = torch._cslt_compress(whole)
    return copy


def _vendor(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    rows, columns = weight.bound.shape
    flat = x.reshape(-1, columns)
    batch = flat.shape[0]
    flat = vendor_rows(flat)
    y = vendor_product(flat, weight, bias_of_rows(bias, rows), _vendor_plan(weight, batch))
    return y[:batch].reshape(*x.shape[:-1], rows)


def vendor_product(
    flat: Tensor,  # (batch, columns), batch in multiples of 16
    weight: Weight,
    bias: Tensor | None,
    plan: tuple[int, int, int],
) -> Tensor:  # (batch, rows), contiguous
    """The product by cuSPARSELt under a plan: algorithm, split of K, mode of the split."""
    assert weight.vendor is not None
    return vendor_multiply(
        vendor_order(flat, weight.bound).contiguous(),
        weight.vendor,
        None if bias is None else bias.contiguous(),
        plan,
    )


def vendor_rows(x: Tensor) -> Tensor:  # (batch, columns)
    """``x`` with rows of zeros up to a multiple of 16, as cuSPARSELt takes them."""
    return F.pad(x, (0, 0, 0, -x.shape[0] % 16)) if x.shape[0] % 16 else x


def vendor_multiply(
    x: Tensor,  # (batch, columns), contiguous, batch in multiples of 16
    compressed: Tensor,  # of a (rows, columns) weight
    bias: Tensor | None,
    plan: tuple[int, int, int],
) -> Tensor:  # (batch, rows), contiguous
    """cuSPARSELt's product by its own compressed form, under a plan as :func:`vendor_product` has it."""
    algorithm, split, mode = plan
    with torch.cuda.device(x.device):
        y: Tensor = torch._cslt_sparse_mm(
            compressed,
            x.t(),
            bias=bias,
            transpose_result=True,
            alg_id=algorithm,
            split_k=split,
            split_k_mode=mode,
        )
    return y


def _vendor_plan(weight: Weight, batch: int) -> tuple[int, int, int]:
    return _plan_of(weight.bound, weight.packed.device, batch)


@functools.lru_cache(maxsize=1024)
def _plan_of(bound: BoundPattern, device: torch.device, batch: int) -> tuple[int, int, int]:
    table = _table(device)
    if table is None:
        return 0, 1, -1
    rows, columns = bound.shape
    return table.vendor(form_of(bound) or "", "bfloat16", rows, columns, batch)


_PATHS = {
    "packed": _packed,
    "general": _general,
    "dense": _dense,
    "vendor": _vendor,
    "scratch": _scratch,
}


def forget() -> None:
    """Read the tables anew: one was just written."""
    timings.load.cache_clear()
    _choose.cache_clear()
    _plan_of.cache_clear()
