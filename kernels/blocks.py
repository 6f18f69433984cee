"""``linear`` of 1 to 64 rows by a weight of dense RxC blocks, the same number kept in each row of blocks.

A program takes up to 64 rows of a row of blocks. It first decodes the numbers of the kept blocks from the
bit stream, each to a word, then walks over the blocks: their values are consecutive in memory, and the
columns of x that belong to them are looked up. Its warps divide the blocks, so a program's sums need no
other program: a dot product with as many batches as warps, each on tensor cores, or with multiply-adds in
float32. Values and x come through shared memory in buffers, several steps ahead.

Blocks of 16 rows or more fill the tensor cores; smaller ones leave part of them idle.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gpu
from .columns import (
    DTYPES,
    LARGEST,
    columns_together,
    mismatch,
)
from .launch import scratch, start


@dataclass(frozen=True)
class Blocks:
    """A configuration: how a program's work is cut."""

    warps: int  # over blocks
    rows: int  # of W a program; of one row of blocks
    columns: int  # of W a warp and step
    batch: int  # rows of x a program
    stages: int = 5  # of the pipeline: three more than buffers of a step's values and x


def index_bits(keep: int, blocks: int) -> int:
    """Bits of a block's number where the kept ones are coded by number, or 0 for a bitmap."""
    bits = (blocks - 1).bit_length()
    return bits if keep * bits <= blocks else 0


def code_bytes(block_rows: int, block_columns: int, keep: int, rows: int, columns: int) -> int:
    """Bytes of the codes of a (rows, columns) weight."""
    blocks = columns // block_columns
    return -(-(rows // block_rows) * (keep * index_bits(keep, blocks) or blocks) // 8)


def refusal(
    block_rows: int,
    block_columns: int,
    keep: int,
    dtype: torch.dtype,
    rows: int,
    columns: int,
    device: torch.device,
) -> str | None:
    """Why the kernels cannot take a (rows, columns) weight of such blocks, or None if they can.

    Each row of blocks keeps ``keep`` of its blocks. They take blocks of two weights or more, in
    bfloat16, float16 and float32, up to 2**31 weights and 65536 blocks in a row, and GPUs from sm_80 on.
    """
    if block_rows < 1 or block_columns < 1 or block_rows * block_columns < 2:
        return f"blocks of {block_rows} x {block_columns}: a block is two weights or more"
    if dtype not in DTYPES:
        return f"values are {dtype}; the kernels take bfloat16, float16 and float32"
    if rows < 1 or columns < 1 or rows % block_rows or columns % block_columns:
        return f"{rows} x {columns} is not made of blocks of {block_rows} x {block_columns}"
    blocks = columns // block_columns
    if not 1 <= keep < blocks:
        return f"{keep} of {blocks} blocks in a row: one or more must be kept, but not all"
    if rows * columns > LARGEST or blocks > 2**16:
        return f"{rows} x {columns} is over 2**31 weights or 65536 blocks in a row"
    return gpu.refusal(device)


def linear(
    x: Tensor,  # (N, columns)
    values: Tensor,  # kept blocks, (rows / block_rows, keep, block_rows * block_columns), any shape
    indices: Tensor,  # (code_bytes,) uint8
    bias: Tensor | None,  # (rows,)
    *,
    block_rows: int,
    block_columns: int,
    keep: int,
    rows: int,
    columns: int,
    config: Blocks | None = None,
) -> Tensor:  # (N, rows)
    """``x @ W.t() + bias`` for the packed (rows, columns) weight W, summed in float32 in a fixed order.

    NaN and infinity in a row of x reach only that row of y, in the outputs whose blocks keep the column.

    Args:
        x: 1 to 64 rows; any strides; copied where its columns are not contiguous.
        values: packed values.
        indices: packed codes: a stream of block numbers or bitmaps, whichever is smaller.
        bias: in the dtype of x, or None.
        block_rows: rows of a block.
        block_columns: columns of a block.
        keep: blocks kept of each row of blocks.
        rows: rows of W.
        columns: columns of W.
        config: how to cut the work; by default :func:`choose` decides.

    Raises:
        ValueError: sizes, dtypes or devices that do not belong together, or a :func:`refusal`.
    """
    reason = refusal(block_rows, block_columns, keep, values.dtype, rows, columns, x.device)
    reason = reason or mismatch(
        x, values, indices, bias, rows, columns, rows * keep * block_columns,
        code_bytes(block_rows, block_columns, keep, rows, columns),
        f"{keep} blocks of {block_rows} x {block_columns} a row",
    )  # fmt: skip
    if reason is not None:
        raise ValueError(f"packed linear: {reason}")
    config = config or choose(values.dtype, x.shape[0], rows, gpu.processors(x.device))
    with torch.cuda.device(x.device):
        return launch(config, x, values, indices, bias, block_rows, block_columns, keep, rows)


@triton.jit
def _write_numbers(
    c_ptr,
    numbers_ptr,
    scope,
    keep,
    blocks,
    end,
    BITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The ascending numbers of the kept blocks of a scope, from its codes to ``numbers_ptr``."""
    at = tl.arange(0, CHUNK)
    if BITS:
        for start in range(0, keep, CHUNK):
            live = start + at < keep
            bit = (scope * keep + start + at) * BITS
            word = tl.load(c_ptr + (bit >> 3), mask=live, other=0).to(tl.int32)
            for i in tl.static_range(1, (BITS + 14) // 8):
                byte = tl.load(c_ptr + (bit >> 3) + i, mask=live & ((bit >> 3) + i < end), other=0)
                word |= byte.to(tl.int32) << (8 * i)
            number = (word >> (bit & 7).to(tl.int32)) & ((1 << BITS) - 1)
            tl.store(numbers_ptr + start + at, number, mask=live)
    else:
        before = 0
        for start in range(0, blocks, CHUNK):
            live = start + at < blocks
            bit = scope * blocks + start + at
            byte = tl.load(c_ptr + (bit >> 3), mask=live, other=0).to(tl.int32)
            kept = tl.where(live, (byte >> (bit & 7).to(tl.int32)) & 1, 0)
            place = before + tl.cumsum(kept, 0) - kept
            tl.store(numbers_ptr + place, start + at, mask=(kept > 0) & (place < keep))
            before += tl.sum(kept, 0)


@triton.jit(
    do_not_specialize=["M", "N", "keep", "blocks", "end"],
    do_not_specialize_on_alignment=["c_ptr", "numbers_ptr", "b_ptr", "y_ptr"],
)
def blocks_kernel(
    x_ptr,  # (N, K), rows sx apart
    v_ptr,  # (M / R, keep, R, C)
    c_ptr,  # the bit stream, uint8
    numbers_ptr,  # (M / R, keep) int32 scratch
    b_ptr,  # (M,)
    y_ptr,  # (N, M)
    M,
    N,
    keep,
    blocks,  # in a row of blocks
    sx,
    end,  # bytes of the bit stream
    R: tl.constexpr,
    C: tl.constexpr,
    PIECE: tl.constexpr,  # columns of a block that are taken together: a power of two
    BITS: tl.constexpr,  # of a block's number; 0 for a bitmap
    CHUNK: tl.constexpr,
    WK: tl.constexpr,
    BR: tl.constexpr,
    NP: tl.constexpr,  # pieces a warp and step
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,  # no program goes past the last row of a block
    BIAS: tl.constexpr,
):
    PIECES: tl.constexpr = C // PIECE  # of a block
    PARTS: tl.constexpr = (R + BR - 1) // BR  # programs a row of blocks
    batches = tl.cdiv(N, BN)
    pn = tl.program_id(0) % batches
    pm = tl.program_id(0) // batches
    scope = pm // PARTS
    first = pm % PARTS * BR  # row within the block
    numbers = numbers_ptr + scope * keep
    # Programs that share a row of blocks write the same numbers.
    _write_numbers(c_ptr, numbers, scope, keep, blocks, end, BITS, CHUNK)
    tl.debug_barrier()

    r = first + tl.arange(0, BR)[None, :, None, None]
    n = pn * BN + tl.arange(0, BN)[None, :, None, None]
    c = tl.arange(0, PIECE)[None, None, None, :]
    piece0 = tl.arange(0, WK)[:, None] * NP + tl.arange(0, NP)[None, :]
    values = v_ptr + (scope * keep).to(tl.int64) * (R * C)
    rows = x_ptr + n.to(tl.int64) * sx
    acc = tl.zeros([WK, BR, BN], tl.float32)
    for step in tl.range(0, tl.cdiv(keep * PIECES, WK * NP), num_stages=STAGES):
        piece = piece0 + step * (WK * NP)
        live = piece < keep * PIECES
        number = tl.load(numbers + piece // PIECES, mask=live, other=0)
        number = tl.minimum(tl.maximum(number, 0), blocks - 1)  # within x, whatever the codes say
        column = number * C + piece % PIECES * PIECE
        offset = piece // PIECES * (R * C) + piece % PIECES * PIECE
        in_v = live[:, None, :, None]
        in_x = live[:, None, :, None] & (n < N)
        if not EVEN:
            in_v = in_v & (r < R)
        v = tl.load(
            values + (offset[:, None, :, None] + r * C + c),
            mask=in_v,
            other=0.0,
            eviction_policy="evict_first",
        )
        x = tl.load(rows + (column[:, None, :, None] + c), mask=in_x, other=0.0)
        w = v.reshape([WK, BR, NP * PIECE])
        x_columns = x.reshape([WK, BN, NP * PIECE]).permute(0, 2, 1)
        acc = tl.dot(w, x_columns, acc, input_precision="ieee")
    total = tl.sum(acc, 0)  # (BR, BN)
    row = first + tl.arange(0, BR)
    inside = row < R
    m = scope * R + row
    n = pn * BN + tl.arange(0, BN)
    if BIAS:
        total += tl.load(b_ptr + m, mask=inside, other=0.0).to(tl.float32)[:, None]
    y = y_ptr + (n[None, :].to(tl.int64) * M + m[:, None])
    tl.store(y, total.to(y_ptr.dtype.element_ty), mask=inside[:, None] & (n < N)[None, :])


def launch(
    config: Blocks,
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    block_rows: int,
    block_columns: int,
    keep: int,
    rows: int,
) -> Tensor:
    """The product; arguments are already checked."""
    x = columns_together(x)
    n, columns = x.shape
    blocks = columns // block_columns
    piece = min(block_columns & -block_columns, config.columns)
    height = min(config.rows, 1 << (block_rows - 1).bit_length())
    parts = -(-block_rows // height)
    y = torch.empty(n, rows, dtype=x.dtype, device=x.device)
    numbers = scratch(rows // block_rows * keep, torch.int32, x.device)
    bits = index_bits(keep, blocks)
    grid = (rows // block_rows * parts * -(-n // config.batch),)
    arguments = (
        x, values.reshape(-1), indices.reshape(-1), numbers,
        y if bias is None else bias.contiguous(), y,
        rows, n, keep, blocks, x.stride(0), indices.numel(),
    )  # fmt: skip
    constants = {
        "R": block_rows,
        "C": block_columns,
        "PIECE": piece,
        "BITS": bits,
        "CHUNK": min(1024, max(32, 1 << ((keep if bits else blocks) - 1).bit_length())),
        "WK": config.warps,
        "BR": height,
        "NP": config.columns // piece,
        "BN": config.batch,
        "STAGES": config.stages,
        "EVEN": block_rows % height == 0,
        "BIAS": bias is not None,
        "num_warps": config.warps,
    }
    start(blocks_kernel, grid, arguments, constants)
    return y


def choose(dtype: torch.dtype, n: int, rows: int, processors: int) -> Blocks:
    """How to cut the work for ``n`` rows of x: by bytes in flight, not yet by timing.

    ``bench/general.py --tune`` times the alternatives.
    """
    batch = 8 if n <= 8 else 16 if n <= 16 else 32 if n <= 32 else 64
    if dtype == torch.float32:
        return Blocks(8 if n <= 16 else 4, 16, 32, min(batch, 32), stages=3)
    if n > 32:
        return Blocks(4, 32, 64, batch, stages=4)  # 49 KB of shared memory
    if n > 16:
        return Blocks(4, 32, 64, batch)
    # Few rows: small programs, as there are hardly two for each multiprocessor.
    return Blocks(8, 32 if rows > 64 * processors else 16, 64, batch)
