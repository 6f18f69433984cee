"""Blocks: the smallest sets of weights that are pruned or kept together, over one tensor or several."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from s3tensor.errors import NonFiniteError, PatternError
from s3tensor.paper import proximal
from s3tensor.paper.grid import Coupling, Grid, back
from s3tensor.paper.view import View, whole_dims

Values = Tensor | Mapping["BlockSpec", Tensor] | None
"""One value for each element: a tensor in the view's shape or in the parameter's, one such tensor for each
``BlockSpec`` of a coupling, or None for the parameters' own data."""


class Blocks(Grid["BlockSpec"]):
    """A grid of blocks. What writes, writes to the parameters in place, outside autograd."""

    cell: ClassVar[str] = "block"

    @property
    def grid_ndim(self) -> int:
        """Dims of the grid."""
        return len(self.grid_shape)

    def blocks(self) -> Iterator[BlockSpec]:
        """The ``BlockSpec`` of each tensor."""
        return (spec for spec, _ in self.members)

    def numblk(self) -> int:
        """Blocks in the grid."""
        return math.prod(self.grid_shape)

    def numel_per_block(self) -> int:
        """Elements in one block, over all tensors."""
        return sum(math.prod(spec.shape) for spec in self.blocks())

    def numel(self) -> int:
        """Elements in all blocks."""
        return self.numblk() * self.numel_per_block()

    def tiles(self, values: Values = None) -> Tensor:
        """The elements of each block side by side: (*grid_shape, numel_per_block), a copy or a view."""
        tiles = [
            spec.block_view(spec.given(values), merge=True).permute(*order, len(order))
            for spec, order in self.members
        ]
        return tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=-1)

    def norms(self, values: Values = None, p: float = 2.0) -> Tensor:
        """p-norm of each block, (*grid_shape), for any p >= 0 and ``inf``; over all coupled tensors."""
        return proximal.norms(self.tiles(values), p)

    def min(self, values: Values = None) -> Tensor:
        """Smallest element of each block, (*grid_shape)."""
        return self.tiles(values).amin(-1)

    def max(self, values: Values = None) -> Tensor:
        """Largest element of each block, (*grid_shape)."""
        return self.tiles(values).amax(-1)

    def reduce(self, values: Values, reduce_fn: Callable[[Tensor], Tensor]) -> Tensor:
        """``reduce_fn`` of the (*grid_shape, numel_per_block) elements, which it takes to (*grid_shape).

        Raises:
            PatternError: when its result is not one value for each block.
        """
        reduced = reduce_fn(self.tiles(values))
        if reduced.numel() != self.numblk():
            raise PatternError(
                f"reduce_fn returned shape {tuple(reduced.shape)}; it must reduce the last dim of "
                f"{(*self.grid_shape, self.numel_per_block())} and leave one value a block"
            )
        return reduced.reshape(self.grid_shape)

    def apply_mask(
        self,
        mask: Tensor,  # (*grid_shape) bool
    ) -> None:
        """Zero every block where ``mask`` is **True**."""
        mask = self._per_cell(mask, "mask")
        for spec, order in self.members:
            spec.view.apply_mask(back(mask, order), spec.shape)

    def apply_multiplier(
        self,
        multiplier: Tensor,  # (*grid_shape)
    ) -> None:
        """Multiply every element of a block by its block's factor."""
        multiplier = self._per_cell(multiplier, "multiplier")
        for spec, order in self.members:
            spec.view.apply_multiplier(back(multiplier, order), spec.shape)

    def hard_threshold(
        self,
        thresholds: Tensor,  # (*grid_shape)
        values: Values = None,
    ) -> None:
        """Zero the blocks whose Euclidean norm is below their threshold.

        Args:
            thresholds: one for each block.
            values: elements whose norms decide; default the data itself.
        """
        norms = self.norms(values)
        self.apply_mask(norms < self._per_cell(thresholds, "thresholds").to(norms.device))

    def soft_threshold(
        self,
        block_thresholds: Tensor,  # (*grid_shape), >= 0
        conditioners: Values = None,
        max_iter: int = 60,
        atol: float = 0.0,
        eps: float | None = None,
    ) -> None:
        """The proximal step of ``t ||block||``: shrink every block's norm by its threshold, down to 0.

        Args:
            block_thresholds: t, one for each block.
            conditioners: the diagonal D of the metric in which the step is taken, one value >= 0 for each
                element: ``argmin (x - v)' D (x - v) / 2 + t ||x||``, exactly, by bisection. Default: the
                identity, for which the step has a closed form.
            max_iter: bisections (with conditioners).
            atol: stop when every block's norm is known to within this (with conditioners).
            eps: added to the conditioners, as Adam's is to its square roots.

        Raises:
            PatternError: see :func:`s3tensor.paper.proximal.conditioned_soft_threshold`.
        """
        thresholds = self._per_cell(block_thresholds, "thresholds")
        tiles = self.tiles()
        thresholds = thresholds.to(tiles.device)
        if conditioners is None:
            # Rounded once, from float64: a float32 factor is inexact where a block is almost pruned.
            self._write(tiles.double() * proximal.shrinkage(tiles, thresholds).unsqueeze(-1))
            return
        curved = self.tiles(conditioners).to(tiles.device).double()
        if eps is not None:
            curved = curved + eps
        self._write(proximal.conditioned_soft_threshold(tiles, thresholds, curved, max_iter, atol))

    def get_masks(
        self,
        block_masks: Tensor,  # (*grid_shape) bool
    ) -> dict[BlockSpec, Tensor]:
        """A decision for each block spread over its elements: a mask in each view's shape."""
        block_masks = self._per_cell(block_masks, "block_masks")
        return {
            spec: spec.broadcast_block_to_element(back(block_masks, order))
            for spec, order in self.members
        }

    def largest(self, values: Values = None) -> Tensor:
        """Largest magnitude of any element, 0-dim.

        Raises:
            NonFiniteError: NaN or Inf, on which no order of blocks is defined.
        """
        found = torch.stack(
            [spec.given(values).abs().amax().double().cpu() for spec in self.blocks()]
        ).amax()
        if not bool(torch.isfinite(found)):
            raise NonFiniteError(f"{self} holds NaN or Inf; repair it before it is pruned")
        return found

    def _write(
        self,
        tiles: Tensor,  # (*grid_shape, numel_per_block)
    ) -> None:
        sizes = [math.prod(spec.shape) for spec in self.blocks()]
        with torch.no_grad():
            for (spec, order), part in zip(self.members, tiles.split(sizes, dim=-1), strict=True):
                own = back(part, (*order, len(order)))
                spec.block_view().copy_(own.unflatten(-1, spec.shape))


class BlockSpec(Blocks):
    """One tensor as a grid of blocks.

    Args:
        param: a parameter, a tensor or a :class:`View`.
        shape: of a block, in elements of the view; -1 is the whole dim.
        name: for messages.

    Example:
        >>> block = BlockSpec(torch.ones(4, 8), shape=(2, 4))
        >>> block.grid_shape, block.norms(p=1).tolist()
        ((2, 2), [[8.0, 8.0], [8.0, 8.0]])

    Raises:
        PatternError: blocks that do not tile the view.
    """

    def __init__(self, param: Tensor | View, shape: Sequence[int], name: str | None = None) -> None:
        self.view = View.from_existing(param)
        self.name = name
        self.shape = whole_dims("block", shape, self.view.shape, "elements of the view")
        self._grid = self.view.layout.divide(self.shape)[0].shape

    @property
    def members(self) -> tuple[tuple[BlockSpec, tuple[int, ...]], ...]:
        return ((self, tuple(range(self.grid_ndim))),)

    def _identity(self) -> tuple[object, ...]:
        return self.view, self.shape

    @property
    def ndim(self) -> int:
        """Dims of the view."""
        return self.view.ndim

    @property
    def data(self) -> Tensor:
        """The elements in the view's shape, live."""
        return self.view.data

    def set_data(
        self,
        data: Tensor,  # the view's shape
    ) -> None:
        """Copy values into the parameter."""
        if data.shape != self.view.shape:
            raise PatternError(
                f"data of shape {tuple(data.shape)} for a view of shape {self.view.shape}"
            )
        with torch.no_grad():
            self.view.data.copy_(data.detach())

    def given(self, values: Values = None) -> Tensor:
        """The values of this spec's elements, in the view's shape; the live data for None.

        Values of the parameter's shape are read through the view. Where both shapes are one, they are taken
        for the view's.
        """
        if values is None:
            return self.view.data
        if isinstance(values, Mapping):
            if self not in values:
                raise PatternError(f"values lack an entry for {self}; give one for each BlockSpec")
            values = values[self]
        if values.shape == self.view.shape:
            return values.detach()
        if values.shape == self.view.param.shape:
            return self.view.of(values)
        raise PatternError(
            f"values of shape {tuple(values.shape)} for {self}; they must have the shape of the view, "
            f"{self.view.shape}, or of the parameter, {tuple(self.view.param.shape)}"
        )

    def block_view(
        self, values: Values = None, reorder: bool = True, merge: bool = False
    ) -> Tensor:
        """Elements by block; the live data where ``values`` is None and ``merge`` is False.

        Returns:
            (*grid_shape, *shape); with ``reorder=False`` interleaved, (g0, b0, g1, b1, ...); with
            ``merge=True`` (*grid_shape, numel_per_block).
        """
        return View.block_view_of(self.given(values), self.shape, reorder, merge)

    def broadcast_block_to_element(
        self,
        block_values: Tensor,  # (*grid_shape)
        fake: bool = False,
    ) -> Tensor:
        """A value for each block, spread over its elements, in the view's shape.

        With ``fake=True`` nothing is spread: shape (g0, 1, g1, 1, ...), which broadcasts against the
        interleaved :meth:`block_view`.
        """
        values = self._per_cell(block_values, "block values")
        return View.broadcast_block_to_element(values, self.shape, fake)

    def __repr__(self) -> str:
        return self._label(f"{self.shape}, grid {self.grid_shape}, {self.view}")


class BlockCoupling(Coupling["BlockSpec"], Blocks):
    """Blocks of several tensors joined into one block each: they are pruned or kept together.

    Args:
        specs: grids of blocks, of disjoint memory.
        orders: for each spec, the permutation of its grid's axes that aligns it with the others;
            default, an empty list, and None or an empty order for one spec, is the identity.
        name: for messages.

    Example:
        The channels of an MLP: rows of two weights and columns of a third.

        >>> up, down = torch.ones(6, 4), torch.ones(4, 6)
        >>> channels = BlockCoupling([BlockSpec(up, (1, -1)), BlockSpec(down, (-1, 1))], [(0, 1), (1, 0)])
        >>> channels.grid_shape, channels.numel_per_block()
        ((6, 1), 8)

    Raises:
        PatternError: an order that is not a permutation, grids that differ, or memory that is shared.
    """

    def __init__(
        self,
        specs: Sequence[Blocks],
        orders: Sequence[Sequence[int] | None] | None = None,
        name: str | None = None,
    ) -> None:
        self.specs = list(specs)
        super().__init__(self.specs, orders, name)

    @property
    def data(self) -> dict[BlockSpec, Tensor]:
        """The elements of each tensor in its view's shape, live."""
        return {spec: spec.data for spec in self.blocks()}

    def set_data(self, data: Mapping[BlockSpec, Tensor]) -> None:
        """Copy values into every parameter."""
        for spec in self.blocks():
            spec.set_data(spec.given(data))

    def block_view(self, values: Values = None) -> Tensor:
        """Elements by block over all tensors, (*grid_shape, numel_per_block), a copy."""
        return self.tiles(values)

    def broadcast_block_to_element(
        self,
        block_values: Tensor,  # (*grid_shape)
    ) -> dict[BlockSpec, Tensor]:
        """A value for each block, spread over its elements, for each tensor in its view's shape."""
        values = self._per_cell(block_values, "block values")
        return {
            spec: spec.broadcast_block_to_element(back(values, order))
            for spec, order in self.members
        }

    def __repr__(self) -> str:
        return self._label(f"grid {self.grid_shape}, {list(self.blocks())}")
