"""Laws of Structured OBS, with enumeration, a textbook OBS and float64 least squares as oracles."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

import s3tensor as s3
from s3tensor import (
    BlockCoupling,
    BlockSpec,
    HessianError,
    NonFiniteError,
    Pattern,
    PatternError,
    ScopeSpec,
    StructuredOBS,
    View,
)
from s3tensor.errors import PrunerError
from s3tensor.mask.projection import tile
from s3tensor.pattern import BoundPattern
from s3tensor.prune.hessian import Factors
from s3tensor.prune.linalg import quadratic, spd_inverse
from s3tensor.prune.obs import inverse_of, sweep
from s3tensor.prune.oneshot import one_shot
from s3tensor.prune.product import Product
from s3tensor.testing import bound_patterns

matrices = bound_patterns(max_elements=512).filter(lambda bound: len(bound.shape) == 2)
seeds = st.integers(0, 2**16)
orders = st.sampled_from(("left_to_right", "largest_first"))


def layer(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A float64 weight and the Hessian of correlated inputs, positive definite."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(4 * columns + 4, columns, generator=generator, dtype=torch.float64)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = inputs @ (mixing / math.sqrt(columns) + torch.eye(columns, dtype=torch.float64))
    return weight, x.T @ x / len(x)


def loss(pruned: Tensor, weight: Tensor, hessian: Tensor) -> float:
    change = pruned - weight
    return float(((change @ hessian) * change).sum())


def exact(weight: Tensor, hessian: Tensor, mask: Tensor) -> Tensor:
    """Least squares on each row's kept entries, by a direct solve."""
    out = torch.zeros_like(weight)
    for row, kept in enumerate(mask):
        index = kept.nonzero().flatten()
        if len(index):
            term = weight[row] @ hessian[:, index]
            out[row, index] = torch.linalg.solve(hessian[index][:, index], term)
    return out


def run_sweep(
    weight: Tensor, hessian: Tensor, bound: BoundPattern, **options
) -> tuple[Tensor, Tensor]:
    inverse = spd_inverse(hessian)
    assert inverse is not None
    options = {"ng": 4, "order": "left_to_right", "scoring": "independent", **options}
    return sweep(weight, inverse, hessian, bound, **options)


def scope_of(param: Tensor, bound: BoundPattern) -> ScopeSpec:
    view = View.from_rule(param, str(bound.pattern.rule), dict(bound.pattern.sizes))
    return ScopeSpec(BlockSpec(view, bound.block), bound.scope)


def textbook(weight: Tensor, hessian: Tensor, keep: int, group: int) -> tuple[Tensor, Tensor]:
    """Optimal Brain Surgeon as it is written: one weight at a time, one inverse a row, right-looking."""
    out, mask = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    for row in range(len(weight)):
        inverse = torch.linalg.inv(hessian)
        for start in range(0, weight.shape[1], group):
            for _ in range(group - keep):
                cost = out[row] ** 2 / inverse.diagonal()
                cost[~mask[row]] = torch.inf
                drop = start + int(cost[start : start + group].argmin())
                column = inverse[:, drop] / inverse[drop, drop]
                out[row] -= out[row, drop] * column
                inverse = inverse - torch.outer(column, inverse[drop])
                mask[row, drop] = False
                # What is left of its row and column is rounding.
                inverse[drop], inverse[:, drop] = 0.0, 0.0
                inverse[drop, drop] = 1.0
                out[row, drop] = 0.0
    return out, mask


# The sweep -------------------------------------------------------------------------------------


@given(matrices, seeds)
def test_a_pattern_of_a_matrix_is_rows_times_columns(bound: BoundPattern, seed: int) -> None:
    rows, columns = bound.shape
    ids = tile(torch.arange(rows * columns).view(rows, columns), bound)
    product = Product.of(bound)
    blocks = set()
    for row_scope, column_scope in itertools.product(product.rows, product.columns):
        pairs = itertools.product(row_scope, column_scope)
        numbered = {
            int(place): (r[:, None] * columns + c).flatten()
            for place, (r, c) in zip(product.place, pairs, strict=True)
        }
        blocks.add(tuple(frozenset(numbered[n].tolist()) for n in range(product.blocks)))
    assert blocks == {tuple(frozenset(block.tolist()) for block in scope) for scope in ids}


@given(matrices, seeds, st.sampled_from((1, 2, 8, 64)), orders)
@example(Pattern.parse("rowpair16").bind((16, 48)), 0, 8, "largest_first")
@example(Pattern.parse("block:4x2@0.5").bind((8, 12)), 0, 8, "largest_first")
@example(Pattern.parse("column@0.25").bind((4, 16)), 0, 1, "left_to_right")
@example(Pattern.parse("coupled2:4").bind((2, 32)), 1, 64, "left_to_right")
def test_sequential_updates_equal_the_refit_of_their_own_mask(
    bound: BoundPattern, seed: int, ng: int, order: str
) -> None:
    weight, hessian = layer(*bound.shape, seed)
    pruned, mask = run_sweep(weight, hessian, bound, ng=ng, order=order)
    kept = tile(mask, bound)
    assert torch.equal(kept.all(-1), kept.any(-1)), "a block goes as a whole"
    assert bool((kept.any(-1).sum(-1) == bound.keep).all()), "every scope keeps its budget"
    expected = exact(weight, hessian, mask)
    if Product.of(bound).spans_rows:  # nothing is left to make up for a row
        expected = weight * mask
    torch.testing.assert_close(pruned, expected, rtol=1e-6, atol=1e-8)


@given(matrices, seeds, orders)
def test_joint_updates_equal_the_refit_of_their_own_mask(
    bound: BoundPattern, seed: int, order: str
) -> None:
    assume(math.comb(bound.blocks_per_scope, bound.keep) <= 70)
    assume(not Product.of(bound).spans_rows)
    weight, hessian = layer(*bound.shape, seed)
    pruned, mask = run_sweep(weight, hessian, bound, order=order, scoring="joint")
    torch.testing.assert_close(pruned, exact(weight, hessian, mask), rtol=1e-6, atol=1e-8)


@given(seeds, st.sampled_from(((2, 4), (1, 3), (3, 4), (5, 8))), st.integers(1, 3))
def test_one_scope_at_a_time_is_the_textbooks_obs(
    seed: int, budget: tuple[int, int], groups: int
) -> None:
    keep, group = budget
    weight, hessian = layer(3, group * groups, seed)
    expected, expected_mask = textbook(weight, hessian, keep, group)
    bound = Pattern.parse(f"{keep}:{group}").bind(tuple(weight.shape))
    pruned, mask = run_sweep(weight, hessian, bound, ng=1)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(pruned, expected, rtol=1e-7, atol=1e-9)


@given(
    seeds,
    st.sampled_from(
        (
            "2:4",
            "1:4",
            "5:8",
            "view=m k -> m k; block=1,2; scope=1,4; keep=2",
            "view=m k -> m k; block=2,2; scope=1,3; keep=1",
            "view=m k -> m k; block=1,4; scope=2,1; keep=1",
            "view=m k -> m k; block=1,2; scope=2,2; keep=3",
        )
    ),
)
def test_joint_scoring_of_one_scope_is_the_best_of_all_masks(seed: int, text: str) -> None:
    pattern = Pattern.parse(text)
    rows = pattern.block[0] * pattern.scope[0]
    bound = pattern.bind((rows, pattern.block[1] * pattern.scope[1]))
    weight, hessian = layer(*bound.shape, seed)
    pruned, _ = run_sweep(weight, hessian, bound, scoring="joint")
    ids = tile(torch.arange(weight.numel()).view(bound.shape), bound)[0]
    best = math.inf
    for kept in itertools.combinations(range(bound.blocks_per_scope), bound.keep):
        mask = torch.zeros(weight.numel(), dtype=torch.bool)
        mask[ids[list(kept)].flatten()] = True
        mask = mask.view(bound.shape)
        best = min(best, loss(exact(weight, hessian, mask), weight, hessian))
    assert loss(pruned, weight, hessian) == pytest.approx(best, rel=1e-7)


@given(matrices, seeds, orders, st.integers(1, 20))
def test_results_do_not_depend_on_chunks(
    bound: BoundPattern, seed: int, order: str, rows: int
) -> None:
    weight, hessian = layer(*bound.shape, seed)
    whole, mask = run_sweep(weight, hessian, bound, order=order)
    for options in ({"rows_at_once": rows}, {"memory_budget": 1}):
        pruned, again = run_sweep(weight, hessian, bound, order=order, **options)
        assert torch.equal(again, mask)
        torch.testing.assert_close(pruned, whole, rtol=1e-6, atol=1e-7)


@given(seeds, st.sampled_from(("2:4", "pair4:8", "rowpair16")))
def test_largest_first_follows_scopes_wherever_they_stand(seed: int, text: str) -> None:
    bound = Pattern.parse(text).bind((16, 64))
    weight, hessian = layer(16, 64, seed)
    size = Product.of(bound).columns[0].numel()
    generator = torch.Generator().manual_seed(seed)
    moved = torch.randperm(64 // size, generator=generator)
    columns = (moved[:, None] * size + torch.arange(size)).flatten()
    pruned, mask = run_sweep(weight, hessian, bound, order="largest_first")
    again, moved_mask = run_sweep(
        weight[:, columns], hessian[columns][:, columns], bound, order="largest_first"
    )
    assert torch.equal(moved_mask, mask[:, columns])
    torch.testing.assert_close(again, pruned[:, columns], rtol=1e-6, atol=1e-8)


@given(seeds, st.integers(1, 20), st.integers(1, 3))
def test_a_quadratic_form_is_that_of_the_inverse(seed: int, size: int, rows: int) -> None:
    _, hessian = layer(1, size, seed)
    vectors, _ = layer(rows, size, seed + 1)
    expected = ((vectors @ torch.linalg.inv(hessian)) * vectors).sum()
    scale = hessian.diagonal().rsqrt()
    unit = hessian * scale[:, None] * scale
    torch.testing.assert_close(quadratic(unit, vectors * scale), expected, rtol=1e-8, atol=1e-10)


# The pruner ------------------------------------------------------------------------------------


@given(matrices, seeds, orders)
def test_obs_is_exact_for_its_mask_and_keeps_the_pattern(
    bound: BoundPattern, seed: int, order: str
) -> None:
    weight, hessian = layer(*bound.shape, seed)
    pruned, mask = s3.prune.obs(weight, hessian, bound.pattern, order=order, damp=0.01)
    assert s3.satisfies(pruned, bound.pattern) and not pruned[~mask].any()
    damped = Factors(hessian, 0.01).matrix
    torch.testing.assert_close(pruned, exact(weight, damped, mask), rtol=1e-6, atol=1e-8)


@given(seeds, st.integers(-40, 40))
def test_obs_scales_with_the_weight(seed: int, exponent: int) -> None:
    weight, hessian = layer(4, 16, seed)
    weight = weight.float()
    pruned, mask = s3.prune.obs(weight, hessian, "2:4")
    scaled, again = s3.prune.obs(weight * 2.0**exponent, hessian, "2:4")
    assert torch.equal(again, mask) and torch.equal(scaled, pruned * 2.0**exponent)


def test_obs_beats_what_looks_at_single_weights() -> None:
    weight, hessian = layer(32, 64, 3)
    errors = {
        name: s3.output_error(
            s3.prune.PRUNERS[name](weight, hessian, "2:4").weight, weight, hessian
        )
        for name in ("obs", "sparsegpt", "wanda", "magnitude")
    }
    assert errors["obs"] < errors["sparsegpt"] < errors["wanda"]
    masked = s3.project(weight, "2:4")
    refit = s3.output_error(s3.prune.refit(weight, hessian, masked), weight, hessian)
    assert errors["obs"] < refit < errors["magnitude"]


def test_a_dense_target_is_a_refit_towards_it() -> None:
    weight, hessian = layer(8, 16, 5)
    cross = hessian + 0.1 * layer(16, 16, 6)[0]
    pruned, mask = s3.prune.obs(weight, hessian, "2:4", target=cross, alpha=0.5, damp=0.02)
    expected = s3.prune.refit(weight, hessian, mask, cross, 0.5, damp=0.02)
    torch.testing.assert_close(pruned, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("pattern", ["2:4", "pair4:8", "rowpair16", "block:4x4@0.5"])
@pytest.mark.parametrize("case", ["few samples", "dead inputs", "spread of scales", "constant"])
@pytest.mark.parametrize("c_dtype", [None, torch.float16, torch.bfloat16])
def test_awkward_hessians_give_finite_weights(pattern: str, case: str, c_dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16 if case == "few samples" else 256, 64, generator=generator)
    if case == "dead inputs":
        x[:, ::3] = 0.0
    elif case == "spread of scales":
        x *= torch.logspace(-4, 4, 64)
    elif case == "constant":
        x = x[:, :1].expand(-1, 64) + 1e-3 * x
    weight = torch.randn(16, 64, generator=generator)
    hessian = s3.compute_hessian(x)
    pruned = s3.prune.obs(weight, hessian, pattern, damp=1e-4).weight
    assert bool(torch.isfinite(pruned).all()) and s3.satisfies(pruned, pattern)
    if case == "dead inputs":
        assert not pruned[:, ::3].any()
    plain = s3.output_error(s3.prune.magnitude(weight, None, pattern).weight, weight, hessian)
    assert s3.output_error(pruned, weight, hessian) <= plain
    bound = Pattern.parse(pattern).bind((16, 64))
    param = Parameter(weight.clone())
    StructuredOBS(scope_of(param, bound), hessian).prune_true_obs(bound.keep, c_dtype=c_dtype)
    assert bool(torch.isfinite(param).all()) and s3.satisfies(param, pattern)
    assert s3.output_error(param, weight, hessian) <= plain


def test_progress_ends_at_all_rows() -> None:
    weight, hessian = layer(32, 32)
    seen: list[tuple[int, int]] = []
    budget = 1 << 18
    s3.prune.obs(
        weight, hessian, "2:4", memory_budget=budget, progress=lambda *step: seen.append(step)
    )
    assert len(seen) > 1 and seen == sorted(seen) and seen[-1] == (32, 32)


# In place --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "pair4:8", "coupled2:4", "rowpair16"])
@pytest.mark.parametrize("kind", ["contiguous", "transposed", "sliced"])
def test_structured_obs_is_the_functional_form_in_place(pattern: str, kind: str) -> None:
    weight, hessian = layer(16, 32)
    base = {
        "contiguous": torch.empty_like(weight),
        "transposed": torch.empty(32, 16, dtype=torch.float64).T,
        "sliced": torch.full((20, 40), 7.0, dtype=torch.float64)[2:18, 4:36],
    }[kind]
    param = Parameter(base.copy_(weight))
    bound = Pattern.parse(pattern).bind((16, 32))
    lines: list[str] = []
    StructuredOBS(scope_of(param, bound), hessian).prune_true_obs(
        bound.keep, ng=8, chunk_size=3, order="largest_first", progress_fn=lines.append
    )
    expected = s3.prune.obs(weight, hessian, pattern, damp=1e-4, ng=8).weight
    torch.testing.assert_close(param.detach(), expected, rtol=1e-7, atol=1e-9)
    assert lines and lines[-1] == "16 of 16 rows"


@given(matrices, seeds)
def test_full_compensation_is_the_refit_and_never_worse_than_local(
    bound: BoundPattern, seed: int
) -> None:
    weight, hessian = layer(*bound.shape, seed)
    results = {}
    for mode in ("local", "full", "split"):
        param = Parameter(weight.clone())
        scope = scope_of(param, bound)
        StructuredOBS(scope, hessian).prune(bound.keep, compensate=mode)
        assert s3.satisfies(param, bound.pattern)
        results[mode] = param.detach()
    damped = Factors(hessian, 1e-4).matrix
    local, full = (loss(results[mode], weight, damped) for mode in ("local", "full"))
    assert full <= local * (1 + 1e-9) + 1e-12
    torch.testing.assert_close(results["split"], results["full"])


@given(matrices, seeds)
def test_one_shot_masks_are_the_cheapest_subsets_of_each_scope(
    bound: BoundPattern, seed: int
) -> None:
    dropped = bound.blocks_per_scope - bound.keep
    assume(dropped > 0 and math.comb(bound.blocks_per_scope, dropped) <= 35)
    product = Product.of(bound)
    assume(not product.spans_rows)
    weight, hessian = layer(*bound.shape, seed)
    factors = Factors(hessian, 1e-4)
    inverse = inverse_of(factors)
    _, mask = one_shot(weight, inverse, factors, product, "local")
    columns = bound.shape[1]
    ids = tile(torch.arange(weight.numel()).view(bound.shape), bound)

    def cost(lost: Tensor) -> float:
        """Of dropping elements, by one inverse for all rows."""
        total = 0.0
        for row in (lost // columns).unique():
            part = lost[lost // columns == row] % columns
            w = weight[row, part]
            total += float(w @ torch.linalg.solve(inverse[part][:, part], w))
        return total

    for scope in ids:
        chosen = cost(scope[~mask.flatten()[scope]])
        best = min(
            cost(scope[list(out)].flatten())
            for out in itertools.combinations(range(bound.blocks_per_scope), dropped)
        )
        assert chosen == pytest.approx(best, rel=1e-7)


@given(seeds, st.sampled_from(("2:4", "pair4:8", "rowpair16", "unstructured@0.5")))
def test_local_compensation_moves_a_scope_by_its_own_inverse(seed: int, pattern: str) -> None:
    weight, hessian = layer(16, 32, seed)
    bound = Pattern.parse(pattern).bind((16, 32))
    param = Parameter(weight.clone())
    obs = StructuredOBS(scope_of(param, bound), hessian)
    obs.prune(bound.keep, compensate="local")
    product = Product.of(bound)
    for row, scope in itertools.product(range(16), product.columns.flatten(1)):
        kept = param.detach()[row, scope] != 0
        lost, left = scope[~kept], scope[kept]
        owed = torch.linalg.solve(obs.inv_h[lost][:, lost], weight[row, lost])
        expected = weight[row, left] - owed @ obs.inv_h[lost][:, left]
        torch.testing.assert_close(param.detach()[row, left], expected, rtol=1e-7, atol=1e-9)


def test_interleaved_masks_see_what_was_pruned_before() -> None:
    weight, hessian = layer(32, 64, 1)
    errors = []
    for mode, splits in (("full", 1), ("interleaved", 1), ("interleaved", 4), ("interleaved", 16)):
        param = Parameter(weight.clone())
        scope = ScopeSpec(BlockSpec(param, (1, 1)), (1, 4))
        StructuredOBS(scope, hessian).prune(2, mode, splits)
        assert s3.satisfies(param, "2:4")
        errors.append(s3.output_error(param, weight, hessian))
    assert errors[0] == pytest.approx(errors[1])
    assert errors[3] < errors[2] < errors[1]


def test_a_given_inverse_is_used() -> None:
    weight, hessian = layer(8, 16)
    first, second = Parameter(weight.clone()), Parameter(weight.clone())
    scopes = [ScopeSpec(BlockSpec(each, (1, 1)), (1, 4)) for each in (first, second)]
    inverse = StructuredOBS.compute_inverse(hessian, damp=1e-4)
    damped = Factors(hessian, 1e-4).matrix
    torch.testing.assert_close(inverse @ damped, torch.eye(16, dtype=torch.float64))
    StructuredOBS(scopes[0], hessian).prune_true_obs(2)
    StructuredOBS(scopes[1], hessian, inv_h=inverse).prune_true_obs(2)
    assert torch.equal(first, second)
    StructuredOBS(scopes[0], Factors(hessian, 0.1)).prune_true_obs(2)


def test_the_first_example_of_the_documentation() -> None:
    torch.manual_seed(0)
    rows, columns = 64, 128
    weight = Parameter(torch.randn(rows, columns))
    x = torch.randn(1024, columns)
    block = BlockSpec(weight, shape=(1, 1))
    scope = ScopeSpec(block, shape=(1, 4))
    StructuredOBS(scope, (x.T @ x) / x.shape[0]).prune_true_obs(nnz=2)
    assert s3.satisfies(weight, "2:4") and int((weight != 0).sum()) == rows * columns // 2


def test_what_cannot_be_pruned_is_refused_and_left_as_it_was() -> None:
    weight, hessian = layer(16, 32)
    param = Parameter(weight.clone())
    scope = ScopeSpec(BlockSpec(param, (1, 1)), (1, 4))
    obs = StructuredOBS(scope, hessian)
    cases = [
        (PatternError, "keep", lambda: obs.prune_true_obs(0)),
        (PatternError, "keep", lambda: obs.prune_true_obs(5)),
        (PatternError, "chunk_size", lambda: obs.prune_true_obs(2, chunk_size=0)),
        (PrunerError, "order", lambda: obs.prune_true_obs(2, order="smallest_first")),
        (PrunerError, "scoring", lambda: obs.prune_true_obs(2, scoring="both")),
        (PrunerError, "ng", lambda: obs.prune_true_obs(2, ng=0)),
        (PrunerError, "local, full", lambda: obs.prune(2, "global")),
        (PrunerError, "8 scopes", lambda: obs.prune(2, "interleaved", 9)),
        (HessianError, "inv_h", lambda: StructuredOBS(scope, hessian, inv_h=hessian[:4])),
        (HessianError, "inv_h", lambda: StructuredOBS(scope, hessian, inv_h=hessian * math.nan)),
        (HessianError, "16", lambda: StructuredOBS(scope, hessian[:16, :16])),
        (HessianError, "symmetric", lambda: StructuredOBS(scope, hessian.triu())),
        (
            HessianError,
            "singular",
            lambda: StructuredOBS(scope, torch.ones(32, 32), damp=0.0).prune_true_obs(2),
        ),
        (PatternError, "one weight", lambda: StructuredOBS(BlockCoupling([scope.block]), hessian)),
        (
            PatternError,
            "one weight",
            lambda: StructuredOBS(ScopeSpec(BlockCoupling([scope.block]), (1, 4)), hessian),
        ),
        (
            PatternError,
            "out_features",
            lambda: StructuredOBS(
                ScopeSpec(BlockSpec(torch.ones(2, 4, 4), (1, 1, 1)), ()), hessian
            ),
        ),
        (
            PrunerError,
            "joint",
            lambda: s3.prune.obs(weight, hessian, "unstructured@0.5", scoring="joint"),
        ),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
    assert torch.equal(param.detach(), weight)
    with torch.no_grad():
        param[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="NaN"):
        obs.prune_true_obs(2)
    assert torch.equal(param.detach()[1:], weight[1:])
