"""Products by packed int8 values: tile order, the kernel on numpy, compiled, and on a GPU."""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from typing import Any

import gluon_on_numpy as gluon
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import compiled, pointer_types, random_packed, sizes
from s3tensor.kernels import tiles
from torch import Tensor

import s3tensor as s3
from s3tensor.mask.packing import unpack
from s3tensor.pattern import Pattern
from s3tensor.tensor import linear as paths
from s3tensor.tensor.int8_values import dense_of, packed_of
from s3tensor.tensor.weight import Weight

FORMS = tiles.FORMS
CODES = {  # as the kernel loads them in tile order
    "2:4": torch.int32,
    "coupled2:4": torch.int16,
    "pair4:8": torch.int16,
    "rowpair16": torch.int32,
}


def random_int8(
    form: str, rows: int, columns: int, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Canonical values of every integer, codes, scales, and the dense weight in float64."""
    generator = torch.Generator(device).manual_seed(seed)
    values, codes, _ = random_packed(form, rows, columns, torch.bfloat16, device, seed)
    values = torch.randint(-127, 128, values.shape, generator=generator, device=device)
    values = values.to(torch.int8)
    scales = 0.01 + torch.rand(rows, generator=generator, device=device)
    bound = Pattern.parse(form).bind((rows, columns))
    dense = unpack(values.double(), codes, bound) * scales.double()[:, None]
    return values, codes, scales, dense


def close(y: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None) -> None:
    """Within the rounding of one sum to the dtype of y."""
    exact = x.double() @ dense.t()
    if bias is not None:
        exact = exact + bias.double()
    rounding = 2**-8 if y.dtype == torch.bfloat16 else 2**-11
    terms = x.double().abs() @ dense.abs().t()
    assert ((y.double() - exact).abs() <= rounding * exact.abs() + 1e-5 * terms).all()


# Tile order -------------------------------------------------------------------------------------------


@given(st.sampled_from(FORMS), sizes, st.integers(0, 2**31))
def test_tile_order_of_bytes_is_undone_exactly(
    form: tiles.Form, size: tuple[int, int], seed: int
) -> None:
    values, *_ = random_int8(form, *size, seed=seed)
    tiled = tiles.tile_values(values, form, *size)
    assert tiled.shape == values.shape and tiled.dtype == torch.int8
    assert torch.equal(tiles.untile_values(tiled, form, *size), values)
    assert torch.equal(
        tiles.tile_values(tiles.untile_values(values, form, *size), form, *size), values
    )


@given(st.sampled_from(FORMS), sizes, st.integers(0, 2**31))
def test_a_lane_s_bytes_are_its_two_pieces_of_the_wide_order(
    form: tiles.Form, size: tuple[int, int], seed: int
) -> None:
    values, *_ = random_int8(form, *size, seed=seed)
    wide = tiles.tile_values(values.to(torch.float16), form, *size)
    tiled = tiles.tile_values(values, form, *size)
    rows, columns = size
    pieces = wide.reshape(rows // 16, columns // 64, 2, 32, 8).permute(0, 1, 3, 2, 4)
    assert torch.equal(tiled.reshape(pieces.shape), pieces.to(torch.int8))
    view = tiles.bytes_as_wide(tiled, *size)
    assert torch.equal(view.reshape(values.shape), wide.to(torch.int8))


# The kernel, without layouts --------------------------------------------------------------------------

KERNEL = gluon.load("expand", "widen", "skinny")
WIDEN = gluon.load("expand", "widen")


@pytest.mark.parametrize("dtype", [gluon.BFLOAT16, gluon.FLOAT16])
def test_every_byte_widens_to_its_value(dtype: str) -> None:
    every = torch.arange(-128, 128, dtype=torch.int8)
    words = every.view(torch.int32).numpy()
    text = WIDEN._TO_BFLOAT16 if dtype == gluon.BFLOAT16 else WIDEN._TO_FLOAT16
    found = torch.stack(
        [torch.from_numpy(w.copy()) for w in gluon.run_assembly(text, "=r,=r,r", [words])], -1
    )
    kind = torch.bfloat16 if dtype == gluon.BFLOAT16 else torch.float16
    assert torch.equal(found.view(kind).flatten(), every.to(kind))


def run(form: str, size: tuple[int, int], n: int, dtype: torch.dtype, cut: Any, bias: bool) -> None:
    """One product by the kernel's source; ``close`` to float64."""
    rows, columns = size
    values, codes, scales, dense = random_int8(form, *size)
    values = tiles.tile_values(values, form, *size)  # type: ignore[arg-type]
    codes = tiles.tile_codes(codes, form, *size)  # type: ignore[arg-type]
    x = torch.randn(n, columns).to(dtype)
    b = torch.randn(rows).to(dtype)
    y = torch.full((n, rows), float("nan"), dtype=dtype)
    blocks, steps = -(-rows // cut.rows), -(-columns // cut.columns)
    tall = -(-n // cut.batch)
    sums = torch.zeros(blocks * tall * cut.split * cut.rows * cut.batch)
    cells = torch.zeros(blocks * tall, dtype=torch.int32)
    words = values.reshape(-1).view(torch.int32)
    tensors = x.view(torch.int32), words, codes.view(CODES[form]), b, y, sums, cells, scales
    arguments = [*map(gluon.Pointer.of, tensors), rows, n, columns // 16, columns // 8, steps]
    even = rows % cut.rows == 0 and columns == steps * cut.columns
    constants = KERNEL._constants(cut, FORMS.index(form), even)  # type: ignore[arg-type]
    constants |= {"BIAS": bias, "SPLIT": cut.split, "OVERLAP": False, "BY_FLOAT32": cut.by_float32}
    gluon.launch(KERNEL.int8_kernel, (blocks * cut.split, tall), arguments, constants)
    close(y, x, dense, b if bias else None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_the_source_of_the_kernel_gives_the_product(form: str, dtype: torch.dtype) -> None:
    cut = KERNEL.Skinny
    run(form, (32, 128), 3, dtype, cut(1, 1, 1, 2, 8), True)
    run(form, (48, 192), 9, dtype, cut(1, 2, 1, 2, 16, 1, True), False)
    run(form, (80, 320), 17, dtype, cut(2, 1, 2, 1, 16, 2), True)
    run(form, (64, 448), 5, dtype, cut(1, 2, 1, 4, 8, 2, True), True)
    run(form, (32, 192), 4, dtype, cut(1, 2, 2, 2, 8, by_float32=True), True)
    run(form, (48, 192), 29, dtype, cut(1, 2, 1, 2, 32, 1, True), True)
    run(form, (32, 320), 33, dtype, cut(1, 2, 1, 1, 32, 2), False)


class OnNumpy:
    """A kernel's source in the place of the compiled kernel, for its launcher to launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, int]) -> Any:
        def start(*arguments: Any, num_warps: int, launch_pdl: bool, **constants: Any) -> None:
            given = [gluon.Pointer.of(a) if isinstance(a, Tensor) else a for a in arguments]
            gluon.launch(self.kernel, grid, given, constants)

        return start


@pytest.mark.parametrize("form", FORMS)
def test_the_launcher_gives_the_kernel_what_it_takes(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton.experimental.gluon", reason="needs Triton with Gluon")
    from s3tensor.kernels import gpu, skinny

    monkeypatch.setattr(gpu, "refusal", lambda device: None)
    monkeypatch.setattr(gpu, "capability", lambda device: (9, 0))
    monkeypatch.setattr(gpu, "processors", lambda device: 2)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(skinny, "int8_kernel", OnNumpy(KERNEL.int8_kernel))
    values, codes, scales, dense = random_int8(form, 80, 192)
    bound = Pattern.parse(form).bind((80, 192))
    tiled = tiles.tile_values(values, form, 80, 192), tiles.tile_codes(codes, form, 80, 192)  # type: ignore[arg-type]
    weight = Weight(*tiled, bound, scales=scales, tiled=True)
    for n in (1, 9, 20):
        for dtype in (torch.bfloat16, torch.float16):
            weight = replace(weight, computed_in=dtype)
            x, bias = torch.randn(n, 192).to(dtype), torch.randn(80).to(dtype)
            close(paths.multiply(x, weight, bias, "packed"), x, dense, bias)
            y = paths.multiply(x.reshape(n, 1, 192), weight, None, "packed")
            assert y.shape == (n, 1, 80)
            close(y.reshape(n, 80), x, dense, None)


# Compilation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("form", "even", "units", "batch", "dtype", "by_float32"),
    [
        (0, True, 4, 8, "bf16", False),
        (0, True, 4, 8, "bf16", True),
        (0, True, 2, 16, "bf16", False),
        (0, False, 4, 8, "fp16", False),
        (1, True, 4, 8, "bf16", False),
        (2, False, 2, 16, "bf16", False),
        (3, True, 4, 8, "bf16", False),
        (3, False, 2, 16, "fp16", False),
        (0, False, 4, 32, "bf16", False),
        (1, False, 4, 32, "fp16", False),
        (3, False, 4, 32, "bf16", False),
    ],
)
def test_bytes_compile_to_wide_loads_and_no_spills(
    form: int, even: bool, units: int, batch: int, dtype: str, by_float32: bool, arch: int
) -> None:
    pytest.importorskip("triton.experimental.gluon", reason="needs Triton with Gluon")
    from s3tensor.kernels import skinny

    pointers = pointer_types(dtype, "i32" if form in (0, 3) else "i16", "i32")
    sass = compiled(
        skinny.int8_kernel,
        pointers | {"s_ptr": "*fp32"},
        {
            "FORM": form, "EVEN": even, "BIAS": not even, "OVERLAP": arch == 90, "WM": 1, "WK": 8,
            "TILES": 1, "UNITS": units, "BN": batch, "SPLIT": 1 if even else 2, "AHEAD": even,
            "BY_FLOAT32": by_float32, "num_warps": 8,
        },
        arch,
    )  # fmt: skip
    assert len(re.findall(r"HMMA\.16816\.F32", sass)) == 4 * units * (batch // 8)
    # A step's values, twice, in one load a tile: 16-bit values take two.
    assert len(re.findall(r"LDG\.E\.128", sass)) >= 2 * units
    if form == 0 and dtype == "bf16":
        # Of a group of four: 1 permutation to bfloat16 or 2 to float32, 2 selectors, 2 to the fragment, 1
        # look-up.
        groups = 8 * units
        assert len(re.findall(r"\bPRMT\b", sass)) <= (7.5 if by_float32 else 6.5) * groups
        assert len(re.findall(r"\bFADD\b" if by_float32 else r"\bHFMA2", sass)) >= groups


@given(
    st.sampled_from(FORMS),
    st.integers(1, 32),
    st.integers(1, 4000).map(lambda n: 16 * n),
    st.integers(1, 1000).map(lambda n: 64 * n),
    st.integers(1, 160),
)
def test_a_cut_for_bytes_can_run(
    form: Any, n: int, rows: int, columns: int, processors: int
) -> None:
    pytest.importorskip("triton.experimental.gluon", reason="needs Triton with Gluon")
    from s3tensor.kernels.matmul import choose_int8

    cut = choose_int8(form, n, rows, columns, processors)
    assert cut.columns * cut.split <= max(columns, 128) and cut.batch >= min(n, 16)
    assert cut.warps_m * cut.warps_k <= 16 and cut.columns % 128 == 0


# Numbers of a GPU -------------------------------------------------------------------------------------


def product(x: Tensor, form: str, packed: tuple[Tensor, ...], **options: Any) -> Tensor:
    from s3tensor.kernels import matmul

    values, codes, scales, dense = packed
    size = (int(dense.shape[0]), int(dense.shape[1]))
    values = tiles.tile_values(values, form, *size)  # type: ignore[arg-type]
    codes = tiles.tile_codes(codes, form, *size)  # type: ignore[arg-type]
    bias = options.pop("bias", None)
    return matmul.linear(
        x, values, codes, bias, form=form, rows=size[0], columns=size[1], tiled=True,
        scales=scales, **options,
    )  # type: ignore[arg-type]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("rows", "columns"), [(16, 64), (48, 192), (64, 1024), (272, 11008), (1024, 320), (2048, 2048)]
)
def test_linear_of_bytes_is_the_dense_product(
    form: str, rows: int, columns: int, dtype: torch.dtype
) -> None:
    packed = random_int8(form, rows, columns, "cuda")
    for n in (1, 7, 8, 9, 16, 17, 32):
        x = torch.randn(n, columns, device="cuda").to(dtype)
        bias = torch.randn(rows, device="cuda").to(dtype)
        torch.full((n, rows), float("nan"), device="cuda", dtype=dtype)  # in the memory of y
        close(product(x, form, packed), x, packed[3], None)
        close(product(x, form, packed, bias=bias, overlap=True), x, packed[3], bias)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_every_cut_of_the_work_on_bytes_gives_the_product(form: str) -> None:
    from s3tensor.kernels.skinny import Skinny

    cuts = [
        Skinny(1, 8, 1, 2, 8, split=2),
        Skinny(1, 4, 2, 1, 16, split=3, ahead=True),
        Skinny(2, 2, 1, 4, 8),
        Skinny(1, 8, 1, 4, 8, ahead=True),
        Skinny(4, 1, 2, 2, 16),
        Skinny(1, 4, 1, 2, 8, by_float32=True),
        Skinny(1, 8, 1, 4, 16, by_float32=True),
    ]
    for rows, columns in ((512, 2048), (336, 1216)):
        packed = random_int8(form, rows, columns, "cuda")
        for cut in cuts:
            for n in (1, 16, 30):
                x = torch.randn(n, columns, device="cuda", dtype=torch.bfloat16)
                bias = torch.randn(rows, device="cuda", dtype=torch.bfloat16)
                y = product(x, form, packed, bias=bias, config=cut)
                close(y, x, packed[3], bias)
                assert torch.equal(product(x, form, packed, bias=bias, config=cut, overlap=True), y)


@pytest.mark.gpu
def test_bad_bytes_are_refused_by_name() -> None:
    from s3tensor.kernels import matmul
    from s3tensor.kernels.wide import Wide

    values, codes, scales, _ = random_int8("2:4", 32, 64, "cuda")
    x = torch.randn(2, 64, device="cuda", dtype=torch.bfloat16)
    good: dict[str, Any] = {
        "form": "2:4",
        "rows": 32,
        "columns": 64,
        "tiled": True,
        "scales": scales,
    }
    for change, match in (
        ({"values": values.half()}, "must be int8 and float32"),
        ({"scales": scales[:16]}, r"must be int8 and float32 of shape \(32,\)"),
        ({"scales": scales.double()}, "must be int8"),
        ({"scales": scales.cpu()}, "x is"),
        ({"x": x.float()}, "the kernels take bfloat16 and float16"),
        ({"x": x.repeat(17, 1)}, r"must be \(1 to 32, 64\)"),
        ({"tiled": False}, "must be in tile order"),
        ({"config": Wide(8, 2, 16)}, "takes no int8 values"),
    ):
        arguments = {**good, "x": x, "values": values, "codes": codes, "bias": None, **change}
        with pytest.raises(ValueError, match=match):
            matmul.linear(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", [*FORMS, "1:4", "block:16x16@0.5", "unstructured@0.4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_path_of_a_weight_gives_the_product(pattern: str, dtype: torch.dtype) -> None:
    for size in ((64, 192), (48, 80)):
        dense = torch.randn(size, device="cuda").to(dtype)
        sparse = s3.StructuredSparseTensor.from_dense(dense, pattern)
        weight = s3.Int8SparseTensor.from_sparse(sparse)
        on_cpu = s3.Int8SparseTensor.from_sparse(sparse.cpu())
        moved = on_cpu.to("cuda")
        assert moved.tiled == weight.tiled and torch.equal(moved.to_dense(), weight.to_dense())
        assert torch.equal(weight.to_dense().cpu(), on_cpu.to_dense())
        exact = weight.to_dense(torch.float64)
        for n in (1, 9, 32, 40, 200):
            x = torch.randn(n, size[1], device="cuda").to(dtype)
            bias = torch.randn(size[0], device="cuda").to(dtype)
            y = torch.nn.functional.linear(x, weight, bias)
            error = (y.double() - (x.double() @ exact.t() + bias.double())).norm()
            limit = 5e-6 if dtype == torch.float32 else 1e-2
            assert error <= limit * (x.double() @ exact.t()).norm()


@pytest.mark.gpu
def test_a_compiled_model_with_bytes_runs_in_a_graph() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 128)
    )
    model = model.to("cuda", torch.bfloat16)
    s3.sparsify_(model, "2:4")
    s3.quantize_(model)
    x = torch.randn(2, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(x)
        call = torch.compile(model, fullgraph=True, options=s3.inductor_options())
        for _ in range(4):
            assert torch.allclose(call(x), expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_tile_order_is_the_same_weight(form: str) -> None:
    bound = Pattern.parse(form).bind((64, 128))
    values, codes, scales, _ = random_int8(form, 64, 128)
    weight = Weight(values, codes, bound, scales=scales, computed_in=torch.bfloat16)
    assert paths.choose(weight, 1, graph=False) == "scratch"  # a CPU
    assert packed_of(weight, torch.bfloat16) is None  # not in tile order
    tiled = replace(
        weight,
        packed=tiles.tile_values(values, form, 64, 128),  # type: ignore[arg-type]
        indices=tiles.tile_codes(codes, form, 64, 128),  # type: ignore[arg-type]
        tiled=True,
    )
    dense = dense_of(weight, torch.bfloat16)
    assert torch.equal(dense_of(tiled, torch.bfloat16), dense)
    made = packed_of(tiled, torch.bfloat16)
    assert (made is None) == (form == "rowpair16")
    if made is not None:
        assert torch.equal(unpack(made, tiled.indices, bound, tiled=True), dense)
        x, bias = torch.randn(40, 128).bfloat16(), torch.randn(64).bfloat16()
        y = paths.multiply(x, tiled, bias, "values")
        assert torch.equal(y, torch.nn.functional.linear(x, dense, bias))
