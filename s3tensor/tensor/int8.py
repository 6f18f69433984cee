"""``Int8SparseTensor``: a compressed weight whose kept values are int8, with a scale for each row.

For inference: small batches are as fast as their weights are few bytes, and 2:4 with int8 values is 0.31 of
dense bfloat16, where with bfloat16 values it is 0.56. :func:`s3tensor.quantize_` makes them of the compressed
weights of a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from s3tensor.errors import CheckpointError, PatternError, UnsupportedOpError
from s3tensor.mask.packing import to_tiles
from s3tensor.pattern import BoundPattern, Pattern
from s3tensor.tensor import linear as paths
from s3tensor.tensor import scaled
from s3tensor.tensor.base import Compressed, Rules, refusal, rules_for
from s3tensor.tensor.operators import SHARED, copy_parts
from s3tensor.tensor.sparse import StructuredSparseTensor
from s3tensor.tensor.stored import check_parts, claimed, has_values, reading, set_attributes

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on

aten = torch.ops.aten

VALUES = "int8"  # what a stored description says of the values


class Int8SparseTensor(Compressed):
    """A compressed matrix for inference: packed int8 values, packed indices and a float32 scale for each row.

    Row r of the dense weight is ``scales[r]`` times integers of -127 to 127. Shape and device are those of
    the dense matrix, and dtype is the one that products are computed in: float32, float16 or bfloat16.
    Products with a dense operand (``F.linear``, ``@``, ``mm``, ``mv``, ``addmm``) run on the packed data,
    moves and copies keep it packed, and every other operator raises
    :class:`~s3tensor.errors.UnsupportedOpError`. It does not train. Make one with :meth:`from_sparse`.

    Attributes:
        packed: kept integers, (scopes, keep, block_size) int8.
        indices: positions of the kept blocks, uint8 stream (:mod:`s3tensor.mask.packing`).
        scales: (rows,) float32, of the rows of the matrix as packed; of an ``nn.Linear`` one for each output.
        pattern: the pattern, which binds to ``bound_shape``.
        bound_shape: the shape as packed; the shape of the tensor, or its reverse when ``transposed``.
        transposed: True for a transposed view of the packed data.
        tiled: True when packed and indices are in the order that the CUDA kernels read;
            :meth:`parts` gives them in canonical order.

    Example:
        >>> weight = s3.StructuredSparseTensor.from_dense(torch.randn(64, 128), "2:4")
        >>> small = s3.Int8SparseTensor.from_sparse(weight)
        >>> torch.nn.functional.linear(torch.randn(3, 128), small).shape
        torch.Size([3, 64])
        >>> weight.nbytes_compressed, small.nbytes_compressed
        (17408, 5376)
    """

    scales: Tensor

    PARTS: ClassVar[tuple[str, ...]] = ("packed", "indices", "scales")
    RULES: ClassVar[Rules] = dict(SHARED)  # and those below the class

    @staticmethod
    def __new__(
        cls,
        packed: Tensor,
        indices: Tensor,
        scales: Tensor,
        pattern: Pattern | str,  # a string where Dynamo traces the call: it cannot build a Pattern
        shape: tuple[int, ...],
        dtype: torch.dtype,
        transposed: bool = False,
        tiled: bool = False,
        outer_size: tuple[int, ...] | None = None,
        outer_stride: tuple[int, ...] | None = None,
    ) -> Self:
        if outer_size is None or outer_stride is None:
            rows, columns = shape
            outer_size, outer_stride = (rows, columns), (columns, 1)
            if transposed:
                outer_size, outer_stride = (columns, rows), (1, columns)
        made: Self = Tensor._make_wrapper_subclass(
            cls, outer_size, strides=outer_stride, dtype=dtype, device=packed.device
        )
        return made

    def __init__(
        self,
        packed: Tensor,
        indices: Tensor,
        scales: Tensor,
        pattern: Pattern | str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        transposed: bool = False,
        tiled: bool = False,
        outer_size: tuple[int, ...] | None = None,
        outer_stride: tuple[int, ...] | None = None,
    ) -> None:
        self.packed = packed
        self.indices = indices
        self.scales = scales
        self.pattern = Pattern.parse(pattern)
        self.bound_shape = shape
        self.transposed = transposed
        self.tiled = tiled
        context = (self.pattern, shape, dtype, transposed, tiled)
        self._flat = list(self.PARTS), context

    # making one ---------------------------------------------------------------------------------------

    @classmethod
    def from_sparse(cls, weight: Tensor) -> Int8SparseTensor:
        """The compressed weight with its values rounded to int8.

        The scale of a row is its largest magnitude over 127: no kept value is off by more than half of it.
        Which weights are kept does not change. Taken as data: no gradient flows back.

        Args:
            weight: a ``StructuredSparseTensor`` of two dims, in float32, float16 or bfloat16.

        Raises:
            PatternError: another tensor, another number of dims, or float64.
            NonFiniteError: NaN or Inf in the weight.
        """
        if not isinstance(weight, StructuredSparseTensor):
            raise PatternError(
                f"a {type(weight).__name__} cannot be quantized; compress it first with "
                "StructuredSparseTensor.from_dense, sparsify_ or a pruner"
            )
        if weight.ndim != 2:
            raise PatternError(
                f"a weight of shape {tuple(weight.shape)} cannot be quantized; int8 values are for matrices"
            )
        if weight.dtype not in scaled.DTYPES:
            raise PatternError(
                f"a weight of {weight.dtype} cannot be quantized; convert it to float32, float16 or bfloat16"
            )
        with torch.no_grad():
            whole: Any = weight.detach()
            dense = whole.t().to_dense() if whole.transposed else whole.to_dense()
            indices = whole.parts()[1]
            packed, scales = scaled.to_int8(dense, indices, whole.bound)
        facts = whole.pattern, whole.bound_shape, whole.dtype, whole.transposed
        return cls(packed, indices.clone(), scales, *facts).in_order()

    # how it is kept -----------------------------------------------------------------------------------

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(packed, indices, scales)``, the first two in canonical order."""
        if not self.tiled:
            return self.packed, self.indices, self.scales
        packed, indices = to_tiles(self.packed, self.indices, self.bound, backwards=True)
        return packed, indices, self.scales

    def as_parts(self) -> scaled.Int8Weight:
        """The weight as :mod:`s3tensor.tensor.scaled` takes it."""
        parts = self.packed, self.indices, self.scales
        return scaled.Int8Weight(*parts, self.bound, self.tiled, self.transposed)

    def in_order(self, tiled: bool | None = None) -> Self:
        """The weight with its parts in tile order or in canonical order; by default as its device likes."""
        if tiled is None:
            tiled = paths.prefers_tiles(self.bound, self.dtype, self.device)
        if tiled == self.tiled:
            return self
        packed, indices = to_tiles(self.packed, self.indices, self.bound, not tiled)
        facts = self.pattern, self.bound_shape, self.dtype, self.transposed, tiled
        return type(self)(packed.contiguous(), indices.contiguous(), self.scales, *facts)

    # what it is ---------------------------------------------------------------------------------------

    def to_dense(self, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
        """Integers times scales, rounded once to ``dtype``, by default the tensor's own: the dense weight."""
        dense = scaled.dense_of(self.as_parts(), dtype or self.dtype)
        return dense.t() if self.transposed else dense

    @classmethod
    def part_sizes(
        cls, bound: BoundPattern, dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each of ``PARTS``; they are the same for every dtype of products."""
        return {
            "packed": (bound.packed_shape, torch.int8),
            "indices": ((bound.index_bytes,), torch.uint8),
            "scales": (bound.shape[:1], torch.float32),
        }

    @property
    def floats(self) -> Tensor:
        return self.scales

    @property
    def nbytes_compressed(self) -> int:
        """Bytes of values, indices and scales."""
        return self.bound.packed_bytes(1) + 4 * self.bound_shape[0]

    def multiplied(self, x: Tensor, bias: Tensor | None) -> Tensor:
        self._check_dtype(x)
        parts = self.packed, self.indices, self.scales, bias, str(self.pattern)
        order = list(self.bound_shape), self.transposed, self.tiled
        out: Tensor = torch.ops.s3tensor.linear_int8(x, *parts, *order)
        return out

    def multiplied_now(self, x: Tensor, bias: Tensor | None) -> Tensor:
        self._check_dtype(x)
        return scaled.linear(x, self.as_parts(), bias)

    def _check_dtype(self, x: Tensor) -> None:
        torch._check(
            x.dtype == self.dtype,
            lambda: f"linear: x is {x.dtype} and the weight {self.dtype}; convert one with .to()",
        )

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Only ``False``: integers do not train.

        Raises:
            UnsupportedOpError: for ``True``.
        """
        if requires_grad:
            raise UnsupportedOpError(
                f"an {type(self).__name__} has no gradient, its values are integers: make the parameter with "
                "requires_grad=False, or call model.requires_grad_(False) before load_state_dict; to train, "
                "keep the StructuredSparseTensor and quantize it afterwards"
            )
        return self

    # how it is stored ---------------------------------------------------------------------------------

    def description(self) -> dict[str, Any]:
        """What a checkpoint holds beside :meth:`parts`, as JSON can."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {**super().description(), "values": VALUES, "dtype": dtype}

    @classmethod
    def from_stored(
        cls,
        packed: Tensor,
        indices: Tensor,
        scales: Tensor,
        description: Any,
        where: str = "a stored weight",
    ) -> Int8SparseTensor:
        """The weight of :meth:`parts` and :meth:`description`, of which nothing is trusted.

        Raises:
            CheckpointError: what no weight could have given, or a shape that is out of all proportion.
        """
        with reading(where):
            names = {str(dtype).removeprefix("torch."): dtype for dtype in scaled.DTYPES}
            dtype = names.get(description["dtype"])
            if description["values"] != VALUES or dtype is None:
                raise CheckpointError(
                    f"{where}: values {description['values']!r:.20} or dtype {description['dtype']!r:.20} is "
                    "unknown; update s3tensor"
                )
            for part, kind in ((packed, torch.int8), (scales, torch.float32)):
                if part.dtype != kind or part.layout != torch.strided or not part.is_contiguous():
                    raise CheckpointError(
                        f"{where}: its {kind} parts are {part.dtype}, or not contiguous"
                    )
            if scales.device != packed.device:
                raise CheckpointError(f"{where}: its parts are on different devices")
            pattern, shape, transposed = claimed(packed, indices, description, where)
            check_parts(packed, indices, pattern.bind(shape), (torch.int8,))
            if len(shape) != 2 or tuple(scales.shape) != shape[:1]:
                raise CheckpointError(
                    f"{where}: scales of shape {tuple(scales.shape)} for a weight of {shape}"
                )
        if has_values(packed):
            if not bool(torch.isfinite(scales * scaled.LARGEST).all()) or bool((scales < 0).any()):
                raise CheckpointError(f"{where}: its scales are not finite, or negative")
            if packed.numel() and int(packed.amin()) < -scaled.LARGEST:
                raise CheckpointError(f"{where}: its values are not of -127 to 127")
        parts = packed.detach(), indices.detach(), scales.detach()
        return cls(*parts, pattern, shape, dtype, transposed).in_order()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """As a checkpoint stores it: canonical order, checked on loading."""
        parts = (part.detach().contiguous() for part in self.parts())
        return rebuild_int8, (*parts, self.description(), self.further_attributes())

    # what torch asks of it ----------------------------------------------------------------------------

    @classmethod
    def __tensor_unflatten__(
        cls,
        inner: dict[str, Tensor],
        context: tuple[Any, ...],
        outer_size: tuple[int, ...],
        outer_stride: tuple[int, ...],
    ) -> Int8SparseTensor:
        parts = inner["packed"], inner["indices"], inner["scales"]
        pattern, shape, dtype, transposed, tiled = context
        return cls(*parts, pattern, shape, dtype, transposed, tiled, outer_size, outer_stride)

    def map_parts(
        self,
        values: Callable[[Tensor], Tensor],
        *,
        flip: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The same weight, its parts passed through a function; ``flip`` makes it the transposed view."""
        parts = values(self.packed), values(self.indices), values(self.scales)
        dtype = dtype or self.dtype
        order = self.transposed ^ flip, self.tiled
        return type(self)(*parts, self.pattern, self.bound_shape, dtype, *order)


def class_of(description: Any) -> type[StructuredSparseTensor] | type[Int8SparseTensor]:
    """Which tensor a stored description is of."""
    int8 = isinstance(description, dict) and "values" in description
    return Int8SparseTensor if int8 else StructuredSparseTensor


def rebuild_int8(
    packed: Tensor,
    indices: Tensor,
    scales: Tensor,
    description: dict[str, Any],
    more: dict[str, Any],  # attributes of a user's, and what makes it a parameter
) -> Int8SparseTensor:
    """The weight that ``torch.save`` or ``pickle`` stored; a file names this function.

    Raises:
        CheckpointError: contents that no weight could have given.
    """
    where = "a pickled weight"
    made = Int8SparseTensor.from_stored(packed, indices, scales, description, where)
    set_attributes(made, more, where)
    return made


# So that torch.load(weights_only=True) may call it; the class itself is not on the list, as for
# StructuredSparseTensor.
rebuild_int8.__module__ = "s3tensor.tensor"
torch.serialization.add_safe_globals([rebuild_int8, (rebuild_int8, "s3tensor.int8.rebuild_int8")])


# what operators do beside those of s3tensor.tensor.operators; nothing has a gradient --------------------

dispatch = rules_for(Int8SparseTensor.RULES)


@dispatch(aten._to_copy.default)
def _to_copy(func: Any, args: Any, kwargs: Any) -> Tensor:
    """On another device, or computed in another dtype: the integers and the scales stay what they are."""
    options = {key: value for key, value in kwargs.items() if key != "memory_format"}
    dtype = options.pop("dtype", None)
    if dtype is not None and dtype not in scaled.DTYPES:
        raise refusal(
            Int8SparseTensor, func, f"to {dtype}; products are in float32, float16 or bfloat16"
        )
    if options.pop("layout", None) not in (None, torch.strided):
        raise refusal(Int8SparseTensor, func, "to another layout")
    move = {key: value for key, value in options.items() if value is not None}
    made = args[0].map_parts(lambda part: func(part, **move), dtype=dtype)
    return made.in_order()  # of its new device and dtype


@dispatch(aten.copy_.default)
def _copy_(func: Any, args: Any, kwargs: Any) -> Any:
    if not all(isinstance(t, Int8SparseTensor) for t in args[:2]):
        raise refusal(
            Int8SparseTensor,
            func,
            "only weights of the same form are copied into each other; load the state dict with "
            "assign=True, or make a new weight with Int8SparseTensor.from_sparse",
        )
    return copy_parts(func, args, kwargs)
