"""The custom ops: schema, fake, reference and autograd agree, for every pattern."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import s3tensor as s3
from s3tensor.errors import PatternError
from s3tensor.mask.packing import pack, unpack, unpack_mask
from s3tensor.tensor import linear as paths
from s3tensor.tensor import ops

SHAPES = {
    "2:4": (8, 16),
    "1:4": (8, 16),
    "4:8": (8, 16),
    "pair4:8": (8, 16),
    "coupled2:4": (8, 32),
    "rowpair16": (16, 32),
    "block:4x4@0.5": (8, 16),
    "unstructured@0.3": (8, 20),
    "4:4": (8, 16),  # all kept: an empty index stream
    "block=1,2; scope=2,2; keep=1": (8, 16),  # no short name
}
every_pattern = pytest.mark.parametrize("pattern", SHAPES)


def packed(pattern: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """(dense with zeros, packed values, indices) of a random weight."""
    weight = torch.randn(SHAPES[pattern], generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = s3.project(weight, pattern)
    values, indices = pack(weight, mask, s3.Pattern.parse(pattern).bind(weight.shape))
    return torch.where(mask, weight, 0), values, indices


@every_pattern
def test_project_and_pack_obey_the_contract_of_an_op(pattern: str) -> None:
    weight = torch.randn(SHAPES[pattern])
    mask = s3.project(weight, pattern)
    torch.library.opcheck(ops.project, (weight, pattern))
    torch.library.opcheck(ops.pack, (weight, mask, pattern))
    torch.library.opcheck(ops.pack, (weight.requires_grad_(), mask, pattern))


@every_pattern
def test_unpack_and_gather_obey_the_contract_of_an_op(pattern: str) -> None:
    dense, values, indices = packed(pattern)
    shape = list(dense.shape)
    torch.library.opcheck(ops.unpack, (values.requires_grad_(), indices, pattern, shape))
    torch.library.opcheck(ops.gather, (dense.requires_grad_(), indices, pattern))


@every_pattern
def test_add_packed_obeys_the_contract_of_an_op(pattern: str) -> None:
    _, values, indices = packed(pattern)
    arguments = (values, indices, torch.ones_like(values), indices.clone(), 0.5)
    torch.library.opcheck(ops.add_packed, arguments)
    assert torch.equal(ops.add_packed(*arguments), values + 0.5)


@every_pattern
@pytest.mark.parametrize("transposed", [False, True])
def test_linear_obeys_the_contract_of_an_op(pattern: str, transposed: bool) -> None:
    dense, values, indices = packed(pattern)
    rows, columns = dense.shape[::-1] if transposed else dense.shape
    x = torch.randn(2, 3, columns).transpose(0, 1).requires_grad_()
    bias = torch.randn(rows, requires_grad=True)
    shape = list(dense.shape)
    torch.library.opcheck(ops.linear, (x, values, indices, bias, pattern, shape, transposed))
    values.requires_grad_()
    torch.library.opcheck(ops.linear, (x[0], values, indices, None, pattern, shape, transposed))


def test_weight_linear_of_a_plain_weight_obeys_the_contract_of_an_op() -> None:
    x, weight = torch.randn(3, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    bias = torch.randn(8, requires_grad=True)
    torch.library.opcheck(ops.weight_linear, (x, weight, bias))
    torch.library.opcheck(ops.weight_linear, (x[0], weight, None))
    torch.library.opcheck(ops.weight_linear_grad, (torch.randn(3, 8), x.detach(), weight.detach()))


@every_pattern
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_linear_rounds_as_the_dense_layer(pattern: str, dtype: torch.dtype) -> None:
    dense, values, indices = packed(pattern, dtype)
    x = torch.randn(5, dense.shape[1]).to(dtype)
    bias = torch.randn(dense.shape[0]).to(dtype)
    y = ops.linear(x, values, indices, bias, pattern, list(dense.shape), False)
    assert torch.equal(y, F.linear(x, dense, bias))
    y = ops.linear(
        x[:, :1].expand(5, len(dense)), values, indices, None, pattern, dense.shape, True
    )
    assert torch.equal(y, F.linear(x[:, :1].expand(5, len(dense)), dense.t()))


@every_pattern
def test_gather_is_the_adjoint_of_unpack(pattern: str) -> None:
    """<unpack(p), d> == <p, gather(d)>, so that each is the other's backward."""
    _, values, indices = packed(pattern, torch.float64)
    dense = torch.randn(SHAPES[pattern], dtype=torch.float64)
    left = (ops.unpack(values, indices, pattern, list(dense.shape)) * dense).sum()
    right = (values * ops.gather(dense, indices, pattern)).sum()
    torch.testing.assert_close(left, right)


@every_pattern
def test_gradients_match_finite_differences(pattern: str) -> None:
    dense, values, indices = packed(pattern, torch.float64)
    shape = list(dense.shape)
    bias = torch.randn(shape[0], dtype=torch.float64, requires_grad=True)
    values.requires_grad_()
    for transposed in (False, True):
        x = torch.randn(2, shape[0 if transposed else 1], dtype=torch.float64, requires_grad=True)
        b = None if transposed else bias
        assert torch.autograd.gradcheck(
            lambda x, v, b=b, t=transposed: ops.linear(x, v, indices, b, pattern, shape, t),
            (x, values),
            fast_mode=True,
        )
    # Double backward by x: the backward is made of the same ops.
    assert torch.autograd.gradgradcheck(
        lambda x: ops.linear(x, values.detach(), indices, bias, pattern, shape, False).square(),
        (torch.randn(2, shape[1], dtype=torch.float64, requires_grad=True),),
        fast_mode=True,
    )


@every_pattern
def test_gradient_of_pack_is_the_masked_gradient(pattern: str) -> None:
    weight = torch.randn(SHAPES[pattern], dtype=torch.float64, requires_grad=True)
    mask = s3.project(weight, pattern)
    values, indices = ops.pack(weight, mask, pattern)
    upstream = torch.randn_like(weight)
    (ops.unpack(values, indices, pattern, list(weight.shape)) * upstream).sum().backward()
    assert torch.equal(weight.grad, torch.where(mask, upstream, 0))
    bound = s3.Pattern.parse(pattern).bind(weight.shape)
    assert torch.equal(unpack_mask(indices, bound), mask)


def test_linear_maps_over_x() -> None:
    dense, values, indices = packed("2:4")
    x = torch.randn(3, 16, 4)
    mapped = torch.vmap(
        lambda v: ops.linear(v, values, indices, None, "2:4", [8, 16], False), in_dims=2
    )
    torch.testing.assert_close(mapped(x), F.linear(x.movedim(2, 0), dense))
    with pytest.raises(NotImplementedError, match="over x only"):
        torch.vmap(lambda b: ops.linear(x[..., 0], values, indices, b, "2:4", [8, 16], False))(
            torch.randn(2, 8)
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(3, 12)}, "in_features 16"),
        ({"x": torch.tensor(1.0)}, "in_features 16"),
        ({"x": torch.randn(3, 16, dtype=torch.float64)}, "convert one with .to"),
        ({"bias": torch.randn(7)}, "for 8 torch.float32 outputs"),
        ({"bias": torch.randn(8, dtype=torch.float64)}, "for 8 torch.float32 outputs"),
        ({"packed": torch.randn(8, 2, 1)}, "packed values of shape"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_linear_refuses_what_does_not_belong_together(
    change: dict[str, Tensor], message: str, device: str
) -> None:
    """The reference and the fake refuse alike, so that a compiled graph fails while it is traced."""
    _, values, indices = packed("2:4")
    arguments = {"x": torch.randn(3, 16), "packed": values, "indices": indices, "bias": None}
    arguments |= change
    tensors = {k: v if v is None else v.to(device) for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match=message):
        ops.linear(**tensors, pattern="2:4", shape=[8, 16], transposed=False)


def test_linear_refuses_a_weight_of_four_dims() -> None:
    pattern = "block=1,1,1,1; scope=-1,1,1,1; keep=1"
    weight = torch.randn(4, 2, 3, 3)
    values, indices = ops.pack(weight, s3.project(weight, pattern), pattern)
    with pytest.raises(RuntimeError, match="2 dims"):
        ops.linear(torch.randn(1, 3), values, indices, None, pattern, [4, 2, 3, 3], False)


def test_pack_refuses_nan_and_masks_over_the_budget() -> None:
    weight = torch.randn(8, 16)
    with pytest.raises(s3.PatternError, match="at most 2"):
        ops.pack(weight, torch.ones(8, 16, dtype=torch.bool), "2:4")
    weight[3, 5] = float("nan")
    with pytest.raises(s3.NonFiniteError, match="NaN"):
        ops.pack(weight, torch.zeros(8, 16, dtype=torch.bool), "2:4")


@pytest.mark.gpu
@every_pattern
def test_scratch_on_cuda_agrees_with_the_cpu_and_warns_once(pattern: str) -> None:
    paths._warn_scratch.cache_clear()
    dense, values, indices = packed(pattern, torch.float64)
    x = torch.randn(5, dense.shape[1], dtype=torch.float64)
    shape = list(dense.shape)
    arguments = (x.cuda(), values.cuda(), indices.cuda(), None, pattern, shape, False)
    with pytest.warns(UserWarning, match="no kernel for .*set_memory_"):
        y = ops.linear(*arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.linear(*arguments)
    assert torch.equal(ops.unpack(values.cuda(), indices.cuda(), pattern, shape).cpu(), dense)
    torch.testing.assert_close(y.cpu(), F.linear(x, dense))  # float64: another order of sums


# devices ----------------------------------------------------------------------------------------------


def _calls_with_one_tensor_on_meta() -> dict[str, Callable[[], object]]:
    dense, x, s3ops = torch.randn(8, 16), torch.randn(3, 16), torch.ops.s3tensor
    mask = s3.project(dense, "2:4")
    values, indices = ops.pack(dense, mask, "2:4")
    meta = {"device": "meta"}
    weight = s3.StructuredSparseTensor.from_dense(dense, "2:4")
    int8 = s3.Int8SparseTensor.from_sparse(weight)
    stored = None, "2:4", [8, 16], False
    return {
        "from_dense": lambda: s3.StructuredSparseTensor.from_dense(dense, "2:4", mask.to(**meta)),
        "pack": lambda: ops.pack(dense.to(**meta), mask, "2:4"),
        "gather": lambda: ops.gather(dense, indices.to(**meta), "2:4"),
        "unpack": lambda: ops.unpack(values, indices.to(**meta), "2:4", [8, 16]),
        "unpack_blocks": lambda: unpack(values, indices.to(**meta), weight.bound),
        "add": lambda: weight + weight.to("meta"),
        "linear": lambda: ops.linear(x, values, indices.to(**meta), *stored),
        "linear_dense": lambda: ops.linear(x, values, indices, *stored, False, dense.to(**meta)),
        "linear_int8": lambda: ops.linear_int8(
            x, int8.packed, int8.indices.to(**meta), int8.scales, *stored
        ),
        "linear_group": lambda: s3ops.linear_group(
            x, [values], [indices.to(**meta)], "2:4", [8], False
        ),
        "weight_linear": lambda: s3ops.weight_linear(x, dense.to(**meta), None),
        "weight_linear_grad": lambda: s3ops.weight_linear_grad(x[:, :8], x.to(**meta), dense),
    }


@pytest.mark.parametrize("name", _calls_with_one_tensor_on_meta())
def test_one_tensor_on_meta_is_refused_and_makes_no_result_of_uninitialised_memory(
    name: str,
) -> None:
    with pytest.raises(PatternError, match="move them to one device"):
        _calls_with_one_tensor_on_meta()[name]()
