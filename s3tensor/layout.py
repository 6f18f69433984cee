"""Strided layouts: functions from coordinates to offsets, in the vocabulary of CuTe.

A ``Layout`` is a shape and a stride of the same length. It maps a coordinate ``(c0, c1, ...)`` to the
offset ``c0 * d0 + c1 * d1 + ...``; a single integer is read as a colexicographic index (the first
mode runs fastest), as in CuTe, "Layout Algebra". As there, a layout is not bounded: past its size the
last mode goes on. Modes are flat: CuTe nests the modes of a composition, here they stand side by side,
which is the same function of an integer.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass

from s3tensor.errors import PatternError


def as_int(value: object) -> int | None:
    """``value`` as a plain int; None for a bool, a float or anything else that does not count."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def as_ints(what: str, values: Iterable[int], low: int, high: int = 2**63 - 1) -> tuple[int, ...]:
    """``values`` as a tuple of plain ints from ``low`` to ``high``; the one check of sizes and strides.

    The upper bound is that of a tensor's size, and keeps hostile numbers out of products and messages.
    """
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise PatternError(f"{what} must be a tuple of ints, got {values!r:.80}")
    items = tuple(values)
    ints = [as_int(item) for item in items]
    for item, value in zip(items, ints, strict=True):
        if value is not None and abs(value) > high:
            raise PatternError(
                f"{what} has an entry beyond 2**63 - 1, the largest size of a tensor"
            )
        if value is None or value < low:
            raise PatternError(f"{what} has {item!r:.80}; every entry must be an int >= {low}")
    return tuple(value for value in ints if value is not None)


@dataclass(frozen=True)
class Layout:
    """A map from coordinates to offsets.

    Example:
        >>> row_major = Layout((4, 8), (8, 1))
        >>> row_major(1, 3), row_major(5), row_major.size, row_major.cosize
        (11, 9, 32, 32)
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", as_ints("layout shape", self.shape, 1))
        object.__setattr__(self, "stride", as_ints("layout stride", self.stride, 0))
        if len(self.shape) != len(self.stride):
            raise PatternError(
                f"a layout needs one stride for each dim of its shape, got shape {self.shape} and "
                f"stride {self.stride}"
            )

    @classmethod
    def row_major(cls, shape: tuple[int, ...]) -> Layout:
        """The layout of a contiguous tensor of ``shape`` (the last mode runs fastest)."""
        stride = [1] * len(shape)
        for dim in reversed(range(len(shape) - 1)):
            stride[dim] = stride[dim + 1] * shape[dim + 1]
        return cls(tuple(shape), tuple(stride))

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return math.prod(self.shape)

    @property
    def cosize(self) -> int:
        """One past the largest offset."""
        return 1 + sum((n - 1) * d for n, d in zip(self.shape, self.stride, strict=True))

    def __call__(self, *coord: int) -> int:
        """Offset of a coordinate, or of one colexicographic index."""
        if len(coord) == 1 and len(self.shape) != 1:
            coord = self.coordinate(coord[0])
        if len(coord) != len(self.shape):
            raise PatternError(
                f"layout of shape {self.shape} takes 1 or {len(self.shape)} ints, got {len(coord)}"
            )
        return sum(c * d for c, d in zip(coord, self.stride, strict=True))

    def coordinate(self, index: int) -> tuple[int, ...]:
        """Coordinate of a colexicographic index; past ``size`` the last mode goes on."""
        if index < 0:
            raise PatternError(f"layout index {index} must be >= 0")
        coord = []
        for n in self.shape[:-1]:
            coord.append(index % n)
            index //= n
        return (*coord, index) if self.shape else ()

    def offsets(self) -> list[int]:
        """Every offset, coordinates in lexicographic (row-major) order: what a view reads, in order."""
        return [self(*coord) for coord in itertools.product(*map(range, self.shape))]

    @property
    def is_compact(self) -> bool:
        """True when the layout is a bijection onto ``[0, size)``: a permuted, contiguous tensor."""
        expected = 1
        for n, d in sorted(zip(self.shape, self.stride, strict=True), key=lambda mode: mode[1]):
            if n == 1:
                continue
            if d != expected:
                return False
            expected *= n
        return True

    def divide(self, tile: tuple[int, ...]) -> tuple[Layout, Layout]:
        """Split every mode by ``tile``: the layout of tile origins, and the layout inside one tile.

        ``outer(i) + inner(j)`` is the offset of element ``j`` of tile ``i`` (CuTe's logical divide by
        mode). Each entry of ``tile`` must divide its mode.
        """
        tile = as_ints("tile", tile, 1)
        if len(tile) != len(self.shape) or any(
            n % t for n, t in zip(self.shape, tile, strict=True)
        ):
            raise PatternError(f"tile {tile} does not divide layout shape {self.shape}")
        outer = tuple(n // t for n, t in zip(self.shape, tile, strict=True))
        stride = tuple(d * t for d, t in zip(self.stride, tile, strict=True))
        return Layout(outer, stride), Layout(tile, self.stride)

    def __str__(self) -> str:
        return f"({','.join(map(str, self.shape))}):({','.join(map(str, self.stride))})"


def coalesce(layout: Layout) -> Layout:
    """The same function of an integer in ``[0, size)``, with as few modes as can be.

    Example:
        >>> str(coalesce(Layout((2, 1, 6), (1, 6, 2))))
        '(12):(1)'
    """
    modes: list[tuple[int, int]] = []
    for n, d in zip(layout.shape, layout.stride, strict=True):
        if n == 1:
            continue
        if modes and modes[-1][0] * modes[-1][1] == d:
            modes[-1] = (modes[-1][0] * n, modes[-1][1])
        else:
            modes.append((n, d))
    return _from_modes(modes or [(1, 0)])


def composition(outer: Layout, inner: Layout) -> Layout:
    """The layout ``R`` with ``R(i) == outer(inner(i))`` for every ``i`` in ``[0, inner.size)``.

    Example:
        >>> str(composition(Layout((6, 2), (8, 2)), Layout((4, 3), (3, 1))))
        '(2,2,3):(24,2,8)'

    Raises:
        PatternError: when no layout is that function, because a mode of ``inner`` crosses the modes of
            ``outer`` at places that do not divide.
    """
    flat = coalesce(outer)
    modes: list[tuple[int, int]] = []
    for n, d in zip(inner.shape, inner.stride, strict=True):
        modes.extend(_compose_mode(flat, n, d, f"cannot compose {outer} with {inner}"))
    return _from_modes(modes)


def _compose_mode(outer: Layout, n: int, d: int, failure: str) -> list[tuple[int, int]]:
    """Modes of ``outer`` after ``n:d``: skip ``d`` coordinates of ``outer``, then take ``n`` of them."""
    if n == 1 or d == 0:
        return [(n, 0)]
    modes: list[tuple[int, int]] = []
    for size, stride in zip(outer.shape[:-1], outer.stride[:-1], strict=True):
        if n == 1:
            break
        if d >= size:  # the steps jump over this whole mode
            if d % size:
                raise PatternError(f"{failure}: stride {d} and mode {size} do not divide")
            d //= size
            continue
        inside = -(-size // d)  # steps that begin within this mode
        if n <= inside:
            modes.append((n, d * stride))
            n = 1
            continue
        if size % d or n % inside:
            raise PatternError(f"{failure}: {n} steps of {d} cross a mode of {size}")
        modes.append((inside, d * stride))
        n, d = n // inside, 1
    if n > 1:
        modes.append((n, d * outer.stride[-1]))
    return modes


def complement(layout: Layout, size: int) -> Layout:
    """Offsets that ``layout`` leaves out: ``layout(i) + complement(j)`` covers at least ``[0, size)``.

    Every sum is met once; strides of the complement rise.

    Example:
        >>> str(complement(Layout((4,), (2,)), 24))
        '(2,3):(1,8)'

    Raises:
        PatternError: when modes of ``layout`` overlap or interleave, so that no layout completes it.
    """
    (size,) = as_ints("complement size", (size,), 1)
    modes: list[tuple[int, int]] = []
    covered = 1
    for d, n in sorted(zip(layout.stride, layout.shape, strict=True)):
        if n == 1 or d == 0:
            continue
        if d % covered:
            raise PatternError(
                f"{layout} has no complement: stride {d} is not a multiple of {covered}"
            )
        modes.append((d // covered, covered))
        covered = d * n
    modes.append((-(-size // covered), covered))
    return coalesce(_from_modes(modes))


def right_inverse(layout: Layout) -> Layout:
    """The largest ``R``, of whole modes, with ``layout(R(i)) == i`` for every ``i`` in ``[0, R.size)``.

    Example:
        >>> str(right_inverse(Layout((4, 8), (8, 1))))
        '(8,4):(4,1)'
    """
    modes: list[tuple[int, int]] = []
    reached = 1
    steps = itertools.accumulate(layout.shape, operator.mul, initial=1)  # colex index of each mode
    modes_by_stride = sorted(
        zip(layout.stride, layout.shape, steps, strict=False), key=lambda mode: (mode[0], -mode[1])
    )
    for d, n, step in modes_by_stride:
        if d == reached and n > 1:
            modes.append((n, step))
            reached *= n
    return coalesce(_from_modes(modes or [(1, 0)]))


def _from_modes(modes: list[tuple[int, int]]) -> Layout:
    return Layout(tuple(n for n, _ in modes), tuple(d for _, d in modes))
