"""Laws of layouts, with enumeration as the oracle."""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import math
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from s3tensor import Layout, PatternError, coalesce, complement, composition, right_inverse
from s3tensor.pattern.layout import (
    coalesce_together,
    flatten,
    left_inverse,
    logical_divide,
    logical_product,
)

modes = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 24)), min_size=0, max_size=4)
layouts = modes.map(lambda m: Layout(tuple(n for n, _ in m), tuple(d for _, d in m)))
short_modes = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 24)), min_size=1, max_size=2)
nested_layouts = st.recursive(
    short_modes.map(lambda m: Layout(tuple(n for n, _ in m), tuple(d for _, d in m))),
    lambda inner: st.lists(inner, min_size=1, max_size=2).map(lambda m: Layout.of_modes(*m)),
    max_leaves=3,
)


@st.composite
def compact_layouts(draw: st.DrawFn, max_modes: int = 4) -> Layout:
    """A permuted contiguous tensor."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=max_modes))
    order = draw(st.permutations(range(len(shape))))
    stride = [0] * len(shape)
    reached = 1
    for dim in order:
        stride[dim] = reached
        reached *= shape[dim]
    return Layout(tuple(shape), tuple(stride))


def colex(layout: Layout) -> list[int]:
    """Offsets with the first mode fastest, by enumeration."""
    shape, stride = flatten(layout.shape), flatten(layout.stride)
    coords = itertools.product(*(range(n) for n in reversed(shape)))
    return [sum(c * d for c, d in zip(reversed(coord), stride, strict=True)) for coord in coords]


@given(layouts | nested_layouts)
def test_call_of_a_coordinate_is_its_dot_product_with_the_stride(layout: Layout) -> None:
    shape, stride = flatten(layout.shape), flatten(layout.stride)
    coords = list(itertools.product(*(range(n) for n in shape)))
    expected = [sum(c * d for c, d in zip(x, stride, strict=True)) for x in coords]
    assert layout.offsets() == expected
    assert [layout.flat()(*x) for x in coords] == expected


@given(layouts | nested_layouts)
def test_call_of_an_index_is_colexicographic(layout: Layout) -> None:
    assert [layout(i) for i in range(layout.size)] == colex(layout)
    assert [layout.flat()(i) for i in range(layout.size)] == colex(layout)


@given(layouts | nested_layouts)
def test_an_index_and_its_nested_coordinate_are_one_place(layout: Layout) -> None:
    for i in range(layout.size):
        coord = layout.coordinate(i)
        assert layout(*coord) == layout.flat()(i)
        assert len(flatten(coord)) == len(flatten(layout.shape))


@given(nested_layouts)
def test_a_mode_takes_the_index_of_its_own_coordinate(layout: Layout) -> None:
    parts = [layout.mode(i) for i in range(layout.rank)]
    assert math.prod(part.size for part in parts) == layout.size
    for coord in itertools.product(*(range(part.size) for part in parts)):
        assert layout(*coord) == sum(part.flat()(c) for part, c in zip(parts, coord, strict=True))


@given(layouts | nested_layouts)
def test_cosize_is_one_past_the_largest_offset(layout: Layout) -> None:
    assert layout.cosize == max(layout.offsets()) + 1
    assert layout.size == len(layout.offsets())


@given(layouts | compact_layouts())
@example(Layout((), ()))
@example(Layout((2, 2), (1, 1)))
@example(Layout((2, 1, 3), (3, 77, 1)))
def test_compact_means_a_permutation_of_the_offsets(layout: Layout) -> None:
    assert layout.is_compact == (sorted(layout.offsets()) == list(range(layout.size)))


@given(layouts, st.data())
def test_divide_meets_every_offset_of_the_view_once(layout: Layout, data: st.DataObject) -> None:
    divisors = [[t for t in range(1, n + 1) if n % t == 0] for n in layout.shape]
    tile = tuple(data.draw(st.sampled_from(choices)) for choices in divisors)
    outer, inner = layout.divide(tile)
    assert outer.size * inner.size == layout.size
    sums = [outer(i) + inner(j) for i in range(outer.size) for j in range(inner.size)]
    assert sorted(sums) == sorted(layout.offsets())
    for coord in itertools.product(*(range(n) for n in layout.shape)):
        parts = [divmod(c, t) for c, t in zip(coord, tile, strict=True)]
        whole = sum(c * d for c, d in zip(coord, layout.stride, strict=True))
        assert whole == sum(
            a * d + b * e for (a, b), d, e in zip(parts, outer.stride, inner.stride, strict=True)
        )


def test_divide_refuses_a_tile_that_does_not_divide() -> None:
    for tile in ((3, 1), (1,), (0, 1), (1, 1.0)):
        with pytest.raises(PatternError, match="tile"):
            Layout((4, 8), (8, 1)).divide(tile)  # type: ignore[arg-type]


@given(layouts | nested_layouts)
def test_coalesce_keeps_the_function(layout: Layout) -> None:
    short = coalesce(layout)
    assert [short(i) for i in range(layout.size)] == colex(layout)
    assert short.size == layout.size
    assert coalesce(short) == short
    assert short.depth == 1 and short.rank <= max(1, len(flatten(layout.shape)))


@given(nested_layouts)
def test_coalesce_by_mode_keeps_the_modes(layout: Layout) -> None:
    short = coalesce(layout, by_mode=True)
    assert short.rank == layout.rank
    for i in range(layout.rank):
        assert colex(short.mode(i)) == colex(layout.mode(i))


def assert_is_composition(result: Layout, outer: Layout, inner: Layout) -> None:
    assert colex(result) == [outer.flat()(x) for x in colex(inner)]
    sizes = [inner.mode(i).size for i in range(inner.rank)]
    assert [result.mode(i).size for i in range(result.rank)] == sizes
    for coord in itertools.product(*map(range, sizes)):
        assert result(*coord) == outer.flat()(inner(*coord))


@given(compact_layouts() | layouts | nested_layouts, layouts | nested_layouts)
@example(Layout((6, 2), (8, 2)), Layout((4, 3), (3, 1)))
@example(Layout((10, 2), (16, 4)), Layout((5, 4), (1, 5)))
@example(Layout((4, 4), (1, 10)), Layout((3, 2), (5, 1)))
@example(Layout((2, 2), (0, 1)), Layout((2, 2), (1, 1)))  # two modes that carry together
@example(Layout((2, 1), (1, 7)), Layout((4,), (1,)))  # a last mode of size 1 that is run past
def test_composition_is_function_composition(outer: Layout, inner: Layout) -> None:
    assume(outer.rank > 0)
    try:
        result = composition(outer, inner)
    except PatternError:
        assume(False)
        raise
    assert_is_composition(result, outer, inner)


def test_two_modes_that_carry_together_are_no_layout() -> None:
    """Found by Hypothesis: each mode alone composed, and their sum was taken to be the composition."""
    with pytest.raises(PatternError, match="together with the modes before"):
        composition(Layout((2, 2), (0, 1)), Layout((2, 2), (1, 1)))


@given(compact_layouts(max_modes=3), nested_layouts)
@example(Layout((4, 3), (3, 1)), Layout((3,), (5,)))  # a diagonal: more than CuTe's rule takes
@example(Layout((4, 3), (3, 1)), Layout((3,), (3,)))
def test_composition_refuses_only_what_no_layout_is(outer: Layout, inner: Layout) -> None:
    try:
        composition(outer, inner)
    except PatternError:
        assert not is_some_layout(outer, inner)


def is_some_layout(outer: Layout, inner: Layout) -> bool:
    """By trial: the composition is a sum over the leaves of ``inner``, each of which is a layout."""
    flat = inner.flat()
    values = {
        coord: outer.flat()(flat(*coord)) for coord in itertools.product(*map(range, flat.shape))
    }
    axes = []
    for place, n in enumerate(flat.shape):
        alone = [tuple(c if i == place else 0 for i in range(flat.rank)) for c in range(n)]
        axes.append([values[coord] for coord in alone])
    if any(
        value != sum(axis[c] for axis, c in zip(axes, coord, strict=True))
        for coord, value in values.items()
    ):
        return False
    return all(map(is_strided, axes))


def is_strided(values: list[int]) -> bool:
    """Whether a sequence is that of a layout: runs of equal steps, repeated."""
    n = len(values)
    if n == 1:
        return values == [0]
    run = next((k for k in range(n) if values[k] != k * values[1]), n)
    if n % run or values[0] != 0:
        return False
    starts = values[::run]
    repeated = [start + step for start in starts for step in values[:run]]
    return repeated == values and (run == n or is_strided(starts))


@given(compact_layouts(), st.data())
def test_composition_with_modes_of_the_outer_layout_never_fails(
    outer: Layout, data: st.DataObject
) -> None:
    """Whole modes of the outer layout, in any order, are a permutation of its dims."""
    order = data.draw(st.permutations(range(len(outer.shape))))
    index = [math.prod(outer.shape[:dim]) for dim in order]
    inner = Layout(tuple(outer.shape[dim] for dim in order), tuple(index))
    result = composition(outer, inner)
    assert [result(i) for i in range(inner.size)] == [outer(x) for x in colex(inner)]


def test_a_composition_keeps_the_modes_of_the_inner_layout() -> None:
    result = composition(Layout((6, 2), (8, 2)), Layout((4, 3), (3, 1)))
    assert result == Layout(((2, 2), 3), ((24, 2), 8)) and str(result) == "((2,2),3):((24,2),8)"
    assert (result.rank, result.depth, result.size, result.cosize) == (2, 2, 12, 43)
    by_mode = composition(Layout((6, 8), (8, 1)), (Layout((3,), (2,)), None))
    assert by_mode == Layout((3, 8), (16, 1))
    with pytest.raises(PatternError, match="2 layouts for the 1 modes"):
        composition(Layout((6,), (8,)), (None, None))


@given(compact_layouts(), compact_layouts(), compact_layouts())
def test_composition_is_associative(a: Layout, b: Layout, c: Layout) -> None:
    c, b, a = sorted((a, b, c), key=lambda layout: layout.size)
    try:
        left, right = composition(composition(a, b), c), composition(a, composition(b, c))
    except PatternError:
        assume(False)
        raise
    assert colex(left) == colex(right)


def test_composition_refuses_what_no_layout_is() -> None:
    with pytest.raises(PatternError, match="cannot compose"):
        composition(Layout((4, 3), (3, 1)), Layout((3,), (3,)))


@given(compact_layouts(), st.integers(1, 5), st.integers(1, 200))
def test_complement_meets_every_offset_once(whole: Layout, spread: int, size: int) -> None:
    keep = [(n, d) for n, d in zip(whole.shape, whole.stride, strict=True) if (n + d) % 2]
    part = Layout(tuple(n for n, _ in keep), tuple(d * spread for _, d in keep))
    rest = complement(part, size)
    sums = sorted(part(i) + rest(j) for i in range(part.size) for j in range(rest.size))
    assert len(set(sums)) == len(sums)
    assert sums[:size] == list(range(size))
    strides = [d for n, d in zip(rest.shape, rest.stride, strict=True) if n > 1]
    assert strides == sorted(strides)


def test_complement_refuses_interleaved_modes() -> None:
    with pytest.raises(PatternError, match="no complement"):
        complement(Layout((3, 2), (2, 3)), 24)


@given(compact_layouts(), st.integers(1, 5))
def test_complement_completes_the_cosize(whole: Layout, spread: int) -> None:
    part = Layout(whole.shape, tuple(d * spread for d in whole.stride))
    rest = complement(part, part.cosize)
    sums = {part(i) + rest(j) for i in range(part.size) for j in range(rest.size)}
    assert len(sums) == part.size * rest.size >= part.cosize
    assert {0} == set(part.offsets()) & set(rest.offsets())


@given(layouts | compact_layouts() | nested_layouts)
def test_right_inverse_undoes_the_layout(layout: Layout) -> None:
    inverse = right_inverse(layout)
    whole = layout.flat()
    assert [whole(inverse(i)) for i in range(inverse.size)] == list(range(inverse.size))
    if layout.is_compact:
        assert inverse.size == layout.size


@given(layouts | nested_layouts)
@example(Layout((2, 3, 4), (3, 1, 1)))  # two modes of stride 1, of which the larger leads nowhere
def test_right_inverse_reaches_as_far_as_whole_modes_do(layout: Layout) -> None:
    """Brute force: no product of whole modes, in any order, counts further from 0."""
    flat = layout.flat()
    pairs = [(n, d) for n, d in zip(flat.shape, flat.stride, strict=True) if n > 1]
    best = 1
    for order in itertools.permutations(pairs):
        reached = 1
        for n, d in order:
            if d != reached:
                break
            reached *= n
        best = max(best, reached)
    assert right_inverse(layout).size == best


@given(compact_layouts(), st.integers(1, 5))
@example(Layout((4, 2), (2, 16)), 1)
def test_left_inverse_undoes_the_layout(whole: Layout, spread: int) -> None:
    layout = Layout(whole.shape, tuple(d * spread for d in whole.stride))
    try:
        inverse = left_inverse(layout)
    except PatternError:
        assume(False)
        raise
    assert [inverse(layout(i)) for i in range(layout.size)] == list(range(layout.size))


def test_left_inverse_refuses_what_forgets_a_coordinate() -> None:
    for layout, message in (
        (Layout((2, 3), (0, 1)), "forgets"),
        (Layout((3, 2), (2, 3)), "no complement"),
    ):
        with pytest.raises(PatternError, match=message):
            left_inverse(layout)


@given(compact_layouts(max_modes=3), st.data())
def test_logical_divide_meets_every_offset_once(layout: Layout, data: st.DataObject) -> None:
    divisors = [n for n in range(1, layout.size + 1) if layout.size % n == 0]
    tile = data.draw(st.sampled_from(divisors))
    step = data.draw(st.sampled_from([d for d in divisors if layout.size % (d * tile) == 0]))
    tiler = Layout((tile,), (step,))
    try:
        divided = logical_divide(layout, tiler)
    except PatternError:
        assume(False)
        raise
    assert sorted(divided.offsets()) == sorted(layout.offsets())
    assert divided.rank == 2
    assert [divided(i, 0) for i in range(tile)] == [layout(tiler(i)) for i in range(tile)]


def test_logical_divide_refuses_a_tile_that_overhangs() -> None:
    assert str(logical_divide(Layout((16,), (1,)), Layout((4,), (2,)))) == "(4,(2,2)):(2,(1,8))"
    both = logical_divide(Layout((8, 16), (16, 1)), (Layout((4,), (1,)), Layout((2,), (8,))))
    assert str(both) == "((4,2),(2,8)):((16,64),(8,1))"
    with pytest.raises(PatternError, match="does not divide"):
        logical_divide(Layout((10,), (1,)), Layout((4,), (1,)))


@given(compact_layouts(max_modes=3), st.integers(1, 3), compact_layouts(max_modes=2))
def test_logical_product_lays_disjoint_copies(whole: Layout, spread: int, tiler: Layout) -> None:
    layout = Layout(whole.shape, tuple(d * spread for d in whole.stride))
    try:
        product = logical_product(layout, tiler)
    except PatternError:
        assume(False)
        raise
    assert product.size == layout.size * tiler.size and product.rank == 2
    assert len(set(product.offsets())) == product.size
    for copy in range(tiler.size):
        first = product(0, copy)
        assert [product(i, copy) - first for i in range(layout.size)] == colex(layout)


@given(layouts | compact_layouts() | nested_layouts)
@example(Layout((3, 2, 2), (2, 3, 11)))
@example(Layout((3, 3), (2, 3)))
@example(Layout((2, 2, 2), (3, 5, 8)))  # no two modes meet, all three do
def test_injective_means_no_offset_twice(layout: Layout) -> None:
    assert layout.is_injective == (len(set(layout.offsets())) == layout.size)


def test_injectivity_of_a_huge_view_is_told_at_once() -> None:
    assert Layout((2**31, 2**31), (2**31, 1)).is_injective
    assert not Layout((2**31, 2**31), (2**30, 1)).is_injective
    assert not Layout((2**31, 3), (1, 1)).is_injective


@given(layouts | nested_layouts, st.integers(0, 100), st.integers(0, 10))
def test_bounds_are_those_of_the_offsets(layout: Layout, numel: int, start: int) -> None:
    if start + max(layout.offsets()) < numel:
        layout.check_bounds(numel, start)
    else:
        with pytest.raises(PatternError, match=rf"the storage has {numel}"):
            layout.check_bounds(numel, start)


@pytest.fixture(scope="module")
def pycute() -> Any:
    try:
        return importlib.import_module("pycute.layout")
    except ImportError:
        return pytest.importorskip("torch.distributed._pycute.layout")


class TestAgainstPycute:
    """CUTLASS's own Python, where nvidia-cutlass is installed, else the copy that torch carries.

    torch's counts lexicographically, which is the same algebra on layouts read backwards.
    """

    def theirs(self, pycute: Any, layout: Layout) -> Any:
        backwards = not pycute.__name__.startswith("pycute")
        return pycute.Layout(turned(layout.shape, backwards), turned(layout.stride, backwards))

    def ours(self, pycute: Any, layout: Any) -> Layout:
        backwards = not pycute.__name__.startswith("pycute")
        shape, stride = turned(layout.shape, backwards), turned(layout.stride, backwards)
        return Layout(shape, stride) if isinstance(shape, tuple) else Layout((shape,), (stride,))

    @given(layout=compact_layouts() | nested_layouts)
    def test_size_cosize_and_offsets(self, pycute: Any, layout: Layout) -> None:
        theirs = self.theirs(pycute, layout)
        assert (layout.size, layout.cosize) == (theirs.size(), theirs.cosize())
        assert colex(layout) == [theirs(i) for i in range(layout.size)]

    @given(layout=compact_layouts() | nested_layouts)
    def test_coalesce(self, pycute: Any, layout: Layout) -> None:
        assert coalesce(layout) == self.ours(pycute, pycute.coalesce(self.theirs(pycute, layout)))

    @given(outer=compact_layouts() | nested_layouts, inner=compact_layouts(2) | nested_layouts)
    @example(outer=Layout((6, 2), (8, 2)), inner=Layout((4, 3), (3, 1)))
    @example(outer=Layout((10, 2), (16, 4)), inner=Layout((5, 4), (1, 5)))
    def test_composition(self, pycute: Any, outer: Layout, inner: Layout) -> None:
        assume(inner.cosize <= outer.size)
        theirs = None
        with contextlib.suppress(AssertionError):
            made = pycute.composition(self.theirs(pycute, outer), self.theirs(pycute, inner))
            theirs = self.ours(pycute, made)
        expected = [outer.flat()(x) for x in colex(inner)]
        # It drops steps that do not divide and does not see modes that carry together.
        assume(theirs is not None and colex(theirs) == expected)
        assert theirs is not None
        result = composition(outer, inner)
        assert coalesce(result, by_mode=True) == coalesce(theirs, by_mode=True)

    @given(whole=compact_layouts(), size=st.integers(1, 200))
    def test_complement(self, pycute: Any, whole: Layout, size: int) -> None:
        part = Layout(whole.shape[::2], whole.stride[::2])
        theirs = pycute.complement(self.theirs(pycute, part), size)
        assert complement(part, size) == self.ours(pycute, theirs)

    @given(layout=compact_layouts())
    def test_inverses(self, pycute: Any, layout: Layout) -> None:
        right = pycute.right_inverse(self.theirs(pycute, layout))
        assert right_inverse(layout) == self.ours(pycute, right)
        left = pycute.left_inverse(self.theirs(pycute, layout))
        assert left_inverse(layout) == coalesce(self.ours(pycute, left))

    @given(layout=compact_layouts(3), tile=st.sampled_from((1, 2, 3, 4, 6)))
    def test_logical_divide(self, pycute: Any, layout: Layout, tile: int) -> None:
        assume(layout.size % tile == 0)
        tiler = Layout((tile,), (1,))
        try:
            theirs = pycute.logical_divide(self.theirs(pycute, layout), self.theirs(pycute, tiler))
        except AssertionError:
            assume(False)
            raise
        assume(math.prod(flatten(theirs.shape)) == layout.size)
        divided = logical_divide(layout, tiler)
        for i in range(2):
            assert colex(divided.mode(i)) == colex(self.ours(pycute, theirs[i]))


def turned(values: Any, backwards: bool) -> Any:
    """Nested tuples read from the right, on every level."""
    if not backwards or not isinstance(values, tuple):
        return values
    return tuple(turned(value, backwards) for value in reversed(values))


def test_an_index_past_the_size_runs_on_in_the_last_mode() -> None:
    assert [Layout((2, 3), (3, 1))(i) for i in (5, 6, 7)] == [5, 3, 6]
    with pytest.raises(PatternError, match=">= 0"):
        Layout((2, 3), (3, 1))(-1)


@pytest.mark.parametrize(
    ("shape", "stride"),
    [
        ((2,), ()),
        ((0,), (1,)),
        ((2,), (-1,)),
        ((True,), (1,)),
        ((2.0,), (1,)),
        (4, 1),
        ("2", "1"),
        ((2**63,), (1,)),
        ((-(10**5000),), (1,)),
        (((2, 2), 3), (1, 2)),
        (((2, 2), 3), ((1,), 2)),
        (((2, 0), 3), ((1, 2), 4)),
        (functools.reduce(lambda inner, _: (inner,), range(5000), ()), ()),
    ],
    ids=range(13),
)
def test_a_malformed_layout_is_refused(shape: object, stride: object) -> None:
    with pytest.raises(PatternError):
        Layout(shape, stride)  # type: ignore[arg-type]


def test_layouts_are_values() -> None:
    layout = Layout([4, 8], [8, 1])  # type: ignore[arg-type]
    assert layout == Layout.row_major((4, 8)) and hash(layout) == hash(Layout((4, 8), (8, 1)))
    assert str(layout) == "(4,8):(8,1)"
    assert (layout(1, 3), layout(5)) == (11, 9)
    with pytest.raises(PatternError, match="takes 1 or 2"):
        layout(1, 2, 3)
    for bad in (1.0, True, "1"):
        with pytest.raises(PatternError, match="must be an int"):
            layout(bad)  # type: ignore[arg-type]
    with pytest.raises(PatternError, match="no mode 2"):
        layout.mode(2)
    with pytest.raises(PatternError, match="nested"):
        Layout(((2, 2), 3), ((24, 2), 8)).divide((4, 3))


@given(layouts | nested_layouts)
def test_an_index_of_the_reversed_layout_is_row_major(layout: Layout) -> None:
    assert [layout.reversed()(i) for i in range(layout.size)] == layout.offsets()


@given(layouts | nested_layouts)
def test_by_stride_has_the_same_offsets_and_rising_strides(layout: Layout) -> None:
    ordered = layout.by_stride()
    assert sorted(ordered.offsets()) == sorted(layout.offsets())
    assert list(ordered.stride) == sorted(ordered.stride)


steps = st.tuples(st.integers(1, 4), st.integers(0, 8), st.integers(0, 8))


@given(st.lists(steps, max_size=4))
def test_layouts_coalesced_together_are_the_same_functions_in_shared_modes(
    modes: list[tuple[int, int, int]],
) -> None:
    shape = tuple(n for n, *_ in modes)
    pair = [Layout(shape, tuple(mode[i] for mode in modes)) for i in (1, 2)]
    merged = coalesce_together(*pair)
    assert merged[0].shape == merged[1].shape
    assert merged[0].rank <= max(1, len(modes))
    for before, after in zip(pair, merged, strict=True):
        assert [after(i) for i in range(after.size)] == [before(i) for i in range(before.size)]
