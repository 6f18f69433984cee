"""Laws of views, blocks, scopes and couplings bound to parameters, with enumeration and scipy as oracles."""

from __future__ import annotations

import itertools
import math

import einops
import numpy
import pytest
import scipy.optimize
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

import s3tensor as s3
from s3tensor import (
    BlockCoupling,
    BlockSpec,
    NonFiniteError,
    PatternError,
    ScopeCoupling,
    ScopeSpec,
    SparsityBuilder,
    View,
)
from s3tensor.mask.projection import tile
from s3tensor.pattern import BoundPattern
from s3tensor.testing import bound_patterns, weights

small = bound_patterns(max_elements=256)
seeds = st.integers(0, 2**16)


def laid_out(values: Tensor, kind: str) -> Parameter:
    """A parameter of the same values: contiguous, behind an offset, transposed, or a slice with gaps."""
    shape = values.shape
    if kind == "offset":
        base = torch.full((values.numel() + 5,), 9.0)
        made = base[5:].view(shape)
    elif kind == "transposed":
        made = torch.empty(shape[::-1]).permute(*reversed(range(len(shape))))
    elif kind == "sliced":
        made = torch.full([2 * n for n in shape], 9.0)[tuple(slice(1, 1 + n) for n in shape)]
    else:
        made = torch.empty(shape)
    made.copy_(values)
    return Parameter(made)


layouts = st.sampled_from(("contiguous", "offset", "transposed", "sliced"))


def scope_of(param: Tensor, bound: BoundPattern) -> ScopeSpec:
    """The structure of a bound pattern over a parameter of its shape, whatever its strides."""
    rule = str(bound.pattern.rule)
    view = View.from_rule(param, rule, dict(bound.pattern.sizes))
    return ScopeSpec(BlockSpec(view, bound.block), bound.scope)


# Views -----------------------------------------------------------------------------------------


@given(small, layouts)
def test_a_view_of_a_rule_is_einops_rearrange(bound: BoundPattern, kind: str) -> None:
    values = torch.arange(math.prod(bound.shape), dtype=torch.float32).reshape(bound.shape)
    param = laid_out(values, kind)
    view = View.from_rule(param, str(bound.pattern.rule), dict(bound.pattern.sizes))
    expected = einops.rearrange(values, str(bound.pattern.rule), **_sizes(bound))
    assert torch.equal(view.data, expected)
    assert torch.equal(view.of(values), expected)
    assert torch.equal(view.to_param(expected), values)


def _sizes(bound: BoundPattern) -> dict[str, int]:
    names = bound.pattern.rule.outputs
    return dict(zip(names, bound.view.shape, strict=True))


@given(small, layouts)
def test_a_view_of_a_view_composes_rules(bound: BoundPattern, kind: str) -> None:
    values = torch.arange(math.prod(bound.shape), dtype=torch.float32).reshape(bound.shape)
    inner = View.from_rule(
        laid_out(values, kind), str(bound.pattern.rule), dict(bound.pattern.sizes)
    )
    names = [f"x{i}" for i in range(inner.ndim)]
    halves = next((i for i, n in enumerate(inner.shape) if n % 2 == 0), None)
    assume(halves is not None)
    left = " ".join(f"(h {n})" if i == halves else n for i, n in enumerate(names))
    rule = f"{left} -> h {' '.join(reversed(names))}"
    outer = View.from_rule(inner, rule, {"h": 2})
    assert torch.equal(outer.data, einops.rearrange(inner.data, rule, h=2))


@given(small, layouts, seeds)
def test_a_view_writes_through_and_stays_live(bound: BoundPattern, kind: str, seed: int) -> None:
    param = laid_out(torch.zeros(bound.shape), kind)
    view = View.from_rule(param, str(bound.pattern.rule), dict(bound.pattern.sizes))
    values = torch.randn(view.shape, generator=torch.Generator().manual_seed(seed))
    view.data.copy_(values)
    assert torch.equal(param.detach(), view.to_param(values))
    with torch.no_grad():
        param.mul_(2)
    assert torch.equal(view.data, 2 * values)


def test_a_view_by_strides_starts_at_the_parameter() -> None:
    base = torch.arange(64.0)
    weight = base[32:].view(2, 16)
    view = View(weight, (2, 8, 2), (16, 1, 8))
    assert torch.equal(view.data, base[32:].as_strided((2, 8, 2), (16, 1, 8), 32))
    assert View(weight, (16,), (1,), offset=16).data.tolist() == base[48:].tolist()


def test_a_view_follows_a_parameter_whose_data_is_replaced() -> None:
    weight = Parameter(torch.zeros(4, 8))
    view = View(weight, (8, 4), (1, 8))
    weight.data = torch.arange(32.0).reshape(4, 8)
    assert torch.equal(view.data, weight.detach().T)
    weight.data = torch.zeros(8, 4).T
    with pytest.raises(PatternError, match="make the view again"):
        view.data  # noqa: B018


def test_a_view_moves_with_its_parameters_dtype() -> None:
    weight = Parameter(torch.arange(32.0).reshape(4, 8))
    view = View(weight, (8, 4), (1, 8))
    weight.data = weight.data.to(torch.bfloat16)
    assert view.data.dtype == view.dtype == torch.bfloat16


SLICE = torch.zeros(8, 32)[:, :16]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        pytest.param(lambda: View(torch.zeros(4, 4), (4, 4), (1, 1)), "twice", id="overlap"),
        pytest.param(lambda: View(torch.zeros(4, 4), (4, 4), (4, 0)), "twice", id="stride 0"),
        pytest.param(lambda: View(torch.zeros(4, 4), (3, 3), (2, 4)), "twice", id="interleaved"),
        pytest.param(lambda: View(torch.zeros(4, 4), (4, 5), (4, 1)), "twice", id="too wide"),
        pytest.param(lambda: View(torch.zeros(4, 4), (5, 4), (4, 1)), "16", id="out of bounds"),
        pytest.param(lambda: View(torch.zeros(4, 4), (4, 4), (4, 1), 1), "16", id="offset"),
        pytest.param(lambda: View(torch.zeros(4, 4), (4, 4), (4, -1)), "-1", id="negative stride"),
        pytest.param(lambda: View(torch.zeros(4, 4), (4, 4), (4, 1), -1), "-1", id="before it"),
        pytest.param(lambda: View(torch.zeros(4, 4), (4, 4), (4,)), "stride", id="ranks"),
        pytest.param(lambda: View(torch.zeros(4, 4), (4, 0), (4, 1)), "0", id="empty view"),
        pytest.param(lambda: View(SLICE, (8, 32), (32, 1)), "bounds|element", id="past a slice"),
        pytest.param(lambda: View(SLICE, (4, 32), (32, 1)), "between", id="in a slice's gaps"),
        pytest.param(lambda: View(torch.zeros(0, 4), (1,), (1,)), "empty", id="empty parameter"),
        pytest.param(lambda: BlockSpec(torch.zeros(4, 0), (1, 1)), "empty", id="empty weight"),
        pytest.param(lambda: BlockSpec(torch.zeros(4, 4).int(), (1, 1)), "float", id="int weight"),
        pytest.param(lambda: BlockSpec(torch.eye(4).to_sparse(), (1, 1)), "dense", id="sparse"),
        pytest.param(
            lambda: BlockSpec(s3.StructuredSparseTensor.from_dense(torch.eye(4), "2:4"), (1, 1)),
            "dense",
            id="compressed",
        ),
        pytest.param(
            lambda: View.from_rule(torch.zeros(4, 6), "m (t p) -> m p t", {"p": 4}),
            "multiple of 4",
            id="rule that does not fit",
        ),
        pytest.param(
            lambda: View.from_rule(torch.zeros(4, 6), "m (t p) -> m p t"), "open", id="open sizes"
        ),
        pytest.param(lambda: BlockSpec(torch.zeros(4, 6), (1, 4)), "tile", id="block"),
        pytest.param(lambda: BlockSpec(torch.zeros(4, 6), (1,)), "2 dims", id="block of a rank"),
        pytest.param(lambda: BlockSpec(torch.zeros(4, 6), (0, 1)), ">= 1", id="block of zero"),
        pytest.param(
            lambda: ScopeSpec(BlockSpec(torch.zeros(4, 6), (1, 1)), (1, 4)), "tile", id="scope"
        ),
        pytest.param(
            lambda: ScopeSpec(BlockSpec(torch.zeros(4, 6), (1, 1)), (1, 1, 1)), "dims", id="rank"
        ),
    ],
)
def test_what_has_no_meaning_is_refused_when_it_is_made(build, message: str) -> None:
    with pytest.raises(PatternError, match=message):
        build()


@pytest.mark.parametrize("made", [[[1.0]], None, "weight"])
def test_a_spec_of_no_tensor_is_a_type_error(made: object) -> None:
    with pytest.raises(TypeError, match="parameter or a View"):
        BlockSpec(made, (1, 1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="BlockSpec or a BlockCoupling"):
        ScopeSpec(made, (1, 1))  # type: ignore[arg-type]


# Blocks and scopes -----------------------------------------------------------------------------


@given(small, layouts)
def test_blocks_tile_the_view_and_scopes_the_blocks(bound: BoundPattern, kind: str) -> None:
    count = math.prod(bound.shape)
    param = laid_out(torch.arange(count, dtype=torch.float32).reshape(bound.shape), kind)
    scope = scope_of(param, bound)
    block = scope.block
    assert block.numblk() * block.numel_per_block() == block.numel() == count
    assert scope.numscp() * scope.numblk_per_scope() == scope.numblk() == block.numblk()
    assert scope.numel_per_scope() == block.numel_per_block() * scope.numblk_per_scope()
    in_blocks = block.block_view(merge=True)
    assert sorted(in_blocks.flatten().tolist()) == list(range(count)), "one block an element"
    numbers = torch.arange(block.numblk(), dtype=torch.float32).reshape(block.grid_shape)
    in_scopes = scope.block_to_scope(numbers, merge=True)
    assert sorted(in_scopes.flatten().tolist()) == list(range(block.numblk())), "one scope a block"


@given(small, layouts)
def test_tiles_of_specs_are_tiles_of_the_bound_pattern(bound: BoundPattern, kind: str) -> None:
    values = torch.arange(math.prod(bound.shape), dtype=torch.float32).reshape(bound.shape)
    scope = scope_of(laid_out(values, kind), bound)
    ids = scope.block.tiles()
    by_scope = torch.stack(
        [scope.block_to_scope(each, merge=True) for each in ids.unbind(-1)], dim=-1
    )
    shape = (bound.scopes, bound.blocks_per_scope, bound.block_size)
    assert torch.equal(by_scope.reshape(shape), tile(values, bound))


@given(small, layouts)
def test_views_of_blocks_hold_the_same_elements(bound: BoundPattern, kind: str) -> None:
    values = torch.arange(math.prod(bound.shape), dtype=torch.float32).reshape(bound.shape)
    block = scope_of(laid_out(values, kind), bound).block
    split = block.block_view()
    assert split.shape == block.grid_shape + block.shape
    assert torch.equal(split.flatten(block.ndim), block.block_view(merge=True))
    interleaved = block.block_view(reorder=False)
    for dim in range(block.ndim):
        assert interleaved.shape[2 * dim : 2 * dim + 2] == (block.grid_shape[dim], block.shape[dim])
    assert torch.equal(interleaved.reshape(block.view.shape), block.data)
    split.fill_(7.0)
    assert bool((block.data == 7.0).all()), "a view of blocks writes through"


@given(small)
def test_scope_to_block_undoes_block_to_scope(bound: BoundPattern) -> None:
    scope = scope_of(torch.zeros(bound.shape), bound)
    numbers = torch.arange(scope.numblk()).reshape(scope.block.grid_shape)
    for merge in (False, True):
        assert torch.equal(
            scope.scope_to_block(scope.block_to_scope(numbers, merge=merge)), numbers
        )
    spread = scope.scope_to_block(torch.arange(scope.numscp()).reshape(scope.grid_shape))
    merged = scope.block_to_scope(spread, merge=True)
    assert bool((merged == merged[..., :1]).all()), "a scope's value reaches all its blocks"
    assert len(spread.unique()) == scope.numscp()


@given(small, st.sampled_from((0.0, 0.5, 1.0, 2.0, 3.0, math.inf)), seeds)
def test_norms_are_norms_of_the_block_alone(bound: BoundPattern, p: float, seed: int) -> None:
    values = torch.randn(bound.shape, generator=torch.Generator().manual_seed(seed))
    block = scope_of(values, bound).block
    expected = torch.stack(
        [torch.linalg.vector_norm(each, p) for each in block.tiles().flatten(0, -2)]
    )
    torch.testing.assert_close(block.norms(p=p).flatten(), expected)
    assert torch.equal(block.norms(values=block.data * 2, p=2), block.norms() * 2)
    assert torch.equal(block.min(), block.reduce(None, lambda tiles: tiles.min(-1).values))
    assert torch.equal(block.max(), -block.min(-block.data))


@given(small, seeds)
def test_masks_zero_where_true_and_multipliers_scale(bound: BoundPattern, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(bound.shape, generator=generator)
    param = Parameter(values.clone())
    block = scope_of(param, bound).block
    mask = torch.rand(block.grid_shape, generator=generator) < 0.5
    spread = block.view.to_param(block.broadcast_block_to_element(mask))
    block.apply_mask(mask)
    assert torch.equal(param.detach(), values.masked_fill(spread, 0.0))
    assert block.nnz() == int((~spread).sum())
    block.set_data(block.view.of(values))
    factor = torch.randn(block.grid_shape, generator=generator)
    block.apply_multiplier(factor)
    expected = values * block.view.to_param(block.broadcast_block_to_element(factor))
    assert torch.equal(param.detach(), expected)


def test_a_masked_block_is_zero_whatever_it_held() -> None:
    weight = torch.tensor([[math.nan, math.inf], [1.0, 2.0]])
    BlockSpec(weight, (1, 2)).apply_mask(torch.tensor([[True], [False]]))
    assert weight.tolist() == [[0.0, 0.0], [1.0, 2.0]]


@given(small, layouts, st.data())
def test_hard_threshold_is_project(bound: BoundPattern, kind: str, data: st.DataObject) -> None:
    weight = data.draw(weights(bound.shape))
    param = laid_out(weight, kind)
    scope = scope_of(param, bound)
    mask = s3.project(weight, bound.pattern)
    (element_mask,) = scope.get_masks(nnz=bound.keep).values()
    assert torch.equal(scope.block.view.to_param(element_mask), mask)
    scope.hard_threshold(nnz=bound.keep)
    assert torch.equal(param.detach(), torch.where(mask, weight, 0.0))


@given(small, layouts)
def test_specs_and_patterns_turn_into_each_other(bound: BoundPattern, kind: str) -> None:
    param = laid_out(torch.zeros(bound.shape), kind)
    scope = scope_of(param, bound)
    again = scope.bind(bound.keep)
    assert (again.block, again.scope, again.keep) == (bound.block, bound.scope, bound.keep)
    assert again.view.shape == bound.view.shape
    assert again.view.offsets() == bound.view.offsets()
    if bound.pattern.view is None and -1 not in (*bound.pattern.block, *bound.pattern.scope):
        assert scope.pattern(bound.keep) == s3.Pattern(
            block=bound.block, scope=bound.scope, keep=bound.keep
        )


@given(bound_patterns(max_elements=64), seeds)
def test_hard_threshold_is_the_nearest_point(bound: BoundPattern, seed: int) -> None:
    assume(math.comb(bound.blocks_per_scope, bound.keep) <= 70)
    values = torch.randn(bound.shape, generator=torch.Generator().manual_seed(seed)).double()
    scope = scope_of(values.clone(), bound)
    energy = scope.block_to_scope(scope.block.norms() ** 2, merge=True).flatten(0, -2)
    least = sum(
        min(
            float(row.sum() - row[list(kept)].sum())
            for kept in itertools.combinations(range(bound.blocks_per_scope), bound.keep)
        )
        for row in energy
    )
    scope.hard_threshold(nnz=bound.keep)
    left = scope.block.view.to_param(scope.block.data)
    assert float((left - values).square().sum()) == pytest.approx(least, abs=1e-12)


@given(small, seeds)
def test_the_kth_largest_norm_is_the_threshold_that_keeps_k(bound: BoundPattern, seed: int) -> None:
    values = torch.randn(bound.shape, generator=torch.Generator().manual_seed(seed))
    assume(len(scope_of(values, bound).block_norms().unique()) == scope_of(values, bound).numblk())
    by_count, by_kth, by_mid = (scope_of(values.clone(), bound) for _ in range(3))
    by_count.hard_threshold(nnz=bound.keep)
    by_kth.hard_threshold(thresholds=by_kth.kth_largest(nnz=bound.keep))
    assert torch.equal(by_kth.block.data, by_count.block.data)
    if bound.keep < bound.blocks_per_scope:
        by_mid.hard_threshold(thresholds=by_mid.kth_mid(nnz=bound.keep))
        assert torch.equal(by_mid.block.data, by_count.block.data)


def test_missing_and_negative_entries_of_a_scope_are_whole_dims() -> None:
    block = BlockSpec(torch.zeros(8, 12), (2, -1))
    assert block.shape == (2, 12) and block.grid_shape == (4, 1)
    fine = BlockSpec(torch.zeros(8, 12), (2, 3))
    assert [ScopeSpec(fine, shape).grid_shape for shape in [(1,), (2,), (-1,), (2, -1), ()]] == [
        (4, 1),
        (2, 1),
        (1, 1),
        (2, 1),
        (1, 1),
    ]


@given(st.integers(1, 64), st.integers(0, 64))
@example(n=10, pruned=7)
def test_sparsity_to_nnz_counts_what_is_kept(n: int, pruned: int) -> None:
    assume(pruned <= n)
    scope = ScopeSpec(BlockSpec(torch.zeros(2, n), (1, 1)), (1, -1))
    assert scope.sparsity_to_nnz(pruned / n) == n - pruned
    with pytest.raises(PatternError, match="share"):
        scope.sparsity_to_nnz(1.5)


@pytest.mark.parametrize("nnz", [5, -1, 1.5, True, None])
def test_a_budget_beyond_the_blocks_is_refused(nnz: object) -> None:
    weight = torch.ones(4, 8)
    scope = ScopeSpec(BlockSpec(weight, (1, 1)), (1, 4))
    with pytest.raises(PatternError):
        scope.hard_threshold(nnz=nnz)  # type: ignore[arg-type]
    with pytest.raises(PatternError):
        scope.get_masks(nnz=nnz)  # type: ignore[arg-type]
    with pytest.raises(PatternError):
        scope.pattern(nnz)  # type: ignore[arg-type]
    assert bool((weight == 1).all())


def test_a_budget_of_none_or_all() -> None:
    weight = torch.randn(4, 8)
    scope = ScopeSpec(BlockSpec(weight, (1, 1)), (1, 4))
    before = weight.clone()
    scope.hard_threshold(nnz=4)
    assert torch.equal(weight, before)
    scope.hard_threshold(nnz=0)
    assert not weight.any()


def test_what_does_not_fit_a_call_is_refused_and_changes_nothing() -> None:
    weight = torch.randn(4, 8)
    before = weight.clone()
    block = BlockSpec(weight, (1, 2))
    scope = ScopeSpec(block, (1, 2))
    for call in (
        lambda: block.norms(torch.zeros(8, 4)),
        lambda: block.norms(p=-1),
        lambda: block.norms({}),
        lambda: block.apply_mask(torch.zeros(4, 8, dtype=torch.bool)),
        lambda: block.apply_mask(torch.zeros(4, 4)),
        lambda: block.apply_multiplier(torch.zeros(4)),
        lambda: block.hard_threshold(torch.zeros(4, 8)),
        lambda: block.soft_threshold(torch.full((4, 4), -1.0)),
        lambda: block.soft_threshold(torch.zeros(4, 4), conditioners=torch.full((4, 8), -1.0)),
        lambda: block.soft_threshold(torch.zeros(4, 4), conditioners=torch.ones(4, 8), max_iter=0),
        lambda: block.reduce(None, lambda tiles: tiles),
        lambda: block.set_data(torch.zeros(8, 4)),
        lambda: scope.hard_threshold(),
        lambda: scope.hard_threshold(thresholds=torch.zeros(4, 2), nnz=1),
        lambda: scope.hard_threshold(thresholds=torch.zeros(4, 4)),
        lambda: scope.kth_largest(nnz=3),
        lambda: scope.kth_mid(nnz=2),
        lambda: scope.get_masks(nnz=1, block_scores=torch.zeros(4, 4)),
        lambda: scope.get_masks(nnz=1, block_scores=torch.full((4, 2, 2), math.nan)),
        lambda: scope.block_to_scope(torch.zeros(4, 8)),
        lambda: scope.scope_to_block(torch.zeros(4, 4)),
    ):
        with pytest.raises(PatternError):
            call()
    assert torch.equal(weight, before)
    weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError):
        scope.hard_threshold(nnz=1)


# Soft thresholds -------------------------------------------------------------------------------


def nearest(v: numpy.ndarray, t: float, d: numpy.ndarray) -> numpy.ndarray:
    """The minimiser of ``(x - v)' D (x - v) / 2 + t ||x||`` by scipy: smooth but at 0, which is tried too."""

    def objective(x: numpy.ndarray) -> float:
        return float(0.5 * numpy.sum(d * (x - v) ** 2) + t * numpy.linalg.norm(x))

    def slope(x: numpy.ndarray) -> numpy.ndarray:
        return d * (x - v) + t * x / max(numpy.linalg.norm(x), 1e-300)

    found = scipy.optimize.minimize(
        objective, v, jac=slope, method="BFGS", options={"gtol": 1e-9}
    ).x
    zero = numpy.zeros_like(v)
    return zero if objective(zero) <= objective(found) + 1e-12 else found


values = st.floats(-4, 4, width=16)


@given(st.lists(values, min_size=1, max_size=4), st.floats(0, 5), st.data())
@example([0.0, 0.0], 0.0, None)
@example([0.0, 0.0], 1.0, None)
@example([3.0, 4.0], 5.0, None)
def test_soft_threshold_is_a_convex_solvers_answer(
    v: list[float], t: float, data: st.DataObject | None
) -> None:
    d = (
        [1.0] * len(v)
        if data is None
        else data.draw(st.lists(st.floats(0.05, 8), min_size=len(v), max_size=len(v)))
    )
    point = torch.tensor([v], dtype=torch.float64)
    for curvature in ([1.0] * len(v), d):
        weight = point.clone()
        block = BlockSpec(weight, (1, -1))
        conditioners = None if curvature is not d else torch.tensor([d], dtype=torch.float64)
        block.soft_threshold(torch.tensor([[t]], dtype=torch.float64), conditioners=conditioners)
        expected = nearest(point[0].numpy(), t, numpy.array(curvature))
        numpy.testing.assert_allclose(weight[0].numpy(), expected, atol=2e-6)


@given(st.lists(values, min_size=1, max_size=6), st.floats(0, 9), st.data())
def test_a_conditioned_soft_threshold_meets_its_optimality(
    v: list[float], t: float, data: st.DataObject
) -> None:
    d = data.draw(st.lists(st.floats(0, 100), min_size=len(v), max_size=len(v)))
    point, curvature = torch.tensor(v, dtype=torch.float64), torch.tensor(d, dtype=torch.float64)
    weight = point.clone()
    BlockSpec(weight, (-1,)).soft_threshold(torch.tensor([t], dtype=torch.float64), curvature)
    pull = curvature * (point - weight)
    if t == 0:
        assert torch.equal(weight, point)
    elif bool((weight == 0).all()):
        assert float(torch.linalg.vector_norm(curvature * point)) <= t * (1 + 1e-9)
    else:
        # D (v - x) = t x / ||x||
        gradient = t * weight / torch.linalg.vector_norm(weight)
        scale = 1e-6 * t + 1e-12 * float((curvature * point).abs().max())
        torch.testing.assert_close(pull, gradient, rtol=1e-6, atol=scale)


@given(st.lists(values, min_size=1, max_size=6), st.floats(0, 9), st.floats(0.01, 100))
def test_a_uniform_conditioner_divides_the_threshold(v: list[float], t: float, d: float) -> None:
    plain, conditioned = torch.tensor(v, dtype=torch.float64), torch.tensor(v, dtype=torch.float64)
    BlockSpec(plain, (-1,)).soft_threshold(torch.tensor([t / d], dtype=torch.float64))
    BlockSpec(conditioned, (-1,)).soft_threshold(
        torch.tensor([t], dtype=torch.float64), torch.full((len(v),), d, dtype=torch.float64)
    )
    torch.testing.assert_close(conditioned, plain, rtol=1e-9, atol=1e-9)


def test_bisection_stops_within_its_tolerance_and_iterations() -> None:
    v = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).double()
    d = torch.rand(64, 8, generator=torch.Generator().manual_seed(1)).double() + 0.1
    results = []
    for options in ({}, {"atol": 1e-3}, {"max_iter": 1}):
        weight = v.clone()
        BlockSpec(weight, (1, -1)).soft_threshold(torch.full((64, 1), 0.3), d, **options)
        results.append(weight)
    exact, rough, once = results
    assert 0 < float((rough - exact).abs().max()) < 2e-2
    assert float((once - exact).abs().max()) > float((rough - exact).abs().max())


@given(small, seeds, st.booleans())
def test_scopes_soft_threshold_each_block_by_its_scopes_value(
    bound: BoundPattern, seed: int, scale: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(bound.shape, generator=generator).double()
    scope = scope_of(weight, bound)
    before = scope.block.norms()
    limit = torch.rand(scope.grid_shape, generator=generator).double()
    scope.soft_threshold(limit, scale=scale)
    factor = math.sqrt(bound.block_size) if scale else 1.0
    expected = (before - scope.scope_to_block(limit) * factor).clamp_min(0.0)
    torch.testing.assert_close(scope.block.norms(), expected, rtol=1e-9, atol=1e-12)


def test_eps_is_added_to_the_conditioners() -> None:
    v, d = torch.randn(8).double(), torch.rand(8).double()
    with_eps, added = v.clone(), v.clone()
    BlockSpec(with_eps, (-1,)).soft_threshold(torch.tensor([0.1]), d, eps=0.5)
    BlockSpec(added, (-1,)).soft_threshold(torch.tensor([0.1]), d + 0.5)
    assert torch.equal(with_eps, added) and not torch.equal(added, v)


# Couplings -------------------------------------------------------------------------------------


def mlp(channels: int = 6, width: int = 4, seed: int = 0) -> tuple[list[Parameter], BlockCoupling]:
    """Gate and up rows with down columns."""
    generator = torch.Generator().manual_seed(seed)
    gate, up = (Parameter(torch.randn(channels, width, generator=generator)) for _ in range(2))
    down = Parameter(torch.randn(width, channels, generator=generator))
    coupling = BlockCoupling(
        [BlockSpec(gate, (1, -1)), BlockSpec(up, (1, -1)), BlockSpec(down, (-1, 1))],
        orders=[(0, 1), (0, 1), (1, 0)],
    )
    return [gate, up, down], coupling


@given(st.integers(1, 8), st.integers(1, 5), seeds, st.data())
def test_coupled_blocks_are_pruned_together(
    channels: int, width: int, seed: int, data: st.DataObject
) -> None:
    (gate, up, down), coupling = mlp(channels, width, seed)
    assert coupling.grid_shape == (channels, 1)
    assert coupling.numel_per_block() == 3 * width and coupling.numel() == 3 * width * channels
    joint = torch.cat([gate, up, down.T], dim=1).detach()
    torch.testing.assert_close(coupling.norms().squeeze(1), torch.linalg.vector_norm(joint, dim=1))
    assert torch.equal(coupling.block_view().squeeze(1), joint)
    keep = data.draw(st.integers(0, channels))
    scope = ScopeSpec(coupling, (-1,))
    masks = scope.get_masks(nnz=keep)
    scope.hard_threshold(nnz=keep)
    left = [(gate != 0).any(1), (up != 0).any(1), (down != 0).any(0)]
    for mine, spec in zip(left, coupling.blocks(), strict=True):
        assert torch.equal(mine, left[0]) and int(mine.sum()) == keep
        assert torch.equal(masks[spec], spec.data != 0)


def test_a_coupling_reads_and_writes_every_tensor() -> None:
    params, coupling = mlp()
    data = {spec: torch.randn(spec.data.shape) for spec in coupling.blocks()}
    coupling.set_data(data)
    for param, expected in zip(params, data.values(), strict=True):
        assert torch.equal(param.detach(), expected)
    ones = {spec: torch.ones_like(spec.data) for spec in coupling.blocks()}
    assert torch.equal(coupling.norms(ones, p=1), torch.full((6, 1), 12.0))
    factor = torch.arange(6.0).reshape(6, 1)
    coupling.apply_multiplier(factor)
    for spec, spread in coupling.broadcast_block_to_element(factor).items():
        assert torch.equal(spec.data, data[spec] * spread)
    before = coupling.norms()
    coupling.soft_threshold(torch.full((6, 1), 0.5))
    torch.testing.assert_close(coupling.norms(), (before - 0.5).clamp_min(0))
    params, coupling = mlp()
    coupling.soft_threshold(
        torch.full((6, 1), 0.5), {spec: torch.ones_like(spec.data) for spec in coupling.blocks()}
    )
    params_again, plain = mlp()
    plain.soft_threshold(torch.full((6, 1), 0.5))
    for one, other in zip(params, params_again, strict=True):
        torch.testing.assert_close(one, other)


def test_grouped_heads_are_blocks_of_views_with_one_grid() -> None:
    heads, groups, size, width = 4, 2, 3, 5
    q, o = torch.randn(heads * size, width), torch.randn(width, heads * size)
    k, v = (torch.randn(groups * size, width) for _ in range(2))
    rows = heads // groups * size
    coupling = BlockCoupling(
        [
            BlockSpec(q, (rows, -1)),
            BlockSpec(k, (size, -1)),
            BlockSpec(v, (size, -1)),
            BlockSpec(o, (-1, rows)),
        ],
        orders=[None, None, None, (1, 0)],
    )
    ScopeSpec(coupling, (-1,)).hard_threshold(nnz=1)
    group = int((k != 0).any(1).nonzero()[0]) // size
    assert torch.equal((q != 0).any(1).nonzero().flatten(), torch.arange(rows) + group * rows)
    assert torch.equal((o != 0).any(0), (q != 0).any(1))


def test_a_coupling_of_couplings_composes_orders() -> None:
    a, b, c = torch.randn(2, 3), torch.randn(3, 2), torch.randn(3, 2)
    inner = BlockCoupling([BlockSpec(a, (1, 1)), BlockSpec(b, (1, 1))], [(0, 1), (1, 0)])
    outer = BlockCoupling([inner, BlockSpec(c, (1, 1))], [(1, 0), (0, 1)])
    assert outer.grid_shape == (3, 2)
    assert torch.equal(outer.block_view(), torch.stack([a.T, b, c], dim=-1))


@given(st.integers(1, 4), st.integers(1, 3), seeds, st.data())
def test_coupled_scopes_share_one_budget(
    rows: int, scopes: int, seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, 4 * scopes, generator=generator)
    b = torch.randn(2 * scopes, rows, generator=generator)
    coupling = ScopeCoupling(
        [
            ScopeSpec(BlockSpec(a, (1, 1)), (1, 4)),
            ScopeSpec(BlockSpec(b, (1, 1)), (2, 1)),
        ],
        orders=[(0, 1), (1, 0)],
    )
    assert coupling.grid_shape == (rows, scopes) and coupling.numblk_per_scope() == 6
    joint = torch.cat([a.view(rows, scopes, 4), b.T.reshape(rows, scopes, 2)], dim=-1)
    assert torch.equal(coupling.block_norms(), joint.abs())
    keep = data.draw(st.integers(1, 6))
    assert torch.equal(coupling.kth_largest(keep), joint.abs().topk(keep).values[..., -1])
    assert torch.equal(coupling.kth_largest(nnz=keep), coupling.kth_largest(k=keep))
    masks = coupling.get_masks(nnz=keep)
    coupling.hard_threshold(nnz=keep)
    after = torch.cat([a.view(rows, scopes, 4), b.T.reshape(rows, scopes, 2)], dim=-1)
    kept = torch.zeros_like(joint, dtype=torch.bool)
    kept.scatter_(-1, joint.abs().topk(keep).indices, True)
    assert torch.equal(after, torch.where(kept, joint, 0.0))
    for spec, mask in masks.items():
        assert torch.equal(mask, spec.data != 0)


def test_coupled_scopes_of_several_scales_keep_the_largest_blocks() -> None:
    huge, tiny = (
        torch.full((1, 2), 1e200, dtype=torch.float64),
        torch.full((1, 2), 1e-200, dtype=torch.float64),
    )
    scopes = [ScopeSpec(BlockSpec(each, (1, 2)), (-1,)) for each in (tiny, huge)]
    ScopeCoupling(scopes).hard_threshold(nnz=1)
    assert bool((huge == 1e200).all()) and not tiny.any()


def grid(rows: int, columns: int) -> BlockSpec:
    return BlockSpec(torch.zeros(rows, columns), (1, 1))


SHARED = torch.zeros(4, 4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        pytest.param(lambda: BlockCoupling([grid(2, 4), grid(4, 2)]), "differ", id="grids"),
        pytest.param(
            lambda: BlockCoupling([grid(2, 4), grid(4, 2)], [(0, 1), (1, 1)]),
            "permutation",
            id="repeated axis",
        ),
        pytest.param(
            lambda: BlockCoupling([grid(2, 4)], [(0, 2)]), "permutation", id="no such axis"
        ),
        pytest.param(lambda: BlockCoupling([grid(2, 4)], [(0,)]), "permutation", id="short"),
        pytest.param(lambda: BlockCoupling([grid(2, 4)], [(0, 1)] * 2), "one for each", id="count"),
        pytest.param(lambda: BlockCoupling([]), "at least one", id="nothing"),
        pytest.param(
            lambda: BlockCoupling([BlockSpec(SHARED, (1, 1)), BlockSpec(SHARED, (1, 1))]),
            "share memory",
            id="one tensor twice",
        ),
        pytest.param(
            lambda: BlockCoupling([BlockSpec(SHARED[:3], (1, 1)), BlockSpec(SHARED[1:], (1, 1))]),
            "share memory",
            id="slices that overlap",
        ),
        pytest.param(
            lambda: ScopeCoupling(
                [ScopeSpec(grid(2, 4), (1, 4)), ScopeSpec(grid(4, 2), (1, 2))],
            ),
            "differ",
            id="grids of scopes",
        ),
        pytest.param(
            lambda: ScopeCoupling([ScopeSpec(grid(2, 4), (1, 4))], [(1, 1)]),
            "permutation",
            id="order of scopes",
        ),
        pytest.param(
            lambda: ScopeCoupling([ScopeSpec(BlockSpec(SHARED, (1, 1)), (1, 4))] * 2),
            "share memory",
            id="one scope twice",
        ),
        pytest.param(
            lambda: ScopeSpec(mlp()[1], (1,)).pattern(1), "several tensors", id="no one pattern"
        ),
        pytest.param(
            lambda: ScopeSpec(BlockSpec(View(SHARED, (16,), (1,)), (1,)), (4,)).pattern(2),
            "split and permutation",
            id="dims joined",
        ),
        pytest.param(
            lambda: ScopeSpec(BlockSpec(View(SHARED, (2, 4), (4, 1)), (1, 1)), (1, 4)).pattern(2),
            "leaves elements out",
            id="a part",
        ),
    ],
)
def test_couplings_without_meaning_are_refused_when_they_are_made(build, message: str) -> None:
    with pytest.raises(PatternError, match=message):
        build()


def test_parts_of_one_tensor_can_be_coupled() -> None:
    fused = torch.randn(12, 4)
    gate, up = View(fused, (6, 4), (4, 1)), View(fused, (6, 4), (4, 1), offset=24)
    coupling = BlockCoupling([BlockSpec(gate, (1, -1)), BlockSpec(up, (1, -1))])
    joint = torch.linalg.vector_norm(torch.cat([fused[:6], fused[6:]], dim=1), dim=1)
    torch.testing.assert_close(coupling.norms().squeeze(1), joint)
    # Interleaved rows lie within each other's spans and share nothing.
    even, odd = View(fused, (6, 4), (8, 1)), View(fused, (6, 4), (8, 1), offset=4)
    BlockCoupling([BlockSpec(even, (1, -1)), BlockSpec(odd, (1, -1))]).apply_mask(
        torch.ones(6, 1, dtype=torch.bool)
    )
    assert not fused.any()


# The builder, and the whole --------------------------------------------------------------------


def test_a_builder_names_what_it_builds() -> None:
    up, down = Parameter(torch.randn(6, 4)), Parameter(torch.randn(4, 6))
    other = Parameter(torch.randn(6, 4))
    builder = (
        SparsityBuilder()
        .add_block(up, (1, -1), "up")
        .add_block(down, (-1, 1), "down")
        .couple_blocks(["up", "down"], [(0, 1), (1, 0)], "channel")
        .add_block(View.from_rule(other, "m (t p) -> m p t", {"p": 2}), (1, 1, 1), "split")
        .add_scope("channel", (-1,), "channels")
        .add_scope("split", (-1,), "elements")
    )
    assert {scope.name for scope in builder.get_all_scopes()} == {"channels", "elements"}
    for scope in builder.get_all_scopes():
        scope.hard_threshold(nnz=scope.sparsity_to_nnz(0.5))
    assert int((up != 0).any(1).sum()) == 3 == int((down != 0).any(0).sum())
    assert int((other != 0).sum()) == 12
    with pytest.raises(PatternError, match="there already"):
        builder.add_block(up, (1, 1), "up")
    with pytest.raises(PatternError, match="'up', 'down', 'channel', 'split'"):
        builder.get_block("gate")
    with pytest.raises(PatternError, match="no scope 'gate'"):
        builder.get_scope("gate")


def test_a_builder_lists_a_coupling_of_scopes_once() -> None:
    builder = SparsityBuilder()
    for name in ("a", "b"):
        builder.add_block(torch.randn(2, 8), (1, 1), name).add_scope(name, (1, 4), name)
    builder.couple_scopes(["a", "b"], None, "both")
    assert list(builder.get_all_scopes()) == [builder.get_scope("both")]


def test_specs_leave_autograd_and_optimizers_alone() -> None:
    weight = Parameter(torch.randn(4, 8))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scope = ScopeSpec(BlockSpec(weight, (1, 1)), (1, 4))
    for _ in range(2):
        scope.hard_threshold(nnz=2)
        loss = (weight.sum(1) ** 2).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    scope.hard_threshold(nnz=2)
    assert weight.is_leaf and weight.requires_grad and s3.satisfies(weight, "2:4")
