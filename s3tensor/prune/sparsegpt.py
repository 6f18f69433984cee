"""SparseGPT on any S3 pattern: columns in sequence, each compensated for by the later ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from s3tensor.errors import PrunerError
from s3tensor.mask.projection import tile, top_blocks
from s3tensor.pattern import BoundPattern, Pattern
from s3tensor.prune.hessian import DAMP, Factors
from s3tensor.prune.linalg import full_precision
from s3tensor.prune.problem import MEMORY_BUDGET, Progress, Pruned, fit, pose
from s3tensor.prune.product import Product
from s3tensor.prune.registry import register

_MATRICES = 4  # tensors of a chunk's shape alive at once: weight, errors, update, mask


@dataclass(frozen=True)
class ColumnGroups:
    """The columns of a weight, grouped so that no scope crosses a group.

    Each group is the first one shifted, so that one local index serves them all.
    """

    order: Tensor  # (K,) int64: columns group by group, ascending inside a group
    width: int  # columns in a group

    @classmethod
    def of(cls, bound: BoundPattern) -> ColumnGroups:
        """Groups of the columns of a bound pattern."""
        groups = Product.of(bound).columns.flatten(1).sort(dim=1).values
        return cls(groups.flatten(), groups.shape[1])

    def local_blocks(self, bound: BoundPattern) -> Tensor:
        """Index of every element of the first group's scopes in its own (M, width) matrix.

        Shape (scopes, blocks_per_scope, block_size), int64; it holds for the matrix of each group.
        """
        rows, columns = bound.shape
        place = torch.full((columns,), -1, dtype=torch.int64)
        place[self.order[: self.width]] = torch.arange(self.width)
        index = torch.arange(rows)[:, None] * self.width + place
        tiles = tile(index.masked_fill_(place < 0, -1), bound)
        return tiles[(tiles >= 0).flatten(1).all(1)]


@register()
def sparsegpt(
    weight: Tensor,  # (M, K) any floating dtype
    hessian: Tensor | Factors | None,  # (K, K) X'X / N
    pattern: Pattern | str,
    *,
    damp: float = DAMP,
    lazy_columns: int = 128,
    memory_budget: int = MEMORY_BUDGET,
    progress: Progress | None = None,
) -> Pruned:
    """Prune column by column and let later columns compensate (SparseGPT, arXiv 2301.00774).

    With ``inv(H) = U'U``, U upper, dropping ``w_j`` costs ``(w_j / U_jj)^2 / 2`` and moves the columns
    after j by ``-(w_j / U_jj) U[j, j:]``. A scope is decided, by these costs summed over each block, at
    the first of its columns, for all rows that it couples. Columns are visited group by group (see
    :class:`ColumnGroups`), so a scope that spans whole rows is decided at the start.

    Args:
        weight: the dense weight.
        hessian: ``X'X / N``, or ``Factors`` shared with other linears of the same input.
        pattern: a pattern or its string.
        damp: share of the mean diagonal added to the diagonal; ``Factors`` bring their own.
        lazy_columns: columns whose updates to the rest of the matrix are one product (section 3.3,
            "lazy batch updates"); it changes speed, and results only by rounding.
        memory_budget: bytes of working memory; rows are pruned in chunks that fit.
        progress: called with (columns done, columns in all), over all chunks.

    Raises:
        PatternError, NonFiniteError, HessianError: see :mod:`s3tensor.prune.problem`; HessianError also
            when the damped Hessian is not positive definite.
        PrunerError: ``lazy_columns`` < 1.
    """
    if lazy_columns < 1:
        raise PrunerError(f"lazy_columns={lazy_columns} must be >= 1")
    problem = pose(weight, pattern)
    factors = fit(problem, hessian, damp, "sparsegpt")
    groups = ColumnGroups.of(problem.bound)
    order = groups.order.to(weight.device)
    natural = bool((groups.order == torch.arange(len(groups.order))).all())
    upper = factors.inverse_cholesky(None if natural else order)
    result = factors.clear_dead(problem.dense)[:, order]
    mask = torch.empty_like(result, dtype=torch.bool)
    chunks = list(problem.chunks(_MATRICES, memory_budget))
    with full_precision():
        for number, (part, bound) in enumerate(chunks):
            sweep = _Sweep(result[part].T.contiguous(), upper, groups, bound)
            for done in sweep.run(lazy_columns):
                if progress is not None:
                    progress(number * len(order) + done, len(chunks) * len(order))
            result[part], mask[part] = sweep.columns.T, sweep.mask.T
    back = torch.argsort(order)
    return problem.finish(result[:, back], mask[:, back])


class _Sweep:
    """One pass over the columns of a chunk of rows; columns are stored as contiguous rows (K, M)."""

    def __init__(
        self,
        columns: Tensor,  # (K, M), in group order; pruned in place
        upper: Tensor,  # (K, K)
        groups: ColumnGroups,
        bound: BoundPattern,
    ) -> None:
        self.columns, self.upper = columns, upper
        self.mask = torch.empty_like(columns, dtype=torch.bool)
        self._inverse = upper.diagonal().reciprocal()
        self._width, self._keep = groups.width, bound.keep
        self._blocks = groups.local_blocks(bound).to(columns.device)

    def run(self, lazy_columns: int) -> Iterator[int]:
        """Prune every column; yields the number of columns done."""
        total, width = len(self.columns), self._width
        step = max(1, lazy_columns // width) * width if width <= lazy_columns else lazy_columns
        for first in range(0, total, width if width > lazy_columns else step):
            last = min(total, first + max(width, step))
            if width > lazy_columns:
                self._decide(first)
            for start in range(first, last, step):
                stop = min(start + step, last)
                errors = self._prune(start, stop, decide=width <= lazy_columns)
                self.columns[stop:].addmm_(self.upper[start:stop, stop:].T, errors, alpha=-1)
                yield stop

    def _decide(self, start: int) -> None:
        """Choose what the scopes of the group that begins at column ``start`` keep."""
        part = slice(start, start + self._width)
        scores = (self.columns[part] * self._inverse[part, None]).square_().T
        tiles = scores.reshape(-1)[self._blocks]
        kept = top_blocks(tiles.sum(-1), self._keep)
        chosen = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
        chosen.view(-1)[self._blocks] = kept.unsqueeze(-1).expand_as(self._blocks)
        self.mask[part] = chosen.T

    def _prune(self, start: int, stop: int, decide: bool) -> Tensor:
        """Prune columns [start, stop); returns their scaled errors (stop - start, M)."""
        errors = torch.empty_like(self.columns[start:stop])
        for j in range(start, stop):
            if decide and j % self._width == 0:
                self._decide(j)
            column = self.columns[j]
            errors[j - start] = error = column.masked_fill(self.mask[j], 0.0).mul_(self._inverse[j])
            column.mul_(self.mask[j])
            self.columns[j + 1 : stop].addr_(self.upper[j, j + 1 : stop], error, alpha=-1)
        return errors
