"""From packed to dense, at the bandwidth of memory: plain Triton, values as bits.

``unpack``   the four forms that have a tile order, from either order
``columns``  N of M consecutive elements, for any M up to 32 and elements of 1 to 8 bytes
``blocks``   blocks of any layout whose runs in a row are whole pieces of 16 bytes

A thread of ``unpack`` makes a piece: 16 bytes of the dense weight, from 8 bytes of values (16 of
rowpair16, for two pieces) and a code. A program has as many pieces in a step as it has threads, so every
load, shift and store is of one thread's own data: no layout conversion, no shared memory. A group of four
16-bit columns is one 64-bit word, so that a kept value finds its column by a shift. That is about 25
integer operations a piece; at an H100's full bandwidth there is time for 200.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import FORMS, Form, can_tile, code_bytes

# What a piece is made of, by form and by size of an element.
GROUPS = 0  # 2:4 of 16 bits: two scopes of two 16-bit values
WORDS = 1  # 2:4 of 32 bits and pair4:8 of 16: one scope of two 32-bit blocks
LONGS = 2  # pair4:8 of 32 bits: half a scope of two 64-bit blocks
COUPLED = 3  # coupled2:4 of 16 bits: one column of each block of two scopes
COUPLED_WIDE = 4  # coupled2:4 of 32 bits: one column of each block of one scope
ROWPAIR = 5  # a piece of a packed row, or zeros
_KINDS = {
    ("2:4", 2): GROUPS, ("2:4", 4): WORDS, ("pair4:8", 2): WORDS, ("pair4:8", 4): LONGS,
    ("coupled2:4", 2): COUPLED, ("coupled2:4", 4): COUPLED_WIDE,
    ("rowpair16", 2): ROWPAIR, ("rowpair16", 4): ROWPAIR,
}  # fmt: skip
_GROUPS, _WORDS, _LONGS = tl.constexpr(GROUPS), tl.constexpr(WORDS), tl.constexpr(LONGS)
_COUPLED, _COUPLED_WIDE = tl.constexpr(COUPLED), tl.constexpr(COUPLED_WIDE)
_ROWPAIR = tl.constexpr(ROWPAIR)

INTS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
LARGEST_SCOPE = 32  # elements, for :func:`columns`: the kept ones are bits of a word
MOST_PIECES = MOST_SCOPES = 2**31 - 2**16  # their numbers are 32-bit


@dataclass(frozen=True)
class Unpack:
    """A configuration: pieces a program."""

    threads: int = 256
    steps: int = 2  # pieces a thread, one after the other


def refusal(form: str, itemsize: int, rows: int, columns: int, tiled: bool) -> str | None:
    """Why :func:`unpack` cannot take a (rows, columns) weight of this form, or None if it can.

    It takes elements of 2 bytes, and of 4 in canonical order; all sizes that the form divides, but for 2:4
    of 2 bytes an even number of groups; and at most 2**34 elements.
    """
    if form not in FORMS:
        return f"form {form!r} is not one of {', '.join(FORMS)}"
    if itemsize not in (2, 4) or (tiled and itemsize != 2):
        return f"elements of {itemsize} bytes; it takes 2, and in canonical order 4"
    row_step = 16 if form == "rowpair16" else 1
    column_step = {"2:4": 4, "pair4:8": 8}.get(form, 16)
    if rows < 1 or columns < 1 or rows % row_step or columns % column_step:
        return f"{rows} x {columns} is not a multiple of {row_step} x {column_step}"
    if tiled and not can_tile(rows, columns):
        return f"{rows} x {columns} has no tile order"
    size = rows * columns * itemsize
    if size % 16:
        return f"{rows} x {columns} elements of {itemsize} bytes are not a multiple of 16 bytes"
    if size // 16 > MOST_PIECES:
        return f"{rows} x {columns} is too large"
    return None


def unpack(
    values: Tensor,  # kept values of 2 or 4 bytes, any shape
    codes: Tensor,  # (code_bytes,) uint8
    *,
    form: Form,
    rows: int,
    columns: int,
    tiled: bool,
    transposed: bool = False,
    config: Unpack | None = None,
) -> Tensor:  # (rows, columns), or transposed (columns, rows), contiguous
    """The dense weight of packed values and codes, bit for bit.

    Args:
        values: packed values, canonical or in the order of ``tiles.tile_values``.
        codes: packed codes, in the same order.
        form: the pattern.
        rows: rows of the weight.
        columns: its columns.
        tiled: whether values and codes are in tile order.
        transposed: return the transpose, which then needs columns in whole pieces of 16 bytes.
        config: pieces a program; by default one that suits an H100.

    Raises:
        ValueError: sizes or devices that do not fit each other, or a :func:`refusal`.
    """
    itemsize = values.element_size()
    reason = refusal(form, itemsize, rows, columns, tiled)
    if reason is None and transposed and columns * itemsize % 16:
        reason = f"rows of {columns * itemsize} bytes are not a multiple of 16 bytes"
    if reason is None and values.numel() * 2 != rows * columns:
        reason = f"{values.numel()} values are not half of {rows} x {columns}"
    if reason is None and codes.numel() != code_bytes(form, rows, columns):
        reason = f"{codes.numel()} bytes of codes are not those of {form} on {rows} x {columns}"
    if reason is None and codes.device != values.device:
        reason = f"values are on {values.device} and codes on {codes.device}"
    if reason is not None:
        raise ValueError(f"unpack: {reason}")
    config = config or Unpack()
    kind = _KINDS[form, itemsize]
    size = (columns, rows) if transposed else (rows, columns)
    dense = torch.empty(size, dtype=values.dtype, device=values.device)
    words = longs(values)
    pieces_a_row = columns * itemsize // 16
    with torch.cuda.device_of(values):
        if transposed:
            grid = (-(-rows // 64), -(-pieces_a_row // 8))
            transposed_kernel[grid](
                words, codes, dense.view(INTS[itemsize]), rows, columns, pieces_a_row, kind, tiled,
                itemsize, num_warps=8,
            )  # fmt: skip
            return dense
        total = rows * columns * itemsize // (32 if kind == ROWPAIR else 16)
        cut = config.threads * config.steps
        kernel = rows_kernel if kind == ROWPAIR else pieces_kernel
        kernel[(-(-total // cut),)](
            words, codes, dense.view(-1).view(torch.int64), total, pieces_a_row, kind, tiled,
            itemsize, config.threads, config.steps, num_warps=config.threads // 32,
        )  # fmt: skip
    return dense


def longs(t: Tensor) -> Tensor:
    """``t`` as 64-bit words, flat, from a multiple of 16 bytes on."""
    t = t.detach().reshape(-1)
    if t.data_ptr() % 16:
        t = t.clone()
    return t.view(torch.int64)


@triton.jit
def store_piece(y_ptr, place, low, high, live):
    """16 bytes, as two 64-bit words, to piece number ``place``."""
    pointers = y_ptr + (place.to(tl.int64) * 2)[:, None] + tl.arange(0, 2)[None, :]
    tl.store(pointers, tl.join(low, high), mask=live[:, None])


@triton.jit
def load_piece(v_ptr, place, live):
    """Two 64-bit words of piece number ``place``, of any shape."""
    pointers = tl.expand_dims(v_ptr + place.to(tl.int64) * 2, -1) + tl.arange(0, 2)
    return tl.split(tl.load(pointers, mask=tl.expand_dims(live, -1), other=0))


@triton.jit
def code_byte(at, TILED: tl.constexpr):
    """The byte of piece ``at`` in storage order, where 16 columns have one byte."""
    if TILED:  # (tile, lane, half) for pieces in the order (tile, half, lane, 2)
        return (at >> 7) * 64 + (at & 62) + ((at >> 6) & 1)
    else:
        return at >> 1


@triton.jit
def _spread(values, code):
    """Two 16-bit values, in the low half of a 64-bit word, to their columns of four."""
    first = (values & 0xFFFF) << ((code & 3) << 4)
    return first | (((values >> 16) & 0xFFFF) << ((code >> 2) << 4))


@triton.jit
def _place(first, second, code):
    """Two 32-bit blocks in 64-bit words to their places of four, as two words."""
    i0 = code & 3
    i1 = (code >> 2) & 3
    first = first << ((i0 & 1) << 5)
    second = second << ((i1 & 1) << 5)
    low = tl.where(i0 < 2, first, 0) | tl.where(i1 < 2, second, 0)
    return low, tl.where(i0 < 2, 0, first) | tl.where(i1 < 2, 0, second)


@triton.jit
def _piece(v_ptr, c_ptr, at, live, KIND: tl.constexpr, TILED: tl.constexpr):
    """Piece ``at`` in storage order, as two 64-bit words; of any form but rowpair16."""
    if KIND == _GROUPS:
        values = tl.load(v_ptr + at, mask=live, other=0)
        byte = at
        if TILED:  # (tile, lane, half, 2)
            byte = (at >> 7) * 128 + ((at & 62) << 1) + ((at >> 5) & 2) + (at & 1)
        code = tl.load(c_ptr + byte, mask=live, other=0).to(tl.int64)
        return _spread(values, code & 15), _spread(values >> 32, code >> 4)
    elif KIND == _WORDS:
        values = tl.load(v_ptr + at, mask=live, other=0)
        code = tl.load(c_ptr + code_byte(at, TILED), mask=live, other=0).to(tl.int64)
        code = code >> ((at & 1) << 2).to(tl.int64)
        return _place(values & 0xFFFFFFFF, (values >> 32) & 0xFFFFFFFF, code & 15)
    elif KIND == _LONGS:
        first, second = load_piece(v_ptr, at >> 1, live)
        code = tl.load(c_ptr + (at >> 2), mask=live, other=0).to(tl.int32)
        code = code >> ((at & 2) << 1)
        i0 = (code & 3) - ((at & 1) << 1)
        i1 = ((code >> 2) & 3) - ((at & 1) << 1)
        low = tl.where(i0 == 0, first, 0) | tl.where(i1 == 0, second, 0)
        return low, tl.where(i0 == 1, first, 0) | tl.where(i1 == 1, second, 0)
    elif KIND == _COUPLED:
        # Two scopes of blocks (column c, column c + 8); an odd piece takes the columns c + 8.
        one, two = load_piece(v_ptr, at >> 1, live)
        code = tl.load(c_ptr + code_byte(at, TILED), mask=live, other=0).to(tl.int64)
        shift = ((at & 1) << 4).to(tl.int64)
        one = (one >> shift) & 0xFFFF0000FFFF
        two = (two >> shift) & 0xFFFF0000FFFF
        return _spread(one | (one >> 16), code & 15), _spread(two | (two >> 16), code >> 4)
    else:  # COUPLED_WIDE: pieces are (16 columns, half, scope)
        scope = ((at >> 2) << 1) | (at & 1)
        first, second = load_piece(v_ptr, scope, live)
        code = tl.load(c_ptr + (at >> 2), mask=live, other=0).to(tl.int64)
        code = code >> ((at & 1) << 2).to(tl.int64)
        shift = ((at & 2) << 4).to(tl.int64)
        return _place((first >> shift) & 0xFFFFFFFF, (second >> shift) & 0xFFFFFFFF, code & 15)


@triton.jit
def tile_place(tile, line, piece, pieces_a_row, TILED_COLUMNS: tl.constexpr):
    """Number in the dense weight of a piece in line ``line`` of tile ``tile``, 64-bit.

    A tile is TILED_COLUMNS pieces wide; ``piece`` is the one of these.
    """
    tiles_a_row = pieces_a_row // TILED_COLUMNS
    tile_row = tile // tiles_a_row
    column = (tile - tile_row * tiles_a_row) * TILED_COLUMNS + piece
    return (tile_row * 16 + line).to(tl.int64) * pieces_a_row + column


@triton.jit(do_not_specialize=["total", "pieces_a_row"])
def pieces_kernel(
    v_ptr,  # values as 64-bit words
    c_ptr,  # codes, bytes
    y_ptr,  # (2 * total,) 64-bit words
    total,  # pieces
    pieces_a_row,
    KIND: tl.constexpr,
    TILED: tl.constexpr,
    ITEMSIZE: tl.constexpr,
    N: tl.constexpr,
    STEPS: tl.constexpr,
):
    for step in tl.static_range(STEPS):
        at = tl.program_id(0) * (N * STEPS) + step * N + tl.arange(0, N)
        live = at < total
        low, high = _piece(v_ptr, c_ptr, at, live, KIND, TILED)
        place = at.to(tl.int64)
        if TILED:  # storage order is by tiles, and row by row in each
            place = tile_place(at >> 7, (at >> 3) & 15, at & 7, pieces_a_row, 8)
        store_piece(y_ptr, place, low, high, live)


@triton.jit
def packed_row(at, pieces_a_row, TILED: tl.constexpr):
    """Of piece ``at`` of rowpair16: its number in storage order, and in the dense weight that of row r.

    In tile order ``at`` numbers the pieces of a tile by packed row, column and half, as the codes are.
    """
    if TILED:
        stored = (at & -64) + ((at & 1) << 5) + ((at >> 1) & 31)
        return stored, tile_place(at >> 6, (at >> 3) & 7, at & 7, pieces_a_row, 8)
    else:
        row = at // pieces_a_row
        place = (row + (row & -8)).to(tl.int64) * pieces_a_row + (at - row * pieces_a_row)
        return at, place


@triton.jit(do_not_specialize=["total", "pieces_a_row"])
def rows_kernel(
    v_ptr,
    c_ptr,
    y_ptr,  # (4 * total,) 64-bit words
    total,  # pieces of packed rows
    pieces_a_row,
    KIND: tl.constexpr,
    TILED: tl.constexpr,
    ITEMSIZE: tl.constexpr,  # as many pieces of 16 bytes share a bit of the codes
    N: tl.constexpr,
    STEPS: tl.constexpr,
):
    for step in tl.static_range(STEPS):
        at = tl.program_id(0) * (N * STEPS) + step * N + tl.arange(0, N)
        live = at < total
        stored, place = packed_row(at, pieces_a_row, TILED)
        low, high = load_piece(v_ptr, stored, live)
        scope = at // ITEMSIZE
        code = tl.load(c_ptr + (scope >> 3), mask=live, other=0).to(tl.int32)
        upper = ((code >> (scope & 7)) & 1) == 0
        store_piece(y_ptr, place, tl.where(upper, low, 0), tl.where(upper, high, 0), live)
        place += pieces_a_row.to(tl.int64) * 8
        store_piece(y_ptr, place, tl.where(upper, 0, low), tl.where(upper, 0, high), live)


@triton.jit(do_not_specialize=["columns", "pieces_a_row"])
def transposed_kernel(
    v_ptr,
    c_ptr,
    y_ptr,  # (columns, rows)
    rows,
    columns,
    pieces_a_row,
    KIND: tl.constexpr,
    TILED: tl.constexpr,
    ITEMSIZE: tl.constexpr,
):
    row = tl.program_id(0) * 64 + tl.arange(0, 64)[:, None]
    piece = tl.program_id(1) * 8 + tl.arange(0, 8)[None, :]
    live = (row < rows) & (piece < pieces_a_row)
    if KIND == _ROWPAIR:
        at = ((row >> 4) * 8 + (row & 7)) * pieces_a_row + piece
        stored = at
        scope = at // ITEMSIZE
        if TILED:
            tile = (row >> 4) * (pieces_a_row // 8) + (piece >> 3)
            scope = tile * 32 + (row & 7) * 4 + ((piece & 7) >> 1)
            stored = tile * 64 + ((piece & 1) << 5) + (scope & 31)
        low, high = load_piece(v_ptr, stored, live)
        code = tl.load(c_ptr + (scope >> 3), mask=live, other=0).to(tl.int32)
        mine = ((code >> (scope & 7)) & 1) == ((row >> 3) & 1)
        low = tl.where(mine, low, 0)
        high = tl.where(mine, high, 0)
    else:
        at = row * pieces_a_row + piece
        if TILED:
            at = ((row >> 4) * (pieces_a_row // 8) + (piece >> 3)) * 128
            at += ((row & 15) << 3) + (piece & 7)
        low, high = _piece(v_ptr, c_ptr, at, live, KIND, TILED)
    words = tl.join(low, high)
    elements = tl.join(words.to(tl.int32), (words >> 32).to(tl.int32))
    if ITEMSIZE == 2:
        elements = tl.join(elements.to(tl.int16), (elements >> 16).to(tl.int16))
    COLUMNS: tl.constexpr = 8 * (16 // ITEMSIZE)
    dense = tl.trans(tl.reshape(elements, (64, COLUMNS)))
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    rows_out = tl.program_id(0) * 64 + tl.arange(0, 64)[None, :]
    pointers = y_ptr + column.to(tl.int64) * rows + rows_out
    tl.store(pointers, dense, mask=(column < columns) & (rows_out < rows))


# N of M consecutive elements --------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """A configuration: dense elements a program, M rounded up to a power of two."""

    elements: int = 2048
    warps: int = 4


def columns(
    values: Tensor,  # kept elements of 1, 2, 4 or 8 bytes, any shape
    codes: Tensor,  # uint8 stream
    *,
    keep: int,
    of: int,
    config: Columns | None = None,
) -> Tensor:  # (scopes * of,)
    """The dense elements, flat, of packed ones that are ``keep`` of every ``of`` consecutive elements.

    The codes of a scope are its kept elements' numbers, ascending, or where that takes more bits than
    ``of``, a bit for each element; a stream of either, least significant bit first.

    Raises:
        ValueError: sizes or devices that do not fit each other, or scopes of over 32 elements.
    """
    scopes = check_columns(values.numel() // max(keep, 1), values, codes, keep, of)
    if scopes * keep != values.numel():
        raise ValueError(f"unpack: {values.numel()} values are not a multiple of {keep}")
    config = config or Columns()
    packed = values.detach().reshape(-1).view(INTS[values.element_size()])
    dense = torch.empty(scopes * of, dtype=values.dtype, device=values.device)
    step = max(1, config.elements // triton.next_power_of_2(of))
    with torch.cuda.device_of(values):
        columns_kernel[(-(-scopes // step),)](
            packed, codes, dense.view(packed.dtype), scopes, codes.numel(), keep, of,
            triton.next_power_of_2(of), index_width(keep, of), step, num_warps=config.warps,
        )  # fmt: skip
    return dense


def index_width(keep: int, of: int) -> int:
    """Bits of a number in the codes of ``keep`` of ``of``, or 0 where the codes are bitmaps."""
    width = (of - 1).bit_length()
    return width if keep * width <= of else 0


def check_columns(scopes: int, values: Tensor, codes: Tensor, keep: int, of: int) -> int:
    """``scopes``, if the kernels take them.

    Raises:
        ValueError: as :func:`columns`.
    """
    width = index_width(keep, of) if of > 0 else 0
    bits = keep * width or of
    if not 1 <= keep < of <= LARGEST_SCOPE:
        reason = f"{keep} of {of} elements; it takes 1 to {of - 1} of at most {LARGEST_SCOPE}"
    elif values.element_size() not in INTS:
        reason = f"elements of {values.element_size()} bytes; it takes 1, 2, 4 and 8"
    elif scopes > MOST_SCOPES:
        reason = f"{scopes} scopes are too many"
    elif codes.numel() != math.ceil(scopes * bits / 8):
        reason = (
            f"{codes.numel()} bytes of codes are not those of {scopes} scopes of {keep} of {of}"
        )
    elif codes.device != values.device:
        reason = f"values are on {values.device} and codes on {codes.device}"
    else:
        return scopes
    raise ValueError(f"packed columns: {reason}")


@triton.jit
def popcount(x):
    """Set bits of 32-bit words. LLVM knows these lines: they become one instruction."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def scope_bits(c_ptr, scope, live, size, BITS: tl.constexpr):
    """The BITS <= 32 bits of a scope, from a stream of ``size`` bytes, as uint32."""
    SPARE: tl.constexpr = 0 if BITS % 8 == 0 else 7 if BITS % 2 else 6 if BITS % 4 else 4
    BYTES: tl.constexpr = 1 if 8 % BITS == 0 else (BITS + SPARE + 7) // 8
    bit = scope.to(tl.int64) * BITS
    byte = bit >> 3
    word = tl.zeros(scope.shape, tl.uint64 if BYTES > 4 else tl.uint32)
    for i in tl.static_range(BYTES):
        piece = tl.load(c_ptr + byte + i, mask=live & (byte + i < size), other=0)
        word |= piece.to(word.dtype) << (8 * i)
    if BITS % 8:
        word = word >> (bit & 7).to(word.dtype)
    return (word & ((1 << BITS) - 1)).to(tl.uint32)


@triton.jit(do_not_specialize=["scopes", "size"])
def columns_kernel(
    v_ptr,
    c_ptr,
    y_ptr,
    scopes,
    size,  # bytes of codes
    KEEP: tl.constexpr,
    OF: tl.constexpr,
    WIDE: tl.constexpr,  # OF, rounded up to a power of two
    WIDTH: tl.constexpr,  # bits of a number, or 0
    S: tl.constexpr,
):
    scope = tl.program_id(0) * S + tl.arange(0, S)
    live = scope < scopes
    BITS: tl.constexpr = KEEP * WIDTH if WIDTH else OF
    code = scope_bits(c_ptr, scope, live, size, BITS)
    if WIDTH:
        kept = tl.zeros((S,), tl.uint32)
        one = tl.full((S,), 1, tl.uint32)
        for k in tl.static_range(KEEP):
            kept |= one << ((code >> (k * WIDTH)) & ((1 << WIDTH) - 1))
    else:
        kept = code
    j = tl.arange(0, WIDE)[None, :].to(tl.uint32)
    kept = kept[:, None]
    live = live[:, None]
    here = live & (((kept >> j) & 1) != 0)
    if KEEP == 1:
        rank = tl.zeros((S, WIDE), tl.int32)
    else:
        one = tl.full((1, WIDE), 1, tl.uint32)
        rank = popcount(kept & ((one << j) - 1))
        here &= rank < KEEP  # also where the codes are damaged
    first = scope.to(tl.int64)[:, None]
    value = tl.load(v_ptr + first * KEEP + rank, mask=here, other=0)
    if OF != WIDE:
        live = live & (j < OF)
    tl.store(y_ptr + first * OF + tl.arange(0, WIDE)[None, :], value, mask=live)


# Blocks of whole pieces -------------------------------------------------------------------------------

# Of each mode of the dense weight, slowest first: its size, and what a step along it adds to the number of
# the scope, of the block in its scope and of the piece in its block.
Modes = tuple[tuple[int, int, int, int], ...]
MOST_MODES = 5


def blocks(
    values: Tensor,  # (scopes, keep, block_size)
    slots: Tensor,  # (scopes, blocks) int32: which of the kept blocks each is, or -1
    shape: tuple[int, ...],
    modes: Modes,  # of the dense weight in pieces of 16 bytes
) -> Tensor:  # of ``shape``
    """The dense tensor of packed blocks; each piece is written once, and read if its block is kept.

    Raises:
        ValueError: sizes that do not belong together, or over :data:`MOST_MODES` modes.
    """
    dense = torch.empty(shape, dtype=values.dtype, device=values.device)
    launch_blocks(values, slots, dense, modes, gathers=False)
    return dense


def launch_blocks(
    values: Tensor, slots: Tensor, dense: Tensor, modes: Modes, gathers: bool
) -> None:
    """Fill ``dense`` from ``values``, or with ``gathers`` values from dense; both contiguous."""
    total = dense.numel() * dense.element_size() // 16
    if (
        len(modes) > MOST_MODES
        or math.prod(mode[0] for mode in modes) != total
        or total > MOST_PIECES
        or slots.dtype != torch.int32
    ):
        raise ValueError(f"blocks: {tuple(slots.shape)} slots and modes {modes} of {total} pieces")
    padded = ((1, 0, 0, 0),) * (MOST_MODES - len(modes)) + tuple(modes)
    numbers = [n for size, *steps in padded for n in (size, *steps)][
        1:
    ]  # the first has what is left
    _, keep, block_size = values.shape
    threads = Unpack().threads
    with torch.cuda.device_of(values):
        blocks_kernel[(-(-total // threads),)](
            longs(values), slots, longs(dense), total, slots.shape[1], keep,
            block_size * values.element_size() // 16, *numbers, gathers, threads,
            num_warps=threads // 32,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "total", "blocks", "keep", "pieces", "scope0", "block0", "piece0", "size1", "scope1", "block1",
        "piece1", "size2", "scope2", "block2", "piece2", "size3", "scope3", "block3", "piece3", "size4",
        "scope4", "block4", "piece4",
    ]
)  # fmt: skip
def blocks_kernel(
    v_ptr,
    slot_ptr,
    y_ptr,
    total,  # pieces of the dense tensor
    blocks,  # of a scope
    keep,
    pieces,  # of a block
    scope0, block0, piece0,
    size1, scope1, block1, piece1,
    size2, scope2, block2, piece2,
    size3, scope3, block3, piece3,
    size4, scope4, block4, piece4,
    GATHERS: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * N + tl.arange(0, N)
    live = at < total
    q4 = at // size4
    q3 = q4 // size3
    q2 = q3 // size2
    c0 = q2 // size1
    c4 = at - q4 * size4
    c3 = q4 - q3 * size3
    c2 = q3 - q2 * size2
    c1 = q2 - c0 * size1
    scope = c0 * scope0 + c1 * scope1 + c2 * scope2 + c3 * scope3 + c4 * scope4
    block = c0 * block0 + c1 * block1 + c2 * block2 + c3 * block3 + c4 * block4
    piece = c0 * piece0 + c1 * piece1 + c2 * piece2 + c3 * piece3 + c4 * piece4
    slot = tl.load(slot_ptr + scope.to(tl.int64) * blocks + block, mask=live, other=-1)
    kept = live & (slot >= 0) & (slot < keep)
    place = (scope.to(tl.int64) * keep + slot) * pieces + piece
    if GATHERS:
        low, high = load_piece(y_ptr, at, kept)
        store_piece(v_ptr, place, low, high, kept)
    else:
        low, high = load_piece(v_ptr, place, kept)
        store_piece(y_ptr, at, low, high, live)
