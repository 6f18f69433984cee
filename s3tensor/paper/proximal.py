"""Norms of blocks and proximal maps of group penalties, on tiles: the last dim is one block.

The proximal map of ``t ||x||`` is ``argmin (x - v)' D (x - v) / 2 + t ||x||``: soft thresholding when D is
the identity, and the step of a diagonally preconditioned method (Adam, a diagonal Hessian) otherwise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from s3tensor.errors import PatternError


def norms(
    tiles: Tensor,  # (..., block_size)
    p: float = 2.0,
) -> Tensor:
    """p-norms of blocks, (...), p >= 0 or ``inf``; summed in float32 or wider, in the dtype of ``tiles``."""
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not p >= 0:
        raise PatternError(f"p={p!r:.80} must be a number >= 0, or inf")
    wide = torch.promote_types(tiles.dtype, torch.float32)
    return torch.linalg.vector_norm(tiles, p, dim=-1, dtype=wide).to(tiles.dtype)


def shrinkage(
    tiles: Tensor,  # (..., block_size)
    thresholds: Tensor,  # (...), >= 0
) -> Tensor:
    """The factor of each block, (...) in [0, 1], that soft thresholding of Euclidean norms multiplies by.

    ``max(0, 1 - t / ||v||)`` (Parikh and Boyd, Proximal Algorithms, 6.5.1). Float64.
    """
    check_thresholds(thresholds)
    values = tiles.double()
    # Relative to the largest entry, so that no square overflows.
    largest = values.abs().amax(-1).clamp_min(torch.finfo(torch.float64).tiny)
    size = torch.linalg.vector_norm(values / largest.unsqueeze(-1), dim=-1) * largest
    factor = (1.0 - thresholds.double() / size).clamp_min(0.0)
    # A block of zeros, 0 / 0 above, stays zero.
    return torch.where(size > 0, factor, 0.0)


def conditioned_soft_threshold(
    tiles: Tensor,  # (..., block_size): v
    thresholds: Tensor,  # (...), t >= 0
    conditioners: Tensor,  # (..., block_size): the diagonal of D, >= 0
    max_iter: int = 60,
    atol: float = 0.0,
) -> Tensor:
    """The minimiser x of ``(x - v)' D (x - v) / 2 + t ||x||`` for each block: the exact proximal step.

    It is 0 where ``||D v|| <= t``. Elsewhere ``x = D v s / (D s + t)`` with ``s = ||x||`` the root of
    ``||D v / (D s + t)|| = 1``, which falls in s and is found by bisection between
    ``||v|| - t / min(D)`` and ``||v|| - t / max(D)``.

    Args:
        tiles: the point, v.
        thresholds: one weight of the norm for each block; 0 leaves the block as it is.
        conditioners: one curvature for each element; an element of curvature 0 becomes 0 where t > 0.
        max_iter: bisections, each of which halves the interval of s.
        atol: stop when every s is known to within this; 0 stops at ``max_iter`` or at rounding.

    Returns:
        the shape of ``tiles``, float64.

    Raises:
        PatternError: a negative or non-finite threshold or conditioner, ``max_iter`` < 1, ``atol`` < 0.
    """
    check_thresholds(thresholds)
    if conditioners.shape != tiles.shape:
        raise PatternError(
            f"conditioners of shape {tuple(conditioners.shape)} for blocks of shape "
            f"{tuple(tiles.shape)}; give one curvature for each element"
        )
    if not bool((torch.isfinite(conditioners) & (conditioners >= 0)).all()):
        raise PatternError(
            "conditioners must be finite and >= 0; the penalty is not convex otherwise"
        )
    if max_iter < 1 or not 0.0 <= atol < math.inf:
        raise PatternError(f"max_iter={max_iter} must be >= 1 and atol={atol} finite and >= 0")
    tiny = torch.finfo(torch.float64).tiny
    # Each block in its own units: the largest |v| and the largest curvature are 1.
    unit = tiles.double().abs().amax(-1, keepdim=True).clamp_min(tiny)
    stiff = conditioners.double().amax(-1, keepdim=True).clamp_min(tiny)
    v, d = tiles.double() / unit, conditioners.double() / stiff
    t = thresholds.double().unsqueeze(-1) / stiff / unit
    pull = d * v
    size = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    low = (size - t / d.amin(-1, keepdim=True).clamp_min(tiny)).clamp_min(0.0)
    high = torch.maximum(size - t, low)  # max(D) is 1
    for _ in range(max_iter):
        middle = low + (high - low) / 2
        short = (
            torch.linalg.vector_norm(pull / (d * middle + t).clamp_min(tiny), dim=-1, keepdim=True)
            > 1
        )
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
        if not bool(((high - low) * unit > max(atol, 0.0)).any()):
            break
    s = low + (high - low) / 2
    found = pull * s / (d * s + t).clamp_min(tiny) * unit
    pruned = torch.linalg.vector_norm(pull, dim=-1, keepdim=True) <= t
    return torch.where(t == 0, tiles.double(), torch.where(pruned, 0.0, found))


def check_thresholds(thresholds: Tensor) -> None:
    """Refuse a negative or NaN threshold.

    Raises:
        PatternError: when there is one.
    """
    if not bool((thresholds >= 0).all()):
        raise PatternError("thresholds must be >= 0; a negative or NaN one has no proximal map")
