"""``x @ W.t()`` by a packed N:M weight W in 16-bit floats, on tensor cores of any GPU from sm_80 on.

The walk over W is that of ``skinny``: W is operand A of ``mma.m16n8k16``, values go from memory to
registers in 16-byte loads and are expanded there. A lane takes a run at a time: RUN = 16 or 32 columns of
a row with 8 kept values. The columns are expanded by fours: a byte permutation (``prmt``) gives two dense
columns, and its selectors are computed for four columns at once, one byte each.

*By indices*, at most two kept of a scope: both are in one 32-bit word, and zero is what the selector byte
0x44 picks. ``(0x44 ^ 0x10) << 8 * (column - first of the four)`` turns it to the word's first value in the
column's byte; a shift by too much, or by a negative number, gives zero, which is the right result.

*By a bitmap*: four bits spread to bytes S; ``S * 0x22222200 + 0x10101010`` holds, for each of the columns,
the selector of as many values as were kept to the left of it; what is not kept is masked. Where a scope
keeps eight, the four values that can be met come first to two words of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.runtime.jit import constexpr_function

from .expand import code_layout, halves, log2, store_sums, word_layout
from .gather import as_words
from .launch import start

# (keep, group): columns of a run. Eight values are 16 bytes.
RUNS = {(1, 2): 16, (2, 4): 16, (4, 8): 16, (8, 16): 16, (1, 4): 32, (2, 8): 32, (4, 16): 32}


@dataclass(frozen=True)
class Runs:
    """A configuration: how a program's work is cut."""

    warps: int  # over columns
    tiles: int  # 16-row tiles a warp
    units: int  # four runs in a row: 64 or 128 columns, a warp and step
    batch: int  # rows of x a program: 8, 16 or 32
    ahead: bool = False  # load x a step ahead too

    @property
    def rows(self) -> int:
        """Rows of W a program."""
        return 16 * self.tiles


@gluon.jit
def _permute(a, b, selector):
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], dtype=gl.int32, is_pure=True, pack=1
    )  # fmt: skip


@gluon.jit
def _permute_or_zero(a, selector):
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, 0, $2;", "=r,r,r", [a, selector], dtype=gl.int32, is_pure=True, pack=1
    )  # fmt: skip


@gluon.jit
def _spread_pairs(a):
    """The bytes of a, each twice: those of the low half, and of the high half."""
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $2, 0, 0x1100; prmt.b32 $1, $2, 0, 0x3322;",
        "=&r,=r,r",
        [a],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _place(bits, shift):
    """``bits << shift``, zero for a shift of 32 or more or a negative one: as ``shl`` does."""
    return gl.inline_asm_elementwise(
        "shl.b32 $0, $1, $2;", "=r,r,r", [bits, shift], dtype=gl.int32, is_pure=True, pack=1
    )  # fmt: skip


@gluon.jit
def _by_index(
    w, codes, Q: gl.constexpr, KEEP: gl.constexpr, GROUP: gl.constexpr, BITS: gl.constexpr
):
    """Columns 4 Q to 4 Q + 3 as two words, from the word w of the values there are, two or one of them."""
    SCOPE: gl.constexpr = 4 * Q // GROUP
    FIRST: gl.constexpr = SCOPE * KEEP  # number of the first value in the run
    LEFT: gl.constexpr = 8 * (4 * Q - SCOPE * GROUP)
    MASK: gl.constexpr = 8 * ((1 << BITS) - 1)
    at = ((codes << 3) >> (FIRST * BITS)) & MASK
    if KEEP == 2 or GROUP == 2:
        second = ((codes << 3) >> ((FIRST + 1) * BITS)) & MASK
        if GROUP == 2:
            second += 16
        selector = 0x44444444 ^ _place(0x54, at - LEFT) ^ _place(0x76, second - LEFT)
    else:
        selector = 0x44444444 ^ _place(0x76 if FIRST % 2 else 0x54, at - LEFT)
    return _permute_or_zero(w, selector), _permute_or_zero(w, selector >> 16)


@gluon.jit
def _spread(bits, Q: gl.constexpr):
    """Bits 4 Q to 4 Q + 3, one in each byte."""
    return (((bits >> (4 * Q)) & 15) * 0x00204081) & 0x01010101


@gluon.jit
def _count(spread):
    return (spread * 0x01010101) >> 24


@gluon.jit
def _by_bitmap(low, high, spread, before):
    """Four columns as two words, from four values of which ``before`` belong to columns to their left."""
    selector = spread * 0x22222200 + (before * 0x22222222 + 0x10101010)
    first, second = _spread_pairs(spread * 255)
    return (
        _permute(low, high, selector) & first,
        _permute(low, high, selector >> 16) & second,
    )


@gluon.jit
def _four_of(w0, w1, w2, w3, start):
    """Two words of the values ``start`` to ``start + 3`` of eight; start is 0 to 4."""
    odd = 0x3210 + (start & 1) * 0x2222
    a = _permute(w0, w1, odd)
    b = _permute(w1, w2, odd)
    c = _permute(w2, w3, odd)
    low = gl.where(start < 2, a, gl.where(start < 4, b, c))
    return low, gl.where(start < 2, b, gl.where(start < 4, c, w3))


@gluon.jit
def _two_scopes_of_eight(w0, w1, w2, w3, bits):
    """Columns of a run of 16 that keeps 4 of each 8."""
    s0 = _spread(bits, 0)
    s2 = _spread(bits, 2)
    a0, b0 = _by_bitmap(w0, w1, s0, 0)
    a1, b1 = _by_bitmap(w0, w1, _spread(bits, 1), _count(s0))
    a2, b2 = _by_bitmap(w2, w3, s2, 0)
    a3, b3 = _by_bitmap(w2, w3, _spread(bits, 3), _count(s2))
    return a0, a1, a2, a3, b0, b1, b2, b3


@gluon.jit
def _scope_of_sixteen(w0, w1, w2, w3, bits):
    """Columns of a run of 16 that keeps 8. Columns 12 to 15 have four values to their left at least."""
    s0 = _spread(bits, 0)
    s1 = _spread(bits, 1)
    s2 = _spread(bits, 2)
    left1 = _count(s0)
    left2 = left1 + _count(s1)
    left3 = left2 + _count(s2)
    start2 = gl.minimum(left2, 4)
    low1, high1 = _four_of(w0, w1, w2, w3, left1)
    low2, high2 = _four_of(w0, w1, w2, w3, start2)
    a0, b0 = _by_bitmap(w0, w1, s0, 0)
    a1, b1 = _by_bitmap(low1, high1, s1, 0)
    a2, b2 = _by_bitmap(low2, high2, s2, left2 - start2)
    a3, b3 = _by_bitmap(w2, w3, _spread(bits, 3), left3 - 4)
    return a0, a1, a2, a3, b0, b1, b2, b3


@gluon.jit
def _sixteen_by_four(low, high, codes, FIRST: gl.constexpr):
    """Columns of a scope of 16 that keeps 4, whose numbers are nibbles from number FIRST on."""
    bits = 1 << ((codes >> (4 * FIRST)) & 15)
    bits |= 1 << ((codes >> (4 * FIRST + 4)) & 15)
    bits |= 1 << ((codes >> (4 * FIRST + 8)) & 15)
    bits |= 1 << ((codes >> (4 * FIRST + 12)) & 15)
    s0 = _spread(bits, 0)
    s1 = _spread(bits, 1)
    s2 = _spread(bits, 2)
    left2 = _count(s0) + _count(s1)
    a0, b0 = _by_bitmap(low, high, s0, 0)
    a1, b1 = _by_bitmap(low, high, s1, _count(s0))
    a2, b2 = _by_bitmap(low, high, s2, left2)
    a3, b3 = _by_bitmap(low, high, _spread(bits, 3), left2 + _count(s2))
    return a0, a1, a2, a3, b0, b1, b2, b3


@gluon.jit
def _words_in_order(a0, a1, a2, a3, b0, b1, b2, b3):
    """(..., 8) words of 16 columns from the first (a) and the second (b) of each four columns."""
    a = gl.join(gl.join(a0, a2), gl.join(a1, a3))
    b = gl.join(gl.join(b0, b2), gl.join(b1, b3))
    both = gl.join(a, b)  # (items, threads, 2, 2, 2)
    return both.reshape([both.shape[0], both.shape[1], 8])


@gluon.jit
def dense_run(words, codes, KEEP: gl.constexpr, GROUP: gl.constexpr, BITS: gl.constexpr):
    """(items, threads, 4) words of values and (items, threads) codes to the dense columns, as int16."""
    ITEMS: gl.constexpr = words.shape[0]
    T: gl.constexpr = words.shape[1]
    even, odd = gl.split(words.reshape([ITEMS, T, 2, 2]))
    w0, w2 = gl.split(even)
    w1, w3 = gl.split(odd)
    c = gl.convert_layout(codes, w0.type.layout, assert_trivial=True)
    if KEEP == 8:
        low = _words_in_order(*_scope_of_sixteen(w0, w1, w2, w3, c))
    elif KEEP == 4 and GROUP == 8:
        low = _words_in_order(*_two_scopes_of_eight(w0, w1, w2, w3, c))
    elif KEEP == 4:
        low = _words_in_order(*_sixteen_by_four(w0, w1, c, 0))
        high = _words_in_order(*_sixteen_by_four(w2, w3, c, 4))
    elif GROUP == 4 * KEEP:  # two fours of columns share a word
        low = _four_by_index(w0, w0, w1, w1, c, 0, KEEP, GROUP, BITS)
        high = _four_by_index(w2, w2, w3, w3, c, 4, KEEP, GROUP, BITS)
    else:
        low = _four_by_index(w0, w1, w2, w3, c, 0, KEEP, GROUP, BITS)
    if GROUP == 2 * KEEP:
        return halves(low).reshape([ITEMS, T, 16])
    else:
        both = gl.join(low, high).permute(0, 1, 3, 2).reshape([ITEMS, T, 16])
        return halves(both).reshape([ITEMS, T, 32])


@gluon.jit
def _four_by_index(
    w0, w1, w2, w3, codes,
    Q: gl.constexpr, KEEP: gl.constexpr, GROUP: gl.constexpr, BITS: gl.constexpr,
):  # fmt: skip
    a0, b0 = _by_index(w0, codes, Q, KEEP, GROUP, BITS)
    a1, b1 = _by_index(w1, codes, Q + 1, KEEP, GROUP, BITS)
    a2, b2 = _by_index(w2, codes, Q + 2, KEEP, GROUP, BITS)
    a3, b3 = _by_index(w3, codes, Q + 3, KEEP, GROUP, BITS)
    return _words_in_order(a0, a1, a2, a3, b0, b1, b2, b3)


@constexpr_function
def _x_layout(warps: int, units: int, run: int, batch: int) -> Any:
    """(batch, 32-bit words of a step's columns): the columns of a run a lane."""
    words = run // 2
    return gl.DistributedLinearLayout(
        [[0, 1 << i] for i in range(log2(words))]
        + [[0, 4 * words << i] for i in range(log2(units))]
        + [[8 << i, 0] for i in range(log2(batch) - 3)],
        [[0, words], [0, 2 * words], [1, 0], [2, 0], [4, 0]],
        [[0, 4 * words * units << i] for i in range(log2(warps))],
        [],
        [batch, 4 * words * units * warps],
    )


@gluon.jit
def _load(pointers, live, EVEN: gl.constexpr):
    if EVEN:  # what is not loaded is not used
        return gl.load(pointers, mask=live)
    else:
        return gl.load(pointers, mask=live, other=0)


@gluon.jit
def _load_codes(
    c_ptr, place, live, end, EVEN: gl.constexpr, CODES: gl.constexpr, WIDTH: gl.constexpr
):
    """WIDTH code bits of the runs at ``place``, the low bits of an int32."""
    if CODES >= 8:
        return _load(c_ptr + place, live, EVEN).to(gl.int32)
    else:  # parts of two words
        bit = place * WIDTH
        at = bit >> 5
        low = gl.load(c_ptr + at, mask=live, other=0).to(gl.int64) & 0xFFFFFFFF
        high = gl.load(c_ptr + at + 1, mask=live & (at + 1 < end), other=0).to(gl.int64)
        return ((low | (high << 32)) >> (bit & 31).to(gl.int64)).to(gl.int32)


@gluon.jit(
    do_not_specialize=["N", "runs", "sx4", "end", "steps"],
    do_not_specialize_on_alignment=["c_ptr", "b_ptr"],
)
def runs_kernel(
    x_ptr,  # (N, K) as 32-bit words, rows sx4 * 16 bytes apart
    v_ptr,  # values as 32-bit words: four a run
    c_ptr,  # the bit stream, as words of CODES bits, one a run, or as 32-bit words (CODES 1)
    b_ptr,  # (M,)
    y_ptr,  # (N, M)
    M,
    N,
    runs,  # of a row
    sx4,
    end,  # words of the bit stream
    steps,
    KEEP: gl.constexpr,
    GROUP: gl.constexpr,
    BITS: gl.constexpr,  # of an index; 0 for a bitmap
    RUN: gl.constexpr,
    CODES: gl.constexpr,
    EVEN: gl.constexpr,
    BIAS: gl.constexpr,
    WK: gl.constexpr,
    TILES: gl.constexpr,
    UNITS: gl.constexpr,
    BN: gl.constexpr,
    AHEAD: gl.constexpr,
):
    DTYPE: gl.constexpr = y_ptr.dtype.element_ty
    T: gl.constexpr = WK * 32
    R: gl.constexpr = TILES * 16
    STEP: gl.constexpr = WK * UNITS * 4  # runs of a row a step
    ITEMS: gl.constexpr = TILES * 2 * UNITS
    WORDS: gl.constexpr = RUN // 2  # of x a run
    WIDTH: gl.constexpr = RUN // GROUP * (KEEP * BITS if BITS else GROUP)
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[WK, 1, 1], instr_shape=[1, 16, 8]
    )
    LA: gl.constexpr = gl.DotOperandLayout(0, mma, 8)
    LB: gl.constexpr = gl.DotOperandLayout(1, mma, 8)
    LV: gl.constexpr = word_layout(ITEMS, T)
    LC: gl.constexpr = code_layout(ITEMS, T)
    LX: gl.constexpr = _x_layout(WK, UNITS, RUN, BN)
    pm = gl.program_id(0)
    pn = gl.program_id(1)

    # An item is a lane's run: by row tile, half row (row and row + 8) and unit.
    i = gl.arange(0, ITEMS, layout=gl.SliceLayout(1, gl.SliceLayout(2, LV)))[:, None]
    t = gl.arange(0, T, layout=gl.SliceLayout(0, gl.SliceLayout(2, LV)))[None, :]
    word = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, LV)))[None, :][:, None, :]
    row = pm * R + i // UNITS * 8 + t // 4 % 8
    run = (t // 32 * UNITS + i % UNITS) * 4 + t % 4
    vp = v_ptr + (((row * runs + run) * 4)[:, :, None] + word)
    v_in = row < M
    ci = gl.arange(0, ITEMS, layout=gl.SliceLayout(1, LC))[:, None]
    ct = gl.arange(0, T, layout=gl.SliceLayout(0, LC))[None, :]
    c_row = pm * R + ci // UNITS * 8 + ct // 4 % 8
    c_run = (ct // 32 * UNITS + ci % UNITS) * 4 + ct % 4
    c_place = c_row * runs + c_run
    c_in = c_row < M

    n = pn * BN + gl.arange(0, BN, layout=gl.SliceLayout(1, LX))
    x_word = gl.arange(0, STEP * WORDS, layout=gl.SliceLayout(0, LX))
    xp = x_ptr + (n[:, None] * (sx4 * 4) + x_word[None, :])
    x_in = (n < N)[:, None]
    x_end = runs * WORDS

    if EVEN:
        live = i >= 0
        c_live = ci >= 0
    else:
        live = v_in & (run < runs)
        c_live = c_in & (c_run < runs)
    c = _load_codes(c_ptr, c_place, c_live, end, EVEN, CODES, WIDTH)
    v = _load(vp, live[:, :, None], EVEN)
    if AHEAD:
        next_x = _load(xp, x_in if EVEN else x_in & (x_word < x_end)[None, :], EVEN)
    acc = gl.zeros((WK, R, BN), gl.float32, layout=mma)
    for k in range(steps):
        more = k + 1 < steps
        if AHEAD:
            x = next_x
            xp += STEP * WORDS
            x_end -= STEP * WORDS
            x_more = x_in & more
        else:
            x_more = x_in
        x_new = _load(xp, x_more if EVEN else x_more & (x_word < x_end)[None, :], EVEN)
        if AHEAD:
            next_x = x_new
        else:
            x = x_new
            xp += STEP * WORDS
            x_end -= STEP * WORDS
        vp += STEP * 4
        c_place += STEP
        if EVEN:
            live = (i >= 0) & more
            c_live = (ci >= 0) & more
        else:
            run += STEP
            c_run += STEP
            live = v_in & (run < runs) & more
            c_live = c_in & (c_run < runs) & more
        next_c = _load_codes(c_ptr, c_place, c_live, end, EVEN, CODES, WIDTH)
        next_v = _load(vp, live[:, :, None], EVEN)
        w = dense_run(v, c, KEEP, GROUP, BITS).reshape([TILES, 2, UNITS, WK, 8, 4, RUN // 8, 8])
        w = w.permute(3, 0, 1, 4, 2, 6, 5, 7).reshape([WK, R, UNITS * 4 * RUN])
        a = gl.convert_layout(w.to(DTYPE, bitcast=True), LA, assert_trivial=True)
        b = halves(x).reshape([BN, WK, UNITS, 4, RUN // 8, 8]).permute(1, 2, 4, 3, 5, 0)
        b = b.reshape([WK, UNITS * 4 * RUN, BN]).to(DTYPE, bitcast=True)
        acc = mma_v2(a, gl.convert_layout(b, LB, assert_trivial=True), acc)
        v = next_v
        c = next_c
    sums = gl.sum(acc, 0) if WK > 1 else acc.reshape([R, BN])
    store_sums(sums, b_ptr, y_ptr, y_ptr, y_ptr, pm, pn, 0, 0, M, N, T, 1, BIAS)


def launch(
    config: Runs,
    x: Tensor,  # (N, K) as int32 words, columns next to each other, rows at multiples of 16 bytes
    values: Tensor,  # as int32 words
    codes: Tensor,  # uint8
    bias: Tensor | None,
    y: Tensor,  # (N, M), contiguous
    keep: int,
    group: int,
    bits: int,  # of an index, 0 for a bitmap
) -> None:
    """Launch; arguments are checked before."""
    n, m = y.shape
    run = RUNS[keep, group]
    runs = x.shape[1] * 2 // run
    width = run // group * (keep * bits if bits else group)
    words, kind = as_words(codes, width, runs * width)
    if kind == 0:  # no whole words, or not aligned
        words, kind = as_words(F.pad(codes, (0, -codes.numel() % 4)), width, runs * width)
    step = 4 * config.units * config.warps
    constants = {
        "KEEP": keep,
        "GROUP": group,
        "BITS": bits,
        "RUN": run,
        "CODES": kind,
        "EVEN": m % config.rows == 0 and runs % step == 0,
        "BIAS": bias is not None,
        "WK": config.warps,
        "TILES": config.tiles,
        "UNITS": config.units,
        "BN": config.batch,
        "AHEAD": config.ahead,
        "num_warps": config.warps,
    }
    arguments = (
        x, values, words, y if bias is None else bias, y,
        m, n, runs, x.stride(0) // 4, words.numel(), -(-runs // step),
    )  # fmt: skip
    grid = (-(-m // config.rows), -(-n // config.batch))
    start(runs_kernel, grid, arguments, constants)
