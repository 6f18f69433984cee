"""``StructuredSparseTensor``: a weight that satisfies a pattern, kept packed, used like a dense one."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from s3tensor.errors import CheckpointError, OptionError, PatternError
from s3tensor.modes import check_real
from s3tensor.pattern import BoundPattern, Pattern
from s3tensor.tensor import cusparselt, ops
from s3tensor.tensor.base import Compressed, Facts, Rules, refusal, rules_for
from s3tensor.tensor.functions import is_compressed
from s3tensor.tensor.linear import worth_keeping
from s3tensor.tensor.operators import SHARED, copy_parts, packed_like
from s3tensor.tensor.stored import (
    check_description,
    check_parts,
    damage_as_checkpoint_error,
    names_of,
    refuse_unfilled,
    set_attributes,
)

aten = torch.ops.aten
Args = tuple[Any, ...]
Kwargs = dict[str, Any]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class StructuredSparseTensor(Compressed):
    """A matrix under a structured-sparsity pattern: a tensor that holds packed values and packed indices.

    Shape, dtype and device are those of the dense matrix. Products with a dense operand (``F.linear``,
    ``@``, ``mm``, ``mv``, ``addmm``) run on the packed data, moves and copies keep it packed, and every
    other operator raises :class:`~s3tensor.errors.UnsupportedOpError`. Make one with :meth:`from_dense`.

    Attributes:
        packed: kept blocks, (scopes, keep, block_size), in the tensor's dtype.
        indices: positions of the kept blocks, uint8 stream (:mod:`s3tensor.mask.packing`).
        pattern: the pattern, which binds to ``bound_shape``.
        bound_shape: the shape as packed; the shape of the tensor, or its reverse when ``transposed``.
        transposed: True for a transposed view of the packed data.
        tiled: True when packed and indices are in the order that the CUDA kernels read fastest, as
            weights on a GPU are; :meth:`parts` gives them in canonical order.
        dense, vendor: a dense copy of the weight and cuSPARSELt's compressed copy, or None; kept for
            speed (:meth:`with_memory`), never stored in a checkpoint.

    Example:
        >>> weight = StructuredSparseTensor.from_dense(torch.randn(64, 128), "2:4")
        >>> torch.nn.functional.linear(torch.randn(3, 128), weight).shape
        torch.Size([3, 64])
    """

    COPIES: ClassVar[tuple[str, ...]] = ("dense", "vendor")
    RULES: ClassVar[Rules] = dict(SHARED)  # and those below the class

    # making one ---------------------------------------------------------------------------------------

    @classmethod
    def from_dense(
        cls, dense: Tensor, pattern: Pattern | str, mask: Tensor | None = None
    ) -> StructuredSparseTensor:
        """Compress ``dense * mask``.

        Args:
            dense: weight of float32, float16, bfloat16 or float64, of any strides. Taken as data: no
                gradient flows back to it (train with :class:`s3tensor.S3Sparse`).
            pattern: a pattern or its string.
            mask: bool tensor of the weight's shape, True where kept; ``None`` keeps the blocks of
                largest magnitude (:func:`s3tensor.project`).

        Raises:
            PatternError: a pattern that does not fit the shape, a mask that does not fit the pattern, or
                a weight of a dtype that is not supported.
            NonFiniteError: NaN or Inf in the weight.
        """
        _check_dense(dense)
        text = str(pattern)
        dense = dense.detach()
        if mask is None:
            mask = ops.project(dense, text)
        packed, indices = ops.pack(dense, mask, text)
        shape = tuple(dense.shape)
        made = cls(packed, indices, Facts(text, shape))
        return made.in_order() if dense.is_cuda and not torch.compiler.is_compiling() else made

    @classmethod
    def from_packed(
        cls,
        packed: Tensor,  # (scopes, keep, block_size)
        indices: Tensor,  # (index_bytes,) uint8
        pattern: Pattern | str,
        shape: tuple[int, ...],
    ) -> StructuredSparseTensor:
        """Wrap data that :func:`s3tensor.mask.packing.pack` made; sizes and dtypes are checked, contents not.

        Raises:
            PatternError: sizes, dtypes or devices that the pattern on ``shape`` does not have.
        """
        pattern = Pattern.parse(pattern)
        bound = pattern.bind(shape)
        check_parts(packed, indices, bound, DTYPES)
        facts = Facts(pattern, bound.shape)
        return cls(packed.detach(), indices.detach(), facts).in_order()

    # how it is kept -----------------------------------------------------------------------------------

    def with_memory(
        self, memory: Literal["lean", "fast"], batches: tuple[int, int] = (1, 4096)
    ) -> StructuredSparseTensor:
        """The same weight, kept for few bytes or for speed.

        Args:
            memory: ``"lean"`` keeps the compressed form alone. ``"fast"`` keeps a dense copy, cuSPARSELt's
                compressed copy or both beside it, where that was measured to be faster.
            batches: the fewest and the most rows of x to be fast for.

        Returns:
            a tensor that shares the compressed form with this one; ``nbytes_held`` is what it costs.

        Raises:
            OptionError: another word for the memory, or batches that are not a range.
        """
        if memory not in ("lean", "fast"):
            raise OptionError(f'memory={memory!r:.40}; it must be "lean" or "fast"')
        first, last = batches
        if not 1 <= first <= last:
            raise OptionError(
                f"batches={batches!r:.40}; give the fewest and the most rows, from 1 on"
            )
        if memory == "lean":
            return self._with(dense=None, vendor=None)
        keep = worth_keeping(self.bound, self.dtype, self.device, (first, last))
        dense = self._unpacked() if any(keep) else None
        vendor = None if dense is None or not keep[1] else cusparselt.compress(dense, self.bound)
        return self._with(dense=dense if keep[0] else None, vendor=vendor)

    @property
    def memory(self) -> Literal["lean", "fast"]:
        """``"fast"`` when a copy is kept beside the packed parts, else ``"lean"``."""
        return "lean" if self.dense is None and self.vendor is None else "fast"

    def refresh_(self) -> StructuredSparseTensor:
        """Update the copies in place after the packed values changed."""
        if self.memory == "fast":
            whole = self._unpacked()
            if self.dense is not None:
                self.dense.copy_(whole)
            if self.vendor is not None:
                self.vendor.copy_(cusparselt.compress(whole, self.bound))
        return self

    def _unpacked(self) -> Tensor:
        shape = list(self.bound_shape)
        return ops.unpack(self.packed, self.indices, str(self.pattern), shape, self.tiled)

    # what it is ---------------------------------------------------------------------------------------

    def to_dense(self, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
        """The dense tensor of the same shape, contiguous unless transposed. Data: no gradient flows back."""
        dense = self._unpacked()
        dense = dense if dtype is None else dense.to(dtype)
        return dense.t() if self.transposed else dense

    @classmethod
    def part_sizes(
        cls, bound: BoundPattern, dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each of ``PARTS``, for a weight of ``dtype``."""
        return {
            "packed": (bound.packed_shape, dtype),
            "indices": ((bound.index_bytes,), torch.uint8),
        }

    @property
    def nbytes_compressed(self) -> int:
        """Bytes of values and indices."""
        return self.bound.packed_bytes(self.dtype.itemsize)

    # how it is stored ---------------------------------------------------------------------------------

    @classmethod
    def from_stored(
        cls, packed: Tensor, indices: Tensor, description: Any, where: str = "a stored weight"
    ) -> StructuredSparseTensor:
        """The weight of untrusted :meth:`parts` and :meth:`description`.

        Sizes, dtypes and every index are checked; of tensors on ``meta``, which have no indices to
        check, sizes and dtypes.

        Args:
            where: what to call the weight in errors.

        Raises:
            CheckpointError: parts that no weight has, or a shape out of all proportion to them.
        """
        with damage_as_checkpoint_error(where):
            pattern, shape, transposed = check_description(packed, indices, description, where)
            made = cls.from_packed(packed, indices, pattern, shape)
        return made.map_parts(lambda part: part, flip=True) if transposed else made

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """As a checkpoint stores it: canonical order, without copies (loading makes them), checked."""
        packed, indices = (part.detach().contiguous() for part in self.parts())
        described = self.description(), self.memory, self.requires_grad, self.further_attributes()
        return rebuild, (packed, indices, *described)


def rebuild(
    packed: Tensor,
    indices: Tensor,
    description: dict[str, Any],
    memory: Literal["lean", "fast"],
    requires_grad: bool,
    more: dict[str, Any],  # attributes that a user set, and what makes it a parameter
) -> StructuredSparseTensor:
    """The weight that ``torch.save`` or ``pickle`` stored; a file names this function.

    Raises:
        CheckpointError: contents that no weight has.
    """
    where = "a pickled weight"
    refuse_unfilled(where)
    made = StructuredSparseTensor.from_stored(packed, indices, description, where)
    if memory not in ("lean", "fast") or type(requires_grad) is not bool:
        raise CheckpointError(f"{where}: its memory or requires_grad is damaged")
    made = made.with_memory(memory) if memory == "fast" else made
    set_attributes(made, more, where)
    made.requires_grad_(requires_grad)
    return made


def _check_dense(dense: Tensor) -> None:
    if not isinstance(dense, Tensor):
        raise PatternError(f"from_dense takes a tensor, got {type(dense).__name__}")
    if isinstance(dense, Compressed):
        raise PatternError(
            "the weight is compressed already; call .to_dense() to compress it again"
        )
    if is_traceable_wrapper_subclass(dense):
        raise PatternError(
            f"the weight is a {type(dense).__name__}; compress a plain tensor: its .dequantize(), or a "
            "DTensor's .to_local() or .full_tensor()"
        )
    check_real(dense)
    if dense.layout != torch.strided:
        raise PatternError(f"the weight has layout {dense.layout}; call .to_dense() on it first")
    if dense.dtype not in DTYPES:
        raise PatternError(
            f"a weight of {dense.dtype} cannot be compressed; convert it to one of {names_of(DTYPES)}"
        )


# torch.load(weights_only=True) may call it. The class itself is not listed: a file that made one directly
# would bypass the checks.
rebuild.__module__ = "s3tensor.tensor"  # what files name it by
torch.serialization.add_safe_globals([rebuild, Pattern, (Pattern, "s3tensor.pattern.Pattern")])


# rules of operators beside those of s3tensor.tensor.operators ------------------------------------------

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
    return packed_like(grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1]), weight)
