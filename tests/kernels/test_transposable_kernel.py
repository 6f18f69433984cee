"""The kernel of transposable masks: the masks that torch code finds, in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import INTERPRETED, run_again, source_of

import s3tensor as s3
from s3tensor.mask.transposable import tile_masks, transposable_mask

triton = pytest.importorskip("triton", reason="needs Triton")

from s3tensor.kernels import transposable as kernel  # noqa: E402 (what it needs is asked for first)

FEW = settings(max_examples=12 if INTERPRETED else 60)


def test_the_interpreter_runs_the_tests_of_this_file() -> None:
    run_again(__file__, 6)


@FEW
@given(
    st.sampled_from([(4, 4), (8, 20), (4, 1028)]),
    st.sampled_from(kernel.DTYPES),
    st.booleans(),
    st.booleans(),
    st.integers(0, 999),
)
def test_the_masks_are_those_of_torch(
    device: str, shape: tuple, dtype: torch.dtype, ties: bool, squared: bool, seed: int
) -> None:
    given_ = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    given_ = (given_.mul(2).round() if ties else given_).to(dtype)
    found = kernel.best(given_.to(device), squared).cpu()
    expected = s3.transposable(given_, "2:4", None if squared else given_)
    if squared or dtype != torch.float32:  # sums of squares or of 16-bit scores are exact
        assert torch.equal(found, expected)
    scores = given_.double().square() if squared else given_.double()

    def total(mask: torch.Tensor) -> torch.Tensor:
        return (scores * mask).view(shape[0] // 4, 4, -1, 4).sum((1, 3))

    torch.testing.assert_close(total(found), total(expected), rtol=1e-12, atol=1e-12)


def test_each_of_the_90_masks_is_found_where_it_is_the_best(device: str) -> None:
    every = tile_masks(2)  # (90, 4, 4)
    scores = every.float().transpose(0, 1).reshape(4, 360)  # side by side
    found = kernel.best(scores.to(device), squared=False).cpu()
    assert len(every) == 90 and torch.equal(found, scores.bool())


def test_nan_is_kept_and_huge_and_tiny_weights_keep_their_order(device: str) -> None:
    weight = torch.zeros(4, 12)
    weight[3, 3] = float("nan")  # the first mask would drop it
    weight[:, 4:8] = torch.randn(4, 4) * 1e38
    weight[:, 8:] = torch.randn(4, 4) * 1e-38
    found = kernel.best(weight.to(device), True).cpu()
    assert bool(found[3, 3])
    whole = weight[:, 4:].contiguous()
    assert torch.equal(found[:, 4:], s3.transposable(whole, "2:4"))


@pytest.mark.parametrize(
    "given_",
    [torch.zeros(4, 6), torch.zeros(4, 4).double(), torch.zeros(8, 4).t(), torch.zeros(0, 4)],
    ids=lambda x: f"{tuple(x.shape)} {x.dtype} {x.stride()}",
)
def test_what_it_does_not_take_is_refused(given_: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="whole tiles of 4 x 4"):
        kernel.best(given_, True)


@pytest.mark.gpu
def test_a_forward_on_a_gpu_does_not_wait_and_takes_the_mask_of_the_cpu() -> None:
    weight = torch.randn(64, 128)
    on_gpu = weight.cuda()
    transposable_mask(on_gpu, 2)  # compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = transposable_mask(on_gpu, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.cpu(), s3.transposable(weight, "2:4"))
    turned = s3.transposable(weight.t().cuda(), "2:4")  # not contiguous
    assert torch.equal(turned.cpu(), s3.transposable(weight.t(), "2:4"))
    on_gpu[0, 0] = float("nan")
    assert bool(transposable_mask(on_gpu, 2)[0, 0])
    with pytest.raises(s3.NonFiniteError):
        s3.transposable(on_gpu, "2:4")


def test_it_compiles_without_a_spill() -> None:
    if INTERPRETED:
        pytest.skip("the compiler's")
    from triton.backends.compiler import GPUTarget

    signature = {
        "given_ptr": "*fp32", "mask_ptr": "*i32", "columns": "i32",
    }  # fmt: skip
    constants = {"SQUARED": True, "TILES": kernel._TILES}
    source = source_of(kernel.best_kernel, signature, constants, set(signature))
    target = GPUTarget("cuda", 90, 32)
    built = triton.compile(source, target=target, options={"num_warps": kernel._WARPS})
    assert "st.local" not in built.asm["ptx"] and "ld.local" not in built.asm["ptx"]
    assert "add.f64" in built.asm["ptx"] and "mul.f64" in built.asm["ptx"]
