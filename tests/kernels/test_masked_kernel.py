"""The kernel of the weight in use: what mask, product and threshold give, in the interpreter or on a GPU."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import INTERPRETED, run_again
from torch import Tensor, nn
from torch.nn.utils import parametrize

import s3tensor as s3
from s3tensor.mask import projection as masking
from s3tensor.train.masked import shrink_run
from s3tensor.train.s3_sparse import MODES

triton = pytest.importorskip("triton", reason="needs Triton")
if tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 3):
    pytest.skip("the mask kernels need Triton 3.3", allow_module_level=True)

from s3tensor.kernels import masked as kernel  # noqa: E402 (what it needs is asked for first)

FEW = settings(max_examples=12 if INTERPRETED else 60)


def test_the_interpreter_runs_the_tests_of_this_file() -> None:
    run_again(__file__, 16)


def weight_of(ties: bool, rows: int, dtype: torch.dtype, seed: int) -> Tensor:
    weight = torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))
    return (weight.mul(2).round() if ties else weight).to(dtype)


cases = st.tuples(
    st.booleans(),
    st.sampled_from([1, 3, 300]),
    st.sampled_from(kernel.DTYPES),
    st.integers(1, 4),
    st.integers(0, 999),
)


@FEW
@given(cases, st.booleans())
def test_the_masked_weight_is_that_of_project(device: str, case: Any, write: bool) -> None:
    ties, rows, dtype, keep, seed = case
    weight = weight_of(ties, rows, dtype, seed)
    expected = s3.project(weight, f"{keep}:4")
    out, mask = kernel.masked(weight.to(device), keep, write=write)
    assert torch.equal(out.cpu(), torch.where(expected, weight, 0))
    if bool((weight != 0).all()):  # then all zeros are pruned ones
        assert not bool(torch.signbit(out[out == 0]).any())
    assert (mask is None) != write
    if mask is not None:
        assert torch.equal(mask.cpu(), expected)


@FEW
@given(cases, st.booleans())
def test_the_soft_weight_is_the_threshold_times_beta(device: str, case: Any, held: bool) -> None:
    ties, rows, dtype, keep, seed = case
    weight = weight_of(ties, rows, dtype, seed)
    mask = s3.project(weight, f"{keep}:4")
    beta = torch.tensor(1.37)
    given_mask = mask.to(device) if held else None
    out, _ = kernel.masked(weight.to(device), keep, given_mask, beta.to(device))
    expected = shrink_run(weight, mask, 4) * beta
    # Of 16 bits, torch rounds the factor too on a CPU, and the interpreter cuts bits off.
    exact = {"rtol": 0, "atol": 0} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0}
    torch.testing.assert_close(out.cpu(), expected, **exact)
    assert torch.equal(out.cpu() == 0, expected == 0)


@FEW
@given(cases, st.sampled_from([0.0, 2e-4, 0.37]))
def test_decay_is_added_as_two_operators_add_it(device: str, case: Any, decay: float) -> None:
    ties, rows, dtype, keep, seed = case
    weight = weight_of(ties, rows, dtype, seed)
    grad = weight_of(False, rows, dtype, seed + 1000)
    mask = s3.project(weight, f"{keep}:4")
    out = kernel.decayed(*(x.to(device) for x in (grad, weight, mask)), decay)
    expected = grad + torch.where(mask, 0, weight) * decay
    # The interpreter cuts bits of 16-bit results off.
    exact = dtype == torch.float32 or not INTERPRETED
    near = {"rtol": 0, "atol": 0} if exact else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(out.cpu(), expected, **near)
    assert torch.equal(out.cpu()[mask], grad[mask])


def test_nan_reaches_the_soft_weight(device: str) -> None:
    weight = torch.tensor([[1.0, float("nan"), 3.0, 2.0]])
    mask = torch.tensor([[False, True, True, False]])
    for given_mask in (None, mask.to(device)):
        out, _ = kernel.masked(weight.to(device), 2, given_mask, torch.ones((), device=device))
        assert out.isnan().tolist() == [[False, True, False, False]] and out[0, 2] == 1
    assert shrink_run(weight, mask, 4).isnan().tolist() == [[False, True, False, False]]


def test_nan_counts_as_the_largest_and_refusals_say_what_is_taken(device: str) -> None:
    weight = torch.tensor([[1.0, float("nan"), 3.0, 2.0]], device=device)
    out, mask = kernel.masked(weight, 2, write=True)
    assert mask is not None and mask.tolist() == [[False, True, True, False]]
    assert out[0, 2] == 3 and bool(out[0, 1].isnan())
    for wrong in (weight.double(), torch.ones(3, 2, device=device), torch.ones(4, 4).t()):
        with pytest.raises(ValueError, match="whole scopes"):
            kernel.masked(wrong, 2)


@pytest.mark.parametrize(
    ("mode", "pattern", "options"),
    [
        *((mode, "2:4", {}) for mode in MODES),
        *((mode, "2:4", {"refresh": 2}) for mode in MODES[1:]),
        ("fixed", "rowpair16", {}),
        ("srste", "pair4:8", {"refresh": 2}),
    ],
)
def test_training_through_the_kernel_is_training_without(
    device: str, mode: str, pattern: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(16, 16, bias=False).to(device)
    parametrize.register_parametrization(plain, "weight", s3.S3Sparse(pattern, mode, **options))
    layer = copy.deepcopy(plain)
    calls: list[str] = []
    for name in ("masked", "decayed"):
        run = getattr(kernel, name)
        monkeypatch.setattr(
            kernel, name, lambda *a, run=run, **k: (calls.append(run.__name__), run(*a, **k))[1]
        )
    for on, each in ((False, plain), (True, layer)):
        monkeypatch.setattr(masking, "on_plain_gpu", lambda x, on=on: on)
        optimizer = torch.optim.SGD(each.parameters(), lr=0.5)
        for seed in range(3):
            x = torch.randn(5, 16, generator=torch.Generator().manual_seed(seed)).to(device)
            each(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            s3.step(each)
        each_step = {"fixed": ["masked"] * 2, "srste": ["masked", "decayed"]}.get(mode, ["masked"])
        assert calls == (each_step * 3 if on else [])
    for left, right in zip(plain.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(right, left, rtol=1e-6, atol=1e-7)
    last = layer.weight.detach().clone()
    s3.finalize(layer)
    monkeypatch.undo()
    assert torch.equal(layer.weight.to_dense(), last)


@pytest.mark.parametrize("mode", ["fixed", "srste"])
def test_second_gradients_are_those_without_the_kernels(
    device: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = nn.Linear(16, 8, bias=False).to(device)
    parametrize.register_parametrization(layer, "weight", s3.S3Sparse("2:4", mode))
    original = layer.parametrizations.weight.original
    x = torch.randn(5, 16, device=device)
    found = []
    for on in (False, True):
        monkeypatch.setattr(masking, "on_plain_gpu", lambda x, on=on: on)
        (grad,) = torch.autograd.grad(layer(x).pow(3).sum(), original, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), original)[0])
    torch.testing.assert_close(*found)
    assert bool(found[0].any())


@pytest.mark.parametrize(
    ("held", "write", "soft"),
    [(False, False, False), (False, True, False), (True, False, True), (True, False, False)],
)
def test_it_compiles_to_wide_loads_and_stores_of_what_stays_in_registers(
    held: bool, write: bool, soft: bool
) -> None:
    if INTERPRETED:
        pytest.skip("the compiler's")
    from triton.backends.compiler import GPUTarget

    signature = {
        "w_ptr": "*fp32", "mask_ptr": "*i8", "out_ptr": "*fp32", "beta_ptr": "*fp32", "total": "i32",
    }  # fmt: skip
    found = kernel.constants(2, held, write, soft)
    warps = found.pop("num_warps")
    divisible = {(i,): [["tt.divisibility", 16]] for i in range(5)}
    source = triton.compiler.ASTSource(
        kernel.masked_kernel, signature | dict.fromkeys(found, "constexpr"), found, divisible
    )
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    code = built.asm["ptx"]
    assert re.search(r"ld\.global\S*\.v4\.b32", code) and re.search(r"st\.global\S*\.v4\.b32", code)
    # Bytes of the mask alone change lanes, so that sixteen are stored together.
    assert built.metadata.shared == (2048 if held or write else 0)


def test_decay_compiles_to_wide_loads_and_a_product_that_is_rounded() -> None:
    if INTERPRETED:
        pytest.skip("the compiler's")
    from triton.backends.compiler import GPUTarget

    signature = {
        "grad_ptr": "*fp32", "w_ptr": "*fp32", "mask_ptr": "*i8", "out_ptr": "*fp32", "decay": "fp32",
        "total": "i32", "BLOCK": "constexpr",
    }  # fmt: skip
    divisible = {(i,): [["tt.divisibility", 16]] for i in (0, 1, 2, 3, 5)}
    source = triton.compiler.ASTSource(
        kernel.decayed_kernel, signature, {"BLOCK": kernel._PROGRAM // 2}, divisible
    )
    options = {"num_warps": kernel._WARPS, "enable_fp_fusion": False}
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert re.search(r"ld\.global\S*\.v4\.b32", code) and re.search(r"st\.global\S*\.v4\.b32", code)
    assert "fma" not in code
