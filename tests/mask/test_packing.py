"""Packing: inverse of unpacking, sizes as promised, and damaged data refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from s3tensor.kernels import tiles
from torch import Tensor

import s3tensor as s3
from s3tensor.errors import CheckpointError
from s3tensor.mask.packing import (
    _from_bytes,
    _to_bytes,
    block_indices,
    check_packed,
    columns_of,
    form_of,
    gather,
    pack,
    unpack,
    unpack_mask,
)
from s3tensor.mask.projection import expand_blocks, tile
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


@given(packable())
def test_gather_is_the_adjoint_of_unpack(case: tuple[BoundPattern, Tensor, Tensor]) -> None:
    bound, weight, mask = case
    values, indices = pack(weight, mask, bound)
    assert torch.equal(gather(unpack(values, indices, bound), indices, bound), values)
    numbers = torch.arange(weight.numel(), dtype=torch.float64).reshape(bound.shape)
    gathered = gather(numbers, indices, bound)
    assert gathered.shape == bound.packed_shape and gathered.is_contiguous()
    dense = unpack(values.double(), indices, bound)
    assert torch.equal(
        (dense * numbers).flatten(), (unpack(gathered, indices, bound) * dense).flatten()
    )


@pytest.mark.parametrize("form", tiles.FORMS)
def test_tile_order_is_packed_unpacked_and_gathered(form: tiles.Form) -> None:
    bound = Pattern.parse(form).bind((32, 128))
    weight = torch.randn(32, 128).bfloat16()
    mask = s3.project(weight, form)
    values, indices = pack(weight, mask, bound)
    tiled = pack(weight, mask, bound, tiled=True)
    assert torch.equal(tiled[0], tiles.tile_values(values, form, 32, 128))
    assert torch.equal(tiled[1], tiles.tile_codes(indices, form, 32, 128))
    assert torch.equal(unpack(*tiled, bound, tiled=True), torch.where(mask, weight, 0))
    assert torch.equal(gather(weight, tiled[1], bound, tiled=True), tiled[0])


def test_a_pattern_without_tile_order_is_refused_by_name() -> None:
    bound = Pattern.parse("4:8").bind((16, 64))
    weight = torch.ones(16, 64)
    with pytest.raises(s3.PatternError, match="4:8 on 16x64 has no tile order"):
        pack(weight, s3.project(weight, "4:8"), bound, tiled=True)


# Forms ------------------------------------------------------------------------------------------------

PAIRS_OF_ROWS = "view=(tile half r) k -> tile r half k; sizes=half:2,r:8; block=1,1,1,16; keep=1"
PAIRS_16_APART = PAIRS_OF_ROWS.replace("r:8", "r:16")
COUPLED = "view=m (t half p) -> m t p half; sizes=half:2,p:8; block=1,1,1,2; scope=1,1,4,1; keep=2"


@pytest.mark.parametrize(
    ("pattern", "shape", "form"),
    [
        *((form, (32, 64), form) for form in tiles.FORMS),
        *((Pattern.parse(form).parts, (32, 64), form) for form in tiles.FORMS),
        ("block:1x2@2:4", (4, 8), "pair4:8"),
        ("block=1,1; scope=1,4; keep=0.5", (4, 8), "2:4"),
        ("unstructured@0.5", (8, 4), "2:4"),  # rows of four
        ("view=m (g h) -> m g h; sizes=h:4; block=1,1,1; scope=1,1,4; keep=2", (4, 8), "2:4"),
        (f"{PAIRS_OF_ROWS}; scope=1,1,2,1", (32, 64), "rowpair16"),
        (COUPLED, (3, 48), "coupled2:4"),
        # The same numbers, of other weights:
        ("1:4", (8, 16), None),
        ("4:8", (8, 16), None),
        ("unstructured@0.5", (8, 16), None),
        ("conv2:4", (8, 16, 1, 1), None),
        ("block:1x2@1:4", (8, 16), None),
        ("block:2x1@2:4", (8, 16), None),
        ("block=1,1; scope=4,1; keep=2", (8, 16), None),  # down the columns
        (f"{PAIRS_16_APART}; scope=1,1,2,1", (32, 64), None),
        (COUPLED.replace("(t half p)", "(half t p)"), (3, 48), None),  # half a row apart
        (COUPLED.replace("t p half; sizes=half:2,p:8", "t p half; sizes=half:2,p:16"), (3, 64), None),
        (f"{PAIRS_OF_ROWS.replace('tile r half k', 'half r tile k')}; scope=2,1,1,1", (32, 64), None),
    ],
)  # fmt: skip
def test_a_form_is_what_the_pattern_means_not_how_it_is_spelled(
    pattern: str, shape: tuple[int, ...], form: str | None
) -> None:
    assert form_of(Pattern.parse(pattern).bind(shape)) == form


@given(bound_patterns(max_elements=2048))
def test_patterns_of_one_form_pack_to_the_same_bytes(bound: BoundPattern) -> None:
    offsets = torch.arange(torch.Size(bound.shape).numel()).reshape(bound.shape)
    alike = []
    for form in tiles.FORMS:
        try:
            other = Pattern.parse(form).bind(bound.shape)
        except s3.PatternError:
            continue
        if other.packed_shape == bound.packed_shape and other.density == bound.density:
            alike += [form] if torch.equal(tile(offsets, bound), tile(offsets, other)) else []
    assert form_of(bound) == (alike[0] if alike else None)


@given(bound_patterns(max_elements=2048))
def test_columns_are_n_of_m_neighbours_in_a_row(bound: BoundPattern) -> None:
    columns = columns_of(bound)
    of = bound.blocks_per_scope
    flat = torch.arange(torch.Size(bound.shape).numel())
    neighbours = bound.block_size == 1 and torch.equal(
        tile(flat.reshape(bound.shape), bound).flatten(), flat
    )
    expected = len(bound.shape) == 2 and neighbours and bound.shape[-1] % of == 0
    assert columns == ((bound.keep, of) if expected else None)
