"""CUDA kernels of selection: the results of the torch code, in Triton's interpreter or on a GPU.

The interpreter must be chosen before Triton is imported, so that one test here runs the others again in a
process of its own. What the kernels compile to is read where there is no GPU, too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import INTERPRETED, assembled, run_again, source_of
from torch import Tensor

import s3tensor as s3
from s3tensor.mask import projection as masking
from s3tensor.mask.projection import stretches, top_blocks
from s3tensor.pattern import BoundPattern, Pattern
from s3tensor.testing import bound_patterns

triton = pytest.importorskip("triton", reason="needs Triton")
if tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 3):
    pytest.skip("the mask kernels need Triton 3.3", allow_module_level=True)

from s3tensor.kernels import masks, select  # noqa: E402 (what they need is asked for first)

FEW = settings(max_examples=8 if INTERPRETED else 60)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def test_the_interpreter_runs_the_tests_of_this_file() -> None:
    run_again(__file__, 40)


@contextmanager
def kernels(on: bool, device: str) -> Iterator[None]:
    """Let ``mask`` and ``selection`` use kernels or not; on the CPU they run in the interpreter."""
    before = masking.on_plain_gpu
    if not on:
        masking.on_plain_gpu = lambda x: False
    elif device == "cpu":
        masking.on_plain_gpu = lambda x: True
    try:
        yield
    finally:
        masking.on_plain_gpu = before


def same(a: Tensor, b: Tensor) -> bool:
    """Equal values, any NaN being one."""
    return (
        a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
    )


def values(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """``smooth``, ``ties`` of a few values, or ``wild``: ties, zeros of both signs, NaN and Inf."""
    generator = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        if kind == "smooth":
            return torch.randint(info.min, info.max, shape, generator=generator, dtype=dtype)
        few = torch.tensor([info.min, info.max, 0, 1, info.max - 1, 2], dtype=dtype)
        return few[torch.randint(0, 6, shape, generator=generator)]
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "huge":  # from the smallest to the largest number of the type
        info = torch.finfo(dtype)
        low, high = math.log(info.smallest_normal), math.log(info.max)
        span = torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low
        return (span.exp() * x.sign()).clamp(-info.max, info.max).to(dtype)
    if kind != "smooth":
        x = x.mul(1.5).round()
    x = x.to(dtype)
    if kind == "wild":
        pick = torch.rand(shape, generator=generator)
        for limit, value in ((0.5, -0.0), (0.4, math.nan), (0.25, math.inf), (0.12, -math.inf)):
            x[pick < limit] = value
    return x


# Order statistics -------------------------------------------------------------------------------------

rows_of = st.tuples(
    st.sampled_from(select.DTYPES),
    st.sampled_from(("smooth", "ties", "wild", "huge")),
    st.integers(1, 3),
    st.sampled_from((1, 2, 3, 7, 8, 16, 31, 33, 64, 100, 130)),
    st.integers(0, 2**31),
)


def at_rank(x: Tensor, k: int) -> Tensor:
    """The oracle: the k-th largest of each row by a sort."""
    return x.cpu().sort(-1, descending=True).values[..., k - 1].to(x.device)


@FEW
@given(rows_of, st.floats(0, 1))
def test_kth_largest_is_the_kth_of_a_sort(
    device: str, case: tuple[torch.dtype, str, int, int, int], share: float
) -> None:
    dtype, kind, rows, n, seed = case
    x = values(kind, (rows, n), dtype, seed).to(device)
    for k in {1, n, 1 + int(share * (n - 1))}:
        assert same(select.kth_largest(x, k), at_rank(x, k))


def test_a_bracket_that_ends_at_zero_leaves_out_the_negative_zero(device: str) -> None:
    """What is below 0.0 is below -0.0 too, though the order of keys has -0.0 between them."""
    inf, nan = math.inf, math.nan
    row = torch.tensor([[2.0, -0.0, nan, 1.0, -0.0, -2.0, 1.0, -inf, inf]], device=device)
    for dtype in (torch.float32, torch.float16, torch.float64):
        x = row.to(dtype)
        for k in range(1, 10):
            assert same(select.kth_largest(x, k), at_rank(x, k))
            if k < 9:
                lower = select.two_largest(x, k)[1]
                assert same(lower, at_rank(x, k + 1))


@FEW
@given(rows_of, st.floats(0, 1))
def test_two_largest_are_neighbours_in_a_sort(
    device: str, case: tuple[torch.dtype, str, int, int, int], share: float
) -> None:
    dtype, kind, rows, n, seed = case
    x = values(kind, (rows, n + 1), dtype, seed).to(device)
    for k in {n, 1 + int(share * (n - 1))}:
        upper, lower = select.two_largest(x, k)
        assert same(upper, at_rank(x, k)) and same(lower, at_rank(x, k + 1))


@FEW
@given(rows_of, st.floats(0, 1))
def test_top_blocks_is_that_of_torch(
    device: str, case: tuple[torch.dtype, str, int, int, int], share: float
) -> None:
    dtype, kind, rows, n, seed = case
    x = values(kind, (rows, n), dtype, seed).nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
    for keep in {1, n, 1 + int(share * (n - 1))}:
        with kernels(False, device):
            expected = top_blocks(x, keep)
        with kernels(True, device):
            assert torch.equal(top_blocks(x.to(device), keep).cpu(), expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_negative_zeros_are_below_the_positive(device: str, dtype: torch.dtype) -> None:
    x = torch.tensor([[0.0, -0.0, 1.0, 0.0, -0.0, -1.0]], device=device, dtype=dtype)
    signs = [bool(select.kth_largest(x, k).signbit()) for k in range(1, 7)]
    assert signs == [False, False, False, True, True, True]


@pytest.mark.parametrize(
    "cut",
    [
        select.Cut(1, 4), select.Cut(4, 2, 2), select.Cut(8, 1), select.Cut(64, 2),
    ],
    ids=str,
)  # fmt: skip
def test_every_cut_selects_the_same(device: str, cut: select.Cut) -> None:
    x = values("wild", (2, 128), torch.float32, 1).to(device)
    assert same(select.kth_largest(x, 40, cut=cut), at_rank(x, 40))
    clean = values("ties", (2, 128), torch.float32, 1).to(device)
    expected = select.top_blocks(clean, 50)
    assert torch.equal(select.top_blocks(clean, 50, cut=cut), expected)
    assert (expected.sum(-1) == 50).all()


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (torch.float32, "wild"), (torch.float16, "ties"), (torch.bfloat16, "wild"), (torch.float64, "wild"),
        (torch.uint8, "smooth"), (torch.int8, "wild"), (torch.int32, "wild"), (torch.int64, "smooth"),
    ],
    ids=str,
)  # fmt: skip
def test_rows_that_registers_do_not_hold(
    device: str, dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "LONGEST", 16)
    for n in (17, 2100):
        x = values(kind, (2, n), dtype, n).to(device)
        for k in (n // 3, n - 1):
            assert same(select.kth_largest(x, k), at_rank(x, k))
            upper, lower = select.two_largest(x, k)
            assert same(upper, at_rank(x, k)) and same(lower, at_rank(x, k + 1))


def test_one_row_of_many_stretches(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "LONGEST", 16)
    x = values("ties", (1, 40000), torch.float32, 5).to(device)
    for k in (1, 20001):
        assert same(select.kth_largest(x, k), at_rank(x, k))


@FEW
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    st.sampled_from((*FLOATS, torch.int32, torch.bool)),
    st.sampled_from((0.0, 0.3, 1.0, 5.0)),
    st.integers(0, 2**31),
    st.data(),
)
def test_the_functions_of_the_library_do_not_tell_a_kernel(
    device: str, shape: tuple[int, ...], dtype: torch.dtype, weight: float, seed: int, data: st.DataObject
) -> None:  # fmt: skip
    x = values("wild", shape, torch.float32, seed).nan_to_num(nan=2.0).to(dtype).to(device)
    x = x.movedim(0, -1)
    dim = data.draw(st.none() | st.integers(-x.ndim, x.ndim - 1))
    n = x.numel() if dim is None else x.shape[dim]
    k = data.draw(st.integers(1, n))
    found = []
    for on in (False, True):
        with kernels(on, device):
            found.append([s3.kth_largest(x, k, dim), s3.kth_largest(x, k, dim, keepdim=True)])
            if k < n:
                found[-1].append(s3.mid_kth_largest(x, k, dim, weight))
    assert all(same(a, b) for a, b in zip(*found, strict=True))


def test_what_is_differentiated_keeps_its_gradient(device: str) -> None:
    x = torch.tensor([[3.0, 1.0, 2.0]], device=device, requires_grad=True)
    with kernels(True, device):
        s3.kth_largest(x, 2, dim=1).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[0.0, 0.0, 1.0]]


def test_selection_refuses_by_name() -> None:
    x = torch.ones(2, 8)
    for bad, k, message in (
        (x, 9, "k=9 is not from 1 to 8"),
        (x, 0, "k=0 is not from 1 to 8"),
        (x.t(), 1, "contiguous"),
        (x[:0], 1, "not empty"),
        (x.to(torch.complex64), 1, "complex64 is not one of"),
    ):
        with pytest.raises(ValueError, match=message):
            select.kth_largest(bad, k)
    with pytest.raises(ValueError, match="k=8 is not from 1 to 7"):
        select.two_largest(x, 8)
    with pytest.raises(ValueError, match="registers hold"):
        select.top_blocks(torch.ones(1, select.LONGEST + 1), 1)
    with pytest.raises(ValueError, match=r"magnitudes of torch\.int32"):
        select.top_blocks(x.int(), 1, absolute=True)


# Masks ------------------------------------------------------------------------------------------------


def check_stretches(bound: BoundPattern, where: masks.Stretches) -> None:
    """The weights of each scope, block by block, are those of the pattern."""
    size = where.length * where.count
    found = set()
    for s in range(math.prod(bound.shape) // size):
        first = s * where.length
        if where.span > 1:
            first = s // where.span * where.stride + s % where.span * where.length
        blocks: list[list[int]] = [[] for _ in range(where.blocks)]
        for c in range(where.count):
            for p in range(where.length):
                block = c if where.rows else p // where.run
                blocks[block].append(first + c * where.apart + p)
        found.add(tuple(tuple(sorted(block)) for block in blocks))
    offsets = torch.tensor(bound.tiles.offsets())
    offsets = offsets.reshape(bound.scopes, bound.blocks_per_scope, bound.block_size)
    expected = {tuple(tuple(sorted(block)) for block in scope) for scope in offsets.tolist()}
    assert found == expected


@given(bound_patterns(max_elements=512))
def test_stretches_are_the_scopes_and_blocks_of_a_pattern(bound: BoundPattern) -> None:
    layout = stretches(bound)
    if layout is not None:
        check_stretches(bound, masks.Stretches(**layout))


COVERED = {
    "2:4": (6, 16), "1:3": (5, 12), "2:2": (3, 8), "8:16": (2, 32), "pair4:8": (3, 32), "coupled2:4": (4, 48),
    "rowpair16": (32, 48), "block:2x2@2:4": (6, 32), "block:1x3@1:2": (4, 12), "block:4x1@2:4": (8, 12),
    "conv2:4": (3, 8, 3, 3), "head:2@0.5/group:2": (8, 6),
}  # fmt: skip


@pytest.mark.parametrize("pattern", COVERED)
def test_the_presets_lie_in_stretches(pattern: str) -> None:
    bound = Pattern.parse(pattern).bind(COVERED[pattern])
    layout = stretches(bound)
    assert layout is not None
    where = masks.Stretches(**layout)
    check_stretches(bound, where)
    assert (where.blocks, where.block_size) == (bound.blocks_per_scope, bound.block_size)
    assert masks.covers(where, torch.bfloat16)


def test_down_the_columns_is_stretches_of_one_weight() -> None:
    bound = Pattern.parse("2:4").after("m k -> k m").bind((8, 6))
    assert stretches(bound) == {
        "length": 1, "count": 4, "apart": 6, "run": 1, "rows": True, "span": 6, "stride": 24,
    }  # fmt: skip


def both(weight: Tensor, pattern: Pattern | str, device: str) -> tuple[Tensor, Tensor]:
    """The masks of torch on the CPU and of a kernel."""
    with kernels(False, device):
        expected = s3.project(weight, pattern)
    with kernels(True, device):
        return expected, s3.project(weight.to(device), pattern).cpu()


@pytest.mark.parametrize("pattern", [*COVERED, "3:8", "5:7", "4:32", "20:24", "unstructured@0.3"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["smooth", "ties", "huge"])
def test_a_projection_is_that_of_torch(
    device: str, pattern: str, dtype: torch.dtype, kind: str
) -> None:
    shapes = {"3:8": (3, 40), "5:7": (3, 14), "4:32": (3, 64), "20:24": (5, 48)}
    shape = COVERED.get(pattern, shapes.get(pattern, (3, 50)))
    weight = values(kind, shape, dtype, len(pattern))
    expected, found = both(weight, pattern, device)
    assert torch.equal(expected, found)


@FEW
@given(bound_patterns(max_elements=512), st.sampled_from(FLOATS), st.integers(0, 2**31))
def test_any_pattern_projects_as_in_torch(
    device: str, bound: BoundPattern, dtype: torch.dtype, seed: int
) -> None:
    # Small integers: every sum of squares is exact, whatever its order.
    weight = values("ties", bound.shape, dtype, seed)
    expected, found = both(weight, bound.pattern, device)
    assert torch.equal(expected, found)


@pytest.mark.parametrize("pattern", ["2:4", "pair4:8", "4:32"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_kernel_refuses_nan_and_inf(device: str, pattern: str, bad: float) -> None:
    for dtype in FLOATS:
        weight = torch.ones(40, 64, dtype=dtype, device=device)
        with kernels(True, device):
            assert s3.project(weight, pattern).any()
            weight[33, 7] = bad
            with pytest.raises(s3.NonFiniteError, match="holds NaN or Inf"):
                s3.project(weight, pattern)


def test_the_kernel_takes_a_weight_in_any_strides_and_at_any_address(device: str) -> None:
    base = values("smooth", (9, 41), torch.bfloat16, 3)
    around = torch.zeros(9 * 41 + 3, dtype=torch.bfloat16)
    for start in range(4):
        shifted = around[start : start + 320].view(8, 40)
        shifted.copy_(base[:8, :40])
        for weight in (shifted, base[1:, 1:], base[:8, :40].t().contiguous().t()):
            expected, found = both(weight, "2:4", device)
            assert torch.equal(expected, found)


def test_a_mask_kernel_refuses_by_name() -> None:
    weight = torch.ones(4, 8)
    for bad, where, keep in (
        (weight, masks.Stretches(4), 5),
        (weight, masks.Stretches(5), 1),
        (weight, masks.Stretches(32), 1),
        (weight.t(), masks.Stretches(4), 2),
        (weight.int(), masks.Stretches(4), 2),
        (weight.double(), masks.Stretches(8, run=2), 2),
    ):
        with pytest.raises(ValueError, match="the kernel takes contiguous floats"):
            masks.project(bad, where, keep)


# Compilation ------------------------------------------------------------------------------------------


_NAMES = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64,
    "i32": torch.int32,
}  # fmt: skip


def compiled(
    kernel: Any, pointers: dict[str, str], constants: dict[str, Any], arch: int, stack: int = 0
) -> tuple[str, str]:
    """(layouts, SASS) of a kernel for ``sm_<arch>``, after a check that nothing spills; needs no GPU."""
    warps = constants.pop("num_warps")
    names = kernel.arg_names
    signature = {
        name: pointers.get(name, "constexpr" if name in constants else "i32") for name in names
    }
    source = source_of(kernel, signature, constants, pointers)
    built, sass, usage = assembled(source, arch, warps)
    assert re.search(rf"STACK:{stack} .*LOCAL:0", usage), usage
    return built.asm["ttgir"], sass


@pytest.mark.parametrize(
    ("dtype", "n", "mode", "arch"),
    [
        ("fp32", 64, 0, 80), ("fp32", 64, 0, 90), ("fp32", 1024, 0, 90), ("fp32", 8192, 0, 90),
        ("bf16", 1024, 1, 90), ("fp16", 96, 0, 80), ("i32", 1000, 2, 90), ("fp64", 512, 0, 90),
        ("fp32", 4096, 2, 80), ("fp32", 16384, 0, 90),
    ],
)  # fmt: skip
def test_rows_compile_to_wide_loads_and_two_instructions_a_value(
    dtype: str, n: int, mode: int, arch: int
) -> None:
    size = {"bf16": 2, "fp16": 2, "fp64": 8}.get(dtype, 4)
    cut = select.choose(n, size)
    warps = max(1, cut.lanes // 32)
    padded = 1 << (n - 1).bit_length()
    held = padded // cut.lanes  # values a lane
    layouts, sass = compiled(
        select.rows_kernel,
        {"x_ptr": f"*{dtype}", "y_ptr": "*i8" if mode == 2 else f"*{dtype}", "z_ptr": f"*{dtype}"},
        {
            "DTYPE": select._searched(_NAMES[dtype]), "FLOAT": dtype != "i32", "MODE": mode,
            "ABSOLUTE": False, "NANS": mode != 2, "EVEN": padded == n,
            "SHIFT": {"bf16": 16, "fp16": 13}.get(dtype, 0), "Q": cut.lanes, "R": 32 * warps // cut.lanes,
            "J": held // cut.vector, "E": cut.vector, "STEPS": padded.bit_length() - 1, "num_warps": warps,
        },
        arch,
    )  # fmt: skip
    # A row lies in cut.lanes lanes; the rest of its values are in the registers of each.
    lanes = [min(cut.lanes, 32), max(1, 32 // cut.lanes), 1, 1]
    if select._LANES_LAST:
        lanes = [1, lanes[1], lanes[0], 1]
    assert f"threadsPerWarp = {lanes}" in layouts
    assert len(re.findall(r"LDG\.E\.128", sass)) == held * size // 16
    if dtype in ("fp32", "fp16", "bf16"):
        assert len(re.findall(r"FSET\.BF\.LT", sass)) >= held
    if cut.lanes <= 32:
        assert "BAR.SYNC" not in sass


@pytest.mark.parametrize(
    ("pattern", "shape", "dtype", "loads", "arch"),
    [
        ("2:4", (64, 64), torch.bfloat16, "LDG.E.128", 80),
        ("2:4", (64, 64), torch.bfloat16, "LDG.E.128", 90),
        ("2:4", (64, 64), torch.float32, "LDG.E.128", 90),
        ("4:8", (64, 64), torch.bfloat16, "LDG.E.128", 90),
        ("1:2", (64, 64), torch.float64, "LDG.E.128", 80),
        ("2:3", (64, 96), torch.bfloat16, "LDG.E.U16", 90),
        ("pair4:8", (64, 64), torch.bfloat16, "LDG.E.128", 80),
        ("coupled2:4", (64, 64), torch.float16, "LDG.E.64", 90),
        ("rowpair16", (64, 1024), torch.bfloat16, "LDG.E.64", 90),
        ("8:16", (64, 64), torch.bfloat16, "LDG.E.128", 90),
    ],
)
def test_masks_compile_to_wide_loads_without_spills(
    pattern: str, shape: tuple[int, int], dtype: torch.dtype, loads: str, arch: int
) -> None:
    bound = Pattern.parse(pattern).bind(shape)
    layout = stretches(bound)
    assert layout is not None
    where = masks.Stretches(**layout)
    constants, word, masks_word = masks.constants(
        where, dtype, bound.keep, 16, masks.choose(where.length * where.count)
    )
    types = {1: "*i8", 2: "*i16", 4: "*i32", 8: "*i64"}
    _, sass = compiled(
        masks.ranks_kernel,
        {"w_ptr": types[word], "mask_ptr": types[masks_word], "flag_ptr": "*i8"},
        {**constants, "EVEN": True},
        arch,
    )
    assert loads in sass
    assert ("DSETP" in sass) == (bound.block_size > 1)


@pytest.mark.parametrize(
    ("dtype", "arch"), [(torch.float32, 90), (torch.bfloat16, 80), (torch.int64, 90)]
)
def test_passes_over_long_rows_compile(dtype: torch.dtype, arch: int) -> None:
    width = 8 * dtype.itemsize
    for byte in (0, width // 8 - 1):
        compiled(
            select.digit_kernel,
            {"x_ptr": f"*i{width}", "prefix_ptr": "*i64", "counts_ptr": "*i32"},
            {
                "FLOAT": dtype.is_floating_point, "INFINITY": 0x7F80, "SIGNED": True, "WIDTH": width,
                "BYTE": byte, "STRETCH": 16384, "BLOCK": 2048, "num_warps": 4,
            },
            arch,
        )  # fmt: skip


# On a GPU only ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("n", [64, 256, 1000, 1024, 2048, 8192, 16384, 16385, 100_000])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.int64]
)
@pytest.mark.parametrize("kind", ["smooth", "wild", "huge"])
def test_rows_of_every_length(n: int, dtype: torch.dtype, kind: str) -> None:
    x = values(kind, (67, n), dtype, n).cuda()
    for k in (1, n // 8, n // 2, n - 1):
        upper, lower = select.two_largest(x, k)
        assert same(upper, at_rank(x, k)) and same(lower, at_rank(x, k + 1))
        assert same(select.kth_largest(x, k), upper)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [4, 17, 64, 1024, 5000, 16384, 20000])
def test_top_blocks_of_every_length(n: int) -> None:
    for kind in ("smooth", "ties"):
        x = values(kind, (33, n), torch.float32, n)
        for keep in (1, n // 2, n - 1):
            assert torch.equal(top_blocks(x.cuda(), keep).cpu(), top_blocks(x, keep))


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["2:4", "pair4:8", "coupled2:4", "rowpair16", "8:16", "4:32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_large_weight_projects_as_on_the_cpu(pattern: str, dtype: torch.dtype) -> None:
    weight = torch.randn(1024, 1568 if pattern != "4:32" else 1600).to(dtype)
    assert torch.equal(s3.project(weight.cuda(), pattern).cpu(), s3.project(weight, pattern))


@pytest.mark.gpu
def test_the_op_is_captured_in_a_graph() -> None:
    weight = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16)
    torch.ops.s3tensor.project(weight, "2:4")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = torch.ops.s3tensor.project(weight, "2:4")
        middle = s3.mid_kth_largest(weight, 100, dim=1)
        largest = s3.kth_largest(weight, 1000)
    weight.normal_()
    graph.replay()
    assert torch.equal(found, s3.project(weight, "2:4"))
    assert torch.equal(middle, s3.mid_kth_largest(weight, 100, dim=1))
    assert torch.equal(largest, s3.kth_largest(weight, 1000))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_kernels_run_where_the_tensor_is() -> None:
    weight = torch.randn(64, 64, device="cuda:1")
    assert s3.project(weight, "2:4").device == weight.device
    assert torch.equal(s3.project(weight, "2:4").cpu(), s3.project(weight.cpu(), "2:4"))
    assert torch.equal(s3.kth_largest(weight, 5, 1).cpu(), s3.kth_largest(weight.cpu(), 5, 1))
    long = torch.randn(2, 30000, device="cuda:1")
    assert torch.equal(s3.kth_largest(long, 5, 1).cpu(), s3.kth_largest(long.cpu(), 5, 1))
