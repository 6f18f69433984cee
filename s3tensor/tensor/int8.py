"""``Int8SparseTensor``: a compressed weight whose kept values are int8, with a scale for each row.

For inference: a product with few rows takes as long as reading the weight, and 2:4 with int8 values is 0.31
of the bytes of dense bfloat16, with bfloat16 values 0.56. :func:`s3tensor.quantize_` converts the compressed
weights of a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from s3tensor.errors import CheckpointError, PatternError, UnsupportedOpError
from s3tensor.pattern import BoundPattern
from s3tensor.tensor.base import Compressed, Facts, Rules, refusal, rules_for
from s3tensor.tensor.int8_values import DTYPES, LARGEST, dense_of, to_int8
from s3tensor.tensor.operators import SHARED, copy_parts
from s3tensor.tensor.sparse import StructuredSparseTensor
from s3tensor.tensor.stored import (
    check_description,
    check_parts,
    damage_as_checkpoint_error,
    has_values,
    refuse_unfilled,
    set_attributes,
)

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
        if weight.dtype not in DTYPES:
            raise PatternError(
                f"a weight of {weight.dtype} cannot be quantized; convert it to float32, float16 or bfloat16"
            )
        with torch.no_grad():
            whole: Any = weight.detach()
            dense = whole.t().to_dense() if whole.transposed else whole.to_dense()
            indices = whole.parts()[1]
            packed, scales = to_int8(dense, indices, whole.bound)
        shape, transposed = whole.bound_shape, whole.transposed
        facts = Facts(whole.pattern, shape, transposed=transposed, dtype=whole.dtype)
        return cls(packed, indices.clone(), facts, scales=scales).in_order()

    # what it is ---------------------------------------------------------------------------------------

    def to_dense(self, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
        """Integers times scales, rounded once to ``dtype``, by default the tensor's own: the dense weight."""
        dense = dense_of(self.as_weight(), dtype or self.dtype)
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
        """The weight of untrusted :meth:`parts` and :meth:`description`.

        Raises:
            CheckpointError: parts that no weight has, or a shape out of all proportion to them.
        """
        with damage_as_checkpoint_error(where):
            names = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
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
            pattern, shape, transposed = check_description(packed, indices, description, where)
            check_parts(packed, indices, pattern.bind(shape), (torch.int8,))
            if len(shape) != 2 or tuple(scales.shape) != shape[:1]:
                raise CheckpointError(
                    f"{where}: scales of shape {tuple(scales.shape)} for a weight of {shape}"
                )
        if has_values(packed):
            if not bool(torch.isfinite(scales * LARGEST).all()) or bool((scales < 0).any()):
                raise CheckpointError(f"{where}: its scales are not finite, or negative")
            if packed.numel() and int(packed.amin()) < -LARGEST:
                raise CheckpointError(f"{where}: its values are not of -127 to 127")
        facts = Facts(pattern, shape, transposed=transposed, dtype=dtype)
        made = cls(packed.detach(), indices.detach(), facts, scales=scales.detach())
        return made.in_order()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """As a checkpoint stores it: canonical order, checked on loading."""
        parts = (part.detach().contiguous() for part in self.parts())
        return rebuild_int8, (*parts, self.description(), self.further_attributes())


def class_of(description: Any) -> type[StructuredSparseTensor] | type[Int8SparseTensor]:
    """The class of the tensor that a stored description describes."""
    int8 = isinstance(description, dict) and "values" in description
    return Int8SparseTensor if int8 else StructuredSparseTensor


def rebuild_int8(
    packed: Tensor,
    indices: Tensor,
    scales: Tensor,
    description: dict[str, Any],
    more: dict[str, Any],  # attributes that a user set, and what makes it a parameter
) -> Int8SparseTensor:
    """The weight that ``torch.save`` or ``pickle`` stored; a file names this function.

    Raises:
        CheckpointError: contents that no weight has.
    """
    where = "a pickled weight"
    refuse_unfilled(where)
    made = Int8SparseTensor.from_stored(packed, indices, scales, description, where)
    set_attributes(made, more, where)
    return made


# torch.load(weights_only=True) may call it; the class itself is not listed, as for StructuredSparseTensor.
rebuild_int8.__module__ = "s3tensor.tensor"
torch.serialization.add_safe_globals([rebuild_int8, (rebuild_int8, "s3tensor.int8.rebuild_int8")])


# rules of operators beside those of s3tensor.tensor.operators; none has a gradient ----------------------

dispatch = rules_for(Int8SparseTensor.RULES)


@dispatch(aten._to_copy.default)
def _to_copy(func: Any, args: Any, kwargs: Any) -> Tensor:
    """To another device, or another dtype of products: the integers and the scales keep their values."""
    options = {key: value for key, value in kwargs.items() if key != "memory_format"}
    dtype = options.pop("dtype", None)
    if dtype is not None and dtype not in DTYPES:
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
