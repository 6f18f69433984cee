"""Launches: a kernel by Triton, and a launch that was recorded once more, at a tenth of the host's time.

On each launch Triton binds and specialises every argument, some 30 us of the host. The next product of one
weight and one number of rows differs from the last in two pointers: :func:`recorded` keeps what a product
launched, and :class:`Replay` launches it again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_RECORDING = threading.local()  # .tape: a Tape while a product is recorded
_scratch: dict[tuple[int, int], Tensor] = {}  # by device and stream


@dataclass(frozen=True)
class Launched:
    """One launch: the compiled kernel and all that it was given."""

    kernel: Any  # the JIT function
    compiled: Any
    grid: tuple[int, ...]
    arguments: Sequence[Any]  # tensors and integers, in the kernel's order
    constants: dict[str, Any]  # its constexprs, and options of the launch


@dataclass
class Tape:
    """What a product did while it was recorded."""

    launches: list[Launched] = field(default_factory=list)
    scratch: list[Tensor] = field(default_factory=list)


def start(
    kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: dict[str, Any]
) -> Any:
    """``kernel[grid](*arguments, **constants)``, which :func:`recorded` sees."""
    compiled = kernel[grid](*arguments, **constants)
    tape = getattr(_RECORDING, "tape", None)
    if tape is not None:
        tape.launches.append(Launched(kernel, compiled, grid, arguments, constants))
    return compiled


def recorded(product: Callable[[], Tensor]) -> tuple[Tensor, Tape]:
    """What a function returns, and what it launched."""
    tape = Tape()
    _RECORDING.tape = tape
    try:
        return product(), tape
    finally:
        _RECORDING.tape = None


def scratch(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(count,) elements that a kernel may use while it runs.

    A launch that is recorded, and so replayed, shares one buffer with the others of its stream, which run
    one after the other; it grows, and what is outgrown lives as long as replays point to it.
    """
    tape = getattr(_RECORDING, "tape", None)
    if tape is None:
        return torch.empty(count, dtype=dtype, device=device)
    index = torch.cuda.current_device() if device.index is None else device.index
    key = index, torch.cuda.current_stream(device).cuda_stream
    size = count * dtype.itemsize
    held = _scratch.get(key)
    if held is None or held.numel() < size:
        held = torch.empty(1 << (size - 1).bit_length(), dtype=torch.uint8, device=device)
        _scratch[key] = held
    tape.scratch.append(held)
    return held[:size].view(dtype)


def keep_for_replays(counters: Tensor) -> Tensor:
    """Say that a launch may be replayed with this tensor, which its stream alone uses."""
    tape = getattr(_RECORDING, "tape", None)
    if tape is not None:
        tape.scratch.append(counters)
    return counters


class Replay:
    """The launch of a product, again: ``y = replay(x, stream)``.

    All arguments but x and y are those of the launch that was recorded, which the replay keeps alive.

    Args:
        launched: the launch.
        x: (N, columns) that it read, contiguous.
        y: (N, rows) that it wrote, contiguous.
        parts: all other tensors that it may read: changes made to them in place must count.
        scratch: memory that its stream alone uses.

    Raises:
        ValueError: it read a copy of one of them, which would go stale.
    """

    __slots__ = (
        "_arguments",
        "_function",
        "_grid",
        "_kept",
        "_metadata",
        "_run",
        "_size",
        "_x",
        "_y",
        "dtype",
    )

    def __init__(
        self,
        launched: Launched,
        x: Tensor,
        y: Tensor,
        parts: Sequence[Tensor | None],
        scratch: Sequence[Tensor],
    ) -> None:
        self._kept = launched.arguments
        compiled, names = launched.compiled, launched.kernel.arg_names
        pointers = [a.data_ptr() if isinstance(a, Tensor) else a for a in launched.arguments]
        tensors = [i for i, a in enumerate(launched.arguments) if isinstance(a, Tensor)]
        self._x = [i for i in tensors if pointers[i] == x.data_ptr()]
        self._y = [i for i in tensors if pointers[i] == y.data_ptr()]
        known = {t.data_ptr() for t in (x, y, *parts, *scratch) if t is not None}
        if not self._x or not self._y or any(pointers[i] not in known for i in tensors):
            raise ValueError(
                "the launch does not read x and the weight, or write y, where they lie"
            )
        constants = [launched.constants[name] for name in names[len(pointers) :]]
        self._arguments = [*pointers, *constants]
        self._run, self._function = compiled.run, compiled.function
        self._metadata = compiled.packed_metadata
        self._grid = (*launched.grid, 1, 1)[:3]
        self._size, self.dtype = tuple(y.shape), y.dtype

    def __call__(self, x: Tensor, stream: int) -> Tensor:
        """The product of an x of the recorded size, dtype, device and alignment, on a raw CUDA stream."""
        y = torch.empty(self._size, dtype=self.dtype, device=x.device)
        arguments = self._arguments.copy()
        given, out = x.data_ptr(), y.data_ptr()
        for i in self._x:
            arguments[i] = given
        for i in self._y:
            arguments[i] = out
        self._run(*self._grid, stream, self._function, self._metadata, None, None, None, *arguments)
        return y
