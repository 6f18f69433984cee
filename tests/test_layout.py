"""Laws of layouts, with enumeration as the oracle."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from s3tensor import Layout, PatternError, coalesce, complement, composition, right_inverse

modes = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 24)), min_size=0, max_size=4)
layouts = modes.map(lambda m: Layout(tuple(n for n, _ in m), tuple(d for _, d in m)))


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
    coords = itertools.product(*(range(n) for n in reversed(layout.shape)))
    return [
        sum(c * d for c, d in zip(reversed(coord), layout.stride, strict=True)) for coord in coords
    ]


@given(layouts)
def test_call_of_a_coordinate_is_its_dot_product_with_the_stride(layout: Layout) -> None:
    coords = itertools.product(*(range(n) for n in layout.shape))
    expected = [sum(c * d for c, d in zip(x, layout.stride, strict=True)) for x in coords]
    assert layout.offsets() == expected


@given(layouts)
def test_call_of_an_index_is_colexicographic(layout: Layout) -> None:
    assert [layout(i) for i in range(layout.size)] == colex(layout)


@given(layouts)
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


@given(layouts)
def test_coalesce_keeps_the_function(layout: Layout) -> None:
    short = coalesce(layout)
    assert [short(i) for i in range(layout.size)] == colex(layout)
    assert short.size == layout.size
    assert coalesce(short) == short
    assert len(short.shape) <= max(1, len(layout.shape))


@given(compact_layouts() | layouts, layouts)
@example(Layout((6, 2), (8, 2)), Layout((4, 3), (3, 1)))
@example(Layout((10, 2), (16, 4)), Layout((5, 4), (1, 5)))
@example(Layout((4, 4), (1, 10)), Layout((3, 2), (5, 1)))
def test_composition_is_function_composition(outer: Layout, inner: Layout) -> None:
    assume(inner.cosize <= outer.size)
    try:
        result = composition(outer, inner)
    except PatternError:
        assume(False)
        raise
    assert [result(i) for i in range(inner.size)] == [outer(x) for x in colex(inner)]


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


@given(layouts | compact_layouts())
def test_right_inverse_undoes_the_layout(layout: Layout) -> None:
    inverse = right_inverse(layout)
    assert [layout(inverse(i)) for i in range(inverse.size)] == list(range(inverse.size))
    if layout.is_compact:
        assert inverse.size == layout.size


def test_an_index_past_the_size_runs_on_in_the_last_mode() -> None:
    assert [Layout((2, 3), (3, 1))(i) for i in (5, 6, 7)] == [5, 3, 6]
    with pytest.raises(PatternError, match=">= 0"):
        Layout((2, 3), (3, 1))(-1)


@pytest.mark.parametrize(
    ("shape", "stride"),
    [((2,), ()), ((0,), (1,)), ((2,), (-1,)), ((True,), (1,)), ((2.0,), (1,)), (4, 1), ("2", "1"), ((2**63,), (1,)),
     ((-(10**5000),), (1,))],
)  # fmt: skip
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
