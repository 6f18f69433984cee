"""Laws of order statistics, with a sort as the oracle."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from s3tensor import PatternError, kth_largest, mid_kth_largest

entries = st.floats(-8, 8, width=16) | st.sampled_from((0.0, 1.0, -1.0))
vectors = st.lists(entries, min_size=1, max_size=12)


@given(vectors, st.data())
def test_kth_largest_is_the_kth_of_a_sort(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    dtype = data.draw(
        st.sampled_from((torch.float32, torch.float64, torch.bfloat16, torch.float16))
    )
    x = torch.tensor(values, dtype=dtype)
    expected = x.sort(descending=True).values[k - 1]
    assert torch.equal(kth_largest(x, k), expected)
    assert torch.equal(kth_largest(x, k, dim=0, keepdim=True), expected[None])
    assert int((x >= kth_largest(x, k)).sum()) >= k, "at least k reach it"
    assert int((x > kth_largest(x, k)).sum()) < k, "fewer than k are above"


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 2**16), st.data())
def test_selection_along_a_dim_is_selection_in_each_line(
    shape: list[int], seed: int, data: st.DataObject
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    k = data.draw(st.integers(1, shape[dim]))
    expected = x.sort(dim=dim, descending=True).values.select(dim, k - 1)
    assert torch.equal(kth_largest(x, k, dim), expected)
    assert torch.equal(kth_largest(x.flatten(), k), kth_largest(x, k))
    if k < shape[dim]:
        below = x.sort(dim=dim, descending=True).values.select(dim, k)
        torch.testing.assert_close(mid_kth_largest(x, k, dim), (expected + below) / 2)
        assert mid_kth_largest(x, k, dim, keepdim=True).shape == x.narrow(dim, 0, 1).shape


@given(st.lists(entries, min_size=2, max_size=12), st.floats(0, 16), st.data())
@example(values=[3e38, -3e38], w=1.0, data=None)
@example(values=[math.inf, math.inf], w=1.0, data=None)
def test_the_middle_lies_between_the_kth_and_the_next(
    values: list[float], w: float, data: st.DataObject | None
) -> None:
    k = 1 if data is None else data.draw(st.integers(1, len(values) - 1))
    x = torch.tensor(values)
    upper, lower = kth_largest(x, k), kth_largest(x, k + 1)
    middle = mid_kth_largest(x, k, k_weight=w)
    assert lower <= middle <= upper
    if upper - lower < 1e38:
        torch.testing.assert_close(middle, (upper + w * lower) / (1 + w))


def test_integers_and_bools_are_selected_as_they_are() -> None:
    assert kth_largest(torch.tensor([3, 1, 2]), 2).item() == 2
    assert kth_largest(torch.tensor([True, False, False]), 2).item() is False
    assert mid_kth_largest(torch.tensor([3, 0, 2]), 2).item() == 1.0
    assert kth_largest(torch.tensor(4.0), 1).item() == 4.0


def test_nan_is_the_largest_as_in_topk() -> None:
    x = torch.tensor([1.0, math.nan, 3.0])
    assert kth_largest(x, 1).isnan() and kth_largest(x, 2).item() == 3.0


@pytest.mark.parametrize("k", [0, 4, -1, 1.5, True, None])
def test_a_rank_outside_the_values_is_refused(k: object) -> None:
    with pytest.raises(PatternError, match="from 1 to 3"):
        kth_largest(torch.arange(3.0), k)  # type: ignore[arg-type]
    with pytest.raises(PatternError, match="from 1 to 2"):
        mid_kth_largest(torch.arange(3.0), 3 if k is True else k)  # type: ignore[arg-type]


def test_what_has_no_order_statistic_is_refused() -> None:
    with pytest.raises(PatternError, match="empty"):
        kth_largest(torch.zeros(0, 3), 1, dim=1)
    with pytest.raises(PatternError, match="dim=2"):
        kth_largest(torch.zeros(2, 3), 1, dim=2)
    with pytest.raises(PatternError, match="k_weight"):
        mid_kth_largest(torch.arange(3.0), 1, k_weight=-1)
    with pytest.raises(TypeError, match="tensor"):
        kth_largest([1.0, 2.0], 1)  # type: ignore[arg-type]
