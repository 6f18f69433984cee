"""CUDA kernels between dense and packed: the bytes of the reference, in Triton's interpreter or on a GPU.

The interpreter must be chosen before Triton is imported, so that one test here runs the others again in a
process of its own. What the kernels compile to is read where there is no GPU, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import (
    INTERPRETED,
    assembled,
    keep_sums_in_their_dtype,
    run_again,
    source_of,
)
from torch import Tensor

import s3tensor as s3
from s3tensor.errors import PatternError
from s3tensor.mask import packing
from s3tensor.mask.projection import expand_blocks
from s3tensor.pattern import BoundPattern, Pattern
from s3tensor.testing import bound_patterns, weights

pytest.importorskip("triton", reason="needs Triton")

from s3tensor.kernels import pack as pack_kernels
from s3tensor.kernels import tiles
from s3tensor.kernels import unpack as unpack_kernels

if INTERPRETED:
    keep_sums_in_their_dtype()

FORMS = tiles.FORMS
U8, BF16, F16, F32, F64 = (
    torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.float64,
)  # fmt: skip
OF = (
    (1, 4, BF16), (2, 4, F32), (3, 4, U8), (4, 8, BF16), (8, 16, BF16), (1, 2, F64), (3, 5, BF16),
    (5, 7, F32), (2, 8, U8), (3, 8, F16), (1, 32, BF16), (16, 32, F64), (13, 31, BF16),
)  # fmt: skip
BLOCKS = (
    "block:4x16@0.5",
    "block:8x32@0.3/tensor",
    "block:16x8@1:3",
    "row@0.5",
    "head:8x2@0.5/input",
)
HALF = (torch.bfloat16, torch.float16)


def test_the_interpreter_runs_the_tests_of_this_file() -> None:
    run_again(__file__, 80)


def bytes_of(t: Tensor) -> list[int]:
    return t.detach().cpu().contiguous().flatten().view(torch.uint8).tolist()


def same(a: Tensor, b: Tensor) -> bool:
    """Equal in every bit, NaN and signs of zeros included; shapes and dtypes too."""
    return a.shape == b.shape and a.dtype == b.dtype and bytes_of(a) == bytes_of(b)


def some_weight(
    pattern: str, shape: tuple[int, int], dtype: torch.dtype, seed: int = 0, full: bool = True
) -> tuple[BoundPattern, Tensor, Tensor]:
    """A bound pattern, a weight with zeros of both signs and its mask, of the whole budget or of less."""
    generator = torch.Generator().manual_seed(seed)
    bound = Pattern.parse(pattern).bind(shape)
    weight = torch.randn(shape, generator=generator)
    mask = s3.project(weight, pattern)
    if not full:
        fewer = torch.rand(bound.scopes, bound.blocks_per_scope, generator=generator) < 0.6
        mask = mask & expand_blocks(fewer, bound)
    weight = (weight * 60).to(dtype)
    if dtype.is_floating_point:
        weight[torch.rand(shape, generator=generator) < 0.2] = -0.0
    return bound, weight, mask


@contextmanager
def by_kernels(device: str) -> Iterator[None]:
    """Let ``packing`` use kernels on the CPU too: they run in the interpreter."""
    kernels = packing._kernels
    if device == "cpu":
        packing._kernels = lambda *tensors: (unpack_kernels, pack_kernels)  # type: ignore[assignment]
    try:
        yield
    finally:
        packing._kernels = kernels


def calls(module: Any, name: str, call: Callable[[], Any]) -> int:
    """How often ``call`` calls a function of a module."""
    found = 0
    original = getattr(module, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal found
        found += 1
        return original(*arguments, **options)

    setattr(module, name, counted)
    try:
        call()
    finally:
        setattr(module, name, original)
    return found


# The four forms ---------------------------------------------------------------------------------------

SHAPES = ((16, 16), (48, 48), (48, 320))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_unpack_is_the_reference(
    form: tiles.Form, shape: tuple[int, int], dtype: torch.dtype, device: str
) -> None:
    bound, weight, mask = some_weight(form, shape, dtype)
    values, codes = packing.pack(weight, mask, bound)
    dense = packing.unpack(values, codes, bound)
    orders = [(values, codes, False)]
    if tiles.can_tile(*shape) and dtype in HALF:
        tiled = tiles.tile_values(values, form, *shape), tiles.tile_codes(codes, form, *shape)
        orders.append((*tiled, True))
    for v, c, tiled in orders:
        arguments = {"form": form, "rows": shape[0], "columns": shape[1], "tiled": tiled}
        on_device = v.to(device), c.to(device)
        assert same(unpack_kernels.unpack(*on_device, **arguments), dense)  # type: ignore[arg-type]
        turned = unpack_kernels.unpack(*on_device, **arguments, transposed=True)  # type: ignore[arg-type]
        assert same(turned, dense.t())


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_pack_and_gather_are_the_reference(
    form: tiles.Form, shape: tuple[int, int], dtype: torch.dtype, full: bool, device: str
) -> None:
    bound, weight, mask = some_weight(form, shape, dtype, full=full)
    values, codes = packing.pack(weight, mask, bound)
    gathered = packing.gather(weight, codes, bound)
    dense, kept = weight.to(device), mask.to(device)
    v, c, flag = pack_kernels.pack(dense, kept, form=form)
    assert int(flag) == 0 and same(v, values.flatten()) and same(c, codes)
    assert same(pack_kernels.gather(dense, c, form=form), gathered.flatten())
    if tiles.can_tile(*shape):
        v, c, flag = pack_kernels.pack(dense, kept, form=form, tiled=True)
        assert int(flag) == 0
        assert same(v, tiles.tile_values(values.flatten(), form, *shape))
        assert same(c, tiles.tile_codes(codes, form, *shape))
        v = pack_kernels.gather(dense, c, form=form, tiled=True)
        assert same(v, tiles.tile_values(gathered.flatten(), form, *shape))


@pytest.mark.parametrize("form", FORMS)
def test_all_ways_to_keep_blocks_of_a_scope(form: tiles.Form, device: str) -> None:
    """Every mask of a scope, those over the budget in the flag, NaN and -0.0 where nothing is kept."""
    bound = Pattern.parse(form).bind((32, 128))
    blocks = bound.blocks_per_scope
    for number in range(2**blocks):
        bits = torch.tensor([number >> b & 1 for b in range(blocks)], dtype=torch.bool)
        kept = torch.zeros(bound.scopes, blocks, dtype=torch.bool)
        kept[number % bound.scopes] = bits
        mask = expand_blocks(kept, bound)
        weight = torch.where(mask, torch.randn(32, 128), float("nan")).bfloat16()
        v, c, flag = pack_kernels.pack(weight.to(device), mask.to(device), form=form)
        most = int(bits.sum())
        if most > bound.keep:
            assert int(flag) == most
            continue
        values, codes = packing.pack(weight, mask, bound)
        assert int(flag) == 0 and same(v, values.flatten()) and same(c, codes)


@pytest.mark.parametrize("form", ["coupled2:4", "pair4:8", "rowpair16"])
def test_a_block_kept_in_part_is_flagged_wherever_it_is(form: tiles.Form, device: str) -> None:
    bound = Pattern.parse(form).bind((16, 64))
    for place in range(0, 16 * 64, 37):
        mask = torch.zeros(16 * 64, dtype=torch.bool)
        mask[place] = True
        weight = torch.ones(16, 64, device=device, dtype=torch.bfloat16)
        flag = pack_kernels.pack(weight, mask.reshape(16, 64).to(device), form=form)[2]
        assert int(flag) == pack_kernels.SPLIT
        with by_kernels(device), pytest.raises(PatternError, match="splits a block"):
            packing.pack(weight, mask.reshape(16, 64).to(device), bound)


# N of M consecutive elements --------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "of", "dtype"), OF)
def test_columns_are_the_reference(keep: int, of: int, dtype: torch.dtype, device: str) -> None:
    for full in (True, False):
        bound, weight, mask = some_weight(f"{keep}:{of}", (37, 9 * of), dtype, full=full)
        values, codes = packing.pack(weight, mask, bound)
        dense = packing.unpack(values, codes, bound)
        gathered = packing.gather(weight, codes, bound)
        on_device = weight.to(device), mask.to(device)
        v, c, flag = pack_kernels.pack_columns(*on_device, keep=keep, of=of)
        assert int(flag) == 0 and same(v, values.flatten()) and same(c, codes)
        assert same(unpack_kernels.columns(v, c, keep=keep, of=of), dense.flatten())
        assert same(
            pack_kernels.gather_columns(on_device[0], c, keep=keep, of=of), gathered.flatten()
        )


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (3, 5), (4, 8), (16, 32)])
def test_the_flag_of_columns_is_the_most_that_a_scope_keeps(
    keep: int, of: int, device: str
) -> None:
    for most in (0, keep, keep + 1, of):
        mask = torch.zeros(50, of, dtype=torch.bool)
        mask[most, :most] = True
        flag = pack_kernels.pack_columns(
            torch.ones(50, of, device=device), mask.to(device), keep=keep, of=of
        )[2]
        assert int(flag) == (most if most > keep else 0)


@pytest.mark.parametrize(("keep", "of"), [(4, 8), (3, 5), (1, 5), (16, 32)])
def test_damaged_codes_give_no_value_from_elsewhere(keep: int, of: int, device: str) -> None:
    scopes = 70
    values = torch.arange(1, scopes * keep + 1, device=device, dtype=torch.float32)
    size = -(-scopes * (keep * unpack_kernels.index_width(keep, of) or of) // 8)
    codes = torch.full((size,), 255, device=device, dtype=torch.uint8)
    dense = unpack_kernels.columns(values, codes, keep=keep, of=of).reshape(scopes, of).cpu()
    scope = (dense - 1).div(keep, rounding_mode="floor")
    assert ((dense == 0) | (scope == torch.arange(scopes)[:, None])).all()
    gathered = pack_kernels.gather_columns(dense.to(device), codes, keep=keep, of=of).cpu()
    assert torch.isin(gathered.reshape(scopes, keep), dense).all()


# Through packing --------------------------------------------------------------------------------------

DTYPES = (F32, BF16, F16, F64)


@settings(max_examples=25)
@given(st.data())
@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_any_pattern_packs_to_the_bytes_of_the_reference(kind: str, data: st.DataObject) -> None:
    """Also patterns that no kernel takes, masks with room to spare and views of larger tensors."""
    if kind == "cpu" and not INTERPRETED:
        pytest.skip("runs in the interpreter")
    of_a_form = st.sampled_from(
        (*FORMS, "block:1x2@2:4", "block:1x4@3:8", "2:4", "7:9", *BLOCKS)
    ).flatmap(
        lambda name: st.tuples(st.integers(1, 3), st.integers(1, 3)).map(
            lambda n: Pattern.parse(name).bind((16 * n[0], 288 * n[1]))
        )
    )
    bound = data.draw(of_a_form | bound_patterns(max_elements=1024))
    weight = data.draw(weights(bound.shape, DTYPES))
    mask = s3.project(weight, bound.pattern)
    if data.draw(st.booleans()):
        fewer = torch.rand(bound.scopes, bound.blocks_per_scope) < 0.5
        mask = mask & expand_blocks(fewer, bound)
    values, indices = packing.pack(weight, mask, bound)
    dense = packing.unpack(values, indices, bound)
    gathered = packing.gather(weight, indices, bound)
    recorded = packing.unpack_mask(indices, bound)
    offset = data.draw(st.integers(0, 3))

    def moved(t: Tensor) -> Tensor:
        """On the device, at an address that is a multiple of its elements' size only."""
        around = torch.empty(t.numel() + offset, dtype=t.dtype, device=kind)
        return around[offset:].copy_(t.flatten()).reshape(t.shape)

    with by_kernels(kind):
        v, i = packing.pack(moved(weight), moved(mask), bound)
        assert same(v, values) and same(i, indices)
        assert same(packing.unpack(moved(values), moved(indices), bound), dense)
        assert same(packing.gather(moved(weight), moved(indices), bound), gathered)
        assert same(packing.unpack_mask(moved(indices), bound), recorded)


@pytest.mark.parametrize("form", FORMS)
def test_packing_takes_and_gives_tile_order(form: tiles.Form, device: str) -> None:
    bound, weight, mask = some_weight(form, (32, 128), torch.bfloat16)
    values, codes = packing.pack(weight, mask, bound)
    gathered = packing.gather(weight, codes, bound)
    tiled = tiles.tile_values(values, form, 32, 128), tiles.tile_codes(codes, form, 32, 128)
    on_device = weight.to(device), mask.to(device)
    with by_kernels(device):
        v, c = packing.pack(*on_device, bound, tiled=True)
        assert same(v, tiled[0]) and same(c, tiled[1])
        assert same(packing.unpack(v, c, bound, tiled=True), torch.where(mask, weight, 0) + 0.0)
        gathered_tiled = packing.gather(on_device[0], c, bound, tiled=True)
        assert same(gathered_tiled, tiles.tile_values(gathered, form, 32, 128))


def test_what_has_a_kernel_runs_on_it(device: str) -> None:
    for pattern, dtype, name in (
        ("pair4:8", torch.bfloat16, "unpack"),
        ("rowpair16", torch.float32, "unpack"),
        ("2:4", torch.float64, "columns"),
        ("3:8", torch.bfloat16, "columns"),
        ("block:1x4@2:8", torch.float16, "columns"),
        ("block:8x16@0.5", torch.bfloat16, "blocks"),
        ("row@0.5", torch.bfloat16, "blocks"),
        ("rowpair16", torch.float64, "blocks"),
        ("unstructured@0.5", torch.bfloat16, None),
    ):
        bound, weight, mask = some_weight(pattern, (16, 64), dtype)
        values, indices = (t.to(device) for t in packing.pack(weight, mask, bound))
        with by_kernels(device):
            for other in ("unpack", "columns", "blocks"):

                def unpacked(v: Tensor = values, i: Tensor = indices, b: Any = bound) -> None:
                    packing.unpack(v, i, b)

                assert calls(unpack_kernels, other, unpacked) == int(other == name)


def test_a_weight_of_any_strides_is_packed(device: str) -> None:
    bound, weight, mask = some_weight("2:4", (32, 64), torch.bfloat16)
    expected = packing.pack(weight, mask, bound)
    wide = torch.zeros(32, 128, device=device, dtype=torch.bfloat16)[:, 64:]
    wide.copy_(weight)
    turned = mask.t().contiguous().to(device).t()
    with by_kernels(device):
        packed = packing.pack(wide, turned, bound)
        assert all(same(a, b) for a, b in zip(packed, expected, strict=True))
        gathered = packing.gather(wide, packed[1], bound)
    assert same(gathered, packing.gather(weight, expected[1], bound))


def test_a_mask_over_the_budget_is_refused_with_its_count(device: str) -> None:
    for pattern, most in (("2:4", 4), ("pair4:8", 4), ("rowpair16", 2), ("3:8", 8)):
        bound = Pattern.parse(pattern).bind((16, 64))
        weight = torch.ones(16, 64, device=device, dtype=torch.bfloat16)
        with by_kernels(device), pytest.raises(PatternError, match=f"keeps {most} blocks in one"):
            packing.pack(weight, torch.ones_like(weight, dtype=torch.bool), bound)


def test_sizes_that_do_not_belong_together_are_refused_by_name(device: str) -> None:
    values = torch.zeros(512, dtype=torch.bfloat16, device=device)
    codes = torch.zeros(128, dtype=torch.uint8, device=device)
    good: dict[str, Any] = {"form": "2:4", "rows": 16, "columns": 64, "tiled": True}
    assert unpack_kernels.unpack(values, codes, **good).shape == (16, 64)
    for change, match in (
        ({"form": "1:4"}, "'1:4' is not one of"),
        ({"values": values.double()}, "elements of 8 bytes"),
        ({"rows": 8, "columns": 128}, "has no tile order"),
        ({"columns": 66}, "not a multiple of 1 x 4"),
        ({"rows": 32}, "512 values are not half of 32 x 64"),
        ({"codes": codes[1:]}, "127 bytes of codes"),
    ):
        arguments = {**good, "values": values, "codes": codes, **change}
        with pytest.raises(ValueError, match=match):
            unpack_kernels.unpack(**arguments)
    with pytest.raises(ValueError, match="3 of 33 elements"):
        unpack_kernels.columns(values[:510], codes, keep=3, of=33)
    with pytest.raises(ValueError, match="it must be bool"):
        pack_kernels.pack(values.reshape(16, 32), values.reshape(16, 32), form="2:4")
    eight_bits = values.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"elements are torch.float8"):
        pack_kernels.pack_columns(eight_bits, eight_bits.bool(), keep=2, of=4)


# Blocks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [U8, BF16, F64])
@pytest.mark.parametrize("pattern", BLOCKS)
def test_blocks_are_the_reference(pattern: str, dtype: torch.dtype, device: str) -> None:
    bound, weight, mask = some_weight(pattern, (48, 96), dtype, full=False)
    values, indices = packing.pack(weight, mask, bound)
    dense, gathered = packing.unpack(values, indices, bound), packing.gather(weight, indices, bound)
    modes = packing._modes(bound, weight.element_size())
    if modes is None:
        assert dtype == U8 and bound.block[1] % 16  # a piece of 16 bytes is in no block
        return
    slots = packing._slots(indices, bound).to(device)
    shape = bound.packed_shape
    assert same(unpack_kernels.blocks(values.to(device), slots, (48, 96), modes), dense)
    assert same(pack_kernels.gather_blocks(weight.to(device), slots, shape, modes), gathered)
    with pytest.raises(ValueError, match="of 1 pieces"):
        unpack_kernels.blocks(values.to(device), slots, (16 // dtype.itemsize,), modes)


# On a GPU only ----------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_tensors_that_are_differentiated_or_on_two_devices_take_the_reference() -> None:
    t = torch.zeros(4, device="cuda")
    assert packing._kernels(t, t) is not None
    assert packing._kernels(t, t.cpu()) is None
    assert packing._kernels(t.clone().requires_grad_()) is None
    with torch.no_grad():
        assert packing._kernels(t.clone().requires_grad_()) is not None


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", [*FORMS, "3:8", "8:16", "block:16x16@0.5", "row@0.1"])
def test_graphs_replay_unpack_and_gather(pattern: str) -> None:
    bound, weight, mask = some_weight(pattern, (64, 256), torch.bfloat16)
    values, indices = (t.cuda() for t in packing.pack(weight, mask, bound))
    packing.gather(packing.unpack(values, indices, bound), indices, bound)  # compile
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dense = packing.unpack(values, indices, bound)
        again = packing.gather(dense, indices, bound)
    for seed in range(3):
        _, weight, mask = some_weight(pattern, (64, 256), torch.bfloat16, seed)
        fresh = packing.pack(weight, mask, bound)
        values.copy_(fresh[0])
        indices.copy_(fresh[1])
        graph.replay()
        assert same(dense, packing.unpack(*fresh, bound)) and same(again, fresh[0])


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", [*FORMS, "1:4"])
def test_weights_of_over_two_to_the_31_elements(pattern: str) -> None:
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB")
    rows, columns = 2**15 + 32, 2**16
    half = Pattern.parse(pattern).bind((rows // 2, columns))
    whole = Pattern.parse(pattern).bind((rows, columns))
    weight = torch.randn(rows // 2, columns, device="cuda", dtype=torch.bfloat16)
    mask = torch.zeros(rows // 2, columns, dtype=torch.bool, device="cuda")
    mask[:, ::64] = pattern in ("2:4", "1:4")
    values, codes = packing.pack(weight, mask, half)
    expected = torch.where(mask, weight, 0) + 0.0
    dense = packing.unpack(values.repeat(2, 1, 1), codes.repeat(2), whole)
    assert torch.equal(dense[: rows // 2], expected) and torch.equal(dense[rows // 2 :], expected)
    again = packing.pack(dense, mask.repeat(2, 1), whole)
    assert torch.equal(again[0][half.scopes :], values) and torch.equal(again[1], codes.repeat(2))
    assert torch.equal(packing.gather(dense, again[1], whole), again[0])


# Compilation ------------------------------------------------------------------------------------------


def compiled(
    kernel: Any, pointers: dict[str, str], constants: dict[str, Any], warps: int, arch: int
) -> tuple[str, str]:
    """SASS and use of registers and memory of a kernel for ``sm_<arch>``; needs no GPU."""
    if INTERPRETED:
        pytest.skip("the interpreter does not compile")
    names = kernel.arg_names
    signature = {n: pointers.get(n, "constexpr" if n in constants else "i32") for n in names}
    source = source_of(kernel, signature, constants, pointers.keys() - {"flag_ptr"})
    _, sass, usage = assembled(source, arch, warps)
    spilled = re.search(r"STACK:(\d+) .*LOCAL:0", usage)
    assert spilled and int(spilled.group(1)) <= 8, usage  # Triton 3.9 spills two words of one
    return sass, usage


def registers(usage: str) -> int:
    return int(re.search(r"REG:(\d+)", usage).group(1))  # type: ignore[union-attr]


LONGS = {"v_ptr": "*i64", "c_ptr": "*u8", "y_ptr": "*i64"}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_unpack_compiles_to_wide_stores_and_no_shared_memory(
    form: tiles.Form, tiled: bool, arch: int
) -> None:
    kind = unpack_kernels._KINDS[form, 2]
    rows = form == "rowpair16"
    sass, usage = compiled(
        unpack_kernels.rows_kernel if rows else unpack_kernels.pieces_kernel,
        LONGS,
        {"KIND": kind, "TILED": tiled, "ITEMSIZE": 2, "N": 256, "STEPS": 2},
        8,
        arch,
    )
    assert len(re.findall(r"STG\.E\.128", sass)) == (4 if rows else 2)
    load = "LDG.E.64" if form in ("2:4", "pair4:8") else "LDG.E.128"
    assert len(re.findall(re.escape(load), sass)) == 2
    assert not re.search(r"\b(LDS|STS|BAR)\b", sass)
    assert registers(usage) <= 32  # 2048 threads a processor


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("form", FORMS)
def test_pack_and_gather_compile_to_wide_loads_and_stores(form: tiles.Form, arch: int) -> None:
    pointers = {"w_ptr": "*i64", "m_ptr": "*i64", "v_ptr": "*i64", "flag_ptr": "*i32"}
    pointers["c_ptr"] = "*i16" if form == "2:4" else "*u8"
    for gathers in (False, True):
        constants = {"TILED": gathers, "GATHERS": gathers, "SIGNED": True, "N": 256}
        kernel = pack_kernels.row_pairs_kernel
        if form != "rowpair16":
            kernel = pack_kernels.units_kernel
            constants["FORM"] = FORMS.index(form)
        sass, usage = compiled(kernel, pointers, constants, 8, arch)
        assert len(re.findall(r"STG\.E\.128", sass)) == 1
        loads = 1 if form == "rowpair16" else 2
        assert len(re.findall(r"LDG\.E\.128", sass)) == (loads if gathers else 3)
        assert registers(usage) <= 40


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("gathers", [False, True])
def test_blocks_compile_to_wide_loads_and_stores(gathers: bool, arch: int) -> None:
    pointers = {"v_ptr": "*i64", "slot_ptr": "*i32", "y_ptr": "*i64"}
    constants = {"GATHERS": gathers, "N": 256}
    sass, usage = compiled(unpack_kernels.blocks_kernel, pointers, constants, 8, arch)
    assert len(re.findall(r"STG\.E\.128", sass)) == len(re.findall(r"LDG\.E\.128", sass)) == 1
    assert registers(usage) <= 32


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("keep", "of"), [(1, 4), (4, 8), (8, 16), (3, 5)])
def test_columns_compile_without_spills(keep: int, of: int, arch: int) -> None:
    import triton

    width = unpack_kernels.index_width(keep, of)
    wide = triton.next_power_of_2(of)
    constants = {"KEEP": keep, "OF": of, "WIDE": wide, "WIDTH": width, "S": 2048 // wide}
    pointers = {"v_ptr": "*i16", "c_ptr": "*u8", "y_ptr": "*i16"}
    sass, usage = compiled(unpack_kernels.columns_kernel, pointers, constants, 4, arch)
    store = {4: "STG.E.64", 8: "STG.E.128", 16: "STG.E.128"}.get(of, "STG.E.U16")
    assert store in sass
    assert registers(usage) <= 64
    constants |= pack_kernels.code_constants(keep, of)
    pointers = {"w_ptr": "*i16", "m_ptr": "*u8", "v_ptr": "*i16", "c_ptr": "*u8"}
    pointers["flag_ptr"] = "*i32"
    for gathers in (False, True):
        options = {"GATHERS": gathers, "SIGNED": True}
        sass, usage = compiled(pack_kernels.columns_kernel, pointers, constants | options, 4, arch)
        assert registers(usage) <= 128
