"""What each operator does to a ``StructuredSparseTensor``: one small rule for each, in two registries.

``@dispatch`` rules are found by aten overload and see what is left below autograd. ``@function`` rules
are found by the torch function that was called; only the matrix products need one (see
:mod:`s3tensor.ops`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from s3tensor import ops
from s3tensor.product_rules import Products, combine
from s3tensor.tensor import (
    DISPATCH_RULES,
    DTYPES,
    FUNCTION_RULES,
    StructuredSparseTensor,
    refusal,
)

aten = torch.ops.aten
Rule = TypeVar("Rule", bound=Callable[..., Any])
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def dispatch(*overloads: Any) -> Callable[[Rule], Rule]:
    """Register ``rule(func, args, kwargs)`` for aten overloads."""

    def register(rule: Rule) -> Rule:
        DISPATCH_RULES.update(dict.fromkeys(overloads, rule))
        return rule

    return register


def function(*functions: Any) -> Callable[[Rule], Rule]:
    """Register ``rule(*args, **kwargs)``, with the function's own arguments, for torch functions."""

    def register(rule: Rule) -> Rule:
        FUNCTION_RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register


def is_sparse(value: Any) -> bool:
    return isinstance(value, StructuredSparseTensor)


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
        raise refusal(func, f"a transpose of {args[0].ndim} dims")
    return _view(func, args, kwargs, flip=True)


@dispatch(aten.transpose.int)
def _transpose(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    ndim = args[0].ndim
    flip = args[1] % ndim != args[2] % ndim
    if flip and ndim != 2:
        raise refusal(func, f"a transpose of {ndim} dims")
    return _view(func, args, kwargs, flip)


@dispatch(aten.permute.default)
def _permute(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    ndim = args[0].ndim
    flip = [dim % ndim for dim in args[1]] != list(range(ndim))
    if flip and ndim != 2:
        raise refusal(func, f"a permutation of {ndim} dims")
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
        func, f"to size {size}, stride {stride}; only the tensor and its transpose are views"
    )


@dispatch(aten.view.default)
def _same_view(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    if tuple(args[1]) != tuple(args[0].shape):
        raise refusal(func, f"of {tuple(args[0].shape)} as {tuple(args[1])}")
    return _view(func, args, kwargs, flip=False)


# copies -----------------------------------------------------------------------------------------------


@dispatch(aten.clone.default)
def _clone(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    t = args[0]
    if kwargs.get("memory_format") == torch.contiguous_format and not t.is_contiguous():
        raise refusal(
            func, "a contiguous copy of a transposed view; copy the tensor it is a view of"
        )
    return t.map_parts(aten.clone.default)


@dispatch(aten._to_copy.default, aten.empty_like.default, aten.zeros_like.default)
def _like(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    """New values of another dtype or device, the same positions."""
    options = {key: value for key, value in kwargs.items() if key != "memory_format"}
    dtype = options.pop("dtype", None)
    if dtype is not None and dtype not in DTYPES:
        raise refusal(func, f"to {dtype}")
    if options.pop("layout", None) not in (None, torch.strided):
        raise refusal(func, "to another layout")
    move = {key: value for key, value in options.items() if value is not None}

    def positions(indices: Tensor) -> Tensor:
        # An empty tensor of random positions could not be read; of a new device, they must move.
        return aten._to_copy.default(indices, **move) if move else aten.clone.default(indices)

    t = args[0]
    made = t.map_parts(lambda values: func(values, dtype=dtype, **move), positions, copies=False)
    if func is aten._to_copy.default:
        made = made.in_order()  # of its new device and dtype
        return made if t.memory == "lean" else made.with_memory("fast")
    return made


@dispatch(aten.new_empty.default)
def _new_empty(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    """A weight to copy this one into, as an asynchronous checkpoint makes one."""
    t, size = args[0], tuple(args[1])
    if size != tuple(t.shape):
        raise refusal(func, f"of {size}; an empty weight keeps the shape {tuple(t.shape)}")
    return _like(aten.empty_like.default, (t,), kwargs)


@dispatch(aten._pin_memory.default)
def _pin_memory(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    return args[0].map_parts(lambda part: func(part, *args[1:], **kwargs))


@dispatch(aten.is_pinned.default)
def _is_pinned(func: Any, args: Args, kwargs: Kwargs) -> bool:
    return bool(func(args[0].packed, *args[1:], **kwargs))


@dispatch(aten.copy_.default)
def _copy_(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    target, source = args[0], args[1]
    if not is_sparse(target):
        raise refusal(
            func,
            "a compressed weight copied into a dense one would lose its compression; load the state dict "
            "with assign=True, or copy weight.to_dense()",
        )
    if not is_sparse(source):
        raise refusal(
            func,
            f"a dense tensor copied into a {target.pattern} weight; make a new weight with "
            "StructuredSparseTensor.from_dense",
        )
    source = source.in_order(target.tiled) if source.tiled != target.tiled else source
    if not target.same_layout(source):
        raise refusal(func, f"from {source!r} to {target!r}; the patterns and shapes must be equal")
    func(target.packed, source.packed, *args[2:], **kwargs)
    func(target.indices, source.indices, *args[2:], **kwargs)
    return target.refresh_()


@dispatch(aten.equal.default)
def _equal(func: Any, args: Args, kwargs: Kwargs) -> bool:
    """Equality of the dense values: one matrix can be packed in several ways where it has zeros to spare."""
    left, right = args
    alike = is_sparse(left) and left.same_layout(right)
    if alike and func(left.packed, right.packed) and func(left.indices, right.indices):
        return True
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    dense = [t.to_dense() if is_sparse(t) else t for t in (left, right)]
    return bool(func(*dense))


# sums -------------------------------------------------------------------------------------------------


def _sum(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    """Packed values of ``left + alpha * right``: gradients of a weight that is used twice are summed."""
    left, right = args
    if not (is_sparse(left) and is_sparse(right) and left.same_layout(right)):
        raise refusal(func, "only two of the same pattern, shape and positions add up")
    parts = (left.packed, left.indices, right.packed, right.indices)
    total: Tensor = torch.ops.s3tensor.add_packed(*parts, kwargs.get("alpha", 1))
    return total


@dispatch(aten.add.Tensor)
def _add(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    packed = _sum(func, args, kwargs)
    return args[0].map_parts(lambda values: packed, aten.clone.default, copies=False)


@dispatch(aten.add_.Tensor)
def _add_(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    args[0].packed.copy_(_sum(func, args, kwargs))
    return args[0].refresh_()


# products ---------------------------------------------------------------------------------------------


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, func: Any) -> Tensor:
    """``F.linear`` by the opaque op over plain tensors."""
    if not is_sparse(weight) or is_sparse(x) or is_sparse(bias):
        raise refusal(func, "only one operand, a weight, may be compressed")
    assert isinstance(weight, StructuredSparseTensor)
    out: Tensor = torch.ops.s3tensor.linear(
        x,
        weight.packed,
        weight.indices,
        bias,
        str(weight.pattern),
        list(weight.bound_shape),
        weight.transposed,
        weight.tiled,
        weight.dense,
        weight.vendor,
    )
    return out


@dispatch(torch.ops.s3tensor.weight_linear.default, aten.linear.default)
def _linear_op(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    return _linear(args[0], args[1], bias, func)


@dispatch(torch.ops.s3tensor.weight_linear_grad.default)
def _linear_grad(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    """The gradient at the stored positions, packed like the weight."""
    grad, x, weight = args
    if is_sparse(grad) or is_sparse(x):
        raise refusal(func, "only one operand, a weight, may be compressed")
    left, right = (x, grad) if weight.transposed else (grad, x)
    dense = left.reshape(-1, left.shape[-1]).t() @ right.reshape(-1, right.shape[-1])
    packed = torch.ops.s3tensor.gather(dense, weight.indices, str(weight.pattern), weight.tiled)
    return weight.map_parts(lambda values: packed, aten.clone.default, copies=False)


@dispatch(aten.mm.default)
def _mm(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    left, right = args
    if is_sparse(left):
        return _linear(right.t(), left, None, func).t()
    return _linear(left, right.t(), None, func)


@dispatch(aten.mv.default)
def _mv(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    return _linear(args[1], args[0], None, func)


@dispatch(aten.addmm.default)
def _addmm(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    bias, left, right = args
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    if is_sparse(bias):
        raise refusal(func, "only one operand, a weight, may be compressed")
    if is_sparse(right) and beta == alpha == 1 and bias.ndim == 1 and bias.dtype == left.dtype:
        return _linear(
            left, right.t(), bias, func
        )  # added in the matmul's epilogue, as F.linear does
    product = _mm(aten.mm.default, (left, right), {})
    return combine(bias, product, beta, alpha)


# The functions that users call. They go to one op that takes the weight whole and does not decompose.


def _multiply(x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    """``F.linear``: at once where nothing watches, else by the op."""
    watched = weight.requires_grad and torch.is_grad_enabled()
    if not watched and ops.nothing_watches(x, bias, weight.packed):
        return ops.linear_now(x, weight.as_parts(), bias)
    return ops.product(x, weight, bias)


Products(is_sparse, refusal, _multiply, "compressed, like the old").register(FUNCTION_RULES)
