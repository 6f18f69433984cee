"""Transposable 2:4 masks: of every 4x4 tile the best mask whose rows and columns keep two, exactly.

There are 90, and a thread that holds a tile finds the best from 19 sums. Call the columns that a row keeps
its pair. The first two rows share both columns of their pairs, none or one, which leaves little choice
for the last two:

- equal pairs: both of the last rows keep the other two columns (6 masks);
- opposite pairs: the last rows have opposite pairs too, any (36 masks, the best of 6 and the best of 6);
- one column a in both and one column z in neither: z is in both of the last rows, and of b and c each of the
  four rows keeps one (48 masks: 12 choices of a and z, and for either two rows the better of 2).

One read of the weight and one write of the mask. Sums are of float64, in which the square of a float32 is
exact. A mask is 16 bits, the highest for row 0, column 0: of equal sums the first in lexical order is the
one of the largest number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SIDE = 4
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TILES = 256  # of a program
_WARPS = 8


@triton.jit
def _row(given_ptr, at, inside, SQUARED: tl.constexpr, TILES: tl.constexpr):
    """The sums of the six pairs of a row, (TILES,) each: 01, 02, 03, 12, 13, 23."""
    score = tl.load(given_ptr + at, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
    if SQUARED:
        score = score * score
        score = tl.where(score != score, float("inf"), score)  # NaN counts as the largest
    even, odd = tl.split(tl.reshape(score, (TILES, 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a + b, a + c, a + d, b + c, b + d, c + d


@triton.jit
def _crossed(u_first, v_second, u_second, v_first, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """The better of two ways to give two pairs to two rows u and v, and its bits; FIRST is the larger."""
    straight = u_first + v_second
    across = u_second + v_first
    code = tl.where(straight >= across, FIRST * 16 + SECOND, SECOND * 16 + FIRST)
    return tl.maximum(straight, across), code


@triton.jit
def _opposite(u01, u02, u03, u12, u13, u23, v01, v02, v03, v12, v13, v23):
    """The best of two rows with opposite pairs."""
    one, first = _crossed(u01, v23, u23, v01, 12, 3)
    two, second = _crossed(u02, v13, u13, v02, 10, 5)
    three, third = _crossed(u03, v12, u12, v03, 9, 6)
    best, code = _larger(one, first, two, second)
    return _larger(best, code, three, third)


@triton.jit
def _larger(best, code, total, other):
    """The larger sum and its bits; of equal sums the larger bits."""
    wins = (total > best) | ((total == best) & (other > code))
    return tl.where(wins, total, best), tl.where(wins, other, code)


@triton.jit
def _met(
    best, code,
    u_ab, v_ac, u_ac, v_ab, AB: tl.constexpr, AC: tl.constexpr,
    w_zb, x_zc, w_zc, x_zb, ZB: tl.constexpr, ZC: tl.constexpr,
):  # fmt: skip
    """:func:`_larger`, of the best so far and the best of which two rows share a and the others z."""
    upper, upper_code = _crossed(u_ab, v_ac, u_ac, v_ab, AB, AC)
    lower, lower_code = _crossed(w_zb, x_zc, w_zc, x_zb, ZB, ZC)
    return _larger(best, code, upper + lower, upper_code * 256 + lower_code)


@triton.jit
def best_kernel(
    given_ptr,
    mask_ptr,  # int32: four elements of the mask
    columns,
    SQUARED: tl.constexpr,
    TILES: tl.constexpr,
):
    first = tl.program_id(1) * TILES
    near = first * 4 + tl.arange(0, 4 * TILES)
    inside = near < columns
    at = tl.program_id(0).to(tl.int64) * 4 * columns + near
    u01, u02, u03, u12, u13, u23 = _row(given_ptr, at, inside, SQUARED, TILES)
    v01, v02, v03, v12, v13, v23 = _row(given_ptr, at + columns, inside, SQUARED, TILES)
    w01, w02, w03, w12, w13, w23 = _row(given_ptr, at + 2 * columns, inside, SQUARED, TILES)
    x01, x02, x03, x12, x13, x23 = _row(given_ptr, at + 3 * columns, inside, SQUARED, TILES)

    upper, upper_code = _opposite(u01, u02, u03, u12, u13, u23, v01, v02, v03, v12, v13, v23)
    lower, lower_code = _opposite(w01, w02, w03, w12, w13, w23, x01, x02, x03, x12, x13, x23)
    best, code = upper + lower, upper_code * 256 + lower_code

    best, code = _larger(best, code, u01 + v01 + (w23 + x23), 0xCC33)
    best, code = _larger(best, code, u02 + v02 + (w13 + x13), 0xAA55)
    best, code = _larger(best, code, u03 + v03 + (w12 + x12), 0x9966)
    best, code = _larger(best, code, u12 + v12 + (w03 + x03), 0x6699)
    best, code = _larger(best, code, u13 + v13 + (w02 + x02), 0x55AA)
    best, code = _larger(best, code, u23 + v23 + (w01 + x01), 0x33CC)

    # a in both of the first rows and z in both of the last ones; of b and c each row keeps one.
    best, code = _met(best, code, u02, v03, u03, v02, 10, 9, w12, x13, w13, x12, 6, 5)
    best, code = _met(best, code, u12, v13, u13, v12, 6, 5, w02, x03, w03, x02, 10, 9)
    best, code = _met(best, code, u01, v03, u03, v01, 12, 9, w12, x23, w23, x12, 6, 3)
    best, code = _met(best, code, u12, v23, u23, v12, 6, 3, w01, x03, w03, x01, 12, 9)
    best, code = _met(best, code, u01, v02, u02, v01, 12, 10, w13, x23, w23, x13, 5, 3)
    best, code = _met(best, code, u13, v23, u23, v13, 5, 3, w01, x02, w02, x01, 12, 10)
    best, code = _met(best, code, u01, v13, u13, v01, 12, 5, w02, x23, w23, x02, 10, 3)
    best, code = _met(best, code, u02, v23, u23, v02, 10, 3, w01, x13, w13, x01, 12, 5)
    best, code = _met(best, code, u01, v12, u12, v01, 12, 6, w03, x23, w23, x03, 9, 3)
    best, code = _met(best, code, u03, v23, u23, v03, 9, 3, w01, x12, w12, x01, 12, 6)
    best, code = _met(best, code, u02, v12, u12, v02, 10, 6, w03, x13, w13, x03, 9, 5)
    best, code = _met(best, code, u03, v13, u13, v03, 9, 5, w02, x12, w12, x02, 10, 6)

    tile = first + tl.arange(0, TILES)
    inside = tile < columns // 4
    to = mask_ptr + tl.program_id(0).to(tl.int64) * columns + tile  # a row has columns / 4 words
    for row in tl.static_range(4):
        bits = code >> (12 - 4 * row)
        word = (bits >> 3 & 1) | (bits & 4) << 6 | (bits & 2) << 15 | (bits & 1) << 24
        tl.store(to + row * (columns // 4), word, mask=inside)


def covers(given: Tensor) -> bool:
    """Whether the kernel takes scores or a weight."""
    return (
        given.dtype in DTYPES
        and given.is_contiguous()
        and given.ndim == 2
        and given.numel() > 0
        and not any(n % SIDE for n in given.shape)
    )


def best(given: Tensor, squared: bool) -> Tensor:
    """The 2:4 mask of the largest sum in each tile, of equal sums the first in lexical order.

    Args:
        given: (rows, columns) contiguous; the scores, or with ``squared`` what to square (NaN is the
            largest then).

    Returns:
        bool, of the shape of ``given``.

    Raises:
        ValueError: what :func:`covers` refuses.
    """
    if not covers(given):
        raise ValueError(
            f"{given.dtype} of shape {tuple(given.shape)} and strides {given.stride()}; the kernel takes "
            "contiguous float32, bfloat16 or float16 in whole tiles of 4 x 4"
        )
    rows, columns = given.shape
    mask = torch.empty(given.shape, dtype=torch.bool, device=given.device)
    grid = (rows // SIDE, triton.cdiv(columns // SIDE, _TILES))
    words = mask.view(torch.int8).view(torch.int32)
    best_kernel[grid](given, words, columns, SQUARED=squared, TILES=_TILES, num_warps=_WARPS)
    return mask
