"""StructuredSparseTensor against the dense tensor that it stands for."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor, nn

import s3tensor as s3
from s3tensor import StructuredSparseTensor, UnsupportedOpError

UNITS = {  # the smallest weight that each pattern fits
    "2:4": (1, 4),
    "1:4": (1, 4),
    "4:8": (1, 8),
    "pair4:8": (1, 8),
    "coupled2:4": (1, 16),
    "rowpair16": (16, 16),
    "block:4x4@0.5": (4, 4),
    "unstructured@0.3": (1, 4),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@st.composite
def dense_and_sparse(
    draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES
) -> tuple[Tensor, StructuredSparseTensor]:
    """A dense weight that satisfies a pattern, and the same compressed."""
    pattern = draw(st.sampled_from(sorted(UNITS)))
    rows, columns = (unit * draw(st.integers(1, 4)) for unit in UNITS[pattern])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    weight = torch.randn(rows, columns, generator=generator)
    if draw(st.booleans()):  # zeros: fewer blocks than the budget, and ties
        weight = weight * torch.randint(0, 2, weight.shape, generator=generator)
    weight = weight.to(draw(st.sampled_from(dtypes)))
    return weight * s3.project(weight, pattern), StructuredSparseTensor.from_dense(weight, pattern)


@st.composite
def inputs(draw: st.DrawFn, features: int, dtype: torch.dtype) -> Tensor:
    """x of (..., features): 1 to 3 dims, maybe no rows, contiguous or not."""
    lead = draw(st.lists(st.integers(0, 3), max_size=2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    kind = draw(st.sampled_from(["contiguous", "reversed dims", "every other column"]))
    if kind == "reversed dims":
        x = torch.randn(features, *reversed(lead), generator=generator)
        return x.permute(*reversed(range(x.ndim))).to(dtype)
    x = torch.randn(*lead, 2 * features, generator=generator).to(dtype)
    return x[..., ::2] if kind == "every other column" else x[..., :features].contiguous()


def assert_product(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """y is x @ weight.t() + bias within the rounding of a sum of K products, in any order.

    The bound is Higham's (Accuracy and Stability, 3.5): each output may be off by
    (K + 2) eps (|x| |weight|' + |bias|), with eps of the dtype, because a CPU kernel may sum in it.
    """
    exact = x.double() @ weight.double().t()
    size = x.double().abs() @ weight.double().abs().t()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    allowed = (x.shape[-1] + 2) * torch.finfo(y.dtype).eps * size
    assert y.shape == exact.shape
    assert bool(((y.double() - exact).abs() <= allowed).all())


def make(pattern: str = "2:4", shape: tuple[int, int] = (32, 64)) -> StructuredSparseTensor:
    generator = torch.Generator().manual_seed(0)
    return StructuredSparseTensor.from_dense(torch.randn(shape, generator=generator), pattern)


# to and from dense ------------------------------------------------------------------------------------


@given(dense_and_sparse())
def test_to_dense_gives_back_what_satisfies_the_pattern(
    pair: tuple[Tensor, StructuredSparseTensor],
) -> None:
    dense, sparse = pair
    assert torch.equal(sparse.to_dense(), dense)
    assert torch.equal(sparse.dequantize(), dense)
    assert torch.equal(sparse.t().to_dense(), dense.t())
    assert s3.satisfies(sparse.to_dense(), sparse.pattern)
    assert sparse.to_dense(torch.float64).dtype == torch.float64
    assert (sparse.shape, sparse.dtype, sparse.device, sparse.stride()) == (
        *(dense.shape, dense.dtype, dense.device),
        dense.stride(),
    )


@given(dense_and_sparse())
def test_facts_are_those_of_the_packed_data(pair: tuple[Tensor, StructuredSparseTensor]) -> None:
    dense, sparse = pair
    mask = sparse.mask()
    assert bool(mask[dense != 0].all())
    assert mask.double().mean().item() == pytest.approx(sparse.density)
    assert torch.equal(sparse.t().mask(), mask.t())
    assert sparse.nbytes_compressed == sparse.packed.nbytes + sparse.indices.nbytes
    text = repr(sparse.t())
    assert "\n" not in text and "transposed" in text
    assert str(sparse.pattern) in text and str(sparse.dtype) in text


@given(dense_and_sparse(), st.data())
def test_strides_of_the_dense_input_do_not_matter(
    pair: tuple[Tensor, StructuredSparseTensor], data: st.DataObject
) -> None:
    dense, sparse = pair
    kind = data.draw(st.sampled_from(["columns first", "every other column", "a window"]))
    if kind == "columns first":
        strided = dense.t().contiguous().t()
    elif kind == "every other column":
        strided = dense.repeat_interleave(2, 1)[:, ::2]
    else:
        strided = F.pad(dense, (3, 2, 1, 1))[1:-1, 3:-2]
    again = StructuredSparseTensor.from_dense(strided, str(sparse.pattern), sparse.mask())
    assert torch.equal(again.to_dense(), dense)


def test_from_dense_takes_a_mask_and_expanded_memory() -> None:
    mask = s3.project(torch.rand(8, 16), "2:4")
    made = StructuredSparseTensor.from_dense(torch.ones(1, 1).expand(8, 16), "2:4", mask)
    assert torch.equal(made.to_dense(), mask.float())
    assert torch.equal(made.mask(), mask)


def test_from_dense_takes_data_and_not_a_gradient() -> None:
    weight = torch.randn(8, 16, requires_grad=True)
    made = StructuredSparseTensor.from_dense(weight, "2:4")
    assert not made.requires_grad and not made.packed.requires_grad


def test_equal_patterns_of_two_spellings_give_equal_tensors() -> None:
    weight = torch.randn(8, 16)
    by_parts = s3.Pattern(block=(1, 1), scope=(1, 4), keep=2)
    left = StructuredSparseTensor.from_dense(weight, "2:4")
    right = StructuredSparseTensor.from_dense(weight, by_parts)
    assert left.same_layout(right) and torch.equal(left, right)


@pytest.mark.parametrize(
    ("dense", "pattern", "error", "message"),
    [
        (torch.ones(8, 16, dtype=torch.int8), "2:4", s3.PatternError, "int8"),
        (torch.ones(8, 16, dtype=torch.bool), "2:4", s3.PatternError, "bool"),
        (torch.ones(8, 16, dtype=torch.complex64), "2:4", s3.PatternError, "complex64"),
        (torch.ones(8, 16).to(torch.float8_e4m3fn), "2:4", s3.PatternError, "float8"),
        (torch.full((8, 16), float("nan")), "2:4", s3.NonFiniteError, "NaN"),
        (torch.full((8, 16), float("inf")), "2:4", s3.NonFiniteError, "Inf"),
        (torch.randn(8, 18), "2:4", s3.PatternError, "dim 1 has 18"),
        (torch.randn(16), "2:4", s3.PatternError, "2-dim"),
        (torch.randn(0, 16), "2:4", s3.PatternError, "empty"),
        (torch.randn(8, 16), "2to4", s3.PatternError, "unknown pattern"),
        (torch.randn(8, 16).to_sparse(), "2:4", s3.PatternError, "layout"),
        ([[1.0] * 16], "2:4", s3.PatternError, "list"),
        (make(), "2:4", s3.PatternError, "compressed already"),
    ],
)
def test_from_dense_refuses_by_name(
    dense: Any, pattern: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        StructuredSparseTensor.from_dense(dense, pattern)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(8, 16, dtype=torch.bool), "at most 2"),
        (torch.ones(8, 12, dtype=torch.bool), "must both have the bound shape"),
    ],
)
def test_from_dense_refuses_a_wrong_mask(mask: Tensor, message: str) -> None:
    with pytest.raises(s3.PatternError, match=message):
        StructuredSparseTensor.from_dense(torch.randn(8, 16), "2:4", mask)


def test_from_dense_with_a_mask_refuses_nan_too() -> None:
    weight = torch.randn(8, 16)
    mask = s3.project(weight, "2:4")
    weight[0, 0] = float("nan")
    with pytest.raises(s3.NonFiniteError, match="NaN"):
        StructuredSparseTensor.from_dense(weight, "2:4", mask)


def test_from_packed_checks_sizes_dtypes_and_devices() -> None:
    w = make()
    again = StructuredSparseTensor.from_packed(w.packed, w.indices, "2:4", (32, 64))
    assert torch.equal(again, w)
    for packed, indices, message in [
        (w.packed[:-1], w.indices, "packed values"),
        (w.packed.int(), w.indices, "packed values"),
        (w.packed, w.indices[:-1], "packed indices"),
        (w.packed, w.indices.int(), "packed indices"),
        (w.packed, w.indices.to("meta"), "one device"),
    ]:
        with pytest.raises(s3.PatternError, match=message):
            StructuredSparseTensor.from_packed(packed, indices, "2:4", (32, 64))


# products ---------------------------------------------------------------------------------------------


@given(dense_and_sparse(), st.data())
def test_linear_is_the_dense_linear(
    pair: tuple[Tensor, StructuredSparseTensor], data: st.DataObject
) -> None:
    dense, sparse = pair
    rows, columns = dense.shape
    x = data.draw(inputs(columns, dense.dtype))
    bias = torch.randn(rows).to(dense.dtype) if data.draw(st.booleans()) else None
    y = F.linear(x, sparse, bias)
    assert type(y) is Tensor and y.is_contiguous()
    assert_product(y, x, dense, bias)
    assert torch.equal(y, F.linear(x, dense, bias))  # bit for bit: the same dense kernel on the CPU
    # the transposed view as a weight
    x = data.draw(inputs(rows, dense.dtype))
    assert_product(F.linear(x, sparse.t()), x, dense.t())


@given(dense_and_sparse(), st.data())
def test_matmul_with_the_weight_on_either_side_is_the_dense_matmul(
    pair: tuple[Tensor, StructuredSparseTensor], data: st.DataObject
) -> None:
    dense, sparse = pair
    if data.draw(st.booleans()):
        dense, sparse = dense.t(), sparse.t()
    columns = dense.shape[1]
    x = data.draw(inputs(columns, dense.dtype))
    for y in (x @ sparse.t(), torch.matmul(x, sparse.mT), x.matmul(sparse.T)):
        assert_product(y, x, dense)
    right = x if x.ndim == 1 else x.mT  # (columns,) or (..., columns, n)
    for y in (sparse @ right, torch.matmul(sparse, right), sparse.matmul(right)):
        assert y.shape == (dense @ right).shape
        assert_product(y if x.ndim == 1 else y.mT, x, dense)


@given(dense_and_sparse(), st.data())
def test_mm_mv_and_addmm_are_the_dense_ones(
    pair: tuple[Tensor, StructuredSparseTensor], data: st.DataObject
) -> None:
    dense, sparse = pair
    rows, columns = dense.shape
    x = torch.randn(3, columns).to(dense.dtype)
    bias = torch.randn(rows).to(dense.dtype)
    assert_product(torch.mm(x, sparse.t()), x, dense)
    assert_product(sparse.mm(x.t()).t(), x, dense)
    assert_product(torch.mv(sparse, x[0]), x[0], dense)
    assert_product(sparse.mv(x[0]), x[0], dense)
    # The Conv1D of transformers: a weight that is stored transposed.
    assert_product(torch.addmm(bias, x, sparse.t()), x, dense, bias)
    assert_product(bias.expand(3, rows).addmm(x, sparse.t()), x, dense, bias)
    assert_product(torch.addmm(bias[:, None], sparse, x.t()).t(), x, dense, bias)
    # Powers of two scale without rounding.
    scaled = torch.addmm(bias, x, sparse.t(), beta=0.5, alpha=2)
    assert_product(scaled, 2 * x, dense, 0.5 * bias)
    ignored = torch.addmm(bias * float("nan"), x, sparse.t(), beta=0)
    assert_product(ignored, x, dense)


def test_addmm_stretches_the_bias_alone_and_mixes_no_dtypes() -> None:
    weight, x = make(), torch.randn(3, 64)
    product = x @ weight.t()
    with pytest.raises(RuntimeError, match="expand"):
        torch.addmm(torch.randn(2, 3, 32), x, weight.t())
    with pytest.raises(RuntimeError, match=r"float64, the product torch.float32"):
        torch.addmm(torch.randn(3, 32).double(), x, weight.t())
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.addmm(torch.randn(3, 32), x, weight.t())
    assert found.dtype == torch.bfloat16 and product.dtype == torch.float32


def test_gradients_can_be_zeroed_where_they_are() -> None:
    linear = nn.Linear(64, 32, bias=False)
    linear.weight = nn.Parameter(make())
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    for _ in range(2):
        linear(torch.randn(3, 64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        assert linear.weight.grad is not None and not linear.weight.grad.packed.any()
    assert s3.satisfies(linear.weight.to_dense(), "2:4")


@given(dense_and_sparse(dtypes=(torch.float64,)), st.booleans())
def test_gradients_are_those_of_the_dense_layer_on_the_pattern(
    pair: tuple[Tensor, StructuredSparseTensor], transposed: bool
) -> None:
    dense, sparse = (part.t() if transposed else part for part in pair)
    x, bias = torch.randn(2, 3, dense.shape[1]).double(), torch.randn(dense.shape[0]).double()
    grads = []
    for weight in (dense, sparse):
        leaves = [t.detach().clone().requires_grad_() for t in (x, bias)]
        leaf = weight.detach().clone().requires_grad_()
        F.linear(leaves[0], leaf, leaves[1]).square().sum().backward()
        grads.append([leaf.grad, *(t.grad for t in leaves)])
    torch.testing.assert_close(grads[1][1:], grads[0][1:])
    weight_grad = grads[1][0]
    assert isinstance(weight_grad, StructuredSparseTensor) and weight_grad.same_layout(sparse)
    torch.testing.assert_close(weight_grad.to_dense(), grads[0][0] * sparse.mask())


@pytest.mark.parametrize("transposed", [False, True])
def test_double_backward_by_the_weight_sums_its_gradients(transposed: bool) -> None:
    sparse = make().double()
    sparse = sparse.t() if transposed else sparse
    grads = []
    for weight in (sparse.to_dense(), sparse):
        leaf = weight.detach().clone().requires_grad_()
        x = torch.ones(3, leaf.shape[1], dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(F.linear(x, leaf).pow(3).sum(), x, create_graph=True)
        grad.square().sum().backward()  # two paths to the weight: through y, and straight
        assert leaf.grad is not None
        grads.append(leaf.grad)
    assert isinstance(grads[1], StructuredSparseTensor) and grads[1].same_layout(sparse)
    torch.testing.assert_close(grads[1].to_dense(), grads[0] * sparse.mask())


@given(dense_and_sparse(), st.booleans())
def test_sums_of_weights_that_keep_the_same_blocks_are_the_dense_sums(
    pair: tuple[Tensor, StructuredSparseTensor], transposed: bool
) -> None:
    dense, sparse = (part.t() if transposed else part for part in pair)
    total = sparse + sparse
    assert total.same_layout(sparse) and torch.equal(total.to_dense(), dense + dense)
    total = torch.add(sparse, sparse, alpha=-1)
    assert torch.equal(total.to_dense(), torch.zeros_like(dense))
    assert total.add_(sparse, alpha=2) is total
    assert torch.equal(total.to_dense(), 2 * dense)


def test_gradients_accumulate_over_uses_and_over_steps() -> None:
    weight = make().requires_grad_()
    x = torch.randn(3, 64)
    F.linear(x, weight).sum().backward()
    once = weight.grad.to_dense()
    (F.linear(x, weight) + F.linear(x, weight)).sum().backward()
    torch.testing.assert_close(weight.grad.to_dense(), 3 * once)


def test_sums_of_weights_that_keep_different_blocks_are_refused() -> None:
    left = make("1:4")
    right = StructuredSparseTensor.from_dense(-left.to_dense().roll(1, 1), "1:4")
    for call in (lambda: left + right, lambda: left.add_(right)):
        with pytest.raises(s3.PatternError, match="different blocks"):
            call()


def test_products_of_two_compressed_or_with_out_are_refused() -> None:
    w, x = make(), torch.randn(3, 64)
    for call in (
        lambda: w @ w.t(),
        lambda: F.linear(w, w),
        lambda: F.linear(w, torch.randn(5, 64)),
        lambda: F.linear(x, torch.randn(32, 64), bias=w),
        lambda: torch.addmm(w, x.t()[:32, :3], torch.randn(3, 64)),
        lambda: torch.mm(x, w.t(), out=torch.empty(3, 32)),
        lambda: torch.matmul(x, w.t(), out=torch.empty(3, 32)),
        lambda: torch.mm(x[None], w.t()),
        lambda: torch.mv(w, x),
    ):
        with pytest.raises(UnsupportedOpError, match="to_dense"):
            call()


def test_products_refuse_sizes_and_dtypes_that_do_not_fit() -> None:
    w = make()
    for x in (torch.randn(3, 32), torch.randn(3, 64).double()):
        with pytest.raises(RuntimeError, match=r"linear: x"):
            F.linear(x, w)


# views and copies -------------------------------------------------------------------------------------


@given(dense_and_sparse())
def test_transposing_twice_is_the_weight_again(pair: tuple[Tensor, StructuredSparseTensor]) -> None:
    dense, sparse = pair
    back = sparse.t().t()
    assert back.same_layout(sparse) and torch.equal(back, sparse)
    assert back.packed.data_ptr() == sparse.packed.data_ptr()
    for view in (
        *(sparse.T, sparse.mT, sparse.transpose(0, 1), sparse.transpose(-1, 0)),
        *(sparse.permute(1, 0), sparse.permute(-1, -2)),
        sparse.as_strided(dense.t().shape, dense.t().stride()),
    ):
        assert view.shape == dense.t().shape and view.stride() == dense.t().stride()
        assert torch.equal(view.to_dense(), dense.t())
    for same in (
        *(sparse.transpose(0, 0), sparse.permute(0, 1), sparse.detach(), sparse.view(dense.shape)),
        sparse.as_strided(dense.shape, dense.stride()),
    ):
        assert same.same_layout(sparse) and torch.equal(same, sparse)
        assert same.packed.data_ptr() == sparse.packed.data_ptr()


@given(dense_and_sparse(), st.sampled_from(DTYPES), st.booleans())
def test_conversion_commutes_with_to_dense(
    pair: tuple[Tensor, StructuredSparseTensor], dtype: torch.dtype, transposed: bool
) -> None:
    dense, sparse = (part.t() if transposed else part for part in pair)
    moved = sparse.to(dtype)
    assert moved.dtype == dtype and moved.pattern == sparse.pattern
    assert torch.equal(moved.to_dense(), dense.to(dtype))
    assert torch.equal(sparse.half().to_dense(), dense.half())
    assert sparse.to("meta", dtype).device.type == "meta"


@given(dense_and_sparse(), st.booleans())
def test_copies_are_equal_and_independent(
    pair: tuple[Tensor, StructuredSparseTensor], transposed: bool
) -> None:
    dense, sparse = (part.t() if transposed else part for part in pair)
    buffer = io.BytesIO()
    torch.save(sparse, buffer)
    buffer.seek(0)
    for twin in (
        *(sparse.clone(), copy.deepcopy(sparse), copy.copy(sparse).clone()),
        pickle.loads(pickle.dumps(sparse)),
        torch.load(buffer, weights_only=True),
    ):
        assert twin.same_layout(sparse) and torch.equal(twin, sparse)
        assert str(twin.pattern) == str(sparse.pattern)
        assert twin.packed.data_ptr() != sparse.packed.data_ptr()
    zeros, empty = torch.zeros_like(sparse), torch.empty_like(sparse, dtype=torch.float64)
    assert torch.equal(zeros.to_dense(), torch.zeros_like(dense))
    assert torch.equal(zeros.mask(), sparse.mask())
    assert (empty.shape, empty.dtype) == (dense.shape, torch.float64)
    assert zeros.copy_(sparse) is zeros and torch.equal(zeros, sparse)


@given(dense_and_sparse())
def test_equal_is_equality_of_the_dense_values(
    pair: tuple[Tensor, StructuredSparseTensor],
) -> None:
    dense, sparse = pair
    assert torch.equal(sparse, sparse.clone()) and torch.equal(sparse, dense)
    assert torch.equal(dense, sparse)
    changed = dense.clone()
    changed[sparse.mask()] += 1
    other = StructuredSparseTensor.from_dense(changed, sparse.pattern, sparse.mask())
    assert not torch.equal(sparse, other) and not torch.equal(sparse, changed)
    assert not torch.equal(sparse, torch.zeros(3, 5))


def test_one_matrix_packed_in_two_ways_is_equal() -> None:
    dense = torch.zeros(1, 4)
    left = StructuredSparseTensor.from_dense(
        dense, "2:4", torch.tensor([[True, True, False, False]])
    )
    right = StructuredSparseTensor.from_dense(
        dense, "2:4", torch.tensor([[False, False, True, True]])
    )
    assert not torch.equal(left.indices, right.indices)
    assert torch.equal(left, right)


def test_deepcopy_keeps_parameters_and_shared_weights() -> None:
    model = nn.ModuleList([nn.Linear(64, 32), nn.Linear(64, 32)])
    model[0].weight = model[1].weight = nn.Parameter(make(), requires_grad=False)
    twin = copy.deepcopy(model)
    assert twin[0].weight is twin[1].weight
    assert isinstance(twin[0].weight, nn.Parameter) and not twin[0].weight.requires_grad
    assert isinstance(twin[0].weight, StructuredSparseTensor)


def test_share_memory_shares_both_parts() -> None:
    w = make()
    assert not w.is_shared()
    assert w.share_memory_() is w and w.is_shared()
    assert w.indices.is_shared()
    nn.Linear(64, 32).share_memory()


def test_is_pinned_answers_without_a_device() -> None:
    assert make().is_pinned() is False


@pytest.mark.parametrize(
    "source",
    [
        make(shape=(32, 64)) + make(),
        make("1:4"),
        make("4:8", (48, 32)),
        make().double(),
        make().t(),
    ],
)
def test_setting_data_replaces_every_part(source: StructuredSparseTensor) -> None:
    weight = nn.Parameter(make(), requires_grad=False)
    weight.data = source
    assert isinstance(weight, nn.Parameter) and isinstance(weight, StructuredSparseTensor)
    assert weight.same_layout(source) and torch.equal(weight, source)
    assert (weight.shape, weight.stride(), weight.dtype) == (
        *(source.shape, source.stride()),
        source.dtype,
    )
    x = torch.randn(3, source.shape[1]).to(source.dtype)
    assert torch.equal(F.linear(x, weight), F.linear(x, source))


# what is refused --------------------------------------------------------------------------------------

REFUSED: dict[str, Callable[[StructuredSparseTensor], Any]] = {
    "add": lambda w: w + 1,
    "add dense": lambda w: torch.randn(32, 64) + w,
    "add other pattern": lambda w: w + make("1:4"),
    "add_": lambda w: w.add_(torch.randn(32, 64)),
    "mul": lambda w: w * w,
    "mul_": lambda w: w.mul_(2),
    "eq": lambda w: w == w,
    "sum": lambda w: w.sum(),
    "select": lambda w: w[0],
    "slice": lambda w: w[:, :4],
    "index": lambda w: w[torch.tensor([0, 1])],
    "unbind": list,
    "stack": lambda w: torch.stack([w, w]),
    "cat": lambda w: torch.cat([w, w]),
    "view": lambda w: w.view(-1),
    "view.dtype": lambda w: w.view(torch.int32),
    "unsqueeze": lambda w: w[None],
    "expand": lambda w: w.expand(2, 32, 64),
    "clone": lambda w: w.t().contiguous(),
    "as_strided": lambda w: w.as_strided((4, 4), (64, 1)),
    "as_strided offset": lambda w: w.as_strided((32, 64), (64, 1), 1),
    "_to_copy int8": lambda w: w.to(torch.int8),
    "_to_copy float8": lambda w: w.to(torch.float8_e4m3fn),
    "_to_sparse": lambda w: w.to_sparse(),
    "uniform_": nn.init.xavier_uniform_,
    "set_": lambda w: w.set_(w),
    "resize_": lambda w: w.resize_(3),
    "embedding": lambda w: F.embedding(torch.tensor([1]), w),
    "einsum": lambda w: torch.einsum("ij,kj->ik", torch.randn(3, 64), w),
    "copy_ from dense": lambda w: w.copy_(torch.randn(32, 64)),
    "copy_ to dense": lambda w: torch.empty(32, 64).copy_(w),
    "copy_ other pattern": lambda w: w.copy_(make("1:4")),
    "copy_ other orientation": lambda w: make(shape=(32, 32)).copy_(make(shape=(32, 32)).t()),
    "data": lambda w: setattr(w, "data", torch.randn(32, 64)),
    "apply_": lambda w: w.apply_(lambda v: v),  # torch's own crashes the interpreter
    "__dlpack__": lambda w: w.__dlpack__(),
    "from_dlpack": torch.from_dlpack,  # torch's own reads memory that is not there
    "from_dlpack of numpy": np.from_dlpack,
    "add_ to dense": lambda w: torch.zeros(32, 64).add_(w),
    "map_": lambda w: w.map_(w, lambda a, b: a),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_op_without_a_rule_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedOpError, match="no rule for StructuredSparseTensor") as caught:
        REFUSED[name](make())
    assert "to_dense()" in str(caught.value)


def test_the_refusal_names_op_type_and_remedy() -> None:
    with pytest.raises(UnsupportedOpError) as caught:
        make() * 2
    assert str(caught.value) == (
        "aten.mul.Tensor has no rule for StructuredSparseTensor. Call .to_dense() for a dense copy"
    )


def test_dense_data_does_not_leak_through_numpy_lists_or_storages() -> None:
    w = make()
    for call in (w.numpy, w.tolist, w.untyped_storage().tolist):
        with pytest.raises(RuntimeError):
            call()
    with pytest.raises((RuntimeError, ValueError)):  # which one depends on the version of torch
        float(w)
    with pytest.raises(UnsupportedOpError, match="_local_scalar_dense"):
        StructuredSparseTensor.from_dense(torch.ones(1, 1), "1:1").item()


# modules ----------------------------------------------------------------------------------------------


def sparse_linear(bias: bool = True) -> nn.Linear:
    linear = nn.Linear(64, 32, bias=bias)
    linear.weight = nn.Parameter(make(), requires_grad=False)
    return linear


def test_state_dict_round_trip_through_a_file_between_sparse_modules() -> None:
    source, target = sparse_linear(), sparse_linear()
    source.weight = nn.Parameter(
        StructuredSparseTensor.from_dense(torch.randn(32, 64), "2:4"), requires_grad=False
    )
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    target.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(target.weight, source.weight)
    x = torch.randn(3, 64)
    assert torch.equal(target(x), source(x))


def test_sparse_state_into_a_dense_module_does_not_densify_in_silence() -> None:
    state, dense = sparse_linear().state_dict(), nn.Linear(64, 32)
    before = dense.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"assign=True.*to_dense\(\)"):
        dense.load_state_dict(state)  # torch wraps the UnsupportedOpError
    assert torch.equal(dense.weight, before)
    dense.load_state_dict(state, assign=True)
    assert isinstance(dense.weight, StructuredSparseTensor)
    assert torch.equal(dense.weight, state["weight"])


def test_dense_state_into_a_sparse_module_is_refused_with_its_remedy() -> None:
    with pytest.raises(RuntimeError, match="from_dense"):
        sparse_linear().load_state_dict(nn.Linear(64, 32).state_dict())


@pytest.mark.parametrize("swap", [False, True])
def test_module_conversion_keeps_the_weight_compressed(swap: bool) -> None:
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        module = sparse_linear()
        dense = module.weight.to_dense()
        module.to(torch.bfloat16)
        assert isinstance(module.weight, StructuredSparseTensor)
        assert isinstance(module.weight, nn.Parameter) and not module.weight.requires_grad
        assert torch.equal(module.weight.to_dense(), dense.bfloat16())
        module.load_state_dict(module.state_dict())
        module.float()
        assert module(torch.randn(3, 64)).dtype == torch.float32
        assert module.to("meta").weight.device.type == "meta"
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def test_a_module_can_be_made_on_meta_and_filled_by_assignment() -> None:
    source = sparse_linear()
    with torch.device("meta"):
        target = nn.Linear(64, 32)
    target.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(3, 64)
    assert torch.equal(target(x), source(x))


def test_functional_call_takes_compressed_weights() -> None:
    module, x = sparse_linear(), torch.randn(3, 64)
    state = dict(module.named_parameters())
    assert torch.equal(torch.func.functional_call(nn.Linear(64, 32), state, (x,)), module(x))


def test_torch_func_transforms_see_the_dense_function() -> None:
    w = make().double()
    dense = w.to_dense()
    x = torch.randn(3, 64, dtype=torch.float64)

    def loss(weight: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda v: F.linear(v, weight).square().sum()

    func = torch.func
    torch.testing.assert_close(func.grad(loss(w))(x), func.grad(loss(dense))(x))
    torch.testing.assert_close(func.jacrev(lambda v: w @ v)(x[0]), dense)
    torch.testing.assert_close(func.jacfwd(lambda v: w @ v)(x[0]), dense)
    torch.testing.assert_close(func.hessian(loss(w))(x[0]), func.hessian(loss(dense))(x[0]))
    torch.testing.assert_close(torch.vmap(func.grad(loss(w)))(x), func.grad(loss(dense))(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_the_dtype_of_its_context(dtype: torch.dtype) -> None:
    module = sparse_linear()
    x = torch.randn(2, 3, 64)
    with torch.autocast("cpu", dtype=dtype):
        outputs = module(x), x @ module.weight.t() + module.bias.to(dtype)
    dense = F.linear(x.to(dtype), module.weight.to_dense().to(dtype), module.bias.to(dtype))
    assert outputs[0].dtype == outputs[1].dtype == dtype
    assert torch.equal(outputs[0], dense)
    with torch.autocast("cpu", dtype=dtype):
        assert module.double()(x.double()).dtype == torch.float64  # as F.linear does


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_products_do_not_depend_on_the_grad_mode(mode: Callable[[], Any]) -> None:
    w, x = make(), torch.randn(3, 2, 64).transpose(0, 1)
    expected = F.linear(x, w.to_dense()).contiguous()
    with mode():
        assert torch.equal(F.linear(x, w), expected)
        inner = StructuredSparseTensor.from_dense(w.to_dense(), "2:4")
        assert torch.equal(F.linear(x, inner), expected)


def test_a_transformer_layer_runs_on_compressed_weights() -> None:
    """Python-level composites that bypass F.linear's own hook, such as multi_head_attention_forward."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    for linear in (layer.linear1, layer.linear2, layer.self_attn.out_proj):
        compressed = StructuredSparseTensor.from_dense(linear.weight, "2:4")
        linear.weight = nn.Parameter(compressed, requires_grad=False)
    reference = copy.deepcopy(layer)
    for linear in (reference.linear1, reference.linear2, reference.self_attn.out_proj):
        linear.weight = nn.Parameter(linear.weight.to_dense())
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(layer(x), reference(x))
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), reference(x))


def test_conv1d_of_transformers_runs_on_a_transposed_weight() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(32, 64)
    dense = make().to_dense()
    conv1d.weight = nn.Parameter(make().t(), requires_grad=False)
    x = torch.randn(2, 5, 64)
    torch.testing.assert_close(conv1d(x), F.linear(x, dense, conv1d.bias))


def test_a_weight_of_four_dims_packs_but_does_not_transpose() -> None:
    weight = torch.randn(4, 2, 3, 3)
    w = StructuredSparseTensor.from_dense(weight, "block=1,1,1,1; scope=-1,1,1,1; keep=2")
    assert torch.equal(w.to_dense(), weight * w.mask())
    assert w.transpose(1, 1).same_layout(w)
    for call in (lambda: w.transpose(0, 1), lambda: w.permute(1, 0, 2, 3)):
        with pytest.raises(UnsupportedOpError, match="4 dims"):
            call()


# CUDA -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:a compressed weight is unpacked")
@pytest.mark.parametrize("pattern", UNITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_agrees_with_the_cpu(pattern: str, dtype: torch.dtype) -> None:
    dense = torch.randn(32, 64, dtype=torch.float64).to(dtype)
    on_cpu = StructuredSparseTensor.from_dense(dense, pattern)
    on_cuda = StructuredSparseTensor.from_dense(dense.cuda(), pattern)
    assert on_cuda.device.type == "cuda" and on_cuda.indices.is_cuda
    assert torch.equal(on_cuda.cpu(), on_cpu) and torch.equal(on_cpu.cuda(), on_cuda)
    assert torch.equal(on_cuda.to_dense().cpu(), on_cpu.to_dense())
    x, bias = torch.randn(2, 3, 64).to(dtype).cuda(), torch.randn(32).to(dtype).cuda()
    assert_product(F.linear(x, on_cuda, bias), x, on_cuda.to_dense(), bias)
    assert_product((on_cuda @ x.mT).mT, x, on_cuda.to_dense())


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:a compressed weight is unpacked")
def test_modules_move_to_cuda_and_back() -> None:
    module = sparse_linear()
    dense = module.weight.to_dense()
    assert module.weight.pin_memory().is_pinned()
    module.cuda()
    assert isinstance(module.weight, StructuredSparseTensor) and module.weight.packed.is_cuda
    module(torch.randn(3, 64, device="cuda")).sum().backward()
    with torch.autocast("cuda", dtype=torch.float16):
        assert module(torch.randn(3, 64, device="cuda")).dtype == torch.float16
    module.to("cpu", torch.bfloat16)
    assert torch.equal(module.weight.to_dense(), dense.bfloat16())


def test_a_permutation_names_each_dim_once() -> None:
    w = make()
    for dims in ((0, 1), (1, 0), (-1, -2), (-2, 1)):
        assert torch.equal(w.permute(*dims).to_dense(), w.to_dense().permute(*dims))
    assert torch.equal(w.transpose(-1, 0).to_dense(), w.to_dense().t())
    for wrong in ((0, 0), (0,), (1, -1)):
        with pytest.raises(RuntimeError, match="once"):
            w.permute(*wrong)
    for call in (
        lambda: w.transpose(0, 7), lambda: w.transpose(-3, 0), lambda: w.permute(2, 0),
        lambda: w.swapaxes(0, 2),
    ):  # fmt: skip
        with pytest.raises(IndexError, match="out of range"):
            call()
