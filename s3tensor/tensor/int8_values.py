"""Packed values of eight bits with a scale for each row: how they are made and undone.

Row r of the dense weight is ``scales[r]`` times integers of -127 to 127.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s3tensor.errors import NonFiniteError
from s3tensor.mask import backend
from s3tensor.mask.packing import form_of, gather, unpack
from s3tensor.pattern import BoundPattern
from s3tensor.tensor.weight import Weight

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # to compute in
LARGEST = 127  # of the integers; without -128 the scale is the same for both signs


def to_int8(
    dense: Tensor,  # (rows, columns), under the pattern
    indices: Tensor,  # (index_bytes,) uint8, canonical
    bound: BoundPattern,
) -> tuple[Tensor, Tensor]:
    """Packed integers in canonical order and scales, nearest to the kept values of a dense weight.

    The scale of a row is its largest magnitude over 127, so that no kept value is off by more than half of
    it: symmetric absolute-maximum quantization of weights, per output channel. A row of zeros has scale 0.

    Raises:
        NonFiniteError: NaN or Inf in the weight.
    """
    whole = dense.float()
    largest = whole.abs().amax(1)
    if not bool(torch.isfinite(largest).all()):
        raise NonFiniteError(
            f"the weight of shape {bound.shape} holds NaN or Inf; repair it before it is quantized"
        )
    # Divided by a tensor: by a number, CUDA multiplies with the inverse, which rounds differently.
    scales = largest / torch.full_like(largest, LARGEST)
    scales = scales.clamp_min(torch.finfo(torch.float32).tiny)  # never denormal
    # A scale that was rounded up must not take the largest value beyond float32.
    scales = torch.where(torch.isinf(scales * LARGEST), scales * (1 - 2**-23), scales)
    integers = (whole / scales[:, None]).round_().clamp_(-LARGEST, LARGEST)
    packed = gather(integers, indices, bound).to(torch.int8)
    return packed, torch.where(largest > 0, scales, 0.0)


def dense_of(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The dense weight of the bound shape: integers times scales, rounded once to the dtype."""
    packed = weight.packed
    if packed.is_cuda:  # the kernels that unpack take 16 bits; the integers are exact in them
        view = _retiled(packed, weight.bound) if weight.tiled else packed
        packed = view.to(torch.float16, memory_format=torch.contiguous_format).view(packed.shape)
    integers = unpack(packed, weight.indices, weight.bound, weight.tiled)
    scales = _scales(weight)[:, None]
    if dtype == torch.float64:
        return integers.double() * scales.double()
    dense = torch.empty(weight.bound.shape, dtype=dtype, device=packed.device)
    return torch.mul(integers, scales, out=dense)


def packed_of(weight: Weight, dtype: torch.dtype) -> Tensor | None:
    """Packed values of 16 bits in tile order: integers times scales, rounded once, by one kernel.

    None for rowpair16, whose packed rows hold two rows with a scale each, and in canonical order.
    """
    if not weight.tiled or form_of(weight.bound) == "rowpair16":
        return None
    view = _retiled(weight.packed, weight.bound)
    of_rows = _scales(weight).view(-1, 1, 2, 8, 1, 1)
    values = torch.empty(view.shape, dtype=dtype, device=view.device)
    return torch.mul(view, of_rows, out=values).view(weight.bound.packed_shape)


def _retiled(packed: Tensor, bound: BoundPattern) -> Tensor:
    """Values in the tile order of int8, as a view in that of 16-bit values."""
    view: Tensor = backend.tiles().bytes_as_wide(packed, *bound.shape)
    return view


def _scales(weight: Weight) -> Tensor:
    assert weight.scales is not None
    return weight.scales
