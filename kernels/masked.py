"""The weight in use under N:4, in one pass: choose the mask, or read it, and write the masked weight.

A lane owns whole scopes of four neighbours: it loads them together, ranks them by comparing every two of
their magnitudes as integers, and stores all four with the pruned ones zero, the others unchanged or shrunk
by the largest pruned magnitude. That moves 8 bytes for each float32 weight; separate operators for mask and
product move 14, and with the soft threshold about 70. A mask that is read may be of any pattern.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

RUN = 4  # weights of a scope
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PROGRAM = 4096  # weights of a program: 32 a thread
_WARPS = 4


@triton.jit
def _apart(x, SCOPES: tl.constexpr):
    """The four of each scope, as four tensors of (SCOPES,)."""
    even, odd = tl.split(tl.reshape(x, (SCOPES, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _together(first, second, third, fourth, SCOPES: tl.constexpr):
    """The inverse: (4 SCOPES,)."""
    return tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), (4 * SCOPES,))


@triton.jit
def masked_kernel(
    w_ptr,
    mask_ptr,  # int8
    out_ptr,
    beta_ptr,  # one float32
    total,  # weights
    KEEP: tl.constexpr,
    HELD: tl.constexpr,  # the mask is read, and not chosen
    WRITE: tl.constexpr,  # the mask is written
    SOFT: tl.constexpr,
    SCOPES: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * (4 * SCOPES) + tl.arange(0, 4 * SCOPES)
    live = at < total
    w = tl.load(w_ptr + at, mask=live, other=0.0)
    if HELD:
        kept = tl.load(mask_ptr + at, mask=live, other=0) != 0
    else:
        if w.dtype == tl.float32:
            bits = w.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        else:
            bits = w.to(tl.int16, bitcast=True) & 0x7FFF
        a, b, c, d = _apart(bits, SCOPES)
        # Of the lower index over the higher; equals count as larger.
        ab, ac, ad = (a >= b).to(tl.int32), (a >= c).to(tl.int32), (a >= d).to(tl.int32)
        bc, bd, cd = (b >= c).to(tl.int32), (b >= d).to(tl.int32), (c >= d).to(tl.int32)
        ka = (3 - ab - ac - ad < KEEP).to(tl.int32)
        kb = (2 + ab - bc - bd < KEEP).to(tl.int32)
        kc = (1 + ac + bc - cd < KEEP).to(tl.int32)
        kd = (ad + bd + cd < KEEP).to(tl.int32)
        kept = _together(ka, kb, kc, kd, SCOPES) != 0
    if WRITE:
        tl.store(mask_ptr + at, kept.to(tl.int8), mask=live)
    if SOFT:
        wide = w.to(tl.float32)
        size = tl.abs(wide)
        a, b, c, d = _apart(tl.where(kept, 0.0, size), SCOPES)
        most = tl.maximum(tl.maximum(a, b), tl.maximum(c, d))
        dropped = _together(most, most, most, most, SCOPES)
        short = (size - dropped).to(w.dtype).to(tl.float32)
        signed = tl.where(wide < 0, -short, short) * tl.load(beta_ptr)
        above = ((size <= dropped) == 0) | (wide != wide)
        out = tl.where(kept & above, signed, 0.0).to(w.dtype)
    else:
        out = tl.where(kept, w, 0.0)
    tl.store(out_ptr + at, out, mask=live)


@triton.jit
def decayed_kernel(
    grad_ptr,
    w_ptr,
    mask_ptr,  # int8
    out_ptr,
    decay,
    total,  # weights
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < total
    grad = tl.load(grad_ptr + at, mask=live, other=0.0)
    w = tl.load(w_ptr + at, mask=live, other=0.0)
    kept = tl.load(mask_ptr + at, mask=live, other=0) != 0
    term = (tl.where(kept, 0.0, w.to(tl.float32)) * decay).to(w.dtype)
    out = grad.to(tl.float32) + term.to(tl.float32)
    tl.store(out_ptr + at, out.to(grad.dtype), mask=live)


def covers(weight: Tensor) -> bool:
    """Whether the kernel takes a weight whose scopes are four neighbours each."""
    return weight.dtype in DTYPES and weight.is_contiguous() and weight.numel() % RUN == 0


def masked(
    weight: Tensor,  # contiguous, whole scopes
    keep: int,
    mask: Tensor | None = None,  # bool, the weight's shape
    beta: Tensor | None = None,  # one float32 on the weight's device
    write: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``(weight in use, mask)``: pruned weights zero, and with ``beta`` the others shrunk, times beta.

    Args:
        mask: True where kept; None chooses the ``keep`` largest of each scope, the lowest index first.
            NaN counts as the largest.
        write: return the chosen mask; else the given one, or None.

    Raises:
        ValueError: what :func:`covers` refuses.
    """
    if not covers(weight) or not 1 <= keep <= RUN:
        raise ValueError(
            f"{keep} of {RUN} of a {weight.dtype} weight of shape {tuple(weight.shape)} and strides "
            f"{weight.stride()}; the kernel takes contiguous float32, bfloat16 or float16 in whole scopes"
        )
    out = torch.empty_like(weight)
    write = write and mask is None
    if write:
        mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    with _device(weight):
        _launch(weight, out, mask, beta, keep, write)
    return out, mask


def decayed(
    grad: Tensor,  # contiguous
    weight: Tensor,  # contiguous, of the same shape and dtype
    mask: Tensor,  # bool, contiguous, of the same shape
    decay: float,
) -> Tensor:
    """``grad + decay * weight`` where the mask is False, ``grad`` elsewhere, rounded as two operators are."""
    out = torch.empty_like(grad)
    flat, bytes_ = out.view(-1), mask.view(-1).view(torch.int8)
    grid = (triton.cdiv(flat.numel(), _PROGRAM // 2),)
    with _device(grad):
        decayed_kernel[grid](
            grad.view(-1), weight.detach().view(-1), bytes_, flat, decay, flat.numel(),
            BLOCK=_PROGRAM // 2, num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _device(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()  # the interpreter's


def _launch(
    weight: Tensor, out: Tensor, mask: Tensor | None, beta: Tensor | None, keep: int, write: bool
) -> None:
    flat = weight.view(-1)
    bytes_ = out.view(-1) if mask is None else mask.view(-1).view(torch.int8)
    found = constants(keep, mask is not None and not write, write, beta is not None)
    grid = (triton.cdiv(flat.numel(), _PROGRAM),)
    scale = flat if beta is None else beta
    masked_kernel[grid](flat, bytes_, out.view(-1), scale, flat.numel(), **found)


def constants(keep: int, held: bool, write: bool, soft: bool) -> dict[str, Any]:
    """What the kernel is compiled for."""
    return {
        "KEEP": keep,
        "HELD": held,
        "WRITE": write,
        "SOFT": soft,
        "SCOPES": _PROGRAM // RUN,
        "num_warps": _WARPS,
    }
