"""How compressed weights are kept: tile order and second forms never change what a weight is."""

from __future__ import annotations

import copy
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor, nn

import s3tensor as s3
from s3tensor import StructuredSparseTensor
from s3tensor.io import state as checkpoint
from s3tensor.tensor import cusparselt
from s3tensor.tensor import linear as paths

FORMS = ("2:4", "coupled2:4", "pair4:8", "rowpair16")


@st.composite
def tiled_and_canonical(
    draw: st.DrawFn,
) -> tuple[StructuredSparseTensor, StructuredSparseTensor]:
    """One weight in tile order and in canonical order."""
    shape = 16 * draw(st.integers(1, 3)), 64 * draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    weight = torch.randn(shape, generator=generator).to(
        draw(st.sampled_from([torch.bfloat16, torch.float16]))
    )
    canonical = StructuredSparseTensor.from_dense(weight, draw(st.sampled_from(FORMS)))
    return canonical.in_order(True), canonical


def kept(module: nn.Module) -> StructuredSparseTensor:
    weight = module.weight
    assert isinstance(weight, StructuredSparseTensor)
    return weight


# tile order -------------------------------------------------------------------------------------------


@given(tiled_and_canonical())
def test_tile_order_is_another_order_of_the_same_weight(
    pair: tuple[StructuredSparseTensor, StructuredSparseTensor],
) -> None:
    tiled, canonical = pair
    assert tiled.tiled and not canonical.tiled
    assert tiled.in_order(True) is tiled and canonical.in_order(False) is canonical
    assert tiled.nbytes_compressed == canonical.nbytes_compressed == tiled.nbytes_held
    assert tiled.packed.shape == canonical.packed.shape
    assert torch.equal(tiled, canonical) and not tiled.same_layout(canonical)
    for weight, other in ((tiled, canonical), (tiled.t(), canonical.t())):
        assert torch.equal(weight.to_dense(), other.to_dense())
        assert torch.equal(weight.mask(), other.mask())
        parts = zip(weight.parts(), other.parts(), strict=True)
        assert all(torch.equal(a, b) for a, b in parts)
    back = tiled.in_order(False)
    assert back.same_layout(canonical) and torch.equal(back.indices, canonical.indices)
    assert tiled.to(torch.float32).tiled is False  # a CPU has no use for it
    assert torch.equal(tiled.to(torch.float32), canonical.to(torch.float32))


@given(tiled_and_canonical(), st.integers(1, 3))
def test_products_and_gradients_do_not_depend_on_the_order(
    pair: tuple[StructuredSparseTensor, StructuredSparseTensor], batch: int
) -> None:
    results = []
    for weight in pair:
        parameter = nn.Parameter(weight.clone())
        x = torch.linspace(-1, 1, batch * weight.shape[1]).reshape(batch, -1).to(weight.dtype)
        x.requires_grad_()
        y = F.linear(x, parameter)
        (y.float() ** 2).sum().backward()
        assert isinstance(parameter.grad, StructuredSparseTensor)
        assert parameter.grad.same_layout(weight)
        results.append((y, x.grad, parameter.grad.to_dense(), y @ weight))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@given(tiled_and_canonical())
def test_values_are_copied_between_the_orders(
    pair: tuple[StructuredSparseTensor, StructuredSparseTensor],
) -> None:
    tiled, canonical = pair
    for target, source in ((tiled, canonical), (canonical, tiled)):
        blank = torch.zeros_like(target)
        blank.copy_(source)
        assert blank.same_layout(target) and torch.equal(blank, source)


@given(tiled_and_canonical())
def test_a_checkpoint_has_canonical_order(
    pair: tuple[StructuredSparseTensor, StructuredSparseTensor],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("tiled", "canonical")]
        for file, weight in zip(files, pair, strict=True):
            checkpoint.save_state(file, {"w": weight})
        assert files[0].read_bytes() == files[1].read_bytes()
    for weight in pair:
        buffer = io.BytesIO()
        torch.save(weight, buffer)
        buffer.seek(0)
        again = torch.load(buffer, weights_only=True)
        assert again.same_layout(pair[1]) and torch.equal(again, weight)
        assert torch.equal(again.packed, pair[1].packed)
        assert copy.deepcopy(weight).same_layout(weight)


@given(tiled_and_canonical())
def test_a_weight_for_the_vendor_is_2_of_4_along_rows_and_gives_the_same_product(
    pair: tuple[StructuredSparseTensor, StructuredSparseTensor],
) -> None:
    weight = pair[1].to(torch.float64)
    if str(weight.pattern) == "rowpair16":
        return
    dense, bound = weight.to_dense(), weight.bound
    ordered = cusparselt.order_columns(dense, bound)
    assert s3.satisfies(ordered, "2:4")
    x = torch.linspace(-1, 1, 3 * dense.shape[1], dtype=torch.float64).reshape(3, -1)
    y = cusparselt.order_columns(x, bound) @ ordered.t()
    torch.testing.assert_close(y, x @ dense.t())


def test_a_graph_takes_either_order_and_compiles_for_each() -> None:
    torch._dynamo.reset()
    canonical = StructuredSparseTensor.from_dense(torch.randn(16, 64, dtype=torch.bfloat16), "2:4")
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    call = torch.compile(F.linear, backend="aot_eager", fullgraph=True)
    for weight in (canonical, canonical.in_order(True), canonical.with_memory("fast")):
        assert torch.equal(call(x, weight), F.linear(x, canonical))


# second forms -----------------------------------------------------------------------------------------


def test_fast_memory_on_a_cpu_is_a_dense_copy() -> None:
    lean = StructuredSparseTensor.from_dense(torch.randn(32, 64), "2:4")
    fast = lean.with_memory("fast")
    assert (lean.memory, fast.memory) == ("lean", "fast")
    assert fast.dense is not None and torch.equal(fast.dense, lean.to_dense())
    assert fast.packed.data_ptr() == lean.packed.data_ptr()
    assert fast.nbytes_compressed == lean.nbytes_held == lean.nbytes_compressed
    assert fast.nbytes_held == lean.nbytes_compressed + 32 * 64 * 4
    assert f"{fast.nbytes_held} with copies" in repr(fast) and "copies" not in repr(lean)
    assert fast.with_memory("lean").memory == "lean"
    assert torch.equal(fast, lean) and torch.equal(fast.t().to_dense(), lean.t().to_dense())
    x = torch.randn(3, 64)
    assert torch.equal(F.linear(x, fast), F.linear(x, lean))
    assert torch.equal(torch.randn(3, 32) @ fast * 0, torch.randn(3, 32) @ lean * 0)


def test_a_dense_copy_is_what_is_multiplied() -> None:
    fast = StructuredSparseTensor.from_dense(torch.randn(32, 64), "2:4").with_memory("fast")
    assert fast.dense is not None
    fast.dense.fill_(1.0)
    assert torch.equal(F.linear(torch.ones(1, 64), fast), torch.full((1, 32), 64.0))
    fast.refresh_()
    assert torch.equal(fast.dense, fast.to_dense())


def test_copies_follow_the_values() -> None:
    one, other = (StructuredSparseTensor.from_dense(torch.randn(32, 64), "2:4") for _ in range(2))
    fast = one.with_memory("fast")
    for twin in (fast.clone(), copy.deepcopy(fast), fast.detach(), fast.to(torch.float64)):
        assert twin.memory == "fast" and torch.equal(twin.dense, twin.to_dense())
    assert fast.clone().dense.data_ptr() != fast.dense.data_ptr()  # type: ignore[union-attr]
    assert torch.zeros_like(fast).memory == "lean"
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True).memory == "fast"
    fast.copy_(other)
    assert torch.equal(fast.dense, other.to_dense())
    fast.add_(other)
    assert torch.equal(fast.dense, 2 * other.to_dense())
    parameter = nn.Parameter(one.with_memory("fast"))
    torch.optim.SGD([parameter], lr=0.5, foreach=False)
    F.linear(torch.ones(1, 64), parameter).sum().backward()
    assert isinstance(parameter.grad, StructuredSparseTensor) and parameter.grad.memory == "lean"


def test_a_checkpoint_never_holds_copies(tmp_path: Path) -> None:
    weight = StructuredSparseTensor.from_dense(torch.randn(32, 64), "2:4")
    checkpoint.save_state(tmp_path / "lean", {"w": weight})
    checkpoint.save_state(tmp_path / "fast", {"w": weight.with_memory("fast")})
    assert (tmp_path / "lean").read_bytes() == (tmp_path / "fast").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("large",), "lean"),
        (("fast", (0, 4)), "from 1 on"),
        (("fast", (8, 4)), "from 1 on"),
    ],
)
def test_other_words_for_the_memory_are_refused(arguments: Any, message: str) -> None:
    weight = StructuredSparseTensor.from_dense(torch.randn(4, 8), "2:4")
    with pytest.raises(ValueError, match=message):
        weight.with_memory(*arguments)


def test_set_memory_changes_every_compressed_weight_and_says_what_it_costs() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 8))
    s3.sparsify_(model, "2:4", filter_fn=lambda module, name: name != "3")
    model[2].weight = model[0].weight  # shared weights stay shared and count once
    x = torch.randn(5, 64)
    before = model(x)
    report = s3.set_memory_(model, "fast")
    assert [row.name for row in report.rows] == ["0.weight"]
    assert model[0].weight is model[2].weight
    assert report.rows[0].forms == ("packed", "dense")
    assert (report.compressed, report.dense) == (64 * 64 * 4 * 17 // 32, 64 * 64 * 4)
    assert report.held == report.compressed + report.dense
    assert "1 keep a second form" in str(report) and kept(model[0]).memory == "fast"
    assert torch.equal(model(x), before)
    lean = s3.set_memory_(model, "lean")
    assert lean.held == lean.compressed == report.compressed
    with pytest.raises(s3.ModelError, match="no compressed weights"):
        s3.set_memory_(nn.Linear(4, 4), "fast")


@pytest.mark.parametrize(
    "change", [lambda m: s3.set_memory_(m, "fast"), s3.quantize_], ids=["set_memory_", "quantize_"]
)
def test_a_weight_of_two_names_in_one_module_stays_one(change: Callable[[nn.Module], Any]) -> None:
    layer: Any = nn.Linear(64, 32)
    s3.sparsify_(layer, "2:4")
    layer.twin = before = layer.weight
    report = change(layer)
    assert [row.name for row in report.rows] == ["weight"]
    assert layer.twin is layer.weight is not before


# CUDA -------------------------------------------------------------------------------------------------

gpu = pytest.mark.gpu


def close(y: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None = None) -> None:
    """Within a rounding to the dtype of y of the product and of its sum with the bias, and float32 sums."""
    product = x.double() @ dense.double().t()
    exact = product if bias is None else product + bias.double()
    # A bias of one element is added by cuBLAS's caller, to a product that was rounded.
    size = exact.abs() if bias is None else exact.abs() + product.abs()
    terms = x.double().abs() @ dense.double().abs().t()
    assert y.shape == exact.shape and y.is_contiguous()
    assert ((y.double() - exact).abs() <= torch.finfo(y.dtype).eps * size + 1e-5 * terms).all()


def on_gpu(
    pattern: str, shape: tuple[int, int] = (256, 512), dtype: torch.dtype = torch.bfloat16
) -> StructuredSparseTensor:
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(shape, device="cuda", generator=generator).to(dtype)
    return StructuredSparseTensor.from_dense(weight, pattern)


@gpu
@pytest.mark.parametrize("pattern", FORMS)
def test_weights_take_on_tile_order_on_a_gpu_and_lose_it_on_a_cpu(pattern: str) -> None:
    weight = on_gpu(pattern)
    assert weight.tiled
    back = weight.cpu()
    assert not back.tiled and torch.equal(back.cuda(), weight) and back.cuda().tiled
    assert torch.equal(back.to_dense(), weight.to_dense().cpu())
    assert not weight.float().tiled and weight.float().half().tiled
    assert torch.equal(weight.cpu().mask(), weight.mask().cpu())
    odd = on_gpu(pattern, (48, 80))
    assert not odd.tiled
    module = nn.Linear(512, 256, bias=False, dtype=torch.bfloat16)
    module.weight = nn.Parameter(back, requires_grad=False)
    assert kept(module.cuda()).tiled and not kept(module.cpu()).tiled


@gpu
@pytest.mark.filterwarnings("ignore:a compressed weight is unpacked")
@pytest.mark.parametrize("memory", ["lean", "fast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("pattern", [*FORMS, "1:4", "block:16x16@0.5"])
def test_linear_on_a_gpu_is_the_dense_product(
    pattern: str, dtype: torch.dtype, memory: Any
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    for shape in ((256, 512), (48, 80), (1024, 4096)):
        weight = on_gpu(pattern, shape, dtype).with_memory(memory)
        dense = weight.to_dense()
        bias = torch.randn(shape[0], device="cuda").to(dtype)
        for n in (1, 5, 16, 17, 64, 100, 300, 1024):
            x = torch.randn(n, shape[1], device="cuda").to(dtype)
            close(F.linear(x, weight, bias), x, dense, bias)
        close(F.linear(x[0], weight)[None], x[:1], dense)
        assert F.linear(x[:0], weight).shape == (0, shape[0])
        y = torch.randn(3, shape[0], device="cuda").to(dtype)
        close(y @ weight, y, dense.t())


@gpu
@pytest.mark.filterwarnings("ignore:a compressed weight is unpacked")
@pytest.mark.parametrize("pattern", FORMS)
def test_every_possible_path_gives_the_product(pattern: str) -> None:
    weight = on_gpu(pattern, (512, 1024))
    dense = weight.to_dense()
    device = weight.device
    copy_ = (
        cusparselt.compress(dense, weight.bound)
        if cusparselt.takes(weight.bound, weight.dtype, device)
        else None
    )
    parts = paths.Weight(
        weight.packed, weight.indices, weight.bound, tiled=weight.tiled, dense=dense, vendor=copy_
    )
    expected = {"packed", "dense", "scratch"} | ({"vendor"} if copy_ is not None else set())
    assert set(paths.possible(parts, 16)) == expected
    bias = torch.randn(512, device="cuda", dtype=torch.bfloat16)
    for n in (1, 16, 40, 100):
        x = torch.randn(2, n, 1024, device="cuda", dtype=torch.bfloat16)
        for path in paths.possible(parts, 2 * n):
            y = paths.multiply(x, parts, bias, path)
            close(y.flatten(0, 1), x.flatten(0, 1), dense, bias)
            one = paths.multiply(x, parts, bias[:1], path)
            close(one.flatten(0, 1), x.flatten(0, 1), dense, bias[:1].expand(512))


@gpu
def test_graphs_streams_and_devices() -> None:
    weight = on_gpu("2:4", (1024, 1024)).with_memory("fast")
    dense = weight.to_dense()
    for n in (1, 32, 2048):
        x = torch.randn(n, 1024, device="cuda", dtype=torch.bfloat16)
        F.linear(x, weight)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = F.linear(x, weight)
        x.copy_(torch.randn_like(x))
        graph.replay()
        close(y, x, dense)
        with torch.cuda.stream(torch.cuda.Stream()):
            again = F.linear(x, weight)
            torch.cuda.current_stream().synchronize()
        close(again, x, dense)
    if torch.cuda.device_count() > 1:
        other = weight.to("cuda:1")
        assert other.device.index == 1 and torch.cuda.current_device() == 0
        close(F.linear(x.to("cuda:1"), other), x.to("cuda:1"), dense.to("cuda:1"))


@gpu
def test_mixed_devices_are_refused_by_name() -> None:
    weight = on_gpu("2:4")
    x = torch.randn(2, 512, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"x is on cpu and the weight on cuda:0"):
        F.linear(x, weight)
    with pytest.raises(RuntimeError, match=r"the weight on cpu"):
        F.linear(x.cuda(), weight.cpu())
    with pytest.raises(RuntimeError, match=r"convert one with"):
        F.linear(x.cuda().half(), weight)


@gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("memory", ["lean", "fast"])
def test_compiled_models_on_a_gpu(mode: str, memory: Any) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512)).cuda().bfloat16()
    s3.sparsify_(model, "2:4")
    s3.set_memory_(model, memory)
    call = torch.compile(model, fullgraph=True, mode=mode, dynamic=False)
    with torch.no_grad():
        for n in (1, 16, 64):
            for _ in range(3):
                x = torch.randn(n, 512, device="cuda", dtype=torch.bfloat16)
                torch.testing.assert_close(call(x), model(x), rtol=2e-2, atol=2e-2)


@gpu
@pytest.mark.filterwarnings("ignore:a compressed weight is unpacked")
@pytest.mark.parametrize("memory", ["lean", "fast"])
def test_activations_have_gradients_through_compressed_weights(memory: Any) -> None:
    weight = on_gpu("pair4:8").with_memory(memory)
    dense = weight.to_dense()
    x = torch.randn(6, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(6, 256, device="cuda", dtype=torch.bfloat16)
    F.linear(x, weight).backward(grad)
    assert x.grad is not None
    close(x.grad, grad, dense.t())
    with torch.autocast("cuda", dtype=torch.float16):
        assert F.linear(x.detach(), weight).dtype == torch.float16
    parameter = nn.Parameter(on_gpu("pair4:8"))
    F.linear(x.detach(), parameter).backward(grad)
    assert isinstance(parameter.grad, StructuredSparseTensor) and parameter.grad.tiled
    whole = grad.double().t() @ x.detach().double()
    expected = whole * parameter.mask()
    error = (parameter.grad.to_dense().double() - expected).norm() / expected.norm()
    assert error < 1e-2


@gpu
@pytest.mark.filterwarnings("ignore:a compressed weight is unpacked")
@pytest.mark.parametrize("pattern", [*FORMS, "1:4"])
def test_opcheck_on_cuda_tensors(pattern: str) -> None:
    from s3tensor.tensor import ops

    weight = on_gpu(pattern, (64, 128))
    shape = [64, 128]
    x = torch.randn(3, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dense = weight.to_dense()
    for copy_ in (None, dense):
        arguments = (x, weight.packed, weight.indices, None, pattern, shape, False)
        torch.library.opcheck(ops.linear, (*arguments, weight.tiled, copy_, None))
    twice = ([weight.packed] * 2, [weight.indices] * 2, pattern, [shape[0]] * 2, weight.tiled)
    torch.library.opcheck(ops.linear_group, (x.detach(), *twice))
    for y in ops.linear_group(x.detach(), *twice):
        torch.testing.assert_close(y, F.linear(x.detach(), dense), rtol=0.02, atol=0.02)
    torch.library.opcheck(ops.unpack, (weight.packed, weight.indices, pattern, shape, weight.tiled))
    torch.library.opcheck(ops.gather, (dense, weight.indices, pattern, weight.tiled))
    torch.library.opcheck(ops.project, (dense, pattern))
    torch.library.opcheck(ops.pack, (dense, weight.mask(), pattern))
