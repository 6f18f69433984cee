"""``x @ W.t()`` by a packed N:M weight W, one kept weight at a time, with multiply-adds: any N:M, any dtype.

A lane holds up to eight kept weights of a row, neighbours in memory, and their code bits. It finds the
column of each, loads that column of x and adds the product in float32. Eight rows of four lanes make a
warp: the columns that it asks for lie in one or two 128-byte lines of x, which L1 delivers in one or two
cycles in any order, and the values of a row come in pieces of 64 bytes. The warps of a program
divide the columns, so few rows of W fill a GPU without a sum over programs.

A kept weight costs 12 instructions and 4 more for each row of x; an H100 that reads 3 TB/s has time for
22, or for 44 in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import start

if tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 5):
    raise ImportError(
        f"the kernels for N:M of columns and for blocks need Triton 3.5; this is {triton.__version__}"
    )


@dataclass(frozen=True)
class Gather:
    """A configuration: how a program's work is cut."""

    warps: int  # over columns
    batch: int  # rows of x a program: 1, 2, 4 or 8
    lanes: int = 4  # over columns, of each row; a warp has 32 // lanes rows

    @property
    def rows(self) -> int:
        """Rows of W a program."""
        return 32 // self.lanes


@triton.jit
def _code_window(c_ptr, c_row, c_rest, offset, live, end, CODES: tl.constexpr, WIDTH: tl.constexpr):
    """WIDTH code bits of each lane, low bits of a uint32, from bit ``offset`` of its row on."""
    if CODES >= 8:  # exactly one word
        return tl.load(c_ptr + (c_row + offset // CODES), mask=live, other=0).to(tl.uint32)
    else:
        bit = c_rest + offset
        if CODES == 1:  # parts of two 32-bit words
            at = c_row + (bit >> 5)
            low = tl.load(c_ptr + at, mask=live, other=0).to(tl.uint32, bitcast=True)
            high = tl.load(c_ptr + at + 1, mask=live & (at + 1 < end), other=0)
            both = low.to(tl.uint64) | (high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32)
            return (both >> (bit & 31).to(tl.uint64)).to(tl.uint32)
        else:  # bytes
            at = c_row + (bit >> 3)
            both = tl.load(c_ptr + at, mask=live, other=0).to(tl.uint64)
            for i in tl.static_range(1, (WIDTH + 14) // 8):
                byte = tl.load(c_ptr + at + i, mask=live & (at + i < end), other=0)
                both |= byte.to(tl.uint64) << (8 * i)
            return (both >> (bit & 7).to(tl.uint64)).to(tl.uint32)


@triton.jit
def _x_row(x_ptr, sx, row, last, column, live, EVEN: tl.constexpr):
    pointers = x_ptr + tl.minimum(row, last).to(tl.int64) * sx + column
    if EVEN:
        return tl.load(pointers).to(tl.float32)
    else:
        return tl.load(pointers, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _x_four(x_ptr, sx, row, last, column, live, EVEN: tl.constexpr):
    S: tl.constexpr = column.shape
    a = _x_row(x_ptr, sx, row, last, column, live, EVEN)
    b = _x_row(x_ptr, sx, row + 1, last, column, live, EVEN)
    c = _x_row(x_ptr, sx, row + 2, last, column, live, EVEN)
    d = _x_row(x_ptr, sx, row + 3, last, column, live, EVEN)
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape([S[0], S[1], S[2], 4])


@triton.jit
def x_columns(x_ptr, sx, row, last, column, live, BN: tl.constexpr, EVEN: tl.constexpr):
    """x[row : row + BN, column] as float32, the BN rows in a new last dim; rows after ``last`` repeat it."""
    S: tl.constexpr = column.shape
    if BN == 1:
        return _x_row(x_ptr, sx, row, last, column, live, EVEN)[:, :, :, None]
    elif BN == 2:
        a = _x_row(x_ptr, sx, row, last, column, live, EVEN)
        return tl.join(a, _x_row(x_ptr, sx, row + 1, last, column, live, EVEN))
    elif BN == 4:
        return _x_four(x_ptr, sx, row, last, column, live, EVEN)
    else:
        low = _x_four(x_ptr, sx, row, last, column, live, EVEN)
        high = _x_four(x_ptr, sx, row + 4, last, column, live, EVEN)
        return tl.join(low, high).permute(0, 1, 2, 4, 3).reshape([S[0], S[1], S[2], 8])


@triton.jit
def _values(pointers, run, p, live, P: tl.constexpr):
    """Values of each lane's run of P, the neighbours ``p``: one load of up to 16 bytes."""
    return tl.load(
        pointers[:, :, :, None] + (run[:, :, :, None] * P + p),
        mask=live[:, :, :, None],
        other=0,
        eviction_policy="evict_first",
    )


@triton.jit(
    do_not_specialize=["M", "N", "runs", "sx", "end", "steps"],
    do_not_specialize_on_alignment=["x_ptr", "c_ptr", "b_ptr", "y_ptr"],
)
def gather_kernel(
    x_ptr,  # (N, K), rows sx apart
    v_ptr,  # (M, scopes, KEEP)
    c_ptr,  # the bit stream, as words of CODES bits, or 32-bit words (CODES 1) or bytes (CODES 0)
    b_ptr,  # (M,)
    y_ptr,  # (N, M)
    M,
    N,
    runs,  # of a row
    sx,
    end,  # words of the bit stream
    steps,
    KEEP: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,  # of an index; 0 for a bitmap
    UNITS: tl.constexpr,  # scopes of a run: what a lane takes at a step
    CODES: tl.constexpr,
    WK: tl.constexpr,
    LANES: tl.constexpr,
    BN: tl.constexpr,
    EVEN: tl.constexpr,  # no step goes past the row's end
    BIAS: tl.constexpr,
):
    R: tl.constexpr = 32 // LANES
    P: tl.constexpr = UNITS * KEEP
    WIDTH: tl.constexpr = UNITS * (KEEP * BITS if BITS else GROUP)  # code bits of a run
    WORD: tl.constexpr = CODES if CODES >= 8 else (32 if CODES else 8)
    DTYPE: tl.constexpr = v_ptr.dtype.element_ty
    FULL: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    V: tl.constexpr = P & -P if P & -P < FULL else FULL  # values of a load
    INT: tl.constexpr = tl.int16 if DTYPE.primitive_bitwidth == 16 else tl.int32
    batches = tl.cdiv(N, BN)
    pn = tl.program_id(0) % batches
    pm = tl.program_id(0) // batches
    warp = tl.arange(0, WK)[:, None, None]
    r = tl.arange(0, R)[None, :, None]
    lane = tl.arange(0, LANES)[None, None, :]
    run = tl.broadcast_to(warp * LANES + lane, [WK, R, LANES])
    row = tl.minimum(pm * R + r, M - 1).to(tl.int64)
    row_values = v_ptr + row * (runs * P)
    bits = row * (runs * WIDTH)
    c_row = bits // WORD
    c_rest = (bits % WORD).to(tl.int32)
    live = run < runs
    p = tl.arange(0, V)[None, None, None, :]
    if V == P:  # a step ahead
        v = _values(row_values, run, p, live, P)
    c = _code_window(c_ptr, c_row, c_rest, run * WIDTH, live, end, CODES, WIDTH)
    acc = tl.zeros([WK, R, LANES, BN], tl.float32)
    for _ in range(steps):
        run_next = run + WK * LANES
        live_next = run_next < runs
        c_next = _code_window(c_ptr, c_row, c_rest, run_next * WIDTH, live_next, end, CODES, WIDTH)
        if V == P:
            v_next = _values(row_values, run_next, p, live_next, P)
        for i in tl.static_range(P):
            if V < P and i % V == 0:
                v = _values(row_values + i, run, p, live, P)
            # Names a register: the sum of it and zeros folds away.
            word = tl.sum(tl.where(p == i % V, v.to(INT, bitcast=True), 0).to(tl.int32), 3)
            value = word.to(INT).to(DTYPE, bitcast=True)
            if BITS:
                j = ((c >> (i * BITS)) & ((1 << BITS) - 1)).to(tl.int32) + i // KEEP * GROUP
            else:  # the lowest one's place is the exponent of that power of two
                lowest = c & (0 - c)
                c ^= lowest
                j = (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
            column = run * (UNITS * GROUP) + j
            x = x_columns(x_ptr, sx, pn * BN, N - 1, column, live, BN, EVEN)
            acc += value.to(tl.float32)[:, :, :, None] * x
        run = run_next
        live = live_next
        c = c_next
        if V == P:
            v = v_next
    total = tl.sum(tl.sum(acc, 0), 1)  # (R, BN)
    rows = pm * R + tl.arange(0, R)
    n = pn * BN + tl.arange(0, BN)
    if BIAS:
        total += tl.load(b_ptr + rows, mask=rows < M, other=0.0).to(tl.float32)[:, None]
    y = y_ptr + (n[None, :].to(tl.int64) * M + rows[:, None])
    tl.store(y, total.to(y_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (n < N)[None, :])


def scopes_of_run(keep: int, scope_bits: int, itemsize: int, scopes: int) -> int:
    """Scopes a lane takes at a step: 16 bytes of values and 32 bits of codes at most, and no rest."""
    count = 1
    while (
        2 * count * keep * itemsize <= 16
        and 2 * count * scope_bits <= 32
        and scopes % (2 * count) == 0
    ):
        count *= 2
    return count


def launch(
    config: Gather,
    x: Tensor,  # (N, K), columns next to each other
    values: Tensor,
    codes: Tensor,  # uint8
    bias: Tensor | None,
    y: Tensor,  # (N, M), contiguous
    keep: int,
    group: int,
    bits: int,  # of an index, 0 for a bitmap
) -> None:
    """Launch; arguments are checked before."""
    n, m = y.shape
    scopes = x.shape[1] // group
    scope_bits = keep * bits if bits else group
    count = scopes_of_run(keep, scope_bits, values.element_size(), scopes)
    runs = scopes // count
    words, kind = as_words(codes, count * scope_bits, scopes * scope_bits)
    step = config.warps * config.lanes
    constants = {
        "KEEP": keep,
        "GROUP": group,
        "BITS": bits,
        "UNITS": count,
        "CODES": kind,
        "WK": config.warps,
        "LANES": config.lanes,
        "BN": config.batch,
        "EVEN": runs % step == 0,
        "BIAS": bias is not None,
        "num_warps": config.warps,
    }
    arguments = (
        x, values, words, y if bias is None else bias, y,
        m, n, runs, x.stride(0), words.numel(), -(-runs // step),
    )  # fmt: skip
    grid = (-(-m // config.rows) * -(-n // config.batch),)
    start(gather_kernel, grid, arguments, constants)


def as_words(codes: Tensor, width: int, row_bits: int) -> tuple[Tensor, int]:
    """The bit stream as a kernel loads it, and its CODES.

    In words of ``width`` bits where these are exactly the codes of a run, and no row starts within one;
    else in 32-bit words, or in bytes where the stream does not divide into words.
    """
    if width == 8 and row_bits % 8 == 0:
        return codes, 8
    size = width if width in (16, 32) and row_bits % width == 0 else 32
    if codes.data_ptr() % (size // 8) or codes.numel() % (size // 8):
        return codes, 0
    return codes.view(torch.int16 if size == 16 else torch.int32), size if size == width else 1
