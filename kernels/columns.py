"""``linear`` of 1 to 64 rows by a weight that keeps N of every M columns, as packed: what it takes, and how.

Two kernels: ``gather`` takes any N:M and dtype with plain multiply-adds, ``runs`` takes the common N:M in
16-bit floats on tensor cores, at a cost that does not grow with the rows of x up to eight of them. Values
and codes are in the order of ``s3tensor.mask.packing``. Sums are float32 in a fixed order.

``gather`` is plain Triton; ``runs`` is Gluon and needs Triton 3.6; without it ``gather`` takes all.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from . import gather, gpu
from .gather import Gather

runs: Any = None
with contextlib.suppress(ImportError, AttributeError):  # of a Triton without this Gluon
    from . import runs

MOST_ROWS = 64  # of x; a dense library is faster for more
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST = 2**31  # weights: offsets within a row of x or y, and of W by words, are 32-bit


def index_bits(keep: int, group: int) -> int:
    """Bits of an index of a kept column where they are coded by index, or 0 for a bitmap."""
    bits = (group - 1).bit_length()
    return bits if keep * bits <= group else 0


def code_bytes(keep: int, group: int, rows: int, columns: int) -> int:
    """Bytes of the codes of a (rows, columns) weight."""
    scope_bits = keep * index_bits(keep, group) or group
    return -(-rows * (columns // group) * scope_bits // 8)


def refusal(
    keep: int, group: int, dtype: torch.dtype, rows: int, columns: int, device: torch.device
) -> str | None:
    """Why the kernels cannot take a (rows, columns) weight that keeps ``keep`` of ``group``, or None.

    They take 1 to 31 of 2 to 32 columns, bfloat16, float16 and float32, up to 2**31 weights, and GPUs from
    sm_80 on.
    """
    if not (2 <= group <= 32 and 1 <= keep < group):
        return (
            f"{keep}:{group}: a group is 2 to 32 columns and keeps 1 or more of them, but not all"
        )
    if dtype not in DTYPES:
        return f"values are {dtype}; the kernels take bfloat16, float16 and float32"
    if columns % group or columns < group or rows < 1:
        return f"{rows} x {columns}: columns must be a multiple of {group}"
    if rows * columns > LARGEST:
        return f"{rows} x {columns} is over 2**31 weights"
    return gpu.refusal(device)


def linear(
    x: Tensor,  # (N, columns)
    values: Tensor,  # kept values, row by row, any shape
    indices: Tensor,  # (code_bytes,) uint8
    bias: Tensor | None,  # (rows,)
    *,
    keep: int,
    group: int,
    rows: int,
    columns: int,
    config: Gather | Any | None = None,
) -> Tensor:  # (N, rows)
    """``x @ W.t() + bias`` for the packed (rows, columns) weight W, summed in float32 in a fixed order.

    NaN and infinity in a row of x reach only that row of y: all of it on tensor cores, where pruned
    weights are multiplied as zeros; with ``gather`` the outputs that keep the column.

    Args:
        x: 1 to 64 rows; any strides; copied where its columns are not contiguous.
        values: packed values.
        indices: packed codes: a stream of indices or bitmaps, whichever is smaller.
        bias: in the dtype of x, or None.
        keep: columns kept of each group.
        group: columns of a group.
        rows: rows of W.
        columns: columns of W.
        config: how to cut the work, ``gather.Gather`` or ``runs.Runs``; by default :func:`choose` decides.

    Raises:
        ValueError: sizes, dtypes or devices that do not belong together, or a :func:`refusal`.
    """
    reason = refusal(keep, group, values.dtype, rows, columns, x.device)
    reason = reason or mismatch(
        x, values, indices, bias, rows, columns, rows * (columns // group) * keep,
        code_bytes(keep, group, rows, columns), f"{keep}:{group}",
    )  # fmt: skip
    if reason is not None:
        raise ValueError(f"packed linear: {reason}")
    if config is None:
        config = choose(
            keep, group, values.dtype, x.shape[0], rows, columns, gpu.processors(x.device)
        )
    with torch.cuda.device(x.device):
        return launch(config, x, values, indices, bias, keep, group, rows, columns)


def launch(
    config: Gather | Any,
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    keep: int,
    group: int,
    rows: int,
    columns: int,
) -> Tensor:
    """The product by one of the kernels; arguments are already checked."""
    x = columns_together(x)
    values, indices = values.reshape(-1), indices.reshape(-1)
    bias = None if bias is None else bias.contiguous()
    y = torch.empty(x.shape[0], rows, dtype=x.dtype, device=x.device)
    bits = index_bits(keep, group)
    if isinstance(config, Gather):
        gather.launch(config, x, values, indices, bias, y, keep, group, bits)
        return y
    if not runs_take(keep, group, values.dtype, columns):
        raise ValueError(
            f"packed linear: {config} does not take {keep}:{group} of {columns} columns in {values.dtype}"
        )
    if x.stride(0) % 8 or x.data_ptr() % 16 or x.stride(0) * MOST_ROWS >= 2**31:
        x = x.clone(memory_format=torch.contiguous_format)
    values = values if values.data_ptr() % 16 == 0 else values.clone()
    words = x.view(torch.int32), values.view(torch.int32)
    runs.launch(config, *words, indices, bias, y, keep, group, bits)
    return y


def columns_together(x: Tensor) -> Tensor:
    """x, or a copy whose columns are neighbours."""
    return x if x.stride(1) == 1 else x.clone(memory_format=torch.contiguous_format)


def mismatch(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    rows: int,
    columns: int,
    kept: int,
    index_bytes: int,
    pattern: str,
) -> str | None:
    """Which arguments do not fit each other, or None."""
    devices = {t.device for t in (x, values, indices, bias) if t is not None}
    dtypes = {t.dtype for t in (x, values, bias) if t is not None}
    if len(devices) > 1 or len(dtypes) > 1:
        return (
            f"x is {x.dtype} on {x.device}, values are {values.dtype} on {values.device}, indices are on "
            f"{indices.device}"
            + ("" if bias is None else f", the bias is {bias.dtype} on {bias.device}")
        )
    if x.ndim != 2 or x.shape[1] != columns or not 1 <= x.shape[0] <= MOST_ROWS:
        return f"x is {tuple(x.shape)}; it must be (1 to {MOST_ROWS}, {columns})"
    if indices.dtype != torch.uint8:
        return f"indices are {indices.dtype}; they must be uint8"
    if values.numel() != kept or indices.numel() != index_bytes:
        return (
            f"{values.numel()} values and {indices.numel()} bytes of indices are not those of {pattern} on "
            f"{rows} x {columns}: {kept} and {index_bytes}"
        )
    if bias is not None and bias.shape != (rows,):
        return f"the bias is {tuple(bias.shape)}; it must be ({rows},)"
    return None


def runs_take(keep: int, group: int, dtype: torch.dtype, columns: int) -> bool:
    """Whether the tensor-core kernel takes a weight that :func:`refusal` lets pass."""
    return (
        runs is not None
        and dtype != torch.float32
        and (keep, group) in runs.RUNS
        and columns % runs.RUNS[keep, group] == 0
    )


def choose(
    keep: int, group: int, dtype: torch.dtype, n: int, rows: int, columns: int, processors: int
) -> Gather | Any:
    """How to cut the work for ``n`` rows of x: by instructions and bytes, not yet by timing.

    ``bench/general.py --tune`` times the alternatives.
    """
    warps = 8 if rows <= 32 * processors else 4
    # A kept weight costs gather 12 instructions and 4 for each row of x, and runs 9 to 25 for 8 rows.
    if runs_take(keep, group, dtype, columns) and (n > 1 or 2 * keep >= group):
        run = runs.RUNS[keep, group]
        while warps > 1 and warps * 4 * run > columns:
            warps //= 2
        if n > 16:
            return runs.Runs(min(warps, 4), 32 // run, 1, 32)
        units = 32 // run if warps * 128 <= columns else 1
        return runs.Runs(warps, 1, units, 8 if n <= 8 else 16, ahead=n <= 8)
    bits = keep * index_bits(keep, group) or group
    run = group * gather.scopes_of_run(keep, bits, dtype.itemsize, columns // group)
    while warps > 1 and warps * 4 * run > columns:
        warps //= 2
    return Gather(warps, 1 if n == 1 else 2 if n == 2 else 4 if n <= 4 else 8)
