"""A 2:4 weight, compressed as cuSPARSELt reads it on sm_90, in one pass over the dense weight.

``torch._cslt_compress`` makes the same bytes and takes 10 to 20 times as long. They are, for (rows,
columns) in whole tiles of 64 x 64: the two kept values of each four, row by row; then for each tile,
column tiles first, 1024 codes of four bits. A code is the position of the first value plus four times that
of the second. In a tile a code's position has the bits, from the lowest, 8 of the row, 4, 1 and 2 of the
scope, 1, 2, 4, 16 and 32 of the row, 8 of the scope: 16 bits hold rows r and r + 8 of scopes s and s + 4.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64  # rows and columns
DTYPES = (torch.bfloat16, torch.float16)
_NAN = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}
_WIDTH = 2  # tiles of a program
_WARPS = 4


@triton.jit
def compress_kernel(
    w_ptr,  # int16: the bits of the weight
    values_ptr,  # int16
    codes_ptr,  # int16
    columns,
    down,  # strides of the weight
    across,
    NAN: tl.constexpr,
    WIDTH: tl.constexpr,
):
    SCOPES: tl.constexpr = 16 * WIDTH
    row = tl.program_id(0) * 64 + tl.arange(0, 64)
    column = tl.program_id(1) * 64 * WIDTH + tl.arange(0, 64 * WIDTH)
    inside = (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * down + column.to(tl.int64)[None, :] * across
    w = tl.load(w_ptr + at, mask=inside, other=0)
    even, odd = tl.split(tl.reshape(w, (64, SCOPES, 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    # Whether each is other than zero, of either sign.
    na, nb = (a & 0x7FFF) != 0, (b & 0x7FFF) != 0
    nc, nd = (c & 0x7FFF) != 0, (d & 0x7FFF) != 0
    first = tl.where(na, 0, tl.where(nb, 1, 2))
    second = tl.where(nc & (first < 2), 2, first + 1)
    second = tl.where(nd, 3, second)
    low = tl.where(first == 0, a, tl.where(first == 1, b, c))
    high = tl.where(second == 1, b, tl.where(second == 2, c, d))
    # Three of four do not fit: NaN, so that no product is silently wrong.
    many = na.to(tl.int32) + nb.to(tl.int32) + nc.to(tl.int32) + nd.to(tl.int32) > 2
    low = tl.where(many, NAN, low).to(tl.int16)
    kept = tl.reshape(tl.join(low, high), (64, 2 * SCOPES))
    place = tl.program_id(1) * 32 * WIDTH + tl.arange(0, 2 * SCOPES)
    values = row.to(tl.int64)[:, None] * (columns // 2) + place[None, :]
    tl.store(values_ptr + values, kept, mask=(place < columns // 2)[None, :])

    # rows: 16 and 32; 8; 1, 2, 4. Scopes: the tile; 8; 4; 1 and 2.
    code = tl.reshape(first + 4 * second, (4, 2, 8, 2 * WIDTH, 2, 4))
    upper = tl.reshape(4 * tl.arange(0, 2), (1, 2, 1, 1, 1, 1))
    left = tl.reshape(8 * tl.arange(0, 2), (1, 1, 1, 1, 2, 1))
    # The codes have different bits: their sum is their union.
    word = tl.sum(tl.sum(code << (upper + left), 4), 1)  # (4, 8, 2 WIDTH, 4)
    line = tl.reshape(tl.arange(0, 32), (4, 8, 1, 1))  # 1, 2, 4, 16 and 32 of the row
    half = tl.reshape(tl.arange(0, 2 * WIDTH), (1, 1, 2 * WIDTH, 1))
    scope = tl.reshape(tl.arange(0, 4), (1, 1, 1, 4))
    tile = tl.program_id(1) * WIDTH + half // 2
    base = (tl.program_id(0).to(tl.int64) * (columns // 64) + tile) * 256
    codes = base + (half % 2) * 128 + line * 4 + scope
    tl.store(codes_ptr + codes, word.to(tl.int16), mask=tile < columns // 64)


def covers(shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether the kernel takes weights of a shape (either way round) and dtype."""
    return (
        len(shape) == 2 and dtype in DTYPES and min(shape) > 0 and not any(n % TILE for n in shape)
    )


def compress(weight: Tensor) -> Tensor:
    """What ``torch._cslt_compress`` makes of a 2:4 weight on sm_90.

    Args:
        weight: (rows, columns) bfloat16 or float16, any strides (a transpose costs no copy), of which at
            most two of each four neighbours in a row are not zero. In a scope with more, the first value
            becomes NaN.

    Returns:
        (rows, columns * 9 // 16), the dtype of ``weight``.

    Raises:
        ValueError: what :func:`covers` refuses.
    """
    if not covers(tuple(weight.shape), weight.dtype):
        raise ValueError(
            f"a {weight.dtype} weight of shape {tuple(weight.shape)}; the kernel takes bfloat16 or "
            f"float16 in whole tiles of {TILE} x {TILE}"
        )
    rows, columns = weight.shape
    out = torch.empty((rows, columns * 9 // 16), dtype=weight.dtype, device=weight.device)
    flat = out.view(torch.int16).view(-1)
    values, codes = flat[: rows * columns // 2], flat[rows * columns // 2 :]
    grid = (rows // TILE, triton.cdiv(columns // TILE, _WIDTH))
    compress_kernel[grid](
        weight.view(torch.int16), values, codes, columns, *weight.stride(),
        NAN=_NAN[weight.dtype], WIDTH=_WIDTH, num_warps=_WARPS,
    )  # fmt: skip
    return out
