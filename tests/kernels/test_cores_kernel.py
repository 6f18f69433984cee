"""The kernel that compresses a 2:4 weight for cuSPARSELt: its bytes, in the interpreter or on a GPU."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import INTERPRETED, run_again, source_of, triton_version
from torch import Tensor

import s3tensor as s3

triton = pytest.importorskip("triton", reason="needs Triton")

from s3tensor.kernels import cores  # noqa: E402 (what it needs is asked for first)

FEW = settings(max_examples=12 if INTERPRETED else 60)
# What a code's place in a tile counts, from the lowest bit: (rows, scopes).
BITS = ((8, 0), (0, 4), (0, 1), (0, 2), (1, 0), (2, 0), (4, 0), (16, 0), (32, 0), (0, 8))


def test_the_interpreter_runs_the_tests_of_this_file() -> None:
    run_again(__file__, 7)


def pruned(rows: int, columns: int, dtype: torch.dtype, seed: int, holes: bool = False) -> Tensor:
    """A random 2:4 weight; with ``holes`` some of what stays is zero, of either sign."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    weight = torch.where(s3.project(weight, "2:4"), weight, 0)
    if holes:
        weight = weight * (torch.rand(rows, columns, generator=generator) < 0.6)
    return weight


def parts(blob: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """The values (rows, scopes, 2) and the places (rows, scopes, 2) of a compressed weight."""
    rows = blob.shape[0]
    flat = blob.cpu().reshape(-1)
    count = rows * columns // 2
    values = flat[:count].reshape(rows, columns // 4, 2)
    words = flat[count:].view(torch.int16).to(torch.int32) & 0xFFFF
    codes = torch.stack([words >> shift & 15 for shift in (0, 4, 8, 12)], 1)
    tiles = codes.reshape(rows // 64, columns // 64, 1024)
    place = torch.arange(1024)
    row = torch.stack([(place >> bit & 1) * r for bit, (r, _) in enumerate(BITS)]).sum(0)
    scope = torch.stack([(place >> bit & 1) * s for bit, (_, s) in enumerate(BITS)]).sum(0)
    ordered = torch.empty(rows // 64, columns // 64, 64, 16, dtype=torch.int32)
    ordered[:, :, row, scope] = tiles
    code = ordered.transpose(1, 2).reshape(rows, columns // 4)
    return values, torch.stack([code & 3, code >> 2], -1)


def decompressed(blob: Tensor, columns: int) -> Tensor:
    values, places = parts(blob, columns)
    assert bool((places[..., 0] < places[..., 1]).all())  # what the tensor cores ask for
    whole = torch.zeros(*values.shape[:2], 4, dtype=values.dtype)
    return whole.scatter_(2, places.long(), values).reshape(blob.shape[0], columns)


cases = st.tuples(
    st.sampled_from([64, 128, 192]),
    st.sampled_from([64, 128, 192, 320]),
    st.sampled_from(cores.DTYPES),
    st.integers(0, 999),
)


@FEW
@given(cases, st.booleans(), st.booleans())
def test_every_value_has_its_place(device: str, case: tuple, holes: bool, turned: bool) -> None:
    rows, columns, dtype, seed = case
    weight = pruned(rows, columns, dtype, seed, holes)
    given_ = weight.t().contiguous().t() if turned else weight
    blob = cores.compress(given_.to(device))
    assert blob.shape == (rows, columns * 9 // 16) and blob.dtype == dtype
    assert torch.equal(decompressed(blob, columns), weight)


def test_infinities_and_nan_are_values(device: str) -> None:
    weight = torch.zeros(64, 64, dtype=torch.bfloat16)
    weight[0, :4] = torch.tensor([0.0, float("inf"), 0.0, float("nan")])
    weight[7, 60:] = torch.tensor([float("-inf"), 0.0, -0.0, 2.0**-133])  # and a subnormal
    whole = decompressed(cores.compress(weight.to(device)), 64)
    assert torch.equal(whole.nan_to_num(7.0), weight.nan_to_num(7.0))


def test_a_scope_of_three_becomes_nan_and_no_other(device: str) -> None:
    weight = pruned(128, 128, torch.float16, 0)
    weight[70, 36:40] = torch.tensor([1.0, 2.0, 3.0, 0.0])
    whole = decompressed(cores.compress(weight.to(device)), 128)
    assert whole[70, 36:40].isnan().sum() == 1
    whole[70, 36:40] = weight[70, 36:40]
    assert torch.equal(whole, weight)


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(64, 96), torch.zeros(64, 64), torch.zeros(0, 64).bfloat16(), torch.zeros(64)],
    ids=lambda w: f"{tuple(w.shape)} {w.dtype}",
)
def test_what_it_does_not_take_is_refused(weight: Tensor) -> None:
    assert not cores.covers(tuple(weight.shape), weight.dtype)
    with pytest.raises(ValueError, match=r"whole tiles of 64 x 64"):
        cores.compress(weight)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", cores.DTYPES)
@pytest.mark.parametrize("shape", [(64, 64), (128, 320), (640, 192), (2048, 5120)])
def test_the_bytes_are_those_of_cusparselt(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    if torch.cuda.get_device_capability()[0] != 9 or not torch.backends.cusparselt.is_available():
        pytest.skip("the layout is that of sm_90 and needs cuSPARSELt")
    weight = pruned(*shape, dtype, 3).cuda()
    expected = torch._cslt_compress(weight)
    assert torch.equal(cores.compress(weight).view(torch.int16), expected.view(torch.int16))
    other = weight.t().contiguous().t()
    assert torch.equal(cores.compress(other).view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("turned", [False, True])
def test_it_compiles_to_wide_loads_and_stores(turned: bool) -> None:
    if INTERPRETED:
        pytest.skip("the compiler's")
    from triton.backends.compiler import GPUTarget

    near = "down" if turned else "across"  # the stride of one, a constant for the compiler
    signature = {
        "w_ptr": "*i16", "values_ptr": "*i16", "codes_ptr": "*i16", "columns": "i32",
        "down": "i32", "across": "i32",
    }  # fmt: skip
    aligned = {"w_ptr", "values_ptr", "codes_ptr", "columns", "down", "across"} - {near}
    constants = {near: 1, "NAN": 0x7FC0, "WIDTH": cores._WIDTH}
    source = source_of(cores.compress_kernel, signature, constants, aligned)
    target = GPUTarget("cuda", 90, 32)
    built = triton.compile(source, target=target, options={"num_warps": cores._WARPS})
    code = built.asm["ptx"]
    assert re.search(r"ld\.global\S*\.v[24]\.b(32|64)", code)
    if triton_version() >= (3, 6):  # 3.2 stores the two values of a scope at a time
        assert re.search(r"st\.global\S*\.v[24]\.b32", code)
    assert built.metadata.shared <= 2 * 2 * 64 * 64 * cores._WIDTH  # no more than the tile, twice
