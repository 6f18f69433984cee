"""Checks of a stored weight, which is untrusted."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from s3tensor.errors import CheckpointError, PatternError
from s3tensor.mask.packing import check_packed
from s3tensor.pattern import BoundPattern, Pattern
from s3tensor.tensor.base import Compressed

# Limits on what a stored weight may claim; more is damage or an attack. A few bytes can describe a weight of
# any size, which ``to_dense`` would then allocate.
_MAX_NDIM, _MAX_DIM = 8, 2**40
_MAX_ELEMENTS = 2**28  # a weight may have these, or
_MAX_EXPANSION = 1024  # these for each stored value, if that is more


@contextmanager
def damage_as_checkpoint_error(where: str) -> Iterator[None]:
    """Raise whatever a damaged description makes fail in here as a CheckpointError."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{where}: damaged description of a sparse tensor ({reason})"
        ) from None


def refuse_unfilled(where: str) -> None:
    """Refuse to rebuild a weight inside a legacy ``torch.load``, whose storages have no contents yet.

    The format before zip files stores the contents behind the pickle and reads them afterwards: every
    check here would read uninitialised memory, and none would see the indices. Only the call says so.

    Raises:
        CheckpointError: called while ``torch.load`` reads a legacy file.
    """
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        code = frame.f_code
        if (
            code.co_name == "_legacy_load"
            and frame.f_globals.get("__name__") == "torch.serialization"
        ):
            raise CheckpointError(
                f"{where} in a file of torch's legacy format, whose contents cannot be checked before they "
                "are used; save it without _use_new_zipfile_serialization=False"
            )


def check_description(
    packed: Tensor, indices: Tensor, description: Any, where: str
) -> tuple[Pattern, tuple[int, ...], bool]:
    """(pattern, shape, transposed) of a description, checked against the parts and every index.

    For tensors on ``meta``, which have no indices to check, the description is checked by itself.

    Raises:
        CheckpointError: parts that no weight has, or a shape out of all proportion to them.
        KeyError, TypeError, AttributeError, ValueError, ArithmeticError: inside
            :func:`damage_as_checkpoint_error` only.
    """
    shape, transposed = tuple(description["shape"]), description["transposed"]
    sound = len(shape) <= _MAX_NDIM and all(type(n) is int and 0 < n < _MAX_DIM for n in shape)
    if not sound or type(transposed) is not bool or (transposed and len(shape) != 2):
        raise CheckpointError(
            f"{where}: shape {shape!r:.80} or orientation {transposed!r:.20} is damaged"
        )
    if math.prod(shape) > max(_MAX_ELEMENTS, _MAX_EXPANSION * packed.numel()):
        raise CheckpointError(
            f"{where}: shape {shape} for {packed.numel()} stored values is damaged"
        )
    pattern = _labelled(Pattern.parse(description["pattern"]), description.get("label"))
    if not all(p.layout == torch.strided and p.is_contiguous() for p in (packed, indices)):
        # Zero strides would describe any number of values by a single stored one.
        raise CheckpointError(f"{where}: its parts are not contiguous, as all stored parts are")
    if has_values(indices):
        check_packed(packed, indices, pattern.bind(shape), where)
    return pattern, shape, transposed


def check_parts(
    packed: Tensor, indices: Tensor, bound: BoundPattern, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Raise PatternError for sizes, dtypes or devices that packed data of the pattern does not have."""
    if tuple(packed.shape) != bound.packed_shape or packed.dtype not in dtypes:
        raise PatternError(
            f"packed values of shape {tuple(packed.shape)} and {packed.dtype}; {bound} needs shape "
            f"{bound.packed_shape} and one of {names_of(dtypes)}"
        )
    if indices.dtype != torch.uint8 or tuple(indices.shape) != (bound.index_bytes,):
        raise PatternError(
            f"packed indices of shape {tuple(indices.shape)} and {indices.dtype}; {bound} needs shape "
            f"({bound.index_bytes},) and torch.uint8"
        )
    if indices.device != packed.device:
        raise PatternError(
            f"packed values on {packed.device} and indices on {indices.device}; move them to one device"
        )


def has_values(part: Tensor) -> bool:
    """False for a tensor on ``meta`` or one that a tracer made."""
    return not (part.is_meta or isinstance(part, FakeTensor))


def set_attributes(made: Compressed, attributes: Any, where: str) -> None:
    """Set the attributes that a user had set on a weight, and what makes it a parameter.

    Raises:
        CheckpointError: not a dictionary, or the name of an attribute that the class owns.
    """
    if type(attributes) is not dict:
        raise CheckpointError(f"{where}: its attributes are damaged")
    own = made.own_names()
    for name in attributes:
        if type(name) is not str or name in own or hasattr(type(made), name):
            raise CheckpointError(f"{where} sets {name!r:.40}, which is not an attribute to set")
    vars(made).update(attributes)


def names_of(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _labelled(pattern: Pattern, label: object) -> Pattern:
    """The pattern under its short name, where that name still means the same here."""
    try:
        named = Pattern.parse(label) if isinstance(label, str) else pattern
    except PatternError:
        return pattern
    return named if named == pattern else pattern
