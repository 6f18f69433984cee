"""Masks: tiling a weight into scopes and blocks, scope-wise top-k, and the check of a pattern.

Everything here is pure and runs on any device; a mask is bool, True where a weight is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s3tensor.errors import NonFiniteError, PatternError
from s3tensor.pattern import BoundPattern, Pattern

# Up to this many competing blocks a rank count (n^2/2 compares of contiguous planes) beats a sort:
# 0.9 ms against 7.1 ms for the 2:4 mask of a 576x1536 weight on two CPU cores.
_RANK_LIMIT = 16


def tile(x: Tensor, bound: BoundPattern) -> Tensor:
    """``x`` of the bound shape as (scopes, blocks_per_scope, block_size)."""
    sizes, order = bound.axes
    shape = (bound.scopes, bound.blocks_per_scope, bound.block_size)
    return x.reshape(sizes).permute(order).reshape(shape)


def untile(
    tiles: Tensor,  # (scopes, blocks_per_scope, block_size)
    bound: BoundPattern,
) -> Tensor:
    """The inverse of :func:`tile`: a contiguous tensor of the bound shape."""
    sizes, order = bound.axes
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return tiles.reshape(bound.tiles.shape).permute(inverse).reshape(bound.shape)


def top_blocks(
    scores: Tensor,  # (scopes, blocks_per_scope)
    keep: int,
) -> Tensor:
    """True at the ``keep`` largest scores of each row; ties go to the lowest index. No NaN."""
    n = scores.shape[-1]
    if keep >= n:
        return torch.ones_like(scores, dtype=torch.bool)
    if n > _RANK_LIMIT:
        best = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :keep]
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
    planes = [plane.contiguous() for plane in scores.unbind(-1)]
    rank = [torch.zeros_like(planes[0], dtype=torch.uint8) for _ in planes]
    for low in range(n):
        for high in range(low + 1, n):
            high_wins = planes[high] > planes[low]
            rank[low] = rank[low] + high_wins
            rank[high] = rank[high] + ~high_wins
    return torch.stack([r < keep for r in rank], dim=-1)


def block_scores(scores: Tensor, bound: BoundPattern) -> Tensor:
    """Scores per element, in the bound shape, summed per block: (scopes, blocks_per_scope)."""
    tiles = tile(scores, bound)
    return tiles.squeeze(-1) if bound.block_size == 1 else tiles.sum(-1)


def expand_blocks(
    kept: Tensor,  # (scopes, blocks_per_scope) bool
    bound: BoundPattern,
) -> Tensor:
    """A decision for each block, spread over its elements: a mask of the bound shape."""
    return untile(kept.unsqueeze(-1).expand(-1, -1, bound.block_size), bound)


def select(scores: Tensor, bound: BoundPattern) -> Tensor:
    """The mask of the bound shape that keeps the best blocks of each scope; scores unchecked."""
    return expand_blocks(top_blocks(block_scores(scores, bound), bound.keep), bound)


def project(weight: Tensor, pattern: Pattern | str, scores: Tensor | None = None) -> Tensor:
    """The mask of the weights to keep: in each scope, the ``keep`` blocks of the largest score.

    With the default scores ``weight * mask`` is the Euclidean projection of ``weight`` onto the set of
    tensors that satisfy ``pattern`` (S3, section 4: hard thresholding of block norms in each scope).

    Args:
        weight: tensor of any floating dtype and any strides.
        pattern: a pattern or its string.
        scores: importance of each element, in the weight's shape, summed per block; default the
            squared weight.

    Returns:
        bool tensor of the weight's shape, True where kept: exactly ``keep`` blocks of every scope, ties
        broken by the lowest block index, the same on every run.

    Raises:
        PatternError: when the pattern does not fit the shape.
        NonFiniteError: NaN or Inf in the weight, or NaN in the scores.
    """
    bound = Pattern.parse(pattern).bind(weight.shape)
    if scores is None:
        scores = _energy(weight, bound)
    elif scores.shape != weight.shape:
        raise PatternError(
            f"scores of shape {tuple(scores.shape)} for a weight of shape {tuple(weight.shape)}; "
            "give one score for each weight element"
        )
    elif scores.isnan().any():
        raise NonFiniteError("scores hold NaN; an order of blocks is not defined")
    if not scores.dtype.is_floating_point:
        scores = scores.double()
    elif scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    return select(scores, bound)


def _energy(weight: Tensor, bound: BoundPattern) -> Tensor:
    """Squared weights up to a common factor, so that neither tiny nor huge weights leave the range."""
    magnitude = weight.detach().abs()
    magnitude = magnitude if magnitude.dtype == torch.float64 else magnitude.float()
    largest = magnitude.amax()
    if not torch.isfinite(largest):
        raise NonFiniteError(
            f"the weight of shape {bound.shape} holds NaN or Inf; repair it before it is pruned"
        )
    if bound.block_size == 1:
        return magnitude  # the same order as its square
    return (magnitude / largest.clamp_min(torch.finfo(magnitude.dtype).tiny)).square()


def satisfies(weight: Tensor, pattern: Pattern | str) -> bool:
    """True when every scope of ``weight`` has at most ``keep`` blocks that are not all zero."""
    bound = Pattern.parse(pattern).bind(weight.shape)
    used = (tile(weight.detach(), bound) != 0).any(-1).sum(-1)
    return bool((used <= bound.keep).all())
