"""Structured OBS on any S3 pattern: every row has the inverse Hessian of its own remaining weights.

Optimal Brain Surgeon (Hassibi and Stork, 1993) drops the weights P of a row at the cost
``w_P (C_PP)^-1 w_P'`` with C the inverse Hessian of the row's free weights, moves the others by
``-w_P (C_PP)^-1 C_P``, and goes on with the Schur complement of C. S3 (arXiv 2604.11315, section 5) lets the
blocks of a scope compete for that cost.

A Schur complement of the whole K x K inverse for each row costs K^3 / 2 and holds a matrix a row. Here it
is left-looking: with C0 = inv(H) and a Cholesky factor U of what was subtracted, ``C_t = C0 - U'U``, and only
the columns not yet decided are formed: K^3 / 24, in K^2 / 4 floats a row. The weights of a row are computed
at the end, all at once, from the triangular factor that U holds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from s3tensor.errors import PrunerError
from s3tensor.mask.projection import top_blocks
from s3tensor.pattern import BoundPattern, Pattern
from s3tensor.prune.hessian import DAMP_EXACT, Factors
from s3tensor.prune.linalg import cholesky, full_precision, least_pivot, quadratic, spd_inverse
from s3tensor.prune.problem import (
    MEMORY_BUDGET,
    Progress,
    Pruned,
    check_budget,
    fit,
    linear_term,
    pose,
)
from s3tensor.prune.product import Product
from s3tensor.prune.registry import register

Order = Literal["left_to_right", "largest_first"]
Scoring = Literal["independent", "joint"]

SUBSETS = 512  # at most, of the blocks of one scope, for scoring="joint"


class Batching(NamedTuple):
    """What a sweep decides at once."""

    order: Order
    scoring: Scoring
    scopes: int  # scopes of a row
    blocks: int  # blocks of one scope


def batching(product: Product, order: str, scoring: str, ng: int) -> Batching:
    """How many scopes, and blocks of a scope, are decided at once; checks the options.

    ``ng`` scopes, at most ``4 ng`` columns (2:4 reaches both) and at most a sixteenth of a row, because
    costs are stale within a batch. Of a scope with many blocks at most ``ng`` columns a row are dropped at
    once, and the rest is scored again.

    Raises:
        PrunerError: an unknown order or scoring, ``ng`` < 1, or too many subsets for ``joint``.
    """
    if order not in ("left_to_right", "largest_first"):
        raise PrunerError(f"order={order!r} must be 'left_to_right' or 'largest_first'")
    if scoring not in ("independent", "joint"):
        raise PrunerError(f"scoring={scoring!r} must be 'independent' or 'joint'")
    if ng < 1:
        raise PrunerError(f"ng={ng} scopes at a time; it must be >= 1")
    column_scopes, competing, width = product.columns.shape
    bands = product.rows.shape[1]
    pruned = product.blocks - product.keep
    if scoring == "joint":
        count = math.comb(product.blocks, pruned)
        if count > SUBSETS:
            raise PrunerError(
                f"scoring='joint' would try {count} subsets of the {product.blocks} blocks of a scope; "
                f"at most {SUBSETS}: use scoring='independent'"
            )
        together = max(pruned, 1)
    else:
        each = max(1, min(ng // width, column_scopes * competing // 16))  # of a row
        together = max(1, min(pruned, bands * each))
    scopes = max(1, min(ng, 4 * ng // (competing * width), column_scopes // 16))
    scopes = scopes if together >= pruned else 1
    return Batching(order, scoring, scopes, together)  # type: ignore[arg-type]


@register()
def obs(
    weight: Tensor,  # (M, K) any floating dtype
    hessian: Tensor | Factors | None,  # (K, K) X'X / N
    pattern: Pattern | str,
    *,
    target: Tensor | None = None,  # (K, K) X_dense'X / N
    alpha: float = 0.5,
    drift: Tensor | None = None,  # (M, K) E'X / N
    damp: float = DAMP_EXACT,
    ng: int = 16,
    order: str = "largest_first",
    scoring: str = "independent",
    refit: bool = True,
    memory_budget: int = MEMORY_BUDGET,
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> Pruned:
    """Structured OBS with an inverse Hessian for every row (S3, arXiv 2604.11315, section 5).

    Scopes are decided batch by batch; after each batch all remaining weights compensate. Whatever the
    order, the weights are the optimum for their mask.

    Args:
        weight: the dense weight.
        hessian: ``X'X / N``, or ``Factors`` shared with other linears of the same input.
        pattern: a pattern or its string; scopes may couple rows.
        target: ``X_dense'X / N``: fit the dense stream's outputs, see
            :func:`s3tensor.prune.problem.linear_term`.
        alpha: share of ``target``.
        drift: an error of the outputs to compensate for, against the inputs; see the same function.
        damp: share of the mean diagonal added to the diagonal; ``Factors`` bring their own.
        ng: scopes of a row that are decided at once (see :func:`batching`); 1 is the exact, slow method.
        order: of a row's scopes, ``left_to_right``, or ``largest_first``: by the gap between the cost of
            the cheapest block that stays and the most expensive one that is dropped. The clearest
            decisions then come while most weights are left to compensate for them.
        scoring: ``independent``: each block by its own cost; ``joint``: every subset of a scope's blocks
            by the cost of dropping it whole.
        refit: polish the weights of the final mask by conjugate gradients, which removes the rounding
            error of the sweep.
        memory_budget: bytes of working memory; rows are pruned in chunks that fit.
        chunk_size: rows of a chunk, at most; it changes memory, and results only by rounding.
        progress: called with (rows done, rows in all).

    Raises:
        PatternError, NonFiniteError, HessianError: see :mod:`s3tensor.prune.problem`; HessianError also
            when the damped Hessian is not positive definite.
        PrunerError: an option that is unknown or out of range.
    """
    problem = pose(weight, pattern)
    factors = fit(problem, hessian, damp, "obs")
    term = linear_term(problem, factors, target, alpha, drift)
    dense = factors.clear_dead(problem.dense)
    with full_precision():
        inverse = inverse_of(factors)
        linear = term.rows()
        start = dense if term.is_plain else factors.clear_dead(linear @ inverse)
        result, mask = sweep(
            start,
            inverse,
            factors.matrix,
            problem.bound,
            ng=ng,
            order=order,
            scoring=scoring,
            rows_at_once=chunk_size,
            memory_budget=memory_budget,
            progress=progress,
        )
        if refit:
            problem.least_squares(
                linear.__getitem__, factors.matrix, mask, result, memory_budget, out=result
            )
    return problem.finish(factors.clear_dead(result), mask)


def inverse_of(factors: Factors) -> Tensor:
    """The inverse of the damped Hessian.

    Raises:
        HessianError: the matrix is singular or indefinite.
    """
    inverse = spd_inverse(factors.matrix)
    if inverse is None:
        raise factors.indefinite()
    return inverse


def sweep(
    dense: Tensor,  # (M, K)
    inverse: Tensor,  # (K, K): C0
    hessian: Tensor,  # (K, K), damped
    bound: BoundPattern,
    *,
    ng: int,
    order: str,
    scoring: str,
    rows_at_once: int | None = None,
    dtype: torch.dtype | None = None,
    memory_budget: int = MEMORY_BUDGET,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights and mask (M, K) of Structured OBS, before any refit.

    Args:
        dense: what the pruned rows are to be near to, in the metric of the Hessian.
        ng, order, scoring: see :func:`obs`.
        rows_at_once: rows of a chunk, at least those of one scope; default what ``memory_budget`` holds.
        dtype: of the factor of every row, which takes most of the memory; default that of ``dense``.
        memory_budget: bytes of working memory.
        progress: called with (rows done, rows in all).
    """
    product = Product.of(bound).to(dense.device)
    batches = batching(product, order, scoring, ng)
    mask = torch.zeros_like(dense, dtype=torch.bool)
    if product.spans_rows:
        keep_whole_rows(dense, hessian, product, mask)
        if progress is not None:
            progress(len(dense), len(dense))
        return dense.masked_fill(~mask, 0.0), mask
    # A unit diagonal: costs do not change, and nothing in the factor exceeds 1.
    scale = inverse.diagonal().sqrt()
    unit = inverse / scale[:, None] / scale
    result = torch.empty_like(dense)
    scopes, bands, high = product.rows.shape
    chunk = _chunk(product, dense, dtype or dense.dtype, memory_budget)
    if rows_at_once is not None:
        chunk = min(chunk, max(1, rows_at_once // (bands * high)))
    for first in range(0, scopes, chunk):
        rows = product.rows[first : first + chunk]
        part = _Sweep(dense[rows.flatten(0, 1)] / scale, unit, product, len(rows), batches, dtype)
        for _ in part.run():
            pass
        weights, kept = part.finish()
        where = rows.flatten()
        result[where] = (weights * scale).flatten(0, 1)
        mask[where] = kept.unsqueeze(1).expand(-1, high, -1).flatten(0, 1)
        if progress is not None:
            progress(min(first + chunk, scopes) * bands * high, len(dense))
    return result.masked_fill_(~mask, 0.0), mask


def keep_whole_rows(dense: Tensor, hessian: Tensor, product: Product, mask: Tensor) -> None:
    """Keep the bands of rows whose outputs have the most energy, ``w H w'``; no weight can compensate."""
    cost = (dense @ hessian).mul_(dense).sum(1)[product.rows].sum(-1)  # (row scopes, bands)
    kept = top_blocks(cost[:, product.place.argsort()], product.keep)[:, product.place]
    mask[product.rows[kept].flatten()] = True


def _chunk(product: Product, dense: Tensor, dtype: torch.dtype, memory_budget: int) -> int:
    """Row scopes whose working memory fits the budget, at least one."""
    check_budget(memory_budget)
    _, bands, high = product.rows.shape
    width = dense.shape[1]
    factor = _most_pruned(product) * width * dtype.itemsize
    # A batch's columns, their product with the factor, and the triangular solve's result.
    batch = 4 * min(width, 512) * width * dense.element_size()
    rows = 6 * high * width * dense.element_size()
    return max(1, memory_budget // (bands * (factor + batch + rows)))


def _most_pruned(product: Product) -> int:
    """Rows of the factor: the most columns that a band can lose, and one for padding where bands differ."""
    column_scopes, competing, width = product.columns.shape
    if product.rows.shape[1] == 1:
        return column_scopes * (product.blocks - product.keep) * width
    return column_scopes * competing * width + 1


class _Batch(NamedTuple):
    """Columns that were dropped together."""

    rows: slice | Tensor  # their rows of the factor
    start: int  # first position of these rows
    positions: Tensor  # (bands, p) int64
    valid: Tensor | None  # (bands, p) bool; False pads a band that lost fewer; None without padding
    lower: Tensor  # (bands, p, p): Cholesky factor of C_PP


class _Sweep:
    """The scopes of a chunk of bands, one batch after another. C0 has a unit diagonal.

    A *position* is a place in a band's own order of columns; the columns of a scope are neighbours.
    """

    def __init__(
        self,
        dense: Tensor,  # (bands, rows of a block, K), scaled
        inverse: Tensor,  # (K, K), scaled
        product: Product,
        row_scopes: int,
        batching: Batching,
        dtype: torch.dtype | None,
    ) -> None:
        self.inverse, self.product, self.batching = inverse, product, batching
        self.row_scopes = row_scopes
        self.bands = product.rows.shape[1]  # of a scope
        count, _, width = dense.shape
        device = dense.device
        self.order = self._visit(dense)  # (bands, K): the column at each position
        self.same = batching.order == "left_to_right"  # one order for all bands
        if self.same:
            self.inverse = inverse[self.order[0]][:, self.order[0]]
        self.dense = dense.gather(2, self.order.unsqueeze(1).expand_as(dense))
        most = _most_pruned(product)
        # U; rows that one band has not filled yet must be zero where another band has.
        make = torch.empty if self.bands == 1 else torch.zeros
        self.factor = make((count, most, width), dtype=dtype or dense.dtype, device=device)
        self.shift = make((count, most, dense.shape[1]), dtype=dense.dtype, device=device)
        self.kept = torch.ones((count, width), dtype=torch.bool, device=device)
        self.time = 0  # rows of the factor in use
        # Bands of one scope lose different numbers of columns, so each counts its own rows.
        self.filled = (
            None if self.bands == 1 else torch.zeros(count, dtype=torch.int64, device=device)
        )
        self.batches: list[_Batch] = []

    def _visit(self, dense: Tensor) -> Tensor:
        column_scopes = self.product.columns.shape[0]
        columns = self.product.columns.flatten()
        count, _, width = dense.shape
        if self.batching.order == "left_to_right" or column_scopes == 1:
            return columns.expand(count, width)
        # By diagonal costs; C0 has a unit diagonal.
        cost = dense[..., columns].square().sum(1)
        blocks = self._by_scope(cost.unflatten(-1, self.product.columns.shape).sum(-1))
        dropped = self.product.blocks - self.product.keep
        if not dropped:
            return columns.expand(count, width)
        ranked = blocks.topk(dropped + 1, dim=-1, largest=False).values
        gap = ranked[..., dropped] - ranked[..., dropped - 1]
        visit = gap.argsort(dim=-1, descending=True, stable=True)  # (row scopes, column scopes)
        return self.product.columns[visit].flatten(1).repeat_interleave(self.bands, dim=0)

    def _by_scope(
        self,
        blocks: Tensor,  # (bands, scopes, competing)
    ) -> Tensor:
        """Values of blocks by the number of the block: (row scopes, scopes, blocks of a scope)."""
        split = blocks.unflatten(0, (self.row_scopes, self.bands)).transpose(1, 2).flatten(2)
        return split[..., self.product.place.argsort()]

    def _by_band(
        self,
        blocks: Tensor,  # (row scopes, scopes, blocks of a scope)
    ) -> Tensor:
        """The inverse of ``_by_scope``: (bands, scopes, competing)."""
        split = blocks[..., self.product.place].unflatten(2, (self.bands, -1))
        return split.transpose(1, 2).flatten(0, 1)

    def run(self) -> Iterator[int]:
        """Decide every scope; yields the number of positions done."""
        column_scopes, competing, width = self.product.columns.shape
        dropped = self.product.blocks - self.product.keep
        size = competing * width
        if not dropped:
            return
        for first in range(0, column_scopes, self.batching.scopes):
            last = min(first + self.batching.scopes, column_scopes)
            start, stop = first * size, last * size
            gone: Tensor | None = None  # (row scopes, scopes, blocks) bool
            for count in range(
                self.batching.blocks, dropped + self.batching.blocks, self.batching.blocks
            ):
                keep = self.product.blocks - min(count, dropped)
                weights = self._weights(start, stop)
                cost = self._by_scope(self._cost(weights, start, stop))
                if self.batching.scoring == "joint":
                    chosen = ~self._best_subset(weights, start, stop)
                else:
                    if gone is not None:
                        cost = cost.masked_fill(gone, -torch.inf)
                    chosen = ~top_blocks(cost.flatten(0, 1), keep).view(cost.shape)
                new = chosen if gone is None else chosen & ~gone
                gone = chosen
                spread = self._by_band(new).unsqueeze(-1).expand(-1, -1, -1, width)
                self._drop(weights, spread.flatten(1), start)
            yield stop

    def _weights(self, start: int, stop: int) -> Tensor:
        """Weights at positions [start, stop) now: (bands, rows, stop - start)."""
        dense = self.dense[:, :, start:stop]
        if not self.time:
            return dense
        return torch.baddbmm(
            dense,
            self.shift[:, : self.time].transpose(1, 2),
            self.factor[:, : self.time, start:stop].to(dense.dtype),
            alpha=-1,
        )

    def _inverse_at(self, positions: Tensor, start: int, stop: int) -> Tensor:
        """C0 at (bands, p) positions and the positions [start, stop): (bands, p, stop - start)."""
        if self.same:
            return self.inverse[positions, start:stop]
        # Whole rows, then their columns: on a CPU three times as fast as single elements.
        rows = self.inverse[self.order.gather(1, positions)]
        return rows.gather(2, self.order[:, None, start:stop].expand(-1, positions.shape[1], -1))

    def _squares(self, start: int, stop: int, size: int) -> Tensor:
        """C now, within each run of ``size`` positions: (bands, runs, size, size)."""
        count = (stop - start) // size
        runs = self.order[:, start:stop].unflatten(1, (count, size))
        if self.same:
            at = torch.arange(start, stop, device=runs.device).view(1, count, size)
            squares = self.inverse[at.unsqueeze(-1), at.unsqueeze(-2)].expand(len(runs), -1, -1, -1)
        else:
            flat = runs.unsqueeze(-1) * len(self.inverse) + runs.unsqueeze(-2)
            squares = self.inverse.take(flat)
        if not self.time:
            return squares.clone()
        past = self.factor[:, : self.time, start:stop].to(squares.dtype)
        past = past.unflatten(2, (count, size)).transpose(1, 2)  # (bands, runs, time, size)
        return squares - past.transpose(2, 3) @ past

    def _cost(self, weights: Tensor, start: int, stop: int) -> Tensor:
        """Cost of each block by itself: (bands, scopes, competing)."""
        _, competing, width = self.product.columns.shape
        if width == 1:
            left = torch.ones(
                (len(weights), stop - start), dtype=weights.dtype, device=weights.device
            )
            if self.time:
                past = self.factor[:, : self.time, start:stop]
                left = left - torch.linalg.vector_norm(past, dim=1, dtype=left.dtype).square_()
            cost = weights.square().sum(1) / left.clamp_min(least_pivot(left.dtype))
        else:
            squares = self._squares(start, stop, width)
            cost = quadratic(squares, weights.unflatten(2, (-1, width)).transpose(1, 2))
        return cost.unflatten(1, (-1, competing))

    def _best_subset(self, weights: Tensor, start: int, stop: int) -> Tensor:
        """The blocks to keep, (row scopes, scopes, blocks) bool, by the cost of the others together."""
        _, competing, width = self.product.columns.shape
        n = self.product.blocks
        subsets = torch.zeros(
            (math.comb(n, self.product.keep), n), dtype=torch.bool, device=weights.device
        )
        for row, dropped in enumerate(itertools.combinations(range(n), n - self.product.keep)):
            subsets[row, list(dropped)] = True
        squares = self._squares(start, stop, competing * width)  # (bands, scopes, s, s)
        # (bands, scopes, rows, s)
        held = weights.unflatten(2, (-1, competing * width)).transpose(1, 2)
        by_band = subsets[:, self.product.place].unflatten(1, (self.bands, competing))
        best = None
        cheapest = None
        for number, drop in enumerate(by_band.unbind(0)):  # (bands of a scope, competing)
            out = drop.repeat_interleave(width, dim=1).repeat(self.row_scopes, 1)  # (bands, s)
            cost = _dropped_cost(squares, held, out)
            cost = cost.view(self.row_scopes, self.bands, -1).sum(1)  # (row scopes, scopes)
            if cheapest is None or best is None:
                cheapest, best = cost, torch.zeros_like(cost, dtype=torch.int64)
                continue
            better = cost < cheapest
            cheapest = torch.where(better, cost, cheapest)
            best = torch.where(better, number, best)
        assert best is not None
        return ~subsets[best]

    def _drop(
        self,
        weights: Tensor,  # (bands, rows, stop - start)
        dropped: Tensor,  # (bands, stop - start) bool
        start: int,
    ) -> None:
        """Take the dropped positions out of every band's inverse, and record how the others must move."""
        lost = dropped.sum(1)
        most = int(lost.amax()) if self.bands > 1 else int(lost[0])
        inside = dropped.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
        positions = inside + start
        columns = self._inverse_at(positions, start, self.dense.shape[2])  # (bands, p, F)
        if self.time:
            past = self.factor[:, : self.time]
            at = past.gather(2, positions.unsqueeze(1).expand(-1, self.time, -1))
            ahead = past[:, :, start:]
            if past.dtype == columns.dtype:
                columns.baddbmm_(at.transpose(1, 2), ahead, alpha=-1)
            else:  # one product in the dtype of the factor, subtracted in that of the weights
                columns.sub_(at.transpose(1, 2) @ ahead)
        owed = weights.gather(2, inside.unsqueeze(1).expand(-1, weights.shape[1], -1))
        valid = None
        if self.bands > 1:  # bands lose different numbers of columns: pad with rows of the identity
            valid = dropped.gather(1, inside)
            columns.masked_fill_(~valid.unsqueeze(-1), 0.0)
            owed = owed.masked_fill_(~valid.unsqueeze(1), 0.0)
        own = columns.gather(2, inside.unsqueeze(1).expand(-1, most, -1))
        if valid is not None:
            own.masked_fill_(~valid.unsqueeze(1), 0.0)
            own.diagonal(dim1=1, dim2=2).add_((~valid).to(own.dtype))
        lower = cholesky(own)
        columns = torch.linalg.solve_triangular(lower, columns, upper=False)
        shift = torch.linalg.solve_triangular(lower, owed.transpose(1, 2), upper=False)
        rows = self._rows(self.time if self.filled is None else self.filled.clone(), most)
        self._at(self.factor[:, :, start:], rows, columns.to(self.factor.dtype))
        self._at(self.shift, rows, shift)
        self.batches.append(_Batch(rows, start, positions, valid, lower))
        gone = torch.zeros_like(positions, dtype=torch.bool) if valid is None else ~valid
        self.kept.scatter_(1, positions, gone & self.kept.gather(1, positions))
        if self.filled is None:
            self.time += most
        else:
            self.filled += lost
            self.time = int(self.filled.amax())

    def _rows(self, first: int | Tensor, count: int) -> slice | Tensor:
        """Rows of the factor: a slice for all bands, or (bands, count) places for bands of their own."""
        if isinstance(first, int):
            return slice(first, first + count)
        rows = first[:, None] + torch.arange(count, device=first.device)
        return rows.clamp_max_(self.factor.shape[1] - 1)

    def _at(self, held: Tensor, rows: slice | Tensor, values: Tensor | None = None) -> Tensor:
        """Read rows of each band, or write them; its next rows overwrite the padding of a band."""
        if isinstance(rows, slice):
            if values is not None:
                held[:, rows] = values
            return held[:, rows]
        place = rows.unsqueeze(-1).expand(-1, -1, held.shape[2])
        return held.gather(1, place) if values is None else held.scatter_(1, place, values)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Weights (bands, rows, K) and mask (bands, K), by column.

        With S all dropped columns and ``C0_SS = L L'``: ``w = w0 - w0_S (L L')^-1 C0_S``. ``shift`` holds
        ``L^-1 w0_S``; a block of L' lies in the factor, and is solved from the last batch to the first.
        """
        multiplier = torch.zeros_like(self.dense)  # (bands, rows, K): w0_S (L L')^-1 by position
        for batch in reversed(self.batches):
            reached = self._at(self.factor[:, :, batch.start :], batch.rows)
            ahead = multiplier[:, :, batch.start :].transpose(1, 2)
            later = reached.to(multiplier.dtype) @ ahead
            owed = torch.linalg.solve_triangular(
                batch.lower.transpose(1, 2), self._at(self.shift, batch.rows) - later, upper=True
            )
            if batch.valid is not None:
                owed = owed.masked_fill_(~batch.valid.unsqueeze(-1), 0.0)
            owed = owed.transpose(1, 2)
            multiplier.scatter_add_(2, batch.positions.unsqueeze(1).expand_as(owed), owed)
        if self.same:
            moved = self.dense - multiplier @ self.inverse
            weights = torch.empty_like(moved)
        else:
            by_column = torch.empty_like(multiplier)
            by_column.scatter_(2, self.order.unsqueeze(1).expand_as(multiplier), multiplier)
            moved = self.dense - (by_column @ self.inverse).gather(
                2, self.order.unsqueeze(1).expand_as(multiplier)
            )
            weights = by_column
        weights.scatter_(2, self.order.unsqueeze(1).expand_as(moved), moved)
        kept = torch.empty_like(self.kept).scatter_(1, self.order, self.kept)
        return weights, kept


def _dropped_cost(
    squares: Tensor,  # (bands, scopes, s, s)
    held: Tensor,  # (bands, scopes, rows, s)
    out: Tensor,  # (bands, s) bool; as many True in every band where one size serves all
) -> Tensor:
    """Cost of dropping the positions ``out`` of every scope: (bands, scopes)."""
    if bool((out == out[0]).all()):
        index = out[0].nonzero().flatten()
        return quadratic(squares[..., index[:, None], index], held[..., index])
    both = out.unsqueeze(-1) & out.unsqueeze(-2)
    masked = squares.masked_fill(~both.unsqueeze(1), 0.0)
    masked.diagonal(dim1=-2, dim2=-1).add_((~out).to(masked.dtype).unsqueeze(1))
    return quadratic(masked, held.masked_fill(~out[:, None, None], 0.0))
