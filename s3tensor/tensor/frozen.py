"""The product that a compiled model makes with a weight that does not train.

A tensor subclass among the inputs of a compiled graph is taken apart on each call, and an operator of
``torch.library.custom_op`` passes three layers of Python: together 25 us a weight, where a dense one costs 4.
So ``s3tensor::frozen_linear`` takes the packed parts, which Dynamo reads off the weight. Below Dynamo it
becomes ``s3tensor::linear_inference``, which knows no autograd and costs one call of Python; gradients and
tangents of x and of the bias are products of the same kind.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from s3tensor.mask.packing import unpack
from s3tensor.pattern import BoundPattern, bind
from s3tensor.tensor import int8_values
from s3tensor.tensor.base import Compressed
from s3tensor.tensor.linear import check, multiply
from s3tensor.tensor.weight import Weight

_TILED, _TRANSPOSED = ", tiled", ", transposed"


def frozen_linear(
    x: Tensor,  # (..., in_features)
    packed: Tensor,  # (scopes, keep, block_size)
    indices: Tensor,  # (index_bytes,) uint8
    scales: Tensor | None,  # (rows,) float32, of int8 values
    bias: Tensor | None,  # (out_features,)
    weight: str,
) -> Tensor:  # (..., out_features), contiguous
    """``F.linear(x, weight, bias)`` of a weight without a gradient.

    Args:
        weight: the pattern, the shape as packed and the order: ``Compressed.traced_as``.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not belong together, as ``F.linear`` does.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return _under_a_transform(x, _weight(x, packed, indices, scales, weight), bias)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        found: Tensor = _Frozen.apply(x, packed, indices, scales, bias, weight)
        return found
    out: Tensor = torch.ops.s3tensor.linear_inference(x, packed, indices, scales, bias, weight)
    return out


def linear_inference(
    x: Tensor,
    packed: Tensor,
    indices: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    weight: str,
) -> Tensor:
    """:func:`frozen_linear` where nothing has a gradient."""
    return multiply(x, _weight(x, packed, indices, scales, weight), bias)


def _fake(
    x: Tensor,
    packed: Tensor,
    indices: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    weight: str,
) -> Tensor:
    given = _weight(x, packed, indices, scales, weight)
    check(x, given, bias)
    return x.new_empty(*x.shape[:-1], given.features[0])


def _under_a_transform(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """The product by a scratch of the dense weight, which any transform of ``torch.func`` takes."""
    if weight.scales is None:
        dense = unpack(weight.packed, weight.indices, weight.bound, weight.tiled)
    else:
        dense = int8_values.dense_of(weight, x.dtype)
    return F.linear(x, dense.t() if weight.transposed else dense, bias)


class _Frozen(torch.autograd.Function):
    """:func:`frozen_linear` with its derivatives by x and by the bias."""

    @staticmethod
    def forward(
        x: Tensor,
        packed: Tensor,
        indices: Tensor,
        scales: Tensor | None,
        bias: Tensor | None,
        weight: str,
    ) -> Tensor:
        out: Tensor = torch.ops.s3tensor.linear_inference(x, packed, indices, scales, bias, weight)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, packed, indices, scales, _, ctx.weight = inputs
        ctx.save_for_backward(packed, indices, scales)
        ctx.save_for_forward(packed, indices, scales)
        ctx.set_materialize_grads(False)  # a None tangent tells what is not differentiated

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        of_x = of_bias = None
        if grad is not None and ctx.needs_input_grad[0]:
            turned = _turned(ctx.weight)
            of_x = torch.ops.s3tensor.frozen_linear(grad, *ctx.saved_tensors, None, turned)
        if grad is not None and ctx.needs_input_grad[4]:
            of_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return of_x, None, None, None, of_bias, None

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, *others: Any) -> Tensor | None:
        bias = others[3]
        if x is None:
            return bias
        out: Tensor = torch.ops.s3tensor.frozen_linear(x, *ctx.saved_tensors, bias, ctx.weight)
        return out

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        _map_over_x(in_dims)
        out: Tensor = torch.ops.s3tensor.frozen_linear(args[0].movedim(in_dims[0], 0), *args[1:])
        return out, 0


def _turned(text: str) -> str:
    return text.removesuffix(_TRANSPOSED) if text.endswith(_TRANSPOSED) else text + _TRANSPOSED


def _map_over_x(in_dims: tuple[Any, ...]) -> None:
    if any(dim is not None for dim in in_dims[1:]):
        raise NotImplementedError(
            "s3tensor::frozen_linear can be mapped over x only; loop over weights and biases"
        )


def _mapped(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
    _map_over_x(in_dims)
    return torch.ops.s3tensor.linear_inference(args[0].movedim(in_dims[0], 0), *args[1:]), 0


_ARGUMENTS = (
    "(Tensor x, Tensor packed, Tensor indices, Tensor? scales, Tensor? bias, str weight) -> Tensor"
)
_LIBRARY = torch.library.Library("s3tensor", "FRAGMENT")
for _name in ("frozen_linear", "linear_inference"):
    _LIBRARY.define(_name + _ARGUMENTS, tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("frozen_linear", frozen_linear, "CompositeImplicitAutograd")
_LIBRARY.impl("linear_inference", linear_inference, "CompositeExplicitAutograd")
torch.library.register_fake("s3tensor::linear_inference", _fake, lib=_LIBRARY)
torch.library.register_vmap("s3tensor::linear_inference", _mapped, lib=_LIBRARY)


LINEAR_INFERENCE = torch.ops.s3tensor.linear_inference.default


def _weight(x: Tensor, packed: Tensor, indices: Tensor, scales: Tensor | None, text: str) -> Weight:
    bound, tiled, transposed = read_facts(text)
    kind = None if scales is None else x.dtype
    return Weight(
        packed, indices, bound, tiled=tiled, transposed=transposed, scales=scales, computed_in=kind
    )


@functools.lru_cache(maxsize=1024)
def read_facts(text: str) -> tuple[BoundPattern, bool, bool]:
    """(pattern on its shape, tiled, transposed) of what ``Compressed.traced_as`` says."""
    transposed = text.endswith(_TRANSPOSED)
    text = text.removesuffix(_TRANSPOSED)
    tiled = text.endswith(_TILED)
    pattern, _, shape = text.removesuffix(_TILED).rpartition(" on ")
    return bind(pattern, [int(size) for size in shape.split("x")]), tiled, transposed


# Dynamo of older torch (tried: 2.11) says of every trace that it exports, and cannot see transforms.
_DYNAMO_TELLS = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 13)


def traces(x: Tensor, weight: Tensor) -> bool:
    """Whether Dynamo traces a product that :func:`frozen_linear` can stand for; constant while it traces."""
    if not torch.compiler.is_dynamo_compiling() or not isinstance(weight, Compressed):
        return False
    if not weight.traced_as or weight.requires_grad or torch.is_autocast_enabled(x.device.type):
        return False
    if _DYNAMO_TELLS:
        transforms = torch._C._functorch.get_dynamic_layer_stack_depth()
        return transforms == 0 and not torch.compiler.is_exporting()
    return True
