"""A pattern of a matrix as rows times columns, and the small systems that its blocks pose."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from s3tensor.errors import HessianError
from s3tensor.pattern import BoundPattern

_UNROLLED = 16  # up to this size a quadratic form by elimination beats a batched Cholesky


@dataclass(frozen=True)
class Product:
    """A bound pattern of a matrix as a product of rows and columns.

    An axis of a view comes from one dim of the weight, so that a block is some rows times some columns.
    Rows that lie in one block lose the same columns: such a *band* of rows shares one inverse Hessian.
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
        width = bound.shape[1]
        sides = []
        for dim, unit in ((0, width), (1, 1)):
            index = torch.zeros((), dtype=torch.int64)
            for grid in ("scope_grid", "scope", "block"):
                for axis in axes[dim]:
                    # Elements that one step of this part of the axis jumps over.
                    step = bound.view.stride[axis] // unit
                    if grid != "block":
                        step *= bound.block[axis]
                    if grid == "scope_grid":
                        step *= bound.scope[axis]
                    n = getattr(bound, grid)[axis]
                    index = index.unsqueeze(-1) + step * torch.arange(n)
            counts = [
                math.prod(getattr(bound, grid)[axis] for axis in axes[dim])
                for grid in ("scope_grid", "scope", "block")
            ]
            sides.append(index.reshape(counts))
        place = torch.arange(bound.blocks_per_scope).reshape(bound.scope)
        return cls(sides[0], sides[1], place.permute(axes[0] + axes[1]).flatten(), bound.keep)

    @property
    def blocks(self) -> int:
        """Blocks that compete in a scope."""
        return len(self.place)

    @property
    def spans_rows(self) -> bool:
        """True when a block is whole rows, so that nothing in its rows can make up for it."""
        return self.columns.shape[:2] == (1, 1)

    def to(self, device: torch.device) -> Product:
        """The same on a device."""
        return Product(
            self.rows.to(device), self.columns.to(device), self.place.to(device), self.keep
        )


def quadratic(
    matrix: Tensor,  # (..., s, s), positive
    vectors: Tensor,  # (..., r, s)
) -> Tensor:
    """``sum_r v_r inv(matrix) v_r'`` of many small matrices: (...)."""
    size = matrix.shape[-1]
    if size > _UNROLLED:
        solved = torch.linalg.solve_triangular(
            cholesky(matrix), vectors.transpose(-1, -2), upper=False
        )
        return solved.square().sum((-1, -2))
    least = least_pivot(matrix.dtype)
    total = torch.zeros(matrix.shape[:-2], dtype=matrix.dtype, device=matrix.device)
    for pivot in range(size):
        inverse = matrix[..., 0, 0].clamp_min(least).reciprocal()
        total = total + vectors[..., 0].square().sum(-1) * inverse
        if pivot == size - 1:
            break
        row = matrix[..., 0, 1:] * inverse.unsqueeze(-1)
        vectors = vectors[..., 1:] - vectors[..., :1] * row.unsqueeze(-2)
        matrix = matrix[..., 1:, 1:] - matrix[..., 1:, :1] * row.unsqueeze(-2)
    return total


def cholesky(matrix: Tensor) -> Tensor:
    """Lower factors of many matrices of diagonal at most 1; a ridge where rounding made one indefinite."""
    lower, info = torch.linalg.cholesky_ex(matrix)
    ridge = torch.finfo(matrix.dtype).eps
    while bool(info.any()):
        ridge *= 16
        if ridge > 1:
            raise HessianError(
                "the inverse Hessian of a row's weights is not positive; raise damp, or give the "
                "Hessian in float64"
            )
        bad = info != 0
        again = matrix[bad]
        again.diagonal(dim1=-2, dim2=-1).add_(ridge)
        found, left = torch.linalg.cholesky_ex(again)
        lower[bad] = found
        info = info.clone()
        info[bad] = left
    return lower


def spd_inverse(matrix: Tensor) -> Tensor | None:
    """The inverse of a positive definite (K, K), or None; formed in float64 where the device has it.

    Its large eigenvalues are those that pruning moves along, and a float32 factor has lost their vectors.
    """
    wide = matrix if matrix.device.type == "mps" else matrix.double()
    scale = wide.diagonal().rsqrt()
    factor, info = torch.linalg.cholesky_ex(wide * scale[:, None] * scale)
    if int(info):
        return None
    inverse = torch.cholesky_inverse(factor) * scale[:, None] * scale
    return inverse.to(matrix.dtype)


def least_pivot(dtype: torch.dtype) -> float:
    """Below this a pivot of a matrix with a unit diagonal is rounding."""
    return torch.finfo(dtype).eps
