"""``Compressed``: what all tensors have in common that hold a matrix under a pattern as packed parts."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from s3tensor.errors import UnsupportedOpError
from s3tensor.mask.packing import unpack_mask
from s3tensor.pattern import BoundPattern, Pattern

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on

Rule = TypeVar("Rule", bound=Callable[..., Any])
Rules = dict[Any, Callable[..., Any]]

# Rules for the functions that users call on any compressed tensor, rule(*args, **kwargs), filled by
# ``s3tensor.tensor.functions``. Below them each class has rules for the operators of aten.
FUNCTION_RULES: Rules = {}


class Compressed(Tensor):
    """A matrix under a structured-sparsity pattern: packed parts in a tensor's clothes.

    Shape, dtype and device are those of the dense matrix. An operator without a rule raises
    :class:`~s3tensor.errors.UnsupportedOpError`: nothing densifies in silence.

    A class of these names its parts, sets ``_flat`` (the names and the context of
    ``__tensor_flatten__``) in ``__init__``, and has the methods below that raise NotImplementedError.

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
    _flat: tuple[list[str], tuple[Any, ...]]

    PARTS: ClassVar[tuple[str, ...]] = ("packed", "indices")  # that a checkpoint stores
    SECOND_FORMS: ClassVar[tuple[str, ...]] = ()  # that are made of the parts, for speed
    RULES: ClassVar[Rules]  # rule(func, args, kwargs), by aten overload

    # what each class does in its own way --------------------------------------------------------------

    def parts(self) -> tuple[Tensor, ...]:
        """The stored parts, values and indices in canonical order."""
        raise NotImplementedError

    def in_order(self, tiled: bool | None = None) -> Self:
        """The weight with its parts in tile order or in canonical order; by default as its device likes."""
        raise NotImplementedError

    def map_parts(self, values: Callable[[Tensor], Tensor], *, flip: bool = False) -> Self:
        """The same weight, its parts passed through a function; ``flip`` makes it the transposed view."""
        raise NotImplementedError

    def to_dense(self, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
        """The dense matrix."""
        raise NotImplementedError

    def multiplied(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``F.linear(x, self, bias)`` by an operator over plain tensors, which a graph can hold."""
        raise NotImplementedError

    def multiplied_now(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same without the dispatcher, for plain tensors that nothing watches."""
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
        """Bytes of all that is kept: the stored parts, and second forms."""
        kept = (getattr(self, name) for name in self.SECOND_FORMS)
        return self.nbytes_compressed + sum(part.nbytes for part in kept if part is not None)

    def mask(self) -> Tensor:
        """Bool tensor of the tensor's shape, True at the positions that are stored."""
        kept = unpack_mask(self.parts()[1], self.bound)
        return kept.t() if self.transposed else kept

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense tensor: the name that torchao and Hugging Face know for it."""
        return self.to_dense(dtype)

    def same_layout(self, other: Tensor) -> bool:
        """True when ``other`` has such parts, under the same pattern, shape, order and orientation."""
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
        """What a checkpoint holds beside :meth:`parts`, as JSON can: pattern, label, shape, transposed."""
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
        """Move the parts to shared memory; torch's own version would touch a storage that is not there."""
        for name in self._flat[0]:
            getattr(self, name).share_memory_()
        return self

    def is_shared(self) -> bool:
        """True when the values are in shared memory."""
        return self.packed.is_shared()

    @classmethod
    def own_names(cls) -> frozenset[str]:
        """What ``__init__`` sets; anything else on a tensor is its user's, or says that it is a parameter."""
        facts = "pattern", "bound_shape", "transposed", "tiled", "_flat"
        return frozenset((*cls.PARTS, *cls.SECOND_FORMS, *facts))

    def further_attributes(self) -> dict[str, Any]:
        """What is set on the tensor beside :meth:`own_names`."""
        own = self.own_names()
        return {name: value for name, value in vars(self).items() if name not in own}

    # what torch asks of it ----------------------------------------------------------------------------

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        return self._flat

    def _stable_hash_for_caching(self) -> str:
        """What a cached compilation depends on: everything but the values (AOTAutograd's cache asks)."""
        facts = (
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
        if func in FUNCTION_RULES:
            return FUNCTION_RULES[func](*args, **kwargs)
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
def _bound(pattern: Pattern, name: str, shape: tuple[int, ...]) -> BoundPattern:
    del name  # a key: equal patterns keep their own spelling
    # Cached there too, behind checks of a shape that is known to be sound here.
    return pattern.bind(shape)
