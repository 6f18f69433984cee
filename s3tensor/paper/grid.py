"""Grids of blocks and of scopes over one tensor or several, and couplings of grids."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from s3tensor.errors import PatternError
from s3tensor.paper.view import View, check_disjoint
from s3tensor.pattern.layout import as_ints

if TYPE_CHECKING:
    from s3tensor.paper.block import BlockSpec

Leaf = TypeVar("Leaf")  # a spec of one tensor: BlockSpec or ScopeSpec


class Grid(abc.ABC, Generic[Leaf]):
    """A grid of blocks or of scopes, with the specs of single tensors that it is made of."""

    cell: ClassVar[str]  # "block" or "scope", for messages
    name: str | None
    _grid: tuple[int, ...]

    @property
    def grid_shape(self) -> tuple[int, ...]:
        """Number of blocks, or of scopes, along each dim."""
        return self._grid

    @property
    @abc.abstractmethod
    def members(self) -> tuple[tuple[Leaf, tuple[int, ...]], ...]:
        """The spec of each tensor, with the axis order that takes its grid to :attr:`grid_shape`."""

    @abc.abstractmethod
    def blocks(self) -> Iterator[BlockSpec]:
        """The ``BlockSpec`` of each tensor."""

    def parameters(self) -> list[View]:
        """The view of each tensor."""
        return [block.view for block in self.blocks()]

    def nnz(self, eps: float = 1e-8) -> int:
        """Elements of a magnitude above ``eps``."""
        return sum(int((block.view.data.abs() > eps).sum()) for block in self.blocks())

    def _per_cell(self, values: Tensor, what: str) -> Tensor:
        """``values`` in the grid's shape; a single value serves every cell."""
        if not isinstance(values, Tensor):
            values = torch.as_tensor(values)
        if values.ndim and values.shape != self.grid_shape:
            raise PatternError(
                f"{what} of shape {tuple(values.shape)} for a grid of {self.grid_shape} {self.cell}s; give "
                f"one value a {self.cell}"
            )
        return values.detach().expand(self.grid_shape)

    @abc.abstractmethod
    def _identity(self) -> tuple[object, ...]:
        """What makes two grids one: the views, and how they are divided; names do not count."""

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash((type(self), *self._identity()))

    def _label(self, text: str) -> str:
        return f"{type(self).__name__}({self.name + ': ' if self.name else ''}{text})"


class Coupling(Grid[Leaf]):
    """Grids of several tensors in one, aligned by the order of their axes.

    Args:
        grids: of disjoint memory, on one device.
        orders: for each, the permutation of its axes that aligns it with the others; default, an empty list,
            and None or an empty order for one grid, is the identity.
        name: for messages.

    Raises:
        PatternError: an order that is not a permutation, grids that differ, or memory that is shared.
    """

    def __init__(
        self,
        grids: Sequence[Grid[Leaf]],
        orders: Sequence[Sequence[int] | None] | None = None,
        name: str | None = None,
    ) -> None:
        self.name = name
        self.orders = align(f"{self.cell}s", [grid.grid_shape for grid in grids], orders, grids)
        self._members = leaves([grid.members for grid in grids], self.orders)
        self._grid = tuple(grids[0].grid_shape[axis] for axis in self.orders[0])
        check_disjoint(self.parameters())
        check_devices(self.parameters())

    @property
    def members(self) -> tuple[tuple[Leaf, tuple[int, ...]], ...]:
        return self._members

    def _identity(self) -> tuple[object, ...]:
        return self._members


def leaves(
    members: Sequence[Sequence[tuple[Leaf, tuple[int, ...]]]],
    orders: Sequence[tuple[int, ...]],
) -> tuple[tuple[Leaf, tuple[int, ...]], ...]:
    """The specs of single tensors below a coupling, each with its axis order in the coupling's grid."""
    return tuple(
        (leaf, tuple(inner[axis] for axis in outer))
        for group, outer in zip(members, orders, strict=True)
        for leaf, inner in group
    )


def align(
    what: str,
    grids: Sequence[tuple[int, ...]],
    orders: Sequence[Sequence[int] | None] | None,
    named: Sequence[object],
) -> tuple[tuple[int, ...], ...]:
    """Checked axis orders under which all grids are the same."""
    if not grids:
        raise PatternError(f"a coupling of {what} needs at least one")
    wanted = list(orders) if orders is not None and len(orders) else [None] * len(grids)
    if len(wanted) != len(grids):
        raise PatternError(f"{len(wanted)} orders for {len(grids)} grids; give one for each")
    checked: list[tuple[int, ...]] = []
    for grid, order, spec in zip(grids, wanted, named, strict=True):
        full = _order(order, len(grid))
        if sorted(full) != list(range(len(grid))):
            raise PatternError(
                f"order {full} is not a permutation of the axes 0 to {len(grid) - 1} of the grid {grid} of "
                f"{spec}"
            )
        aligned = tuple(grid[axis] for axis in full)
        first = tuple(grids[0][axis] for axis in checked[0]) if checked else aligned
        if aligned != first:
            raise PatternError(
                f"grids of coupled {what} differ: {first} of {named[0]} and {aligned} of {spec}, in "
                f"order {full}; choose orders, views or shapes that give one grid"
            )
        checked.append(full)
    return tuple(checked)


def _order(order: Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    """An order of axes as ints; None and an empty one are the identity."""
    if order is None or len(order) == 0:
        return tuple(range(ndim))
    return as_ints("order", order, 0)


def check_devices(views: Sequence[View]) -> None:
    """Refuse coupled tensors on several devices."""
    devices = sorted({str(view.device) for view in views})
    if len(devices) > 1:
        raise PatternError(
            f"coupled tensors lie on {' and '.join(devices)}; move them to one device"
        )


def back(values: Tensor, order: tuple[int, ...]) -> Tensor:
    """Undo ``permute(order)``."""
    return values.permute(sorted(range(len(order)), key=order.__getitem__))
