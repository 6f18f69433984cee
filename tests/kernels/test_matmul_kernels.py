"""CUDA matmul kernels: tile order anywhere, compilation where Triton is, numbers where a GPU is."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import FORMS, compiled, pointer_types, random_packed, sizes
from s3tensor.kernels import tiles
from torch import Tensor

from s3tensor.pattern import Pattern

# Tile order -------------------------------------------------------------------------------------------


@given(st.sampled_from(FORMS), sizes, st.integers(0, 2**31))
def test_tile_order_is_undone_exactly(form: tiles.Form, size: tuple[int, int], seed: int) -> None:
    values, codes, _ = random_packed(form, *size, torch.bfloat16, seed=seed)
    tiled = tiles.tile_values(values, form, *size), tiles.tile_codes(codes, form, *size)
    assert tiled[0].shape == values.shape and tiled[0].dtype == values.dtype
    assert tiled[1].shape == codes.shape and tiled[1].dtype == codes.dtype
    assert torch.equal(tiles.untile_values(tiled[0], form, *size), values)
    assert torch.equal(tiles.untile_codes(tiled[1], form, *size), codes)


@given(st.sampled_from(FORMS), sizes, st.integers(0, 2**31))
def test_canonical_order_is_undone_exactly(
    form: tiles.Form, size: tuple[int, int], seed: int
) -> None:
    values, codes, _ = random_packed(form, *size, torch.float16, seed=seed)
    assert torch.equal(
        tiles.tile_values(tiles.untile_values(values, form, *size), form, *size), values
    )
    assert torch.equal(tiles.tile_codes(tiles.untile_codes(codes, form, *size), form, *size), codes)


@given(st.sampled_from(FORMS), sizes, st.integers(0, 2**31))
def test_tiles_hold_what_each_lane_multiplies(
    form: tiles.Form, size: tuple[int, int], seed: int
) -> None:
    """Rebuilding the dense weight from tile order, lane by lane as the kernels do, gives the dense weight."""
    rows, columns = size
    values, codes, dense = random_packed(form, *size, torch.bfloat16, seed=seed)
    pieces = tiles.tile_values(values, form, *size).reshape(rows // 16, columns // 64, 2, 32, 8)
    stream = tiles.tile_codes(codes, form, *size).tolist()
    rebuilt = torch.zeros_like(dense)
    for tile in range(rows // 16):
        for unit in range(columns // 64):
            for lane in range(32):
                at = 64 * unit + 16 * (lane % 4)
                first = (tile * (columns // 64) + unit) * 32 + lane
                for half in range(2):
                    row = 16 * tile + lane // 4 + 8 * half
                    kept = pieces[tile, unit, half, lane]
                    if form == "rowpair16":
                        word = (first - lane) // 8
                        bit = stream[word + lane // 8] >> lane % 8 & 1
                        row = 16 * tile + lane // 4 + 8 * bit
                        rebuilt[row, at + 8 * half : at + 8 * half + 8] = kept
                        continue
                    width = 2 if form == "2:4" else 1
                    place = (2 * first + half) * width
                    packed = int.from_bytes(bytes(stream[place : place + width]), "little")
                    for group in range(2 * width):
                        nibble = packed >> 4 * group & 15
                        for k, index in enumerate((nibble & 3, nibble >> 2)):
                            if form == "2:4":
                                rebuilt[row, at + 4 * group + index] = kept[2 * group + k]
                                continue
                            two = kept[4 * group + 2 * k : 4 * group + 2 * k + 2]
                            if form == "pair4:8":
                                start = at + 8 * group + 2 * index
                                rebuilt[row, start : start + 2] = two
                            else:
                                rebuilt[row, at + 4 * group + index] = two[0]
                                rebuilt[row, at + 8 + 4 * group + index] = two[1]
    assert torch.equal(rebuilt, dense)


@pytest.mark.parametrize("form", FORMS)
def test_code_bytes_are_those_of_the_pattern(form: tiles.Form) -> None:
    for rows, columns in ((16, 16), (16, 64), (48, 176), (4096, 11008)):
        bound = Pattern.parse(form).bind((rows, columns))
        assert tiles.code_bytes(form, rows, columns) == bound.index_bytes


def test_tile_order_refuses_what_is_not_whole_tiles() -> None:
    values, codes, _ = random_packed("2:4", 24, 64, torch.bfloat16)
    assert not tiles.can_tile(24, 64) and not tiles.can_tile(16, 96) and tiles.can_tile(16, 64)
    with pytest.raises(ValueError, match="24 x 64 is not a multiple"):
        tiles.tile_values(values, "2:4", 24, 64)
    with pytest.raises(ValueError, match="no tile order for '1:4'"):
        tiles.tile_codes(codes, "1:4", 16, 64)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keeps 512 values of a 16 x 64 weight, got 768"):
        tiles.tile_values(values, "2:4", 16, 64)
    with pytest.raises(
        ValueError, match=r"uint8 of shape \(128,\), got torch.uint8 of shape \(192,\)"
    ):
        tiles.tile_codes(codes, "2:4", 16, 64)


# Compilation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("form", "tiled", "even", "batch", "dtype"),
    [
        (0, True, True, 8, "bf16"),
        (0, False, False, 16, "fp16"),
        (1, True, False, 16, "bf16"),
        (2, True, True, 16, "bf16"),
        (3, True, True, 8, "bf16"),
        (3, False, False, 16, "fp16"),
    ],
)
def test_skinny_compiles_to_wide_loads_and_tensor_cores(
    form: int, tiled: bool, even: bool, batch: int, dtype: str, arch: int
) -> None:
    pytest.importorskip("triton.experimental.gluon", reason="needs Triton with Gluon")
    from s3tensor.kernels import skinny

    codes = {(0, True): "i32", (0, False): "i16", (1, True): "i16", (2, True): "i16"}
    sass = compiled(
        skinny.skinny_kernel,
        pointer_types(dtype, codes.get((form, tiled), "i32" if tiled else "i8"), "i32"),
        {
            "FORM": form, "TILED": tiled, "EVEN": even, "BIAS": not even, "OVERLAP": arch == 90,
            "WM": 1, "WK": 8, "TILES": 1, "UNITS": 2, "BN": batch, "SPLIT": 1 if even else 2,
            "AHEAD": even, "num_warps": 8,
        },
        arch,
    )  # fmt: skip
    kind = "BF16" if dtype == "bf16" else "F32"
    assert len(re.findall(rf"HMMA\.16816\.F32\.?{kind if kind == 'BF16' else ''} ", sass)) == batch
    assert len(re.findall(r"LDG\.E\.128", sass)) >= 8  # a step's values, twice
    if form != 3:
        assert "PRMT" in sass


@pytest.mark.parametrize(("form", "even"), [(0, True), (1, False), (3, True)])
def test_the_kernel_of_a_group_loads_as_that_of_one_weight(form: int, even: bool) -> None:
    pytest.importorskip("triton.experimental.gluon", reason="needs Triton with Gluon")
    from s3tensor.kernels import skinny

    codes = "*i32" if form in (0, 3) else "*i16"
    pointers = {"x_ptr": "*i32"}
    for n in ("", "2", "3"):
        pointers |= {f"v{n}_ptr": "*i32", f"c{n}_ptr": codes, f"y{n}_ptr": "*bf16"}
    constants = {
        "FORM": form, "EVEN": even, "OVERLAP": True, "WM": 1, "WK": 4, "TILES": 1, "UNITS": 2, "BN": 8,
        "AHEAD": True, "num_warps": 4,
    }  # fmt: skip
    sass = compiled(skinny.group_kernel, pointers, constants, 90)
    assert len(re.findall(r"LDG\.E\.128", sass)) >= 8


@pytest.mark.parametrize(
    ("form", "even", "batch", "dtype"),
    [(0, True, 64, "bf16"), (1, False, 32, "fp16"), (2, True, 64, "bf16"), (3, False, 32, "bf16")],
)
def test_wide_compiles_to_warpgroup_products(form: int, even: bool, batch: int, dtype: str) -> None:
    pytest.importorskip("triton.experimental.gluon", reason="needs Triton with Gluon")
    from s3tensor.kernels import wide

    sass = compiled(
        wide.wide_kernel,
        pointer_types(dtype, "i32" if form in (0, 3) else "i16", dtype),
        {
            "FORM": form, "EVEN": even, "BIAS": not even, "OVERLAP": True, "WM": 8, "UNITS": 2,
            "BN": batch, "SPLIT": 1 if even else 4, "STAGES": 4, "num_warps": 8,
        },
        90,
    )  # fmt: skip
    assert len(re.findall(rf"HGMMA\.64x{batch}x16", sass)) == 8
    assert len(re.findall(r"LDGSTS\.E\.BYPASS\.128", sass)) >= 12
    assert "LDG.E.128" not in sass or not even  # values pass through shared memory


@given(
    st.sampled_from(FORMS),
    st.integers(1, 128),
    st.integers(1, 4000).map(lambda n: 16 * n),
    st.integers(1, 4000).map(lambda n: 16 * n),
    st.booleans(),
    st.sampled_from([(8, 0), (8, 9), (9, 0), (10, 0)]),
    st.integers(1, 160),
)
def test_a_cut_is_always_one_that_can_run(
    form: tiles.Form, n: int, rows: int, columns: int, tiled: bool,
    capability: tuple[int, int], processors: int,
) -> None:  # fmt: skip
    pytest.importorskip("triton.experimental.gluon", reason="needs Triton with Gluon")
    from s3tensor.kernels.matmul import choose
    from s3tensor.kernels.wide import Wide

    cut = choose(form, n, rows, columns, tiled, capability, processors)
    steps = -(-columns // cut.columns)
    assert 1 <= cut.split <= min(8, steps)
    if isinstance(cut, Wide):
        assert tiled and capability == (9, 0)
        assert cut.warps in (4, 8, 16) and cut.stages >= 3
        stage = cut.columns * (2 * cut.batch + cut.rows) + cut.rows * cut.columns // 8
        assert stage * cut.stages <= 227 * 1024  # shared memory of an sm_90 program
    else:
        assert n <= 16 or not (tiled and capability == (9, 0))
        assert cut.batch >= min(n, 16) and cut.warps_m * cut.warps_k <= 16
        assert cut.columns % 128 == 0  # bits of a row of rowpair16 step by whole bytes


# Numbers ----------------------------------------------------------------------------------------------


def close(y: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None) -> None:
    """Within the rounding of one sum to the dtype of y."""
    exact = x.double() @ dense.double().t()
    if bias is not None:
        exact = exact + bias.double()
    rounding = 2**-8 if y.dtype == torch.bfloat16 else 2**-11
    terms = x.double().abs() @ dense.double().abs().t()
    assert ((y.double() - exact).abs() <= rounding * exact.abs() + 1e-5 * terms).all()


def product(
    x: Tensor, form: str, packed: tuple[Tensor, Tensor, Tensor], tiled: bool, **options: Any
) -> Tensor:
    from s3tensor.kernels import matmul

    values, codes, dense = packed
    size = (int(dense.shape[0]), int(dense.shape[1]))
    if tiled:
        values = tiles.tile_values(values, form, *size)  # type: ignore[arg-type]
        codes = tiles.tile_codes(codes, form, *size)  # type: ignore[arg-type]
    bias = options.pop("bias", None)
    return matmul.linear(
        x, values, codes, bias, form=form, rows=size[0], columns=size[1], tiled=tiled, **options
    )  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (16, 16), (16, 64), (48, 176), (64, 1024), (160, 4160), (272, 11008), (1024, 320), (2048, 2048),
    ],
)  # fmt: skip
def test_linear_is_the_dense_product(
    form: tiles.Form, rows: int, columns: int, dtype: torch.dtype
) -> None:
    packed = random_packed(form, rows, columns, dtype, "cuda")
    for n in (1, 7, 8, 9, 16, 17, 31, 33, 64, 100, 128):
        x = torch.randn(n, columns, device="cuda").to(dtype)
        bias = torch.randn(rows, device="cuda").to(dtype)
        torch.full((n, rows), float("nan"), device="cuda", dtype=dtype)  # in the memory of y
        close(product(x, form, packed, False, bias=bias), x, packed[2], bias)
        if tiles.can_tile(rows, columns):
            close(product(x, form, packed, True), x, packed[2], None)
            close(product(x, form, packed, True, bias=bias, overlap=True), x, packed[2], bias)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["2:4", "coupled2:4", "pair4:8"])
@pytest.mark.parametrize("rows", [1, 3, 17, 250])
def test_linear_takes_any_number_of_rows(form: tiles.Form, rows: int) -> None:
    packed = random_packed(form, rows, 208, torch.bfloat16, "cuda")
    for n in (1, 16, 40):
        x = torch.randn(n, 208, device="cuda", dtype=torch.bfloat16)
        close(product(x, form, packed, tiled=False), x, packed[2], None)


def _configurations() -> list[Any]:
    from s3tensor.kernels.skinny import Skinny
    from s3tensor.kernels.wide import Wide

    return [
        Skinny(1, 8, 1, 2, 8, split=2),
        Skinny(1, 4, 2, 1, 16, split=3, ahead=True),
        Skinny(2, 2, 1, 4, 8),
        Skinny(1, 8, 1, 4, 8, ahead=True),
        Skinny(4, 1, 2, 2, 16),
        Wide(4, 2, 32, split=4),
        Wide(8, 1, 64, split=2, stages=5),
        Wide(16, 2, 16, split=5),
        Wide(8, 2, 128, split=8, stages=3),
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("number", range(9))
def test_every_cut_of_the_work_gives_the_product(form: tiles.Form, number: int) -> None:
    config = _configurations()[number]
    if hasattr(config, "stages") and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the wide kernel is for sm_90")
    for rows, columns in ((512, 2048), (336, 1216)):
        packed = random_packed(form, rows, columns, torch.bfloat16, "cuda")
        for n in (1, 16, 70):
            x = torch.randn(n, columns, device="cuda", dtype=torch.bfloat16)
            bias = torch.randn(rows, device="cuda", dtype=torch.bfloat16)
            y = product(x, form, packed, True, bias=bias, config=config)
            close(y, x, packed[2], bias)
            for overlap in (False, True):
                again = product(x, form, packed, True, bias=bias, config=config, overlap=overlap)
                assert torch.equal(again, y)  # to the last bit


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 8, 12, 40])
def test_linear_reads_only_x(n: int) -> None:
    """x within a larger tensor of NaN, in several strides."""
    packed = random_packed("2:4", 192, 448, torch.bfloat16, "cuda")
    x = torch.randn(n, 448, device="cuda", dtype=torch.bfloat16)
    for before, after in ((0, 0), (8, 8), (3, 5), (64, 0)):
        around = torch.full(
            (n + 2, before + 448 + after), float("nan"), device="cuda", dtype=torch.bfloat16
        )
        inside = around[1:-1, before : before + 448]
        inside.copy_(x)
        for tiled in (False, True):
            close(product(inside, "2:4", packed, tiled), x, packed[2], None)
    close(product(x.t().contiguous().t(), "2:4", packed, True), x, packed[2], None)
    close(product(x[:1].expand(n, -1), "2:4", packed, True), x[:1].expand(n, -1), packed[2], None)


@pytest.mark.gpu
def test_nan_and_infinity_in_x_reach_their_own_rows_only() -> None:
    packed = random_packed("2:4", 64, 128, torch.bfloat16, "cuda")
    x = torch.randn(12, 128, device="cuda", dtype=torch.bfloat16)
    x[3, 5] = float("nan")
    x[7, 90] = float("inf")
    y = product(x, "2:4", packed, True)
    assert y[3].isnan().all()
    assert not y[7].isfinite().any()
    clean = [i for i in range(12) if i not in (3, 7)]
    close(y[clean], x[clean], packed[2], None)


@pytest.mark.gpu
def test_splits_on_two_streams_do_not_mix() -> None:
    from s3tensor.kernels.skinny import Skinny

    config = Skinny(1, 4, 1, 2, 16, split=4)
    packed = [random_packed("2:4", 512, 4096, torch.bfloat16, "cuda", seed=s) for s in (1, 2)]
    x = torch.randn(16, 4096, device="cuda", dtype=torch.bfloat16)
    expected = [product(x, "2:4", p, True, config=config) for p in packed]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    outputs: list[tuple[int, Tensor]] = []
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                outputs.append((i, product(x, "2:4", packed[i], True, config=config)))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected[i]) for i, y in outputs)


@pytest.mark.gpu
def test_graphs_replay_the_product() -> None:
    from s3tensor.kernels.skinny import Skinny
    from s3tensor.kernels.wide import Wide

    packed = random_packed("2:4", 512, 4096, torch.bfloat16, "cuda")
    for n, config in (
        (1, None),
        (16, Skinny(1, 4, 1, 2, 16, split=4)),
        (64, None),
        (40, Wide(4, 2, 32, 4)),
    ):
        if isinstance(config, Wide) and torch.cuda.get_device_capability() != (9, 0):
            continue
        x = torch.randn(n, 4096, device="cuda", dtype=torch.bfloat16)
        product(x, "2:4", packed, True, config=config, overlap=True)  # compile
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = x
            for _ in range(3):  # each waits for the last through its x
                y = product(
                    y[:, :512].repeat(1, 8), "2:4", packed, True, config=config, overlap=True
                )
        for _ in range(3):
            x.copy_(torch.randn(n, 4096, device="cuda"))
            graph.replay()
            expected = x
            for _ in range(3):
                expected = product(
                    expected[:, :512].repeat(1, 8), "2:4", packed, True, config=config
                )
            assert torch.equal(y, expected)


@pytest.mark.gpu
def test_bad_arguments_are_refused_by_name() -> None:
    from s3tensor.kernels import matmul

    values, codes, _ = random_packed("2:4", 32, 64, torch.bfloat16, "cuda")
    x = torch.randn(2, 64, device="cuda", dtype=torch.bfloat16)
    good: dict[str, Any] = {"form": "2:4", "rows": 32, "columns": 64, "tiled": False}
    for change, match in (
        ({"x": x.half()}, "x is torch.float16"),
        ({"x": x.cpu()}, "cpu is not an NVIDIA GPU"),
        ({"values": values.float()}, "the kernels take bfloat16 and float16"),
        ({"x": x[:, :32]}, r"must be \(1 to 128, 64\)"),
        ({"x": x.repeat(65, 1)}, r"must be \(1 to 128, 64\)"),
        ({"columns": 72}, "multiple of 16"),
        ({"rows": 48}, "are not those of 2:4 on 48 x 64"),
        ({"form": "1:4"}, "'1:4' is not one of"),
        ({"bias": x[0]}, r"the bias is \(64,\)"),
        ({"codes": codes.cpu()}, "codes are on cpu"),
    ):
        arguments = {**good, "x": x, "values": values, "codes": codes, "bias": None, **change}
        with pytest.raises(ValueError, match=match):
            matmul.linear(**arguments)
    short = random_packed("2:4", 32, 48, torch.bfloat16, "cuda")
    with pytest.raises(ValueError, match="has no tile order"):
        matmul.linear(x[:, :48], *short[:2], None, **{**good, "columns": 48, "tiled": True})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [1, 3, 8, 16, 17])
def test_a_group_is_the_product_of_each(form: str, n: int, dtype: torch.dtype) -> None:
    from s3tensor.kernels import matmul

    columns = 192
    for heights in ((48, 16), (16, 64, 208), (4096, 1024, 1024), (16, 16, 16, 16)):
        packed = [random_packed(form, rows, columns, dtype, "cuda") for rows in heights]
        x = torch.randn(n, columns + 8, device="cuda").to(dtype)[:, :columns]
        parts = [
            (tiles.tile_values(v, form, *d.shape), tiles.tile_codes(c, form, *d.shape))
            for v, c, d in packed
        ]  # type: ignore[arg-type]
        for overlap in (False, True):
            ys = matmul.linear_group(
                x, parts, form=form, rows=heights, columns=columns, overlap=overlap
            )  # type: ignore[arg-type]
            for y, rows, (_, _, dense) in zip(ys, heights, packed, strict=True):
                assert y.shape == (n, rows) and y.is_contiguous()
                close(y, x, dense, None)


@pytest.mark.gpu
def test_a_group_refuses_what_one_product_does() -> None:
    from s3tensor.kernels import matmul

    packed = [random_packed("2:4", 32, 64, torch.bfloat16, "cuda") for _ in range(2)]
    parts = [
        (tiles.tile_values(v, "2:4", 32, 64), tiles.tile_codes(c, "2:4", 32, 64))
        for v, c, _ in packed
    ]
    x = torch.randn(2, 64, device="cuda", dtype=torch.bfloat16)
    for wrong, match in ((x.half(), "float16"), (x[:, :32], "x is"), (x.cpu(), "cpu")):
        with pytest.raises(ValueError, match=match):
            matmul.linear_group(wrong, parts, form="2:4", rows=[32, 32], columns=64)
    with pytest.raises(ValueError, match="values and"):
        matmul.linear_group(x, parts, form="2:4", rows=[32, 48], columns=64)
