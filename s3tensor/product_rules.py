"""Rules for the functions by which users multiply with a compressed matrix, all in terms of ``F.linear``.

``@``, ``mm``, ``mv`` and ``addmm`` on a tensor subclass come to it as these functions; each goes to one
product of rows of x by the weight, which a compiler sees whole.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from s3tensor.errors import UnsupportedOpError

set_data = Tensor.data.__set__  # type: ignore[attr-defined]  # Tensor.data is a descriptor


def combine(bias: Tensor, product: Tensor, beta: Any, alpha: Any) -> Tensor:
    """``beta * bias + alpha * product``; as in torch, a bias times 0 is ignored, NaN and all."""
    product = product if alpha == 1 else alpha * product
    if beta == 0:
        return product
    return product + (bias if beta == 1 else beta * bias)


@dataclass(frozen=True)
class Products:
    """The rules of one class of compressed matrices."""

    is_compressed: Callable[[Any], bool]
    refusal: Callable[..., UnsupportedOpError]  # (function, why)
    multiply: Callable[[Tensor, Any, Tensor | None], Tensor]  # F.linear(x, weight, bias)
    alike: str  # what new data of such a tensor must be

    def register(self, rules: MutableMapping[Any, Callable[..., Any]]) -> None:
        """Add ``rule(*args, **kwargs)`` for each function, with the function's own arguments."""
        rules[F.linear] = self.linear
        rules.update(dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), self.matmul))
        rules[Tensor.__rmatmul__] = self.rmatmul
        rules.update(dict.fromkeys((torch.mm, Tensor.mm), self.mm))
        rules.update(dict.fromkeys((torch.mv, Tensor.mv), self.mv))
        rules.update(dict.fromkeys((torch.addmm, Tensor.addmm), self.addmm))
        rules[set_data] = self.set_data
        walkers = Tensor.apply_, Tensor.map_, Tensor.map2_
        rules.update(dict.fromkeys(walkers, self.refuse_storage))

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        compressed = self.is_compressed
        if not compressed(weight) or compressed(input) or compressed(bias):
            raise self.refusal(F.linear, "only the weight may be compressed")
        return self.multiply(input, weight, bias)

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """``left @ right`` with a compressed matrix on one side and any number of dims on the other."""
        if self.is_compressed(left) == self.is_compressed(right):
            raise self.refusal(torch.matmul, "both operands are compressed")
        if self.is_compressed(right):
            return self.multiply(left, right.t(), None)
        if right.ndim == 1:
            return self.multiply(right, left, None)
        return self.multiply(right.mT, left, None).mT

    def matmul(self, input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor:
        self._refuse_out(torch.matmul, out)
        return self.product(input, other)

    def rmatmul(self, right: Tensor, left: Tensor) -> Tensor:
        return self.product(left, right)

    def mm(self, input: Tensor, mat2: Tensor, *, out: Tensor | None = None) -> Tensor:
        self._refuse_out(torch.mm, out)
        self._check_dims(torch.mm, input, 2, mat2, 2)
        return self.product(input, mat2)

    def mv(self, input: Tensor, vec: Tensor, *, out: Tensor | None = None) -> Tensor:
        self._refuse_out(torch.mv, out)
        self._check_dims(torch.mv, input, 2, vec, 1)
        return self.product(input, vec)

    def addmm(
        self,
        input: Tensor,
        mat1: Tensor,
        mat2: Tensor,
        *,
        beta: Any = 1,
        alpha: Any = 1,
        out: Tensor | None = None,
    ) -> Tensor:
        self._refuse_out(torch.addmm, out)
        self._check_dims(torch.addmm, mat1, 2, mat2, 2)
        compressed = self.is_compressed
        if compressed(input):
            raise self.refusal(torch.addmm, "only one of the factors may be compressed")
        plain = beta == 1 and alpha == 1 and input.ndim == 1
        if plain and compressed(mat2) and not compressed(mat1):
            return self.multiply(mat1, mat2.t(), input)
        return combine(input, self.product(mat1, mat2), beta, alpha)

    def set_data(self, target: Tensor, source: Tensor) -> None:
        """``target.data = source``: torch's own setter would change the dtype and leave the parts."""
        if not (self.is_compressed(target) and self.is_compressed(source)):
            raise self.refusal("Tensor.data", f"the new data must be {self.alike}")
        with torch._C.DisableTorchFunctionSubclass():
            set_data(target, source)
        held = vars(target)
        held.update({name: part for name, part in vars(source).items() if name in held})

    def refuse_storage(self, *args: Any) -> Tensor:
        """These walk over the storage, which a wrapper does not have: torch's own version crashes."""
        raise self.refusal(Tensor.apply_)

    def _refuse_out(self, func: Any, out: Tensor | None) -> None:
        if out is not None:
            raise self.refusal(func, "with out=")

    def _check_dims(
        self, func: Any, left: Tensor, left_dims: int, right: Tensor, right_dims: int
    ) -> None:
        if left.ndim != left_dims or right.ndim != right_dims:
            raise self.refusal(
                func,
                f"takes {left_dims} and {right_dims} dims, got shapes {tuple(left.shape)} and "
                f"{tuple(right.shape)}",
            )
