"""Strided layouts: functions from coordinates to offsets, in the vocabulary of CuTe.

A ``Layout`` is a shape and a stride of the same nesting. It maps a coordinate ``(c0, c1, ...)`` to the
offset ``c0 * d0 + c1 * d1 + ...``. A single integer is a colexicographic index (the first mode runs
fastest), and so is an integer in place of the coordinate of a nested mode: the layout
``((2,2),3):((24,2),8)`` takes ``L(i)``, ``L(c0, c1)`` and ``L((a, b), c1)`` (CuTe, "Layout Algebra").
As in CuTe, a layout has no bound: past its size the last mode goes on. ``check_bounds`` refuses that.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias, Union

from s3tensor.errors import PatternError

IntTuple: TypeAlias = Union[int, "tuple[IntTuple, ...]"]
_DEEPEST = 16  # levels of nesting; below the interpreter's recursion limit, whatever a file says
LARGEST = 2**63 - 1  # the largest size of a tensor


def as_int(value: object) -> int | None:
    """``value`` as a plain int; None for a bool, a float or anything else that is not an integer."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def as_ints(what: str, values: Iterable[int], low: int, high: int = LARGEST) -> tuple[int, ...]:
    """``values`` as a tuple of plain ints from ``low`` to ``high``; the one check of sizes and strides.

    Without an upper bound a hostile string could ask for products and messages of any length.

    Raises:
        PatternError: naming ``what`` and the first entry that is not such an int.
    """
    if isinstance(values, tuple) and all(
        type(value) is int and low <= value <= high for value in values
    ):
        return tuple(values)  # the usual case, on the path of every operator
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


def _as_int_tuple(what: str, values: Any, low: int, level: int = 1) -> tuple[Any, ...]:
    """``values`` as nested tuples of plain ints, each checked by :func:`as_ints`."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise PatternError(f"{what} must be a tuple of ints, got {values!r:.80}")
    if level > _DEEPEST:
        raise PatternError(f"{what} is nested deeper than {_DEEPEST} levels")
    return tuple(
        _as_int_tuple(what, item, low, level + 1)
        if isinstance(item, (tuple, list))
        else as_ints(what, (item,), low)[0]
        for item in values
    )


def _is_flat(values: object, low: int) -> bool:
    """Whether ``values`` is a tuple of plain ints from ``low`` on, as :func:`as_ints` would return it."""
    return type(values) is tuple and all(
        type(value) is int and low <= value <= LARGEST for value in values
    )


def flatten(values: IntTuple) -> tuple[int, ...]:
    """The ints of nested tuples, from left to right."""
    if not isinstance(values, tuple):
        return (values,)
    return tuple(leaf for value in values for leaf in flatten(value))


def _profile(values: IntTuple) -> Any:
    """The nesting of ``values`` alone: equal for congruent tuples."""
    return tuple(map(_profile, values)) if isinstance(values, tuple) else None


def _depth(values: IntTuple) -> int:
    return 1 + max(map(_depth, values), default=0) if isinstance(values, tuple) else 0


@dataclass(frozen=True)
class Layout:
    """A map from coordinates to offsets.

    Args:
        shape: an int, or nested tuples of ints, for each mode; every entry >= 1.
        stride: the same nesting; every entry >= 0.

    Example:
        >>> row_major = Layout((4, 8), (8, 1))
        >>> row_major(1, 3), row_major(5), row_major.size, row_major.cosize
        (11, 9, 32, 32)
        >>> Layout(((2, 2), 3), ((24, 2), 8))(3, 1) == Layout(((2, 2), 3), ((24, 2), 8))((1, 1), 1)
        True

    Raises:
        PatternError: other entries, or a stride that is not nested as the shape is.
    """

    # Ints where a layout is flat, as every view of a pattern is; a nested mode is a tuple.
    shape: tuple[Any, ...]
    stride: tuple[Any, ...]

    def __post_init__(self) -> None:
        if (
            _is_flat(self.shape, 1)
            and _is_flat(self.stride, 0)
            and len(self.shape) == len(self.stride)
        ):
            return  # the usual case: nothing to convert
        object.__setattr__(self, "shape", _as_int_tuple("layout shape", self.shape, 1))
        object.__setattr__(self, "stride", _as_int_tuple("layout stride", self.stride, 0))
        if _profile(self.shape) != _profile(self.stride):
            raise PatternError(
                f"a layout needs one stride for each dim of its shape, nested alike, got shape "
                f"{self.shape} and stride {self.stride}"
            )

    @classmethod
    def row_major(cls, shape: tuple[int, ...]) -> Layout:
        """The layout of a contiguous tensor of ``shape`` (the last mode runs fastest)."""
        stride = [1] * len(shape)
        for dim in reversed(range(len(shape) - 1)):
            stride[dim] = stride[dim + 1] * shape[dim + 1]
        return cls(tuple(shape), tuple(stride))

    @classmethod
    def of_modes(cls, *modes: Layout) -> Layout:
        """Layouts side by side, each a mode of the result; their offsets add up.

        A layout of one flat mode becomes a flat mode, any other a nested one (CuTe's make_layout).
        """
        return cls(
            tuple(mode.shape[0] if mode.rank == 1 else mode.shape for mode in modes),
            tuple(mode.stride[0] if mode.rank == 1 else mode.stride for mode in modes),
        )

    @property
    def rank(self) -> int:
        """Number of modes."""
        return len(self.shape)

    @property
    def depth(self) -> int:
        """Levels of nesting: 1 for a flat layout."""
        return _depth(self.shape)

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return math.prod(n for n, _ in self.modes())

    @property
    def cosize(self) -> int:
        """One past the largest offset."""
        return 1 + sum((n - 1) * d for n, d in self.modes())

    def mode(self, index: int) -> Layout:
        """One mode as a layout."""
        if not -self.rank <= index < self.rank:
            raise PatternError(f"{self} has no mode {index}; it has {self.rank}")
        shape, stride = self.shape[index], self.stride[index]
        return Layout(shape, stride) if isinstance(shape, tuple) else Layout((shape,), (stride,))

    def modes(self) -> list[tuple[int, int]]:
        """(size, stride) of every mode, without nesting."""
        return list(zip(flatten(self.shape), flatten(self.stride), strict=True))

    def flat(self) -> Layout:
        """The same function of an index, without nesting."""
        return _from_modes(self.modes())

    def reversed(self) -> Layout:
        """The modes from last to first, flat: an index of it is a row-major index of this layout."""
        return _from_modes(self.modes()[::-1])

    def by_stride(self) -> Layout:
        """The modes by rising stride, flat: the same offsets, in the order of memory where strides nest."""
        return _from_modes(sorted(self.modes(), key=lambda mode: mode[1]))

    def __call__(self, *coord: IntTuple) -> int:
        """Offset of a coordinate, or of one colexicographic index."""
        if len(coord) == 1 and len(self.shape) != 1:
            return _offset(coord[0], self.shape, self.stride)
        return _offset(coord, self.shape, self.stride)

    def coordinate(self, index: int) -> tuple[Any, ...]:
        """Coordinate of a colexicographic index, nested as the shape is, for any index >= 0."""
        return _coordinate(_checked_index(index), self.shape)

    def offsets(self) -> list[int]:
        """Every offset, coordinates in row-major order: what a view reads, in order."""
        offsets = [0]
        for n, d in self.modes():
            offsets = [start + c * d for start in offsets for c in range(n)]
        return offsets

    @property
    def is_compact(self) -> bool:
        """True when the layout is a bijection onto ``[0, size)``: a permuted, contiguous tensor."""
        run = coalesce(self.by_stride())
        return run.rank == 1 and run.cosize == run.size

    @property
    def is_injective(self) -> bool:
        """True when no two coordinates below ``size`` share an offset.

        Where strides nest, as those of any sliced or permuted tensor, that is enough. Otherwise it
        searches for two coordinates of equal offset, widest stride first. A view has few dims, and pairs
        of dims are checked before, so the search is short.
        """
        modes = sorted((d, n - 1) for n, d in self.modes() if n > 1)
        if any(d == 0 for d, _ in modes):
            return False
        reach = list(itertools.accumulate((d * most for d, most in modes), initial=0))
        if all(d > below for (d, _), below in zip(modes, reach, strict=False)):
            return True
        for (d, most), (e, other) in itertools.combinations(modes, 2):
            if e // math.gcd(d, e) <= most and d // math.gcd(d, e) <= other:
                return False
        # Differences of two coordinates so far: their offset, and whether any entry is not zero.
        sums = {(0, False)}
        for (d, most), below in zip(reversed(modes), reversed(reach[:-1]), strict=True):
            sums = {
                (offset + step * d, moved or step != 0)
                for offset, moved in sums
                for step in range(
                    max(-most, -(-(-below - offset) // d)), min(most, (below - offset) // d) + 1
                )
            }
        return (0, True) not in sums

    def check_bounds(self, numel: int, offset: int = 0) -> None:
        """Refuse a layout that reads beyond a storage.

        Args:
            numel: elements of the storage.
            offset: element at which the layout begins.

        Raises:
            PatternError: when an offset lies outside ``[0, numel)``.
        """
        (offset,) = as_ints("storage offset", (offset,), 0)
        if offset + self.cosize > numel:
            raise PatternError(
                f"{self} from element {offset} reads up to element {offset + self.cosize - 1}, but the "
                f"storage has {numel}; make the shape or the strides smaller"
            )

    def divide(self, tile: tuple[int, ...]) -> tuple[Layout, Layout]:
        """Split every mode of a flat layout: the layout of tile origins, and the layout inside one tile.

        ``outer(i) + inner(j)`` is the offset of element ``j`` of tile ``i`` (CuTe's zipped divide).
        Each entry of ``tile`` must divide its mode.
        """
        tile = as_ints("tile", tile, 1)
        if self.depth > 1:
            raise PatternError(f"{self} is nested; divide layout.flat(), or use logical_divide")
        if len(tile) != len(self.shape) or any(
            n % t for n, t in zip(self.shape, tile, strict=True)
        ):
            raise PatternError(f"tile {tile} does not divide layout shape {self.shape}")
        outer = tuple(n // t for n, t in zip(self.shape, tile, strict=True))
        stride = tuple(d * t for d, t in zip(self.stride, tile, strict=True))
        return Layout(outer, stride), Layout(tile, self.stride)

    def __str__(self) -> str:
        return f"{_words(self.shape)}:{_words(self.stride)}"


def _words(values: IntTuple) -> str:
    return f"({','.join(map(_words, values))})" if isinstance(values, tuple) else str(values)


def _checked_index(index: object) -> int:
    value = as_int(index)
    if value is None or value < 0:
        raise PatternError(f"layout index {index!r:.80} must be an int >= 0")
    return value


def _coordinate(index: int, shape: IntTuple) -> Any:
    if not isinstance(shape, tuple):
        return index
    coord = []
    for mode in shape[:-1]:
        index, within = divmod(index, math.prod(flatten(mode)))
        coord.append(_coordinate(within, mode))
    return (*coord, _coordinate(index, shape[-1])) if shape else ()


def _offset(coord: IntTuple, shape: IntTuple, stride: Any) -> int:
    if not isinstance(shape, tuple):
        return _checked_index(coord) * stride
    place: tuple[IntTuple, ...]
    place = coord if isinstance(coord, tuple) else _coordinate(_checked_index(coord), shape)
    if len(place) != len(shape):
        raise PatternError(
            f"layout of shape {_words(shape)} takes 1 or {len(shape)} ints, got {len(place)}"
        )
    return sum(_offset(c, n, d) for c, n, d in zip(place, shape, stride, strict=True))


def coalesce(layout: Layout, by_mode: bool = False) -> Layout:
    """The same function of an integer in ``[0, size)``, in the fewest modes.

    Args:
        layout: any layout.
        by_mode: coalesce inside each mode, so that the modes and their sizes stay.

    Example:
        >>> str(coalesce(Layout((2, (1, 6)), (1, (6, 2)))))
        '(12):(1)'
    """
    if by_mode:
        return Layout.of_modes(*(coalesce(layout.mode(i)) for i in range(layout.rank)))
    return coalesce_together(layout)[0]


def coalesce_together(*layouts: Layout) -> tuple[Layout, ...]:
    """Layouts of one flat shape, as the same functions of an integer, in the fewest modes they can share.

    Example:
        >>> list(map(str, coalesce_together(Layout((2, 3, 4), (1, 2, 6)), Layout((2, 3, 4), (4, 8, 1)))))
        ['(6,4):(1,6)', '(6,4):(4,1)']
    """
    shape = flatten(layouts[0].shape)
    strides = zip(*(flatten(layout.stride) for layout in layouts), strict=True)
    steps = [(n, d) for n, d in zip(shape, strides, strict=True) if n > 1]
    merged = _merged(steps) or [(1, (0,) * len(layouts))]
    return tuple(_from_modes([(n, d[i]) for n, d in merged]) for i in range(len(layouts)))


def _merged(modes: list[tuple[int, tuple[int, ...]]]) -> list[tuple[int, tuple[int, ...]]]:
    """(size, strides) of modes, neighbours in one where the second continues the first in every stride."""
    merged: list[tuple[int, tuple[int, ...]]] = []
    run, ends = 1, None
    for n, strides in modes:
        if strides == ends:
            run *= n
            merged[-1] = (run, merged[-1][1])
        else:
            run = n
            merged.append((n, strides))
        ends = tuple([run * d for d in merged[-1][1]])
    return merged


def composition(outer: Layout, inner: Layout | tuple[Layout | None, ...]) -> Layout:
    """The layout ``R`` with ``R(i) == outer(inner(i))``, in the modes of ``inner``.

    ``R(c0, c1) == outer(inner(c0, c1))`` holds as well: a mode of ``inner`` that spans several modes of
    ``outer`` becomes a nested mode of the same size. CuTe asks that steps divide the modes of ``outer``;
    here any steps do whose composition is a layout, unless two carries between modes of ``outer`` cancel.

    Args:
        outer: applied last.
        inner: applied first; or one layout for each of the first modes of ``outer``, each composed with
            its mode alone (CuTe's tiler), None for a mode that stays.

    Example:
        >>> str(composition(Layout((6, 2), (8, 2)), Layout((4, 3), (3, 1))))
        '((2,2),3):((24,2),8)'

    Raises:
        PatternError: when no layout is that function: steps of ``inner`` cross a mode of ``outer`` at a
            place that does not divide, or two modes of ``inner`` carry over it together.
    """
    if isinstance(inner, tuple):
        return _by_mode(composition, outer, inner)
    # The last mode has no bound, so a last mode of size 1 keeps its stride.
    flat: list[tuple[int, tuple[int, ...]]]
    flat = [(n, (d,)) for n, d in outer.modes()] or [(1, (0,))]
    radix = _merged([(n, d) for n, d in flat[:-1] if n > 1] + flat[-1:])
    composed = _Composition([(n, d) for n, (d,) in radix], f"cannot compose {outer} with {inner}")
    modes = [composed.mode(n, d) for n, d in zip(inner.shape, inner.stride, strict=True)]
    return Layout(tuple(n for n, _ in modes), tuple(d for _, d in modes))


class _Composition:
    """A layout's coordinates as the digits of a number; each mode composed with it uses up some of them.

    ``outer(x + y) == outer(x) + outer(y)`` where the digits of x and y add without a carry. A stride needs
    that, within one mode of the result and between two of them.
    """

    def __init__(self, radix: list[tuple[int, int]], failure: str) -> None:
        self.radix = radix
        self.room = [n - 1 for n, _ in radix[:-1]]  # what is left of each digit but the last
        self.failure = failure

    def mode(self, n: IntTuple, d: Any) -> tuple[IntTuple, IntTuple]:
        """(shape, stride) of ``outer`` after ``n:d``."""
        if isinstance(n, tuple):
            modes = [self.mode(*pair) for pair in zip(n, d, strict=True)]
            return tuple(size for size, _ in modes), tuple(stride for _, stride in modes)
        steps = self._split(n, d)
        if len(steps) == 1:
            return steps[0]
        return tuple(size for size, _ in steps), tuple(stride for _, stride in steps)

    def _split(self, n: int, d: int) -> list[tuple[int, int]]:
        steps = []
        left, step = n, d
        while left > 1:
            digits = self._digits(step)
            # The longest run of equal steps without a carry.
            bounded = zip(self.radix[:-1], digits[:-1], strict=True)
            run = min([left, *(-(-size // digit) for (size, _), digit in bounded if digit)])
            stride = sum(digit * d for digit, (_, d) in zip(digits, self.radix, strict=True))
            if left % run:
                raise PatternError(
                    f"{self.failure}: {left} steps of {step} leave a mode after {run}, which does not "
                    "divide them"
                )
            for place, digit in enumerate(digits[:-1]):
                self.room[place] -= (run - 1) * digit
                if self.room[place] < 0:
                    raise PatternError(
                        f"{self.failure}: {n} steps of {d} run over the mode of {self.radix[place][0]} "
                        "together with the modes before them"
                    )
            steps.append((run, stride))
            left, step = left // run, step * run
        return steps or [(1, 0)]

    def _digits(self, index: int) -> list[int]:
        digits = []
        for size, _ in self.radix[:-1]:
            index, digit = divmod(index, size)
            digits.append(digit)
        return [*digits, index]


def _by_mode(
    operation: Callable[[Layout, Layout], Layout],
    layout: Layout,
    tilers: tuple[Layout | None, ...],
) -> Layout:
    if len(tilers) > layout.rank:
        raise PatternError(f"{len(tilers)} layouts for the {layout.rank} modes of {layout}")
    modes = [layout.mode(i) for i in range(layout.rank)]
    for i, tiler in enumerate(tilers):
        if tiler is not None:
            modes[i] = operation(modes[i], tiler)
    return Layout.of_modes(*modes)


def complement(layout: Layout, size: int) -> Layout:
    """Offsets that ``layout`` leaves out: ``layout(i) + complement(j)`` covers at least ``[0, size)``.

    No two such sums are equal, and the strides of the complement rise. Modes of stride 0 add no offset
    to ``layout`` and are ignored.

    Example:
        >>> str(complement(Layout((4,), (2,)), 24))
        '(2,3):(1,8)'

    Raises:
        PatternError: when modes of ``layout`` overlap or interleave, so that no layout completes it.
    """
    (size,) = as_ints("complement size", (size,), 1)
    modes: list[tuple[int, int]] = []
    covered = 1
    for d, n in sorted((d, n) for n, d in layout.modes()):
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
    flat = layout.modes()
    steps = itertools.accumulate((n for n, _ in flat), operator.mul, initial=1)  # colex indices
    # From the widest stride down: how far a chain of modes counts from each stride, and the mode that it
    # begins with. Of two modes of one stride, the larger may end the chain sooner.
    best: dict[int, tuple[int, int, int]] = {}
    for (d, n), step in sorted(
        (((d, n), step) for (n, d), step in zip(flat, steps, strict=False)), reverse=True
    ):
        if d > 0 and n > 1:
            reached = best[d * n][0] if d * n in best else d * n
            best[d] = max(best.get(d, (0, 0, 0)), (reached, n, step))
    modes: list[tuple[int, int]] = []
    d = 1
    while d in best:
        _, n, step = best[d]
        modes.append((n, step))
        d *= n
    return coalesce(_from_modes(modes or [(1, 0)]))


def left_inverse(layout: Layout) -> Layout:
    """A layout ``R`` with ``R(layout(i)) == i`` for every ``i`` in ``[0, layout.size)``.

    Example:
        >>> str(left_inverse(Layout((4, 2), (2, 16))))
        '(2,4,2,2):(8,1,16,4)'

    Raises:
        PatternError: when ``layout`` has no complement, or reaches an offset twice.
    """
    if any(d == 0 and n > 1 for n, d in layout.modes()):
        raise PatternError(f"{layout} has no left inverse: a stride of 0 forgets its coordinate")
    return right_inverse(Layout.of_modes(layout, complement(layout, 1)))


def logical_divide(layout: Layout, tiler: Layout | tuple[Layout | None, ...]) -> Layout:
    """``layout`` in two modes: inside the tile that ``tiler`` picks, and over the tiles.

    Args:
        layout: what is divided.
        tiler: indices of ``layout`` that form the first tile; or one such layout for each of the first
            modes of ``layout``, which are then divided one by one, None for a mode that stays.

    Example:
        >>> str(logical_divide(Layout((16,), (1,)), Layout((4,), (2,))))
        '(4,(2,2)):(2,(1,8))'

    Raises:
        PatternError: when tiles do not cover every index of ``layout`` once.
    """
    if isinstance(tiler, tuple):
        return _by_mode(logical_divide, layout, tiler)
    rest = complement(tiler, layout.size)
    if tiler.size * rest.size != layout.size:
        raise PatternError(
            f"{tiler} does not divide {layout}: its {tiler.size} indices and their complement make "
            f"{tiler.size * rest.size}, not {layout.size}"
        )
    return composition(layout, Layout.of_modes(tiler, rest))


def logical_product(layout: Layout, tiler: Layout) -> Layout:
    """Disjoint copies of ``layout``, laid out as ``tiler``: its modes are the tile and the copies.

    Example:
        >>> str(logical_product(Layout((2, 2), (4, 1)), Layout((6,), (1,))))
        '((2,2),(2,3)):((4,1),(2,8))'

    Raises:
        PatternError: when ``layout`` has no complement, or ``tiler`` does not fit it.
    """
    rest = complement(layout, layout.size * tiler.cosize)
    return Layout.of_modes(layout, composition(rest, tiler))


def _from_modes(modes: list[tuple[int, int]]) -> Layout:
    shape, stride = zip(*modes, strict=True) if modes else ((), ())
    return Layout(shape, stride)
