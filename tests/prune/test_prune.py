"""Laws that every pruner keeps, and each pruner against enumeration or a slow float64 reference."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import s3tensor as s3
from s3tensor import prune
from s3tensor.errors import HessianError, NonFiniteError, PatternError, PrunerError, S3Error
from s3tensor.mask.projection import tile
from s3tensor.pattern import BoundPattern, Pattern
from s3tensor.prune.hessian import Factors
from s3tensor.testing import bound_patterns

NAMES = tuple(prune.PRUNERS)
PATTERNS = (
    "2:4",
    "pair4:8",
    "coupled2:4",
    "rowpair16",  # scopes of several rows
    "unstructured@0.5",  # scopes of whole rows
    "block:2x4@0.5",
    "row@0.5",  # one scope, blocks of whole rows
    "column@0.5",  # one scope, blocks of whole columns
    "block:4x2@0.5/tensor",
)

DAMP = 0.01

# Of the profile's examples, for tests that solve several problems in each.
fewer = settings(max_examples=max(10, settings().max_examples // 6))
fewest = settings(max_examples=max(10, settings().max_examples // 16))
seeds = st.integers(0, 2**16)
pruners = st.sampled_from(NAMES)
patterns = st.sampled_from(PATTERNS)
matrices = bound_patterns(max_elements=256).filter(lambda bound: len(bound.shape) == 2)


def inputs(tokens: int, features: int, seed: int = 0) -> Tensor:
    """Correlated float64 inputs (tokens, features)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, features, generator=generator, dtype=torch.float64)
    mixing = torch.randn(features, features, generator=generator, dtype=torch.float64)
    return x @ (mixing / math.sqrt(features) + torch.eye(features, dtype=torch.float64))


def layer(
    rows: int, columns: int, seed: int = 0, tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """A float64 weight (rows, columns) and the Hessian of correlated inputs."""
    x = inputs(tokens or 4 * columns, columns, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight, x.T @ x / len(x)


def loss(pruned: Tensor, weight: Tensor, hessian: Tensor) -> Tensor:
    """The squared error of each row's output, (rows,)."""
    change = pruned - weight
    return ((change @ hessian) * change).sum(1)


def damped(hessian: Tensor, damp: float = DAMP) -> Tensor:
    return hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian)).to(hessian)


def all_masks(bound: BoundPattern) -> Tensor:
    """Every mask of a pattern with one scope a row: (masks, columns) bool."""
    choices = list(itertools.combinations(range(bound.blocks_per_scope), bound.keep))
    scopes = bound.scopes // bound.shape[0]
    found = []
    for chosen in itertools.product(choices, repeat=scopes):
        mask = torch.zeros(scopes, bound.blocks_per_scope, dtype=torch.bool)
        for scope, blocks in enumerate(chosen):
            mask[scope, list(blocks)] = True
        found.append(mask.flatten())
    return torch.stack(found)


# Every pruner -----------------------------------------------------------------------------------------


@example("admm", Pattern.parse("rowpair16").bind((32, 32)), 0, torch.float16)
@given(pruners, matrices, seeds, st.sampled_from((torch.float32, torch.bfloat16, torch.float64)))
def test_results_satisfy_the_pattern_in_the_weights_dtype(
    name: str, bound: BoundPattern, seed: int, dtype: torch.dtype
) -> None:
    weight, hessian = layer(*bound.shape, seed)
    weight, hessian = weight.to(dtype), hessian.float()
    before = weight.clone(), hessian.clone()
    pruned = prune.get(name)(weight, hessian, bound.pattern)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])
    assert pruned.weight.dtype == dtype and pruned.mask.dtype == torch.bool
    assert pruned.weight.shape == pruned.mask.shape == weight.shape
    assert bool(torch.isfinite(pruned.weight).all())
    assert not bool(pruned.weight[~pruned.mask].any())
    kept = tile(pruned.mask, bound)
    assert torch.equal(kept.all(-1), kept.any(-1))
    assert bool((kept.any(-1).sum(-1) == bound.keep).all())
    assert s3.satisfies(pruned.weight, bound.pattern)


@fewer
@given(pruners, patterns, seeds)
def test_the_same_inputs_give_the_same_bits(name: str, pattern: str, seed: int) -> None:
    weight, hessian = layer(16, 16, seed)
    first = prune.get(name)(weight, Factors(hessian, 0.02), pattern)
    options = {} if name == "magnitude" else {"damp": 0.02}
    again = prune.get(name)(weight.clone().requires_grad_(), hessian, pattern, **options)
    assert torch.equal(first.weight, again.weight) and torch.equal(first.mask, again.mask)
    assert not again.weight.requires_grad


@fewer
@given(pruners, patterns, seeds)
def test_strides_do_not_matter(name: str, pattern: str, seed: int) -> None:
    weight, hessian = layer(16, 16, seed)
    strided = weight.T.contiguous().T
    assert not strided.is_contiguous()
    every_other = torch.empty(16, 32, dtype=torch.float64)[:, ::2].copy_(hessian)
    first = prune.get(name)(weight, hessian, pattern)
    again = prune.get(name)(strided, every_other, pattern)
    assert torch.equal(first.mask, again.mask)
    torch.testing.assert_close(first.weight, again.weight, rtol=1e-9, atol=1e-9)


@fewest
@given(pruners, patterns, seeds, st.sampled_from((1, 50_000)))
def test_chunks_of_rows_do_not_matter(name: str, pattern: str, seed: int, budget: int) -> None:
    weight, hessian = layer(32, 16, seed)
    whole = prune.get(name)(weight, hessian, pattern)
    parts = prune.get(name)(weight, hessian, pattern, memory_budget=budget)
    assert torch.equal(whole.mask, parts.mask)
    torch.testing.assert_close(whole.weight, parts.weight, rtol=1e-9, atol=1e-9)


@given(pruners, patterns, seeds, st.integers(-30, 30), st.integers(-15, 15))
def test_scaling_the_weight_or_the_inputs_scales_the_result(
    name: str, pattern: str, seed: int, power: int, input_power: int
) -> None:
    weight, hessian = layer(16, 16, seed)
    expected = prune.get(name)(weight, hessian, pattern)
    scaled = prune.get(name)(weight * 2.0**power, hessian * 4.0**input_power, pattern)
    assert torch.equal(scaled.mask, expected.mask)
    torch.testing.assert_close(scaled.weight, expected.weight * 2.0**power, rtol=1e-9, atol=0)


@given(st.sampled_from(("wanda", "obd", "sparsegpt", "obs", "admm")), seeds)
def test_uncorrelated_inputs_leave_the_kept_weights_as_they_are(name: str, seed: int) -> None:
    weight, _ = layer(4, 16, seed)
    generator = torch.Generator().manual_seed(seed)
    hessian = torch.diag(torch.rand(16, generator=generator, dtype=torch.float64) + 0.1)
    pruned = prune.get(name)(weight, hessian, "2:4", damp=0.0)
    torch.testing.assert_close(pruned.weight, weight * pruned.mask, rtol=1e-9, atol=1e-9)
    mask = s3.project(weight, "2:4", weight.square() * hessian.diagonal())
    if name != "admm":
        assert torch.equal(pruned.mask, mask)
        return
    # ADMM weighs by a penalty that passes the curvature in steps, so that it may miss close calls.
    least = loss(weight * mask, weight, hessian).sum()
    assert float(loss(pruned.weight, weight, hessian).sum()) <= 1.02 * float(least)


@given(pruners, patterns, seeds)
def test_inputs_that_are_always_zero_lose_their_weights(name: str, pattern: str, seed: int) -> None:
    x = inputs(80, 16, seed)
    dead = torch.tensor([1, 2, 9, 12])
    x[:, dead] = 0
    weight, _ = layer(16, 16, seed)
    pruned = prune.get(name)(weight * 100, x.T @ x / 80, pattern)
    assert s3.satisfies(pruned.weight, pattern)
    if name == "magnitude":
        return  # it sees no inputs
    if name in ("sparsegpt", "obs", "admm"):
        assert not bool(pruned.weight[:, dead].any())
    if pattern in ("2:4", "unstructured@0.5"):
        assert not bool(pruned.mask[:, dead].any())


@given(pruners, patterns, seeds, st.sampled_from((1, 5, 12)))
def test_fewer_samples_than_inputs_give_finite_weights(
    name: str, pattern: str, seed: int, tokens: int
) -> None:
    weight, hessian = layer(16, 16, seed, tokens)
    pruned = prune.get(name)(weight.float(), hessian.float(), pattern)
    assert bool(torch.isfinite(pruned.weight).all())
    assert s3.satisfies(pruned.weight, pattern)
    assert s3.output_error(pruned.weight, weight.float(), hessian.float()) < 1.5


@fewer
@given(pruners, patterns, st.sampled_from((1, 50_000, 1 << 30)))
def test_progress_never_falls_and_ends_at_its_total(name: str, pattern: str, budget: int) -> None:
    weight, hessian = layer(32, 16)
    calls: list[tuple[int, int]] = []
    options: dict[str, Any] = {"memory_budget": budget}
    quiet = prune.get(name)(weight, hessian, pattern, **options)
    watched = prune.get(name)(
        weight,
        hessian,
        pattern,
        progress=lambda done, total: calls.append((done, total)),
        **options,
    )
    assert torch.equal(quiet.weight, watched.weight)
    done, totals = zip(*calls, strict=True)
    assert len(set(totals)) == 1 and done[-1] == totals[0]
    assert list(done) == sorted(done) and done[0] > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_registered_pruner_has_the_common_signature(name: str) -> None:
    parameters = inspect.signature(prune.get(name)).parameters
    assert list(parameters)[:3] == ["weight", "hessian", "pattern"]
    assert {"memory_budget", "progress"} <= set(parameters)
    assert getattr(prune, name) is prune.get(name) and name in prune.__all__


@pytest.mark.parametrize("name", NAMES)
def test_a_registered_pruner_says_whether_it_needs_a_hessian(name: str) -> None:
    if name in prune.NEEDS_HESSIAN:
        with pytest.raises(HessianError, match="needs the Hessian"):
            prune.get(name)(torch.ones(16, 32), None, "2:4")
    else:
        assert prune.get(name)(torch.ones(16, 32), None, "2:4").mask.any()


def test_of_the_pruners_here_magnitude_alone_needs_no_hessian() -> None:
    own = {"magnitude", "wanda", "obd", "sparsegpt", "obs", "admm"}
    assert own & prune.NEEDS_HESSIAN == own - {"magnitude"}


def test_a_pruner_can_be_registered_with_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = import_module("s3tensor.prune.registry")
    monkeypatch.setattr(registry, "PRUNERS", {})
    monkeypatch.setattr(registry, "NEEDS_HESSIAN", set())
    monkeypatch.setattr(registry, "ROW_WISE", set())

    @prune.register(needs_hessian=False, row_wise=False)
    def plain(weight: Tensor, hessian: Tensor | None, pattern: str) -> prune.Pruned:
        return prune.magnitude(weight, hessian, pattern)

    assert registry.get("plain") is plain
    assert "plain" not in registry.NEEDS_HESSIAN | registry.ROW_WISE


def test_an_unknown_pruner_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(PrunerError, match=r"'adm'.*magnitude, wanda, obd"):
        prune.get("adm")


# What is refused --------------------------------------------------------------------------------------


def broken(value: float) -> Tensor:
    weight = torch.ones(16, 32)
    weight[3, 5] = value
    return weight


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("weight", "pattern", "error", "message"),
    [
        (broken(math.nan), "2:4", NonFiniteError, "holds NaN or Inf"),
        (broken(-math.inf), "2:4", NonFiniteError, "holds NaN or Inf"),
        (torch.ones(16, 30), "2:4", PatternError, "dim 1 has 30 elements"),
        (torch.ones(32), "2:4", PatternError, r"\(out_features, in_features\)"),
        (torch.ones(16, 32, 2), "2:4", PatternError, "flatten the other dims"),
        (torch.ones(16, 32, dtype=torch.int8), "2:4", PatternError, "dequantise"),
        (torch.ones(16, 32), "2-4", PatternError, "unknown pattern"),
    ],
)
def test_a_weight_that_cannot_be_pruned_is_refused(
    name: str, weight: Tensor, pattern: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        prune.get(name)(weight, torch.eye(weight.shape[-1]), pattern)


@pytest.mark.parametrize("name", sorted(prune.NEEDS_HESSIAN))
@pytest.mark.parametrize(
    ("hessian", "error", "message"),
    [
        (None, HessianError, "needs the Hessian"),
        (torch.eye(16), HessianError, r"it must be \(32, 32\)"),
        (torch.ones(32, 16), HessianError, "is square"),
        (torch.eye(32) * math.nan, NonFiniteError, "NaN or Inf"),
        (-torch.eye(32), HessianError, "never negative"),
        (torch.eye(32) + torch.ones(32, 32).triu(1), HessianError, "not symmetric"),
        (torch.ones(32, 32) * 2 - torch.eye(32), HessianError, "indefinite"),
    ],
)
def test_a_hessian_that_is_none_is_refused(
    name: str, hessian: Tensor | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        prune.get(name)(torch.ones(16, 32), hessian, "2:4")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("magnitude", {"memory_budget": 0}, "memory_budget=0"),
        ("wanda", {"damp": -1.0}, "damp=-1"),
        ("sparsegpt", {"lazy_columns": 0}, "lazy_columns=0"),
        ("sparsegpt", {"memory_budget": 0}, "memory_budget=0"),
        ("admm", {"starts": ()}, "starts="),
        ("admm", {"starts": (0.5, -1.0)}, "starts="),
        ("admm", {"growth": 0.9}, "growth=0.9"),
        ("admm", {"hold": 0}, "hold=0"),
        ("admm", {"rounds": 0}, "rounds=0"),
        ("admm", {"balance": 1.5}, "balance=1.5"),
        ("admm", {"damp": math.nan}, "damp=nan"),
        ("admm", {"memory_budget": 0}, "memory_budget=0"),
        ("admm", {"target": torch.eye(16)}, r"target of shape \(16, 16\)"),
        ("admm", {"target": torch.eye(32), "alpha": 1.5}, "alpha=1.5"),
        ("admm", {"target": torch.eye(32) * math.inf}, "target holds NaN or Inf"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        prune.get(name)(torch.ones(16, 32), torch.eye(32), "2:4", **options)
    assert isinstance(refused.value, S3Error)


@pytest.mark.parametrize("name", ["sparsegpt", "admm"])
def test_a_singular_hessian_needs_damping(name: str) -> None:
    weight, hessian = layer(4, 16, tokens=3)
    with pytest.raises(HessianError, match=r"not positive definite.*raise damp"):
        prune.get(name)(weight, hessian - 1e-9 * torch.eye(16), "2:4", damp=0.0)


# Scores -----------------------------------------------------------------------------------------------


@given(matrices, seeds)
def test_scores_are_those_of_their_papers(bound: BoundPattern, seed: int) -> None:
    weight, hessian = layer(*bound.shape, seed)
    norms = hessian.diagonal().sqrt()
    for name, scores in (
        ("magnitude", weight.square()),
        ("wanda", weight.abs() * norms),
        ("obd", weight.square() * norms.square() / 2),
    ):
        pruned = prune.get(name)(weight, hessian, bound.pattern)
        assert torch.equal(pruned.weight, weight * pruned.mask)
        kept = (scores * pruned.mask).sum()
        best = (scores * s3.project(weight, bound.pattern, scores)).sum()
        torch.testing.assert_close(kept, best, rtol=1e-9, atol=0)


# SparseGPT --------------------------------------------------------------------------------------------


def eliminate(inverse: Tensor, column: int) -> Tensor:
    """The inverse of the Hessian of the columns that are left once one is fixed (OBS)."""
    left = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    left[column], left[:, column] = 0.0, 0.0
    return left


def slow_sparsegpt(weight: Tensor, hessian: Tensor, bound: BoundPattern) -> tuple[Tensor, Tensor]:
    """Optimal Brain Surgeon column by column, with an inverse that is updated in full: no Cholesky.

    Columns go in the order of their scopes' first column, which is where a scope is decided.
    """
    rows, columns = weight.shape
    scopes = tile(torch.arange(rows * columns).view(rows, columns), bound)  # elements of the weight
    opens = (scopes % columns).amin((1, 2)).tolist()  # the column that decides each scope
    leader = {
        int(c): first
        for scope, first in zip(scopes, opens, strict=True)
        for c in scope.unique() % columns
    }
    order = sorted(range(columns), key=lambda c: (leader[c], c))
    cost, inverse = torch.empty(columns, dtype=weight.dtype), torch.linalg.inv(hessian)
    for c in order:  # what a column costs once those before it are fixed
        cost[c] = inverse[c, c]
        inverse = eliminate(inverse, c)
    out, mask = weight.clone(), torch.ones(rows * columns, dtype=torch.bool)
    inverse = torch.linalg.inv(hessian)
    for c in order:
        for scope, first in zip(scopes, opens, strict=True):
            if first == c:
                scores = (out.square() / cost).flatten()[scope].sum(-1)
                mask[scope[scores.argsort()[: bound.blocks_per_scope - bound.keep]]] = False
        error = out[:, c].masked_fill(mask.view(rows, columns)[:, c], 0.0) / inverse[c, c]
        out = out - torch.outer(error, inverse[c])
        inverse = eliminate(inverse, c)
    return out * mask.view(rows, columns), mask.view(rows, columns)


@given(matrices.filter(lambda bound: math.prod(bound.shape) <= 128), seeds)
def test_sparsegpt_is_optimal_brain_surgeon_in_sequence(bound: BoundPattern, seed: int) -> None:
    weight, hessian = layer(*bound.shape, seed)
    pruned = prune.sparsegpt(weight, hessian, bound.pattern, damp=DAMP)
    expected, mask = slow_sparsegpt(weight, damped(hessian), bound)
    assert torch.equal(pruned.mask, mask)
    torch.testing.assert_close(pruned.weight, expected, rtol=1e-7, atol=1e-7)


@given(patterns, seeds, st.integers(1, 40))
def test_lazy_updates_change_nothing(pattern: str, seed: int, lazy_columns: int) -> None:
    weight, hessian = layer(16, 16, seed)
    expected = prune.sparsegpt(weight, hessian, pattern)
    lazy = prune.sparsegpt(weight, hessian, pattern, lazy_columns=lazy_columns)
    assert torch.equal(lazy.mask, expected.mask)
    torch.testing.assert_close(lazy.weight, expected.weight, rtol=1e-9, atol=1e-9)


# Refit and the dense target ---------------------------------------------------------------------------


def least_squares(
    x: Tensor,  # (N, K)
    outputs: Tensor,  # (N, M): what x w' is fitted to
    weight: Tensor,  # (M, K): what the ridge pulls towards
    mask: Tensor,
    damp: float,
) -> Tensor:
    """Each row by LAPACK's least squares on its kept columns, the ridge as extra samples."""
    tokens, columns = x.shape
    ridge = math.sqrt(damp * float((x.T @ x / tokens).diagonal().mean()))
    eye = torch.eye(columns, dtype=x.dtype)
    a = torch.cat([x / math.sqrt(tokens), ridge * eye])
    b = torch.cat([outputs / math.sqrt(tokens), ridge * weight.T])
    out = torch.zeros_like(weight)
    for row, kept in enumerate(mask):
        if bool(kept.any()):
            out[row, kept] = torch.linalg.lstsq(a[:, kept], b[:, row], driver="gelsd").solution
    return out


@given(seeds, st.sampled_from((1e-3, 0.01, 0.5)), st.sampled_from((10, 60)))
def test_refit_is_least_squares_on_the_kept_columns(seed: int, damp: float, tokens: int) -> None:
    x, (weight, _) = inputs(tokens, 16, seed), layer(6, 16, seed)
    mask = torch.rand(6, 16, generator=torch.Generator().manual_seed(seed)) < 0.6
    expected = least_squares(x, x @ weight.T, weight, mask, damp)
    found = prune.refit(weight, x.T @ x / tokens, mask, damp=damp)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    single = prune.refit(weight.float(), (x.T @ x / tokens).float(), mask, damp=damp)
    assert single.dtype == torch.float32
    # Where the Hessian is flat, float32 leaves weights open that change no loss.
    matrix = damped(x.T @ x / tokens, damp)
    total = loss(torch.zeros_like(weight), weight, matrix)
    excess = loss(single.double(), weight, matrix) - loss(expected, weight, matrix)
    assert bool((excess <= 1e-5 * total).all())


@fewer
@given(seeds, st.sampled_from((0.0, 0.3, 1.0)))
def test_a_dense_target_is_the_normal_equation_of_the_dense_streams_outputs(
    seed: int, alpha: float
) -> None:
    x, dense, (weight, _) = inputs(60, 16, seed), inputs(60, 16, seed + 7), layer(6, 16, seed)
    dense = x + 0.3 * dense
    mask = torch.rand(6, 16, generator=torch.Generator().manual_seed(seed)) < 0.6
    outputs = ((1 - alpha) * x + alpha * dense) @ weight.T
    expected = least_squares(x, outputs, weight, mask, DAMP)
    hessian, target = x.T @ x / 60, dense.T @ x / 60
    found = prune.refit(weight, hessian, mask, target, alpha, damp=DAMP)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    pruned = prune.admm(weight, hessian, "2:4", target=target, alpha=alpha, damp=DAMP)
    expected = least_squares(x, outputs, weight, pruned.mask, DAMP)
    torch.testing.assert_close(pruned.weight, expected, rtol=1e-6, atol=1e-7)


@fewest
@given(patterns, seeds)
def test_a_target_of_no_share_or_of_the_same_stream_is_none(pattern: str, seed: int) -> None:
    weight, hessian = layer(16, 16, seed)
    plain = prune.admm(weight, hessian, pattern)
    other = inputs(64, 16, seed + 3)
    unheard = prune.admm(weight, hessian, pattern, target=other.T @ other / 64, alpha=0.0)
    same = prune.admm(weight, hessian, pattern, target=hessian, alpha=1.0)
    for pruned in (unheard, same):
        assert torch.equal(pruned.mask, plain.mask)
        torch.testing.assert_close(pruned.weight, plain.weight, rtol=1e-9, atol=1e-9)


def test_a_dense_target_reaches_outputs_that_the_pruned_inputs_lost() -> None:
    """A dead input of the pruned stream is made up for by the live ones that go with it."""
    dense = inputs(200, 8)
    dense[:, 1] = dense[:, 0]
    x = dense.clone()
    x[:, 1] = 0
    weight, _ = layer(4, 8)
    hessian, target = x.T @ x / 200, dense.T @ x / 200
    both = prune.refit(weight, hessian, torch.ones(4, 8, dtype=torch.bool), target, 1.0, damp=1e-9)
    assert not bool(both[:, 1].any())
    torch.testing.assert_close(x @ both.T, dense @ weight.T, rtol=1e-5, atol=1e-5)


@given(seeds)
def test_more_kept_weights_never_raise_the_loss(seed: int) -> None:
    weight, hessian = layer(6, 16, seed)
    draws = torch.rand(6, 16, generator=torch.Generator().manual_seed(seed))
    losses = [
        loss(prune.refit(weight, hessian, draws < share, damp=DAMP), weight, damped(hessian))
        for share in (0.0, 0.2, 0.5, 0.9, 1.0)
    ]
    for fewer, more in itertools.pairwise(losses):
        assert bool((more <= fewer + 1e-9).all())
    assert float(losses[-1].max()) < 1e-9


def test_refit_refuses_a_mask_of_another_shape_or_dtype() -> None:
    weight, hessian = layer(4, 8)
    for mask in (torch.ones(4, 7, dtype=torch.bool), torch.ones(4, 8)):
        with pytest.raises(PatternError, match="it must be bool"):
            prune.refit(weight, hessian, mask)
    with pytest.raises(HessianError, match="refit needs the Hessian"):
        prune.refit(weight, None, weight != 0)


# ADMM -------------------------------------------------------------------------------------------------


def optimum(weight: Tensor, hessian: Tensor, bound: BoundPattern) -> Tensor:
    """The least loss of each row, (rows,), over all masks, by enumeration and direct solves."""
    kept = torch.stack([mask.nonzero().flatten() for mask in all_masks(bound)])  # (masks, k)
    linear = (weight @ hessian)[:, kept].transpose(0, 1)  # (masks, rows, k)
    small = hessian[kept[:, :, None], kept[:, None, :]]
    fall = (torch.linalg.solve(small, linear, left=False) * linear).sum(-1)  # (masks, rows)
    return ((weight @ hessian) * weight).sum(1) - fall.amax(0)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:6"])
def test_admm_is_near_the_best_of_all_masks(pattern: str) -> None:
    columns = 12
    total = best = 0.0
    for seed in range(8):
        weight, hessian = layer(16, columns, seed)
        bound = Pattern.parse(pattern).bind((16, columns))
        pruned = prune.admm(weight, hessian, pattern, damp=DAMP)
        found = loss(pruned.weight, weight, damped(hessian))
        least = optimum(weight, damped(hessian), bound)
        assert bool((found >= least * (1 - 1e-6)).all())
        total, best = total + float(found.sum()), best + float(least.sum())
    # Measured: 1.07, 1.02 and 1.07. SparseGPT's masks with exact weights are at 1.35 and more.
    assert total <= 1.1 * best


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("tokens", [24, 256])
def test_admm_beats_other_masks_with_their_exact_weights(pattern: str, tokens: int) -> None:
    weight, hessian = layer(32, 64, seed=3, tokens=tokens)
    factors = Factors(hessian)

    def error(pruned: Tensor) -> float:
        return float(loss(pruned, weight, factors.matrix).sum())

    ours = error(prune.admm(weight, factors, pattern).weight)
    for name in ("magnitude", "wanda", "sparsegpt"):
        mask = prune.get(name)(weight, factors, pattern).mask
        assert ours <= error(prune.refit(weight, factors, mask)) * 1.001, name


@fewest
@given(st.sampled_from(("2:4", "rowpair16", "block:2x4@0.5", "column@0.5")), seeds)
def test_of_several_starts_each_group_of_rows_keeps_the_best(pattern: str, seed: int) -> None:
    weight, hessian = layer(32, 16, seed)
    group = Pattern.parse(pattern).bind((32, 16)).row_period
    starts = (0.05, 0.7, 3.0)

    def losses(*penalties: float) -> Tensor:
        pruned = prune.admm(weight, hessian, pattern, starts=penalties, damp=DAMP)
        return loss(pruned.weight, weight, damped(hessian)).view(-1, group).sum(1)

    least = torch.stack([losses(start) for start in starts]).amin(0)
    torch.testing.assert_close(losses(*starts), least, rtol=1e-9, atol=0)


@given(seeds, st.sampled_from(("row@0.5", "head:2@0.5")))
def test_where_blocks_are_whole_rows_admm_is_exact(seed: int, pattern: str) -> None:
    weight, hessian = layer(8, 16, seed)
    pruned = prune.admm(weight, hessian, pattern, damp=DAMP)
    cost = ((weight @ damped(hessian)) * weight).sum(1)
    height = 2 if pattern.startswith("head") else 1
    largest = cost.view(-1, height).sum(1).topk(4 // height).values.sum()
    found = loss(pruned.weight, weight, damped(hessian)).sum()
    torch.testing.assert_close(found, cost.sum() - largest, rtol=1e-9, atol=1e-9)


@given(seeds)
def test_the_scale_of_a_block_is_between_its_free_and_its_plain_curvature(seed: int) -> None:
    from s3tensor.prune.admm import block_scale
    from s3tensor.prune.product import Product

    _, hessian = layer(16, 16, seed)
    factors = Factors(hessian)
    plain = factors.matrix.diagonal()
    single, pair, row = (
        Product.of(Pattern.parse(text).bind((16, 16))) for text in ("2:4", "pair4:8", "row@0.5")
    )
    alone = torch.linalg.inv(factors.matrix).diagonal().reciprocal()
    torch.testing.assert_close(block_scale(factors, single, 1.0).square(), alone)
    torch.testing.assert_close(block_scale(factors, single, 0.0).square(), plain)
    with_partner = block_scale(factors, pair, 1.0).square()
    for j in range(16):
        # The curvature of weight j when all but its partner may make up for it: a Schur complement.
        others = torch.tensor([k for k in range(16) if k // 2 != j // 2])
        cross = factors.matrix[j, others]
        free = plain[j] - cross @ torch.linalg.solve(factors.matrix[others][:, others], cross)
        torch.testing.assert_close(with_partner[j], free)
    torch.testing.assert_close(block_scale(factors, row, 1.0).square(), plain)


@pytest.mark.parametrize("case", ["rank deficient", "twins", "scales", "one direction"])
@pytest.mark.parametrize("damp", [1e-4, 0.01])
@pytest.mark.parametrize("pattern", ["2:4", "rowpair16", "unstructured@0.5"])
def test_awkward_inputs_do_not_lead_admm_astray(case: str, damp: float, pattern: str) -> None:
    x = inputs(16 if case == "rank deficient" else 256, 32)
    if case == "twins":
        x[:, 1::2] = x[:, ::2] + 1e-3 * x[:, 1::2]
    if case == "scales":
        x = x * torch.logspace(-4, 4, 32, dtype=torch.float64)[torch.randperm(32)]
    if case == "one direction":
        x = x + 100 * x[:, :1]
    weight = layer(32, 32)[0].float()
    factors = Factors((x.T @ x / len(x)).float(), damp)
    pruned = prune.admm(weight, factors, pattern)
    assert bool(torch.isfinite(pruned.weight).all())

    def error(result: Tensor) -> float:
        return float(loss(result.double(), weight.double(), factors.matrix.double()).sum())

    masks: list[Callable[..., prune.Pruned]] = [prune.magnitude, prune.wanda]
    for other in masks:
        refitted = prune.refit(weight, factors, other(weight, factors, pattern).mask)
        assert error(pruned.weight) <= error(refitted) * 1.01
