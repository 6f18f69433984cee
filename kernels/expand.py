"""From packed words to dense tensor-core fragments in registers, and sums over a split in fixed order.

A lane holds 16 columns of one row as four 32-bit words of kept values (rowpair16: as eight words of two
rows, one of which they belong to). A dense group of four columns is two fragment registers, and each is
one byte permutation (``prmt``) of the group's word: a selector picks, for each of four bytes, a byte of
the first value, of the second, or of zero. The selectors come from the codes by table look-up, which
``prmt`` does as well: four codes at once, one column of the group a look-up. That is 5 to 6 integer
operations for a group of four; at an H100's full bandwidth there is time for 22. Where whole pairs of
columns are kept, a fragment register is one word or zero: the words times 0 or 1 from a table, on the
multipliers, which are otherwise idle.

The codes are nibbles ``c = i0 | i1 << 2``; ``(c ^ c >> 1) & 7`` distinguishes the six in three bits.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function

# Numbers for the kernels' compile-time argument FORM, in the order of tiles.FORMS.
PLAIN, COUPLED, PAIR, ROWPAIR = 0, 1, 2, 3
# By the names of Triton 3.6 or of later releases.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

_PLAIN = gl.constexpr(PLAIN)
_COUPLED = gl.constexpr(COUPLED)
_ROWPAIR = gl.constexpr(ROWPAIR)

_FIRST, _SECOND, _ZERO = 0x10, 0x32, 0x54  # selector bytes: of word bytes 0-1, 2-3, or of zero


def look_up(of_first: int, of_second: int, of_zero: int) -> str:
    """Assembly: from four hashed codes, the selector bytes of column j of each, in output j.

    A selector byte is that of the first value, of the second one or of zero.
    """
    kept = {(i0 + 4 * i1): (i0, i1) for i1 in range(4) for i0 in range(i1)}
    lines = ["{", ".reg .b32 lo, hi;"]
    for column in range(4):
        table = [of_zero] * 8
        for code, (first, second) in kept.items():
            if column in (first, second):
                table[(code ^ code >> 1) & 7] = of_first if column == first else of_second
        lo, hi = (
            sum(byte << 8 * i for i, byte in enumerate(half)) for half in (table[:4], table[4:])
        )
        lines.append(f"mov.b32 lo, {lo}; mov.b32 hi, {hi}; prmt.b32 ${column}, lo, hi, $4;")
    return "\n".join([*lines, "}"])


def _look_up_pairs() -> str:
    """Assembly: from four hashed codes a byte of 0 or 1 of each: is the first word block 0, 1 or 2 (outputs
    0 to 2), is the second word block 1, 2 or 3 (outputs 3 to 5)."""
    lines = ["{", ".reg .b32 lo, hi;"]
    for output in range(6):
        table = [0] * 8
        for second in range(4):
            for first in range(second):
                code = first + 4 * second
                here = first == output if output < 3 else second == output - 2
                table[(code ^ code >> 1) & 7] = int(here)
        lo, hi = (
            sum(byte << 8 * i for i, byte in enumerate(half)) for half in (table[:4], table[4:])
        )
        lines.append(f"mov.b32 lo, {lo}; mov.b32 hi, {hi}; prmt.b32 ${output}, lo, hi, $6;")
    return "\n".join([*lines, "}"])


_LOOK_UP = gl.constexpr(look_up(_FIRST, _SECOND, _ZERO))
_LOOK_UP_PAIRS = gl.constexpr(_look_up_pairs())
# $4 a word of two values; $5 to $8 the look-ups; $9 picks one of four codes. Out: columns 0 to 3.
_GROUP = gl.constexpr("""
{
.reg .b32 s, a, b;
prmt.b32 s, $5, $6, $9;
prmt.b32 a, $4, 0, s;
prmt.b32 s, $7, $8, $9;
prmt.b32 b, $4, 0, s;
mov.b32 {$0, $1}, a; mov.b32 {$2, $3}, b;
}
""")
# $8, $9 two blocks of two columns each. Both columns' halves, regrouped, are 2:4 under the one code.
_COUPLED_BLOCKS = gl.constexpr("""
{
.reg .b32 s, t, e, o, a, b, c, d;
prmt.b32 s, $10, $11, $14;
prmt.b32 t, $12, $13, $14;
prmt.b32 e, $8, $9, 0x5410;
prmt.b32 o, $8, $9, 0x7632;
prmt.b32 a, e, 0, s;
prmt.b32 b, e, 0, t;
prmt.b32 c, o, 0, s;
prmt.b32 d, o, 0, t;
mov.b32 {$0, $1}, a; mov.b32 {$2, $3}, b; mov.b32 {$4, $5}, c; mov.b32 {$6, $7}, d;
}
""")
# $8, $9 two of four blocks, of two columns each; $10 to $15 the look-ups; $16 picks one of four codes.
_PAIR_BLOCKS = gl.constexpr("""
{
.reg .b32 p, q, a, b, c, d;
prmt.b32 p, $10, 0, $16;
mul.lo.u32 a, $8, p;
prmt.b32 p, $11, 0, $16;
prmt.b32 q, $13, 0, $16;
mul.lo.u32 b, $8, p;
mad.lo.u32 b, $9, q, b;
prmt.b32 p, $12, 0, $16;
prmt.b32 q, $14, 0, $16;
mul.lo.u32 c, $8, p;
mad.lo.u32 c, $9, q, c;
prmt.b32 q, $15, 0, $16;
mul.lo.u32 d, $9, q;
mov.b32 {$0, $1}, a; mov.b32 {$2, $3}, b; mov.b32 {$4, $5}, c; mov.b32 {$6, $7}, d;
}
""")
# $4 a word of two columns, $5 all ones where it belongs to row r + 8. Out: row r, row r + 8.
_ROWS = gl.constexpr("""
{
.reg .b32 a, b;
and.b32 b, $4, $5;
xor.b32 a, $4, b;
mov.b32 {$0, $1}, a; mov.b32 {$2, $3}, b;
}
""")
_HALVES = gl.constexpr("mov.b32 {$0, $1}, $2;")


@constexpr_function
def log2(n: int) -> int:
    return n.bit_length() - 1


@constexpr_function
def word_layout(items: int, threads: int) -> Any:
    """(items, threads, 4): four words in a row and all items in one thread."""
    return gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2]] + [[1 << i, 0, 0] for i in range(log2(items))],
        [[0, 1 << i, 0] for i in range(5)],
        [[0, 32 << i, 0] for i in range(log2(threads) - 5)],
        [],
        [items, threads, 4],
    )


@constexpr_function
def code_layout(items: int, threads: int) -> Any:
    """(items, threads): all items in one thread."""
    return gl.DistributedLinearLayout(
        [[1 << i, 0] for i in range(log2(items))],
        [[0, 1 << i] for i in range(5)],
        [[0, 32 << i] for i in range(log2(threads) - 5)],
        [],
        [items, threads],
    )


@gluon.jit
def halves(words):
    """The two 16-bit halves of 32-bit words, in a new last dim of 2."""
    low, high = gl.inline_asm_elementwise(
        _HALVES, "=h,=h,r", [words], dtype=(gl.int16, gl.int16), is_pure=True, pack=1
    )
    return gl.join(low, high)


@gluon.jit
def selectors(codes, L: gl.constexpr, COUNT: gl.constexpr, LOOK_UP: gl.constexpr):
    """Look-ups of hashed codes, (items, threads), and the last index, of COUNT."""
    s0, s1, s2, s3 = gl.inline_asm_elementwise(
        LOOK_UP,
        "=r,=r,=r,=r,r",
        [codes],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )
    s0, s1, s2, s3 = _beside(s0, L), _beside(s1, L), _beside(s2, L), _beside(s3, L)
    return s0, s1, s2, s3, _index(L, COUNT)


@gluon.jit
def _beside(looked_up, L: gl.constexpr):
    """(items, threads, 1), to be broadcast over the last dim of layout L."""
    S: gl.constexpr = gl.SliceLayout(2, L)
    return gl.convert_layout(looked_up, S, assert_trivial=True)[:, :, None]


@gluon.jit
def _index(L: gl.constexpr, COUNT: gl.constexpr):
    """(1, 1, COUNT): the last index, in layout L."""
    return gl.arange(0, COUNT, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, :][:, None, :]


@gluon.jit
def _half_row(L: gl.constexpr, ITEMS: gl.constexpr, UNITS: gl.constexpr):
    """(items, 1, 1): 0 for an item of the first half row of a tile, 1 for one of the second."""
    item = gl.arange(0, ITEMS, layout=gl.SliceLayout(1, gl.SliceLayout(2, L)))
    return (item // UNITS % 2)[:, None][:, :, None]


@gluon.jit
def _groups(words, codes, FORM: gl.constexpr, UNITS: gl.constexpr, BOTH: gl.constexpr):
    """(items, threads, 4) words and (items, threads) codes to (items, threads, 16 columns), as int16."""
    ITEMS: gl.constexpr = words.shape[0]
    T: gl.constexpr = words.shape[1]
    if FORM == _PLAIN:
        L: gl.constexpr = words.type.layout
        s0, s1, s2, s3, group = selectors(codes, L, 4, _LOOK_UP)
        w0, w1, w2, w3 = gl.inline_asm_elementwise(
            _GROUP,
            "=h,=h,=h,=h,r,r,r,r,r,r",
            [words, s0, s1, s2, s3, group * 0x11 + 0x40],
            dtype=(gl.int16, gl.int16, gl.int16, gl.int16),
            is_pure=True,
            pack=1,
        )
        return gl.join(gl.join(w0, w2), gl.join(w1, w3)).reshape([ITEMS, T, 16])
    elif FORM == _COUPLED:
        first, second = gl.split(words.reshape([ITEMS, T, 2, 2]))
        L2: gl.constexpr = first.type.layout
        s0, s1, s2, s3, group = selectors(codes, L2, 2, _LOOK_UP)
        if BOTH:
            group += 2 * _half_row(L2, ITEMS, UNITS)
        w0, w1, w2, w3, w4, w5, w6, w7 = gl.inline_asm_elementwise(
            _COUPLED_BLOCKS,
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r,r,r,r",
            [first, second, s0, s1, s2, s3, group * 0x11 + 0x40],
            dtype=(
                gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16,
            ),
            is_pure=True,
            pack=1,
        )  # fmt: skip
        both = eight(w0, w1, w2, w3, w4, w5, w6, w7)  # the last index: columns 8 to 15
        return both.permute(0, 1, 5, 2, 3, 4).reshape([ITEMS, T, 16])
    else:
        first, second = gl.split(words.reshape([ITEMS, T, 2, 2]))
        L4: gl.constexpr = first.type.layout
        f0, f1, f2, g1, g2, g3 = gl.inline_asm_elementwise(
            _LOOK_UP_PAIRS,
            "=r,=r,=r,=r,=r,=r,r",
            [codes],
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32),
            is_pure=True,
            pack=1,
        )
        f0, f1, f2 = _beside(f0, L4), _beside(f1, L4), _beside(f2, L4)
        g1, g2, g3 = _beside(g1, L4), _beside(g2, L4), _beside(g3, L4)
        group = _index(L4, 2)
        if BOTH:
            group += 2 * _half_row(L4, ITEMS, UNITS)
        w0, w1, w2, w3, w4, w5, w6, w7 = gl.inline_asm_elementwise(
            _PAIR_BLOCKS,
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r,r,r,r,r,r",
            [first, second, f0, f1, f2, g1, g2, g3, group + 0x4440],
            dtype=(
                gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16,
            ),
            is_pure=True,
            pack=1,
        )  # fmt: skip
        both = eight(w0, w1, w2, w3, w4, w5, w6, w7)  # the last index: columns 4 to 7 of each 8
        return both.permute(0, 1, 2, 5, 3, 4).reshape([ITEMS, T, 16])


@gluon.jit
def eight(w0, w1, w2, w3, w4, w5, w6, w7):
    """(items, threads, scope) each, to (items, threads, scope, 2, 2, 2)."""
    low = gl.join(gl.join(w0, w2), gl.join(w1, w3))
    high = gl.join(gl.join(w4, w6), gl.join(w5, w7))
    return gl.join(low, high)


@gluon.jit
def dense_rows(
    words,
    codes,
    FORM: gl.constexpr,
    TILES: gl.constexpr,
    UNITS: gl.constexpr,
    BOTH: gl.constexpr,
):
    """Dense int16 (TILES, half row, UNITS, threads, 16 columns) of packed words in registers.

    ``words`` is (TILES * 2 * UNITS, threads, 4): by half row and unit, or for rowpair16 by unit and half
    columns. ``codes`` is int32 of (TILES * 2 * UNITS, threads): hashed nibbles in its low bits; with
    BOTH those of coupled2:4 and pair4:8 are the two of the first half row, then the two of the second, so
    that both halves' look-ups are the same. Or for rowpair16 (TILES * UNITS, threads): all ones where the
    kept row is r + 8, else zero.
    """
    T: gl.constexpr = words.shape[1]
    if FORM == _ROWPAIR:
        w = words.reshape([TILES * UNITS, 2, T, 4])
        LM: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, w.type.layout))
        m = gl.convert_layout(codes, LM, assert_trivial=True)[:, None, :][:, :, :, None]
        a0, a1, b0, b1 = gl.inline_asm_elementwise(
            _ROWS,
            "=h,=h,=h,=h,r,r",
            [w, m],
            dtype=(gl.int16, gl.int16, gl.int16, gl.int16),
            is_pure=True,
            pack=1,
        )
        rows = gl.join(
            gl.join(a0, b0), gl.join(a1, b1)
        )  # (TILES UNITS, half columns, T, 4, row, 2)
        rows = rows.reshape([TILES, UNITS, 2, T, 4, 2, 2]).permute(0, 5, 1, 3, 2, 4, 6)
        return rows.reshape([TILES, 2, UNITS, T, 16])
    else:
        return _groups(words, codes, FORM, UNITS, BOTH).reshape([TILES, 2, UNITS, T, 16])


@constexpr_function
def _power_of_two(n: int) -> int:
    """The least that is not below ``n``."""
    return 1 << (n - 1).bit_length()


@constexpr_function
def _sum_layout(rows: int, columns: int, threads: int) -> Any:
    """(rows, columns), four rows a thread, rows fastest."""
    lane_rows = min(rows // 4, 32)
    lane_columns = 32 // lane_rows
    warp_columns = min(threads // 32, max(1, columns // lane_columns))
    return gl.BlockedLayout(
        [4, 1],
        [lane_rows, lane_columns],
        [threads // 32 // warp_columns, warp_columns],
        [0, 1],
    )


@gluon.jit
def store_sums(
    sums,  # (R, BN) float32, this split's
    b_ptr,
    y_ptr,
    ws_ptr,
    cnt_ptr,
    pm,
    pn,
    row_blocks,
    ps,
    M,
    N,
    THREADS: gl.constexpr,
    SPLIT: gl.constexpr,
    BIAS: gl.constexpr,
):
    """Add the sums of all splits in their order, and the bias, and store y, (N, M).

    Every split writes its sums to ``ws_ptr`` and waits for the others; then each adds up its part of the
    tile. The splits of a tile are neighbours in the grid, so those waited for are running or start before
    any later program. A cell of ``cnt_ptr`` rises by 16 for each tile and launch: it needs no reset, and it
    may wrap.
    """
    R: gl.constexpr = sums.shape[0]
    BN: gl.constexpr = sums.shape[1]
    DTYPE: gl.constexpr = y_ptr.dtype.element_ty
    LO: gl.constexpr = _sum_layout(R, BN, THREADS)
    sums = gl.convert_layout(sums, LO)
    r = gl.arange(0, R, layout=gl.SliceLayout(1, LO))
    n = gl.arange(0, BN, layout=gl.SliceLayout(0, LO))
    if SPLIT == 1:
        row = pm * R + r
        column = pn * BN + n
        if BIAS:
            sums += gl.load(b_ptr + row, mask=row < M, other=0.0).to(gl.float32)[:, None]
        mask = (row < M)[:, None] & (column < N)[None, :]
        gl.store(y_ptr + column[None, :] * M + row[:, None], sums.to(DTYPE), mask=mask)
    else:
        SIZE: gl.constexpr = R * BN
        tile = (pn * row_blocks + pm) * SPLIT
        mask = (pn * BN + n < N)[None, :]
        gl.store(ws_ptr + (tile + ps) * SIZE + n[None, :] * R + r[:, None], sums, mask=mask)
        barrier()
        cell = cnt_ptr + pn * row_blocks + pm
        mine = 16 * (ps + 1) // SPLIT - 16 * ps // SPLIT
        old = gl.atomic_add(cell, mine, sem="acq_rel", scope="gpu")
        start = old - (old & 15)
        seen = old + mine
        while seen - start < 16:
            seen = gl.atomic_add(cell, 0, sem="acquire", scope="gpu")
        PARTS: gl.constexpr = _power_of_two(SPLIT)
        PART: gl.constexpr = SIZE // PARTS
        LF: gl.constexpr = gl.BlockedLayout([4], [32], [THREADS // 32], [0])
        for part in range(ps, PARTS, SPLIT):
            e = part * PART + gl.arange(0, PART, layout=LF)
            y_row = pm * R + e % R
            y_column = pn * BN + e // R
            live = (y_row < M) & (y_column < N)
            total = gl.load(ws_ptr + tile * SIZE + e, mask=live, other=0.0, cache_modifier=".cg")
            for split in gl.static_range(1, SPLIT):
                pointers = ws_ptr + (tile + split) * SIZE + e
                total += gl.load(pointers, mask=live, other=0.0, cache_modifier=".cg")
            if BIAS:
                total += gl.load(b_ptr + y_row, mask=live, other=0.0).to(gl.float32)
            gl.store(y_ptr + y_column * M + y_row, total.to(DTYPE), mask=live)


@gluon.jit
def launch_dependents():
    """Let the next kernel of the stream start: it waits for this one in :func:`wait_for_previous`."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def wait_for_previous():
    """Wait until all that earlier kernels of the stream wrote can be read."""
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
