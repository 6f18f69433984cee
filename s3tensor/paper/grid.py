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

    def _label(self, text: str) -> str:
        return f"{type(self).__name__}({self.name + ': ' if self.name else ''}{text})"


class Coupling(Grid[Leaf]):
    """Grids of several tensors in one, aligned by the order of their axes.

    Args:
        grids: of disjoint memory, on one device.
        orders: for each, the permutation of its axes that aligns it with the others; default, and None for
            one grid, is the identity.
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


def whole_dims(what: str, shape: Sequence[int], grid: tuple[int, ...], of: str) -> tuple[int, ...]:
    """``shape`` with -1 filled in, checked to tile ``grid``."""
    given = as_ints(f"{what} shape", shape, -1)
    if len(given) != len(grid) or 0 in given:
        raise PatternError(
            f"{what} shape {given} must hold an int >= 1, or -1 for the whole dim, for each of the "
            f"{len(grid)} dims of {grid}"
        )
    full = tuple(n if size == -1 else size for size, n in zip(given, grid, strict=True))
    for dim, (size, n) in enumerate(zip(full, grid, strict=True)):
        if n % size:
            raise PatternError(
                f"{what} shape {given} does not tile {grid} {of}: dim {dim} has {n}, not a multiple of "
                f"{size}; choose a divisor of {n}, or -1 for the whole dim"
            )
    return full


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
    wanted = [None] * len(grids) if orders is None else list(orders)
    if len(wanted) != len(grids):
        raise PatternError(f"{len(wanted)} orders for {len(grids)} grids; give one for each")
    checked: list[tuple[int, ...]] = []
    for grid, order, spec in zip(grids, wanted, named, strict=True):
        full = tuple(range(len(grid))) if order is None else as_ints("order", order, 0)
        if sorted(full) != list(range(len(grid))):
            raise PatternError(
                f"order {full} is no permutation of the axes 0 to {len(grid) - 1} of the grid {grid} of "
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


def check_devices(views: Sequence[View]) -> None:
    """Refuse coupled tensors on several devices."""
    devices = sorted({str(view.device) for view in views})
    if len(devices) > 1:
        raise PatternError(
            f"coupled tensors lie on {' and '.join(devices)}; move them to one device"
        )


def grid_first(
    interleaved: Tensor,  # (g0, b0, g1, b1, ...)
) -> Tensor:
    """The dims of the grid, then those inside: (g0, g1, ..., b0, b1, ...)."""
    ndim = interleaved.ndim
    return interleaved.permute(*range(0, ndim, 2), *range(1, ndim, 2))


def back(values: Tensor, order: tuple[int, ...]) -> Tensor:
    """Undo ``permute(order)``."""
    return values.permute(sorted(range(len(order)), key=order.__getitem__))
