"""What each operator of aten does to any compressed tensor: views, copies and products.

Rules that depend on a class's parts are in its file: :mod:`s3tensor.tensor.sparse` and
:mod:`s3tensor.tensor.int8`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from s3tensor.tensor.base import Compressed, Rules, refusal, rules_for
from s3tensor.tensor.functions import combine, is_compressed
from s3tensor.tensor.ops import linear_of

aten = torch.ops.aten
Args = tuple[Any, ...]
Kwargs = dict[str, Any]

SHARED: Rules = {}
dispatch = rules_for(SHARED)


# views of the same packed data ------------------------------------------------------------------------


@dispatch(aten.detach.default, aten.alias.default)
def _alias(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    return return_and_correct_aliasing(func, args, kwargs, args[0].map_parts(func))


def _view(func: Any, args: Args, kwargs: Kwargs, flip: bool) -> Tensor:
    view = args[0].map_parts(aten.alias.default, flip=flip)
    return return_and_correct_aliasing(func, args, kwargs, view)


@dispatch(aten.t.default)
def _t(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    if args[0].ndim != 2:
        raise refusal(args[0], func, f"a transpose of {args[0].ndim} dims")
    return _view(func, args, kwargs, flip=True)


@dispatch(aten.transpose.int)
def _transpose(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    ndim = args[0].ndim
    flip = args[1] % ndim != args[2] % ndim
    if flip and ndim != 2:
        raise refusal(args[0], func, f"a transpose of {ndim} dims")
    return _view(func, args, kwargs, flip)


@dispatch(aten.permute.default)
def _permute(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    ndim = args[0].ndim
    flip = [dim % ndim for dim in args[1]] != list(range(ndim))
    if flip and ndim != 2:
        raise refusal(args[0], func, f"a permutation of {ndim} dims")
    return _view(func, args, kwargs, flip)


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


@dispatch(torch.ops.s3tensor.weight_linear.default, aten.linear.default)
def _linear_op(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    return _linear(args[0], args[1], bias, func)


@dispatch(aten.mm.default)
def _mm(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    left, right = args
    if is_compressed(left):
        return _linear(right.t(), left, None, func).t()
    return _linear(left, right.t(), None, func)


@dispatch(aten.mv.default)
def _mv(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    return _linear(args[1], args[0], None, func)


@dispatch(aten.addmm.default)
def _addmm(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    bias, left, right = args
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    if is_compressed(bias):
        raise refusal(bias, func, "only one operand, a weight, may be compressed")
    if is_compressed(right) and beta == alpha == 1 and bias.ndim == 1 and bias.dtype == left.dtype:
        # Added in the matmul's epilogue, as F.linear does.
        return _linear(left, right.t(), bias, func)
    product = _mm(aten.mm.default, (left, right), {})
    return combine(bias, product, beta, alpha)
