"""Packing: inverse of unpacking, sizes as promised, and damaged data refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

import s3tensor as s3
from s3tensor.errors import CheckpointError
from s3tensor.mask import expand_blocks
from s3tensor.packing import (
    _from_bytes,
    _to_bytes,
    block_indices,
    check_packed,
    pack,
    unpack,
    unpack_mask,
)
from s3tensor.pattern import BoundPattern, Pattern
from s3tensor.testing import bound_patterns, weights

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@st.composite
def packable(draw: st.DrawFn) -> tuple[BoundPattern, Tensor, Tensor]:
    """A bound pattern, a weight, and a mask within its budget: full, or with room to spare."""
    bound = draw(bound_patterns(max_elements=1024))
    weight = draw(weights(bound.shape, DTYPES))
    mask = s3.project(weight, bound.pattern)
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        fewer = torch.rand(bound.scopes, bound.blocks_per_scope, generator=generator) < 0.5
        mask = mask & expand_blocks(fewer, bound)
    return bound, weight, mask


@given(packable())
def test_unpack_undoes_pack(case: tuple[BoundPattern, Tensor, Tensor]) -> None:
    bound, weight, mask = case
    values, indices = pack(weight, mask, bound)
    check_packed(values, indices, bound)
    dense = unpack(values, indices, bound)
    assert dense.is_contiguous()
    assert torch.equal(dense, torch.where(mask, weight, 0))
    assert not bool(torch.signbit(dense[dense == 0]).any())  # equal weights have equal bytes


@given(packable())
def test_pack_undoes_unpack(case: tuple[BoundPattern, Tensor, Tensor]) -> None:
    bound, weight, mask = case
    packed = pack(weight, mask, bound)
    again = pack(unpack(*packed, bound), unpack_mask(packed[1], bound), bound)
    assert all(torch.equal(a, b) for a, b in zip(packed, again, strict=True))


@given(packable())
def test_indices_record_a_mask_of_the_exact_budget_that_covers_the_given_one(
    case: tuple[BoundPattern, Tensor, Tensor],
) -> None:
    bound, weight, mask = case
    recorded = unpack_mask(pack(weight, mask, bound)[1], bound)
    assert bool((recorded | ~mask).all())
    numbers = block_indices(pack(weight, mask, bound)[1], bound)
    assert numbers.shape == (bound.scopes, bound.keep)
    assert bool((numbers[:, 1:] > numbers[:, :-1]).all())


@given(packable())
def test_bytes_are_those_that_the_pattern_promises(
    case: tuple[BoundPattern, Tensor, Tensor],
) -> None:
    bound, weight, mask = case
    values, indices = pack(weight, mask, bound)
    assert values.shape == bound.packed_shape and values.is_contiguous()
    assert values.nbytes + indices.nbytes == bound.packed_bytes(weight.element_size())
    bits = min(bound.keep * bound.index_bits, bound.blocks_per_scope)
    if bound.keep == bound.blocks_per_scope:
        bits = 0
    assert indices.numel() == -(-bound.scopes * bits // 8)  # as wide as they must be, no wider


@pytest.mark.parametrize(
    ("pattern", "most"),
    [("2:4", 0.5625), ("coupled2:4", 0.54), ("pair4:8", 0.54), ("rowpair16", 0.51)],
)
def test_bytes_of_bfloat16_weights(pattern: str, most: float) -> None:
    weight = torch.randn(576, 1536).bfloat16()
    sparse = s3.StructuredSparseTensor.from_dense(weight, pattern)
    stored = sparse.packed.nbytes + sparse.indices.nbytes
    assert stored == sparse.nbytes_compressed
    assert stored / weight.nbytes <= most


@example(width=3, codes=[5, 2, 7])
@example(width=8, codes=[255])
@given(st.integers(1, 17), st.lists(st.integers(0, 2**17 - 1), min_size=1, max_size=40))
def test_bit_streams_round_trip(width: int, codes: list[int]) -> None:
    numbers = torch.tensor(codes) % 2**width
    stream = _to_bytes(numbers, width)
    assert stream.dtype == torch.uint8
    assert stream.numel() == -(-len(codes) * width // 8)
    bits = sum(int(n) << (width * i) for i, n in enumerate(numbers))  # least significant bit first
    assert bytes(stream.tolist()) == bits.to_bytes(stream.numel(), "little")
    assert _from_bytes(stream, width, len(codes)).tolist() == numbers.tolist()


def _is_sound(values: Tensor, indices: Tensor, bound: BoundPattern) -> bool:
    try:
        check_packed(values, indices, bound)
    except CheckpointError:
        return False
    return True


@given(packable(), st.data())
def test_a_changed_bit_is_refused_or_is_another_selection(
    case: tuple[BoundPattern, Tensor, Tensor], data: st.DataObject
) -> None:
    bound, weight, mask = case
    values, indices = pack(weight, mask, bound)
    assume(indices.numel())
    at = data.draw(st.integers(0, indices.numel() - 1))
    damaged = indices.clone()
    damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    if not _is_sound(values, damaged, bound):
        return
    # What is accepted is a stream that pack makes: it reads back as itself.
    kept = unpack_mask(damaged, bound)
    assert torch.equal(pack(torch.ones(bound.shape), kept, bound)[1], damaged)


@pytest.mark.parametrize("pattern", ["2:4", "1:8", "rowpair16", "3:5"])
def test_truncated_or_mistyped_parts_are_refused(pattern: str) -> None:
    bound = Pattern.parse(pattern).bind((32, 80))
    values, indices = pack(torch.ones(32, 80), s3.project(torch.ones(32, 80), pattern), bound)
    check_packed(values, indices, bound)
    for wrong in (
        (values[:-1], indices),
        (values.flatten(), indices),
        (values, indices[:-1]),
        (values, indices.to(torch.int16)),
        (values, indices.unsqueeze(0)),
    ):
        with pytest.raises(CheckpointError, match=r"needs|packs to"):
            check_packed(*wrong, bound, "layer.weight")


def test_numbers_out_of_range_or_repeated_are_refused() -> None:
    bound = Pattern.parse("2:5").bind((1, 10))  # five blocks: 3 bits would number eight
    assert bound.index_code == "bitmap"
    bound = Pattern.parse("1:5").bind((1, 10))
    assert bound.index_code == "index"
    values = torch.ones(bound.packed_shape)
    for codes, sound in (([4, 0], True), ([5, 0], False), ([7, 7], False)):
        stream = _to_bytes(torch.tensor(codes), 3)
        if sound:
            check_packed(values, stream, bound)
        else:
            with pytest.raises(CheckpointError, match="do not describe"):
                check_packed(values, stream, bound)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(4, 8, dtype=torch.bool), "keeps 4 blocks in one scope"),
        (torch.ones(4, 4, dtype=torch.bool), "must both have the bound shape"),
        (torch.ones(4, 8), "a mask is bool"),
    ],
)
def test_a_wrong_mask_is_refused(mask: Tensor, message: str) -> None:
    with pytest.raises(s3.PatternError, match=message):
        pack(torch.ones(4, 8), mask, Pattern.parse("2:4").bind((4, 8)))


def test_a_mask_that_splits_a_block_is_refused() -> None:
    mask = torch.tensor([[True, False, True, True, False, False, False, False]])
    with pytest.raises(s3.PatternError, match="splits a block"):
        pack(torch.ones(1, 8), mask, Pattern.parse("pair4:8").bind((1, 8)))
