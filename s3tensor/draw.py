"""Patterns in words and in pictures. Pictures need matplotlib, which is imported when one is drawn.

A picture shows a weight's blocks and scopes: one hue a scope, one shade a block, dark lines between scopes,
white lines between blocks, and hatches where a mask prunes. Hues and shades repeat, but not between
neighbours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from s3tensor.errors import PatternError
from s3tensor.paper import BlockCoupling, BlockSpec, ScopeCoupling, ScopeSpec
from s3tensor.paper.block import Blocks
from s3tensor.paper.grid import back
from s3tensor.paper.scope import Scopes
from s3tensor.pattern import BoundPattern, Pattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array: TypeAlias = "np.ndarray[Any, Any]"

Drawable = Pattern | str | BoundPattern | BlockSpec | BlockCoupling | ScopeSpec | ScopeCoupling

_HUES = ("#4477aa", "#ee7733", "#228833", "#aa3377", "#66bbdd", "#ccaa33", "#44aa99", "#dd5566")
_SHADES = {1: (0.3,), 2: (0.15, 0.45), 3: (0.05, 0.3, 0.5), 4: (0.0, 0.2, 0.38, 0.54)}  # white
_DIMS = {1: ("weights",), 2: ("rows", "columns"), 4: ("filters", "channels", "height", "width")}


def describe(pattern: Pattern | str, shape: tuple[int, ...] | None = None) -> str:
    """A pattern in words and figures: its parts, its budget, its packed size and the shapes that it fits.

    Args:
        pattern: a pattern or its string.
        shape: of a weight; default a small one that fits.

    Example:
        >>> print(describe("2:4", (8, 16)))
        2:4 on 8x16
          view     the weight as it is, (8,16):(16,1)
          block    1 weight
          scope    1x4 blocks, 4 weights; keeps 2 of 4 blocks
          scopes   8x4, 32 in all; density 0.5
          packed   0.5625 of dense bfloat16: 128 bytes of values, 16 of indices (2 bits for each kept block)
          fits     any number of rows, columns in multiples of 4
          parts    block=1,1; scope=1,4; keep=2

    Raises:
        PatternError: when the pattern does not parse, or does not fit the shape.
    """
    pattern = Pattern.parse(pattern)
    bound = pattern.bind(shape if shape is not None else small_shape(pattern))
    view = "the weight as it is" if pattern.view is None else pattern.view
    sizes = ", ".join(f"{name}={size}" for name, size in dict(pattern.sizes).items())
    index = {
        "none": "all blocks are kept",
        "bitmap": "1 bit for each block",
        "index": f"{bound.index_bits} bit{'s' * (bound.index_bits > 1)} for each kept block",
    }[bound.index_code]
    scope_weights = bound.blocks_per_scope * bound.block_size
    lines = {
        "view": f"{view}, {bound.view}" + (f" with {sizes}" if sizes else ""),
        "block": _times(bound.block, bound.block_size, "weight"),
        "scope": (
            f"{_times(bound.scope, bound.blocks_per_scope, 'block')}, {scope_weights} weights; keeps "
            f"{bound.keep} of {bound.blocks_per_scope} blocks"
        ),
        "scopes": f"{_by(bound.scope_grid)}, {bound.scopes} in all; density {bound.density:.4g}",
        "packed": (
            f"{bound.packed_bytes(2) / math.prod(bound.shape) / 2:.4g} of dense bfloat16: "
            f"{bound.packed_bytes(2) - bound.index_bytes} bytes of values, {bound.index_bytes} of indices "
            f"({index})"
        ),
        "fits": ", ".join(_fits(pattern)),
        "parts": pattern.parts,
    }
    return "\n".join((str(bound), *(f"  {key:<8} {text}" for key, text in lines.items())))


def facts(pattern: Pattern | str, shape: tuple[int, ...] | None = None) -> dict[str, Any]:
    """What :func:`describe` says or raises, as numbers and lists by name; bytes are those of bfloat16.

    Example:
        >>> facts("2:4", (8, 16))["index_bytes"]
        16
    """
    pattern = Pattern.parse(pattern)
    bound = pattern.bind(shape if shape is not None else small_shape(pattern))
    return {
        "pattern": str(pattern),
        "parts": pattern.parts,
        "shape": list(bound.shape),
        "view": {"shape": list(bound.view.shape), "stride": list(bound.view.stride)},
        "block": list(bound.block),
        "scope": list(bound.scope),
        "keep": bound.keep,
        "blocks_per_scope": bound.blocks_per_scope,
        "block_size": bound.block_size,
        "scopes": bound.scopes,
        "density": bound.density,
        "dense_bytes": math.prod(bound.shape) * 2,
        "value_bytes": bound.packed_bytes(2) - bound.index_bytes,
        "index_bytes": bound.index_bytes,
        "fits": list(_fits(pattern)),
    }


def small_shape(pattern: Pattern) -> tuple[int, ...]:
    """The smallest weight of at least 8 rows and 16 columns (8 channels, 3 x 3) that the pattern fits.

    Raises:
        PatternError: when none of up to 2**20 elements fits, because of a low density or a high count.
    """
    dims = [pattern.step(dim) for dim in range(len(pattern.rule.inputs))]
    least = {1: (16,), 2: (8, 16), 4: (8, 8, 3, 3)}.get(len(dims), (4,) * len(dims))
    scale = 1
    while True:
        shape = tuple(
            step * max(1, -(-n * (scale if n >= 4 else 1) // step)) if is_open else step
            for n, (step, is_open) in zip(least, dims, strict=True)
        )
        try:
            return pattern.bind(shape).shape
        except PatternError:
            scale *= 2
            if math.prod(shape) > 2**20 or not any(is_open for _, is_open in dims):
                raise


def _by(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _times(sizes: tuple[int, ...], n: int, unit: str) -> str:
    """``1x4 blocks``, or ``1 weight``."""
    return f"1 {unit}" if n == 1 else f"{_by(sizes)} {unit}s"


def _fits(pattern: Pattern) -> Iterator[str]:
    ndim = len(pattern.rule.inputs)
    names = _DIMS.get(ndim, tuple(f"dim {dim}" for dim in range(ndim)))
    for dim, name in enumerate(names):
        step, is_open = pattern.step(dim)
        if not is_open:
            yield f"exactly {step} {name}"
        elif step == 1:
            yield f"any number of {name}" if dim == 0 or ndim == 2 else f"any {name}"
        else:
            yield f"{name} in multiples of {step}"


@dataclass(frozen=True)
class _Panel:
    """One tensor, or the corner of a large one, as cells: the block and scope of each, -1 outside a view."""

    title: str
    shape: tuple[int, ...]
    index: Array  # (rows, columns) row-major index of the element in each cell
    scope: Array  # ids
    block: Array  # ids
    hue: Array  # 0 to 7
    shade: Array  # share of white
    number: Array  # of the block in its scope


def draw_layout(
    what: Drawable,
    shape: tuple[int, ...] | None = None,
    mask: Tensor | Sequence[Tensor] | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    title: str | None = None,
    *,
    max_rows: int = 64,
    max_cols: int = 128,
    cell_size: float | None = None,
) -> Figure:
    """Draw blocks and scopes: fill by block, outline by scope, pruned cells hatched.

    Where cells are wide enough each holds the number of its block in its scope: cells of one hue and
    one number are kept or pruned together. A convolution is drawn as a grid of its kernels, a large weight
    as its corner.

    Args:
        what: a pattern, its string, a bound pattern; or a block, a scope or a coupling of
            ``s3tensor.paper``, which has the shape of its parameters.
        shape: of the weight, for a pattern; default a small one that fits.
        mask: bool, True where kept, in the weight's shape; one for each parameter of a coupling.
        ax: axes to draw on, one for each parameter of a coupling; default a new figure.
        title: replaces the description above a single tensor.
        max_rows: rows of the corner.
        max_cols: its columns.
        cell_size: inches of a cell of a new figure; default what fits a page.

    Returns:
        The figure, ``draw_layout("2:4").savefig("2to4.png")``. A new one also unpacks, into itself and its
        axes (a list for a coupling): ``figure, ax = draw_layout("2:4")``.

    Raises:
        PatternError: a pattern that does not fit the shape, a mask or axes that do not fit it, no cells.
        ImportError: without matplotlib.
    """
    if min(max_rows, max_cols) < 1 or not (cell_size is None or cell_size > 0):
        raise PatternError(f"no cells: {max_rows=}, {max_cols=}, {cell_size=} must be above 0")
    panels = _panels(what, shape, (max_rows, max_cols))
    if title is not None and len(panels) == 1:
        panels = [dataclasses.replace(panels[0], title=title)]
    masks: list[Tensor | None] = [None] * len(panels)
    if mask is not None:
        masks = [mask] if isinstance(mask, Tensor) else list(mask)
    _check_masks(panels, masks)
    if ax is None:
        figure, axes = _figure([panel.index.shape for panel in panels], cell_size)
    else:
        axes = list(ax) if isinstance(ax, Sequence) else [ax]
        figure = axes[0].figure if axes else None
    if len(axes) != len(panels):
        raise PatternError(f"{len(axes)} axes for {len(panels)} tensors; give one for each")
    for panel, kept, own in zip(panels, masks, axes, strict=True):
        _draw(panel, None if kept is None else _take(kept, panel.index), own)
    if ax is None:
        hue = "a block" if isinstance(what, Blocks) else "a scope"
        words = [f"one hue: {hue}"]
        words += ["one number: a block"] * any(own.texts for own in axes)
        words += ["hatched: pruned"] * (mask is not None)
        figure.supxlabel("; ".join(words), fontsize=8, x=0.01, ha="left")
    return figure


def draw_mask(mask: Tensor, ax: Axes | None = None, title: str | None = None) -> Figure:
    """Draw the mask of a whole layer: the density of cells, or of squares of cells, from white to dark.

    Args:
        mask: bool, (rows, columns), True where kept; other ranks are unfolded as by :func:`draw_layout`.
        ax: axes to draw on; default a new figure.
        title: default the shape and the density.

    Raises:
        PatternError: a mask that is not bool or is empty.
        ImportError: without matplotlib.
    """
    if mask.dtype != torch.bool or mask.numel() == 0:
        raise PatternError(
            f"a mask is bool, True where kept, of at least one element; got {mask.dtype} of shape "
            f"{tuple(mask.shape)}"
        )
    kept = _cells(mask.detach().cpu().numpy())
    share, square = _kept_share(kept)
    rows, columns = share.shape
    if ax is None:
        inch = 6.0 / max(kept.shape)  # of a cell
        ax = new_figure(kept.shape[1] * inch + 1.9, max(kept.shape[0] * inch, 1.0) + 0.8).subplots()
    image = ax.imshow(
        share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest", aspect="equal",
        extent=(-0.5, columns * square - 0.5, rows * square - 0.5, -0.5),
    )  # fmt: skip
    ax.set(xlim=(-0.5, kept.shape[1] - 0.5), ylim=(kept.shape[0] - 0.5, -0.5))
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.03, pad=0.02)
    bar.set_label("kept" if square == 1 else f"kept share of {square}x{square} weights", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    ax.tick_params(labelsize=7, length=2)
    _name_axes(ax, tuple(mask.shape))
    density = float(mask.float().mean())
    ax.set_title(
        title or f"mask of {_by(mask.shape)}, density {density:.3g}", fontsize=9, loc="left"
    )
    return ax.figure  # type: ignore[return-value]


def _kept_share(
    kept: Array,  # (rows, columns) bool
    most: int = 384,
) -> tuple[Array, int]:
    """The True share of squares of cells, at most ``most`` squares a side, and the side of a square.

    The side is a power of two, like the blocks of most patterns, so that their edges stay sharp.
    """
    side = 2 ** max(0, math.ceil(math.log2(max(kept.shape) / most)))
    rows, columns = (-(-n // side) for n in kept.shape)
    padded = np.full((rows * side, columns * side), np.nan, dtype=np.float32)
    padded[: kept.shape[0], : kept.shape[1]] = kept
    return np.nanmean(padded.reshape(rows, side, columns, side), axis=(1, 3)), side


def save_picture(
    pattern: Pattern | str,
    shape: tuple[int, ...] | None,
    path: str | Path,
    mask: Tensor | None = None,
) -> None:
    """Write :func:`draw_layout` of a pattern to a file in the format that the suffix of ``path`` names.

    Raises:
        PatternError: as :func:`draw_layout`, or for a suffix that matplotlib does not write.
        ImportError: without matplotlib.
    """
    figure = draw_layout(pattern, shape, mask)
    known = figure.canvas.get_supported_filetypes()
    suffix = Path(path).suffix.lstrip(".").lower()
    if suffix not in known:
        raise PatternError(
            f"a picture cannot be written to {str(path)!r}; end it in .png, .svg or .pdf"
        )
    figure.savefig(path)


def _panels(
    what: Drawable, shape: tuple[int, ...] | None, most: tuple[int, int] = (64, 128)
) -> list[_Panel]:
    if isinstance(what, (Blocks, Scopes)):
        if shape is not None:
            raise PatternError("a block or a scope has the shape of its parameter; leave shape out")
        made = _of_blocks(what, most) if isinstance(what, Blocks) else _of_scopes(what, most)
        return list(made)
    if isinstance(what, BoundPattern):
        bound = what
        if shape is not None and tuple(shape) != bound.shape:
            raise PatternError(f"{bound} is bound already; leave shape out, got {shape}")
    else:
        pattern = Pattern.parse(what)
        bound = pattern.bind(shape if shape is not None else small_shape(pattern))
    return [_of_pattern(bound, most)]


def _of_pattern(bound: BoundPattern, most: tuple[int, int]) -> _Panel:
    index = _corner(bound.shape, most)
    # The tiles are a permuted contiguous tensor, so each of their coordinates is a digit of the index.
    scope, number = (
        _number([index // d % n for n, d in level.modes()], level.shape)
        for level in bound.levels[:2]
    )
    name = str(bound) if len(str(bound)) < 40 else _by(bound.shape)
    n, of = bound.blocks_per_scope, _times(bound.block, bound.block_size, "weight")
    return _Panel(
        f"{name}: each scope keeps {bound.keep} of {n} blocks of {of}",
        bound.shape,
        index,
        scope,
        scope * n + number,
        _hue(scope, bound.scope_grid),
        _shade(number, bound.scope),
        number,
    )


def _of_blocks(blocks: Blocks, most: tuple[int, int]) -> Iterator[_Panel]:
    """Blocks without a scope: each has a hue of its own."""
    ids = torch.arange(blocks.numblk()).reshape(blocks.grid_shape)
    for spec, order in blocks.members:
        shape = tuple(spec.view.param.shape)
        index = _corner(shape, most)
        block = _on_param(spec, back(ids, order), index)
        of = _times(spec.shape, math.prod(spec.shape), "weight")
        title = f"{spec.name or 'tensor'} {_by(shape)}\nblocks of {of}"
        shade = np.full(block.shape, _SHADES[1][0])
        hue = _hue(np.maximum(block, 0), blocks.grid_shape)
        yield _Panel(title, shape, index, np.where(block < 0, -1, 0), block, hue, shade, block)


def _of_scopes(scopes: Scopes, most: tuple[int, int]) -> Iterator[_Panel]:
    ids = torch.arange(scopes.numscp()).reshape(scopes.grid_shape)
    before = 0  # blocks of a scope in the tensors that came first
    for leaf, outer in scopes.members:
        inside = math.prod(leaf.shape)
        numbers = torch.arange(inside).expand(*leaf.grid_shape, inside)
        on_grid = leaf.scope_to_block(back(ids, outer)), leaf.scope_to_block(numbers)
        for spec, order in leaf.block.members:
            shape = tuple(spec.view.param.shape)
            index = _corner(shape, most)
            scope, number = (_on_param(spec, back(each, order), index) for each in on_grid)
            block = np.where(scope < 0, -1, scope * scopes.numblk_per_scope() + before + number)
            of = _times(spec.shape, math.prod(spec.shape), "weight")
            title = (
                f"{spec.name or 'tensor'} {_by(shape)}\nblocks of {of}, scopes of "
                f"{_times(leaf.shape, inside, 'block')}"
            )
            hue = _hue(np.maximum(scope, 0), scopes.grid_shape)
            shade = _shade(np.maximum(number, 0), leaf.shape)
            yield _Panel(title, shape, index, scope, block, hue, shade, before + number)
        before += inside


def _on_param(
    spec: BlockSpec,
    values: Tensor,  # (*spec.grid_shape) ids
    index: Array,
) -> Array:
    """Values of blocks in the cells of the parameter, -1 outside the view."""
    on_view = spec.broadcast_block_to_element(values.contiguous())
    return _take(spec.view.to_param(on_view, fill=-1), index)


def _take(values: Tensor, index: Array) -> Array:
    """Elements of a tensor by their row-major index."""
    return values.detach().cpu().reshape(-1)[torch.from_numpy(index)].numpy()


def _number(digits: list[Array], sizes: tuple[int, ...]) -> Array:
    """Row-major number of coordinates."""
    number = np.zeros_like(digits[0])
    for digit, n in zip(digits, sizes, strict=True):
        number = number * n + digit
    return number


def _hue(scope: Array, grid: tuple[int, ...]) -> Array:
    """A number from 0 to 7 that differs between neighbours along each of the last dims of a grid."""
    coords = np.unravel_index(scope, [n for n in grid if n > 1] or [1])
    hue = np.zeros(scope.shape, dtype=np.int64)
    for step, coord in zip((1, 3, 2, 5), reversed(coords), strict=False):
        hue += step * coord
    return hue % len(_HUES)


def _shade(number: Array, scope: tuple[int, ...]) -> Array:
    """Shares of white that differ between neighbouring blocks of a scope."""
    n = math.prod(scope)
    levels = _SHADES[n if n in _SHADES else 2]
    coords = np.unravel_index(number, [n for n in scope if n > 1] or [1])
    return np.asarray(levels)[np.sum(coords, axis=0) % len(levels)]


def _corner(shape: tuple[int, ...], most: tuple[int, int]) -> Array:
    """The element in each cell of a picture, at most ``most`` rows and columns, by row-major index.

    A convolution is a grid of its kernels; of other tensors the leading dims are merged.
    """
    if len(shape) == 4:
        filters, channels, height, width = shape
    else:
        filters, channels, height, width = math.prod(shape[:-1]), shape[-1], 1, 1
    row = np.arange(min(filters * height, most[0]))[:, None]
    column = np.arange(min(channels * width, most[1]))
    kernel = row // height * channels + column // width
    return (kernel * height + row % height) * width + column % width


def _cells(values: Array) -> Array:
    """A whole tensor in the cells of :func:`_corner`."""
    most = (values.size, values.size)
    return values.reshape(-1)[_corner(values.shape, most)]


def _check_masks(panels: list[_Panel], masks: Sequence[Tensor | None]) -> None:
    if len(masks) != len(panels):
        raise PatternError(f"{len(masks)} masks for {len(panels)} tensors; give one for each")
    for panel, kept in zip(panels, masks, strict=True):
        if kept is not None and (kept.dtype != torch.bool or tuple(kept.shape) != panel.shape):
            raise PatternError(
                f"a mask is bool, True where kept, of the shape {panel.shape}; got {kept.dtype} of shape "
                f"{tuple(kept.shape)}"
            )


def _figure(grids: list[tuple[int, ...]], cell: float | None) -> tuple[Any, list[Any]]:
    """A figure with axes for grids of cells (rows, columns), side by side where they are narrow."""
    side_by_side = len(grids) > 1 and sum(columns for _, columns in grids) <= 64
    across = sum if side_by_side else max
    columns = max(across(columns for _, columns in grids), 16)
    tallest = max(rows for rows, _ in grids)
    inch = cell or min(0.5, max(8.0 / columns, 0.09), max(8.0 / tallest, 0.12))  # of a cell
    # A title is wider than a few columns; coupled tensors have titles of two lines.
    least = 1.5 if side_by_side else 4.6
    widths = [max(columns * inch, least) + 0.7 for _, columns in grids]
    heights = [max(rows * inch, 0.5) + 1.0 for rows, _ in grids]
    if side_by_side:
        figure = new_figure(sum(widths), max(heights) + 0.4)
        axes = figure.subplots(1, len(grids), squeeze=False, width_ratios=widths)
    else:
        figure = new_figure(max(widths), sum(heights))
        axes = figure.subplots(len(grids), 1, squeeze=False, height_ratios=heights)
    return figure, list(axes.flat)


def new_figure(width: float, height: float) -> Any:
    """A figure of this size in inches, without matplotlib's global state."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 's3tensor[viz]'") from error

    class Picture(Figure):
        def __iter__(self) -> Iterator[Any]:
            yield from (self, self.axes[0] if len(self.axes) == 1 else self.axes)

        def __reduce_ex__(self, protocol: Any) -> Any:  # pickled as a plain Figure
            parts: Any = super().__reduce_ex__(1)  # later ones insist on the class
            return parts[0], (Figure, *parts[1][1:]), *parts[2:]

    figure = Picture(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw(panel: _Panel, kept: Array | None, ax: Any) -> None:
    from matplotlib.collections import LineCollection, PolyCollection
    from matplotlib.colors import to_rgb

    scope, block = panel.scope, panel.block
    rows, columns = scope.shape
    pruned = np.zeros(scope.shape, dtype=bool) if kept is None else ~kept
    pruned &= scope >= 0

    colour = np.asarray([to_rgb(name) for name in _HUES])[panel.hue]
    white = np.where(pruned, 0.88, panel.shade)[..., None]
    picture = colour * (1 - white) + white
    picture[scope < 0] = 0.94
    ax.imshow(picture, interpolation="nearest", aspect="equal")

    room = ax.get_window_extent()
    inch = min(room.width / columns, room.height / rows) / ax.figure.dpi  # of a cell
    thin = min(1.2, max(0.25, inch * 4))
    if pruned.any():
        # One polygon for each run of pruned cells, so that its hatch is continuous.
        ax.add_collection(
            PolyCollection(
                list(_runs(pruned)), facecolors="none", edgecolors="#55555588", linewidths=0,
                hatch="////" if inch > 0.2 else "//////",
            )
        )  # fmt: skip
    ax.add_collection(LineCollection(_edges(block), colors="white", linewidths=thin))
    ax.add_collection(LineCollection(_edges(scope), colors="#222222", linewidths=1.6 * thin))
    for row, column, height, width in _boxes(block):
        text = str(panel.number[row, column])
        points = 72 * inch * min(0.6 * height, 1.2 * width / len(text))
        if points >= 5:
            ax.text(
                column + (width - 1) / 2, row + (height - 1) / 2, text, ha="center", va="center",
                fontsize=min(9, points), color="#8a8a92" if pruned[row, column] else "#111111",
            )  # fmt: skip
    ax.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), anchor="W")
    ax.tick_params(labelsize=7, length=2)
    _name_axes(ax, panel.shape)
    part = "" if scope.size == math.prod(panel.shape) else f" (the first {rows}x{columns} cells)"
    ax.set_title(panel.title + part, fontsize=9, loc="left")


def _name_axes(ax: Any, shape: tuple[int, ...]) -> None:
    names = {1: ("", "weight"), 2: ("row (output)", "column (input)")}
    names[4] = ("filter", "input channel")
    down, across = names.get(len(shape), ("leading dims", "last dim"))
    ax.set_ylabel(down, fontsize=8)
    ax.set_xlabel(across, fontsize=8)
    for axis, each in ((ax.xaxis, shape[3:]), (ax.yaxis, shape[2:3])):
        size = each[0] if len(shape) == 4 else 1  # cells a tick: those of a kernel in a convolution
        low, high = sorted(axis.get_view_interval())
        ticks = int(high - low) // size
        step = 2 ** max(0, math.ceil(math.log2(ticks / 16)))
        labels = range(0, ticks, step)
        axis.set_ticks([n * size + (size - 1) / 2 for n in labels], [str(n) for n in labels])


def _edges(ids: Array) -> list[list[tuple[float, float]]]:
    """Line segments around cells of one id, each edge once, merged along its length."""
    padded = np.pad(ids, 1, constant_values=-1)
    lines = []
    across = padded[:-1, 1:-1] != padded[1:, 1:-1]  # (rows + 1, columns): below row r - 1
    for row, start, stop in _spans(across):
        lines.append([(start - 0.5, row - 0.5), (stop - 0.5, row - 0.5)])
    down = padded[1:-1, :-1] != padded[1:-1, 1:]  # (rows, columns + 1)
    for column, start, stop in _spans(down.T):
        lines.append([(column - 0.5, start - 0.5), (column - 0.5, stop - 0.5)])
    return lines


def _boxes(ids: Array) -> Iterator[tuple[int, int, int, int]]:
    """(row, column, height, width) of the connected pieces of each block, which are boxes too."""
    padded = np.pad(ids, 1, constant_values=-1)
    first = (ids >= 0) & (padded[1:-1, :-2] != ids) & (padded[:-2, 1:-1] != ids)
    for row, column in np.argwhere(first):
        here = ids[row, column]
        height = int(np.argmax(padded[row + 1 :, column + 1] != here))
        width = int(np.argmax(padded[row + 1, column + 1 :] != here))
        yield int(row), int(column), height, width


def _runs(cells: Array) -> Iterator[list[tuple[float, float]]]:
    for row, start, stop in _spans(cells):
        left, right, top, bottom = start - 0.5, stop - 0.5, row - 0.5, row + 0.5
        yield [(left, top), (right, top), (right, bottom), (left, bottom)]


def _spans(cells: Array) -> Iterator[tuple[int, int, int]]:
    """(row, start, stop) of every run of True in a row."""
    for row, line in enumerate(cells):
        ends = np.flatnonzero(np.diff(np.concatenate(([0], line.astype(np.int8), [0]))))
        for start, stop in ends.reshape(-1, 2):
            yield row, int(start), int(stop)
