"""Strided layouts: functions from coordinates to offsets, in the vocabulary of CuTe.

A ``Layout`` is a shape and a stride of the same length. It maps a coordinate ``(c0, c1, ...)`` to the
offset ``c0 * d0 + c1 * d1 + ...``; a single integer is read as a colexicographic index (the first
mode runs fastest), as in CuTe, "Layout Algebra".
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from s3tensor.errors import PatternError


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
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "stride", tuple(self.stride))
        if len(self.shape) != len(self.stride):
            raise PatternError(
                f"a layout needs one stride for each dim of its shape, got shape {self.shape} and "
                f"stride {self.stride}"
            )
        for name, values, low in (("shape", self.shape, 1), ("stride", self.stride, 0)):
            for value in values:
                if not isinstance(value, int) or isinstance(value, bool) or value < low:
                    raise PatternError(
                        f"layout {name} {values} has {value!r}; every entry must be an int >= {low}"
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
        """Coordinate of a colexicographic index in ``[0, size)``."""
        coord = []
        for n in self.shape:
            coord.append(index % n)
            index //= n
        return tuple(coord)

    def offsets(self) -> list[int]:
        """Every offset, with coordinates in lexicographic (row-major) order; for tests and small sizes."""
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
        if len(tile) != len(self.shape) or any(n % t for n, t in zip(self.shape, tile, strict=True)):
            raise PatternError(f"tile {tile} does not divide layout shape {self.shape}")
        outer = tuple(n // t for n, t in zip(self.shape, tile, strict=True))
        stride = tuple(d * t for d, t in zip(self.stride, tile, strict=True))
        return Layout(outer, stride), Layout(tuple(tile), self.stride)

    def __str__(self) -> str:
        return f"({','.join(map(str, self.shape))}):({','.join(map(str, self.stride))})"
