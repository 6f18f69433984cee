"""From dense to packed, at the bandwidth of memory: plain Triton, values as bits.

``pack``, ``pack_columns``      from a weight and its mask to values, codes and a flag for a wrong mask
``gather``, ``gather_columns``, ``gather_blocks``  the values of a dense tensor at the places that codes
                                record

A thread makes 16 bytes of values. Of 2:4, coupled2:4 and pair4:8 that is a unit of 16 columns: the mask of
a scope becomes four bits by a multiplication, and its code comes from a table of 16 nibbles in one 64-bit
constant, which also fills a scope that keeps too few blocks. Of rowpair16 only the kept row is read.

The flag is one int32: 0 for a sound mask, :data:`SPLIT` where a block is kept in part, else the most blocks
that a scope keeps, where that is over the budget. It stays on the device: reading it waits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import FORMS, Form, can_tile, code_bytes
from .unpack import (
    INTS,
    LARGEST_SCOPE,
    MOST_PIECES,
    Modes,
    check_columns,
    index_width,
    launch_blocks,
    load_piece,
    longs,
    packed_row,
    popcount,
    scope_bits,
    store_piece,
    tile_place,
)

SPLIT = 64  # more than a scope has blocks
_SPLIT = tl.constexpr(SPLIT)
PLAIN, COUPLED, PAIR = 0, 1, 2  # as in tiles.FORMS
_PLAIN, _COUPLED = tl.constexpr(PLAIN), tl.constexpr(COUPLED)
# Elements that :func:`pack_columns` takes; floats have a zero to make positive.
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ELEMENTS = (*_FLOATS, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


def _tables() -> tuple[int, int]:
    """For each mask of four blocks a nibble: the code ``i0 | i1 << 2`` with two kept, and the count."""
    codes = counts = 0
    for mask in range(16):
        kept = [i for i in range(4) if mask >> i & 1]
        first, second = sorted((kept + [i for i in range(4) if i not in kept])[:2])
        codes |= (first | second << 2) << 4 * mask
        counts |= len(kept) << 4 * mask
    return codes - (1 << 64 if codes >> 63 else 0), counts


_CODES, _COUNTS = (tl.constexpr(table) for table in _tables())


@dataclass(frozen=True)
class Pack:
    """A configuration: threads a program, of one unit or piece each."""

    threads: int = 256


def refusal(form: str, dtype: torch.dtype, rows: int, columns: int, tiled: bool) -> str | None:
    """Why :func:`pack` and :func:`gather` cannot take a (rows, columns) weight, or None if they can.

    They take bfloat16, float16 and int16, and all sizes that the form divides, but for 2:4 and pair4:8
    only a multiple of 16 elements; and at most 2**34 of them.
    """
    if form not in FORMS:
        return f"form {form!r} is not one of {', '.join(FORMS)}"
    if dtype not in (torch.bfloat16, torch.float16, torch.int16):
        return f"elements are {dtype}; it takes bfloat16, float16 and int16"
    row_step = 16 if form == "rowpair16" else 1
    column_step = {"2:4": 4, "pair4:8": 8}.get(form, 16)
    if rows < 1 or columns < 1 or rows % row_step or columns % column_step:
        return f"{rows} x {columns} is not a multiple of {row_step} x {column_step}"
    if rows * columns % 16:
        return f"{rows} x {columns} is not a multiple of 16 elements"
    if tiled and not can_tile(rows, columns):
        return f"{rows} x {columns} has no tile order"
    if rows * columns // 8 > MOST_PIECES:
        return f"{rows} x {columns} is too large"
    return None


def pack(
    weight: Tensor,  # (rows, columns), 16-bit
    mask: Tensor,  # (rows, columns) bool, True where kept
    *,
    form: Form,
    tiled: bool = False,
    config: Pack | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # (rows * columns / 2,), (code_bytes,) uint8, (1,) int32
    """Values, codes and flag of ``weight * mask``, in canonical or in tile order.

    A scope that keeps fewer blocks than it may is filled with zero blocks, lowest index first; -0.0
    becomes 0.0. Where the flag is not 0, values and codes mean nothing.

    Raises:
        ValueError: sizes or devices that do not belong together, or a :func:`refusal`.
    """
    _check_mask(weight, mask)
    flag = torch.zeros(1, dtype=torch.int32, device=weight.device)
    size = code_bytes(form, *_size(weight)) if form in FORMS else 0
    codes = torch.empty(size, dtype=torch.uint8, device=weight.device)
    values = _blocks(weight, mask.contiguous(), codes, flag, form, tiled, False, config or Pack())
    return values, codes, flag


def gather(
    dense: Tensor,  # (rows, columns), 16-bit
    codes: Tensor,  # (code_bytes,) uint8
    *,
    form: Form,
    tiled: bool = False,
    config: Pack | None = None,
) -> Tensor:  # (rows * columns / 2,)
    """The elements of ``dense`` in the blocks that ``codes`` record, bit for bit, in the order of the codes.

    Raises:
        ValueError: sizes or devices that do not belong together, or a :func:`refusal`.
    """
    if form in FORMS and codes.numel() != code_bytes(form, *_size(dense)):
        raise ValueError(
            f"gather: {codes.numel()} bytes of codes are not those of {form} on {tuple(dense.shape)}"
        )
    if codes.device != dense.device:
        raise ValueError(f"gather: dense is on {dense.device} and codes on {codes.device}")
    return _blocks(dense, codes, codes, codes, form, tiled, True, config or Pack())


def _size(weight: Tensor) -> tuple[int, int]:
    if weight.ndim != 2:
        raise ValueError(f"pack: a weight of 2 dims, got {tuple(weight.shape)}")
    return int(weight.shape[0]), int(weight.shape[1])


def _check_mask(weight: Tensor, mask: Tensor) -> None:
    if mask.shape != weight.shape or mask.dtype != torch.bool or mask.device != weight.device:
        raise ValueError(
            f"pack: the mask is {mask.dtype} {tuple(mask.shape)} on {mask.device}; it must be bool "
            f"{tuple(weight.shape)} on {weight.device}"
        )


def _blocks(
    dense: Tensor,
    mask: Tensor,
    codes: Tensor,
    flag: Tensor,
    form: Form,
    tiled: bool,
    gathers: bool,
    config: Pack,
) -> Tensor:
    """Values of one of the four forms; writes ``codes`` and ``flag``, or ``gathers`` by ``codes``."""
    rows, columns = _size(dense)
    reason = refusal(form, dense.dtype, rows, columns, tiled)
    if reason is not None:
        raise ValueError(f"pack: {reason}")
    values = torch.empty(rows * columns // 2, dtype=dense.dtype, device=dense.device)
    signed = dense.dtype in _FLOATS
    masks = mask if gathers else longs(mask)
    if form == "2:4":
        codes = codes if codes.data_ptr() % 2 == 0 else codes.clone()
        codes = codes.view(torch.int16)
    arguments = longs(dense), masks, values.view(torch.int64), codes, flag
    total = rows * columns // 16  # units of 16 columns, or pieces of packed rows
    grid = (-(-total // config.threads),)
    with torch.cuda.device_of(dense):
        if form == "rowpair16":
            row_pairs_kernel[grid](
                *arguments, total, columns // 8, tiled, gathers, signed, config.threads,
                num_warps=config.threads // 32,
            )  # fmt: skip
        else:
            number = FORMS.index(form)
            units_kernel[grid](
                *arguments, total, columns // 16, number, tiled, gathers, signed, config.threads,
                num_warps=config.threads // 32,
            )  # fmt: skip
    return values


@triton.jit
def _positive_zeros(words, SIGNED: tl.constexpr):
    """64-bit words of four 16-bit floats with 0x8000, which is -0.0, made 0."""
    if SIGNED:
        low: tl.constexpr = 0x7FFF7FFF7FFF7FFF
        return words & (
            low | ((words & low) + low)
        )  # the sum has a sign bit where a number is not 0
    else:
        return words


@triton.jit
def _nibble(bools):
    """Four bools, the bytes of a 32-bit word in the low half of 64 bits, as four bits."""
    return ((((bools & 0xFFFFFFFF) * 0x01020408) >> 24) & 15).to(tl.int32)


@triton.jit
def _code(mask):
    """The code nibble of a mask of four blocks, 64-bit."""
    return ((tl.full(mask.shape, _CODES, tl.int64) >> (mask << 2).to(tl.int64)) & 15).to(tl.int64)


@triton.jit
def _count(mask):
    """The blocks of a mask of four, where they are more than two; else 0."""
    count = (tl.full(mask.shape, _COUNTS, tl.int64) >> (mask << 2).to(tl.int64)) & 15
    return tl.where(count > 2, count, 0).to(tl.int32)


@triton.jit
def _columns_of_four(group, code, mask):
    """Columns i0 and i1 of four 16-bit ones, where the mask has them, in the low half of 64 bits."""
    i0 = code & 3
    i1 = code >> 2
    mask = mask.to(tl.int64)
    first = (group >> (i0 << 4)) & (-((mask >> i0) & 1) & 0xFFFF)
    return first | (((group >> (i1 << 4)) & (-((mask >> i1) & 1) & 0xFFFF)) << 16)


@triton.jit
def _pairs_of_four(low, high, code, mask):
    """Column pairs i0 and i1 of four, where the mask has them, as a 64-bit word."""
    i0 = code & 3
    i1 = code >> 2
    mask = mask.to(tl.int64)
    first = tl.where(i0 < 2, low, high) >> ((i0 & 1) << 5)
    second = tl.where(i1 < 2, low, high) >> ((i1 & 1) << 5)
    first &= -((mask >> i0) & 1) & 0xFFFFFFFF
    return first | ((second & -((mask >> i1) & 1)) << 32)


@triton.jit
def _interleave(low, high):
    """Two 16-bit values of ``low`` and two of ``high`` in turns."""
    low = (low | (low << 16)) & 0xFFFF0000FFFF
    high = (high | (high << 16)) & 0xFFFF0000FFFF
    return low | (high << 16)


@triton.jit
def _pair_mask(low, high):
    """Of 8 bools in two words: the pairs with any True, as four bits, and whether one is split."""
    bits = _nibble(low) | (_nibble(high) << 4)
    some = (bits | (bits >> 1)) & 0x55
    split = some != (bits & (bits >> 1) & 0x55)
    some = (some | (some >> 1)) & 0x33
    return (some | (some >> 2)) & 15, split


@triton.jit
def _raise_flag(flag_ptr, status):
    most = tl.max(status, 0)
    if most > 0:
        tl.atomic_max(flag_ptr, most)


@triton.jit(do_not_specialize=["total", "units_a_row"])
def units_kernel(
    w_ptr,  # the dense weight, 64-bit words of four columns
    m_ptr,  # its mask, 64-bit words of eight bools
    v_ptr,  # values, 64-bit words
    c_ptr,  # codes of a unit: 16 bits for 2:4, else bytes
    flag_ptr,  # int32
    total,  # units of 16 columns
    units_a_row,
    FORM: tl.constexpr,
    TILED: tl.constexpr,
    GATHERS: tl.constexpr,
    SIGNED: tl.constexpr,
    N: tl.constexpr,
):
    at = tl.program_id(0) * N + tl.arange(0, N)  # in storage order
    live = at < total
    if TILED:  # (tile, half, lane) for values, (tile, lane, half) for codes
        place = tile_place(at >> 6, (at >> 2) & 15, at & 3, units_a_row, 4)
        code_at = (at & -64) + ((at & 31) << 1) + ((at >> 5) & 1)
    else:
        place = at.to(tl.int64)
        code_at = at
    a, b = load_piece(w_ptr, place * 2, live)
    c, d = load_piece(w_ptr, place * 2 + 1, live)
    if GATHERS:
        codes = tl.load(c_ptr + code_at, mask=live, other=0).to(tl.int64)
        full = tl.full((N,), 15, tl.int32)
        code0 = codes & 15
        code1 = (codes >> 4) & 15
    else:
        left, right = load_piece(m_ptr, place, live)
    if FORM == _PLAIN:
        if GATHERS:
            mask0, mask1, mask2, mask3 = full, full, full, full
            code2 = (codes >> 8) & 15
            code3 = (codes >> 12) & 15
        else:
            mask0, mask1, mask2, mask3 = (
                _nibble(left), _nibble(left >> 32), _nibble(right), _nibble(right >> 32),
            )  # fmt: skip
            code0, code1, code2, code3 = _code(mask0), _code(mask1), _code(mask2), _code(mask3)
            codes = code0 | (code1 << 4) | (code2 << 8) | (code3 << 12)
            status = tl.maximum(
                tl.maximum(_count(mask0), _count(mask1)), tl.maximum(_count(mask2), _count(mask3))
            )
        low = _columns_of_four(a, code0, mask0) | (_columns_of_four(b, code1, mask1) << 32)
        high = _columns_of_four(c, code2, mask2) | (_columns_of_four(d, code3, mask3) << 32)
    else:
        if GATHERS:
            mask0, mask1 = full, full
        else:
            if FORM == _COUPLED:  # columns c and c + 8
                mask0 = _nibble(left | right)
                mask1 = _nibble((left | right) >> 32)
                split = left != right
            else:
                mask0, split0 = _pair_mask(left, left >> 32)
                mask1, split1 = _pair_mask(right, right >> 32)
                split = split0 | split1
            code0, code1 = _code(mask0), _code(mask1)
            codes = code0 | (code1 << 4)
            status = tl.where(split, _SPLIT, tl.maximum(_count(mask0), _count(mask1)))
        if FORM == _COUPLED:
            low = _columns_of_four(a, code0, mask0)
            low = _interleave(low, _columns_of_four(c, code0, mask0))
            high = _columns_of_four(b, code1, mask1)
            high = _interleave(high, _columns_of_four(d, code1, mask1))
        else:
            low = _pairs_of_four(a, b, code0, mask0)
            high = _pairs_of_four(c, d, code1, mask1)
    if GATHERS:
        store_piece(v_ptr, at, low, high, live)
    else:
        low, high = _positive_zeros(low, SIGNED), _positive_zeros(high, SIGNED)
        store_piece(v_ptr, at, low, high, live)
        tl.store(c_ptr + code_at, codes.to(c_ptr.dtype.element_ty), mask=live)
        _raise_flag(flag_ptr, status)


@triton.jit(do_not_specialize=["total", "pieces_a_row"])
def row_pairs_kernel(
    w_ptr,
    m_ptr,
    v_ptr,
    c_ptr,  # codes, bytes
    flag_ptr,
    total,  # pieces of 8 columns of packed rows
    pieces_a_row,
    TILED: tl.constexpr,
    GATHERS: tl.constexpr,
    SIGNED: tl.constexpr,
    N: tl.constexpr,
):
    at = tl.program_id(0) * N + tl.arange(0, N)
    live = at < total
    stored, place = packed_row(at, pieces_a_row, TILED)
    apart = pieces_a_row.to(tl.int64) * 8
    if GATHERS:
        code = tl.load(c_ptr + (at >> 4), mask=live, other=0).to(tl.int32)
        lower = ((code >> ((at >> 1) & 7)) & 1) != 0
        low, high = load_piece(w_ptr, tl.where(lower, place + apart, place), live)
        store_piece(v_ptr, stored, low, high, live)
    else:
        # The bools of a block of 16 columns are 16 bytes, as its two pieces are twice that.
        a, b = load_piece(m_ptr, place >> 1, live)
        c, d = load_piece(m_ptr, (place + apart) >> 1, live)
        every: tl.constexpr = 0x0101010101010101
        upper = (a | b) != 0
        lower = (c | d) != 0
        split = (upper & ((a & b) != every)) | (lower & ((c & d) != every))
        status = tl.where(split, _SPLIT, tl.where(upper & lower, 2, 0))
        kept = tl.where(lower, place + apart, place)
        low, high = load_piece(w_ptr, kept, live & (upper | lower))
        low, high = _positive_zeros(low, SIGNED), _positive_zeros(high, SIGNED)
        store_piece(v_ptr, stored, low, high, live)
        bit = tl.where(lower & ((at & 1) == 0), 1, 0) << ((at >> 1) & 7)
        byte = tl.sum(tl.reshape(bit, (N // 16, 16)), 1)
        byte_at = tl.program_id(0) * (N // 16) + tl.arange(0, N // 16)
        tl.store(c_ptr + byte_at, byte.to(tl.uint8), mask=byte_at * 16 < total)
        _raise_flag(flag_ptr, status)


# N of M consecutive elements --------------------------------------------------------------------------


@dataclass(frozen=True)
class PackColumns:
    """A configuration: dense elements a program, M rounded up to a power of two."""

    elements: int = 2048
    warps: int = 4


def pack_columns(
    weight: Tensor,  # elements of 1, 2, 4 or 8 bytes
    mask: Tensor,  # bool of the same shape, True where kept
    *,
    keep: int,
    of: int,
    config: PackColumns | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # (scopes * keep,), uint8 stream, (1,) int32
    """Values, codes and flag of ``weight * mask``, for ``keep`` of every ``of`` consecutive elements.

    Filled up, and -0.0 made 0.0, as by :func:`pack`; codes are those of ``unpack.columns``.

    Raises:
        ValueError: sizes or devices that do not belong together, 8-bit floats, or scopes of over 32.
    """
    _check_mask(weight, mask)
    if weight.dtype not in ELEMENTS:
        raise ValueError(f"pack: elements are {weight.dtype}; it takes {ELEMENTS}")
    if not 1 <= keep < of <= LARGEST_SCOPE or weight.numel() % of:
        raise ValueError(f"pack: {keep} of {of} elements of {weight.numel()}")
    flag = torch.zeros(1, dtype=torch.int32, device=weight.device)
    scopes = weight.numel() // of
    bits = keep * index_width(keep, of) or of
    codes = torch.empty(-(-scopes * bits // 8), dtype=torch.uint8, device=weight.device)
    values = _columns(weight, mask.contiguous(), codes, flag, keep, of, False, config)
    return values, codes, flag


def gather_columns(
    dense: Tensor,  # elements of 1, 2, 4 or 8 bytes
    codes: Tensor,  # uint8 stream
    *,
    keep: int,
    of: int,
    config: PackColumns | None = None,
) -> Tensor:  # (scopes * keep,)
    """The elements of ``dense`` that ``codes`` record, ``keep`` of every ``of``, bit for bit.

    Raises:
        ValueError: sizes or devices that do not belong together, or scopes of over 32 elements.
    """
    if of < 1 or dense.numel() % of:
        raise ValueError(f"gather: {dense.numel()} elements are not a multiple of {of}")
    return _columns(dense, codes, codes, codes, keep, of, True, config)


def gather_blocks(
    dense: Tensor,
    slots: Tensor,  # (scopes, blocks) int32: which of the kept blocks each is, or -1
    shape: tuple[int, int, int],  # (scopes, keep, block_size)
    modes: Modes,
) -> Tensor:  # of ``shape``
    """The blocks of ``dense`` that ``slots`` name, bit for bit; arguments and errors as ``unpack.blocks``."""
    values = torch.empty(shape, dtype=dense.dtype, device=dense.device)
    launch_blocks(values, slots, dense.contiguous(), modes, gathers=True)
    return values


def _columns(
    dense: Tensor,
    mask: Tensor,
    codes: Tensor,
    flag: Tensor,
    keep: int,
    of: int,
    gathers: bool,
    config: PackColumns | None,
) -> Tensor:
    config = config or PackColumns()
    scopes = check_columns(dense.numel() // of, dense, codes, keep, of)
    flat = dense.detach().reshape(-1).view(INTS[dense.element_size()])
    values = torch.empty(scopes * keep, dtype=dense.dtype, device=dense.device)
    constants = code_constants(keep, of)
    step = max(8, config.elements // constants["WIDE"])  # whole bytes of codes a program
    with torch.cuda.device_of(dense):
        columns_kernel[(-(-scopes // step),)](
            flat, mask if gathers else mask.view(torch.uint8), values.view(flat.dtype), codes, flag,
            scopes, codes.numel(), KEEP=keep, OF=of, **constants, GATHERS=gathers,
            SIGNED=dense.dtype in _FLOATS, S=step, num_warps=config.warps,
        )  # fmt: skip
    return values


def code_constants(keep: int, of: int) -> dict[str, int]:
    """What :func:`columns_kernel` has to know of ``keep`` of ``of``, beside them."""
    width = index_width(keep, of)
    bits = keep * width or of
    together = 8 // math.gcd(bits, 8)
    powers = {"KEPT_WIDE": keep, "WIDE": of, "BYTES_WIDE": together * bits // 8}
    constants = {name: triton.next_power_of_2(n) for name, n in powers.items()}
    return {**constants, "WIDTH": width, "TOGETHER": together}


@triton.jit
def _kept_numbers(kept, k, WIDE: tl.constexpr):
    """The number of the k-th set bit, from 0, of words of WIDE bits, by halving."""
    at = tl.zeros_like(kept)
    k = k + tl.zeros(kept.shape, tl.int32)
    HALVINGS: tl.constexpr = 5 if WIDE == 32 else 4 if WIDE == 16 else 3 if WIDE == 8 else 2
    for i in tl.static_range(HALVINGS):
        half = 1 << (HALVINGS - 1 - i)
        below = popcount((kept >> at) & ((1 << half) - 1))
        beyond = k >= below
        at = tl.where(beyond, at + half, at)
        k = tl.where(beyond, k - below, k)
    return at.to(tl.int32)


@triton.jit(do_not_specialize=["scopes", "size"])
def columns_kernel(
    w_ptr,  # dense elements
    m_ptr,  # their mask, bytes
    v_ptr,  # values
    c_ptr,  # codes
    flag_ptr,
    scopes,
    size,  # bytes of codes
    KEEP: tl.constexpr,
    OF: tl.constexpr,
    KEPT_WIDE: tl.constexpr,  # KEEP and OF, rounded up to powers of two
    WIDE: tl.constexpr,
    WIDTH: tl.constexpr,  # bits of a number, or 0
    TOGETHER: tl.constexpr,  # scopes whose codes are whole bytes
    BYTES_WIDE: tl.constexpr,  # these bytes, rounded up to a power of two
    GATHERS: tl.constexpr,
    SIGNED: tl.constexpr,
    S: tl.constexpr,
):
    scope = tl.program_id(0) * S + tl.arange(0, S)
    live = scope < scopes
    BITS: tl.constexpr = KEEP * WIDTH if WIDTH else OF
    first = scope.to(tl.int64)[:, None]
    k = tl.arange(0, KEPT_WIDE)[None, :]
    here = live[:, None]
    if KEEP != KEPT_WIDE:
        here = here & (k < KEEP)
    if GATHERS:
        code = scope_bits(c_ptr, scope, live, size, BITS)
        if WIDTH:
            number = ((code[:, None] >> (k * WIDTH).to(tl.uint32)) & ((1 << WIDTH) - 1)).to(
                tl.int32
            )
        else:
            number = _kept_numbers(tl.broadcast_to(code[:, None], (S, KEPT_WIDE)), k, WIDE)
        number = tl.minimum(number, OF - 1)  # also where the codes are damaged
        value = tl.load(w_ptr + first * OF + number, mask=here, other=0)
        tl.store(v_ptr + first * KEEP + k, value, mask=here)
    else:
        j = tl.arange(0, WIDE)[None, :]
        inside = live[:, None]
        if OF != WIDE:
            inside = inside & (j < OF)
        mask = tl.load(m_ptr + first * OF + j, mask=inside, other=0).to(tl.uint32)
        mask = tl.sum(
            tl.where(mask != 0, tl.full((S, WIDE), 1, tl.uint32) << j.to(tl.uint32), 0), 1
        )
        mask = mask.to(tl.uint32)
        count = popcount(mask)
        kept = mask
        for i in tl.static_range(KEEP):  # the lowest zero bits, as many as are missing
            kept = tl.where(i < KEEP - count, kept | (kept + 1), kept)
        wide = tl.broadcast_to(kept[:, None], (S, KEPT_WIDE))
        number = _kept_numbers(wide, k, WIDE)
        given = ((mask[:, None] >> number.to(tl.uint32)) & 1) != 0
        value = tl.load(w_ptr + first * OF + number, mask=here & given, other=0)
        if SIGNED:
            value = tl.where((value << 1) == 0, 0, value)
        tl.store(v_ptr + first * KEEP + k, value, mask=here)
        code = kept
        if WIDTH:
            shifted = tl.where(k < KEEP, number << (k * WIDTH), 0)
            code = tl.sum(shifted, 1).to(tl.uint32)
        # Codes of TOGETHER scopes are whole bytes: each byte is the sum of what every scope has in it.
        code = tl.where(live, code, 0)
        code = tl.reshape(code, (S // TOGETHER, TOGETHER))[:, :, None]
        byte = tl.arange(0, BYTES_WIDE)[None, None, :]
        shift = tl.arange(0, TOGETHER)[None, :, None] * BITS - byte * 8
        left = code << tl.minimum(tl.maximum(shift, 0), 31).to(tl.uint32)
        right = code >> tl.minimum(tl.maximum(-shift, 0), 31).to(tl.uint32)
        bits = tl.where(shift < 0, tl.where(shift > -32, right, 0), tl.where(shift < 8, left, 0))
        stream = tl.sum(bits & 255, 1)
        BYTES: tl.constexpr = TOGETHER * BITS // 8
        group = tl.program_id(0).to(tl.int64) * (S // TOGETHER) + tl.arange(0, S // TOGETHER)
        byte = tl.arange(0, BYTES_WIDE)[None, :]
        at = group[:, None] * BYTES + byte
        tl.store(c_ptr + at, stream.to(tl.uint8), mask=(byte < BYTES) & (at < size))
        _raise_flag(flag_ptr, tl.where(live & (count > KEEP), count, 0))
