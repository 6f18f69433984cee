"""What operators do to a ``StructuredSparseTensor`` beside those of :mod:`s3tensor.operator_rules`.

One small rule for each, found by aten overload, which sees what is left below autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from s3tensor.compressed import refusal, rules_for
from s3tensor.function_rules import is_compressed
from s3tensor.operator_rules import copy_parts
from s3tensor.tensor import DTYPES, StructuredSparseTensor

aten = torch.ops.aten
Args = tuple[Any, ...]
Kwargs = dict[str, Any]

dispatch = rules_for(StructuredSparseTensor.RULES)


def is_sparse(value: Any) -> bool:
    return isinstance(value, StructuredSparseTensor)


# copies -----------------------------------------------------------------------------------------------


@dispatch(aten._to_copy.default, aten.empty_like.default, aten.zeros_like.default)
def _like(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    """New values of another dtype or device, the same positions."""
    options = {key: value for key, value in kwargs.items() if key != "memory_format"}
    dtype = options.pop("dtype", None)
    if dtype is not None and dtype not in DTYPES:
        raise refusal(StructuredSparseTensor, func, f"to {dtype}")
    if options.pop("layout", None) not in (None, torch.strided):
        raise refusal(StructuredSparseTensor, func, "to another layout")
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
        raise refusal(
            StructuredSparseTensor,
            func,
            f"of {size}; an empty weight keeps the shape {tuple(t.shape)}",
        )
    return _like(aten.empty_like.default, (t,), kwargs)


@dispatch(aten.copy_.default)
def _copy_(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    target, source = args[0], args[1]
    if not is_sparse(target):
        raise refusal(
            StructuredSparseTensor,
            func,
            "a compressed weight copied into a dense one would lose its compression; load the state dict "
            "with assign=True, or copy weight.to_dense()",
        )
    if not is_sparse(source):
        what = "one with int8 values" if is_compressed(source) else "a dense tensor"
        raise refusal(
            StructuredSparseTensor,
            func,
            f"{what} copied into a {target.pattern} weight; make a new weight with "
            "StructuredSparseTensor.from_dense",
        )
    copy_parts(func, args, kwargs)
    return target.refresh_()


# sums -------------------------------------------------------------------------------------------------


def _sum(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    """Packed values of ``left + alpha * right``: gradients of a weight that is used twice are summed."""
    left, right = args
    if not (is_sparse(left) and is_sparse(right) and left.same_layout(right)):
        raise refusal(
            StructuredSparseTensor, func, "only two of the same pattern, shape and positions add up"
        )
    parts = (left.packed, left.indices, right.packed, right.indices)
    total: Tensor = torch.ops.s3tensor.add_packed(*parts, kwargs.get("alpha", 1))
    return total


@dispatch(aten.add.Tensor)
def _add(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    packed = _sum(func, args, kwargs)
    return args[0].map_parts(lambda values: packed, aten.clone.default, copies=False)


@dispatch(aten.add_.Tensor)
def _add_(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    total = _sum(func, args, kwargs)  # refuses first: args[0] may be dense
    args[0].packed.copy_(total)
    return args[0].refresh_()


@dispatch(aten.zero_.default)
def _zero_(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    """The kept values become zero, the positions stay: ``zero_grad(set_to_none=False)``."""
    args[0].packed.zero_()
    return args[0].refresh_()


# products ---------------------------------------------------------------------------------------------


@dispatch(torch.ops.s3tensor.weight_linear_grad.default)
def _linear_grad(func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    """The gradient at the stored positions, packed like the weight."""
    grad, x, weight = args
    if is_compressed(grad) or is_compressed(x):
        raise refusal(StructuredSparseTensor, func, "only one operand, a weight, may be compressed")
    left, right = (x, grad) if weight.transposed else (grad, x)
    dense = left.reshape(-1, left.shape[-1]).t() @ right.reshape(-1, right.shape[-1])
    packed = torch.ops.s3tensor.gather(dense, weight.indices, str(weight.pattern), weight.tiled)
    return weight.map_parts(lambda values: packed, aten.clone.default, copies=False)
