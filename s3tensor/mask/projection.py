"""Masks: tiling a weight into scopes and blocks, scope-wise top-k, and the check of a pattern.

Everything here is pure and runs on any device; a mask is bool, True where a weight is kept.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from s3tensor.errors import NonFiniteError, PatternError
from s3tensor.mask import backend
from s3tensor.modes import check_real
from s3tensor.pattern import BoundPattern, Pattern, coalesce

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
    _, order = bound.axes
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return tiles.reshape(bound.tiles.shape).permute(inverse).reshape(bound.shape).contiguous()


def top_blocks(
    scores: Tensor,  # (scopes, blocks_per_scope)
    keep: int,
) -> Tensor:
    """True at the ``keep`` largest scores of each row, which hold no NaN; ties go to the lowest index."""
    n = scores.shape[-1]
    if keep >= n:
        return torch.ones_like(scores, dtype=torch.bool)
    kernels = select_kernels(scores)
    if kernels is not None:
        scores = scores.detach().contiguous()
        if n <= kernels.LONGEST:
            return kernels.top_blocks(scores, keep)
    if n > _RANK_LIMIT:
        # A selection: 0.14 s against 0.48 s of a sort for the rows of a 4096x4096 weight.
        if kernels is not None:
            least = kernels.kth_largest(scores, keep).unsqueeze(-1)
        else:
            least = scores.topk(keep, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        above = scores > least
        tied = scores == least
        room = keep - above.sum(-1, keepdim=True, dtype=torch.int32)
        return above | (tied & (tied.cumsum(-1, dtype=torch.int32) <= room))
    planes = [plane.contiguous() for plane in scores.unbind(-1)]
    rank = [torch.zeros_like(planes[0], dtype=torch.uint8) for _ in planes]
    for low in range(n):
        for high in range(low + 1, n):
            high_wins = planes[high] > planes[low]
            rank[low] = rank[low] + high_wins
            rank[high] = rank[high] + ~high_wins
    return torch.stack([r < keep for r in rank], dim=-1)


def blocks_in(
    tiles: Tensor,  # (scopes, blocks_per_scope, block_size) bool
) -> Tensor:
    """The blocks with any True element: (scopes, blocks_per_scope) bool."""
    return tiles.squeeze(-1) if tiles.shape[-1] == 1 else tiles.any(-1)


def count(
    blocks: Tensor,  # (scopes, blocks_per_scope) bool
) -> Tensor:
    """True blocks of each scope: (scopes,), in uint8 where they fit, which is the faster sum."""
    n = blocks.shape[-1]
    return blocks.sum(-1, dtype=torch.uint8 if n < 256 else torch.int64)


def block_scores(scores: Tensor, bound: BoundPattern) -> Tensor:
    """Scores per element, in the bound shape, summed per block: (scopes, blocks_per_scope)."""
    tiles = tile(scores, bound)
    return tiles.squeeze(-1) if bound.block_size == 1 else tiles.sum(-1)


def expand_blocks(
    kept: Tensor,  # (scopes, blocks_per_scope) bool
    bound: BoundPattern,
) -> Tensor:
    """One decision a block, spread over its elements: a mask of the bound shape."""
    return untile(kept.unsqueeze(-1).expand(-1, -1, bound.block_size), bound)


def select(scores: Tensor, bound: BoundPattern) -> Tensor:
    """The mask of the bound shape that keeps the best blocks of each scope; scores unchecked."""
    return expand_blocks(top_blocks(block_scores(scores, bound), bound.keep), bound)


def project(weight: Tensor, pattern: Pattern | str, scores: Tensor | None = None) -> Tensor:
    """The mask of the weights to keep: in each scope, the ``keep`` blocks of the largest score.

    With the default scores ``weight * mask`` is the Euclidean projection of ``weight`` onto the set of
    tensors that satisfy ``pattern`` (S3, section 4: hard thresholding of block norms in each scope).

    On CUDA one kernel, with one read of the weight, serves N:M and the patterns of :func:`stretches`. A
    CUDA graph can capture it but cannot raise: there NaN and Inf count as the largest.

    Args:
        weight: tensor of any floating dtype and any strides.
        pattern: a pattern or its string.
        scores: importance of each element, in the weight's shape, summed per block; default the
            squared weight.

    Returns:
        bool tensor of the weight's shape, True where kept: exactly ``keep`` blocks of every scope, ties
        broken by the lowest block index, the same on every run.

    Raises:
        PatternError: a pattern that does not fit the shape, or scores of another shape.
        NonFiniteError: NaN or Inf in the weight, or NaN in the scores.
        TypeError: a weight or scores that are not a tensor, or a complex weight.
    """
    bound = _bind(pattern, weight)
    if scores is None:
        mask = _project_by_kernel(weight, bound)
        if mask is not None:
            return mask
        return expand_blocks(top_blocks(_block_norms(weight, bound), bound.keep), bound)
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores are a tensor of the weight's shape, got {type(scores).__name__}")
    if scores.shape != weight.shape:
        raise PatternError(
            f"scores of shape {tuple(scores.shape)} for a weight of shape {tuple(weight.shape)}; "
            "give one score for each weight element"
        )
    if scores.isnan().any():
        raise NonFiniteError("scores hold NaN; an order of blocks is not defined")
    if not scores.dtype.is_floating_point:
        scores = scores.double()
    elif scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    summed = block_scores(scores, bound)
    if summed.isnan().any():
        raise NonFiniteError(
            "scores of one block hold Inf and -Inf, whose sum is NaN; give finite ones"
        )
    return expand_blocks(top_blocks(summed, bound.keep), bound)


def _bind(pattern: Pattern | str, weight: Tensor) -> BoundPattern:
    if not isinstance(weight, Tensor):
        raise TypeError(f"a weight is a tensor, got {type(weight).__name__}")
    if weight.is_complex():
        raise TypeError(
            "complex weights have no order; project their real and imaginary parts one by one"
        )
    check_real(weight)
    return Pattern.parse(pattern).bind(weight.shape)


def _block_norms(weight: Tensor, bound: BoundPattern) -> Tensor:
    """Euclidean norms of blocks, (scopes, blocks_per_scope), up to one factor; no square overflows.

    Squares of float32 are exact in float64. A float64 weight is first scaled by a power of two that brings
    its largest element to about 1, so that only elements below 1e-154 of the largest lose their order.
    """
    magnitude = weight.detach().abs()
    largest = magnitude.amax()
    _check_finite(bool(torch.isfinite(largest)), bound)
    if bound.block_size == 1:
        return tile(magnitude, bound).squeeze(-1)
    return tile_norms(tile(magnitude, bound), largest)


def _check_finite(finite: bool, bound: BoundPattern) -> None:
    if not finite:
        raise NonFiniteError(
            f"the weight of shape {bound.shape} holds NaN or Inf; repair it before it is pruned"
        )


def tile_norms(
    tiles: Tensor,  # (..., block_size)
    largest: Tensor,  # 0-dim, float: the largest magnitude of all tiles to be compared
) -> Tensor:
    """Euclidean norms of blocks, (...) float64, up to one factor that ``largest`` sets."""
    if tiles.dtype == torch.float64:
        _, exponent = torch.frexp(largest)
        half = exponent // 2  # in two steps, because 2**-exponent may overflow
        tiles = tiles.ldexp(-half).ldexp(half - exponent)
    # With dtype given, one pass converts, squares and sums: 0.8 ms against 3.6 ms in three passes for the
    # column pairs of a 1536x576 weight on two CPU cores.
    return torch.linalg.vector_norm(tiles, dim=-1, dtype=torch.float64)


def satisfies(weight: Tensor, pattern: Pattern | str) -> bool:
    """True when every scope of ``weight`` has at most ``keep`` blocks that are not all zero."""
    bound = _bind(pattern, weight)
    used = blocks_in(tile(weight.detach() != 0, bound))
    return int(count(used).max()) <= bound.keep


# on a GPU ---------------------------------------------------------------------------------------------


def select_kernels(x: Tensor) -> Any:
    """The module of the selection kernels where it takes x, made contiguous (rows, n); else None."""
    select = backend.load("select") if on_plain_gpu(x) else None
    if select is None or x.dtype not in select.DTYPES or not 0 < x.numel() < 2**31:
        return None
    return select


def on_plain_gpu(x: Tensor) -> bool:
    """Whether x is plain memory of a CUDA device: no subclass, not traced, not under ``torch.func``."""
    return (
        x.is_cuda
        and not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _project_by_kernel(weight: Tensor, bound: BoundPattern, look: bool = True) -> Tensor | None:
    """The mask, or None where no kernel takes this weight and pattern.

    Without ``look`` nothing waits for the GPU to report NaN or Inf; both count as the largest.
    """
    select = backend.load("select") if on_plain_gpu(weight) else None
    layout = None if select is None else stretches(bound)
    if select is None or layout is None or bound.keep == bound.blocks_per_scope:
        return None
    masks = backend.load("masks")  # None with Triton 3.2
    dense = weight.detach().contiguous()
    where = None if masks is None else masks.Stretches(**layout)
    if where is not None and masks.covers(where, dense.dtype) and bound.scopes < 2**31:
        mask, flags = masks.project(dense, where, bound.keep)
        if look and not _is_captured(flags):
            _check_finite(not bool(flags.any()), bound)
        return mask
    if bound.n_of_m is None or bound.blocks_per_scope > select.LONGEST:
        return None
    if not dense.is_floating_point():
        return None
    rows = dense.view(-1, bound.blocks_per_scope)
    if select.refusal(rows) is not None:  # float8, or rows beyond 2**31
        return None
    if look and not _is_captured(dense):
        _check_finite(bool(torch.isfinite(dense).all()), bound)
    return select.top_blocks(rows, bound.keep, absolute=True).view(bound.shape)


def _is_captured(x: Tensor) -> bool:
    """Whether a CUDA graph is capturing, so that no result can be read."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


@functools.lru_cache(maxsize=1024)
def stretches(bound: BoundPattern) -> dict[str, Any] | None:
    """Where the weights of a scope lie, as the arguments of ``kernels.masks.Stretches``; None where they
    are not a few stretches of memory at regular steps.
    """
    grid, _, inside = (coalesce(level.by_stride()) for level in bound.levels)
    competing = bound.normal_form[1]
    # Ties go to the first block, which must be the first in memory: one mode says that as well.
    if competing.rank > 1 or inside.rank > 2 or grid.rank > 2:
        return None
    found: dict[str, Any] = {}
    blocks, step = competing.modes()[0] if competing.size > 1 else (1, 1)
    run = inside.shape[0] if inside.stride[0] == 1 else 1
    rest = [mode for mode in inside.modes() if mode[1] > 1]
    if step == run:
        found["length"] = run * blocks
        if run > 1:
            found["run"] = run
        if rest:
            found["count"], found["apart"] = rest[0]
    elif not rest:
        found = {"length": run, "count": blocks, "apart": step, "run": run, "rows": True}
    if not found or len(rest) > 1 or (grid.size > 1 and grid.stride[0] != found["length"]):
        return None
    if grid.rank == 2:
        found["span"], found["stride"] = grid.shape[0], grid.stride[1]
    return found


def run_length(bound: BoundPattern) -> int:
    """M of an N:M pattern up to 16, whose scopes are M neighbours in memory; 0 for all other patterns."""
    run = bound.n_of_m
    return run[1] if run is not None and run[1] <= 16 else 0
