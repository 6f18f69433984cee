"""Hessians: sums of any batching, checks, factorisations, and full precision."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import s3tensor as s3
from s3tensor.errors import HessianError, NonFiniteError
from s3tensor.prune.hessian import Factors
from s3tensor.prune.linalg import full_precision, masked_least_squares


def inputs(
    tokens: int = 64, features: int = 12, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator)
    return (torch.randn(tokens, features, generator=generator) @ mix).to(dtype)


# accumulation -----------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 2**31))
def test_any_batching_gives_the_second_moments(sizes: list[int], seed: int) -> None:
    x = inputs(sum(sizes) + 1, seed=seed)
    whole = x.double().T @ x.double() / len(x)
    hessian = s3.Hessian(12)
    for part in x.split([*sizes, 1]):
        hessian.update(part)
    assert hessian.samples == len(x)
    value = hessian.value()
    assert torch.equal(value, value.T)
    # A float32 sum of n products is within n eps of their absolute sum.
    limit = (
        len(x) * torch.finfo(torch.float32).eps * (x.double().abs().T @ x.double().abs() / len(x))
    )
    assert bool(((value - whole).abs() <= limit + 1e-30).all())


@given(
    st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64)),
    st.integers(0, 99),
)
def test_inputs_of_any_dtype_and_rank(dtype: torch.dtype, seed: int) -> None:
    x = inputs(24, seed=seed).clamp(-50, 50).to(dtype)
    flat = s3.compute_hessian(x)
    assert flat.dtype == torch.float32
    torch.testing.assert_close(s3.compute_hessian(x.reshape(2, 3, 4, 12)), flat)
    torch.testing.assert_close(flat, (x.float().T @ x.float()) / 24)


def test_the_cross_term_is_dense_against_pruned_inputs() -> None:
    x, dense = inputs(seed=1), inputs(seed=2)
    hessian = s3.Hessian(12)
    for part, other in zip(x.split(10), dense.split(10), strict=True):
        hessian.update(part, other)
    expected = (dense.double().T @ x.double() / len(x)).float()
    torch.testing.assert_close(hessian.cross(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hessian.value(), s3.compute_hessian(x))
    assert s3.Hessian(12).cross() is None


def test_updates_that_are_refused_add_nothing() -> None:
    hessian = s3.Hessian(12)
    hessian.update(inputs())
    before = hessian.value()
    bad = inputs()
    bad[3, 4] = torch.nan
    for x, dense, error, message in (
        (bad, None, NonFiniteError, "NaN or Inf"),
        (inputs().half() * 1e4, None, NonFiniteError, "65504"),
        (torch.ones(3, 11), None, HessianError, "last dim must be in_features"),
        (torch.ones(3, 12, dtype=torch.int64), None, HessianError, "must be floating"),
        (inputs(), inputs(), HessianError, "every batch"),
    ):
        with pytest.raises(error, match=message):
            hessian.update(x, dense)
    assert hessian.samples == 64 and torch.equal(hessian.value(), before)
    with pytest.raises(HessianError, match="same tokens"):
        s3.Hessian(12).update(torch.ones(3, 12), torch.ones(4, 12))


def test_an_empty_hessian_has_no_value() -> None:
    hessian = s3.Hessian(4)
    hessian.update(torch.ones(0, 4))
    with pytest.raises(HessianError, match="no inputs were seen"):
        hessian.value()
    with pytest.raises(HessianError, match="in_features=0"):
        s3.Hessian(0)


# error ------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**31))
def test_output_error_is_the_relative_error_of_the_outputs(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 12, generator=generator)
    pruned = weight * (torch.rand(5, 12, generator=generator) < 0.5)
    x = inputs(40, seed=seed).double()
    lost = torch.linalg.norm(x @ (pruned - weight).double().T)
    expected = float(lost / torch.linalg.norm(x @ weight.double().T))
    assert math.isclose(s3.output_error(pruned, weight, x.T @ x / 40), expected, rel_tol=1e-9)
    in_float32 = s3.output_error(pruned, weight, (x.T @ x / 40).float())
    assert math.isclose(in_float32, expected, rel_tol=1e-3, abs_tol=1e-6)


def test_output_error_at_its_ends() -> None:
    weight, hessian = torch.randn(3, 4), torch.eye(4)
    assert s3.output_error(weight, weight, hessian) == 0
    assert s3.output_error(torch.zeros(3, 4), weight, hessian) == 1
    assert s3.output_error(torch.zeros(3, 4), torch.zeros(3, 4), hessian) == 0
    assert s3.output_error(weight, torch.zeros(3, 4), hessian) == math.inf
    with pytest.raises(HessianError, match="one \\(M, K\\) shape"):
        s3.output_error(weight, weight[:2], hessian)
    with pytest.raises(HessianError, match="must be equal"):
        s3.output_error(weight, weight, torch.eye(5))


# factors ----------------------------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.sampled_from((0.0, 1e-4, 0.01, 1.0)))
def test_factorisations_give_back_the_damped_matrix(seed: int, damp: float) -> None:
    x = inputs(80, seed=seed).double()
    hessian = x.T @ x / 80
    factors = Factors(hessian, damp)
    expected = hessian + damp * hessian.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(factors.matrix, expected)
    identity = torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(factors.inverse() @ expected, identity, rtol=0, atol=1e-6)
    rows = x[:3] @ expected
    torch.testing.assert_close(factors.solve(rows), x[:3], rtol=1e-6, atol=1e-6)
    for order in (None, torch.randperm(12, generator=torch.Generator().manual_seed(seed))):
        upper = factors.inverse_cholesky(order)
        matrix = expected if order is None else expected[order][:, order]
        assert torch.equal(upper, upper.triu())
        unit = upper.T @ upper @ matrix
        torch.testing.assert_close(unit, identity, rtol=0, atol=1e-6)


def test_dead_inputs_are_set_apart() -> None:
    x = inputs()
    x[:, [2, 7]] = 0
    factors = Factors(s3.compute_hessian(x), 0.01)
    assert factors.dead.nonzero().flatten().tolist() == [2, 7]
    assert factors.matrix[2].tolist() == [float(i == 2) for i in range(12)]
    live = s3.compute_hessian(x).diagonal()
    assert math.isclose(float(factors.ridge), 0.01 * float(live.sum() / 10), rel_tol=1e-5)
    assert factors.clear_dead(torch.ones(1, 12)).tolist()[0] == [
        float(i not in (2, 7)) for i in range(12)
    ]
    factors.inverse_cholesky()
    assert factors.inverse()[2].tolist() == [float(i == 2) for i in range(12)]


def test_too_few_samples_need_damping() -> None:
    singular = s3.compute_hessian(inputs(4))
    with pytest.raises(HessianError, match="not positive definite"):
        Factors(singular - 1e-3 * torch.eye(12) * singular.diagonal(), 0.0).inverse_cholesky()
    with pytest.raises(HessianError, match="not positive definite"):
        Factors(singular - 1e-3 * torch.eye(12) * singular.diagonal(), 0.0).inverse()
    assert bool(torch.isfinite(Factors(singular, 0.01).inverse_cholesky()).all())


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (torch.ones(3, 4), "is square"),
        (torch.ones(0, 0), "is square"),
        (torch.eye(3, dtype=torch.int64), "must be floating"),
        (
            torch.eye(3).index_put((torch.tensor([0]), torch.tensor([1])), torch.tensor(0.5)),
            "not symmetric",
        ),
        (torch.diag(torch.tensor([1.0, -1.0])), "never negative"),
        (torch.eye(3) * torch.nan, "NaN or Inf"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "indefinite"),
    ],
)
def test_what_is_no_hessian_is_refused_by_name(hessian: Tensor, message: str) -> None:
    with pytest.raises(HessianError, match=message):
        Factors(hessian)


@pytest.mark.parametrize("damp", [-1.0, math.inf, math.nan])
def test_a_damp_that_is_no_share_is_refused(damp: float) -> None:
    with pytest.raises(HessianError, match="damp="):
        Factors(torch.eye(3), damp)


def test_factors_move_once_to_each_dtype() -> None:
    factors = Factors(s3.compute_hessian(inputs()))
    double = factors.to(torch.float64, torch.device("cpu"))
    assert double.matrix.dtype == torch.float64
    assert factors.to(torch.float64, torch.device("cpu")) is double
    assert factors.to(torch.float32, torch.device("cpu")) is factors


# linear algebra ---------------------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.sampled_from((1e-3, 0.1)))
def test_masked_least_squares_is_the_exact_solution_of_each_row(seed: int, damp: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = Factors(s3.compute_hessian(inputs(40, seed=seed)), damp).matrix.double()
    linear = torch.randn(4, 12, dtype=torch.float64, generator=generator)
    mask = torch.rand(4, 12, generator=generator) < 0.5
    start = torch.randn(4, 12, dtype=torch.float64, generator=generator)
    solved = masked_least_squares(linear, matrix, mask, start)
    for row, kept, g in zip(solved, mask, linear, strict=True):
        expected = torch.zeros(12, dtype=torch.float64)
        expected[kept] = torch.linalg.solve(matrix[kept][:, kept], g[kept])
        torch.testing.assert_close(
            row, expected, rtol=1e-7, atol=1e-8 * float(expected.abs().max() + 1)
        )


def test_every_iteration_lowers_the_loss() -> None:
    matrix = Factors(s3.compute_hessian(inputs(40)), 1e-3).matrix
    linear, mask = torch.randn(1, 12) @ matrix, torch.arange(12) % 2 == 0
    losses = []
    for iterations in range(6):
        w = masked_least_squares(linear, matrix, mask[None], torch.zeros(1, 12), iterations)
        losses.append(float(((w @ matrix) * w).sum() / 2 - (linear * w).sum()))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def reduced() -> bool:
    """Whether float32 products may round to TF32 or bfloat16; read without mixing torch's two APIs."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        on_cpu = torch.backends.mkldnn.matmul.fp32_precision
        return not {matmul.fp32_precision, on_cpu} <= {"ieee", "none"}
    return torch.get_float32_matmul_precision() != "highest"


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_full_precision_turns_reduced_products_off_and_gives_the_flags_back(precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert reduced() == (precision != "highest")
        with contextlib.suppress(ArithmeticError), full_precision():
            assert not reduced()
            assert not torch.is_grad_enabled()
            raise ArithmeticError
        assert reduced() == (precision != "highest")
        assert torch.is_grad_enabled()
        assert torch.get_float32_matmul_precision() == precision  # the old API still answers
    finally:
        torch.set_float32_matmul_precision(before)


def test_full_precision_turns_autocast_off() -> None:
    x = torch.randn(8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with full_precision():
            assert (x @ x).dtype == torch.float32
        hessian = s3.compute_hessian(x)
    torch.testing.assert_close(hessian, (x.double().T @ x.double() / 8).float())
