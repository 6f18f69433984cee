"""Order statistics and top-k masks of rows: one read of each row, which stays in registers.

A row of up to 16384 values lies in the registers of ``lanes`` lanes and is searched by bisection: a pass
counts the values below a pivot, two instructions a value (a compare that gives 1.0 or 0.0 and, on the
other pipe, a float sum; a count of up to 2**24 is exact). A row ends its search when its bracket leaves
one candidate on either side, after 7 to 12 passes for values of any common distribution; ties and rows
of a huge range end by the bisection of order-mapped integers, after at most 24 + 32 passes.

The state is a pair of such integers, ``key``: the order of keys is the order of values, -0.0 below 0.0.
A bfloat16 or float16 value is searched as the float32 it equals, on the grid of its own type. NaN is above
every number: it is never below a pivot.

The invariant: with m the position of the answer in ascending order, a
bracket ``[lo, hi]`` has ``below(lo) <= m`` values below lo, and more than m values up to hi.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LONGEST = (
    16384  # values of a row that registers hold; longer rows are read once for each byte of a value
)

# What a kernel writes.
KTH, PAIR, MASK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Where the tile of a program has the vectors of a lane, and then, without that dim, the lanes of a row:
# so that the lanes vary fastest, for which Triton takes the first dim, and from 3.7 on the last one.
_LANES_LAST = tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 7)
_J, _Q = (tl.constexpr(0), tl.constexpr(1)) if _LANES_LAST else (tl.constexpr(2), tl.constexpr(0))
# Passes that bisect values before those that bisect keys.
_PATIENCE = tl.constexpr(24)

_SHIFTS = {torch.float32: 0, torch.float64: 0, torch.bfloat16: 16, torch.float16: 13}
_NATIVE = {16: torch.int16, 32: torch.int32, 64: torch.int64}
_INFINITY = {
    torch.bfloat16: 0x7F80,
    torch.float16: 0x7C00,
    torch.float32: 0x7F800000,
    torch.float64: 0x7FF0000000000000,
}
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
DTYPES = (*_SHIFTS, *_INTEGERS)


@dataclass(frozen=True)
class Cut:
    """How rows are laid over lanes: ``vector`` neighbours a lane, ``lanes`` for a row."""

    lanes: int  # a power of two; from 64 on, lanes / 32 warps share a row
    vector: int  # values that a lane loads at once
    warps: int = 1  # of a program; lanes / 32 where that is more


@triton.jit
def _encode(value, SHIFT: tl.constexpr):
    """The key of a float, or the integer itself; ``SHIFT`` drops the bits that the type lacks."""
    if value.dtype == tl.float32:
        bits = value.to(tl.int32, bitcast=True)
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT
    elif value.dtype == tl.float64:
        bits = value.to(tl.int64, bitcast=True)
        return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        return value


@triton.jit
def _decode(key, kind: tl.constexpr, SHIFT: tl.constexpr):
    """The value of a key: the inverse of ``_encode``."""
    if kind == tl.float32:
        sign = key >> 31
        bits = (key << SHIFT) | (sign & ((1 << SHIFT) - 1))
        return (bits ^ (sign & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    elif kind == tl.float64:
        return (key ^ ((key >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.float64, bitcast=True)
    else:
        return key


@triton.jit
def _over(value):
    """A value of each row, (R,), against the tile (Q, R, J, E), or (J, R, Q, E)."""
    return tl.expand_dims(tl.expand_dims(tl.expand_dims(value, _Q), _J), 3)


@triton.jit
def _sum(x):
    """Of each row: within a lane first, then between lanes."""
    return tl.sum(tl.sum(tl.sum(x, 3), _J), _Q)


@triton.jit
def _min(x):
    return tl.min(tl.min(tl.min(x, 3), _J), _Q)


@triton.jit
def _max(x):
    return tl.max(tl.max(tl.max(x, 3), _J), _Q)


@triton.jit
def _count(condition):
    return _sum(tl.where(condition, 1.0, 0.0))


@triton.jit
def _any(condition):
    return tl.max(condition.to(tl.int32), 0) > 0


@triton.jit
def _search(x, least, most, total, place, SHIFT: tl.constexpr):
    """The value at ``place``, from 0 in ascending order, of each row's ``total`` numbers.

    x holds the row and what fills it up, which is above every pivot; ``least`` and ``most`` are the row's.
    """
    FLOAT: tl.constexpr = x.dtype.is_floating()
    lo = _encode(least, SHIFT)
    hi = _encode(most, SHIFT)
    below = place * 0.0  # values below lo
    upto = total  # values up to hi
    passes = 0
    if FLOAT:
        # The middle of an infinite value is none: bisect keys from the start.
        infinite = (least == float("-inf")) | (most == float("inf"))
        passes = tl.max(infinite.to(tl.int32), 0) * _PATIENCE
    going = _any((lo < hi) & (below != place) & (upto != place + 1))
    while going:
        middle = (lo | hi) - ((lo ^ hi) >> 1)  # rounded up, without overflow
        if FLOAT:  # noqa: SIM102 (one is decided while compiling, one by the GPU)
            if passes < _PATIENCE:
                value = _decode(lo, x.dtype, SHIFT) * 0.5 + _decode(hi, x.dtype, SHIFT) * 0.5
                middle = tl.minimum(tl.maximum(_encode(value, SHIFT), lo + 1), hi)
        passes += 1
        count = _count(x < _over(_decode(middle, x.dtype, SHIFT)))
        under = count <= place
        lo = tl.where(under, middle, lo)
        below = tl.where(under, count, below)
        above = middle - 1
        if FLOAT:
            above = tl.where(
                middle == 0, -2, above
            )  # what is below 0.0 is below -0.0, whose key is -1
        hi = tl.where(under, hi, above)
        upto = tl.where(under, upto, count)
        going = _any((lo < hi) & (below != place) & (upto != place + 1))
    # The smallest from lo on or, where hi is the tight side, the largest up to hi: of the negatives, the
    # smallest again.
    flip = (lo < hi) & (below != place)
    bound = _decode(tl.where(flip, hi, lo), x.dtype, SHIFT)
    if FLOAT:
        sign = tl.where(flip, -1.0, 1.0).to(x.dtype)
        y = x * _over(sign)
        return sign * _min(tl.where(y >= _over(bound * sign), y, float("inf")))
    else:
        turn = tl.where(flip, -1, 0).to(x.dtype)
        y = x ^ _over(turn)
        return turn ^ _min(
            tl.where(y >= _over(bound ^ turn), y, _decode(_last(x.dtype), x.dtype, 0))
        )


@triton.jit
def _last(kind: tl.constexpr):
    """The largest integer of a type."""
    return 0x7FFFFFFF if kind == tl.int32 else 0x7FFFFFFFFFFFFFFF


@triton.jit(do_not_specialize=["rows", "pieces", "k"])
def rows_kernel(
    x_ptr,  # (rows, n), contiguous
    y_ptr,  # (rows,) the k-th; or a mask, (rows, n) bytes
    z_ptr,  # (rows,) the next smaller, for PAIR
    rows,
    pieces,  # n / E
    k,
    DTYPE: tl.constexpr,  # of the search: float32, float64, int32 or int64
    FLOAT: tl.constexpr,  # whether it is a float
    MODE: tl.constexpr,
    ABSOLUTE: tl.constexpr,  # of magnitudes
    NANS: tl.constexpr,  # whether there may be NaN
    EVEN: tl.constexpr,  # whether n is J * Q * E
    SHIFT: tl.constexpr,
    J: tl.constexpr,
    R: tl.constexpr,
    Q: tl.constexpr,
    E: tl.constexpr,
    STEPS: tl.constexpr,  # log2 of J * Q * E
):
    # The order of the dims makes the layout: E in a lane's vector, Q then R over lanes, J again in a lane.
    if _J == 0:
        j = tl.arange(0, J)[:, None, None, None]
        q = tl.arange(0, Q)[None, None, :, None]
    else:
        q = tl.arange(0, Q)[:, None, None, None]
        j = tl.arange(0, J)[None, None, :, None]
    r = tl.arange(0, R)[None, :, None, None]
    e = tl.arange(0, E)[None, None, None, :]
    row0 = tl.program_id(0) * R
    column = (j * Q + q) * E + e
    n = pieces * E
    offset = ((row0 + r).to(tl.int64) * pieces + (j * Q + q)) * E + e
    live = (row0 + r < rows) & (column < n)
    x = tl.load(x_ptr + offset, mask=live).to(DTYPE)
    if ABSOLUTE:
        x = tl.abs(x)
    # What fills a row up is never below a pivot.
    if FLOAT:
        x = tl.where(live, x, float("nan"))
        most = _max(x)
    else:
        most = _max(tl.where(live, x, -_last(DTYPE) - 1))
        x = tl.where(live, x, _last(DTYPE))
    least = _min(x)
    total = tl.zeros_like(most).to(tl.float32) + n
    if FLOAT and (NANS or not EVEN):
        numbers = _count(x == x)
        place = total - k
        numbers_or_one = tl.maximum(numbers, 1.0)
        answer = _search(x, least, most, numbers, tl.minimum(place, numbers_or_one - 1.0), SHIFT)
    else:
        numbers = total
        place = total - k
        answer = _search(x, least, most, total, place, SHIFT)

    row = row0 + tl.arange(0, R)
    if MODE == MASK:
        reached = n - _count(x < _over(answer))
        keep = (x >= _over(answer)) & live
        if _any((reached > k) & (row < rows)):  # ties at the edge: the lowest indices
            tied = x == _over(answer)
            room = k - _count((x > _over(answer)) & live)
            first = tl.zeros_like(room).to(tl.int32)
            last = first + (J * Q * E - 1)
            for _ in range(STEPS):
                half = (first + last) >> 1
                enough = _count(tied & (column <= _over(half))) >= room
                last = tl.where(enough, half, last)
                first = tl.where(enough, first, half + 1)
            keep = ((x > _over(answer)) | (tied & (column <= _over(last)))) & live
        tl.store(y_ptr + offset, keep.to(tl.int8), mask=live)
    else:
        if MODE == PAIR:
            lower = x < _over(answer)
            if FLOAT:
                other = _max(tl.where(lower, x, float("-inf")))
            else:
                other = _max(tl.where(lower, x, -_last(DTYPE) - 1))
            other = tl.where(_count(lower) < place, answer, other)
            if FLOAT:
                # At the edge of NaN, the next is the largest number.
                other = tl.where(place == numbers, most, other)
                other = tl.where(place > numbers, float("nan"), other)
            tl.store(z_ptr + row, other.to(z_ptr.dtype.element_ty), mask=row < rows)
        if FLOAT:
            if MODE == KTH and _any(answer == 0):
                # Compares do not tell -0.0 from 0.0: the negative come first.
                negative = _count((x == 0) & (_encode(x, 0) < 0)) + _count(x < 0)
                zero = tl.where(place < negative, -1.0, 1.0).to(DTYPE) * 0.0
                answer = tl.where(answer == 0, zero, answer)
            answer = tl.where(place >= numbers, float("nan"), answer)
        tl.store(y_ptr + row, answer.to(y_ptr.dtype.element_ty), mask=row < rows)


def choose(n: int, itemsize: int) -> Cut:
    """A cut for rows of n values: 16 bytes a load, up to 32 values a lane."""
    vector = max(1, 16 // itemsize)
    while n % vector:
        vector //= 2
    padded = _power(n)
    return Cut(min(max(1, padded // 32), padded // vector), vector)


def _power(n: int) -> int:
    """The power of two from n on."""
    return 1 << (n - 1).bit_length()


def kth_largest(x: Tensor, k: int, cut: Cut | None = None) -> Tensor:
    """The k-th largest of each row of x, (rows, n) contiguous; NaN is the largest. (rows,), of x's dtype.

    Raises:
        ValueError: k outside 1 to n, or what no kernel takes (see :func:`refusal`).
    """
    _check(x, k, x.shape[-1])
    if x.shape[1] > LONGEST:
        return _streamed(x, k)
    found = x.new_empty(x.shape[0])
    with _device(x):
        _launch(x, found, found, k, KTH, cut=cut)
    return found


def two_largest(x: Tensor, k: int, cut: Cut | None = None) -> tuple[Tensor, Tensor]:
    """The k-th and the next largest of each row, k up to n - 1; else as :func:`kth_largest`."""
    _check(x, k, x.shape[-1] - 1)
    if x.shape[1] > LONGEST:
        return _streamed(x, k), _streamed(x, k + 1)
    upper, lower = x.new_empty(x.shape[0]), x.new_empty(x.shape[0])
    with _device(x):
        _launch(x, upper, lower, k, PAIR, cut=cut)
    return upper, lower


def top_blocks(scores: Tensor, keep: int, absolute: bool = False, cut: Cut | None = None) -> Tensor:
    """True at the ``keep`` largest of each row, (rows, n) contiguous, n up to LONGEST; no NaN.

    Of equal scores the lowest indices are taken. With ``absolute`` the magnitudes of floats compete.

    Raises:
        ValueError: keep outside 1 to n, a longer row, or what no kernel takes.
    """
    _check(scores, keep, scores.shape[-1])
    if scores.shape[1] > LONGEST:
        raise ValueError(f"rows of {scores.shape[1]} scores; registers hold {LONGEST}")
    if absolute and not scores.dtype.is_floating_point:
        raise ValueError(f"magnitudes of {scores.dtype}; the smallest integer has none")
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    with _device(scores):
        _launch(scores, mask.view(torch.int8), scores, keep, MASK, absolute, nans=False, cut=cut)
    return mask


def refusal(x: Tensor) -> str | None:
    """Why the kernels cannot take the rows of x, or None if they can."""
    if x.ndim != 2 or not x.is_contiguous() or x.numel() == 0:
        return f"shape {tuple(x.shape)}, strides {x.stride()}; rows are (rows, n), contiguous, not empty"
    if x.dtype not in DTYPES:
        return f"{x.dtype} is not one of {', '.join(map(str, DTYPES))}"
    if max(x.shape) >= 2**31:
        return f"shape {tuple(x.shape)}; rows and n are below 2**31"
    return None


def _check(x: Tensor, k: int, most: int) -> None:
    reason = refusal(x)
    if reason is None and not 1 <= k <= most:
        reason = f"k={k} is not from 1 to {most}"
    if reason is not None:
        raise ValueError(reason)


def _device(x: Tensor) -> AbstractContextManager[Any]:
    return (
        torch.cuda.device(x.device) if x.is_cuda else nullcontext()
    )  # the interpreter's are on the CPU


def _searched(dtype: torch.dtype) -> Any:
    """The type in which values are searched: one that holds each of them."""
    if dtype.is_floating_point:
        return tl.float64 if dtype == torch.float64 else tl.float32
    return tl.int64 if dtype == torch.int64 else tl.int32


def _launch(
    x: Tensor,  # (rows, n), contiguous
    y: Tensor,
    z: Tensor,
    k: int,
    mode: Any,
    absolute: bool = False,
    nans: bool = True,
    cut: Cut | None = None,
    warmup: bool = False,
) -> object:
    """Launch, or with ``warmup`` compile only."""
    rows, n = x.shape
    cut = cut or choose(n, x.element_size())
    vector = cut.vector if x.data_ptr() % 16 == 0 else 1
    warps = max(cut.warps, cut.lanes // 32)
    groups = 32 * warps // cut.lanes
    padded = max(_power(n), cut.lanes * vector)
    arguments = (x, y, z, rows, n // vector, k)
    constants = {
        "DTYPE": _searched(x.dtype),
        "FLOAT": x.dtype.is_floating_point,
        "MODE": mode.value,
        "ABSOLUTE": absolute,
        "NANS": nans,
        "EVEN": padded == n,
        "SHIFT": _SHIFTS.get(x.dtype, 0),
        "Q": cut.lanes,
        "R": groups,
        "J": padded // (cut.lanes * vector),
        "E": vector,
        "STEPS": padded.bit_length() - 1,
        "num_warps": warps,
    }
    grid = (-(-rows // groups),)
    if warmup:
        return rows_kernel.warmup(*arguments, grid=grid, **constants)
    return rows_kernel[grid](*arguments, **constants)


# Longer rows: radix selection, a byte of the key a pass -----------------------------------------------


@triton.jit
def _rising(bits, FLOAT: tl.constexpr, WIDTH: tl.constexpr, INFINITY: tl.constexpr):
    """Native bits, sign-extended, as an integer whose bits rise with the value from 0 on; NaN is the last."""
    SIGNLESS: tl.constexpr = (1 << (WIDTH - 1)) - 1
    if FLOAT:
        nan = (bits & SIGNLESS) > INFINITY
        bits = tl.where(nan, SIGNLESS, bits ^ ((bits >> (WIDTH - 1)) & SIGNLESS))
    return bits


@triton.jit(do_not_specialize=["n"])
def digit_kernel(
    x_ptr,  # (rows, n) as integers
    prefix_ptr,  # (rows,) the bytes of the answer found so far
    counts_ptr,  # (rows, 256) int32, zero
    n,
    FLOAT: tl.constexpr,
    INFINITY: tl.constexpr,
    SIGNED: tl.constexpr,
    WIDTH: tl.constexpr,
    BYTE: tl.constexpr,  # from 0, the last
    STRETCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    KIND: tl.constexpr = tl.int64 if WIDTH == 64 else tl.int32
    bins = tl.arange(0, 256)
    counts = tl.zeros((256,), tl.int32)
    prefix = tl.load(prefix_ptr + row).to(KIND)
    begin = tl.program_id(1).to(tl.int64) * STRETCH
    for start in range(0, STRETCH, BLOCK):
        column = begin + start + tl.arange(0, BLOCK)
        live = column < n
        bits = tl.load(x_ptr + row * n + column, mask=live, other=0).to(KIND)
        key = _rising(bits, FLOAT, WIDTH, INFINITY)
        digit = (key >> (8 * BYTE)) & 255
        if BYTE == WIDTH // 8 - 1:
            if SIGNED:
                digit = digit ^ 128
        else:
            live &= (key >> (8 * BYTE + 8)) == prefix
        digit = tl.where(live, digit, 0).to(tl.int32)
        dead = tl.sum(tl.where(live, 0, 1), 0)
        counts += tl.histogram(digit, 256) - tl.where(bins == 0, dead, 0)
    tl.atomic_add(counts_ptr + row * 256 + bins, counts, mask=counts > 0)


@triton.jit
def pick_kernel(
    counts_ptr,  # (rows, 256) int32
    prefix_ptr,  # (rows,) int64
    place_ptr,  # (rows,) int64: among what has the prefix, from 0
    SIGNED: tl.constexpr,
    FIRST: tl.constexpr,
):
    row = tl.program_id(0)
    place = tl.load(place_ptr + row)
    upto = tl.cumsum(tl.load(counts_ptr + row.to(tl.int64) * 256 + tl.arange(0, 256)), 0)
    digit = tl.sum((upto <= place).to(tl.int32), 0)
    below = tl.max(tl.where(upto <= place, upto, 0), 0)
    if FIRST:
        prefix = digit.to(tl.int64)
        if SIGNED:
            prefix -= 128
    else:
        prefix = (tl.load(prefix_ptr + row) << 8) | digit
    tl.store(prefix_ptr + row, prefix)
    tl.store(place_ptr + row, place - below)


def _streamed(x: Tensor, k: int) -> Tensor:
    """The k-th largest of rows of any length."""
    rows, n = x.shape
    width = 8 * x.element_size()
    native = x.view(_NATIVE[width]) if x.dtype.is_floating_point else x
    signed = x.dtype != torch.uint8
    counts = torch.zeros(width // 8, rows, 256, dtype=torch.int32, device=x.device)
    prefix = torch.zeros(rows, dtype=torch.int64, device=x.device)
    place = torch.full_like(prefix, n - k)
    # One program counts at least 2048 values, and there are at most 65535 programs a row.
    stretch = max(2048, min(16384, _power(n)), _power(-(-n // 65535)))
    with _device(x):
        for byte in reversed(range(width // 8)):
            first = byte == width // 8 - 1
            digit_kernel[(rows, -(-n // stretch))](
                native, prefix, counts[byte], n, x.dtype.is_floating_point, _INFINITY.get(x.dtype, 0),
                signed, width, byte, stretch, 2048, num_warps=4,
            )  # fmt: skip
            pick_kernel[(rows,)](counts[byte], prefix, place, signed, first, num_warps=4)
    if x.dtype.is_floating_point:  # keys of negative values have all other bits turned
        prefix ^= (prefix >> 63) & ((1 << width - 1) - 1)
        return prefix.to(native.dtype).view(x.dtype)
    return prefix.to(x.dtype)
