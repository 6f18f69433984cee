"""Transposable N:4 masks: rows and columns of every 4x4 tile keep N, so that W and its transpose are N:4."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from s3tensor.errors import NonFiniteError, PatternError
from s3tensor.mask import backend
from s3tensor.mask import projection as masks
from s3tensor.mask.projection import run_length
from s3tensor.modes import neutral
from s3tensor.pattern import BoundPattern, Pattern

_SIDE = 4
_TILES = 2**18  # tiles scored at once: 0.2 GB of sums


@functools.lru_cache(maxsize=8)
@neutral()
def tile_masks(keep: int) -> Tensor:
    """Every mask with ``keep`` True in each row and column: (90, 4, 4) bool for 2, else (24, 4, 4)."""
    rows = [
        tuple(column in kept for column in range(_SIDE))
        for kept in itertools.combinations(range(_SIDE), keep)
    ]
    every = torch.tensor(list(itertools.product(rows, repeat=_SIDE)))
    return every[(every.sum(1) == keep).all(1)]


def transposable(
    weight: Tensor,  # (out_features, in_features)
    pattern: Pattern | str = "2:4",
    scores: Tensor | None = None,
) -> Tensor:
    """The best mask under which the weight and its transpose both satisfy an N:4 pattern.

    In each 4x4 tile every row and every column keeps N. Of all such masks, 90 for 2:4, it takes the one of
    the largest sum of scores: with the default scores the exact Euclidean projection (I. Hubara et al.,
    arXiv 2102.08124, approximate it within a factor of 2). Sparse tensor cores can then run both products
    of a backward pass.

    Args:
        weight: any floating dtype, any strides.
        pattern: 1:4, 2:4 or 3:4.
        scores: importance of each element, in the weight's shape; default the squared weight.

    Returns:
        bool, the weight's shape, True where kept; of equal sums the first mask in lexical order.

    Raises:
        PatternError: another pattern, or a dim that is not divisible by 4.
        NonFiniteError: NaN or Inf in the weight or in the scores.
    """
    bound = check(Pattern.parse(pattern), tuple(weight.shape))
    given = weight.detach() if scores is None else scores.detach()
    if given.shape != weight.shape:
        raise PatternError(
            f"scores of shape {tuple(given.shape)} for a weight of shape {tuple(weight.shape)}; give one "
            "score for each weight element"
        )
    if not bool(torch.isfinite(given).all()):
        what = "weight" if scores is None else "scores"
        raise NonFiniteError(f"the {what} of shape {tuple(weight.shape)} hold NaN or Inf")
    return _best(given, bound.keep, squared=scores is None)


def _best(given: Tensor, keep: int, squared: bool) -> Tensor:
    """The mask; for 2:4 on a GPU NaN in a weight counts as the largest."""
    if keep == _SIDE:
        return torch.ones(given.shape, dtype=torch.bool, device=given.device)
    kernel = _kernel(given, keep)
    if kernel is not None:
        mask: Tensor = kernel.best(given.contiguous(), squared)
        return mask
    rows, columns = given.shape
    tiles = given.reshape(rows // _SIDE, _SIDE, columns // _SIDE, _SIDE).transpose(1, 2)
    flat = tiles.reshape(-1, _SIDE * _SIDE)  # (tiles, 16)
    every = tile_masks(keep).flatten(1).to(given.device)  # (masks, 16)
    sums_of = every.double().t().contiguous()
    best = torch.empty(len(flat), dtype=torch.int64, device=given.device)
    for start in range(0, len(flat), _TILES):
        # In float64 a square of float32 is exact and a sum of 8 nearly so; TF32 would change the choice.
        part = flat[start : start + _TILES].double()
        if squared:
            part = _in_range(part, given.dtype).square()
        best[start : start + _TILES] = (part @ sums_of).argmax(1)
    kept = every[best].view(rows // _SIDE, columns // _SIDE, _SIDE, _SIDE)
    return kept.transpose(1, 2).reshape(rows, columns)


def _in_range(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Tiles in float64; those of a float64 weight are scaled, so that squares neither vanish nor overflow."""
    if dtype != torch.float64:
        return part
    largest = part.abs().amax(1, keepdim=True)
    return part / torch.where(largest > 0, largest, 1)


def _kernel(given: Tensor, keep: int) -> Any:
    """The kernel's module where it takes this weight or these scores, for 2:4 on a GPU; else None."""
    kernel = backend.load("transposable") if keep == 2 and masks.on_plain_gpu(given) else None
    takes = kernel is not None and given.dtype in kernel.DTYPES and given.numel() > 0
    return kernel if takes else None


def check(pattern: Pattern, shape: tuple[int, ...]) -> BoundPattern:
    """``pattern`` bound to a shape of whole 4x4 tiles.

    Raises:
        PatternError: another pattern than 1:4, 2:4 or 3:4, or a shape that is not whole tiles.
    """
    bound = pattern.bind(shape)
    if run_length(bound) != _SIDE:
        raise PatternError(
            f"{pattern} cannot be transposable: only 1:4, 2:4 and 3:4 can, whose rows keep N of 4"
        )
    if len(shape) != 2 or shape[0] % _SIDE:
        raise PatternError(
            f"a transposable mask of {pattern} needs a matrix of 4x4 tiles, got shape {shape}; pad dim 0 to "
            f"a multiple of {_SIDE}, or train without transposable"
        )
    return bound


@torch.library.custom_op(
    "s3tensor::transposable", mutates_args=(), schema="(Tensor weight, int keep) -> Tensor"
)
def transposable_mask(weight: Tensor, keep: int) -> Tensor:
    """:func:`transposable` of ``keep``:4 by magnitude, as a forward takes it; bool, the weight's shape.

    For 2:4 on a GPU it does not wait to check that the weight is finite; NaN counts as the largest.
    """
    if _kernel(weight, keep) is not None:
        return _best(weight.detach(), keep, squared=True)
    return transposable(weight, f"{keep}:{_SIDE}")


@transposable_mask.register_fake
def _(weight: Tensor, keep: int) -> Tensor:
    return torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
