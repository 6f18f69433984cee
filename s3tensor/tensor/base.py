"""``Compressed``: what all tensors have in common that hold a matrix as packed parts."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from s3tensor.errors import UnsupportedOpError
from s3tensor.mask.packing import to_tiles, unpack_mask
from s3tensor.pattern import BoundPattern, Pattern
from s3tensor.tensor.linear import prefers_tiles
from s3tensor.tensor.weight import Weight

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on

Rule = TypeVar("Rule", bound=Callable[..., Any])
Rules = dict[Any, Callable[..., Any]]

# Counts what ``__tensor_flatten__`` gives: a graph in torch's cache on disk was made for one of these.
_CONTEXT = 2

# Rules for the functions that users call on any compressed tensor, rule(*args, **kwargs), filled by
# ``s3tensor.tensor.functions``. Below them each class has rules for the operators of aten.
FUNCTION_RULES: Rules = {}


class Facts(NamedTuple):
    """What a compressed tensor knows of itself beside its tensors."""

    pattern: Pattern | str  # a string only where Dynamo traces a call: it cannot build a Pattern
    bound_shape: tuple[int, ...]
    transposed: bool = False
    tiled: bool = False
    dtype: torch.dtype | None = None  # of products; None: that of the packed values


class Compressed(Tensor):
    """A matrix under a structured-sparsity pattern: a tensor that holds packed parts.

    Shape, dtype and device are those of the dense matrix. An operator without a rule raises
    :class:`~s3tensor.errors.UnsupportedOpError`: nothing densifies in silence.

    A class of these names its parts in ``PARTS`` and ``COPIES`` and has the methods below that raise
    NotImplementedError. The constructor checks nothing.

    Attributes:
        packed: kept blocks, (scopes, keep, block_size).
        indices: positions of the kept blocks, uint8 stream (:mod:`s3tensor.mask.packing`).
        pattern: the pattern, which binds to ``bound_shape``.
        bound_shape: the shape as packed; the shape of the tensor, or its reverse when ``transposed``.
        transposed: True for a transposed view of the packed data.
        tiled: True when packed and indices are in the order that the CUDA kernels read fastest;
            :meth:`parts` gives them in canonical order.
    """

    packed: Tensor
    indices: Tensor  # type: ignore[assignment]  # Tensor.indices() is of torch's own sparse tensors
    pattern: Pattern
    bound_shape: tuple[int, ...]
    transposed: bool
    tiled: bool
    dense: Tensor | None
    vendor: Tensor | None
    scales: Tensor | None
    # What ``__tensor_flatten__`` gives: the names of the tensors that are there, and the facts.
    _flat: tuple[list[str], Facts]
    traced_as: str  # the facts, for an operator in a graph; empty where it does not take the weight
    _ready: Any  # products whose launch is ready (:mod:`s3tensor.tensor.ready`), or None

    PARTS: ClassVar[tuple[str, ...]] = ("packed", "indices")  # what a checkpoint stores
    COPIES: ClassVar[tuple[str, ...]] = ()  # made from the parts, for speed; each may be None
    RULES: ClassVar[Rules]  # rule(func, args, kwargs), by aten overload

    # No __slots__: torch.utils.swap_tensors, which Module.to uses, refuses them.

    @staticmethod
    def __new__(
        cls,
        packed: Tensor,
        indices: Tensor,
        facts: Facts,
        *,
        scales: Tensor | None = None,
        dense: Tensor | None = None,
        vendor: Tensor | None = None,
        outer_size: tuple[int, ...] | None = None,
        outer_stride: tuple[int, ...] | None = None,
    ) -> Self:
        if outer_size is None or outer_stride is None:
            outer_size = tuple(facts.bound_shape)
            stride = [1] * len(outer_size)
            for dim in reversed(range(len(stride) - 1)):
                stride[dim] = stride[dim + 1] * outer_size[dim + 1]
            outer_stride = tuple(stride)
            if facts.transposed:
                outer_size, outer_stride = outer_size[::-1], outer_stride[::-1]
        dtype = packed.dtype if facts.dtype is None else facts.dtype
        made: Self = Tensor._make_wrapper_subclass(
            cls, outer_size, strides=outer_stride, dtype=dtype, device=packed.device
        )
        return made

    def __init__(
        self,
        packed: Tensor,
        indices: Tensor,
        facts: Facts,
        *,
        scales: Tensor | None = None,
        dense: Tensor | None = None,
        vendor: Tensor | None = None,
        outer_size: tuple[int, ...] | None = None,
        outer_stride: tuple[int, ...] | None = None,
    ) -> None:
        if isinstance(facts.pattern, str):
            facts = facts._replace(pattern=Pattern.parse(facts.pattern))
        self.packed = packed
        self.indices = indices
        self.scales = scales
        self.dense = dense
        self.vendor = vendor
        self.pattern = facts.pattern  # type: ignore[assignment]  # no string any more
        self.bound_shape = facts.bound_shape
        self.transposed = facts.transposed
        self.tiled = facts.tiled
        self._ready = None
        self.traced_as = "" if self._has_copies() or len(self.bound_shape) != 2 else _text(facts)
        # Made once: a compiled graph asks for it several times in each call.
        names = list(self.PARTS)
        for name in self.COPIES:
            if getattr(self, name) is not None:
                names.append(name)
        if type(packed) is Tensor and packed.is_cuda:
            for name in names:  # as parameters are: a CUDA graph reads them where they lie
                getattr(self, name)._dynamo_static_input_type = "unguarded"
        self._flat = names, facts

    def _has_copies(self) -> bool:
        return any(getattr(self, name) is not None for name in self.COPIES)

    def _with(self, **changes: Any) -> Self:
        """The same tensors and facts, but for the given ones."""
        names, facts = self._flat
        new = {name: changes.pop(name) for name in Facts._fields if name in changes}
        held = {name: getattr(self, name) for name in names if name not in changes}
        return type(self)(facts=facts._replace(**new) if new else facts, **held, **changes)

    # what each class does in its own way --------------------------------------------------------------

    def to_dense(self, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
        """The dense matrix."""
        raise NotImplementedError

    @classmethod
    def part_sizes(
        cls, bound: BoundPattern, dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each of ``PARTS``, for a weight of ``dtype``."""
        raise NotImplementedError

    @property
    def floats(self) -> Tensor:
        """The part that could hold NaN or Inf."""
        return self.packed

    @property
    def nbytes_compressed(self) -> int:
        """Bytes of the stored parts."""
        raise NotImplementedError

    # how it is kept -----------------------------------------------------------------------------------

    def parts(self) -> tuple[Tensor, ...]:
        """The tensors of ``PARTS``, values and indices in canonical order."""
        packed, indices, *more = (getattr(self, name) for name in self.PARTS)
        if self.tiled:
            packed, indices = to_tiles(packed, indices, self.bound, backwards=True)
        return packed, indices, *more

    def as_weight(self) -> Weight:
        """The weight as :mod:`s3tensor.tensor.linear` takes it."""
        return Weight(
            self.packed,
            self.indices,
            self.bound,
            tiled=self.tiled,
            transposed=self.transposed,
            dense=self.dense,
            vendor=self.vendor,
            scales=self.scales,
            computed_in=self._flat[1].dtype,
        )

    def in_order(self, tiled: bool | None = None) -> Self:
        """The weight in tile order or in canonical order; by default in the order that its device prefers.

        Itself when it is so already. Both orders hold the same bytes.
        """
        if tiled is None:
            tiled = prefers_tiles(self.bound, self.dtype, self.device)
        if tiled == self.tiled:
            return self
        packed, indices = to_tiles(self.packed, self.indices, self.bound, not tiled)
        return self._with(packed=packed.contiguous(), indices=indices.contiguous(), tiled=tiled)

    def map_parts(
        self,
        values: Callable[[Tensor], Tensor],
        positions: Callable[[Tensor], Tensor] | None = None,
        *,
        flip: bool = False,
        copies: bool = True,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The same weight, its tensors passed through functions.

        Args:
            values: for every tensor.
            positions: for the indices; by default ``values``.
            flip: makes it the transposed view.
            copies: whether ``values`` makes of the copies what it makes of the packed values; without,
                the result has none.
            dtype: another dtype of products, for int8 values.
        """
        names, facts = self._flat
        made: dict[str, Any] = {}
        for name in names if copies else self.PARTS:
            through = values if positions is None or name != "indices" else positions
            made[name] = through(getattr(self, name))
        if flip or dtype is not None:
            pattern, shape, transposed, tiled, kind = facts
            facts = Facts(pattern, shape, transposed ^ flip, tiled, dtype or kind)
        return type(self)(facts=facts, **made)

    # what it is ---------------------------------------------------------------------------------------

    @property
    def bound(self) -> BoundPattern:
        """The pattern on the shape as packed (``bound.shape``; reversed when ``transposed``)."""
        return _bound(self.pattern, self.pattern.name, self.bound_shape)

    @property
    def density(self) -> float:
        """Stored fraction of the weights."""
        return self.bound.density

    @property
    def nbytes_held(self) -> int:
        """Bytes of all that is kept: the stored parts, and the copies beside them."""
        copies = (getattr(self, name) for name in self.COPIES)
        return self.nbytes_compressed + sum(copy.nbytes for copy in copies if copy is not None)

    def mask(self) -> Tensor:
        """Bool tensor of the tensor's shape, True at the positions that are stored."""
        kept = unpack_mask(self.parts()[1], self.bound)
        return kept.t() if self.transposed else kept

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense tensor: the name that torchao and Hugging Face know for it."""
        return self.to_dense(dtype)

    def same_layout(self, other: Tensor) -> bool:
        """True when ``other`` has the same kind of parts, pattern, shape, order and orientation."""
        return isinstance(other, Compressed) and self._layout() == other._layout()

    def _layout(self) -> tuple[Any, ...]:
        return self.PARTS, self.pattern, self.bound_shape, self.transposed, self.tiled

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        grad = ", requires_grad=True" if self.requires_grad else ""
        stored, held = self.nbytes_compressed, self.nbytes_held
        copies = "" if held == stored else f", {held} with copies for speed"
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, pattern={self.pattern}"
            f"{', transposed' if self.transposed else ''}, density={self.density:.4g}, "
            f"dtype={self.dtype}, device='{self.device}', bytes={stored} of "
            f"{self.numel() * self.dtype.itemsize} dense{copies}{grad})"
        )

    def description(self) -> dict[str, Any]:
        """What a checkpoint holds beside :meth:`parts`, for JSON: pattern, label, shape, transposed."""
        return {
            "pattern": self.pattern.parts,
            "label": str(self.pattern),
            "shape": list(self.bound.shape),
            "transposed": self.transposed,
        }

    # copies -------------------------------------------------------------------------------------------

    def __copy__(self) -> Self:
        twin = self.map_parts(lambda part: part)
        vars(twin).update(vars(self))
        twin.requires_grad_(self.requires_grad)
        return twin

    def share_memory_(self) -> Self:
        """Move the parts to shared memory; torch's own version would touch a storage that does not exist."""
        for name in self._flat[0]:
            getattr(self, name).share_memory_()
        return self

    def is_shared(self) -> bool:
        """True when the values are in shared memory."""
        return self.packed.is_shared()

    @classmethod
    def own_names(cls) -> frozenset[str]:
        """What ``__init__`` sets; anything else on a tensor is its user's, or says that it is a parameter."""
        parts = "packed", "indices", "scales", "dense", "vendor"
        return frozenset((*parts, *Facts._fields, "_flat", "_ready", "traced_as"))

    def further_attributes(self) -> dict[str, Any]:
        """What is set on the tensor beside :meth:`own_names`."""
        own = self.own_names()
        return {name: value for name, value in vars(self).items() if name not in own}

    # what torch asks of it ----------------------------------------------------------------------------

    def __tensor_flatten__(self) -> tuple[list[str], Facts]:
        return self._flat

    @classmethod
    def __tensor_unflatten__(
        cls,
        inner: dict[str, Tensor],
        context: tuple[Any, ...],
        outer_size: tuple[int, ...],
        outer_stride: tuple[int, ...],
    ) -> Self:
        # The outer size must be the given one: it may be symbolic where bound_shape is not.
        given = context if type(context) is Facts else Facts(*context)  # torch may copy the tuple
        parts: dict[str, Any] = inner
        return cls(facts=given, outer_size=outer_size, outer_stride=outer_stride, **parts)

    def _stable_hash_for_caching(self) -> str:
        """What a cached compilation depends on (AOTAutograd's cache asks): everything but the values."""
        facts = (
            _CONTEXT,
            *(self.pattern.parts, str(self.pattern), self.bound_shape, self.transposed, self.tiled),
            *(self.dtype, self.device, self.shape, self.stride(), self.requires_grad),
            *((name, tuple(getattr(self, name).shape)) for name in self._flat[0]),
        )
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        rule = FUNCTION_RULES.get(func)
        if rule is not None:
            return rule(*args, **kwargs)
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
        rule = cls.RULES.get(func)
        if rule is None and torch.is_inference_mode_enabled():
            # There composites such as ``to`` come whole; elsewhere autograd has broken them up.
            made = func.decompose(*args, **(kwargs or {}))
            if made is not NotImplemented:
                return made
        if rule is None:
            raise refusal(cls, func)
        return rule(func, args, kwargs or {})


def refusal(kind: type | Tensor, func: Any, why: str = "") -> UnsupportedOpError:
    """The error for an operator, or a use of one, that has no rule for a class of tensors."""
    kind = kind if isinstance(kind, type) else type(kind)
    name = func if isinstance(func, (str, torch._ops.OpOverload)) else f"torch.{func.__name__}"
    return UnsupportedOpError(
        f"{name} has no rule for {kind.__name__}{f': {why}' if why else ''}. Call .to_dense() for a dense "
        "copy"
    )


def rules_for(rules: Rules) -> Callable[..., Callable[[Rule], Rule]]:
    """A decorator with the keys under which a function goes into ``rules``."""

    def keyed(*keys: Any) -> Callable[[Rule], Rule]:
        def register(rule: Rule) -> Rule:
            rules.update(dict.fromkeys(keys, rule))
            return rule

        return register

    return keyed


@functools.lru_cache(maxsize=1024)
def _text(facts: Facts) -> str:
    """Pattern, shape and order in words that :mod:`s3tensor.tensor.frozen` reads again."""
    bound = f"{facts.pattern} on {'x'.join(map(str, facts.bound_shape))}"
    return f"{bound}{', tiled' if facts.tiled else ''}{', transposed' if facts.transposed else ''}"


@functools.lru_cache(maxsize=1024)
def _bound(pattern: Pattern, name: str, shape: tuple[int, ...]) -> BoundPattern:
    del name  # a key: equal patterns keep their own spelling
    # Cached there too, behind checks of a shape that is known to be sound here.
    return pattern.bind(shape)
