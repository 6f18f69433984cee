"""Scopes: sets of blocks that compete for a budget, in one tensor or over several."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from s3tensor.errors import PatternError
from s3tensor.mask.order_statistics import kth_largest, mid_kth_largest
from s3tensor.mask.projection import tile_norms, top_blocks
from s3tensor.paper.block import Blocks, BlockSpec, Values
from s3tensor.paper.grid import Coupling, Grid, back
from s3tensor.paper.view import View, grid_first, whole_dims
from s3tensor.pattern import BoundPattern, Pattern, ViewRule
from s3tensor.pattern.layout import as_int


class Scopes(Grid["ScopeSpec"]):
    """A grid of scopes, in each of which the same number of blocks competes.

    Blocks of a scope are numbered in row-major order; in a coupling, one tensor after another.
    """

    cell: ClassVar[str] = "scope"

    def blocks(self) -> Iterator[BlockSpec]:
        """The ``BlockSpec`` of each tensor."""
        return (block for scope, _ in self.members for block in scope.block.blocks())

    def numscp(self) -> int:
        """Scopes in the grid."""
        return math.prod(self.grid_shape)

    def numblk_per_scope(self) -> int:
        """Blocks that compete in one scope."""
        return sum(math.prod(scope.shape) for scope, _ in self.members)

    def numblk(self) -> int:
        """Blocks in all scopes."""
        return self.numscp() * self.numblk_per_scope()

    def numel_per_scope(self) -> int:
        """Elements in one scope."""
        return sum(
            math.prod(scope.shape) * scope.block.numel_per_block() for scope, _ in self.members
        )

    def sparsity_to_nnz(self, sparsity: float) -> int:
        """Blocks to keep in each scope so that at most the share ``sparsity`` of them is pruned.

        Raises:
            PatternError: a share outside [0, 1].
        """
        if not 0.0 <= sparsity <= 1.0:
            raise PatternError(f"sparsity={sparsity} must be the pruned share, from 0 to 1")
        n = self.numblk_per_scope()
        # Minus 1e-9, because 0.7 of 10 leaves 3.0000000000000004.
        return math.ceil(n * (1.0 - sparsity) - 1e-9)

    def block_norms(
        self,
        values: Values = None,
    ) -> Tensor:
        """Euclidean norm of each block by scope: (*grid_shape, numblk_per_scope)."""
        return self._gather([scope.block.norms(values) for scope, _ in self.members])

    def kth_mid(self, values: Values = None, nnz: int = 1, k_weight: float = 1.0) -> Tensor:
        """A threshold between the ``nnz``-th largest block norm of each scope and the next: (*grid_shape).

        See :func:`s3tensor.mask.order_statistics.mid_kth_largest`.
        """
        return mid_kth_largest(self.block_norms(values), nnz, dim=-1, k_weight=k_weight)

    def hard_threshold(
        self,
        thresholds: Tensor | None = None,  # (*grid_shape)
        nnz: int | None = None,
        values: Values = None,
    ) -> None:
        """Zero blocks in place: those whose norm is below their scope's threshold, or all but the best.

        With ``nnz`` and the data's own norms it is the Euclidean projection onto the tensors with at
        most ``nnz`` blocks in each scope, the same as :func:`s3tensor.project`: exactly ``nnz`` blocks
        are left, ties going to the lowest index.

        Args:
            thresholds: one for each scope, such as :meth:`kth_largest`; blocks of that norm are kept.
            nnz: blocks to keep in each scope, from 0 to all.
            values: elements whose norms decide; default the data itself.

        Raises:
            PatternError: both or neither of ``thresholds`` and ``nnz``, or one that does not fit.
            NonFiniteError: NaN or Inf in the values, with ``nnz``.
        """
        if (thresholds is None) == (nnz is None):
            raise PatternError("give exactly one of thresholds= and nnz=")
        if nnz is not None:
            self._keep(self._best(nnz, values))
            return
        norms = self.block_norms(values)
        limit = self._per_cell(torch.as_tensor(thresholds), "thresholds").to(norms.device)
        self._keep(~(norms < limit.unsqueeze(-1)))

    def soft_threshold(
        self,
        thresholds: Tensor,  # (*grid_shape), >= 0
        conditioners: Values = None,
        scale: bool = False,
        max_iter: int = 60,
        atol: float = 0.0,
        eps: float | None = None,
    ) -> None:
        """Shrink every block's norm by its scope's threshold, in place; see :meth:`Blocks.soft_threshold`.

        Args:
            thresholds: one for each scope.
            conditioners: a diagonal metric, one value for each element.
            scale: multiply by ``sqrt(numel_per_block)``, so that blocks of different sizes are penalised
                alike (Yuan and Lin, 2006).
            max_iter, atol, eps: of the bisection with conditioners.
        """
        limit = self._per_cell(thresholds, "thresholds")
        for scope, order in self.members:
            own = scope.scope_to_block(back(limit, order))
            if scale:
                own = own * math.sqrt(scope.block.numel_per_block())
            scope.block.soft_threshold(own, conditioners, max_iter, atol, eps)

    def get_masks(
        self,
        nnz: int | None = None,
        values: Values = None,
        block_scores: Tensor | None = None,  # (*grid_shape, numblk_per_scope)
        block_mask: Tensor | None = None,  # (*grid_shape, numblk_per_scope) bool
    ) -> dict[BlockSpec, Tensor]:
        """The decision as a mask for each tensor, in its view's shape, True where kept; nothing is pruned.

        Args:
            nnz: blocks to keep in each scope, the best by ``block_scores`` or by norm.
            values: elements whose norms are the scores; default the data itself.
            block_scores: the importance of each block, by scope.
            block_mask: the decision itself, True where a block is kept; the others are then ignored.

        Raises:
            PatternError: neither ``nnz`` nor ``block_mask``, NaN in the scores, or a shape that does not fit.
        """
        if block_mask is None:
            if nnz is None:
                raise PatternError("give nnz=, the blocks to keep in each scope, or block_mask=")
            if block_scores is None:
                block_mask = self._best(nnz, values)
            else:
                scores = self._per_competitor(block_scores, "block_scores")
                if bool(scores.isnan().any()):
                    raise PatternError("block_scores hold NaN; an order of blocks is not defined")
                block_mask = self._top(scores, nnz)
        kept = self._per_competitor(block_mask, "block_mask").bool()
        masks: dict[BlockSpec, Tensor] = {}
        for scope, part in self._scatter(kept):
            masks.update(scope.block.get_masks(part))
        return masks

    def _best(self, nnz: int, values: Values) -> Tensor:
        """The ``nnz`` blocks of the largest norms: (*grid_shape, numblk_per_scope) bool."""
        largest = torch.stack([scope.block.largest(values) for scope, _ in self.members]).amax()
        norms = []
        for scope, _ in self.members:
            tiles = scope.block.tiles(values).abs()
            norms.append(tile_norms(tiles, largest.to(tiles.device)))
        return self._top(self._gather(norms), nnz)

    def _top(self, scores: Tensor, nnz: int) -> Tensor:
        n = self.numblk_per_scope()
        keep = as_int(nnz)
        if keep is None or not 0 <= keep <= n:
            raise PatternError(
                f"nnz={nnz!r:.80} of the {n} blocks of a scope; it must be an int from 0 to {n}"
            )
        if keep == 0:
            return torch.zeros_like(scores, dtype=torch.bool)
        return top_blocks(scores.reshape(-1, n), keep).reshape(scores.shape)

    def _gather(
        self,
        per_block: list[Tensor],  # for each member, its block grid
    ) -> Tensor:
        by_scope = [
            scope.block_to_scope(values, merge=True).permute(*order, len(order))
            for (scope, order), values in zip(self.members, per_block, strict=True)
        ]
        return by_scope[0] if len(by_scope) == 1 else torch.cat(by_scope, dim=-1)

    def _scatter(
        self,
        per_competitor: Tensor,  # (*grid_shape, numblk_per_scope)
    ) -> Iterator[tuple[ScopeSpec, Tensor]]:
        """Each member with its own values, on its block grid."""
        sizes = [math.prod(scope.shape) for scope, _ in self.members]
        split = per_competitor.split(sizes, dim=-1)
        for (scope, order), own in zip(self.members, split, strict=True):
            yield scope, scope.scope_to_block(back(own, (*order, len(order))))

    def _keep(
        self,
        kept: Tensor,  # (*grid_shape, numblk_per_scope) bool
    ) -> None:
        for scope, part in self._scatter(kept):
            scope.block.apply_mask(~part)

    def _per_competitor(self, values: Tensor, what: str) -> Tensor:
        full = (*self.grid_shape, self.numblk_per_scope())
        if values.shape != full:
            raise PatternError(
                f"{what} of shape {tuple(values.shape)}; it must be (*grid_shape, numblk_per_scope), "
                f"which is {full}"
            )
        return values.detach()


class ScopeSpec(Scopes):
    """The blocks of one grid, in scopes.

    Args:
        block: a :class:`BlockSpec` or a :class:`BlockCoupling`.
        shape: of a scope, **in blocks**; -1, or a missing trailing entry, is the whole dim.
        name: for messages.

    Example:
        2:4, in place:

        >>> weight = torch.nn.Parameter(torch.tensor([[1.0, -3.0, 2.0, 0.5]]))
        >>> ScopeSpec(BlockSpec(weight, shape=(1, 1)), shape=(1, 4)).hard_threshold(nnz=2)
        >>> weight.tolist()
        [[0.0, -3.0, 2.0, 0.0]]

    Raises:
        PatternError: scopes that do not tile the grid of blocks.
    """

    def __init__(self, block: Blocks, shape: Sequence[int], name: str | None = None) -> None:
        if not isinstance(block, Blocks):
            raise TypeError(
                f"a scope holds a BlockSpec or a BlockCoupling, got {type(block).__name__}"
            )
        self.block, self.name = block, name
        grid = block.grid_shape
        given = tuple(shape)
        given += (-1,) * (len(grid) - len(given))
        self.shape = whole_dims("scope", given, grid, "blocks")
        self._grid = tuple(n // size for n, size in zip(grid, self.shape, strict=True))

    @property
    def members(self) -> tuple[tuple[ScopeSpec, tuple[int, ...]], ...]:
        return ((self, tuple(range(len(self._grid)))),)

    def _identity(self) -> tuple[object, ...]:
        return self.block, self.shape

    def block_to_scope(
        self,
        b: Tensor,  # the blocks' grid shape
        reorder: bool = True,
        merge: bool = False,
    ) -> Tensor:
        """Values of blocks by scope.

        Returns:
            (*grid_shape, *shape); with ``reorder=False`` interleaved, (g0, s0, g1, s1, ...); with
            ``merge=True`` (*grid_shape, numblk_per_scope).
        """
        if b.shape != self.block.grid_shape:
            raise PatternError(
                f"values of shape {tuple(b.shape)} for a grid of {self.block.grid_shape} blocks"
            )
        interleaved = b.reshape(
            [n for pair in zip(self._grid, self.shape, strict=True) for n in pair]
        )
        if not (reorder or merge):
            return interleaved
        split = grid_first(interleaved)
        return split.flatten(len(self._grid)) if merge else split

    def scope_to_block(
        self,
        block_values: Tensor,  # (*grid_shape), (*grid_shape, numblk_per_scope) or (*grid_shape, *shape)
    ) -> Tensor:
        """Values of scopes on the grid of blocks: one a scope is spread over its blocks.

        For one value a block, in either shape, it is the inverse of :meth:`block_to_scope`.
        """
        ndim, inside = len(self._grid), math.prod(self.shape)
        shape = tuple(block_values.shape)
        if shape == self._grid:
            split = block_values.reshape(self._grid + (1,) * ndim).expand(self._grid + self.shape)
        elif shape in ((*self._grid, inside), self._grid + self.shape):
            split = block_values.reshape(self._grid + self.shape)
        else:
            raise PatternError(
                f"values of shape {shape} for scopes of a grid {self._grid} and shape {self.shape}; give "
                f"{self._grid}, {(*self._grid, inside)} or {self._grid + self.shape}"
            )
        order = [axis for dim in range(ndim) for axis in (dim, ndim + dim)]
        return split.permute(order).reshape(self.block.grid_shape)

    def kth_largest(self, element_values: Values = None, nnz: int = 1) -> Tensor:
        """The ``nnz``-th largest block norm of each scope, (*grid_shape): a threshold that keeps ``nnz``."""
        return kth_largest(self.block_norms(element_values), nnz, dim=-1)

    def pattern(self, nnz: int) -> Pattern:
        """This structure with a budget, as a :class:`s3tensor.Pattern` of the parameter's shape.

        Raises:
            PatternError: a coupling; a view that leaves elements out, or that joins several dims of the
                parameter in one, which no view rule describes.
        """
        if not isinstance(self.block, BlockSpec):
            raise PatternError(f"{self.block} spans several tensors; a Pattern is of one")
        rule, sizes = _rule_of(self.block.view)
        return Pattern(rule, sizes, self.block.shape, self.shape, nnz)

    def bind(self, nnz: int) -> BoundPattern:
        """:meth:`pattern`, bound to the parameter's shape."""
        pattern = self.pattern(nnz)
        assert isinstance(self.block, BlockSpec)
        return pattern.bind(tuple(self.block.view.param.shape))

    def __repr__(self) -> str:
        return self._label(f"{self.shape}, grid {self._grid}, {self.block}")


class ScopeCoupling(Coupling["ScopeSpec"], Scopes):
    """Scopes of several tensors joined into one scope each: the blocks of all of them compete.

    Args:
        scopes: of disjoint memory.
        orders: for each, the permutation of its grid's axes that aligns it with the others; default,
            an empty list, and None or an empty order for one scope, is the identity.
        name: for messages.

    Raises:
        PatternError: an order that is not a permutation, grids that differ, or memory that is shared.
    """

    def __init__(
        self,
        scopes: Sequence[Scopes],
        orders: Sequence[Sequence[int] | None] | None = None,
        name: str | None = None,
    ) -> None:
        self.scopes = list(scopes)
        super().__init__(self.scopes, orders, name)

    def kth_largest(
        self, k: int | None = None, values: Values = None, *, nnz: int | None = None
    ) -> Tensor:
        """The k-th largest block norm of each scope over all tensors, (*grid_shape); ``nnz`` is k."""
        if (k is None) == (nnz is None):
            raise PatternError("give exactly one of k= and nnz=, which mean the same")
        rank = nnz if k is None else k
        assert rank is not None
        return kth_largest(self.block_norms(values), rank, dim=-1)

    def __repr__(self) -> str:
        return self._label(f"grid {self.grid_shape}, {[scope for scope, _ in self.members]}")


def _rule_of(view: View) -> tuple[str | None, Mapping[str, int]]:
    """The view rule that makes ``view`` of its parameter, with the sizes of all but the slowest axes."""
    shape = tuple(view.param.shape)
    base = view.param.stride if isinstance(view.param, View) else view.param.stride()
    if (view.shape, view.stride, view.offset) == (shape, tuple(base), 0):
        return None, {}
    failure = f"{view} is not a split and permutation of the dims of its parameter"
    if view.offset or view.numel() != math.prod(shape):
        raise PatternError(f"{failure}: it leaves elements out; use specs without a Pattern")
    groups: list[list[int]] = [[] for _ in shape]
    thin = [axis for axis, n in enumerate(view.shape) if n == 1]
    for axis, (n, d) in enumerate(zip(view.shape, view.stride, strict=True)):
        inside = [dim for dim, m in enumerate(shape) if base[dim] <= d < base[dim] * m]
        if n > 1 and len(inside) == 1:
            groups[inside[0]].append(axis)
    # An axis of one element fits any dim; dims without an axis come first.
    for axis in thin:
        min(groups, key=len).append(axis)
    sizes: dict[str, int] = {}
    for dim, group in enumerate(groups):
        group.sort(key=lambda axis: (-view.stride[axis], view.shape[axis]))
        step = base[dim]
        for axis in reversed(group):
            if view.shape[axis] > 1 and view.stride[axis] != step:
                raise PatternError(f"{failure}: dim {dim} of {shape}; use specs without a Pattern")
            step *= view.shape[axis]
        if not group or step != base[dim] * shape[dim]:
            raise PatternError(f"{failure}: dim {dim} of {shape}; use specs without a Pattern")
        sizes.update({f"a{axis}": view.shape[axis] for axis in group[1:]})
    left = " ".join(f"({' '.join(f'a{axis}' for axis in group)})" for group in groups)
    right = " ".join(f"a{axis}" for axis in range(view.ndim))
    rule = str(ViewRule.parse(f"{left} -> {right}"))
    return rule, sizes
