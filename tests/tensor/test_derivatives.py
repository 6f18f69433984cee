"""Derivatives by x and by a compressed weight, in every way torch has: packed, right, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, func, nn
from torch.autograd import forward_ad

from s3tensor.errors import UnsupportedOpError
from s3tensor.tensor import Int8SparseTensor, StructuredSparseTensor

PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": F.linear,
    "linear of sin": lambda x, w: F.linear(x.sin(), w).sin(),
    "mm": lambda x, w: torch.mm(x, w.t()),
    "matmul of three dims": lambda x, w: x[None] @ w.t(),
    "bias": lambda x, w: F.linear(x, w, x[0, :32]),
    "bias alone": lambda x, w: F.linear(torch.ones(3, 64, dtype=x.dtype), w, x[0, :32]),
}
every_product = pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)


TRANSFORMS: list[Callable[..., object]] = [
    lambda w, loss: func.grad(loss)(w),
    lambda w, loss: func.jacrev(loss)(w),
    lambda w, loss: func.vjp(loss, w),
]


def weight() -> StructuredSparseTensor:
    dense = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    return StructuredSparseTensor.from_dense(dense, "2:4")


def weights() -> dict[str, Tensor]:
    return {"frozen": weight(), "int8": Int8SparseTensor.from_sparse(weight())}


@every_product
@pytest.mark.parametrize("kind", ["frozen", "trained", "int8"])
def test_forward_mode_has_the_tangent_of_the_dense_weight(
    product: Callable[[Tensor, Tensor], Tensor], kind: str
) -> None:
    w = nn.Parameter(weight()) if kind == "trained" else weights()[kind]
    dense = w.detach().to_dense()
    x, v = torch.randn(3, 64), torch.randn(3, 64)
    expected = func.jvp(lambda a: product(a, dense), (x,), (v,))[1]
    torch.testing.assert_close(func.jvp(lambda a: product(a, w), (x,), (v,))[1], expected)
    torch.testing.assert_close(func.linearize(lambda a: product(a, w), x)[1](v), expected)
    with forward_ad.dual_level():
        dual = product(forward_ad.make_dual(x, v), w)
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            dual = product(forward_ad.make_dual(x, v), w)
        tangent = forward_ad.unpack_dual(dual).tangent
        assert tangent is not None
        torch.testing.assert_close(tangent.float(), expected, atol=0.2, rtol=0.1)


@every_product
@pytest.mark.parametrize("kind", ["frozen", "int8"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func_by_a_compressed_weight_is_refused(
    product: Callable[[Tensor, Tensor], Tensor], kind: str, transform: Callable[..., object]
) -> None:
    w, x = weights()[kind], torch.randn(3, 64)

    def loss(held: dict[str, Tensor]) -> Tensor:
        return product(x, held["w"]).square().sum()

    with pytest.raises(UnsupportedOpError, match=r"torch\.autograd\.grad"):
        transform({"w": w}, loss)
    with pytest.raises(UnsupportedOpError, match=r"torch\.autograd\.grad"):
        torch.vmap(func.grad(lambda v, a: product(a, v).sum()), (None, 0))(w, x[:, None])


@pytest.mark.parametrize("kind", ["frozen", "int8"])
def test_torch_func_passes_a_compressed_weight_on_that_it_does_not_differentiate_by(
    kind: str,
) -> None:
    w, x = weights()[kind], torch.randn(3, 64)

    def loss(v: Tensor, a: Tensor) -> Tensor:
        return F.linear(a, v).square().sum()

    expected = func.grad(loss, argnums=1)(w.to_dense(), x)
    torch.testing.assert_close(func.grad(loss, argnums=1)(w, x), expected)
    torch.testing.assert_close(func.jacrev(loss, argnums=1)(w, x), expected)


def test_a_composite_that_torch_runs_by_itself_gives_a_packed_gradient() -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(32, 4, batch_first=True)
    dense, x = copy.deepcopy(layer), torch.randn(2, 5, 32)
    w = StructuredSparseTensor.from_dense(layer.out_proj.weight, "2:4")
    layer.out_proj.weight = nn.Parameter(w)
    dense.out_proj.weight = nn.Parameter(w.to_dense())
    for attention in (layer, dense, layer, dense):
        attention(x, x, x)[0].square().sum().backward()
    grad, expected = layer.out_proj.weight.grad, dense.out_proj.weight.grad
    assert isinstance(grad, StructuredSparseTensor) and grad.same_layout(w) and expected is not None
    torch.testing.assert_close(grad.to_dense(), expected * w.mask())


def test_forward_mode_by_a_compressed_weight_is_refused() -> None:
    w, x = weight(), torch.randn(3, 64)
    with pytest.raises(UnsupportedOpError, match="by x and bias"):
        func.jvp(lambda v: F.linear(x, v), (w,), (w,))
