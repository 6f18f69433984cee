"""Catch what modules are given, move it between devices, and run blocks over cached inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from s3tensor.errors import CalibrationError, NonFiniteError


def transfer_to_device(value: Any, device: torch.device | str) -> Any:
    """``value`` with every tensor in it on ``device``; tuples, lists and dicts are rebuilt.

    A tensor that is already there is not copied. Other objects pass through unchanged.
    """
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        moved = [transfer_to_device(item, device) for item in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    if isinstance(value, list):
        return [transfer_to_device(item, device) for item in value]
    if isinstance(value, dict):
        return {key: transfer_to_device(item, device) for key, item in value.items()}
    return value


class _Caught(Exception):
    """Raised inside a forward pass to end it early; never leaves this module."""


class ModuleInputCatcher:
    """Records the inputs of modules and, if wanted, ends the forward pass once the last is reached.

    Args:
        modules: one module or several; ``inputs[i]`` are the calls of ``modules[i]`` in order.
        device: where recorded tensors are kept; ``None`` leaves them where they are.
        stop: end the forward pass when the last of ``modules`` is called, so that nothing after it is
            computed. Then run the pass inside :meth:`run`.

    Example:
        >>> linear = nn.Linear(4, 2)
        >>> with ModuleInputCatcher(linear) as catcher:
        ...     _ = catcher.run(nn.Sequential(linear, nn.ReLU()), torch.ones(3, 4))
        >>> args, kwargs = catcher.inputs[0][0]
        >>> args[0].shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        modules: nn.Module | Sequence[nn.Module],
        device: torch.device | str | None = None,
        stop: bool = True,
    ) -> None:
        self.modules = [modules] if isinstance(modules, nn.Module) else list(modules)
        self.device = device
        self.stop = stop
        self.inputs: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = [[] for _ in self.modules]
        self._hooks = ExitStack()

    def __enter__(self) -> ModuleInputCatcher:
        for index, module in enumerate(self.modules):
            handle = module.register_forward_pre_hook(self._hook(index), with_kwargs=True)
            self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.close()

    def _hook(self, index: int) -> Any:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = (args, kwargs)
            if self.device is not None:
                call = transfer_to_device(call, self.device)
            self.inputs[index].append(call)
            if self.stop and index == len(self.modules) - 1:
                raise _Caught

        return record

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """``module(*args, **kwargs)``, or ``None`` when the pass was ended early."""
        try:
            return module(*args, **kwargs)
        except _Caught:
            return None

    def pop(self, index: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The oldest recorded call of one module, forgotten here."""
        return self.inputs[index].pop(0)


@dataclass
class Chunk:
    """One batch of calibration sequences on its way through the blocks."""

    hidden: Tensor  # (batch, tokens, hidden), input of the next block, on the cache device
    extras: list[tuple[tuple[Any, ...], dict[str, Any]]]  # for each block its other arguments


def catch_chunks(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    calibration: Iterable[Tensor],  # of (batch, tokens) int64
    cache: torch.device | str,
) -> list[Chunk]:
    """Embed every calibration batch and record what each block is called with besides hidden states.

    The blocks themselves do not compute: each passes its input on, so that masks and position
    embeddings, which may differ from block to block, are caught at the cost of the embedding alone.

    Raises:
        CalibrationError: no batches, or batches that are not (batch, tokens) of integers.
    """
    chunks: list[Chunk] = []
    device = next(model.parameters()).device
    as_tuple: bool | None = None
    for batch in calibration:
        _check_batch(batch)
        batch = batch.to(device)
        if as_tuple is None:
            as_tuple = _returns_tuple(model, blocks[0], batch[:1])
        with (
            _passing_on(blocks, as_tuple),
            ModuleInputCatcher(blocks, cache) as catcher,
            torch.no_grad(),
        ):
            catcher.run(model, input_ids=batch, use_cache=False)
        calls = [split_hidden(*catcher.pop(index)) for index in range(len(blocks))]
        chunks.append(Chunk(calls[0][0], [(args, kwargs) for _, args, kwargs in calls]))
    if not chunks:
        raise CalibrationError(
            "calibration is empty; give an iterable of (batch, tokens) token tensors"
        )
    return chunks


def _check_batch(batch: Tensor) -> None:
    if not isinstance(batch, Tensor) or batch.ndim != 2 or batch.is_floating_point():
        found = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
        raise CalibrationError(
            f"calibration must hold (batch, tokens) tensors of token ids, got {found}; stack sequences "
            "with torch.stack, or use s3tensor.llm.calibration_tokens"
        )
    if batch.numel() == 0:
        raise CalibrationError(f"a calibration batch of shape {tuple(batch.shape)} holds no tokens")


def split_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """A block's hidden states and its other arguments; caches of generation are left out."""
    kwargs = {name: value for name, value in kwargs.items() if not _is_cache(value)}
    if args:
        return args[0], args[1:], kwargs
    return kwargs.pop("hidden_states"), (), kwargs


def _is_cache(value: object) -> bool:
    return any(cls.__name__ == "Cache" for cls in type(value).__mro__)


@torch.no_grad()
def _returns_tuple(model: nn.Module, block: nn.Module, batch: Tensor) -> bool:
    """Whether a block returns a tuple, as older models' do, or its hidden states alone."""
    returned: list[bool] = []

    def look(_: nn.Module, args: Any, out: Any) -> None:
        returned.append(isinstance(out, tuple))
        raise _Caught

    with ExitStack() as hooks:
        hooks.callback(block.register_forward_hook(look).remove)
        with suppress(_Caught):
            model(input_ids=batch, use_cache=False)
    return returned[0]


@contextmanager
def _passing_on(blocks: Sequence[nn.Module], as_tuple: bool) -> Iterator[None]:
    """Blocks whose forward returns the hidden states that it is given."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = split_hidden(args, kwargs)[0]
        return (hidden,) if as_tuple else hidden

    for block in blocks:
        block.__dict__["forward"] = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.__dict__["forward"]


class BlockRunner:
    """Runs one block over chunks: whole, or only until a layer inside has its input."""

    def __init__(
        self, block: nn.Module, index: int, device: torch.device, cache: torch.device
    ) -> None:
        self.block = block
        self.index = index
        self.device = device
        self.cache = cache

    def _call(self, chunk: Chunk) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = transfer_to_device(chunk.extras[self.index], self.device)
        return (chunk.hidden.to(self.device), *args), kwargs

    @torch.no_grad()
    def output(self, chunk: Chunk) -> Tensor:
        """The block's output hidden states, on the block's device."""
        args, kwargs = self._call(chunk)
        out = self.block(*args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def layer_input(self, chunk: Chunk, layer: nn.Module) -> Tensor:
        """The input of ``layer`` inside the block; nothing after it is computed."""
        args, kwargs = self._call(chunk)
        with ModuleInputCatcher(layer) as catcher:
            catcher.run(self.block, *args, **kwargs)
        if not catcher.inputs[0]:
            raise CalibrationError("a layer that took part before was not called on this batch")
        return first_tensor(*catcher.pop())

    @torch.no_grad()
    def layer_inputs(
        self, chunk: Chunk, layers: Sequence[nn.Module]
    ) -> tuple[Tensor, list[Tensor]]:
        """The block's output, and the input of each layer on the cache device, from one pass."""
        args, kwargs = self._call(chunk)
        with ModuleInputCatcher(layers, self.cache, stop=False) as catcher:
            out = self.block(*args, **kwargs)
        return (
            out[0] if isinstance(out, tuple) else out,
            [first_tensor(*catcher.pop(index)) for index in range(len(layers))],
        )

    @torch.no_grad()
    def input_groups(self, chunk: Chunk, layers: Sequence[nn.Module]) -> list[list[int]]:
        """Indices of ``layers`` in order of call, grouped by the tensor they are given.

        Layers that are not called, or not with every token (routed experts), are in no group.
        """
        args, kwargs = self._call(chunk)
        calls: list[tuple[int, Tensor]] = []  # holds the tensors, so that no id is used twice
        with ExitStack() as hooks:
            for index, layer in enumerate(layers):

                def record(_: nn.Module, a: Any, k: Any, index: int = index) -> None:
                    calls.append((index, first_tensor(a, k)))

                hooks.callback(layer.register_forward_pre_hook(record, with_kwargs=True).remove)
            self.block(*args, **kwargs)
        groups: dict[tuple[int, int], list[int]] = {}
        seen: set[int] = set()
        for index, given in calls:
            tokens = chunk.hidden.shape[:-1].numel()
            # A layer that is called twice is calibrated on its first call.
            if index not in seen and given.shape[:-1].numel() == tokens:
                seen.add(index)
                groups.setdefault((id(given), given.shape[-1]), []).append(index)
        return list(groups.values())


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input of a linear call, given by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def check_finite(x: Tensor, where: str) -> None:
    """Refuse NaN and Inf in activations, by name of the place.

    Raises:
        NonFiniteError: naming ``where``.
    """
    if not bool(torch.isfinite(x).all()):
        raise NonFiniteError(
            f"{where} has NaN or Inf in its activations; load the model in float32 or bfloat16, and look "
            "for damaged weights before it"
        )
