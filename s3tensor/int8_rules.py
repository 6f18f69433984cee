"""What each operator does to an ``Int8SparseTensor``: a base class and one small rule for each operator.

As for ``StructuredSparseTensor`` (:mod:`s3tensor.tensor_rules`), but that nothing has a gradient, and that
the dtype is the one of products: the parts keep theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.utils._python_dispatch import return_and_correct_aliasing

from s3tensor import ops, scaled
from s3tensor.errors import UnsupportedOpError
from s3tensor.pattern import Pattern
from s3tensor.product_rules import Products, combine

aten = torch.ops.aten

# A rule for each operator, as for StructuredSparseTensor; what has none is refused by name.
_DISPATCH: dict[Any, Callable[..., Any]] = {}  # rule(func, args, kwargs), by aten overload
_FUNCTIONS: dict[Any, Callable[..., Any]] = {}  # rule(*args, **kwargs), by torch function


class Int8Rules(Tensor):
    """A tensor of these rules; :class:`s3tensor.int8.Int8SparseTensor` is the one that there is."""

    packed: Tensor
    indices: Tensor  # type: ignore[assignment]  # Tensor.indices() is of torch's own sparse tensors
    scales: Tensor
    pattern: Pattern
    bound_shape: tuple[int, ...]
    transposed: bool
    tiled: bool

    def requires_grad_(self, requires_grad: bool = True) -> Int8Rules:
        """Only ``False``: integers do not train.

        Raises:
            UnsupportedOpError: for ``True``.
        """
        if requires_grad:
            raise _untrained()
        return self

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FUNCTIONS:
            return _FUNCTIONS[func](*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    # Dynamo must not trace into the rules: AOTAutograd runs them while it traces.
    @classmethod
    @_disable_dynamo
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        rule = _DISPATCH.get(func)
        if rule is None:
            raise _refusal(func)
        return rule(func, args, kwargs or {})


def _refusal(func: Any, why: str = "") -> UnsupportedOpError:
    name = func if isinstance(func, (str, torch._ops.OpOverload)) else f"torch.{func.__name__}"
    return UnsupportedOpError(
        f"{name} has no rule for Int8SparseTensor{f': {why}' if why else ''}. Call .to_dense() for a dense "
        "copy"
    )


def _untrained() -> UnsupportedOpError:
    return UnsupportedOpError(
        "an Int8SparseTensor has no gradient, its values are integers: make the parameter with "
        "requires_grad=False, or call model.requires_grad_(False) before load_state_dict; to train, keep the "
        "StructuredSparseTensor and quantize it afterwards"
    )


def _dispatch(*overloads: Any) -> Callable[[Any], Any]:
    def register(rule: Any) -> Any:
        _DISPATCH.update(dict.fromkeys(overloads, rule))
        return rule

    return register


def _function(*functions: Any) -> Callable[[Any], Any]:
    def register(rule: Any) -> Any:
        _FUNCTIONS.update(dict.fromkeys(functions, rule))
        return rule

    return register


def _is_int8(value: Any) -> bool:
    return isinstance(value, Int8Rules)


@_dispatch(aten.detach.default, aten.alias.default)
def _alias(func: Any, args: Any, kwargs: Any) -> Tensor:
    return return_and_correct_aliasing(func, args, kwargs, args[0]._map(func))


def _view(func: Any, args: Any, kwargs: Any, flip: bool) -> Tensor:
    view = args[0]._map(aten.alias.default, flip)
    return return_and_correct_aliasing(func, args, kwargs, view)


@_dispatch(aten.t.default)
def _t(func: Any, args: Any, kwargs: Any) -> Tensor:
    return _view(func, args, kwargs, flip=True)


@_dispatch(aten.transpose.int)
def _transpose(func: Any, args: Any, kwargs: Any) -> Tensor:
    return _view(func, args, kwargs, args[1] % 2 != args[2] % 2)


@_dispatch(aten.permute.default)
def _permute(func: Any, args: Any, kwargs: Any) -> Tensor:
    return _view(func, args, kwargs, [dim % 2 for dim in args[1]] != [0, 1])


@_dispatch(aten.as_strided.default)
def _as_strided(func: Any, args: Any, kwargs: Any) -> Tensor:
    # AOTAutograd rebuilds a graph output that is a view of an input by as_strided.
    t, size, stride = args[0], tuple(args[1]), tuple(args[2])
    offset = args[3] if len(args) > 3 else kwargs.get("storage_offset")
    if not offset:
        if (size, stride) == (tuple(t.shape), tuple(t.stride())):
            return _view(func, args, kwargs, flip=False)
        if (size, stride) == (tuple(t.shape)[::-1], tuple(t.stride())[::-1]):
            return _view(func, args, kwargs, flip=True)
    raise _refusal(
        func, f"to size {size}, stride {stride}; only the tensor and its transpose are views"
    )


@_dispatch(aten.view.default)
def _same_view(func: Any, args: Any, kwargs: Any) -> Tensor:
    if tuple(args[1]) != tuple(args[0].shape):
        raise _refusal(func, f"of {tuple(args[0].shape)} as {tuple(args[1])}")
    return _view(func, args, kwargs, flip=False)


@_dispatch(aten.clone.default)
def _clone(func: Any, args: Any, kwargs: Any) -> Tensor:
    t = args[0]
    if kwargs.get("memory_format") == torch.contiguous_format and not t.is_contiguous():
        raise _refusal(
            func, "a contiguous copy of a transposed view; copy the tensor it is a view of"
        )
    return t._map(aten.clone.default)


@_dispatch(aten._to_copy.default)
def _to_copy(func: Any, args: Any, kwargs: Any) -> Tensor:
    """On another device, or computed in another dtype: the integers and the scales stay what they are."""
    options = {key: value for key, value in kwargs.items() if key != "memory_format"}
    dtype = options.pop("dtype", None)
    if dtype is not None and dtype not in scaled.DTYPES:
        raise _refusal(func, f"to {dtype}; products are in float32, float16 or bfloat16")
    if options.pop("layout", None) not in (None, torch.strided):
        raise _refusal(func, "to another layout")
    move = {key: value for key, value in options.items() if value is not None}
    made = args[0]._map(lambda part: func(part, **move), dtype=dtype)
    return made.in_order()  # of its new device and dtype


@_dispatch(aten._pin_memory.default)
def _pin_memory(func: Any, args: Any, kwargs: Any) -> Tensor:
    return args[0]._map(lambda part: func(part, *args[1:], **kwargs))


@_dispatch(aten.is_pinned.default)
def _is_pinned(func: Any, args: Any, kwargs: Any) -> bool:
    return bool(func(args[0].packed, *args[1:], **kwargs))


@_dispatch(aten.copy_.default)
def _copy_(func: Any, args: Any, kwargs: Any) -> Tensor:
    target, source = args[0], args[1]
    if not _is_int8(target) or not _is_int8(source):
        raise _refusal(
            func,
            "only weights of the same form are copied into each other; load the state dict with "
            "assign=True, or make a new weight with Int8SparseTensor.from_sparse",
        )
    source = source.in_order(target.tiled) if source.tiled != target.tiled else source
    if not target.same_layout(source):
        raise _refusal(
            func, f"from {source!r} to {target!r}; the patterns and shapes must be equal"
        )
    for name in ("packed", "indices", "scales"):
        func(getattr(target, name), getattr(source, name), *args[2:], **kwargs)
    return target


@_dispatch(aten.equal.default)
def _equal(func: Any, args: Any, kwargs: Any) -> bool:
    """Equality of the dense values."""
    left, right = args
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    dense = [t.to_dense() if _is_int8(t) else t for t in (left, right)]
    return bool(func(*dense))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, func: Any) -> Tensor:
    """``F.linear`` by the opaque op over plain tensors."""
    if not isinstance(weight, Int8Rules) or _is_int8(x) or _is_int8(bias):
        raise _refusal(func, "only one operand, a weight, may be compressed")
    _same_dtype(x, weight)
    parts = weight.packed, weight.indices, weight.scales, bias, str(weight.pattern)
    order = list(weight.bound_shape), weight.transposed, weight.tiled
    out: Tensor = torch.ops.s3tensor.linear_int8(x, *parts, *order)
    return out


def _same_dtype(x: Tensor, weight: Tensor) -> None:
    torch._check(
        x.dtype == weight.dtype,
        lambda: f"linear: x is {x.dtype} and the weight {weight.dtype}; convert one with .to()",
    )


@_dispatch(torch.ops.s3tensor.weight_linear.default, aten.linear.default)
def _linear_op(func: Any, args: Any, kwargs: Any) -> Tensor:
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    return _linear(args[0], args[1], bias, func)


@_dispatch(aten.mm.default)
def _mm(func: Any, args: Any, kwargs: Any) -> Tensor:
    left, right = args
    if _is_int8(left):
        return _linear(right.t(), left, None, func).t()
    return _linear(left, right.t(), None, func)


@_dispatch(aten.mv.default)
def _mv(func: Any, args: Any, kwargs: Any) -> Tensor:
    return _linear(args[1], args[0], None, func)


@_dispatch(aten.addmm.default)
def _addmm(func: Any, args: Any, kwargs: Any) -> Tensor:
    bias, left, right = args
    if _is_int8(bias):
        raise _refusal(func, "only one of the factors may be compressed")
    product = _mm(aten.mm.default, (left, right), {})
    return combine(bias, product, kwargs.get("beta", 1), kwargs.get("alpha", 1))


# The functions that users call. They go to one op that takes the weight whole and does not decompose.


def _multiply(x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    """``F.linear``: at once where nothing watches, else by the op."""
    if ops.nothing_watches(x, bias, weight.packed):
        _same_dtype(x, weight)
        return scaled.linear(x, weight.as_parts(), bias)
    return ops.product(x, weight, bias)


Products(_is_int8, _refusal, _multiply, "compressed, with int8 values, like the old").register(
    _FUNCTIONS
)

_set_grad_of = Tensor.requires_grad.__set__  # type: ignore[attr-defined]  # a descriptor


@_function(_set_grad_of)
def _set_requires_grad(target: Tensor, value: bool) -> None:
    if value:
        raise _untrained()
