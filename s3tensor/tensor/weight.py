"""``Weight``: a compressed weight as products and kernels take it, without a tensor's clothes."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from s3tensor.pattern import BoundPattern


@dataclass(frozen=True)
class Weight:
    """The parts of a compressed weight, the pattern on its shape, and the copies that are kept beside."""

    packed: Tensor  # (scopes, keep, block_size)
    indices: Tensor  # (index_bytes,) uint8
    bound: BoundPattern
    _: KW_ONLY
    tiled: bool = False  # packed and indices are in tile order
    transposed: bool = False
    dense: Tensor | None = None  # of the bound shape
    vendor: Tensor | None = None  # cuSPARSELt's compressed copy
    scales: Tensor | None = None  # (rows,) float32, of a matrix whose packed values are int8
    computed_in: torch.dtype | None = None  # of products; None: the dtype of the packed values

    @property
    def dtype(self) -> torch.dtype:
        """What x must be: the dtype of products."""
        return self.computed_in or self.packed.dtype

    @property
    def features(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        out, into = self.bound.shape
        return (into, out) if self.transposed else (out, into)
