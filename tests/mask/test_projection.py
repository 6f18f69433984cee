"""Projection onto a pattern: against enumeration, its laws, and what it refuses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

import s3tensor as s3
from s3tensor.mask.projection import expand_blocks, tile, top_blocks, untile
from s3tensor.pattern import BoundPattern, Pattern
from s3tensor.testing import bound_patterns, weights


@st.composite
def bound_and_weight(draw: st.DrawFn, max_elements: int = 512) -> tuple[BoundPattern, Tensor]:
    bound = draw(bound_patterns(max_elements))
    return bound, draw(weights(bound.shape, (torch.float32, torch.bfloat16, torch.float64)))


@st.composite
def scores(draw: st.DrawFn) -> tuple[Tensor, int]:
    """(scopes, n) of few values, so that ties are common, and a number to keep."""
    n = draw(st.integers(1, 40))  # both sides of the limit between ranks and selection
    rows = draw(st.integers(1, 4))
    values = draw(st.lists(st.integers(-3, 3), min_size=rows * n, max_size=rows * n))
    return torch.tensor(values, dtype=torch.float32).reshape(rows, n), draw(st.integers(1, n))


@given(scores())
def test_top_blocks_is_a_stable_sort(given_scores: tuple[Tensor, int]) -> None:
    values, keep = given_scores
    expected = torch.zeros_like(values, dtype=torch.bool)
    for row, out in zip(values.tolist(), expected, strict=True):
        # Largest first, and of equals the lowest index first.
        for index in sorted(range(len(row)), key=lambda i: (-row[i], i))[:keep]:
            out[index] = True
    assert torch.equal(top_blocks(values, keep), expected)


@given(bound_patterns(max_elements=64), st.integers(0, 2**31))
def test_project_is_the_nearest_point_of_all_that_satisfy(bound: BoundPattern, seed: int) -> None:
    masks = math.comb(bound.blocks_per_scope, bound.keep)
    assume(masks <= 200)
    weight = torch.randn(
        bound.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    mask = s3.project(weight, bound.pattern)
    energy = tile(weight, bound).square().sum(-1)  # (scopes, blocks)
    choices = torch.tensor(list(itertools.combinations(range(bound.blocks_per_scope), bound.keep)))
    best = (
        energy[:, choices].sum(-1).amax(-1)
    )  # the energy that the nearest point keeps, scope by scope
    kept = tile((weight * mask).square(), bound).sum((-1, -2))
    torch.testing.assert_close(kept, best, rtol=1e-12, atol=0)


@given(bound_and_weight())
def test_project_keeps_whole_blocks_and_the_exact_budget(pair: tuple[BoundPattern, Tensor]) -> None:
    bound, weight = pair
    kept = tile(s3.project(weight, bound.pattern), bound)
    assert torch.equal(kept.all(-1), kept.any(-1))
    assert bool((kept.any(-1).sum(-1) == bound.keep).all())


@given(bound_and_weight())
def test_project_is_idempotent(pair: tuple[BoundPattern, Tensor]) -> None:
    bound, weight = pair
    mask = s3.project(weight, bound.pattern)
    masked = torch.where(mask, weight, 0)
    # A block of zeros may take the place of another; what has weight stays.
    again = torch.where(s3.project(masked, bound.pattern), masked, 0)
    assert torch.equal(again, masked)
    assert s3.satisfies(masked, bound.pattern)


@given(bound_and_weight(), st.integers(-20, 20))
def test_project_does_not_see_scale_or_sign(pair: tuple[BoundPattern, Tensor], power: int) -> None:
    bound, weight = pair
    weight = weight.double()
    scaled = weight * -(2.0**power)
    assume(bool(torch.isfinite(scaled).all()))
    assert torch.equal(s3.project(scaled, bound.pattern), s3.project(weight, bound.pattern))


@given(bound_and_weight(), st.integers(0, 2**31))
def test_permuting_scopes_permutes_the_mask(pair: tuple[BoundPattern, Tensor], seed: int) -> None:
    bound, weight = pair
    order = torch.randperm(bound.scopes, generator=torch.Generator().manual_seed(seed))
    moved = untile(tile(weight, bound)[order], bound)
    expected = untile(tile(s3.project(weight, bound.pattern), bound)[order], bound)
    assert torch.equal(s3.project(moved, bound.pattern), expected)


@given(bound_and_weight(), st.data())
def test_strides_do_not_matter(pair: tuple[BoundPattern, Tensor], data: st.DataObject) -> None:
    bound, weight = pair
    order = data.draw(st.permutations(range(weight.ndim)))
    back = sorted(range(weight.ndim), key=order.__getitem__)
    strided = weight.permute(order).contiguous().permute(back)
    assert torch.equal(s3.project(strided, bound.pattern), s3.project(weight, bound.pattern))


@given(bound_and_weight())
def test_scores_of_squares_are_the_default_where_no_square_leaves_the_range(
    pair: tuple[BoundPattern, Tensor],
) -> None:
    bound, weight = pair
    assume(weight.dtype == torch.float32)
    exact = weight.double()
    assume(not bool(((exact != 0) & (exact.abs() < 1e-100)).any()))
    expected = s3.project(weight, bound.pattern, exact.square())
    # Sums of squares in another order may tie where norms do not: compare what is kept.
    mask = s3.project(weight, bound.pattern)
    kept, other = (tile(exact.square() * m, bound).sum((-1, -2)) for m in (mask, expected))
    torch.testing.assert_close(kept, other, rtol=1e-12, atol=0)


@given(bound_patterns(max_elements=512), st.integers(0, 2**31))
def test_satisfies_counts_blocks_that_are_not_all_zero(bound: BoundPattern, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    used = torch.rand(bound.scopes, bound.blocks_per_scope, generator=generator) < 0.6
    weight = torch.where(expand_blocks(used, bound), 1.0, -0.0)  # a zero with a sign is a zero
    assert s3.satisfies(weight, bound.pattern) == bool((used.sum(-1) <= bound.keep).all())


@given(bound_and_weight())
def test_untile_undoes_tile(pair: tuple[BoundPattern, Tensor]) -> None:
    bound, weight = pair
    assert torch.equal(untile(tile(weight, bound), bound), weight)


@example(torch.float32, 1e30)
@example(torch.float64, 1e200)
@example(torch.float32, 1e-30)
@given(st.sampled_from((torch.float32, torch.float64)), st.sampled_from((1e-30, 1.0, 1e30)))
def test_norms_of_blocks_neither_overflow_nor_vanish(dtype: torch.dtype, size: float) -> None:
    weight = torch.tensor([[1.0, 1.0, 3.0, 0.0, 0.0, 2.5, 1.0, 2.0]], dtype=dtype) * size
    kept = s3.project(weight, "pair4:8")
    assert kept.tolist() == [[False, False, True, True, True, True, False, False]]


def test_the_lowest_index_wins_a_tie() -> None:
    assert s3.project(torch.ones(1, 8), "2:4").tolist() == [[True, True, False, False] * 2]
    assert s3.project(torch.zeros(1, 4), "2:4").tolist() == [[True, True, False, False]]
    wide = s3.project(torch.ones(1, 40), "unstructured@0.5")
    assert wide.tolist() == [[True] * 20 + [False] * 20]


def test_a_gradient_is_not_asked_for() -> None:
    weight = torch.randn(4, 8, requires_grad=True)
    assert not s3.project(weight, "2:4").requires_grad
    assert s3.satisfies(weight * s3.project(weight, "2:4"), "2:4")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_are_refused(bad: float) -> None:
    weight = torch.ones(4, 8)
    weight[1, 3] = bad
    with pytest.raises(s3.NonFiniteError, match="holds NaN or Inf"):
        s3.project(weight, "2:4")


def test_nan_scores_are_refused_and_infinite_ones_order() -> None:
    weight = torch.ones(1, 4)
    with pytest.raises(s3.NonFiniteError, match="scores hold NaN"):
        s3.project(weight, "2:4", torch.tensor([[1.0, torch.nan, 0.0, 0.0]]))
    infinite = torch.tensor([[0.0, torch.inf, -torch.inf, 1.0]])
    assert s3.project(weight, "2:4", infinite).tolist() == [[False, True, False, True]]


@pytest.mark.parametrize(
    ("weight", "pattern", "scores", "error", "message"),
    [
        (torch.ones(4, 6), "2:4", None, s3.PatternError, "dim 1 has 6 elements"),
        (torch.ones(0, 8), "2:4", None, s3.PatternError, r"empty shape \(0, 8\)"),
        (torch.ones(8), "2:4", None, s3.PatternError, "2-dim weights"),
        (torch.ones(4, 8), "2:4", torch.ones(4, 4), s3.PatternError, "one score for each weight"),
        (torch.ones(4, 8), "2:4", [1.0], TypeError, "scores are a tensor"),
        ([[1.0]], "2:4", None, TypeError, "a weight is a tensor, got list"),
        (torch.ones(4, 8, dtype=torch.complex64), "2:4", None, TypeError, "complex weights"),
    ],
)
def test_what_cannot_be_projected_is_refused_by_name(
    weight: object, pattern: str, scores: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        s3.project(weight, pattern, scores)  # type: ignore[arg-type]


def test_integer_scores_order_exactly() -> None:
    close = torch.tensor([[2**24, 2**24 + 1, 2**24 + 2, 2**24 + 3]])
    kept = s3.project(torch.ones(1, 4), Pattern.parse("1:4"), close)
    assert kept.tolist() == [[False, False, False, True]]
