"""From packed 8-bit integers to dense tensor-core fragments in registers: ``expand`` for int8 values.

A lane's 16 columns of rows r and r + 8 (of rowpair16: of packed row r) are 16 bytes, one load. Integers of
eight bits are exact in bfloat16 and in float16, so they are multiplied as they are and a row's scale is
applied to its sum. A group of four columns of 2:4 is 2.5 bytes of memory, where 16-bit values make 4.5: an
H100 at full bandwidth has time for 12 integer operations and 24 instructions on it, instead of 22 and 44.

=========================  ===========================================================================
bfloat16                   two bytes under the exponent of 2**7, as two bfloat16: the lower 7 bits,
                           less the sign bit: 128 + low - (128 or 256). For two values 3 integer
                           operations and 1 of floats, then as ``expand``
bfloat16, 2:4, by float32  a byte with its sign bit flipped under the exponent of 2**23 is the float32
                           2**23 + 128 + value; less 2**23 + 128 it is the value, whose lower 16 bits
                           are zero. So the two float32 of a group hold its two bfloat16 and the zeros,
                           and one permutation of them is a fragment. For two values 2.5 integer
                           operations and 2 of floats
float16                    two bytes, their sign bits flipped, under the exponent of 2**10: less
                           2**10 + 128. For two values 1.5 integer operations and 1 of floats
=========================  ===========================================================================

For 2:4 in bfloat16 and up to 8 rows of x the loop of ``skinny`` compiles to 16.3 instructions for a group,
9.3 of them integer; by float32 to 16.8 and 8.8, and to 8 to 20 registers more. On an H100 each is the faster
in some cuts (``bench/int8.py --tune``): by float32 4096x2560 takes 5.0 us instead of 5.7, and 9728x2560
9.6 instead of 10.4.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .expand import (
    PLAIN,
    ROWPAIR,
    dense_rows,
    eight,
    look_up,
    selectors,
)

_PLAIN = gl.constexpr(PLAIN)
_ROWPAIR = gl.constexpr(ROWPAIR)
_FLOAT16 = gl.constexpr(gl.float16)

# Selector bytes: of the upper half of the first float32, of the second, or of a lower half, which is zero.
_LOOK_UP = gl.constexpr(look_up(0x32, 0x76, 0x10))
# $8 four bytes of two groups; $9 to $12 the look-ups; $13 and $14 pick the codes of the first group and of
# the second. Out: columns 0 to 3 of the first, of the second.
_GROUPS = gl.constexpr("""
{
.reg .b32 u, p, q, s, t, a, b, c, d;
xor.b32 u, $8, 0x80808080;
prmt.b32 p, u, 0x4B000000, 0x7440;
prmt.b32 q, u, 0x4B000000, 0x7441;
add.rn.f32 p, p, 0fCB000080;
add.rn.f32 q, q, 0fCB000080;
prmt.b32 s, $9, $10, $13;
prmt.b32 t, $11, $12, $13;
prmt.b32 a, p, q, s;
prmt.b32 b, p, q, t;
prmt.b32 p, u, 0x4B000000, 0x7442;
prmt.b32 q, u, 0x4B000000, 0x7443;
add.rn.f32 p, p, 0fCB000080;
add.rn.f32 q, q, 0fCB000080;
prmt.b32 s, $9, $10, $14;
prmt.b32 t, $11, $12, $14;
prmt.b32 c, p, q, s;
prmt.b32 d, p, q, t;
mov.b32 {$0, $1}, a; mov.b32 {$2, $3}, b; mov.b32 {$4, $5}, c; mov.b32 {$6, $7}, d;
}
""")
# $2 four bytes. Out: the first two as 16-bit floats, the last two.
_TO_BFLOAT16 = gl.constexpr("""
{
.reg .b32 p, q, s, t, m;
mov.b32 m, 0xBF80BF80;
prmt.b32 p, $2, 0x43434343, 0x4140;
prmt.b32 q, $2, 0x43434343, 0x4342;
and.b32 s, p, 0xFF80FF80;
and.b32 t, q, 0xFF80FF80;
and.b32 p, p, 0xFF7FFF7F;
and.b32 q, q, 0xFF7FFF7F;
fma.rn.bf16x2 $0, s, m, p;
fma.rn.bf16x2 $1, t, m, q;
}
""")
_TO_FLOAT16 = gl.constexpr("""
{
.reg .b32 u, p, q, m;
mov.b32 m, 0xE480E480;
xor.b32 u, $2, 0x80808080;
prmt.b32 p, u, 0x64646464, 0x4140;
prmt.b32 q, u, 0x64646464, 0x4342;
add.rn.f16x2 $0, p, m;
add.rn.f16x2 $1, q, m;
}
""")


@gluon.jit
def _widened(
    words, FORM: gl.constexpr, TILES: gl.constexpr, UNITS: gl.constexpr, DTYPE: gl.constexpr
):
    """(TILES * UNITS, threads, 4) words of bytes to the words of ``dense_rows``, two 16-bit floats each."""
    T: gl.constexpr = words.shape[1]
    first, second = gl.inline_asm_elementwise(
        _TO_FLOAT16 if DTYPE == _FLOAT16 else _TO_BFLOAT16,
        "=r,=r,r",
        [words],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )
    pairs = gl.join(first, second)  # to half rows, or half columns, of four words
    pairs = pairs.reshape([TILES, UNITS, T, 2, 4])
    if FORM == _ROWPAIR:
        return pairs.permute(0, 1, 3, 2, 4).reshape([TILES * 2 * UNITS, T, 4])
    else:
        return pairs.permute(0, 3, 1, 2, 4).reshape([TILES * 2 * UNITS, T, 4])


@gluon.jit
def dense_rows_of_bytes(
    words,
    codes,
    FORM: gl.constexpr,
    TILES: gl.constexpr,
    UNITS: gl.constexpr,
    DTYPE: gl.constexpr,
    BY_FLOAT32: gl.constexpr,
):
    """``expand.dense_rows`` of words of four int8 in tile order: (TILES * UNITS, threads, 4)."""
    T: gl.constexpr = words.shape[1]
    if BY_FLOAT32 and FORM == _PLAIN and DTYPE != _FLOAT16:
        w = words.reshape([TILES, UNITS, T, 2, 2]).permute(0, 3, 1, 2, 4)
        w = w.reshape([TILES * 2 * UNITS, T, 2])
        L: gl.constexpr = w.type.layout
        s0, s1, s2, s3, pair = selectors(codes, L, 2, _LOOK_UP)
        w0, w1, w2, w3, w4, w5, w6, w7 = gl.inline_asm_elementwise(
            _GROUPS,
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r,r,r,r",
            [w, s0, s1, s2, s3, pair * 0x22 + 0x40, pair * 0x22 + 0x51],
            dtype=(
                gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16,
            ),
            is_pure=True,
            pack=1,
        )  # fmt: skip
        both = eight(w0, w1, w2, w3, w4, w5, w6, w7)  # the last index: the group
        return both.permute(0, 1, 2, 5, 3, 4).reshape([TILES, 2, UNITS, T, 16])
    else:
        return dense_rows(
            _widened(words, FORM, TILES, UNITS, DTYPE), codes, FORM, TILES, UNITS, True
        )
