"""A pattern of a matrix as rows times columns."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from s3tensor.pattern import BoundPattern, Layout


@dataclass(frozen=True)
class Product:
    """A bound pattern of a matrix as a product of rows and columns.

    Each axis of a view comes from one dim of the weight, so a block is some rows times some columns. The
    rows of a block lose the same columns: such a *band* of rows shares one inverse Hessian.
    """

    rows: Tensor  # (row scopes, bands, rows of a block): row of the weight
    columns: Tensor  # (column scopes, competing, columns of a block): column of the weight
    place: Tensor  # (bands * competing,): the block's number in its scope
    keep: int

    @classmethod
    def of(cls, bound: BoundPattern) -> Product:
        """The rows and columns of every scope and block."""
        inputs, outputs = bound.pattern.rule.inputs, bound.pattern.rule.outputs
        axes = [[i for i, name in enumerate(outputs) if name in group] for group in inputs]
        sides = []
        for own, unit in zip(axes, (bound.shape[1], 1), strict=True):
            # Offsets of scopes, blocks and elements along this dim alone, in its rows or columns.
            modes = [
                [(level.shape[i], level.stride[i] // unit) for i in own] for level in bound.levels
            ]
            shape, stride = zip(*(mode for level in modes for mode in level), strict=True)
            index = torch.arange(Layout(shape, stride).cosize).as_strided(shape, stride)
            sides.append(index.reshape([math.prod(n for n, _ in level) for level in modes]))
        place = torch.arange(bound.blocks_per_scope).reshape(bound.scope)
        return cls(sides[0], sides[1], place.permute(axes[0] + axes[1]).flatten(), bound.keep)

    @property
    def blocks(self) -> int:
        """Blocks that compete in a scope."""
        return len(self.place)

    @property
    def spans_rows(self) -> bool:
        """True when a block is whole rows, so that nothing in its rows can compensate for it."""
        return self.columns.shape[:2] == (1, 1)

    def to(self, device: torch.device) -> Product:
        """The same on a device."""
        return Product(
            self.rows.to(device), self.columns.to(device), self.place.to(device), self.keep
        )
