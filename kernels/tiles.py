"""Values and codes of a packed weight in tile order: the order in which a warp reads them.

A tile is 16 rows x 64 columns of the dense weight, one warp's tensor-core operand. In tile order the
values of a tile are 1 KiB in a row, and so are its codes; in canonical order (row by row, as they are
packed) a tile is 16 pieces of 64 bytes. Both orders hold the same bytes, so a tensor keeps only one of
them. On an H100 tile order saves 5 to 10 % of a matmul's time.

Within a tile, lane ``4 r + q`` of a warp owns columns 16 q to 16 q + 15 of rows r and r + 8:

======================  ======================================  ==================================
form                    values                                  codes
======================  ======================================  ==================================
2:4, coupled2:4,        (M/16, K/64, half, lane, 16 bytes),     (M/16, K/64, lane, half), two bytes
pair4:8                 half h being rows r + 8 h               each for 2:4, else one
rowpair16               (M/16, K/64, half, lane, 16 bytes) of   (M/16, K/64), a 32-bit word with
                        packed row r, half h being columns      bit ``lane``
                        16 q + 8 h on
======================  ======================================  ==================================

Canonical codes are nibbles ``i0 | i1 << 2`` of a scope's two kept blocks, or for rowpair16 one bit a
scope; values are 16-bit floats. Values of eight bits are half as many bytes; for a
lane to load 16 bytes at once, its two halves lie side by side: (M/16, K/64, lane, half, 8 bytes).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Form = Literal["2:4", "coupled2:4", "pair4:8", "rowpair16"]
FORMS: tuple[Form, ...] = ("2:4", "coupled2:4", "pair4:8", "rowpair16")

ROWS, COLUMNS = 16, 64  # of a tile
_BYTES = (0, 3, 2, 4, 1, 5, 6)  # the order of int8 values: axes of the canonical grid


def can_tile(rows: int, columns: int) -> bool:
    """Whether a weight of (rows, columns) is whole tiles; a weight that is not stays in canonical order."""
    return rows > 0 and columns > 0 and rows % ROWS == 0 and columns % COLUMNS == 0


def tile_values(values: Tensor, form: Form, rows: int, columns: int) -> Tensor:
    """Packed values in tile order, in the shape they came in.

    Args:
        values: packed values of a (rows, columns) weight in canonical order, 16-bit or int8, any shape.
        form: the pattern.
        rows: rows of the dense weight, a multiple of 16.
        columns: its columns, a multiple of 64.

    Raises:
        ValueError: an unknown form, sizes that are not whole tiles, or tensors of another size.
    """
    grid = _value_grid(values, form, rows, columns)
    if values.itemsize == 1:
        return values.reshape(grid).permute(_BYTES).reshape(values.shape)
    order = (0, 3, 5, 2, 4, 1, 6) if form == "rowpair16" else (0, 3, 1, 2, 4, 5, 6)
    return values.reshape(grid).permute(order).reshape(values.shape)


def untile_values(values: Tensor, form: Form, rows: int, columns: int) -> Tensor:
    """The inverse of :func:`tile_values`."""
    grid = _value_grid(values, form, rows, columns)
    tiles, halves, r, units, q, two, chunk = grid
    if values.itemsize == 1:
        tiled = values.reshape([grid[axis] for axis in _BYTES])
        return tiled.permute(0, 4, 2, 1, 3, 5, 6).reshape(values.shape)
    if form == "rowpair16":
        tiled = values.reshape(tiles, units, two, r, q, halves, chunk)
        return tiled.permute(0, 5, 3, 1, 4, 2, 6).reshape(values.shape)
    tiled = values.reshape(tiles, units, halves, r, q, two, chunk)
    return tiled.permute(0, 2, 3, 1, 4, 5, 6).reshape(values.shape)


def bytes_as_wide(values: Tensor, rows: int, columns: int) -> Tensor:
    """int8 values in their tile order, as a view in that of 16-bit values.

    Returns:
        (rows / 16, columns / 64, half, r, q, 8): half h is rows r + 8 h, or of rowpair16 columns 8 h on.
    """
    return values.reshape(rows // ROWS, columns // COLUMNS, 8, 4, 2, 8).permute(0, 1, 4, 2, 3, 5)


def tile_codes(codes: Tensor, form: Form, rows: int, columns: int) -> Tensor:
    """Packed codes, a stream of bytes, in tile order; arguments and errors as :func:`tile_values`."""
    tiles, units = _check_codes(codes, form, rows, columns)
    if form == "rowpair16":
        return _from_nibbles(_nibbles(codes).reshape(tiles, 8, units).permute(0, 2, 1), codes)
    width = 2 if form == "2:4" else 1
    return codes.reshape(tiles, 2, 8, units, 4, width).permute(0, 3, 2, 4, 1, 5).reshape(-1)


def untile_codes(codes: Tensor, form: Form, rows: int, columns: int) -> Tensor:
    """The inverse of :func:`tile_codes`."""
    tiles, units = _check_codes(codes, form, rows, columns)
    if form == "rowpair16":
        return _from_nibbles(_nibbles(codes).reshape(tiles, units, 8).permute(0, 2, 1), codes)
    width = 2 if form == "2:4" else 1
    return codes.reshape(tiles, units, 8, 4, 2, width).permute(0, 4, 2, 1, 3, 5).reshape(-1)


def code_bytes(form: Form, rows: int, columns: int) -> int:
    """Bytes of the codes of a (rows, columns) weight."""
    bits = {"2:4": 1024, "coupled2:4": 512, "pair4:8": 512, "rowpair16": 32}[form]
    return -(-rows * columns * bits // (ROWS * COLUMNS * 8))


def _value_grid(values: Tensor, form: Form, rows: int, columns: int) -> tuple[int, ...]:
    """Canonical values as (tile rows, half rows, r, tile columns, q, half columns, 8 values)."""
    _check_tiles(form, rows, columns)
    if values.numel() != rows * columns // 2:
        raise ValueError(
            f"{form} keeps {rows * columns // 2} values of a {rows} x {columns} weight, got {values.numel()}"
        )
    halves = (1, 2) if form == "rowpair16" else (2, 1)
    return rows // ROWS, halves[0], 8, columns // COLUMNS, 4, halves[1], 8


def _check_codes(codes: Tensor, form: Form, rows: int, columns: int) -> tuple[int, int]:
    _check_tiles(form, rows, columns)
    size = code_bytes(form, rows, columns)
    if codes.dtype != torch.uint8 or tuple(codes.shape) != (size,):
        raise ValueError(
            f"the codes of {form} on {rows} x {columns} are uint8 of shape ({size},), got {codes.dtype} of "
            f"shape {tuple(codes.shape)}"
        )
    return rows // ROWS, columns // COLUMNS


def _check_tiles(form: str, rows: int, columns: int) -> None:
    if form not in FORMS:
        raise ValueError(f"no tile order for {form!r}; there is one for {', '.join(FORMS)}")
    if not can_tile(rows, columns):
        raise ValueError(
            f"tiles are {ROWS} rows x {COLUMNS} columns, and {rows} x {columns} is not a multiple; leave "
            "this weight in canonical order"
        )


def _nibbles(stream: Tensor) -> Tensor:
    """The nibbles of a stream, low one first."""
    return torch.stack((stream & 15, stream >> 4), -1).flatten()


def _from_nibbles(nibbles: Tensor, like: Tensor) -> Tensor:
    """The stream of these nibbles: the inverse of ``_nibbles``."""
    pairs = nibbles.reshape(-1, 2)
    return (pairs[:, 0] | pairs[:, 1] << 4).to(like.dtype)
