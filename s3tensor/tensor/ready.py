"""Eager products whose launch is ready: the checks, the choice of a path and Triton's binding, made once.

An eager call of ``F.linear`` costs the host 16 us; choosing and launching a kernel of ours costs 90. The
first product of a weight with so many rows of x, on a stream, is recorded; the next ones launch the same
kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from s3tensor.mask import backend
from s3tensor.tensor.linear import multiply

if TYPE_CHECKING:
    from s3tensor.tensor.base import Compressed

_MOST = 256  # products of a weight that are kept


class ReadyProducts:
    """The products of one weight that are ready, by rows of x, stream and bias.

    They hold as long as the weight has the same parts where they lay; new values in place count.
    """

    __slots__ = ("by_call", "columns", "device", "dtype", "index", "parts", "pointers")

    def __init__(self, weight: Compressed) -> None:
        self.parts = weight.packed, weight.indices, weight.scales
        self.pointers = weight.packed.data_ptr(), weight.indices.data_ptr()
        self.dtype, self.device = weight.dtype, weight.device
        self.index: int = self.device.index
        self.columns = weight.shape[1]
        self.by_call: dict[tuple[int, int, int], Any] = {}  # a Replay, or None: no single launch

    def are_of(self, weight: Compressed) -> bool:
        packed, indices, scales = self.parts
        return (
            packed is weight.packed
            and indices is weight.indices
            and scales is weight.scales
            and self.pointers == (packed.data_ptr(), indices.data_ptr())
        )


def multiply_eagerly(x: Tensor, weight: Compressed, bias: Tensor | None) -> Tensor:
    """``F.linear`` of plain CUDA tensors that nothing watches, by a ready launch where there is one."""
    ready: ReadyProducts | None = weight._ready
    if ready is None or not ready.are_of(weight):
        ready = weight._ready = ReadyProducts(weight)
    shape = x.shape
    if (
        x.dtype is not ready.dtype
        or not shape
        or shape[-1] != ready.columns
        or not x.is_contiguous()
        or x.device != ready.device
        or torch._C._cuda_getDevice() != ready.index
        or torch._C._cuda_isCurrentStreamCapturing()
    ):
        return multiply(x, weight.as_weight(), bias)
    rows = x.numel() // ready.columns
    stream = torch._C._cuda_getCurrentRawStream(ready.index)
    call = rows, stream, 0 if bias is None else bias.data_ptr()
    try:
        replay = ready.by_call[call]
    except KeyError:
        return _record(ready, call, x, weight, bias)
    if replay is None or x.data_ptr() % 16:
        return multiply(x, weight.as_weight(), bias)
    if bias is not None and (bias.dtype is not ready.dtype or bias.shape != (weight.shape[0],)):
        return multiply(x, weight.as_weight(), bias)  # which says what is wrong with it
    y: Tensor = replay(x, stream)
    return y if len(shape) == 2 else y.view(*shape[:-1], y.shape[1])


def _record(
    ready: ReadyProducts,
    call: tuple[int, int, int],
    x: Tensor,
    weight: Compressed,
    bias: Tensor | None,
) -> Tensor:
    launches = backend.load("launch")
    if launches is None or weight.transposed:
        return multiply(x, weight.as_weight(), bias)
    y, tape = launches.recorded(lambda: multiply(x, weight.as_weight(), bias))
    replay = None
    if len(tape.launches) == 1 and x.data_ptr() % 16 == 0:
        try:
            replay = launches.Replay(
                tape.launches[0], x, y.view(-1, y.shape[-1]), (*ready.parts, bias), tape.scratch
            )
        except ValueError:  # the kernel read a copy of the weight, which could go stale
            replay = None
    if len(ready.by_call) >= _MOST:
        ready.by_call.clear()
    ready.by_call[call] = replay
    return y
