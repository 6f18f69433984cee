"""``linear`` of 1 to 128 rows by a packed weight: what it takes, which kernel runs, and its scratch memory."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import skinny, wide
from .skinny import Skinny
from .tiles import FORMS, Form, can_tile, code_bytes
from .wide import Wide

MOST_ROWS = 128  # of x; more are better served by a dense or sparse tensor-core library
_DTYPES = (torch.bfloat16, torch.float16)
# Codes as the kernels load them: (canonical, tiled).
_CODES = {
    "2:4": (torch.int16, torch.int32),
    "coupled2:4": (torch.int8, torch.int16),
    "pair4:8": (torch.int8, torch.int16),
    "rowpair16": (torch.int8, torch.int32),
}


def refusal(
    form: str, dtype: torch.dtype, rows: int, columns: int, device: torch.device
) -> str | None:
    """Why the kernels cannot take a (rows, columns) weight of this form, or None if they can.

    They take bfloat16 and float16, columns in multiples of 16, any number of rows that the form divides,
    and GPUs from sm_80 on. ``rows * columns`` is at most 2**33: offsets are 32-bit.
    """
    if form not in FORMS:
        return f"form {form!r} is not one of {', '.join(FORMS)}"
    if dtype not in _DTYPES:
        return f"values are {dtype}; the kernels take bfloat16 and float16"
    if columns % 16 or columns < 16 or rows < 1 or (form == "rowpair16" and rows % 16):
        return f"{rows} x {columns}: columns must be a multiple of 16, and rows too for rowpair16"
    if rows * columns > 2**33:
        return f"{rows} x {columns} is over 2**33 weights"
    if device.type != "cuda" or torch.version.hip is not None or _capability(device) < (8, 0):
        return f"{device} is not an NVIDIA GPU of compute capability 8.0 or above"
    return None


def linear(
    x: Tensor,  # (N, columns)
    values: Tensor,  # kept values, 16-bit, any shape
    codes: Tensor,  # (code_bytes,) uint8
    bias: Tensor | None,  # (rows,)
    *,
    form: Form,
    rows: int,
    columns: int,
    tiled: bool,
    overlap: bool = False,
    config: Skinny | Wide | None = None,
) -> Tensor:  # (N, rows)
    """``x @ W.t() + bias`` for the packed (rows, columns) weight W, summed in float32 in a fixed order.

    Args:
        x: 1 to 128 rows; strides are honoured, and a copy is made where a row does not start at a
            multiple of 16 bytes.
        values: packed values, canonical or in the order of ``tiles.tile_values``.
        codes: packed codes, in the same order as the values.
        bias: in the dtype of x, or None.
        form: the pattern.
        rows: rows of W.
        columns: columns of W.
        tiled: whether values and codes are in tile order, which reads 5 to 10 % faster.
        overlap: on sm_90 and later, start while the stream's previous kernel drains, and read the weight
            before that kernel is done. Allowed when no kernel still in flight writes ``values`` or
            ``codes``.
        config: how to cut the work; by default :func:`choose` decides.

    Raises:
        ValueError: sizes, dtypes or devices that do not belong together, or a :func:`refusal`.
    """
    reason = refusal(form, values.dtype, rows, columns, x.device)
    if reason is None and tiled and not can_tile(rows, columns):
        reason = f"{rows} x {columns} has no tile order"
    if reason is None and not (
        x.dtype == values.dtype and x.device == values.device == codes.device
    ):
        reason = f"x {x.dtype} on {x.device}, values {values.dtype} on {values.device}, codes on {codes.device}"
    if reason is None and (
        x.ndim != 2 or x.shape[1] != columns or not 1 <= x.shape[0] <= MOST_ROWS
    ):
        reason = f"x is {tuple(x.shape)}; it must be (1 to {MOST_ROWS}, {columns})"
    if reason is None and (
        values.numel() * 2 != rows * columns or codes.numel() != code_bytes(form, rows, columns)
    ):
        reason = f"{values.numel()} values and {codes.numel()} code bytes are not those of {form} on {rows} x {columns}"
    if (
        reason is None
        and bias is not None
        and (bias.shape != (rows,) or bias.dtype != x.dtype or bias.device != x.device)
    ):
        reason = (
            f"bias {tuple(bias.shape)} {bias.dtype} on {bias.device} for {rows} {x.dtype} outputs"
        )
    if reason is not None:
        raise ValueError(f"packed linear: {reason}")
    capability = _capability(x.device)
    if config is None:
        config = choose(x.shape[0], rows, columns, tiled, capability, _processors(x.device))
    if isinstance(config, Wide) and not (tiled and capability == (9, 0)):
        raise ValueError(
            "packed linear: the wide kernel takes tile order, on compute capability 9.0"
        )
    overlap = overlap and capability >= (9, 0)
    words = _aligned(values.reshape(-1), 16).view(torch.int32)
    codes = _aligned(codes.reshape(-1), 16 if tiled else 2).view(_CODES[form][tiled])
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    bias = None if bias is None else bias.contiguous()
    n = x.shape[0]
    y = torch.empty(n, rows, dtype=x.dtype, device=x.device)
    sums = cells = y
    if config.split > 1:
        tiles = -(-rows // config.rows) * -(-n // config.batch)
        sums = torch.empty(
            tiles * config.split * config.rows * config.batch, dtype=torch.float32, device=x.device
        )
        cells = _cells(x.device, tiles)
    number = FORMS.index(form)
    with torch.cuda.device(x.device):
        if isinstance(config, Wide):
            wide.launch(config, x, words, codes, bias, y, sums, cells, number, overlap)
        else:
            x_words = x.view(torch.int32)
            skinny.launch(
                config, x_words, words, codes, bias, y, sums, cells, number, tiled, overlap
            )
    return y


def choose(
    n: int, rows: int, columns: int, tiled: bool, capability: tuple[int, int], processors: int
) -> Skinny | Wide:
    """The configuration measured to be fast for ``n`` rows of x: see ``bench/kernels.py``."""
    if n > 16 and tiled and capability == (9, 0):
        return _choose_wide(n, rows, columns, processors)
    batch = 8 if n <= 8 else 16
    tiles = -(-rows // 16)
    # As many warps a program as still let all programs run at once.
    warps = 8 if tiles <= 2 * processors else 4
    return Skinny(1, warps, 1, 2, batch)


def _choose_wide(n: int, rows: int, columns: int, processors: int) -> Wide:
    batch = 32 if n <= 32 else 64
    warps = 4 if batch == 32 else 8
    programs = -(-rows // (16 * warps)) * -(-n // batch)
    split = 1
    while split < 4 and programs * split * 2 <= 2 * processors and columns >= 1024 * split:
        split *= 2
    return Wide(warps, 2, batch, split)


@functools.lru_cache(maxsize=64)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _aligned(t: Tensor, alignment: int) -> Tensor:
    return t if t.data_ptr() % alignment == 0 else t.clone()


# Counters must be zero modulo 16 before a launch and are so again after it. Launches that may run at the
# same time must not share them: each stream has its own, and each launch in a CUDA graph, for one graph
# may be replayed on a stream while another one runs there.
_CELLS = 4096
_ARENA = 2**20
_by_stream: dict[tuple[int, int], Tensor] = {}
_arena: dict[int, tuple[Tensor, int]] = {}


def _cells(device: torch.device, count: int) -> Tensor:
    index = torch.cuda.current_device() if device.index is None else device.index
    if torch.cuda.is_current_stream_capturing():
        arena, used = _arena.get(index, (None, 0))
        if arena is None or used + count > arena.numel():
            return torch.zeros(count, dtype=torch.int32, device=device)  # zeroed in the graph
        _arena[index] = arena, used + count
        return arena[used : used + count]
    if index not in _arena:
        _arena[index] = torch.zeros(_ARENA, dtype=torch.int32, device=device), 0
        torch.cuda.synchronize(device)
    key = index, torch.cuda.current_stream(device).cuda_stream
    cells = _by_stream.get(key)
    if cells is None or cells.numel() < count:
        cells = torch.zeros(max(count, _CELLS), dtype=torch.int32, device=device)
        _by_stream[key] = cells
    return cells
