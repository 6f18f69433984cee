"""Dense weight and mask to packed values and packed indices, and back.

``values`` are the kept blocks, (scopes, keep, block_size), in row-major order of view coordinates.
``indices`` is a uint8 bit stream, least significant bit first, in one of two codes, whichever is
smaller for the pattern (``BoundPattern.index_code``): the ascending block numbers of each scope
(``index``, for few of many), or one bit for each block (``bitmap``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from s3tensor.errors import CheckpointError, PatternError
from s3tensor.mask import tile, top_blocks, untile
from s3tensor.pattern import BoundPattern


def pack(weight: Tensor, mask: Tensor, bound: BoundPattern) -> tuple[Tensor, Tensor]:
    """Packed ``(values, indices)`` of ``weight * mask``.

    A scope that keeps fewer blocks than it may is filled with zero blocks, lowest index first.

    Args:
        weight: tensor of the bound shape.
        mask: bool tensor of the same shape, True where kept.
        bound: the pattern on that shape.

    Raises:
        PatternError: a mask of another shape, one that splits a block, or one over the budget.
    """
    if tuple(weight.shape) != bound.shape or mask.shape != weight.shape:
        raise PatternError(
            f"weight {tuple(weight.shape)} and mask {tuple(mask.shape)} must both have the bound shape "
            f"{bound.shape}"
        )
    tiles = tile(mask.to(torch.bool), bound)
    blocks = tiles.any(-1)
    if bool((tiles.all(-1) != blocks).any()):
        raise PatternError(
            f"the mask splits a block of {bound}: all {bound.block_size} weights of a block are kept or "
            "pruned together; make masks with s3tensor.project"
        )
    most = int(blocks.sum(-1).max())
    if most > bound.keep:
        raise PatternError(
            f"the mask keeps {most} blocks in one scope of {bound}, at most {bound.keep} are allowed; "
            "make masks with s3tensor.project"
        )
    kept = top_blocks(blocks.to(torch.float32), bound.keep)
    numbers = block_numbers(kept, bound.keep)
    gathered = tile(torch.where(mask, weight, 0), bound).gather(
        1, numbers.unsqueeze(-1).expand(bound.packed_shape)
    )
    values = gathered + 0.0 if weight.is_floating_point() else gathered  # -0.0 becomes 0.0
    return values.contiguous(), encode(numbers, kept, bound)


def unpack(values: Tensor, indices: Tensor, bound: BoundPattern) -> Tensor:
    """The dense, contiguous tensor of the bound shape that was packed."""
    return untile(_spread(values, block_indices(indices, bound), bound), bound)


def unpack_mask(indices: Tensor, bound: BoundPattern) -> Tensor:
    """The mask of the bound shape that the indices record."""
    values = torch.ones(bound.packed_shape, dtype=torch.bool, device=indices.device)
    return unpack(values, indices, bound)


def _spread(values: Tensor, numbers: Tensor, bound: BoundPattern) -> Tensor:
    tiles = values.new_zeros(bound.scopes, bound.blocks_per_scope, bound.block_size)
    return tiles.scatter_(1, numbers.unsqueeze(-1).expand(bound.packed_shape), values)


def block_numbers(kept: Tensor, keep: int) -> Tensor:
    """Ascending numbers of the kept blocks: (scopes, keep) int64, from (scopes, n) bool with ``keep`` True."""
    return kept.nonzero()[:, 1].reshape(kept.shape[0], keep)


def encode(numbers: Tensor, kept: Tensor, bound: BoundPattern) -> Tensor:
    """The bit stream of the kept blocks, uint8."""
    if bound.index_code == "none":
        return torch.empty(0, dtype=torch.uint8, device=kept.device)
    if bound.index_code == "bitmap":
        return _to_bytes(kept.reshape(-1, 1), 1)
    return _to_bytes(numbers.reshape(-1, 1), bound.index_bits)


def block_indices(indices: Tensor, bound: BoundPattern) -> Tensor:
    """The kept blocks' numbers in each scope, (scopes, keep) int64, from the bit stream."""
    if bound.index_code == "none":
        numbers = torch.arange(bound.keep, device=indices.device)
        return numbers.expand(bound.scopes, bound.keep)
    if bound.index_code == "bitmap":
        bits = _from_bytes(indices, 1, bound.scopes * bound.blocks_per_scope)
        return block_numbers(bits.reshape(bound.scopes, bound.blocks_per_scope), bound.keep)
    codes = _from_bytes(indices, bound.index_bits, bound.scopes * bound.keep)
    return codes.reshape(bound.scopes, bound.keep).long()


def check_packed(values: Tensor, indices: Tensor, bound: BoundPattern, name: str = "weight") -> None:
    """Refuse packed data that :func:`pack` could not have made (a truncated or hostile file).

    Raises:
        CheckpointError: wrong sizes or dtypes, block numbers out of range or not ascending.
    """
    if tuple(values.shape) != bound.packed_shape:
        raise CheckpointError(
            f"{name}: values of shape {tuple(values.shape)}, but {bound} packs to {bound.packed_shape}"
        )
    if indices.dtype != torch.uint8 or indices.numel() != bound.index_bytes:
        raise CheckpointError(
            f"{name}: {indices.numel()} {indices.dtype} indices, but {bound} needs {bound.index_bytes} "
            "bytes (uint8)"
        )
    if bound.index_code == "none":
        return
    if bound.index_code == "bitmap":
        bits = _from_bytes(indices, 1, bound.scopes * bound.blocks_per_scope)
        per_scope = bits.reshape(bound.scopes, -1).sum(-1)
        sound = bool((per_scope == bound.keep).all())
    else:
        numbers = block_indices(indices, bound)
        sound = bool((numbers < bound.blocks_per_scope).all())
        sound = sound and bool((numbers.diff(dim=-1) > 0).all())
    if not sound:
        raise CheckpointError(
            f"{name}: the indices do not describe {bound.keep} distinct blocks in every scope of {bound}; "
            "the data is damaged"
        )


def _to_bytes(codes: Tensor, width: int) -> Tensor:
    """Codes of ``width`` bits, (n, 1), as a stream of bytes, least significant bit first."""
    shift = torch.arange(width, device=codes.device)
    bits = (codes.long() >> shift) & 1  # (n, width)
    bits = bits.to(torch.uint8).flatten()
    bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 8))
    place = (1 << torch.arange(8, device=codes.device)).to(torch.uint8)
    return (bits.reshape(-1, 8) * place).sum(-1, dtype=torch.uint8)


def _from_bytes(stream: Tensor, width: int, count: int) -> Tensor:
    """The inverse of ``_to_bytes``: ``count`` codes, uint8 when they fit and int64 otherwise."""
    if 8 % width == 0:  # codes do not straddle bytes: no need to go through single bits
        shift = torch.arange(0, 8, width, dtype=torch.uint8, device=stream.device)
        codes = (stream.unsqueeze(-1) >> shift) & ((1 << width) - 1)
        return codes.flatten()[:count]
    eight = torch.arange(8, dtype=torch.uint8, device=stream.device)
    bits = ((stream.unsqueeze(-1) >> eight) & 1).flatten()[: count * width]
    place = 1 << torch.arange(width, device=stream.device)
    return (bits.reshape(count, width).long() * place).sum(-1)
