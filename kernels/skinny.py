"""``x @ W.t()`` for few rows of x and a packed W, on tensor cores of any GPU from sm_80 on.

W is operand A of ``mma.m16n8k16``. A warp owns TILES x 16 rows and every WK-th stretch of UNITS x 64
columns; WK warps of a program split the columns, and their sums meet in shared memory at the end. Values
go from memory to registers in 16-byte loads, the next stretch while the last is computed, are expanded
there (``expand``) and multiplied, without shared memory. x is read through L1, for each stretch.
Columns are renumbered within each 64 so that a lane's 16 columns, neighbours in memory, are what the
instruction expects; x is renumbered by the same rule when its registers are named, at no cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.runtime.jit import constexpr_function

from .expand import (
    PLAIN,
    ROWPAIR,
    code_layout,
    dense_rows,
    halves,
    launch_dependents,
    log2,
    store_sums,
    wait_for_previous,
    word_layout,
)
from .launch import start
from .widen import dense_rows_of_bytes

_ROWPAIR = gl.constexpr(ROWPAIR)
_PLAIN = gl.constexpr(PLAIN)


@dataclass(frozen=True)
class Skinny:
    """A configuration: how a program's work is cut."""

    warps_m: int  # warps over rows
    warps_k: int  # warps over columns
    tiles: int  # 16-row tiles a warp
    units: int  # 64-column units a warp and step
    batch: int  # rows of x a program: 8, 16 or 32
    split: int = 1  # programs over columns
    ahead: bool = False  # load x a step ahead too
    by_float32: bool = False  # widen int8 values of 2:4 to bfloat16 through float32 (see ``widen``)

    @property
    def rows(self) -> int:
        """Rows of W a program."""
        return 16 * self.warps_m * self.tiles

    @property
    def columns(self) -> int:
        """Columns of W a program and step."""
        return 64 * self.warps_k * self.units


@constexpr_function
def _x_layout(WM: int, WK: int, UNITS: int, BN: int) -> Any:
    """(BN, 32-bit words of WK * UNITS * 64 columns): 16 columns a lane, the same for all row warps."""
    words = UNITS * 32
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4]]
        + [[0, 32 << i] for i in range(log2(UNITS))]
        + [[8 << i, 0] for i in range(log2(BN) - 3)],
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        [[0, 0] for _ in range(log2(WM))] + [[0, words << i] for i in range(log2(WK))],
        [],
        [BN, WK * words],
    )


@gluon.jit
def _load_words(pointers, live, EVEN: gl.constexpr):
    if EVEN:
        return gl.load(pointers, mask=live)
    else:
        return gl.load(pointers, mask=live, other=0)


@gluon.jit
def _expand_codes(
    c,
    shift,
    FORM: gl.constexpr,
    TILED: gl.constexpr,
    ITEMS: gl.constexpr,
    UNITS: gl.constexpr,
):
    """Codes as loaded to what ``dense_rows`` takes."""
    T: gl.constexpr = c.shape[1]
    c = c.to(gl.int32)
    if FORM == _ROWPAIR:
        return ((c >> shift) << 31) >> 31
    else:
        c = (c ^ (c >> 1)) & 0x77777777
        if TILED:  # both half rows' codes in one word
            other = c >> 16 if FORM == _PLAIN else c
            c = gl.join(c, other).reshape([ITEMS // (2 * UNITS), UNITS, T, 2]).permute(0, 3, 1, 2)
            c = c.reshape([ITEMS, T])
        return c


@gluon.jit
def _rows(
    x_ptr,  # (N, K) as 32-bit words, rows sx8 * 16 bytes apart
    v_ptr,  # values, 32-bit words: two 16-bit floats each, or four int8 in tile order
    c_ptr,  # codes: a lane's of half a row, 16-bit for 2:4 and 8-bit for other groups, or of both in
    #         tile order; of rowpair16 bytes, or 32-bit words in tile order
    b_ptr,  # (M,)
    y_ptr,  # (N, M)
    ws_ptr,  # (tiles, SPLIT, rows, BN) float32
    cnt_ptr,  # (tiles,) int32
    s_ptr,  # (M,) float32, scales of int8 values
    M,
    N,
    chunks,  # K / 16
    sx8,
    all_steps,  # of all splits
    pm,  # which rows of W
    row_blocks,
    ps,  # which columns
    FORM: gl.constexpr,
    TILED: gl.constexpr,
    EVEN: gl.constexpr,
    BIAS: gl.constexpr,
    OVERLAP: gl.constexpr,
    WM: gl.constexpr,
    WK: gl.constexpr,
    TILES: gl.constexpr,
    UNITS: gl.constexpr,
    BN: gl.constexpr,
    SPLIT: gl.constexpr,
    AHEAD: gl.constexpr,
    INT8: gl.constexpr,
    BY_FLOAT32: gl.constexpr,
):
    """One program's rows of W times its rows of x."""
    DTYPE: gl.constexpr = y_ptr.dtype.element_ty
    gl.static_assert(TILED or not INT8, "int8 values are in tile order")
    T: gl.constexpr = WM * WK * 32
    R: gl.constexpr = WM * TILES * 16
    STEP: gl.constexpr = WK * UNITS  # units a step
    ITEMS: gl.constexpr = TILES * 2 * UNITS
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[WK, WM, 1], instr_shape=[1, 16, 8]
    )
    LA: gl.constexpr = gl.DotOperandLayout(0, mma, 8)
    LB: gl.constexpr = gl.DotOperandLayout(1, mma, 8)
    PIECES: gl.constexpr = TILES * UNITS if INT8 else ITEMS  # 16-byte pieces of values of a lane
    LV: gl.constexpr = word_layout(PIECES, T)
    LX: gl.constexpr = _x_layout(WM, WK, UNITS, BN)
    pn = gl.program_id(1)
    step0 = all_steps * ps // SPLIT
    steps = all_steps * (ps + 1) // SPLIT - step0
    unit0 = step0 * STEP
    units = chunks // 4

    # Values: item i is a 16-byte piece of a lane.
    i = gl.arange(0, PIECES, layout=gl.SliceLayout(1, gl.SliceLayout(2, LV)))[:, None]
    t = gl.arange(0, T, layout=gl.SliceLayout(0, gl.SliceLayout(2, LV)))[None, :]
    word = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, LV)))[None, :][:, None, :]
    if INT8:
        u = i % UNITS
        half = 0
    elif FORM == _ROWPAIR:
        u = (i // 2) % UNITS
        half = i % 2
    else:
        u = i % UNITS
        half = (i // UNITS) % 2
    if INT8:
        tile = pm * (R // 16) + i // UNITS * WM + t // 32 % WM
    else:
        tile = pm * (R // 16) + i // (2 * UNITS) * WM + t // 32 % WM
    u = unit0 + t // (32 * WM) * UNITS + u
    lane_row = t // 4 % 8
    if INT8:
        offset = (tile * units + u) * 128 + t % 32 * 4
        V_STEP: gl.constexpr = STEP * 128
    elif TILED:
        offset = (tile * units + u) * 256 + (half * 128 + t % 32 * 4)
        V_STEP: gl.constexpr = STEP * 256
    elif FORM == _ROWPAIR:
        offset = ((tile * 8 + lane_row) * chunks + u * 4 + t % 4) * 8 + half * 4
        V_STEP: gl.constexpr = STEP * 32
    else:
        offset = ((tile * 16 + half * 8 + lane_row) * chunks + u * 4 + t % 4) * 4
        V_STEP: gl.constexpr = STEP * 16
    vp = v_ptr + (offset[:, :, None] + word)
    v_chunk = u * 4 + t % 4
    v_in = tile * 16 < M if TILED or FORM == _ROWPAIR else tile * 16 + half * 8 + lane_row < M

    # Codes: an item for each word of them.
    C: gl.constexpr = TILES * UNITS if TILED or FORM == _ROWPAIR else ITEMS
    LC: gl.constexpr = code_layout(C, T)
    ci = gl.arange(0, C, layout=gl.SliceLayout(1, LC))[:, None]
    ct = gl.arange(0, T, layout=gl.SliceLayout(0, LC))[None, :]
    if TILED or FORM == _ROWPAIR:
        c_tile = pm * (R // 16) + ci // UNITS * WM + ct // 32 % WM
    else:
        c_tile = pm * (R // 16) + ci // (2 * UNITS) * WM + ct // 32 % WM
    cu = unit0 + ct // (32 * WM) * UNITS + ci % UNITS
    c_chunk = cu * 4 + ct % 4
    if TILED or FORM == _ROWPAIR:
        c_in = c_tile * 16 < M
    else:
        c_in = c_tile * 16 + ci // UNITS % 2 * 8 + ct // 4 % 8 < M
    shift = ct % 32
    if TILED:
        if FORM == _ROWPAIR:
            cp = c_ptr + (c_tile * units + cu)
            C_STEP: gl.constexpr = STEP
        else:
            cp = c_ptr + ((c_tile * units + cu) * 32 + ct % 32)
            C_STEP: gl.constexpr = STEP * 32
    else:
        C_STEP: gl.constexpr = STEP // 2 if FORM == _ROWPAIR else STEP * 4
        if FORM == _ROWPAIR:  # a bit stream: the row's bits start anywhere in a byte
            bit = (c_tile * 8 + ct // 4 % 8) * chunks + c_chunk
            shift = bit % 8
            cp = c_ptr + bit // 8
        else:
            row = c_tile * 16 + ci // UNITS % 2 * 8 + ct // 4 % 8
            cp = c_ptr + (row * chunks + c_chunk)

    n = pn * BN + gl.arange(0, BN, layout=gl.SliceLayout(1, LX))
    x_word = gl.arange(0, STEP * 32, layout=gl.SliceLayout(0, LX))
    xp = x_ptr + (n[:, None] * sx8 * 4 + x_word[None, :] + unit0 * 32)
    x_in = (n < N)[:, None]
    x_end = chunks * 8 - unit0 * 32

    if EVEN:
        live = True
        c_live = True
    else:
        live = v_in & (v_chunk < chunks)
        c_live = c_in & (c_chunk < chunks)
    c = _load_words(cp, c_live, EVEN)
    v = gl.load(vp) if EVEN else gl.load(vp, mask=live[:, :, None], other=0)
    if INT8:
        LS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(0, mma))
        s_row = pm * R + gl.arange(0, R, layout=LS)
        scale = gl.load(s_ptr + s_row, mask=s_row < M, other=0.0)
    if OVERLAP:  # the weight does not depend on earlier kernels, x does
        launch_dependents()
        wait_for_previous()
    if AHEAD:
        next_x = _load_words(xp, x_in if EVEN else x_in & (x_word < x_end)[None, :], EVEN)
    acc = gl.zeros((WK, R, BN), gl.float32, layout=mma)
    for k in range(steps):
        more = k + 1 < steps
        if AHEAD:
            x = next_x
            xp += STEP * 32
            x_end -= STEP * 32
            x_more = x_in & more
        else:
            x_more = x_in
        x_new = _load_words(xp, x_more if EVEN else x_more & (x_word < x_end)[None, :], EVEN)
        if AHEAD:
            next_x = x_new
        else:
            x = x_new
            xp += STEP * 32
            x_end -= STEP * 32
        vp += V_STEP
        cp += C_STEP
        if EVEN:
            next_c = gl.load(cp, mask=more)
            next_v = gl.load(vp, mask=more)
        else:
            v_chunk += STEP * 4
            c_chunk += STEP * 4
            next_c = gl.load(cp, mask=c_in & (c_chunk < chunks) & more, other=0)
            next_v = gl.load(vp, mask=(v_in & (v_chunk < chunks) & more)[:, :, None], other=0)
        codes = _expand_codes(c, shift, FORM, TILED, ITEMS, UNITS)
        if INT8:
            w = dense_rows_of_bytes(v, codes, FORM, TILES, UNITS, DTYPE, BY_FLOAT32)
        else:
            w = dense_rows(v, codes, FORM, TILES, UNITS, TILED)
        w = w.reshape([TILES, 2, UNITS, WK, WM, 8, 4, 2, 8])
        w = w.permute(3, 0, 4, 1, 5, 2, 7, 6, 8).reshape([WK, R, UNITS * 64])
        a = gl.convert_layout(w.to(DTYPE, bitcast=True), LA, assert_trivial=True)
        b = halves(x).reshape([BN, WK, UNITS, 4, 2, 8]).permute(1, 2, 4, 3, 5, 0)
        b = b.reshape([WK, UNITS * 64, BN]).to(DTYPE, bitcast=True)
        acc = mma_v2(a, gl.convert_layout(b, LB, assert_trivial=True), acc)
        v = next_v
        c = next_c
    sums = gl.sum(acc, 0) if WK > 1 or INT8 else acc.reshape([R, BN])
    if INT8:
        sums *= scale[:, None]
    store_sums(sums, b_ptr, y_ptr, ws_ptr, cnt_ptr, pm, pn, row_blocks, ps, M, N, T, SPLIT, BIAS)


@gluon.jit(
    do_not_specialize=["N", "chunks", "sx8", "all_steps"],
    do_not_specialize_on_alignment=["c_ptr", "b_ptr", "cnt_ptr"],
)
def skinny_kernel(
    x_ptr, v_ptr, c_ptr, b_ptr, y_ptr, ws_ptr, cnt_ptr, M, N, chunks, sx8, all_steps,
    FORM: gl.constexpr, TILED: gl.constexpr, EVEN: gl.constexpr, BIAS: gl.constexpr,
    OVERLAP: gl.constexpr, WM: gl.constexpr, WK: gl.constexpr, TILES: gl.constexpr,
    UNITS: gl.constexpr, BN: gl.constexpr, SPLIT: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    _rows(
        x_ptr, v_ptr, c_ptr, b_ptr, y_ptr, ws_ptr, cnt_ptr, y_ptr, M, N, chunks, sx8, all_steps,
        gl.program_id(0) // SPLIT, gl.num_programs(0) // SPLIT, gl.program_id(0) % SPLIT,
        FORM, TILED, EVEN, BIAS, OVERLAP, WM, WK, TILES, UNITS, BN, SPLIT, AHEAD, False, False,
    )  # fmt: skip


@gluon.jit(
    do_not_specialize=["N", "chunks", "sx8", "all_steps"],
    do_not_specialize_on_alignment=["c_ptr", "b_ptr", "cnt_ptr", "s_ptr"],
)
def int8_kernel(
    x_ptr, v_ptr, c_ptr, b_ptr, y_ptr, ws_ptr, cnt_ptr, s_ptr, M, N, chunks, sx8, all_steps,
    FORM: gl.constexpr, EVEN: gl.constexpr, BIAS: gl.constexpr, OVERLAP: gl.constexpr,
    WM: gl.constexpr, WK: gl.constexpr, TILES: gl.constexpr, UNITS: gl.constexpr, BN: gl.constexpr,
    SPLIT: gl.constexpr, AHEAD: gl.constexpr, BY_FLOAT32: gl.constexpr,
):  # fmt: skip
    """Values of eight bits, in tile order, with a scale for each row."""
    _rows(
        x_ptr, v_ptr, c_ptr, b_ptr, y_ptr, ws_ptr, cnt_ptr, s_ptr, M, N, chunks, sx8, all_steps,
        gl.program_id(0) // SPLIT, gl.num_programs(0) // SPLIT, gl.program_id(0) % SPLIT,
        FORM, True, EVEN, BIAS, OVERLAP, WM, WK, TILES, UNITS, BN, SPLIT, AHEAD, True, BY_FLOAT32,
    )  # fmt: skip


@gluon.jit(
    do_not_specialize=["N", "chunks", "sx8", "all_steps", "first_blocks", "second_blocks"],
    do_not_specialize_on_alignment=["c_ptr", "c2_ptr", "c3_ptr"],
)
def group_kernel(
    x_ptr,  # of all weights
    v_ptr, c_ptr, y_ptr, M,  # as in _rows, of the first weight
    v2_ptr, c2_ptr, y2_ptr, M2,
    v3_ptr, c3_ptr, y3_ptr, M3,  # of two weights the second's once more
    N, chunks, sx8, all_steps,
    first_blocks,  # programs of the first weight
    second_blocks,
    FORM: gl.constexpr, EVEN: gl.constexpr, OVERLAP: gl.constexpr, WM: gl.constexpr,
    WK: gl.constexpr, TILES: gl.constexpr, UNITS: gl.constexpr, BN: gl.constexpr,
    AHEAD: gl.constexpr,
):  # fmt: skip
    """Weights in tile order that are multiplied by the same x, without a bias."""
    pm = gl.program_id(0)
    is_second = pm >= first_blocks
    is_third = pm >= first_blocks + second_blocks
    pm -= gl.where(is_third, first_blocks + second_blocks, gl.where(is_second, first_blocks, 0))
    v_ptr = gl.where(is_third, v3_ptr, gl.where(is_second, v2_ptr, v_ptr))
    c_ptr = gl.where(is_third, c3_ptr, gl.where(is_second, c2_ptr, c_ptr))
    y_ptr = gl.where(is_third, y3_ptr, gl.where(is_second, y2_ptr, y_ptr))
    M = gl.where(is_third, M3, gl.where(is_second, M2, M))
    _rows(
        x_ptr, v_ptr, c_ptr, y_ptr, y_ptr, y_ptr, y_ptr, y_ptr, M, N, chunks, sx8, all_steps, pm, 1, 0,
        FORM, True, EVEN, False, OVERLAP, WM, WK, TILES, UNITS, BN, 1, AHEAD, False, False,
    )  # fmt: skip


def launch(
    config: Skinny,
    x: Tensor,  # (N, K) as int32 words
    values: Tensor,  # as int32 words
    codes: Tensor,  # as words of the kernel's width
    bias: Tensor | None,
    y: Tensor,  # (N, M), contiguous
    sums: Tensor,  # float32 scratch
    cells: Tensor,  # int32 counters
    form: int,
    tiled: bool,
    overlap: bool,
    warmup: bool = False,
    scales: Tensor | None = None,  # (M,) float32: values are int8 in tile order
) -> object:
    """Launch, or with ``warmup`` compile only."""
    n, m = y.shape
    columns = x.shape[1] * 2
    blocks = -(-m // config.rows)
    steps = -(-columns // config.columns)
    grid = (blocks * config.split, -(-n // config.batch))
    arguments = (
        x, values, codes, y if bias is None else bias, y, sums, cells,
        m, n, columns // 16, x.stride(0) // 4, steps,
    )  # fmt: skip
    constants = {
        **_constants(config, form, m % config.rows == 0 and columns == steps * config.columns),
        "BIAS": bias is not None,
        "SPLIT": config.split,
        **_launching(config, overlap),
    }
    kernel = skinny_kernel
    if scales is None:
        constants["TILED"] = tiled
    else:
        kernel = int8_kernel
        constants["BY_FLOAT32"] = config.by_float32
        arguments = (*arguments[:7], scales, *arguments[7:])
    if warmup:
        return kernel.warmup(*arguments, grid=grid, **constants)
    return start(kernel, grid, arguments, constants)


def launch_group(
    config: Skinny,  # of one split
    x: Tensor,  # (N, K) as int32 words
    parts: list[tuple[Tensor, Tensor, Tensor]],  # of two or three weights: values, codes, y (N, M)
    form: int,
    overlap: bool,
    warmup: bool = False,
) -> object:
    """Launch products of one x by weights in tile order as one, or with ``warmup`` compile only."""
    n, columns = x.shape[0], x.shape[1] * 2
    blocks = [-(-y.shape[1] // config.rows) for _, _, y in parts]
    steps = -(-columns // config.columns)
    even = all(y.shape[1] % config.rows == 0 for _, _, y in parts)
    three = [*parts, parts[-1]][:3]
    arguments = [x]
    for values, codes, y in three:
        arguments += [values, codes, y, y.shape[1]]
    arguments += [n, columns // 16, x.stride(0) // 4, steps, *blocks[:2]]
    constants = {
        **_constants(config, form, even and columns == steps * config.columns),
        **_launching(config, overlap),
    }
    grid = (sum(blocks), -(-n // config.batch))
    if warmup:
        return group_kernel.warmup(*arguments, grid=grid, **constants)
    return start(group_kernel, grid, arguments, constants)


def _constants(config: Skinny, form: int, even: bool) -> dict[str, Any]:
    return {
        "FORM": form,
        "EVEN": even,
        "WM": config.warps_m,
        "WK": config.warps_k,
        "TILES": config.tiles,
        "UNITS": config.units,
        "BN": config.batch,
        "AHEAD": config.ahead,
    }


def _launching(config: Skinny, overlap: bool) -> dict[str, Any]:
    return {
        "OVERLAP": overlap,
        "num_warps": config.warps_m * config.warps_k,
        "launch_pdl": overlap,
    }
