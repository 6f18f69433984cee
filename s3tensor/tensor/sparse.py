"""``StructuredSparseTensor``: a weight that satisfies a pattern, kept packed, used like a dense one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from s3tensor.errors import CheckpointError, PatternError
from s3tensor.mask.packing import to_tiles
from s3tensor.pattern import BoundPattern, Pattern
from s3tensor.tensor import linear as paths
from s3tensor.tensor import ops
from s3tensor.tensor.base import Compressed, Rules, refusal, rules_for
from s3tensor.tensor.functions import is_compressed
from s3tensor.tensor.operators import SHARED, copy_parts
from s3tensor.tensor.stored import check_parts, claimed, names_of, reading, set_attributes

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on

aten = torch.ops.aten
Args = tuple[Any, ...]
Kwargs = dict[str, Any]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class StructuredSparseTensor(Compressed):
    """A matrix under a structured-sparsity pattern: packed values and packed indices in a tensor's clothes.

    Shape, dtype and device are those of the dense matrix. Products with a dense operand (``F.linear``,
    ``@``, ``mm``, ``mv``, ``addmm``) run on the packed data, moves and copies keep it packed, and every
    other operator raises :class:`~s3tensor.errors.UnsupportedOpError`. Make one with :meth:`from_dense`.

    Attributes:
        packed: kept blocks, (scopes, keep, block_size), in the tensor's dtype.
        indices: positions of the kept blocks, uint8 stream (:mod:`s3tensor.mask.packing`).
        pattern: the pattern, which binds to ``bound_shape``.
        bound_shape: the shape as packed; the shape of the tensor, or its reverse when ``transposed``.
        transposed: True for a transposed view of the packed data.
        tiled: True when packed and indices are in the order that the CUDA kernels read fastest, which
            weights take on when they come to a GPU; :meth:`parts` gives them in canonical order.
        dense, vendor: a dense copy of the weight and cuSPARSELt's compressed one, or None; kept for
            speed (:meth:`with_memory`), never stored in a checkpoint.

    Example:
        >>> weight = StructuredSparseTensor.from_dense(torch.randn(64, 128), "2:4")
        >>> torch.nn.functional.linear(torch.randn(3, 128), weight).shape
        torch.Size([3, 64])
    """

    dense: Tensor | None
    vendor: Tensor | None

    SECOND_FORMS: ClassVar[tuple[str, ...]] = ("dense", "vendor")
    RULES: ClassVar[Rules] = dict(SHARED)  # and those below the class

    # No __slots__: torch.utils.swap_tensors, which Module.to uses, refuses them.

    @staticmethod
    def __new__(
        cls,
        packed: Tensor,
        indices: Tensor,
        pattern: Pattern | str,  # a string where Dynamo traces the call: it cannot build a Pattern
        shape: tuple[int, ...],
        transposed: bool = False,
        tiled: bool = False,
        dense: Tensor | None = None,
        vendor: Tensor | None = None,
        outer_size: tuple[int, ...] | None = None,
        outer_stride: tuple[int, ...] | None = None,
    ) -> Self:
        if outer_size is None or outer_stride is None:
            stride = [1] * len(shape)
            for dim in reversed(range(len(shape) - 1)):
                stride[dim] = stride[dim + 1] * shape[dim + 1]
            outer_size, outer_stride = tuple(shape), tuple(stride)
            if transposed:
                outer_size, outer_stride = outer_size[::-1], outer_stride[::-1]
        made: Self = Tensor._make_wrapper_subclass(
            cls, outer_size, strides=outer_stride, dtype=packed.dtype, device=packed.device
        )
        return made

    def __init__(
        self,
        packed: Tensor,
        indices: Tensor,
        pattern: Pattern | str,
        shape: tuple[int, ...],
        transposed: bool = False,
        tiled: bool = False,
        dense: Tensor | None = None,
        vendor: Tensor | None = None,
        outer_size: tuple[int, ...] | None = None,
        outer_stride: tuple[int, ...] | None = None,
    ) -> None:
        self.packed = packed
        self.indices = indices
        self.pattern = Pattern.parse(pattern)
        self.bound_shape = shape
        self.transposed = transposed
        self.tiled = tiled
        self.dense = dense
        self.vendor = vendor
        # Made once, for a compiled graph asks for it several times in each call.
        copies = [name for name in self.SECOND_FORMS if getattr(self, name) is not None]
        context = (self.pattern, shape, transposed, tiled)
        self._flat = ["packed", "indices", *copies], context

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
            mask: bool tensor of the weight's shape, True where kept; ``None`` keeps the blocks of the
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
        made = cls(packed, indices, text, tuple(dense.shape))
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
        return cls(packed.detach(), indices.detach(), pattern, bound.shape).in_order()

    # how it is kept -----------------------------------------------------------------------------------

    def parts(self) -> tuple[Tensor, Tensor]:
        """``(packed, indices)`` in canonical order, as :func:`s3tensor.mask.packing.pack` makes them."""
        if not self.tiled:
            return self.packed, self.indices
        return to_tiles(self.packed, self.indices, self.bound, backwards=True)

    def as_parts(self) -> paths.Weight:
        """The weight as :mod:`s3tensor.tensor.linear` takes it."""
        order = self.tiled, self.transposed
        return paths.Weight(self.packed, self.indices, self.bound, *order, self.dense, self.vendor)

    def in_order(self, tiled: bool | None = None) -> Self:
        """The weight with its parts in tile order or in canonical order; by default as its device likes.

        Itself when it is so already. Both orders hold the same bytes.
        """
        if tiled is None:
            tiled = paths.prefers_tiles(self.bound, self.dtype, self.device)
        if tiled == self.tiled:
            return self
        packed, indices = to_tiles(self.packed, self.indices, self.bound, not tiled)
        rest = (self.pattern, self.bound_shape, self.transposed, tiled, self.dense, self.vendor)
        return type(self)(packed, indices, *rest)

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
            ValueError: another word for the memory, or batches that are no range.
        """
        if memory not in ("lean", "fast"):
            raise ValueError(f'memory={memory!r:.40}; it must be "lean" or "fast"')
        first, last = batches
        if not 1 <= first <= last:
            raise ValueError(
                f"batches={batches!r:.40}; give the fewest and the most rows, from 1 on"
            )
        dense = vendor = None
        if memory == "fast":
            keep = paths.worth_keeping(self.bound, self.dtype, self.device, (first, last))
            whole = self._unpacked() if any(keep) else None
            dense = whole if keep[0] else None
            vendor = paths.vendor_copy(whole, self.bound) if whole is not None and keep[1] else None
        rest = (self.pattern, self.bound_shape, self.transposed, self.tiled, dense, vendor)
        return type(self)(self.packed, self.indices, *rest)

    @property
    def memory(self) -> Literal["lean", "fast"]:
        """``"fast"`` when a second form is kept, else ``"lean"``."""
        return "lean" if self.dense is None and self.vendor is None else "fast"

    def refresh_(self) -> StructuredSparseTensor:
        """Make the second forms anew, in place, after the packed values changed."""
        if self.memory == "fast":
            whole = self._unpacked()
            if self.dense is not None:
                self.dense.copy_(whole)
            if self.vendor is not None:
                self.vendor.copy_(paths.vendor_copy(whole, self.bound))
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

    def multiplied(self, x: Tensor, bias: Tensor | None) -> Tensor:
        parts = self.packed, self.indices, bias, str(self.pattern), list(self.bound_shape)
        rest = self.transposed, self.tiled, self.dense, self.vendor
        out: Tensor = torch.ops.s3tensor.linear(x, *parts, *rest)
        return out

    def multiplied_now(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return ops.linear_now(x, self.as_parts(), bias)

    # how it is stored ---------------------------------------------------------------------------------

    @classmethod
    def from_stored(
        cls, packed: Tensor, indices: Tensor, description: Any, where: str = "a stored weight"
    ) -> StructuredSparseTensor:
        """The weight of :meth:`parts` and :meth:`description`, of which nothing is trusted.

        Sizes, dtypes and every index are checked; of tensors on ``meta``, which have no indices to
        check, sizes and dtypes.

        Args:
            where: what to call the weight in errors.

        Raises:
            CheckpointError: what no weight could have given, or a shape that is out of all proportion.
        """
        with reading(where):
            pattern, shape, transposed = claimed(packed, indices, description, where)
            made = cls.from_packed(packed, indices, pattern, shape)
        return made.map_parts(lambda part: part, flip=True) if transposed else made

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """As a checkpoint stores it: canonical order, no second forms (loading makes them anew), checked."""
        packed, indices = (part.detach().contiguous() for part in self.parts())
        described = self.description(), self.memory, self.requires_grad, self.further_attributes()
        return rebuild, (packed, indices, *described)

    # what torch asks of it ----------------------------------------------------------------------------

    @classmethod
    def __tensor_unflatten__(
        cls,
        inner: dict[str, Tensor],
        context: tuple[Any, ...],
        outer_size: tuple[int, ...],
        outer_stride: tuple[int, ...],
    ) -> StructuredSparseTensor:
        # The outer size must be the given one: it may be symbolic where bound_shape is not.
        parts = inner["packed"], inner["indices"]
        copies = inner.get("dense"), inner.get("vendor")
        pattern, shape, transposed, tiled = context
        sizes = outer_size, outer_stride
        return cls(*parts, pattern, shape, transposed, tiled, *copies, *sizes)

    def map_parts(
        self,
        values: Callable[[Tensor], Tensor],
        positions: Callable[[Tensor], Tensor] | None = None,
        flip: bool = False,
        copies: bool = True,
    ) -> Self:
        """The same weight, its parts passed through functions; ``flip`` makes it the transposed view.

        ``copies`` says whether ``values`` makes of the second forms what it makes of the packed values;
        without, the result is lean.
        """
        dense, vendor = (
            values(part) if copies and part is not None else None
            for part in (self.dense, self.vendor)
        )
        return type(self)(
            values(self.packed),
            (positions or values)(self.indices),
            self.pattern,
            self.bound_shape,
            self.transposed ^ flip,
            self.tiled,
            dense,
            vendor,
        )


def rebuild(
    packed: Tensor,
    indices: Tensor,
    description: dict[str, Any],
    memory: Literal["lean", "fast"],
    requires_grad: bool,
    more: dict[str, Any],  # attributes of a user's, and what makes it a parameter
) -> StructuredSparseTensor:
    """The weight that ``torch.save`` or ``pickle`` stored; a file names this function.

    Raises:
        CheckpointError: contents that no weight could have given.
    """
    where = "a pickled weight"
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
        raise PatternError("the weight is compressed already; call .to_dense() to compress it anew")
    if is_traceable_wrapper_subclass(dense):
        raise PatternError(
            f"the weight is a {type(dense).__name__}; compress a plain tensor: its .dequantize(), or a "
            "DTensor's .to_local() or .full_tensor()"
        )
    if dense.layout != torch.strided:
        raise PatternError(f"the weight has layout {dense.layout}; call .to_dense() on it first")
    if dense.dtype not in DTYPES:
        raise PatternError(
            f"a weight of {dense.dtype} cannot be compressed; convert it to one of {names_of(DTYPES)}"
        )


# So that torch.load(weights_only=True) may call it. The class itself is not on the list: a file that could
# make one of its own would get around the checks.
rebuild.__module__ = "s3tensor.tensor"  # what files name it by
torch.serialization.add_safe_globals([rebuild, Pattern, (Pattern, "s3tensor.pattern.Pattern")])


# what operators do beside those of s3tensor.tensor.operators -------------------------------------------

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
