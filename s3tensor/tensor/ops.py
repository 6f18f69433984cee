"""Custom operators: what a compiled graph holds in place of a dense weight.

The ops of the first group take plain tensors, ints and strings. The pattern travels as its string
(``2:4``), which keeps a graph readable and is parsed once; ``shape`` is the shape the pattern is bound
to. What they compute is in :mod:`s3tensor.mask` and, for ``linear`` and ``linear_int8``, in
:mod:`s3tensor.tensor.linear`.

``weight_linear`` and ``weight_linear_grad`` are what Python code calls with a compressed weight. They
take the tensor subclass and compute nothing: a compressed tensor turns them into ``linear`` and
``gather`` over its inner tensors, below autograd and autocast. This takes a single op that nothing
decomposes: ``aten.linear`` and ``aten.matmul`` break up, for 3-D inputs, before they reach
``__torch_dispatch__``. And an op over Triton kernels must see plain tensors (pytorch#160333).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from s3tensor.errors import NonFiniteError, PatternError
from s3tensor.mask.packing import check_devices
from s3tensor.mask.packing import gather as gather_blocks
from s3tensor.mask.packing import pack as pack_blocks
from s3tensor.mask.packing import unpack as unpack_blocks
from s3tensor.mask.projection import project as project_mask
from s3tensor.pattern import BoundPattern, bind
from s3tensor.tensor.base import Compressed
from s3tensor.tensor.linear import check, multiply, multiply_group
from s3tensor.tensor.weight import Weight

# project: which weights to keep -----------------------------------------------------------------------


@torch.library.custom_op(
    "s3tensor::project", mutates_args=(), schema="(Tensor weight, str pattern) -> Tensor"
)
def project(weight: Tensor, pattern: str) -> Tensor:
    """Mask of the weights to keep by magnitude, as :func:`s3tensor.project`; bool, the weight's shape."""
    return project_mask(weight, pattern)


@project.register_fake
def _(weight: Tensor, pattern: str) -> Tensor:
    bind(pattern, weight.shape)
    return torch.empty(weight.shape, dtype=torch.bool, device=weight.device)


# pack, unpack, gather: between dense and packed -------------------------------------------------------


@torch.library.custom_op(
    "s3tensor::pack",
    mutates_args=(),
    schema="(Tensor weight, Tensor mask, str pattern) -> (Tensor, Tensor)",
)
def pack(weight: Tensor, mask: Tensor, pattern: str) -> tuple[Tensor, Tensor]:
    """``(packed, indices)`` of ``weight * mask``, as :func:`s3tensor.mask.packing.pack`.

    Raises:
        PatternError: a mask that does not fit the pattern.
        NonFiniteError: NaN or Inf in the weight.
    """
    bound = bind(pattern, weight.shape)
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteError(
            f"the weight of shape {bound.shape} holds NaN or Inf; repair it before it is compressed"
        )
    return pack_blocks(weight, mask, bound)


@pack.register_fake
def _(weight: Tensor, mask: Tensor, pattern: str) -> tuple[Tensor, Tensor]:
    check_devices(weight, mask)
    return _empty_packed(weight, bind(pattern, weight.shape))


def _empty_packed(like: Tensor, bound: BoundPattern) -> tuple[Tensor, Tensor]:
    values = torch.empty(bound.packed_shape, dtype=like.dtype, device=like.device)
    return values, torch.empty(bound.index_bytes, dtype=torch.uint8, device=like.device)


@torch.library.custom_op(
    "s3tensor::unpack",
    mutates_args=(),
    schema="(Tensor packed, Tensor indices, str pattern, SymInt[] shape, bool tiled=False) -> Tensor",
)
def unpack(
    packed: Tensor, indices: Tensor, pattern: str, shape: Sequence[int], tiled: bool = False
) -> Tensor:
    """The dense, contiguous weight of ``shape``; ``tiled`` parts are in tile order."""
    return unpack_blocks(packed, indices, bind(pattern, shape), tiled).contiguous()


@unpack.register_fake
def _(
    packed: Tensor, indices: Tensor, pattern: str, shape: Sequence[int], tiled: bool = False
) -> Tensor:
    check_devices(packed, indices)
    bound = bind(pattern, shape)
    return torch.empty(bound.shape, dtype=packed.dtype, device=packed.device)


@torch.library.custom_op(
    "s3tensor::gather",
    mutates_args=(),
    schema="(Tensor dense, Tensor indices, str pattern, bool tiled=False) -> Tensor",
)
def gather(dense: Tensor, indices: Tensor, pattern: str, tiled: bool = False) -> Tensor:
    """The packed values of ``dense`` at the blocks that ``indices`` record: the adjoint of unpack."""
    return gather_blocks(dense, indices, bind(pattern, dense.shape), tiled)


@gather.register_fake
def _(dense: Tensor, indices: Tensor, pattern: str, tiled: bool = False) -> Tensor:
    check_devices(dense, indices)
    return _empty_packed(dense, bind(pattern, dense.shape))[0]


@torch.library.custom_op(
    "s3tensor::add_packed",
    mutates_args=(),
    schema="(Tensor packed, Tensor indices, Tensor other, Tensor other_indices, Scalar alpha) -> Tensor",
)
def add_packed(
    packed: Tensor, indices: Tensor, other: Tensor, other_indices: Tensor, alpha: float
) -> Tensor:
    """``packed + alpha * other`` for two weights that keep the same blocks: what sums their gradients.

    An op, and not an addition, because whether the positions are equal is not known while tracing.

    Raises:
        PatternError: positions that differ, whose sum need not satisfy the pattern.
    """
    if not torch.equal(indices, other_indices):
        raise PatternError(
            "the sum of two compressed weights that keep different blocks need not satisfy their "
            "pattern; add .to_dense() of both and project the sum"
        )
    return torch.add(packed, other, alpha=alpha)


@add_packed.register_fake
def _(
    packed: Tensor, indices: Tensor, other: Tensor, other_indices: Tensor, alpha: float
) -> Tensor:
    check_devices(packed, indices, other, other_indices)
    return torch.empty_like(packed)


def _save_pack(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    weight, _, ctx.pattern = inputs
    ctx.shape = [int(n) for n in weight.shape]
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)


def _pack_backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    (indices,) = ctx.saved_tensors
    return None if grad is None else unpack(grad, indices, ctx.pattern, ctx.shape), None, None


def _save_unpack(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, indices, ctx.pattern, _, ctx.tiled = inputs
    ctx.save_for_backward(indices)


def _unpack_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (indices,) = ctx.saved_tensors
    return gather(grad, indices, ctx.pattern, ctx.tiled), None, None, None, None


def _save_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dense, indices, ctx.pattern, ctx.tiled = inputs
    ctx.shape = [int(n) for n in dense.shape]
    ctx.save_for_backward(indices)


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (indices,) = ctx.saved_tensors
    return unpack(grad, indices, ctx.pattern, ctx.shape, ctx.tiled), None, None, None


pack.register_autograd(_pack_backward, setup_context=_save_pack)
unpack.register_autograd(_unpack_backward, setup_context=_save_unpack)
gather.register_autograd(_gather_backward, setup_context=_save_gather)


# linear: x times a packed weight ----------------------------------------------------------------------


@torch.library.custom_op(
    "s3tensor::linear",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor packed, Tensor indices, Tensor? bias, str pattern, SymInt[] shape, "
        "bool transposed, bool tiled=False, Tensor? dense=None, Tensor? vendor=None) -> Tensor"
    ),
)
def linear(
    x: Tensor,  # (..., in_features)
    packed: Tensor,  # (scopes, keep, block_size)
    indices: Tensor,  # (index_bytes,) uint8
    bias: Tensor | None,  # (out_features,)
    pattern: str,
    shape: Sequence[int],
    transposed: bool,
    tiled: bool = False,
    dense: Tensor | None = None,  # shape
    vendor: Tensor | None = None,
) -> Tensor:  # (..., out_features), contiguous
    """``F.linear(x, weight, bias)`` with ``weight = unpack(packed, indices)``, or its transpose.

    On a CPU it unpacks to a scratch, or takes the dense copy if there is one, and calls ``F.linear``: it
    rounds as the dense layer does. On a CUDA device :mod:`s3tensor.tensor.linear` picks the fastest path.

    Args:
        shape: the stored shape, (out_features, in_features), or its reverse when ``transposed`` is set.
        tiled: packed and indices are in tile order (:mod:`s3tensor.kernels.tiles`).
        dense: a dense copy of the weight, kept for speed.
        vendor: cuSPARSELt's compressed copy, kept for speed.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not belong together, as ``F.linear`` does.
    """
    weight = Weight(
        packed,
        indices,
        bind(pattern, shape),
        tiled=tiled,
        transposed=transposed,
        dense=dense,
        vendor=vendor,
    )
    return multiply(x, weight, bias)


@linear.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    pattern: str,
    shape: Sequence[int],
    transposed: bool,
    tiled: bool = False,
    dense: Tensor | None = None,
    vendor: Tensor | None = None,
) -> Tensor:
    weight = Weight(packed, indices, bind(pattern, shape), transposed=transposed)
    check(x, weight, bias)
    check_devices(packed, indices, dense, vendor)
    return x.new_empty(*x.shape[:-1], weight.features[0])


@torch.library.custom_op(
    "s3tensor::linear_int8",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor packed, Tensor indices, Tensor scales, Tensor? bias, str pattern, "
        "SymInt[] shape, bool transposed=False, bool tiled=False) -> Tensor"
    ),
)
def linear_int8(
    x: Tensor,  # (..., in_features)
    packed: Tensor,  # (scopes, keep, block_size) int8
    indices: Tensor,  # (index_bytes,) uint8
    scales: Tensor,  # (shape[0],) float32
    bias: Tensor | None,  # (out_features,)
    pattern: str,
    shape: Sequence[int],
    transposed: bool = False,
    tiled: bool = False,
) -> Tensor:  # (..., out_features), contiguous
    """:func:`linear` of a weight with int8 values, computed in the dtype of x; it has no gradient.

    Args:
        scales: what each row of the stored integers is multiplied by.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not belong together, as ``F.linear`` does.
    """
    weight = Weight(
        packed,
        indices,
        bind(pattern, shape),
        tiled=tiled,
        transposed=transposed,
        scales=scales,
        computed_in=x.dtype,
    )
    return multiply(x, weight, bias)


@linear_int8.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    indices: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    pattern: str,
    shape: Sequence[int],
    transposed: bool = False,
    tiled: bool = False,
) -> Tensor:
    bound = bind(pattern, shape)
    weight = Weight(
        packed, indices, bound, transposed=transposed, scales=scales, computed_in=x.dtype
    )
    check(x, weight, bias)
    check_devices(packed, indices)
    return x.new_empty(*x.shape[:-1], weight.features[0])


def linear_of(x: Tensor, weight: Compressed, bias: Tensor | None) -> Tensor:
    """``F.linear(x, weight, bias)`` by the operator over the weight's parts, which a graph can hold."""
    parts, order = (weight.packed, weight.indices), (weight.transposed, weight.tiled)
    pattern, shape = str(weight.pattern), list(weight.bound_shape)
    out: Tensor
    if weight.scales is None:
        copies = weight.dense, weight.vendor
        out = torch.ops.s3tensor.linear(x, *parts, bias, pattern, shape, *order, *copies)
        return out
    torch._check(
        x.dtype == weight.dtype,
        lambda: f"linear: x is {x.dtype} and the weight {weight.dtype}; convert one with .to()",
    )
    out = torch.ops.s3tensor.linear_int8(x, *parts, weight.scales, bias, pattern, shape, *order)
    return out


@torch.library.custom_op(
    "s3tensor::linear_group",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor[] packed, Tensor[] indices, str pattern, SymInt[] out_features, bool tiled) "
        "-> Tensor[]"
    ),
)
def linear_group(
    x: Tensor,  # (..., in_features)
    packed: Sequence[Tensor],  # (scopes, keep, block_size) each
    indices: Sequence[Tensor],  # (index_bytes,) uint8 each
    pattern: str,
    out_features: Sequence[int],
    tiled: bool,
) -> list[Tensor]:  # (..., out_features) each, contiguous
    """:func:`linear` of one x by several weights of one pattern, without a bias or copies beside.

    :class:`s3tensor.tensor.inductor.GroupLinears` makes it of query, key and value, or gate and up: one
    launch instead of two or three. Raises what :func:`linear` does.
    """
    weights = []
    for values, codes, rows in zip(packed, indices, out_features, strict=True):
        weights.append(Weight(values, codes, bind(pattern, (rows, x.shape[-1])), tiled=tiled))
        check(x, weights[-1], None)
    return multiply_group(x, weights)


@linear_group.register_fake
def _(
    x: Tensor,
    packed: Sequence[Tensor],
    indices: Sequence[Tensor],
    pattern: str,
    out_features: Sequence[int],
    tiled: bool,
) -> list[Tensor]:
    for values, codes, rows in zip(packed, indices, out_features, strict=True):
        check(x, Weight(values, codes, bind(pattern, (rows, x.shape[-1]))), None)
        check_devices(values, codes)
    return [x.new_empty(*x.shape[:-1], rows) for rows in out_features]


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, indices, _, ctx.pattern, shape, ctx.transposed, ctx.tiled, dense, vendor = inputs
    ctx.shape = [int(n) for n in shape]
    # x is kept only for the gradient of the values: frozen weights cost no activation memory.
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, packed, indices, dense, vendor)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, packed, indices, dense, vendor = ctx.saved_tensors
    grad_x = grad_packed = grad_bias = None
    if ctx.needs_input_grad[0]:
        stored = (ctx.pattern, ctx.shape, not ctx.transposed, ctx.tiled, dense, vendor)
        grad_x = linear(grad, packed, indices, None, *stored)
    if ctx.needs_input_grad[1]:
        outer = _outer(x, grad) if ctx.transposed else _outer(grad, x)
        grad_packed = gather(outer, indices, ctx.pattern, ctx.tiled)
    if ctx.needs_input_grad[3]:
        grad_bias = _rows(grad).sum(0)
    return grad_x, grad_packed, None, grad_bias, *(None,) * 6


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Sum over all rows of left' right: (left features, right features)."""
    return _rows(left).t() @ _rows(right)


linear.register_autograd(_linear_backward, setup_context=_save_linear)


@linear.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
    # packed, indices, bias and copies; the dims of shape, a list, come as a list
    if any(dim is not None for dim in (*in_dims[1:4], *in_dims[8:])):
        raise NotImplementedError(
            "s3tensor::linear can be mapped over x only; stack the inputs of one weight, or loop over weights"
        )
    return linear(args[0].movedim(in_dims[0], 0), *args[1:]), 0


# weight_linear: the same for a weight that is a tensor subclass ---------------------------------------


@torch.library.custom_op(
    "s3tensor::weight_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
)
def weight_linear(
    x: Tensor,  # (..., in_features)
    weight: Tensor,  # (out_features, in_features)
    bias: Tensor | None,  # (out_features,)
) -> Tensor:
    """``F.linear``; a compressed weight turns it into :func:`linear`."""
    return F.linear(x, weight, bias).contiguous()


@weight_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_devices(x, weight, bias)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op(
    "s3tensor::weight_linear_grad",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight) -> Tensor",
)
def weight_linear_grad(
    grad: Tensor,  # (..., out_features)
    x: Tensor,  # (..., in_features)
    weight: Tensor,  # (out_features, in_features)
) -> Tensor:
    """Gradient of ``F.linear`` by its weight, in the form of ``weight``: compressed for a compressed one."""
    return _outer(grad, x).contiguous()


@weight_linear_grad.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    check_devices(weight, grad, x)
    return torch.empty_like(weight)


def _save_weight_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)


def _weight_linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = watched_linear(grad, weight.t(), None)
    if ctx.needs_input_grad[1]:
        grad_weight = weight_linear_grad(grad, x, weight)
    if ctx.needs_input_grad[2]:
        grad_bias = _rows(grad).sum(0)
    return grad_x, grad_weight, grad_bias


weight_linear.register_autograd(_weight_linear_backward, setup_context=_save_weight_linear)


def _map_weight_linear(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
    if any(dim is not None for dim in in_dims[1:]):
        raise NotImplementedError(
            "s3tensor::weight_linear can be mapped over x only; loop over weights and biases"
        )
    return watched_linear(args[0].movedim(in_dims[0], 0), *args[1:]), 0


weight_linear.register_vmap(_map_weight_linear)


class _WeightLinear(torch.autograd.Function):
    """:func:`weight_linear` with the derivatives that a custom op cannot give to ``torch.func``."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return weight_linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save_weight_linear(ctx, inputs, output)
        ctx.save_for_forward(inputs[1])
        ctx.out_shape = output.shape
        ctx.set_materialize_grads(False)  # a None tangent tells what is not differentiated

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        return (None, None, None) if grad is None else _weight_linear_backward(ctx, grad)

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Any:
        if weight is not None:
            raise NotImplementedError("s3tensor: forward-mode derivatives are of x and bias only")
        if x is None:
            return None if bias is None else bias.expand(ctx.out_shape)
        return watched_linear(x, ctx.saved_tensors[0], bias)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return _map_weight_linear(info, in_dims, *args)


def watched_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`weight_linear`, also inside ``torch.func.grad``, ``jvp`` and ``jacrev``, and in a dual level.

    The autograd of a custom op is an ``autograd.Function`` without ``setup_context``, which functorch
    refuses, and without ``jvp``: where nothing requires a gradient, it drops a tangent in silence (torch
    2.6 to 2.13).
    """
    traced = torch.compiler.is_dynamo_compiling()  # Dynamo cannot read the stack of transforms
    if not traced and (
        torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    ):
        mapped: Tensor = _WeightLinear.apply(x, weight, bias)
        return mapped
    return weight_linear(x, weight, bias)


def _register_autocast(device: str) -> None:
    """Cast as ``F.linear`` does under autocast, to the dtype that the context names.

    ``CustomOpDef.register_autocast`` fixes one dtype at import, so ``torch.autocast(dtype=float16)``
    would compute in bfloat16.
    """
    key = f"Autocast{torch._C._dispatch_key_for_device(device)}"
    exclude = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtype = torch.get_autocast_dtype(device)

        def cast(t: Tensor | None) -> Tensor | None:
            eligible = t is not None and t.is_floating_point() and t.dtype != torch.float64
            return t.to(dtype) if t is not None and eligible else t

        with torch._C._ExcludeDispatchKeyGuard(exclude):
            return torch.ops.s3tensor.weight_linear(cast(x), cast(weight), cast(bias))

    _AUTOCAST.impl("weight_linear", kernel, key)


_AUTOCAST = torch.library.Library("s3tensor", "FRAGMENT")
for _device in ("cpu", "cuda"):
    _register_autocast(_device)
