"""ADMM against its own equations, and the arithmetic that makes it fast: followed inverses, TF32."""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import s3tensor as s3
from s3tensor import prune
from s3tensor.mask.projection import select
from s3tensor.pattern import Pattern
from s3tensor.prune import linalg
from s3tensor.prune.admm import block_scale
from s3tensor.prune.hessian import Factors
from s3tensor.prune.linalg import ShiftedInverse, full_precision, tensor_cores
from s3tensor.prune.product import Product

admm_module = importlib.import_module("s3tensor.prune.admm")  # the function hides it

fewer = settings(max_examples=max(10, settings().max_examples // 14))
seeds = st.integers(0, 2**16)
PATTERNS = ("2:4", "pair4:8", "coupled2:4", "rowpair16", "unstructured@0.5", "block:2x4@0.5")


def layer(rows: int, columns: int, seed: int, tokens: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A float64 weight, the Hessian of correlated inputs, and the cross term with inputs near them."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    mixing = torch.eye(columns, dtype=torch.float64) + normal(columns, columns) / columns**0.5
    dense = normal(tokens or 6 * columns, columns) @ mixing
    x = dense + 0.3 * normal(*dense.shape)
    return normal(rows, columns), x.T @ x / len(x), dense.T @ x / len(x)


def alps(
    weight: Tensor, hessian: Tensor, linear: Tensor, scale: Tensor, pattern: str, hold: int
) -> Tensor:
    """The mask of a group of rows by equations 5 to 7 of ALPS as they stand, all in scaled units."""
    bound = Pattern.parse(pattern).bind((len(weight), len(hessian)))
    scaled, pull = hessian / scale[:, None] / scale, linear / scale
    dense = weight * scale
    mask = select(dense.square(), bound)
    sparse, dual = dense * mask, torch.zeros_like(dense)
    rho, growth = 0.85, 1.1
    for _ in range(40):
        settled = True
        ridge = scaled + rho * torch.eye(len(hessian), dtype=hessian.dtype)
        for _ in range(hold):
            whole = torch.linalg.solve(ridge, pull - dual + rho * sparse, left=False)
            point = whole + dual / rho
            before, mask = mask, select(point.square(), bound)
            sparse = point * mask
            dual = dual + rho * (whole - sparse)
            settled &= torch.equal(mask, before)
        if settled:
            break
        rho, growth = rho * growth, growth * 1.01
    return mask


@fewer
@given(st.sampled_from(PATTERNS), seeds, st.booleans(), st.sampled_from((1, 4, 8)))
def test_admm_follows_the_equations_of_alps(
    pattern: str, seed: int, with_target: bool, hold: int
) -> None:
    weight, hessian, cross = layer(32, 32, seed)
    factors = Factors(hessian, 0.01)
    target = cross if with_target else None
    bound = Pattern.parse(pattern).bind((32, 32))
    mixed = factors.matrix
    if with_target:
        mixed = 0.7 * factors.matrix + 0.3 * (cross + factors.ridge * torch.eye(32))
    scale = block_scale(factors, Product.of(bound), 0.85)
    found = prune.admm(weight, factors, pattern, target=target, alpha=0.3, hold=hold).mask
    # Groups of rows stop alone: each is a problem of its own.
    groups = weight.split(bound.row_period)
    expected = [alps(w, factors.matrix, w @ mixed, scale, pattern, hold) for w in groups]
    assert torch.equal(found, torch.cat(expected))


@fewer
@given(st.sampled_from(PATTERNS), seeds)
def test_one_sequence_of_inverses_serves_all_chunks(pattern: str, seed: int) -> None:
    weight, hessian, _ = layer(32, 16, seed)
    asked: list[float] = []
    real = ShiftedInverse.at

    def counted(self: ShiftedInverse, rho: float) -> Tensor:
        asked.append(rho)
        return real(self, rho)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShiftedInverse, "at", counted)
        whole = prune.admm(weight, hessian, pattern)
        alone = len(asked)
        parts = prune.admm(weight, hessian, pattern, memory_budget=8192)
    assert len(asked) == 2 * alone and asked == sorted(set(asked)) * 2
    assert torch.equal(whole.mask, parts.mask)


# Inverses ---------------------------------------------------------------------------------------------


def scaled_hessian(size: int, seed: int) -> Tensor:
    """A damped Hessian of unit diagonal whose eigenvalues span about five decades."""
    _, hessian, _ = layer(1, size, seed)
    strength = torch.logspace(0, -2, size, dtype=torch.float64)
    turned = torch.linalg.qr(hessian).Q * strength
    hessian = turned @ turned.T
    unit = hessian.diagonal().rsqrt()
    return hessian * unit[:, None] * unit


@given(seeds, st.floats(0.05, 5.0), st.floats(1.01, 1.19), st.integers(1, 12))
def test_a_followed_inverse_is_off_by_the_fourth_power_of_the_step(
    seed: int, rho: float, growth: float, steps: int
) -> None:
    hessian = scaled_hessian(24, seed)
    inverses = ShiftedInverse(hessian, follow=True)
    eye = torch.eye(24, dtype=torch.float64)
    # What is left of one step enters the next: e -> (e + step)^4 at worst, which stays near step^4.
    limit = 1.5 * (growth - 1.0) ** 4 + 1e-12
    for _ in range(steps):
        lack = eye - (hessian + rho * eye) @ inverses.at(rho)
        assert float(torch.linalg.matrix_norm(lack, 2)) <= limit
        rho *= growth


@given(seeds, st.sampled_from((1.3, 2.0, 100.0, 0.5)))
def test_a_long_step_is_not_followed(seed: int, growth: float) -> None:
    hessian = scaled_hessian(16, seed)
    inverses = ShiftedInverse(hessian, follow=True)
    for rho in (1.0, growth, growth**2):
        exact = torch.linalg.inv(hessian + rho * torch.eye(16, dtype=torch.float64))
        torch.testing.assert_close(inverses.at(rho), exact, rtol=1e-9, atol=1e-9)


@given(seeds)
def test_a_cpu_factors_anew_for_every_penalty(seed: int) -> None:
    hessian = scaled_hessian(16, seed)
    inverses = ShiftedInverse(hessian)
    for rho in (0.7, 0.77, 0.85):
        exact = torch.linalg.inv(hessian + rho * torch.eye(16, dtype=torch.float64))
        torch.testing.assert_close(inverses.at(rho), exact, rtol=1e-10, atol=1e-10)


def tf32(x: Tensor) -> Tensor:
    """x as a tensor core reads it at worst: the last 13 bits of the mantissa cut off."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("tokens", [80, 1024])
def test_a_gpus_arithmetic_costs_no_error(
    pattern: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TF32 products and followed inverses, imitated on a CPU."""
    problems = [[x.float() for x in layer(64, 128, seed, tokens)] for seed in range(3)]

    def losses() -> Tensor:
        """Of all problems: towards the own outputs, and towards a dense stream's."""
        total = torch.zeros(2, dtype=torch.float64)
        for weight, hessian, cross in problems:
            factors = Factors(hessian, 0.001)
            whole = ((weight @ factors.matrix) * weight).double().sum()
            for i, target in enumerate((None, cross)):
                pruned = prune.admm(weight, factors, pattern, target=target).weight
                mixed = factors.matrix if target is None else (factors.matrix + target) / 2
                rest = (pruned @ factors.matrix - 2 * weight @ mixed) * pruned
                total[i] += whole + rest.double().sum()
        return total

    exact = losses()
    addmm, real_round = torch.addmm, admm_module._Rows.round

    def rounded(x: Tensor, a: Tensor, b: Tensor, *, alpha: float, out: Tensor) -> Tensor:
        return addmm(x, tf32(a), tf32(b), alpha=alpha, out=out)

    def coarse_round(self: admm_module._Rows, rho: float, inverse: Tensor, hold: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "addmm", rounded)
            real_round(self, rho, inverse, hold)

    monkeypatch.setattr(
        admm_module, "ShiftedInverse", functools.partial(ShiftedInverse, follow=True)
    )
    monkeypatch.setattr(admm_module._Rows, "round", coarse_round)
    # Other close calls, as from growth=1.099: that moves so few weights by 2 % where inputs lack a rank.
    torch.testing.assert_close(losses(), exact, rtol=0.03 if tokens < 128 else 0.006, atol=0)


# Precision --------------------------------------------------------------------------------------------


def test_tensor_cores_are_allowed_on_cuda_alone_and_only_inside() -> None:
    on_cuda = types.SimpleNamespace(is_cuda=True)
    with full_precision():
        full = linalg._set_precision(None)
        with contextlib.suppress(ArithmeticError), tensor_cores(on_cuda):  # type: ignore[arg-type]
            allowed = linalg._set_precision(None)
            raise ArithmeticError
        assert allowed in (("high",), ("tf32", "ieee"))
        assert linalg._set_precision(None) == full
        with tensor_cores(torch.zeros(1)):
            assert linalg._set_precision(None) == full


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_gpu_finds_what_a_cpu_finds(pattern: str) -> None:
    weight, hessian, _ = (x.float() for x in layer(256, 512, 0))
    before = torch.get_float32_matmul_precision()
    errors = []
    for device in ("cpu", "cuda"):
        pruned = prune.admm(weight.to(device), hessian.to(device), pattern).weight.cpu()
        errors.append(s3.output_error(pruned, weight, hessian))
    assert math.isclose(*errors, rel_tol=2e-3)
    assert torch.get_float32_matmul_precision() == before
