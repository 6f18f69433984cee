"""``x @ W.t()`` for 17 rows of x and more and a packed W in tile order, on Hopper's warpgroup MMA (sm_90).

W is operand A, 64 rows a warpgroup, expanded in registers; x is operand B and is read from shared memory
by the tensor cores alone: with ``mma.sync`` every warp would load all of x into its registers, which
bounds from 32 rows on. Values, codes and x come through shared memory in STAGES buffers, and the product
of a step runs while the next one's values are expanded.

The instruction takes columns 2 q, 2 q + 1, 2 q + 8 and 2 q + 9 of 16 from lane q, and a lane has whole
groups of four neighbouring columns: so x is copied in pairs of columns to the places that match.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.runtime.jit import constexpr_function

from .expand import (
    PLAIN,
    ROWPAIR,
    barrier,
    dense_rows,
    launch_dependents,
    log2,
    store_sums,
    wait_for_previous,
    word_layout,
)
from .launch import start

# By the name of Triton 3.9 or of earlier releases.
copy_to_shared = getattr(async_copy, "async_load", async_copy.async_copy_global_to_shared)

_PLAIN = gl.constexpr(PLAIN)
_ROWPAIR = gl.constexpr(ROWPAIR)


@dataclass(frozen=True)
class Wide:
    """A configuration: how a program's work is cut."""

    warps: int  # over rows, a multiple of 4
    units: int  # 64-column units a step
    batch: int  # rows of x a program
    split: int = 1  # programs over columns
    stages: int = 4  # buffers of a step's values, codes and x

    @property
    def rows(self) -> int:
        """Rows of W a program."""
        return 16 * self.warps

    @property
    def columns(self) -> int:
        """Columns of W a program and step."""
        return 64 * self.units


@gluon.jit
def _copy(smem, step, pointers, mask, STAGES: gl.constexpr, STRIDE: gl.constexpr):
    copy_to_shared(smem.index(step % STAGES), pointers + step * STRIDE, mask=mask)


@constexpr_function
def _lane_layout(warps: int, units: int) -> Any:
    """(warps, units, 32 lanes), all units in one thread."""
    return gl.DistributedLinearLayout(
        [[0, 1 << i, 0] for i in range(log2(units))],
        [[0, 0, 1 << i] for i in range(5)],
        [[1 << i, 0, 0] for i in range(log2(warps))],
        [],
        [warps, units, 32],
    )


@constexpr_function
def _row_layout(warps: int, units: int) -> Any:
    """(warps, units * 32 lanes), all units in one thread."""
    return gl.DistributedLinearLayout(
        [[0, 32 << i] for i in range(log2(units))],
        [[0, 1 << i] for i in range(5)],
        [[1 << i, 0] for i in range(log2(warps))],
        [],
        [warps, units * 32],
    )


@gluon.jit
def _lane_codes(smem, FORM: gl.constexpr, WM: gl.constexpr, UNITS: gl.constexpr):
    """Codes as ``dense_rows`` takes them."""
    L: gl.constexpr = _lane_layout(WM, UNITS)
    if FORM == _ROWPAIR:
        c = smem.load(gl.SliceLayout(2, L))[:, :, None]
        lane = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, :][:, None, :]
        return (((c >> lane) << 31) >> 31).permute(1, 0, 2).reshape([UNITS, WM * 32])
    else:
        c = smem.load(_row_layout(WM, UNITS)).to(gl.int32).reshape([WM, UNITS, 32])
        c = (c ^ (c >> 1)) & 0x77777777
        other = c >> 16 if FORM == _PLAIN else c
        return gl.join(c, other).permute(3, 1, 0, 2).reshape([2 * UNITS, WM * 32])


@gluon.jit(
    do_not_specialize=["N", "units", "sx8", "all_steps"],
    do_not_specialize_on_alignment=["b_ptr", "cnt_ptr"],
)
def wide_kernel(
    x_ptr,  # (N, K), rows sx8 * 8 elements apart
    v_ptr,  # values in tile order, 32-bit words
    c_ptr,  # codes in tile order: 32 words a tile, 32-bit for 2:4 and 16-bit for other groups; of
    #         rowpair16 one 32-bit word
    b_ptr,  # (M,)
    y_ptr,  # (N, M)
    ws_ptr,  # (tiles, SPLIT, rows, BN) float32
    cnt_ptr,  # (tiles,) int32
    M,
    N,
    units,  # K / 64
    sx8,
    all_steps,  # of all splits
    FORM: gl.constexpr,
    EVEN: gl.constexpr,
    BIAS: gl.constexpr,
    OVERLAP: gl.constexpr,
    WM: gl.constexpr,
    UNITS: gl.constexpr,
    BN: gl.constexpr,
    SPLIT: gl.constexpr,
    STAGES: gl.constexpr,
):
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    T: gl.constexpr = WM * 32
    R: gl.constexpr = WM * 16
    COLUMNS: gl.constexpr = UNITS * 64
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WM, 1], instr_shape=[16, BN, 16]
    )
    LA: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    LV: gl.constexpr = word_layout(2 * UNITS, T)
    ps = gl.program_id(0) % SPLIT
    pm = gl.program_id(0) // SPLIT
    pn = gl.program_id(1)
    step0 = all_steps * ps // SPLIT
    steps = all_steps * (ps + 1) // SPLIT - step0
    unit0 = step0 * UNITS
    tile0 = pm * WM

    # Values: each thread copies what it will read.
    i = gl.arange(0, 2 * UNITS, layout=gl.SliceLayout(1, gl.SliceLayout(2, LV)))[:, None]
    t = gl.arange(0, T, layout=gl.SliceLayout(0, gl.SliceLayout(2, LV)))[None, :]
    word = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, LV)))[None, :][:, None, :]
    if FORM == _ROWPAIR:
        u = i // 2
        half = i % 2
    else:
        u = i % UNITS
        half = i // UNITS
    tile = tile0 + t // 32
    vp = v_ptr + (((tile * units + unit0 + u) * 256 + half * 128 + t % 32 * 4)[:, :, None] + word)
    v_in = tile * 16 < M
    v_unit = unit0 + u

    # Codes: all of a warp's, in a row.
    CODES: gl.constexpr = 1 if FORM == _ROWPAIR else 32  # elements of a unit
    PIECE: gl.constexpr = 4 // (c_ptr.dtype.element_ty.primitive_bitwidth // 8)  # of four bytes
    LC: gl.constexpr = gl.BlockedLayout([1, PIECE], [1, 32], [WM, 1], [1, 0])
    c_warp = gl.arange(0, WM, layout=gl.SliceLayout(1, LC))[:, None]
    e = gl.arange(0, UNITS * CODES, layout=gl.SliceLayout(0, LC))[None, :]
    cp = c_ptr + (((tile0 + c_warp) * units + unit0) * CODES + e)
    c_in = (tile0 + c_warp) * 16 < M
    c_unit = unit0 + e // CODES

    # x: slot (unit, group, half of the group, q, e) of a stage holds the column that lane q has there.
    LX: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [WM, 1], [1, 0])
    n = pn * BN + gl.arange(0, BN, layout=gl.SliceLayout(1, LX))
    s = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LX))
    column = s // 64 * 64 + s // 2 % 4 * 16 + s // 16 % 4 * 4 + s // 8 % 2 * 2 + s % 2
    xp = x_ptr + (n[:, None] * (sx8 * 8) + column[None, :] + unit0 * 64)
    x_in = (n < N)[:, None]
    x_unit = unit0 + s // 64

    v_smem = gl.allocate_shared_memory(
        gl.int32, [STAGES, 2 * UNITS, T, 4], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    )
    c_smem = gl.allocate_shared_memory(
        c_ptr.dtype.element_ty,
        [STAGES, WM, UNITS * CODES],
        gl.SwizzledSharedLayout(1, 1, 1, [1, 0]),
    )
    x_smem = gl.allocate_shared_memory(
        DTYPE, [STAGES, BN, COLUMNS], gl.NVMMASharedLayout(128, 16, 2)
    )
    for first in gl.static_range(STAGES - 2):
        if EVEN:
            v_live = first < steps
            c_live = first < steps
        else:
            v_live = (v_in & (v_unit + first * UNITS < units) & (first < steps))[:, :, None]
            c_live = c_in & (c_unit + first * UNITS < units) & (first < steps)
        _copy(v_smem, first, vp, v_live, STAGES, UNITS * 256)
        _copy(c_smem, first, cp, c_live, STAGES, UNITS * CODES)
    if OVERLAP:  # the weight does not depend on earlier kernels, x does
        launch_dependents()
        wait_for_previous()
    for first in gl.static_range(STAGES - 2):
        x_live = x_in & (first < steps)
        if not EVEN:
            x_live = x_live & (x_unit + first * UNITS < units)[None, :]
        _copy(x_smem, first, xp, x_live, STAGES, COLUMNS)
        async_copy.commit_group()
    acc = warpgroup_mma_init(gl.zeros((R, BN), gl.float32, layout=mma))
    for k in range(steps):
        async_copy.wait_group(STAGES - 3)
        fence_async_shared()
        barrier()
        # Into the buffers of step k - 2, whose product was waited for before the barrier.
        j = k + (STAGES - 2)
        if EVEN:
            v_live = j < steps
            c_live = j < steps
        else:
            v_live = (v_in & (v_unit + j * UNITS < units) & (j < steps))[:, :, None]
            c_live = c_in & (c_unit + j * UNITS < units) & (j < steps)
        x_live = x_in & (j < steps)
        if not EVEN:
            x_live = x_live & (x_unit + j * UNITS < units)[None, :]
        _copy(v_smem, j, vp, v_live, STAGES, UNITS * 256)
        _copy(c_smem, j, cp, c_live, STAGES, UNITS * CODES)
        _copy(x_smem, j, xp, x_live, STAGES, COLUMNS)
        async_copy.commit_group()
        v = v_smem.index(k % STAGES).load(LV)
        c = _lane_codes(c_smem.index(k % STAGES), FORM, WM, UNITS)
        w = dense_rows(v, c, FORM, 1, UNITS, True)
        w = w.reshape([2, UNITS, WM, 8, 4, 4, 2, 2]).permute(2, 0, 3, 1, 5, 6, 4, 7)
        w = w.reshape([R, COLUMNS]).to(DTYPE, bitcast=True)
        w = gl.convert_layout(w, LA, assert_trivial=True)
        done = warpgroup_mma_wait(0, deps=[acc])
        acc = warpgroup_mma(w, x_smem.index(k % STAGES).permute((1, 0)), done, is_async=True)
    sums = warpgroup_mma_wait(0, deps=[acc])
    async_copy.wait_group(0)
    row_blocks = gl.num_programs(0) // SPLIT
    store_sums(sums, b_ptr, y_ptr, ws_ptr, cnt_ptr, pm, pn, row_blocks, ps, M, N, T, SPLIT, BIAS)


def launch(
    config: Wide,
    x: Tensor,  # (N, K)
    values: Tensor,  # as int32 words, in tile order
    codes: Tensor,  # as words of the kernel's width, in tile order
    bias: Tensor | None,
    y: Tensor,  # (N, M), contiguous
    sums: Tensor,  # float32 scratch
    cells: Tensor,  # int32 counters
    form: int,
    overlap: bool,
    warmup: bool = False,
) -> object:
    """Launch, or with ``warmup`` compile only."""
    n, m = y.shape
    columns = x.shape[1]
    steps = -(-columns // config.columns)
    grid = (-(-m // config.rows) * config.split, -(-n // config.batch))
    arguments = (
        x, values, codes, y if bias is None else bias, y, sums, cells,
        m, n, columns // 64, x.stride(0) // 8, steps,
    )  # fmt: skip
    constants = {
        "FORM": form,
        "EVEN": m % config.rows == 0 and columns == steps * config.columns,
        "BIAS": bias is not None,
        "OVERLAP": overlap,
        "WM": config.warps,
        "UNITS": config.units,
        "BN": config.batch,
        "SPLIT": config.split,
        "STAGES": config.stages,
        "num_warps": config.warps,
        "launch_pdl": overlap,
    }
    if warmup:
        return wide_kernel.warmup(*arguments, grid=grid, **constants)
    return start(wide_kernel, grid, arguments, constants)
