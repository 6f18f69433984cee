"""One-shot Structured OBS: masks by one inverse Hessian for all rows, then weights that compensate.

The paper's cheaper method (S3, arXiv 2604.11315, section 5): every scope drops the subset of blocks that
costs least under ``C = inv(H)`` of all columns, as if no other scope lost any.
"""

from __future__ import annotations

import itertools
import math
from typing import Literal

import torch
from torch import Tensor

from s3tensor.errors import PrunerError
from s3tensor.mask.projection import top_blocks
from s3tensor.prune.hessian import Factors
from s3tensor.prune.linalg import cholesky, masked_least_squares, spd_inverse
from s3tensor.prune.obs import SUBSETS, keep_whole_rows
from s3tensor.prune.product import Product

Compensation = Literal["local", "full", "split", "interleaved"]
COMPENSATIONS: tuple[Compensation, ...] = ("local", "full", "split", "interleaved")


def one_shot(
    dense: Tensor,  # (M, K)
    inverse: Tensor,  # (K, K), of the damped Hessian
    factors: Factors,
    product: Product,
    compensate: str = "local",
    n_splits: int = 1,
    memory_budget: int = 2 << 30,
) -> tuple[Tensor, Tensor]:
    """Weights and mask (M, K).

    Args:
        dense: the weights to prune.
        inverse: C, by which every scope chooses.
        factors: the damped Hessian itself.
        product: the pattern.
        compensate: which weights compensate for what a scope drops. ``local``: the rest of the scope, by
            C alone. ``full``: every kept weight, exactly. ``split``: the result of ``full``, since
            splitting only matters where compensation is not exact. ``interleaved``: the scopes of a row
            are cut into ``n_splits`` splits, from left to right. The masks of a split are chosen by the
            inverse Hessian of the columns that are left, from weights that compensate exactly for the
            splits before it; these are frozen until the end, when all weights are solved for again.
            One K x K matrix at a time serves all rows.
        n_splits: splits of ``interleaved``.
        memory_budget: bytes of working memory.

    Raises:
        PrunerError: an unknown ``compensate``, or ``n_splits`` that are not 1 to the scopes of a row.
    """
    count = product.columns.shape[0]
    if compensate not in COMPENSATIONS:
        raise PrunerError(f"compensate={compensate!r} must be one of {', '.join(COMPENSATIONS)}")
    if not 1 <= n_splits <= count:
        raise PrunerError(f"n_splits={n_splits} must be from 1 to the {count} scopes of a row")
    mask = torch.zeros_like(dense, dtype=torch.bool)
    if product.spans_rows:
        keep_whole_rows(dense, factors.matrix, product, mask)
        return dense.masked_fill(~mask, 0.0), mask
    if compensate == "local":
        choose(dense, inverse, product, mask, memory_budget)
        return _local(dense, inverse, product, mask, memory_budget), mask
    splits = n_splits if compensate == "interleaved" else 1
    edges = [round(count * split / splits) for split in range(splits + 1)]
    hessian, linear = factors.matrix, dense @ factors.matrix
    weights = dense.clone()
    past = torch.zeros(dense.shape[1], dtype=torch.bool, device=dense.device)
    for first, last in itertools.pairwise(edges):
        part = Product(product.rows, product.columns[first:last], product.place, product.keep)
        shrunk = inverse
        if first:  # the inverse Hessian of the columns that are left
            left = product.columns[first:].flatten()
            shrunk = torch.zeros_like(hessian)
            own = spd_inverse(hessian[left][:, left])
            assert own is not None  # a principal submatrix of a positive definite matrix
            shrunk[left.unsqueeze(1), left] = own
        choose(weights, shrunk, part, mask, memory_budget)
        now = part.columns.flatten()
        free = (~past).expand_as(mask).clone()
        free[:, now] = mask[:, now]
        frozen = weights * past
        weights = frozen + _solve(linear - frozen @ hessian, hessian, free, weights, memory_budget)
        past[now] = True
    if splits > 1:
        weights = _solve(linear, hessian, mask, weights, memory_budget)
    return weights.masked_fill_(~mask, 0.0), mask


def _solve(
    linear: Tensor, hessian: Tensor, mask: Tensor, start: Tensor, memory_budget: int
) -> Tensor:
    """``masked_least_squares`` in chunks of rows."""
    rows = max(1, memory_budget // (12 * linear.shape[1] * linear.element_size()))
    solved = [
        masked_least_squares(linear[some], hessian, mask[some], start[some])
        for some in (slice(first, first + rows) for first in range(0, len(linear), rows))
    ]
    return solved[0] if len(solved) == 1 else torch.cat(solved)


def choose(
    weights: Tensor,  # (M, K)
    inverse: Tensor,  # (K, K)
    product: Product,
    mask: Tensor,  # (M, K) bool: True is written where kept
    memory_budget: int,
) -> None:
    """Write the masks of the product's scopes, each by the cheapest subset of blocks to drop.

    All subsets are tried where there are at most 512; otherwise each block is dropped by its own cost.
    """
    dropped = product.blocks - product.keep
    subsets = math.comb(product.blocks, dropped)
    row_scopes, bands, high = product.rows.shape
    scopes, competing, width = product.columns.shape
    rows = product.rows.flatten()
    # The vectors of a solve: one for each row, column of a scope and scope.
    step = max(1, memory_budget // (4 * len(rows) * competing * width * weights.element_size()))
    for start in range(0, scopes, step):
        columns = product.columns[start : start + step]  # (scopes, competing, width)
        held = weights[rows][:, columns.flatten(1)].transpose(0, 1)  # (scopes, rows, s)

        def cost(held: Tensor, part: Tensor) -> Tensor:
            """Cost of dropping the columns ``part`` of every scope: (row scopes, scopes, bands)."""
            index = part.expand(len(held), -1)
            lower = cholesky(inverse[index.unsqueeze(2), index.unsqueeze(1)])
            solved = torch.linalg.solve_triangular(lower, held.transpose(1, 2), upper=False)
            total = solved.square().sum(1).unflatten(1, (row_scopes, bands, high)).sum(3)
            return total.transpose(0, 1)

        if subsets > SUBSETS:
            each = [
                cost(held[..., b * width : (b + 1) * width], columns[:, b])
                for b in range(competing)
            ]
            blocks = torch.stack(each, dim=-1).flatten(2)[..., product.place.argsort()]
            kept = top_blocks(blocks.flatten(0, 1), product.keep).view(blocks.shape)
        else:
            best = torch.full((row_scopes, len(columns)), torch.inf, device=weights.device)
            kept = torch.ones(
                (row_scopes, len(columns), product.blocks), dtype=torch.bool, device=weights.device
            )
            for out in itertools.combinations(range(product.blocks), dropped):
                drop = torch.zeros(product.blocks, dtype=torch.bool, device=weights.device)
                drop[list(out)] = True
                total = torch.zeros_like(best)
                for band, lost in enumerate(drop[product.place].view(bands, competing)):
                    index = lost.repeat_interleave(width).nonzero().flatten()
                    if len(index):
                        part = columns.flatten(1)[:, index]
                        total = total + cost(held[..., index], part)[..., band]
                better = total < best
                best = torch.where(better, total, best)
                kept = torch.where(better.unsqueeze(-1), ~drop, kept)
        by_band = kept[..., product.place].unflatten(2, (bands, competing))
        spread = by_band.permute(0, 2, 1, 3).flatten(2).repeat_interleave(width, dim=2)
        spread = spread.unsqueeze(2).expand(-1, -1, high, -1).flatten(0, 2)  # (rows, columns)
        mask[rows.unsqueeze(1), columns.flatten()] = spread


def _local(
    dense: Tensor, inverse: Tensor, product: Product, mask: Tensor, memory_budget: int
) -> Tensor:
    """Weights that compensate for what their own scope dropped: ``w - w_P (C_PP)^-1 C_P``."""
    result = dense.clone()
    columns = product.columns.flatten(1)  # (scopes, s)
    size = columns.shape[1]
    squares = inverse[columns.unsqueeze(2), columns.unsqueeze(1)]  # (scopes, s, s)
    each = 3 * len(columns) * size * size * dense.element_size()
    rows = max(1, memory_budget // each)
    for start in range(0, len(dense), rows):
        some = slice(start, start + rows)
        lost = ~mask[some][:, columns]  # (rows, scopes, s)
        held = dense[some][:, columns].masked_fill(~lost, 0.0)
        system = squares.masked_fill(~(lost.unsqueeze(-1) & lost.unsqueeze(-2)), 0.0)
        system.diagonal(dim1=-2, dim2=-1).add_((~lost).to(system.dtype))
        # Jacobi scaling: some rows are those of the identity, others those of C.
        scale = system.diagonal(dim1=-2, dim2=-1).rsqrt()
        lower = cholesky(system * scale.unsqueeze(-1) * scale.unsqueeze(-2))
        owed = torch.cholesky_solve((held * scale).unsqueeze(-1), lower).squeeze(-1) * scale
        moved = (owed.masked_fill(~lost, 0.0).unsqueeze(-2) @ squares).squeeze(-2)
        part = result[some]
        part[:, columns.flatten()] -= moved.flatten(1)
        result[some] = part
    return result.masked_fill_(~mask, 0.0)
