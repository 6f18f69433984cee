"""Masks of patterns whose scopes are a few short stretches of memory: one read of the weight, one write.

A lane owns whole scopes. It loads a scope as words of up to eight bytes, ranks its blocks by comparing
every two of them in registers, and stores the mask as words of up to eight bytes. Single weights are
compared by the bits of their magnitude, whose order as integers is that of the values; blocks of several by
their norm in float64, summed in the order of memory. A sum of two squares rounds once, so for pairs the
result is exactly that of ``s3tensor.mask.projection.project`` on every device; longer sums may differ from
another device's in the last bit, and so may a choice between two norms that agree to about 1e-15.

In time: 2 to 5 instructions a weight for 2:4, where an H100 at full bandwidth has time for 27.
"""

# ruff: noqa: RUF005 (Triton's compiler reads no starred expressions)
from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

if tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 3):
    raise ImportError(f"the mask kernels need Triton 3.3, for tuples; this is {triton.__version__}")

MOST_BLOCKS = 16  # of a scope: n (n - 1) compares
MOST_WEIGHTS = 64  # of a scope: what registers hold
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_BYTES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_INFINITY = {
    torch.bfloat16: 0x7F80,
    torch.float16: 0x7C00,
    torch.float32: 0x7F800000,
    torch.float64: 0x7FF0000000000000,
}


@dataclass(frozen=True)
class Stretches:
    """Where a scope's weights lie, in elements of contiguous memory.

    Scope s begins at ``s * length`` or, with a span, at ``s // span * stride + s % span * length``. It is
    ``count`` stretches of ``length`` weights, ``apart`` from each other. A block is ``run`` neighbours of
    each stretch or, when ``rows`` is set, one whole stretch.
    """

    length: int
    span: int = 1
    stride: int = 0
    count: int = 1
    apart: int = 0
    run: int = 1
    rows: bool = False

    @property
    def blocks(self) -> int:
        """Blocks that compete in a scope."""
        return self.count if self.rows else self.length // self.run

    @property
    def block_size(self) -> int:
        return self.length * self.count // self.blocks


@dataclass(frozen=True)
class Cut:
    """How the work is cut: scopes and warps of a program."""

    scopes: int  # a power of two
    warps: int


@triton.jit
def _real(bits, FLOAT: tl.constexpr):
    """A float64 of the bits of a float, of 16 bits in an int32."""
    if FLOAT == 0:  # bfloat16
        return (bits << 16).to(tl.float32, bitcast=True).to(tl.float64)
    elif FLOAT == 1:
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float64)
    else:
        return bits.to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit(do_not_specialize=["scopes", "span"])
def ranks_kernel(
    w_ptr,  # words of PER weights
    mask_ptr,  # words of MASKS bytes
    flag_ptr,  # (programs,) int8: whether a program met NaN or Inf
    scopes,
    span,
    stride,  # in words of the weight, as is apart
    apart,
    mask_stride,  # in words of the mask
    mask_apart,
    FLOAT: tl.constexpr,
    INFINITY: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCKS: tl.constexpr,
    LENGTH: tl.constexpr,
    COUNT: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    PER: tl.constexpr,
    MASKS: tl.constexpr,
    SPAN: tl.constexpr,  # 0 where it is not known while compiling
    EVEN: tl.constexpr,  # whether every program is full
    SCOPES: tl.constexpr,
):
    WORDS: tl.constexpr = LENGTH // PER
    TOGETHER: tl.constexpr = 2 if WORDS % 2 == 0 and COUNT == 1 else 1
    s = tl.program_id(0) * SCOPES + tl.arange(0, SCOPES)
    live = s < scopes
    if SPAN == 1:
        first = s.to(tl.int64) * WORDS
        mask_first = s.to(tl.int64) * (LENGTH // MASKS)
    else:
        outer = s // (SPAN if SPAN else span)
        inner = s - outer * (SPAN if SPAN else span)
        first = outer.to(tl.int64) * stride + inner * WORDS
        mask_first = outer.to(tl.int64) * mask_stride + inner * (LENGTH // MASKS)
    KIND: tl.constexpr = tl.int64 if FLOAT == 3 else tl.int32
    WIDTH: tl.constexpr = 16 if FLOAT < 2 else (32 if FLOAT == 2 else 64)
    SIGNLESS: tl.constexpr = (1 << (WIDTH - 1)) - 1
    bits = ()  # of magnitudes, stretch by stretch
    most = tl.zeros((SCOPES,), KIND)
    for c in tl.static_range(COUNT):
        for i in tl.static_range(0, WORDS, TOGETHER):
            at = w_ptr + first + c * apart + i
            if TOGETHER == 2:  # so that a lane loads 16 bytes
                at = at[:, None] + tl.arange(0, 2)[None, :]
                pair = tl.load(at) if EVEN else tl.load(at, mask=live[:, None], other=0)
                words = tl.split(pair)
            else:
                words = (tl.load(at) if EVEN else tl.load(at, mask=live, other=0),)
            for half in tl.static_range(TOGETHER):
                for lane in tl.static_range(PER):
                    magnitude = (words[half] >> (lane * WIDTH)).to(KIND) & SIGNLESS
                    most = tl.maximum(most, magnitude)
                    bits = bits + (magnitude,)
    tl.store(flag_ptr + tl.program_id(0), (tl.max(most, 0) >= INFINITY).to(tl.int8))

    scores = ()
    for b in tl.static_range(BLOCKS):
        if COUNT * LENGTH == BLOCKS:
            scores = scores + (bits[b],)
        else:
            total = tl.zeros((SCOPES,), tl.float64)
            for c in tl.static_range(COUNT):
                for p in tl.static_range(LENGTH):
                    if (c if ROWS else p // RUN) == b:
                        value = _real(bits[c * LENGTH + p], FLOAT)
                        total += value * value
            scores = scores + (tl.sqrt(total),)

    # Of the lower index over the higher, also of equals; the pair is at high (high - 1) / 2 + low.
    wins = ()
    for high in tl.static_range(BLOCKS):
        for low in tl.static_range(high):
            wins = wins + ((scores[low] >= scores[high]).to(tl.int32),)
    kept = ()
    for b in tl.static_range(BLOCKS):
        better = tl.zeros((SCOPES,), tl.int32) + (BLOCKS - 1 - b)
        for other in tl.static_range(BLOCKS):
            if other < b:
                better += wins[b * (b - 1) // 2 + other]
            elif other > b:
                better -= wins[other * (other - 1) // 2 + b]
        kept = kept + ((better < KEEP).to(tl.int32),)

    for c in tl.static_range(COUNT):
        for i in tl.static_range(LENGTH // MASKS):
            low = tl.zeros((SCOPES,), tl.int32)
            high = low
            for lane in tl.static_range(MASKS):
                bit = kept[c if ROWS else (i * MASKS + lane) // RUN]
                if lane < 4:
                    low |= bit << (8 * lane)
                else:
                    high |= bit << (8 * lane - 32)
            word = (high.to(tl.int64) << 32) | low.to(tl.int64) if MASKS == 8 else low
            word = word.to(mask_ptr.dtype.element_ty)
            if EVEN:
                tl.store(mask_ptr + mask_first + c * mask_apart + i, word)
            else:
                tl.store(mask_ptr + mask_first + c * mask_apart + i, word, mask=live)


def covers(where: Stretches, dtype: torch.dtype) -> bool:
    """Whether the kernel takes scopes of this form and values of this type."""
    if dtype not in DTYPES or where.blocks > MOST_BLOCKS:
        return False
    if where.block_size > 1 and dtype == torch.float64:
        return False  # norms of float64 would need a scale, lest they overflow
    return where.count * where.length <= MOST_WEIGHTS


def project(
    weight: Tensor,  # contiguous
    where: Stretches,
    keep: int,
    cut: Cut | None = None,
) -> tuple[Tensor, Tensor]:
    """``(mask, flags)``: True at the blocks of largest norm; flags other than 0 mean NaN or Inf in it.

    Of equal norms the block of the lowest index is kept. The host does not wait for the GPU.

    Raises:
        ValueError: what :func:`covers` refuses, a weight that is not contiguous or not whole scopes.
    """
    size = where.length * where.count
    scopes = weight.numel() // size
    if (
        not covers(where, weight.dtype)
        or not weight.is_contiguous()
        or weight.numel() % size
        or not 0 < scopes < 2**31
        or not 1 <= keep <= where.blocks
    ):
        raise ValueError(
            f"{keep} blocks of each scope of {where}, of a {weight.dtype} weight of shape "
            f"{tuple(weight.shape)} and strides {weight.stride()}; the kernel takes contiguous floats in "
            f"1 to 2**31 - 1 whole scopes of at most {MOST_BLOCKS} blocks and {MOST_WEIGHTS} weights"
        )
    mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    cut = cut or choose(size)
    flags = torch.empty(-(-scopes // cut.scopes), dtype=torch.int8, device=weight.device)
    with _device(weight):
        _launch(weight, mask, flags, where, keep, cut)
    return mask, flags


def _device(x: Tensor) -> AbstractContextManager[Any]:
    return (
        torch.cuda.device(x.device) if x.is_cuda else nullcontext()
    )  # the interpreter's are on the CPU


def choose(size: int) -> Cut:
    """A cut for scopes of ``size`` weights: about 32 weights a thread."""
    return Cut(128 * max(1, 1 << (32 // size).bit_length() >> 1), 4)


def _launch(
    weight: Tensor,
    mask: Tensor,
    flags: Tensor,
    where: Stretches,
    keep: int,
    cut: Cut,
    warmup: bool = False,
) -> object:
    """Launch, or with ``warmup`` compile only."""
    found, word, bytes_ = constants(where, weight.dtype, keep, weight.data_ptr(), cut)
    per = word // weight.element_size()
    scopes = weight.numel() // (where.length * where.count)
    arguments = (
        weight.view(-1).view(_BITS[word]), mask.view(-1).view(_BYTES[bytes_]), flags, scopes, where.span,
        where.stride // per, where.apart // per, where.stride // bytes_, where.apart // bytes_,
    )  # fmt: skip
    found["EVEN"] = scopes % cut.scopes == 0
    if warmup:
        return ranks_kernel.warmup(*arguments, grid=flags.shape, **found)
    return ranks_kernel[tuple(flags.shape)](*arguments, **found)


def constants(
    where: Stretches, dtype: torch.dtype, keep: int, address: int, cut: Cut
) -> tuple[dict[str, Any], int, int]:
    """What the kernel is compiled for, the bytes of a word of the weight, and of the mask."""
    steps = (where.length, where.apart, where.stride)
    word = math.gcd(8, address, *(n * dtype.itemsize for n in steps))
    bytes_ = math.gcd(8, *steps)
    found = {
        "FLOAT": DTYPES.index(dtype),
        "INFINITY": _INFINITY[dtype],
        "KEEP": keep,
        "BLOCKS": where.blocks,
        "LENGTH": where.length,
        "COUNT": where.count,
        "RUN": where.run,
        "ROWS": where.rows,
        "PER": word // dtype.itemsize,
        "MASKS": bytes_,
        "SPAN": where.span if where.span <= 16 else 0,
        "SCOPES": cut.scopes,
        "num_warps": cut.warps,
    }
    return found, word, bytes_
