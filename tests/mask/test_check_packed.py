"""``check_packed`` believes a stream of indices just when every scope of it reads as ``pack`` writes one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import s3tensor as s3
from s3tensor.mask import packing
from s3tensor.pattern import BoundPattern, Pattern

# Scopes of 1, 4 and 8 bits, of 3 and 6 that straddle bytes, of whole bytes, and bitmaps of odd sizes.
PATTERNS = (
    "2:4",
    "coupled2:4",
    "rowpair16",
    "4:8",
    "1:4",
    "1:8",
    "2:8",
    "8:16",
    "3:5",
    "unstructured@0.5",
)


def is_sound(stream: bytes, bound: BoundPattern) -> bool:
    """The definition, bit by bit."""
    bits = [byte >> place & 1 for byte in stream for place in range(8)]
    for scope in range(bound.scopes):
        own = bits[scope * bound.scope_bits : (scope + 1) * bound.scope_bits]
        if bound.index_code == "bitmap":
            if sum(own) != bound.keep:
                return False
            continue
        width = bound.index_bits
        numbers = [
            sum(bit << place for place, bit in enumerate(own[i : i + width]))
            for i in range(0, len(own), width)
        ]
        if numbers != sorted(set(numbers)) or numbers[-1] >= bound.blocks_per_scope:
            return False
    return not any(bits[bound.scopes * bound.scope_bits :])


def believes(stream: bytes, bound: BoundPattern) -> bool:
    indices = torch.tensor(list(stream), dtype=torch.uint8)
    try:
        packing.check_packed(torch.zeros(bound.packed_shape), indices, bound)
    except s3.CheckpointError:
        return False
    return True


@pytest.mark.parametrize("name", PATTERNS)
@given(st.data())
@settings(deadline=None)
def test_a_stream_is_believed_just_when_every_scope_is_sound(
    name: str, data: st.DataObject
) -> None:
    pattern = Pattern.parse(name)
    steps = [pattern.step(dim)[0] for dim in (0, 1)]
    shape = tuple(step * data.draw(st.integers(1, 5)) for step in steps)
    bound = pattern.bind(shape)
    assume(bound.index_code != "none")  # all is kept
    seed = data.draw(st.integers(0, 2**32))
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    _, indices = packing.pack(weight, s3.project(weight, pattern), bound)
    stream = bytearray(indices.tolist())
    assert believes(bytes(stream), bound) and is_sound(bytes(stream), bound)
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.integers(0, len(stream) - 1))
        stream[where] = data.draw(st.integers(0, 255))
    assert believes(bytes(stream), bound) == is_sound(bytes(stream), bound)


@pytest.mark.parametrize("byte", range(256))
def test_every_byte_of_two_scopes_of_2_of_4_is_judged_as_defined(byte: int) -> None:
    bound = Pattern.parse("2:4").bind((1, 8))
    assert believes(bytes([byte]), bound) == is_sound(bytes([byte]), bound)
