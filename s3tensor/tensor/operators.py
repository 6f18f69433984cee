"""What each operator of aten does to any compressed tensor: views, copies and products.

Rules that depend on a class's parts are in its file: :mod:`s3tensor.tensor.sparse` and
:mod:`s3tensor.tensor.int8`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves

from s3tensor.tensor.base import Compressed, Rules, refusal, rules_for
from s3tensor.tensor.functions import combine, is_compressed
from s3tensor.tensor.ops import gather, linear_of

aten = torch.ops.aten
Args = tuple[Any, ...]
Kwargs = dict[str, Any]

SHARED: Rules = {}
dispatch = rules_for(SHARED)


@dispatch(aten.is_same_size.default)
def _refuse_tangent(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    """What forward mode asks first of a weight and its tangent."""
    first = next(filter(is_compressed, args))
    raise refusal(first, func, "forward-mode derivatives are by x and bias, not by the weight")


# views of the same packed data ------------------------------------------------------------------------


@dispatch(aten.detach.default, aten.alias.default)
def _alias(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    return _view(func, args, kwargs, flip=False, through=func)


def _view(
    func: Any, args: Args, kwargs: Kwargs, flip: bool, through: Any = aten.alias.default
) -> Tensor:
    t: Compressed = args[0]
    if torch.is_inference_mode_enabled() and not t.is_inference():
        with torch.inference_mode(False):  # a view of a normal tensor is a normal tensor
            return _view(func, args, kwargs, flip, through)
    return return_and_correct_aliasing(func, args, kwargs, t.map_parts(through, flip=flip))


@dispatch(aten.t.default)
def _t(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    if args[0].ndim != 2:
        raise refusal(args[0], func, f"a transpose of {args[0].ndim} dims")
    return _view(func, args, kwargs, flip=True)


@dispatch(aten.transpose.int)
def _transpose(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    ndim = args[0].ndim
    first, second = _dims(args[1:3], ndim)
    flip = first != second
    if flip and ndim != 2:
        raise refusal(args[0], func, f"a transpose of {ndim} dims")
    return _view(func, args, kwargs, flip)


@dispatch(aten.permute.default)
def _permute(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    ndim = args[0].ndim
    dims = _dims(args[1], ndim)
    if sorted(dims) != list(range(ndim)):
        raise RuntimeError(f"permute: dims {tuple(args[1])} do not name each of {ndim} dims once")
    flip = dims != list(range(ndim))
    if flip and ndim != 2:
        raise refusal(args[0], func, f"a permutation of {ndim} dims")
    return _view(func, args, kwargs, flip)


def _dims(dims: Sequence[int], ndim: int) -> list[int]:
    """Dims of a tensor of ``ndim``, counted from 0."""
    for dim in dims:
        if not -ndim <= dim < ndim:
            raise IndexError(
                f"dim {dim} is out of range: a tensor of {ndim} dims has {-ndim} to {ndim - 1}"
            )
    return [dim % ndim for dim in dims]


@dispatch(aten.as_strided.default)
def _as_strided(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    # AOTAutograd rebuilds a graph output that is a view of an input by as_strided.
    t, size, stride = args[0], tuple(args[1]), tuple(args[2])
    offset = args[3] if len(args) > 3 else kwargs.get("storage_offset")
    if not offset:
        if (size, stride) == (tuple(t.shape), tuple(t.stride())):
            return _view(func, args, kwargs, flip=False)
        if t.ndim == 2 and (size, stride) == (tuple(t.shape)[::-1], tuple(t.stride())[::-1]):
            return _view(func, args, kwargs, flip=True)
    raise refusal(
        t, func, f"to size {size}, stride {stride}; only the tensor and its transpose are views"
    )


@dispatch(aten.view.default)
def _same_view(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    if tuple(args[1]) != tuple(args[0].shape):
        raise refusal(args[0], func, f"of {tuple(args[0].shape)} as {tuple(args[1])}")
    return _view(func, args, kwargs, flip=False)


# copies -----------------------------------------------------------------------------------------------


@dispatch(aten.clone.default)
def _clone(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    t: Compressed = args[0]
    if kwargs.get("memory_format") == torch.contiguous_format and not t.is_contiguous():
        raise refusal(
            t, func, "a contiguous copy of a transposed view; copy the tensor it is a view of"
        )
    return t.map_parts(aten.clone.default)


@dispatch(aten._pin_memory.default)
def _pin_memory(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    t: Compressed = args[0]
    return t.map_parts(lambda part: func(part, *args[1:], **kwargs))


@dispatch(aten.is_pinned.default)
def _is_pinned(func: Any, args: Args, kwargs: Kwargs) -> bool:
    return bool(func(args[0].packed, *args[1:], **kwargs))


def copy_parts(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """``copy_`` between two weights of one class; returns the target."""
    target, source = args[0], args[1]
    source = source.in_order(target.tiled) if source.tiled != target.tiled else source
    if not target.same_layout(source):
        raise refusal(
            target,
            func,
            f"from {source!r} to {target!r}; the patterns and shapes must be equal",
        )
    for name in target.PARTS:
        func(getattr(target, name), getattr(source, name), *args[2:], **kwargs)
    return target


@dispatch(aten.equal.default)
def _equal(func: Any, args: Args, kwargs: Kwargs) -> bool:
    """Equality of the dense values: a matrix with zeros to spare can be packed in several ways."""
    left, right = args
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    alike = is_compressed(left) and left.same_layout(right)
    if alike and all(func(getattr(left, name), getattr(right, name)) for name in left.PARTS):
        return True
    dense = [t.to_dense() if is_compressed(t) else t for t in (left, right)]
    return bool(func(*dense))


# products ---------------------------------------------------------------------------------------------


def _linear(x: Tensor, weight: Any, bias: Tensor | None, func: Any) -> Tensor:
    """``F.linear`` by the operator over plain tensors."""
    if not is_compressed(weight) or is_compressed(x) or is_compressed(bias):
        first = next(filter(is_compressed, (x, weight, bias)))
        raise refusal(first, func, "only one operand, a weight, may be compressed")
    return linear_of(x, weight, bias)


def packed_like(dense: Tensor, weight: Any) -> Tensor:
    """The values of ``dense``, of the weight's shape, at its stored positions, packed like the weight."""
    stored = dense.t() if weight.transposed else dense
    packed = gather(stored, weight.indices, str(weight.pattern), weight.tiled)
    made: Tensor = weight.map_parts(lambda values: packed, aten.clone.default, copies=False)
    return made


def _keep_gradient_packed(weight: Any, func: Any) -> None:
    """See to the gradient of a product of aten, whose autograd knows only dense ones.

    Such a product comes from a composite that torch runs by itself, as ``multi_head_attention_forward``;
    there a hook packs the gradient. Or ``torch.func`` wraps the weight, which no hook can reach.
    """
    if not is_compressed(weight) or not torch.is_grad_enabled():
        return
    if weight.requires_grad:
        if (
            not weight.is_leaf
        ):  # the transposed view that the composite made; hooks of a leaf would pile up
            kept = weight.detach()
            weight.register_hook(lambda g: g if is_compressed(g) else packed_like(g, kept))
    elif torch._C._is_torch_function_enabled() and _is_differentiated():
        raise refusal(
            weight,
            func,
            "torch.func.grad, vjp and jacrev by a compressed weight would give a dense gradient; take "
            "torch.autograd.grad by it, or torch.func by a dense copy, times mask()",
        )


_TRANSFORMS = "torch._functorch.eager_transforms", "torch.fx.interpreter", "torch._dynamo.utils"


def _is_differentiated() -> bool:
    """Whether ``torch.func`` differentiates by a compressed tensor, rather than only pass it on.

    It wraps all arguments, and takes itself off its stack before it calls a rule: only the wrappers, in the
    frames that made them, tell which one has a gradient.
    """
    if torch._C._current_graph_task_id() != -1:  # a product of the backward pass
        return False
    frame = sys._getframe().f_back
    while frame is not None:
        passed_on = frame.f_globals.get("__name__") in _TRANSFORMS
        if passed_on and any(map(_wraps_compressed, tree_leaves(list(frame.f_locals.values())))):
            return True
        frame = frame.f_back
    return False


def _wraps_compressed(value: Any) -> bool:
    functorch = torch._C._functorch
    if not isinstance(value, Tensor) or not functorch.is_functorch_wrapped_tensor(value):
        return False
    if not value.requires_grad:
        return False
    while functorch.is_functorch_wrapped_tensor(value):
        value = functorch.get_unwrapped(value)
    return is_compressed(value)


@dispatch(torch.ops.s3tensor.weight_linear.default, aten.linear.default)
def _linear_op(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    if func is aten.linear.default:
        _keep_gradient_packed(args[1], func)
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    return _linear(args[0], args[1], bias, func)


@dispatch(aten.mm.default)
def _mm(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    left, right = args
    _keep_gradient_packed(left if is_compressed(left) else right, func)
    if is_compressed(left):
        return _linear(right.t(), left, None, func).t()
    return _linear(left, right.t(), None, func)


@dispatch(aten.mv.default)
def _mv(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    _keep_gradient_packed(args[0], func)
    return _linear(args[1], args[0], None, func)


@dispatch(aten.addmm.default)
def _addmm(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    bias, left, right = args
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    if is_compressed(bias):
        raise refusal(bias, func, "only one operand, a weight, may be compressed")
    if is_compressed(right) and beta == alpha == 1 and bias.ndim == 1 and bias.dtype == left.dtype:
        _keep_gradient_packed(right, func)
        # Added in the matmul's epilogue, as F.linear does.
        return _linear(left, right.t(), bias, func)
    product = _mm(aten.mm.default, (left, right), {})
    return combine(bias, product, beta, alpha)
