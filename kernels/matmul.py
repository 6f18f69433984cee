"""``linear`` of 1 to 128 rows by a packed weight: what it takes, which kernel runs, its scratch memory."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import gpu, skinny, wide
from .launch import keep_for_replays, scratch
from .skinny import Skinny
from .tiles import FORMS, Form, can_tile, code_bytes
from .wide import Wide

MOST_ROWS = 128  # of x; a library on dense or sparse tensor cores is faster for more
# With int8 values: every 16 rows read the weight again, so 32 read two times 2.5 bytes a group of four; to
# make 16-bit values first reads 2.5, writes 4.5 and reads 4.5.
MOST_ROWS_INT8 = 32
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
    return gpu.refusal(device)


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
    scales: Tensor | None = None,  # (rows,) float32, of int8 values
) -> Tensor:  # (N, rows)
    """``x @ W.t() + bias`` for the packed (rows, columns) weight W, summed in float32 in a fixed order.

    Args:
        x: 1 to 128 rows, to 32 with int8 values; any strides, copied where a row does not start at a
            multiple of 16 bytes.
        values: packed values, canonical or in the order of ``tiles.tile_values``; int8 ones in the latter.
        codes: packed codes, in the same order as the values.
        bias: in the dtype of x, or None.
        form: the pattern.
        rows: rows of W.
        columns: columns of W.
        tiled: whether values and codes are in tile order, which reads 5 to 10 % faster.
        overlap: on sm_90 and later, start while the stream's previous kernel drains, and read the weight
            before that kernel is done. Allowed when no kernel still in flight writes ``values`` or
            ``codes``.
        config: how to cut the work; by default :func:`choose` or :func:`choose_int8` decides.
        scales: with int8 values: row r of W is ``scales[r]`` times the integers of row r.

    Raises:
        ValueError: sizes, dtypes or devices that do not fit each other, or a :func:`refusal`.
    """
    reason = refusal(form, values.dtype if scales is None else x.dtype, rows, columns, x.device)
    reason = reason or _mismatch(x, values, codes, bias, form, rows, columns, scales)
    if reason is None and scales is not None and not tiled:
        reason = "int8 values must be in tile order"
    if reason is None and tiled and not can_tile(rows, columns):
        reason = f"{rows} x {columns} has no tile order"
    if reason is not None:
        raise ValueError(f"packed linear: {reason}")
    capability = gpu.capability(x.device)
    n = x.shape[0]
    if config is None and scales is None:
        config = default(form, n, rows, columns, tiled, x.device)
    elif config is None:
        config = choose_int8(form, n, rows, columns, gpu.processors(x.device))
    if isinstance(config, Wide) and scales is not None:
        raise ValueError("packed linear: the wide kernel takes no int8 values")
    if isinstance(config, Wide) and not (tiled and capability == (9, 0)):
        raise ValueError(
            "packed linear: the wide kernel takes tile order, on compute capability 9.0"
        )
    steps = -(-columns // config.columns)
    if config.split > steps:
        config = replace(config, split=steps)
    overlap = overlap and capability >= (9, 0)
    words = _as_words(values)
    codes = _as_codes(codes, form, tiled)
    x = _rows_aligned(x)
    bias = None if bias is None else bias.contiguous()
    y = torch.empty(n, rows, dtype=x.dtype, device=x.device)
    sums = cells = y
    if config.split > 1:
        tiles = -(-rows // config.rows) * -(-n // config.batch)
        count = tiles * config.split * config.rows * config.batch
        sums = scratch(count, torch.float32, x.device)
        cells = keep_for_replays(_cells(x.device, tiles))
    number = FORMS.index(form)
    with torch.cuda.device(x.device):
        if isinstance(config, Wide):
            wide.launch(config, x, words, codes, bias, y, sums, cells, number, overlap)
        else:
            x_words = x.view(torch.int32)
            skinny.launch(
                config, x_words, words, codes, bias, y, sums, cells, number, tiled, overlap,
                scales=None if scales is None else scales.contiguous(),
            )  # fmt: skip
    return y


def linear_group(
    x: Tensor,  # (N, columns)
    parts: Sequence[tuple[Tensor, Tensor]],  # values and codes of each weight, in tile order
    *,
    form: Form,
    rows: Sequence[int],  # of each weight
    columns: int,
    overlap: bool = False,
    config: Skinny | None = None,
) -> list[Tensor]:  # (N, rows) each
    """``x @ W.t()`` for weights that read one x, in one launch where that is faster: :func:`linear` of each.

    A launch is a third of the time of a small product. Arguments and errors as of :func:`linear`.
    """
    cut = config
    total = sum(rows)
    if cut is None and 2 <= len(parts) <= 3 and 1 <= x.shape[0] <= 16:
        chosen = default(form, x.shape[0], total, columns, True, x.device)
        cut = chosen if isinstance(chosen, Skinny) and chosen.split == 1 else None
    if cut is None:
        return [
            linear(
                x, values, codes, None, form=form, rows=m, columns=columns, tiled=True,
                overlap=overlap,
            )
            for (values, codes), m in zip(parts, rows, strict=True)
        ]  # fmt: skip
    for (values, codes), m in zip(parts, rows, strict=True):
        reason = refusal(form, values.dtype, m, columns, x.device)
        reason = reason or _mismatch(x, values, codes, None, form, m, columns)
        if reason is None and not can_tile(m, columns):
            reason = f"{m} x {columns} has no tile order"
        if reason is not None:
            raise ValueError(f"packed linear: {reason}")
    x = _rows_aligned(x)
    ys = [torch.empty(x.shape[0], m, dtype=x.dtype, device=x.device) for m in rows]
    launched = [
        (_as_words(values), _as_codes(codes, form, True), y)
        for (values, codes), y in zip(parts, ys, strict=True)
    ]
    overlap = overlap and gpu.capability(x.device) >= (9, 0)
    with torch.cuda.device(x.device):
        skinny.launch_group(cut, x.view(torch.int32), launched, FORMS.index(form), overlap)
    return ys


def _rows_aligned(x: Tensor) -> Tensor:
    """x with its elements next to each other and rows that start at multiples of 16 bytes."""
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        return x.clone(memory_format=torch.contiguous_format)
    return x


def _as_words(values: Tensor) -> Tensor:
    return _aligned(values.reshape(-1), 16).view(torch.int32)


def _as_codes(codes: Tensor, form: Form, tiled: bool) -> Tensor:
    return _aligned(codes.reshape(-1), 16 if tiled else 2).view(_CODES[form][tiled])


def _mismatch(
    x: Tensor,
    values: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    form: Form,
    rows: int,
    columns: int,
    scales: Tensor | None = None,
) -> str | None:
    """Which arguments do not fit each other, or None."""
    devices = {t.device for t in (x, values, codes, bias, scales) if t is not None}
    dtypes = {t.dtype for t in (x, values if scales is None else None, bias) if t is not None}
    most = MOST_ROWS
    if scales is not None:
        most = MOST_ROWS_INT8
        if values.dtype != torch.int8 or scales.dtype != torch.float32 or scales.shape != (rows,):
            return (
                f"values of {values.dtype} with scales of {scales.dtype} and shape {tuple(scales.shape)}; "
                f"they must be int8 and float32 of shape ({rows},)"
            )
    if len(devices) > 1 or len(dtypes) > 1:
        return (
            f"x is {x.dtype} on {x.device}, values are {values.dtype} on {values.device}, codes are on "
            f"{codes.device}"
            + ("" if bias is None else f", the bias is {bias.dtype} on {bias.device}")
        )
    if x.ndim != 2 or x.shape[1] != columns or not 1 <= x.shape[0] <= most:
        return f"x is {tuple(x.shape)}; it must be (1 to {most}, {columns})"
    if values.numel() * 2 != rows * columns or codes.numel() != code_bytes(form, rows, columns):
        return (
            f"{values.numel()} values and {codes.numel()} bytes of codes are not those of {form} on "
            f"{rows} x {columns}"
        )
    if bias is not None and bias.shape != (rows,):
        return f"the bias is {tuple(bias.shape)}; it must be ({rows},)"
    return None


def default(
    form: Form, n: int, rows: int, columns: int, tiled: bool, device: torch.device
) -> Skinny | Wide:
    """The cut that :func:`linear` takes for 16-bit values on a device."""
    return choose(form, n, rows, columns, tiled, gpu.capability(device), gpu.processors(device))


def choose_int8(form: Form, n: int, rows: int, columns: int, processors: int) -> Skinny:
    """As :func:`choose`, for int8 values.

    The fastest on an H100, or within a tenth of it, of those that ``bench/int8.py --tune`` tries, at the
    shapes of Qwen3-4B's linears and 1, 16 and 32 rows of x; beyond these shapes by bytes in flight, of which
    an H100 wants some 40 KB on each processor. A warp's step has 640 bytes a 64-column unit, where 16-bit
    values have 1152, so units are doubled where the registers of all programs that run at once allow it.
    """
    waves = rows / (16 * processors)
    plain = form == "2:4"  # its codes take more registers
    if n > 8 and waves <= 1:
        cut = Skinny(1, 8, 1, 4, 16, ahead=not plain)
    elif n > 16:
        cut = _bytes_thirty_two(plain, waves, columns)
    elif n > 8:
        cut = _bytes_sixteen(form, waves)
    else:
        cut = _bytes_eight(plain, waves, columns)
    return _fitted(cut, columns)


def _bytes_eight(plain: bool, waves: float, columns: int) -> Skinny:
    if waves <= 1:
        return (
            Skinny(1, 8, 1, 4, 8, by_float32=True) if plain else Skinny(1, 4, 1, 8, 8, ahead=True)
        )
    if waves <= 2 and plain:
        if columns >= 8192:
            return Skinny(1, 8, 1, 2, 8, split=2, ahead=True)
        if columns >= 4096:
            return Skinny(1, 4, 1, 8, 8, ahead=True)
        return Skinny(1, 8, 1, 2, 8, ahead=True, by_float32=True)
    if waves <= 2:  # two steps are all in flight at once where the next one is loaded ahead
        return Skinny(1, 8, 1, 4, 8, ahead=4096 <= columns < 8192)
    if 4 < waves <= 7:  # small programs, so that all of them run at once
        return (
            Skinny(1, 4, 1, 2, 8, ahead=True, by_float32=True) if plain else Skinny(1, 8, 1, 1, 8)
        )
    return Skinny(1, 4, 1, 4, 8, ahead=True)


def _bytes_sixteen(form: Form, waves: float) -> Skinny:
    if waves <= 2 and form == "2:4":
        return Skinny(1, 4, 1, 4, 16, ahead=True, by_float32=True)
    if waves <= 1.5:
        return Skinny(1, 8, 1, 4, 16)
    if waves <= 2:
        return Skinny(1, 8, 1, 2, 16, ahead=True)
    if waves <= 4:
        return Skinny(1, 4, 1, 4, 16)
    ahead = waves > 5 or form in ("coupled2:4", "pair4:8")
    return Skinny(1, 4, 1, 2, 16, ahead=ahead, by_float32=form == "2:4" and not ahead)


def _bytes_thirty_two(plain: bool, waves: float, columns: int) -> Skinny:
    if waves > 2:
        return Skinny(1, 4, 1, 1, 32) if plain else Skinny(1, 2, 1, 4, 32)
    if plain and 4096 <= columns < 8192:
        return Skinny(1, 4, 1, 4, 16, by_float32=True)
    if plain:
        return Skinny(1, 4, 1, 4, 32)
    return Skinny(1, 4, 1, 4, 16 if waves <= 1.5 else 32, ahead=True)


def choose(
    form: Form,
    n: int,
    rows: int,
    columns: int,
    tiled: bool,
    capability: tuple[int, int],
    processors: int,
) -> Skinny | Wide:
    """The way to cut the work for ``n`` rows of x that was fastest on an H100, by the shape of the weight.

    What decides is how many 16-row tiles there are for each processor: with few, more warps share a tile's
    columns, so that enough loads are in flight; with many, a program is small, so that all of them run at
    once. ``bench/matmul.py --tune`` times the alternatives.
    """
    hopper = tiled and capability == (9, 0)
    waves = rows / (16 * processors)
    if hopper and n > 16:
        return _choose_wide(n, rows, columns, processors)
    if hopper and n > 8 and waves > (4 if form == "2:4" else 5):
        return _split(Wide(8, 2, 16), rows, columns, 2 * processors, 2)
    if n > 8:
        cut = _sixteen(form, waves)
    elif form == "2:4":  # a third more registers than the other forms take
        cut = _eight_plain(waves)
    elif waves <= 2 or waves > 8:
        cut = Skinny(1, 8, 1, 4, 8, ahead=True)
    elif waves > 3 and form != "rowpair16":
        cut = Skinny(1, 4, 1, 2, 8, ahead=True)
    else:
        cut = Skinny(1, 4, 1, 4, 8, ahead=True)
    return _fitted(cut, columns)


def _fitted(cut: Skinny, columns: int) -> Skinny:
    """The cut with a step no wider than the weight."""
    while cut.columns > columns and cut.units > 1:
        cut = replace(cut, units=cut.units // 2)
    while cut.columns > columns and cut.warps_k > 2:
        cut = replace(cut, warps_k=cut.warps_k // 2)
    return cut


def _eight_plain(waves: float) -> Skinny:
    if waves <= 2:
        return Skinny(1, 8, 1, 2, 8, ahead=True)
    if waves <= 3:
        return Skinny(1, 4, 1, 4, 8, ahead=True)
    if 5 < waves <= 6:
        return Skinny(1, 4, 2, 2, 8, ahead=True)
    if 6 < waves <= 8:
        return Skinny(1, 2, 1, 2, 8, ahead=True)
    return Skinny(1, 4, 1, 2, 8, ahead=True)


def _sixteen(form: Form, waves: float) -> Skinny:
    if waves <= 0.4:
        return Skinny(1, 4, 1, 4, 16, ahead=True)
    if waves <= 1:
        return Skinny(1, 8, 1, 4, 16, ahead=True)
    if waves <= 2:
        if form == "2:4":
            return Skinny(1, 4, 1, 4, 16, ahead=True)
        return Skinny(1, 8, 1, 2, 16, ahead=True)
    if waves <= 5:
        return Skinny(1, 4, 1, 2, 16, ahead=True)
    return Skinny(1, 2, 1, 2, 16, ahead=True)


def _choose_wide(n: int, rows: int, columns: int, processors: int) -> Wide:
    if n <= 32:
        if rows <= 128 * processors:
            return _split(Wide(4, 2, 32, stages=5), rows, columns, 2 * processors, 8)
        return Wide(8, 2, 32)
    if n <= 64:
        if rows <= 16 * processors:
            return _split(Wide(4, 2, 64, stages=5), rows, columns, processors, 8)
        if rows <= 128 * processors:
            return _split(Wide(8, 2, 64), rows, columns, processors, 8)
        return Wide(16, 2, 64)
    return _split(Wide(16, 1, 128), rows, columns, processors, 8)


def _split(cut: Wide, rows: int, columns: int, programs: int, most: int) -> Wide:
    """As many splits as run at once, each of four steps or more."""
    blocks = -(-rows // cut.rows)
    steps = -(-columns // cut.columns)
    return replace(cut, split=max(1, min(most, programs // blocks, steps // 4)))


def _aligned(t: Tensor, alignment: int) -> Tensor:
    return t if t.data_ptr() % alignment == 0 else t.clone()


# Counters must be zero modulo 16 before a launch and are so again after it. Launches that may run at the
# same time must not share them: each stream has its own, and so has each launch in a CUDA graph, as one
# graph may be replayed on a stream while another runs there. All are parts of one arena of a device.
_CELLS = 4096
_ARENA = 2**20
_by_stream: dict[tuple[int, int], Tensor] = {}
_arena: dict[int, tuple[Tensor, int]] = {}


def prepare(device: torch.device) -> None:
    """Allocate the arena of a device, before a CUDA graph or its warm-up needs it."""
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _arena and not torch.cuda.is_current_stream_capturing():
        # On a thread and a stream of its own: torch.compile's CUDA graphs warm up with a memory pool that
        # takes the allocations of the current ones, and what outlives the warm-up there is an error.
        thread = threading.Thread(target=_allocate, args=(index,))
        thread.start()
        thread.join()


def _allocate(index: int) -> None:
    with torch.cuda.device(index):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            cells = torch.zeros(_ARENA, dtype=torch.int32, device="cuda")
        stream.synchronize()
    _arena.setdefault(index, (cells, 0))


def _cells(device: torch.device, count: int) -> Tensor:
    index = torch.cuda.current_device() if device.index is None else device.index
    if torch.cuda.is_current_stream_capturing():
        cells = _take(index, count)
        # zeroed in the graph, where the arena is missing or used up
        return torch.zeros(count, dtype=torch.int32, device=device) if cells is None else cells
    prepare(device)
    key = index, torch.cuda.current_stream(device).cuda_stream
    held = _by_stream.get(key)
    if held is None or held.numel() < count:
        held = _take(index, max(count, _CELLS))
        if held is None:
            held = torch.zeros(max(count, _CELLS), dtype=torch.int32, device=device)
        _by_stream[key] = held
    return held


def _take(index: int, count: int) -> Tensor | None:
    """The next cells of the arena."""
    arena, used = _arena.get(index, (None, 0))
    if arena is None or used + count > arena.numel():
        return None
    _arena[index] = arena, used + count
    return arena[used : used + count]
