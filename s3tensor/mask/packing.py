"""Dense weight and mask to packed values and packed indices, and back.

``values`` are the kept blocks, (scopes, keep, block_size), in row-major order of view coordinates.
``indices`` is a uint8 bit stream, least significant bit first, in the smaller of two codes for the
pattern (``BoundPattern.index_code``): the ascending block numbers of each scope (``index``), or one bit
for each block (``bitmap``).

The torch code here is the reference, for any pattern on any device. On CUDA, kernels do the same for the
patterns of ``form_of`` and for N of M consecutive blocks, and give the same bytes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from s3tensor.errors import CheckpointError, PatternError
from s3tensor.mask import backend
from s3tensor.mask.projection import blocks_in, count, tile, top_blocks, untile
from s3tensor.modes import neutral
from s3tensor.pattern import BoundPattern, Pattern
from s3tensor.pattern.layout import Layout, coalesce_together


def pack(
    weight: Tensor, mask: Tensor, bound: BoundPattern, tiled: bool = False
) -> tuple[Tensor, Tensor]:
    """Packed ``(values, indices)`` of ``weight * mask``.

    A scope that keeps fewer blocks than it may is filled with zero blocks, lowest index first.

    Args:
        weight: tensor of the bound shape.
        mask: bool tensor of the same shape, True where kept.
        bound: the pattern on that shape.
        tiled: values and indices in tile order (``kernels/tiles.py``), for a pattern and shape that have one.

    Raises:
        PatternError: a mask of another shape or on another device, one that splits a block, or one over
            the budget.
    """
    check_devices(weight, mask)
    if tuple(weight.shape) != bound.shape or mask.shape != weight.shape:
        raise PatternError(
            f"weight {tuple(weight.shape)} and mask {tuple(mask.shape)} must both have the bound shape "
            f"{bound.shape}"
        )
    if mask.dtype != torch.bool:
        raise PatternError(f"a mask is bool, True where kept, got {mask.dtype}")
    packed = _pack_by_kernel(weight, mask, bound, tiled)
    if packed is not None:
        return packed
    if tiled:
        values, indices = pack(weight, mask, bound)
        return to_tiles(values, indices, bound)
    tiles = tile(mask, bound)
    blocks = blocks_in(tiles)
    if bound.block_size > 1 and not torch.equal(tiles.all(-1), blocks):
        raise _split(bound)
    per_scope = count(blocks)
    fewest, most = (int(n) for n in torch.stack(per_scope.aminmax()))
    if most > bound.keep:
        raise _over_budget(most, bound)
    if fewest < bound.keep:  # fill up with zero blocks
        weight = torch.where(mask, weight, 0)
        blocks = top_blocks(blocks.to(torch.uint8), bound.keep)
    numbers = block_numbers(blocks, bound.keep)
    values = tile(weight, bound).gather(1, numbers.unsqueeze(-1).expand(bound.packed_shape))
    if values.is_floating_point():
        values += 0.0  # -0.0 becomes 0.0: equal weights have equal bytes
    return values, encode(numbers, blocks, bound)


def unpack(
    values: Tensor,  # (scopes, keep, block_size)
    indices: Tensor,  # (index_bytes,) uint8
    bound: BoundPattern,
    tiled: bool = False,  # both are in tile order
) -> Tensor:
    """The dense, contiguous tensor of the bound shape that was packed."""
    check_devices(values, indices)
    dense = _unpack_by_kernel(values, indices, bound, tiled)
    if dense is not None:
        return dense
    if tiled:
        values, indices = to_tiles(values, indices, bound, backwards=True)
    tiles = values.new_zeros(bound.scopes, bound.blocks_per_scope, bound.block_size)
    numbers = block_indices(indices, bound).unsqueeze(-1)
    tiles.scatter_(1, numbers.expand(bound.packed_shape), values)
    return untile(tiles, bound)


def gather(
    dense: Tensor,  # of the bound shape
    indices: Tensor,  # (index_bytes,) uint8
    bound: BoundPattern,
    tiled: bool = False,  # the indices are in tile order, and so are the returned values
) -> Tensor:  # (scopes, keep, block_size), contiguous
    """The packed values of ``dense`` at the blocks that ``indices`` record: the adjoint of :func:`unpack`."""
    check_devices(dense, indices)
    values = _gather_by_kernel(dense, indices, bound, tiled)
    if values is not None:
        return values
    if tiled:
        values = gather(dense, _reorder(indices, bound, "untile_codes"), bound)
        return _reorder(values, bound, "tile_values").contiguous()
    numbers = block_indices(indices, bound).unsqueeze(-1).expand(bound.packed_shape)
    return tile(dense, bound).gather(1, numbers).contiguous()


def unpack_mask(indices: Tensor, bound: BoundPattern) -> Tensor:
    """The mask of the bound shape that the indices record."""
    values = torch.ones(bound.packed_shape, dtype=torch.bool, device=indices.device)
    return unpack(values, indices, bound)


def block_numbers(kept: Tensor, keep: int) -> Tensor:
    """Ascending numbers of the kept blocks, (scopes, keep), from (scopes, n) bool with ``keep`` in each."""
    scopes, n = kept.shape
    # One flat nonzero takes a fifth of the time of masked_select.
    flat = kept.flatten().nonzero().reshape(scopes, keep)
    return flat - torch.arange(0, scopes * n, n, device=kept.device).unsqueeze(-1)


def encode(
    numbers: Tensor,  # (scopes, keep)
    kept: Tensor,  # (scopes, blocks_per_scope) bool
    bound: BoundPattern,
) -> Tensor:
    """The bit stream of the kept blocks, uint8, from their numbers or their bitmap."""
    if bound.index_code == "none":
        return torch.empty(0, dtype=torch.uint8, device=kept.device)
    if bound.index_code == "bitmap":
        return _to_bytes(kept.flatten().to(torch.uint8), 1)
    return _to_bytes(numbers.flatten(), bound.index_bits)


def block_indices(indices: Tensor, bound: BoundPattern) -> Tensor:
    """The kept blocks' numbers in each scope, (scopes, keep) int64, from the bit stream."""
    if bound.index_code == "none":
        numbers = torch.arange(bound.keep, device=indices.device)
        return numbers.expand(bound.scopes, bound.keep)
    if bound.index_code == "bitmap":
        return block_numbers(_bitmap(indices, bound), bound.keep)
    return _numbers(indices, bound).long()


def _bitmap(indices: Tensor, bound: BoundPattern) -> Tensor:
    """The kept blocks, (scopes, blocks_per_scope) bool, from a stream of one bit a block."""
    bits = _from_bytes(indices, 1, bound.scopes * bound.blocks_per_scope)
    return bits.reshape(bound.scopes, bound.blocks_per_scope).bool()


def _numbers(indices: Tensor, bound: BoundPattern) -> Tensor:
    """The kept blocks' numbers, (scopes, keep), from a stream of numbers; uint8 when they fit."""
    codes = _from_bytes(indices, bound.index_bits, bound.scopes * bound.keep)
    return codes.reshape(bound.scopes, bound.keep)


def check_devices(first: Tensor, *others: Tensor | None) -> None:
    """Refuse tensors of several devices: beside one on ``meta``, torch reads or writes no values at all.

    Raises:
        PatternError: a tensor on another device than the first.
    """
    for other in others:
        if other is not None and other.device != first.device:
            raise PatternError(
                f"one tensor is on {first.device}, another on {other.device}; move them to one device"
            )


def check_packed(
    values: Tensor, indices: Tensor, bound: BoundPattern, name: str = "weight"
) -> None:
    """Refuse packed data that :func:`pack` could not have made (a truncated or hostile file).

    Raises:
        CheckpointError: wrong sizes or dtypes, block numbers out of range or not ascending.
    """
    if tuple(values.shape) != bound.packed_shape:
        raise CheckpointError(
            f"{name}: values of shape {tuple(values.shape)}, but {bound} packs to {bound.packed_shape}"
        )
    if indices.dtype != torch.uint8 or tuple(indices.shape) != (bound.index_bytes,):
        raise CheckpointError(
            f"{name}: indices {indices.dtype} of shape {tuple(indices.shape)}, but {bound} needs uint8 of "
            f"shape ({bound.index_bytes},)"
        )
    if bound.index_code == "none":
        return
    sound = _is_sound(indices, bound)
    used = bound.scopes * bound.scope_bits % 8
    if used and int(indices[-1]) >> used:
        sound = (
            False  # unused bits of the last byte are zeros, so that one selection has one stream
        )
    if not sound:
        raise CheckpointError(
            f"{name}: the indices do not describe {bound.keep} distinct blocks in every scope of {bound}; "
            "the data is damaged"
        )


def _is_sound(indices: Tensor, bound: BoundPattern) -> bool:
    """Whether every scope of the stream has ``keep`` distinct blocks, in ascending order.

    Where a byte holds whole scopes, a table says which bytes are sound; where a scope is whole bytes of a
    bitmap, a table counts the bits of each byte. That reads the stream once, without unpacking its codes.
    """
    bits = bound.scope_bits
    if 8 % bits == 0:
        whole = (
            bound.scopes * bits // 8
        )  # full bytes; the scopes in one more are checked by themselves
        found = torch.bincount(indices[:whole], minlength=256) > 0
        rest = bound.scopes - whole * 8 // bits
        table = _sound_bytes(bound).to(indices.device)
        return not bool((found & ~table).any()) and bool(
            _sound_scopes(indices[whole:], rest, bound).all()
        )
    if bits % 8 == 0 and bound.index_code == "bitmap":
        ones = torch.tensor([byte.bit_count() for byte in range(256)], device=indices.device)
        ones = ones.to(torch.uint8 if bits < 256 else torch.int32)
        kept = ones[indices.int()].view(bound.scopes, bits // 8).sum(-1, dtype=ones.dtype)
        return bool((kept == bound.keep).all())
    return bool(_sound_scopes(indices, bound.scopes, bound).all())


@functools.lru_cache(maxsize=256)
@neutral()
def _sound_bytes(bound: BoundPattern) -> Tensor:
    """The byte values whose scopes are all sound, (256,) bool, where a byte holds one or more scopes."""
    per_byte = 8 // bound.scope_bits
    every = torch.arange(256, dtype=torch.uint8)
    return _sound_scopes(every, 256 * per_byte, bound).view(256, per_byte).all(-1)


def _sound_scopes(stream: Tensor, scopes: int, bound: BoundPattern) -> Tensor:
    """Which of the first ``scopes`` of a stream have ``keep`` distinct, ascending blocks: (scopes,) bool."""
    if bound.index_code == "bitmap":
        bits = _from_bytes(stream, 1, scopes * bound.blocks_per_scope)
        return count(bits.view(scopes, bound.blocks_per_scope).bool()) == bound.keep
    numbers = _from_bytes(stream, bound.index_bits, scopes * bound.keep).view(scopes, bound.keep)
    rising = (numbers[:, 1:] > numbers[:, :-1]).all(-1)
    return rising & (numbers[:, -1] < bound.blocks_per_scope)


def _split(bound: BoundPattern) -> PatternError:
    return PatternError(
        f"the mask splits a block of {bound}: all {bound.block_size} weights of a block are kept or "
        "pruned together; make masks with s3tensor.project"
    )


def _over_budget(most: int, bound: BoundPattern) -> PatternError:
    return PatternError(
        f"the mask keeps {most} blocks in one scope of {bound}, at most {bound.keep} are allowed; "
        "make masks with s3tensor.project"
    )


# What the kernels take --------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def form_of(bound: BoundPattern) -> str | None:
    """The form (a kernel family, such as ``2:4``) that this pattern is on this matrix, or None.

    However a pattern is spelled, it is a form when both number the same elements alike: then their values
    and indices are the same bytes.

    Example:
        >>> form_of(Pattern.parse("block:1x2@2:4").bind((8, 16)))
        'pair4:8'
    """
    if len(bound.shape) != 2:
        return None
    for form in backend.tiles().FORMS:
        pattern = Pattern.parse(form)
        if all(n % pattern.step(dim)[0] == 0 for dim, n in enumerate(bound.shape)):
            other = pattern.bind(bound.shape)
            if bound.keep == other.keep and bound.normal_form == other.normal_form:
                return str(form)
    return None


@functools.lru_cache(maxsize=1024)
def columns_of(bound: BoundPattern) -> tuple[int, int] | None:
    """``(n, m)`` where the pattern is N of M consecutive weights of a row of a matrix; else None.

    Example:
        >>> columns_of(Pattern.parse("4:8").bind((8, 16))), columns_of(Pattern.parse("2:4").bind((8, 16)))
        ((4, 8), (2, 4))
    """
    run = bound.n_of_m if len(bound.shape) == 2 and bound.is_sequential else None
    return run if run is not None and bound.shape[1] % run[1] == 0 else None


def to_tiles(
    values: Tensor, indices: Tensor, bound: BoundPattern, backwards: bool = False
) -> tuple[Tensor, Tensor]:
    """Values and indices in tile order, of unchanged shapes; ``backwards`` returns to canonical order.

    Raises:
        PatternError: a pattern that has no tile order.
    """
    how = "untile" if backwards else "tile"
    return _reorder(values, bound, f"{how}_values"), _reorder(indices, bound, f"{how}_codes")


def _reorder(packed: Tensor, bound: BoundPattern, how: str) -> Tensor:
    """Values or indices in another order, by the function ``how`` of ``kernels/tiles.py``."""
    tiles = backend.tiles()
    form = form_of(bound)
    if form is None:
        raise PatternError(
            f"{bound} has no tile order; only {', '.join(tiles.FORMS)} have one: leave tiled out"
        )
    return getattr(tiles, how)(packed, form, *bound.shape)


def _kernels(*tensors: Tensor) -> tuple[Any, Any] | None:
    """The modules ``unpack`` and ``pack`` of the kernels, where they can take these tensors; else None."""
    if not all(t.is_cuda for t in tensors) or torch.compiler.is_compiling():
        return None
    unpack = backend.load("unpack")
    return (unpack, backend.load("pack")) if unpack and _are_plain(*tensors) else None


def _are_plain(*tensors: Tensor) -> bool:
    """Whether these are memory of one device that nothing differentiates or traces."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    return len({t.device for t in tensors}) == 1 and all(
        type(t) in (Tensor, torch.nn.Parameter) for t in tensors
    )


def _unpack_by_kernel(
    values: Tensor, indices: Tensor, bound: BoundPattern, tiled: bool
) -> Tensor | None:
    kernels = _kernels(values, indices)
    if kernels is None or tuple(values.shape) != bound.packed_shape:
        return None
    unpack, _ = kernels
    form = form_of(bound)
    if form and unpack.refusal(form, values.element_size(), *bound.shape, tiled) is None:
        rows, columns = bound.shape
        return unpack.unpack(values, indices, form=form, rows=rows, columns=columns, tiled=tiled)
    if tiled:
        return None
    modes = _modes(bound, values.element_size())
    if modes is not None and len(modes) <= unpack.MOST_MODES:
        return unpack.blocks(values, _slots(indices, bound), bound.shape, modes)
    words = _as_words(values, bound, unpack)
    if words is None:
        return None
    flat = unpack.columns(words, indices, keep=bound.keep, of=bound.blocks_per_scope)
    return flat.view(values.dtype).reshape(bound.shape)


def _gather_by_kernel(
    dense: Tensor, indices: Tensor, bound: BoundPattern, tiled: bool
) -> Tensor | None:
    kernels = _kernels(dense, indices)
    if kernels is None or tuple(dense.shape) != bound.shape:
        return None
    unpack, pack = kernels
    form = form_of(bound)
    if form and pack.refusal(form, dense.dtype, *bound.shape, tiled) is None:
        values = pack.gather(dense, indices, form=form, tiled=tiled)
        return values.reshape(bound.packed_shape)
    if tiled:
        return None
    modes = _modes(bound, dense.element_size())
    if modes is not None and len(modes) <= unpack.MOST_MODES:
        return pack.gather_blocks(dense, _slots(indices, bound), bound.packed_shape, modes)
    words = _as_words(dense, bound, unpack)
    if words is None:
        return None
    flat = pack.gather_columns(words, indices, keep=bound.keep, of=bound.blocks_per_scope)
    return flat.view(dense.dtype).reshape(bound.packed_shape)


def _pack_by_kernel(
    weight: Tensor, mask: Tensor, bound: BoundPattern, tiled: bool
) -> tuple[Tensor, Tensor] | None:
    kernels = _kernels(weight, mask)
    if kernels is None:
        return None
    unpack, pack = kernels
    form = form_of(bound)
    if form and pack.refusal(form, weight.dtype, *bound.shape, tiled) is None:
        values, codes, flag = pack.pack(weight, mask, form=form, tiled=tiled)
    elif (
        not tiled
        and bound.block_size == 1
        and weight.dtype in pack.ELEMENTS
        and _word(weight, bound, unpack)
    ):
        keep, of = bound.keep, bound.blocks_per_scope
        values, codes, flag = pack.pack_columns(weight, mask, keep=keep, of=of)
    else:
        return None
    status = int(flag)
    if status == pack.SPLIT:
        raise _split(bound)
    if status:
        raise _over_budget(status, bound)
    return values.reshape(bound.packed_shape), codes


def _word(t: Tensor, bound: BoundPattern, unpack: Any) -> torch.dtype | None:
    """The integer dtype of a block's size, where the kernels of N of M consecutive blocks take this."""
    of = bound.blocks_per_scope
    if not bound.is_sequential or not bound.keep < of <= unpack.LARGEST_SCOPE:
        return None
    if bound.scopes > unpack.MOST_SCOPES:
        return None
    word: torch.dtype | None = unpack.INTS.get(bound.block_size * t.element_size())
    return word


def _as_words(t: Tensor, bound: BoundPattern, unpack: Any) -> Tensor | None:
    """``t``, flat, as integers of a block's size; None where the kernels do not take the pattern."""
    word = _word(t, bound, unpack)
    if word is None:
        return None
    flat = t.detach().reshape(-1)
    if flat.data_ptr() % word.itemsize:
        flat = flat.clone()
    return flat.view(word)


@functools.lru_cache(maxsize=1024)
def _modes(bound: BoundPattern, itemsize: int) -> tuple[tuple[int, int, int, int], ...] | None:
    """The dense weight in pieces of 16 bytes, as the fewest modes; None where a piece leaves a block.

    Of each mode, slowest first: its size, and what a step along it adds to the number of the scope, of the
    block in its scope and of the piece in its block.
    """
    sizes, order = bound.axes  # in the order of memory, slowest first
    grids = bound.scope_grid, bound.scope, bound.block
    numbers = []
    for level in range(3):
        own = [
            Layout.row_major(g).stride if i == level else (0,) * len(g) for i, g in enumerate(grids)
        ]
        steps = [step for strides in own for step in strides]
        by_memory = tuple(steps[order.index(place)] for place in range(len(sizes)))
        numbers.append(Layout(sizes, by_memory).reversed())
    scope, block, inside = coalesce_together(*numbers)
    run, *rest = zip(scope.shape, scope.stride, block.stride, inside.stride, strict=True)
    per_piece = 16 // itemsize
    if run[1:] != (0, 0, 1) or run[0] % per_piece or itemsize > 16:
        return None
    if any(step % per_piece for *_, step in rest):
        return None
    pieces = tuple((*mode[:3], mode[3] // per_piece) for mode in reversed(rest))
    last = run[0] // per_piece
    return (*pieces, (last, 0, 0, 1)) if last > 1 else pieces or ((1, 0, 0, 0),)


def _slots(indices: Tensor, bound: BoundPattern) -> Tensor:
    """The place of each block among the kept ones of its scope, or -1: (scopes, blocks_per_scope) int32.

    Unlike ``block_numbers`` it never waits for the device, so that a CUDA graph can capture it.
    """
    if bound.index_code == "bitmap":
        kept = _bitmap(indices, bound)
        return torch.where(kept, kept.cumsum(-1, dtype=torch.int32) - 1, -1)
    numbers = block_indices(indices, bound)
    slots = numbers.new_full((bound.scopes, bound.blocks_per_scope), -1, dtype=torch.int32)
    order = torch.arange(bound.keep, dtype=torch.int32, device=indices.device)
    return slots.scatter_(1, numbers, order.expand(numbers.shape))


# Bit streams ------------------------------------------------------------------------------------------


def _to_bytes(codes: Tensor, width: int) -> Tensor:
    """Codes of ``width`` bits, (n,), as a stream of bytes, least significant bit first."""
    if 8 % width:  # codes straddle bytes: by single bits
        shift = torch.arange(width, device=codes.device)
        codes = ((codes.long().unsqueeze(-1) >> shift) & 1).to(torch.uint8).flatten()
        width = 1
    per_byte = 8 // width
    codes = codes.to(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, -codes.numel() % per_byte)).reshape(-1, per_byte)
    stream = codes[:, 0].clone()
    for place in range(1, per_byte):
        stream |= codes[:, place] << (place * width)
    return stream


def _from_bytes(stream: Tensor, width: int, n: int) -> Tensor:
    """The inverse of ``_to_bytes``: ``n`` codes, uint8 when they do not straddle bytes, else int64."""
    if 8 % width == 0:
        shift = torch.arange(0, 8, width, dtype=torch.uint8, device=stream.device)
        codes = (stream.unsqueeze(-1) >> shift) & ((1 << width) - 1)
        return codes.flatten()[:n]
    bits = _from_bytes(stream, 1, n * width).reshape(n, width)
    codes = torch.zeros(n, dtype=torch.int64, device=stream.device)
    for place in range(width):
        codes |= bits[:, place].long() << place
    return codes
