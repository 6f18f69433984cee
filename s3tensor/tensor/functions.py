"""What users call on a compressed tensor: one small rule for each torch function that needs one.

``@``, ``mm``, ``mv`` and ``addmm`` reach a tensor subclass as these functions. Each becomes one product of
rows of x by the weight, which a compiler sees whole (:mod:`s3tensor.tensor.ops` says why).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from s3tensor.errors import UnsupportedOpError
from s3tensor.tensor.base import FUNCTION_RULES, Compressed, refusal, rules_for
from s3tensor.tensor.linear import multiply
from s3tensor.tensor.ops import watched_linear
from s3tensor.tensor.ready import multiply_eagerly

function = rules_for(FUNCTION_RULES)

# Descriptors, which the stubs of torch do not know.
_set_data = Tensor.data.__set__  # type: ignore[attr-defined]
_set_requires_grad = Tensor.requires_grad.__set__  # type: ignore[attr-defined]


def is_compressed(value: Any) -> bool:
    return isinstance(value, Compressed)


# products ---------------------------------------------------------------------------------------------


@function(F.linear)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not is_compressed(weight) or is_compressed(input) or is_compressed(bias):
        raise _refused(F.linear, (input, weight, bias), "only the weight may be compressed")
    return _by_weight(input, weight, bias)


@function(torch.matmul, Tensor.matmul, Tensor.__matmul__)
def matmul(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor:
    _refuse_out(torch.matmul, (input, other), out)
    return _product(input, other)


@function(Tensor.__rmatmul__)
def rmatmul(right: Tensor, left: Tensor) -> Tensor:
    return _product(left, right)


@function(torch.mm, Tensor.mm)
def mm(input: Tensor, mat2: Tensor, *, out: Tensor | None = None) -> Tensor:
    _refuse_out(torch.mm, (input, mat2), out)
    _check_dims(torch.mm, input, 2, mat2, 2)
    return _product(input, mat2)


@function(torch.mv, Tensor.mv)
def mv(input: Tensor, vec: Tensor, *, out: Tensor | None = None) -> Tensor:
    _refuse_out(torch.mv, (input, vec), out)
    _check_dims(torch.mv, input, 2, vec, 1)
    return _product(input, vec)


@function(torch.addmm, Tensor.addmm)
def addmm(
    input: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: Any = 1,
    alpha: Any = 1,
    out: Tensor | None = None,
) -> Tensor:
    operands = input, mat1, mat2
    _refuse_out(torch.addmm, operands, out)
    _check_dims(torch.addmm, mat1, 2, mat2, 2)
    if is_compressed(input):
        raise _refused(torch.addmm, operands, "only one of the factors may be compressed")
    plain = beta == 1 and alpha == 1 and input.ndim == 1
    if plain and is_compressed(mat2) and not is_compressed(mat1):
        return _by_weight(mat1, mat2.t(), input)
    return combine(input, _product(mat1, mat2), beta, alpha)


def combine(bias: Tensor, product: Tensor, beta: Any, alpha: Any) -> Tensor:
    """``beta * bias + alpha * product``; as in torch, a bias times 0 is ignored, NaN and all."""
    product = product if alpha == 1 else alpha * product
    if beta == 0:
        return product
    bias = bias.expand(product.shape)  # as in torch, only the bias is stretched
    if bias.dtype != product.dtype:
        if not torch.is_autocast_enabled(product.device.type):
            raise RuntimeError(
                f"the matrix to add has dtype {bias.dtype}, the product {product.dtype}; convert one"
            )
        bias = bias.to(product.dtype)
    return product + (bias if beta == 1 else beta * bias)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` with a compressed matrix on one side and any number of dims on the other."""
    if is_compressed(left) == is_compressed(right):
        raise _refused(torch.matmul, (left, right), "both operands are compressed")
    if is_compressed(right):
        return _by_weight(left, right.t(), None)
    if right.ndim == 1:
        return _by_weight(right, left, None)
    return _by_weight(right.mT, left, None).mT


def _by_weight(x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    """``F.linear``: at once where nothing watches, else by an op that takes the weight whole.

    Two passes through the dispatcher cost the host 70 us, more than a small product takes a GPU.
    """
    watched = torch.is_grad_enabled() and weight.requires_grad
    if not watched and _nothing_watches(x, bias, weight.packed):
        if x.is_cuda:
            return multiply_eagerly(x, weight, bias)
        return multiply(x, weight.as_weight(), bias)
    return watched_linear(x, weight, bias)


_PLAIN = (Tensor, torch.nn.Parameter)


def _nothing_watches(*tensors: Tensor | None) -> bool:
    """Whether eager code may compute with the tensors at once: no gradient, mode, transform or autocast."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return False
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None:
            if type(tensor) not in _PLAIN or (grad and tensor.requires_grad):
                return False
            if tensor.is_meta:  # nothing is computed, and autocast does not know the device
                return False
            if torch.is_autocast_enabled(tensor.device.type):
                return False
    return True


def _refuse_out(func: Any, operands: tuple[Any, ...], out: Tensor | None) -> None:
    if out is not None:
        raise _refused(func, (*operands, out), "with out=")


def _check_dims(func: Any, left: Tensor, left_dims: int, right: Tensor, right_dims: int) -> None:
    if left.ndim != left_dims or right.ndim != right_dims:
        raise _refused(
            func,
            (left, right),
            f"takes {left_dims} and {right_dims} dims, got shapes {tuple(left.shape)} and "
            f"{tuple(right.shape)}",
        )


def _refused(func: Any, operands: tuple[Any, ...], why: str) -> UnsupportedOpError:
    return refusal(next(filter(is_compressed, operands), Compressed), func, why)


# the tensor itself ------------------------------------------------------------------------------------


@function(_set_data)
def set_data(target: Tensor, source: Tensor) -> None:
    """``target.data = source``: torch's own setter would change the dtype and leave the parts."""
    kind = type(target if is_compressed(target) else source)
    if not (isinstance(target, kind) and isinstance(source, kind)):
        raise refusal(kind, "Tensor.data", "the new data must be compressed in the same way")
    with torch._C.DisableTorchFunctionSubclass():
        _set_data(target, source)
    held = vars(target)
    held.update({name: part for name, part in vars(source).items() if name in held})


@function(_set_requires_grad)
def set_requires_grad(target: Tensor, value: bool) -> None:
    """``target.requires_grad = value`` calls the method, which int8 values refuse."""
    if isinstance(value, bool):
        target.requires_grad_(value)
        return
    with torch._C.DisableTorchFunctionSubclass():  # for torch's own error
        _set_requires_grad(target, value)


@function(Tensor.__dlpack__, Tensor.__dlpack_device__)
def refuse_exchange(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A wrapper has no memory of its values: a reader would read other memory, or crash."""
    raise _refused("__dlpack__", (tensor,), "hand over to_dense(), or the parts")


@function(Tensor.apply_, Tensor.map_, Tensor.map2_)
def refuse_storage(tensor: Tensor, *others: Any) -> Tensor:
    """These walk over the storage, which a wrapper does not have: torch's own versions crash."""
    raise _refused(Tensor.apply_, (tensor, *others), "")
