"""Numbers at the ends of their range: results scale with the inputs, or an error says why they cannot."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import s3tensor as s3
from s3tensor.llm import calibrate
from s3tensor.prune import Pruned

PRUNERS: dict[str, Callable[[Tensor, Tensor, str], Pruned]] = {
    "sparsegpt": s3.prune.sparsegpt,
    "obs": s3.prune.obs,
    "admm": s3.prune.admm,
}


def layer() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(500, 32) @ torch.randn(32, 32)
    return torch.randn(16, 32), s3.compute_hessian(x)


@given(st.integers(-48, 46), st.sampled_from(sorted(PRUNERS)))
@example(-48, "admm")
@example(46, "obs")
@settings(max_examples=40)
def test_a_scaled_hessian_gives_the_same_weights(exponent: int, pruner: str) -> None:
    """By a power of four nothing is rounded, so that only what leaves the range could differ."""
    weight, hessian = layer()
    scaled = hessian * 4.0**exponent
    assert torch.isfinite(scaled).all() and (scaled.diagonal() > 0).all()
    one, other = (PRUNERS[pruner](weight, h, "2:4") for h in (hessian, scaled))
    assert torch.equal(one.mask, other.mask)
    torch.testing.assert_close(other.weight, one.weight, rtol=1e-4, atol=1e-5)


@given(st.integers(-48, 46))
@example(-48)
@example(46)
@settings(max_examples=30)
def test_a_refit_does_its_work_at_every_scale_of_the_hessian(exponent: int) -> None:
    weight, hessian = layer()
    mask = s3.project(weight, "2:4")
    exact = torch.zeros_like(weight, dtype=torch.float64)
    h, w = hessian.double(), weight.double()
    for row, kept in enumerate(mask):
        exact[row, kept] = torch.linalg.solve(h[kept][:, kept], (h @ w[row])[kept])
    found = s3.prune.refit(weight, hessian * 4.0**exponent, mask, damp=0.0)
    torch.testing.assert_close(found.double(), exact, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("pattern", ["2:4", "3:4", "7:8", "unstructured@0.97"])
@pytest.mark.parametrize("samples", [60, 100, 200])
def test_the_refit_of_admm_is_near_exact_where_few_weights_are_pruned(
    pattern: str, samples: int
) -> None:
    """A nearly dense mask starts so near the end that a share of G alone would stop it at once."""
    torch.manual_seed(samples)
    basis = torch.linalg.qr(torch.randn(128, 128, dtype=torch.float64))[0]
    x = torch.randn(samples, 128, dtype=torch.float64) @ basis
    hessian, weight = x.T @ x / samples, torch.randn(48, 128, dtype=torch.float64)
    found = s3.prune.admm(weight.float(), hessian.float(), pattern)
    damped = s3.Factors(hessian, damp=0.0004).matrix

    def loss(pruned: Tensor) -> float:
        return float(((pruned - weight) @ damped * (pruned - weight)).sum())

    exact = torch.zeros_like(weight)
    for row, kept in enumerate(found.mask):
        exact[row, kept] = torch.linalg.solve(damped[kept][:, kept], (damped @ weight[row])[kept])
    assert loss(found.weight.double()) <= 1.05 * loss(exact)


@given(st.integers(-100, 100), st.integers(-100, 100))
@example(-40, -80)
@example(40, 40)
@example(-100, 0)
@settings(max_examples=60)
def test_the_output_error_does_not_depend_on_scales(of_weight: int, of_hessian: int) -> None:
    weight, hessian = layer()
    mask = s3.project(weight, "2:4")
    error = s3.output_error(weight * mask, weight, hessian)
    scaled = weight * 2.0**of_weight
    found = s3.output_error(scaled * mask, scaled, hessian * 2.0**of_hessian)
    assert found == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("pruner", sorted(PRUNERS))
def test_a_weight_that_grows_beyond_its_dtype_is_an_error(pruner: str) -> None:
    weight, hessian = layer()
    half = (weight / weight.abs().max() * 65504).half()
    with pytest.raises(
        s3.NonFiniteError, match=r"beyond torch\.float16, whose largest number is 65504"
    ):
        PRUNERS[pruner](half, hessian, "1:8")
    assert torch.isfinite(PRUNERS[pruner](half.bfloat16(), hessian, "1:8").weight).all()


@pytest.mark.parametrize("damp", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("pruner", [s3.prune.wanda, s3.prune.obd])
def test_damping_changes_no_score_beside_one_input_that_holds_all_energy(
    pruner: Callable[..., Pruned], damp: float
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2000, 128) * torch.exp(torch.randn(128))
    x[:, 0] *= 1e5
    weight, hessian = torch.randn(64, 128), s3.compute_hessian(x)
    scores = weight.abs().double() * hessian.diagonal().double().sqrt()
    assert torch.equal(
        pruner(weight, hessian, "2:4", damp=damp).mask, s3.project(weight, "2:4", scores)
    )


def test_inputs_whose_squares_overflow_are_refused_with_the_reason() -> None:
    with pytest.raises(s3.HessianError, match="squares of the inputs are beyond float32"):
        s3.compute_hessian(torch.randn(10, 8) * 1e20)
    hessian = torch.eye(8, dtype=torch.float64) * 1e39  # in float64 they are numbers as others
    weight = torch.randn(4, 8)
    for prune in (s3.prune.sparsegpt, s3.prune.wanda):
        assert torch.equal(prune(weight, hessian, "2:4").mask, s3.project(weight, "2:4"))


@pytest.mark.parametrize("exponent", [-56, -50, -32, 32, 50, 60])
def test_near_the_ends_of_float32_every_pruner_gives_the_same_bits(exponent: int) -> None:
    """Powers of four round nothing, so that nothing may differ but by what leaves the range."""
    weight, hessian = layer()
    torch.manual_seed(1)
    cross, drift = hessian + 0.1 * torch.randn(32, 32), torch.randn(16, 32)
    mask = s3.project(weight, "2:4")

    def results(scale: float) -> dict[str, Tensor]:
        h, target, pull = hessian * scale, cross * scale, drift * scale
        found = {name: prune(weight, h, "2:4").weight for name, prune in s3.prune.PRUNERS.items()}
        for name in ("obs", "admm"):
            made = s3.prune.PRUNERS[name](weight, h, "2:4", target=target, alpha=0.5, drift=pull)
            found[f"{name} with a target"] = made.weight
        found["refit"] = s3.prune.refit(weight, h, mask, target, drift=pull)
        if abs(exponent) > 55:  # the inverse itself leaves the range
            return found
        found["factors"] = s3.Factors(h).solve(weight) * scale
        for inverse in (None, s3.StructuredOBS.compute_inverse(h)):
            parameter = torch.nn.Parameter(weight.clone())
            scope = s3.ScopeSpec(s3.BlockSpec(parameter, shape=(1, 1)), shape=(1, 4))
            pruner = s3.StructuredOBS(scope, h, inv_h=inverse)
            pruner.prune(2, "full")
            found[f"StructuredOBS, {inverse is None}"] = parameter.detach()
            found[f"inverse, {inverse is None}"] = pruner.inv_h * scale
        return found

    expected, found = results(1.0), results(4.0**exponent)
    for name in ("admm", "admm with a target"):  # its scales are powers of 0.85, which round
        one, other = expected.pop(name), found.pop(name)
        assert torch.equal(one != 0, other != 0)
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_a_hessian_below_the_normal_numbers_is_refused_with_the_remedy() -> None:
    weight, hessian = layer()
    tiny = hessian * 2.0**-140
    for name in ("wanda", "sparsegpt", "obs", "admm"):
        with pytest.raises(s3.HessianError, match=r"below the normal numbers of torch\.float32"):
            s3.prune.PRUNERS[name](weight, tiny, "2:4")
    plain, wide = (
        s3.prune.sparsegpt(weight, hessian.double() * scale, "2:4") for scale in (1.0, 2.0**-140)
    )
    assert torch.equal(wide.weight, plain.weight)


def test_a_cross_term_without_weight_is_refused_as_the_value_is() -> None:
    hessian = s3.Hessian(8)
    x = torch.randn(4, 8)
    hessian.update(x, dense=x, weights=torch.zeros(4))
    for moment in (hessian.value, hessian.cross):
        with pytest.raises(s3.HessianError, match="all tokens have weight 0"):
            moment()


def test_scores_of_both_infinities_in_one_block_are_refused() -> None:
    scores = torch.zeros(2, 40)
    scores[:, 0], scores[:, 1] = math.inf, -math.inf
    with pytest.raises(s3.NonFiniteError, match="hold Inf and -Inf"):
        s3.project(torch.ones(2, 40), "block:1x2@0.5", scores)
    kept = s3.project(torch.ones(2, 40), "2:4", scores)  # alone, each of them has its place
    assert kept[:, 0].all() and not kept[:, 1].any()


def test_damp_must_be_a_number_for_one_layer_and_a_factor_a_float() -> None:
    weight, hessian = layer()
    with pytest.raises(s3.HessianError, match="damp='auto'"):
        s3.prune.admm(weight, hessian, "2:4", damp="auto")
    parameter = torch.nn.Parameter(weight)
    scope = s3.ScopeSpec(s3.BlockSpec(parameter, shape=(1, 1)), shape=(1, 4))
    with pytest.raises(s3.PrunerError, match=r"c_dtype=torch\.int8"):
        s3.StructuredOBS(scope, hessian).prune_true_obs(2, c_dtype=torch.int8)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.uint8, torch.uint16, torch.int32])
def test_tokens_of_any_integer_dtype_are_the_same_tokens(dtype: torch.dtype) -> None:
    model = torch.nn.Embedding(100, 4)
    (batch,) = calibrate.check_batches(model, [torch.arange(6).view(1, 6).to(dtype)])
    assert batch.tolist() == [[0, 1, 2, 3, 4, 5]] and batch.dtype in (torch.int64, torch.int32)


def test_tokens_that_are_truth_values_are_refused() -> None:
    with pytest.raises(s3.CalibrationError, match="tensors of token ids"):
        calibrate.check_batches(torch.nn.Embedding(100, 4), [torch.ones(1, 6, dtype=torch.bool)])
