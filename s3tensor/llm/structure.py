"""Find the decoder blocks of a model, and the linears inside them, by structure rather than by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from s3tensor.errors import ModelError, PatternError
from s3tensor.model.weights import (
    ADAPTER,
    LayerFilter,
    ModelWeight,
    adapter_parts,
    is_linear,
)
from s3tensor.pattern import Pattern
from s3tensor.tensor.base import Compressed


@dataclass(frozen=True)
class Skipped:
    """A weight that stays dense, and why."""

    name: str
    reason: str
    misfit: bool = False  # the pattern does not fit its shape


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks: the largest ``nn.ModuleList`` of blocks that hold linears.

    The blocks may be of several classes (hybrids of attention and state-space layers) if each holds linears.

    Raises:
        ModelError: the model has no such list.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not _are_blocks(module):
            continue
        numel = sum(parameter.numel() for parameter in module.parameters())
        if best is None or numel > best[0]:
            best = (numel, name, module)
    if best is None:
        raise ModelError(
            f"{type(model).__name__} has no decoder blocks: no nn.ModuleList of blocks that hold "
            "linears; prune single layers with s3tensor.prune, or pass a decoder-only language model"
        )
    return best[1], best[2]


def _are_blocks(modules: nn.ModuleList) -> bool:
    holds = [any(is_linear(part) for part in child.modules()) for child in modules]
    if len({type(child) for child in modules}) == 1:
        return any(holds)
    return all(holds) and not any(is_linear(child) for child in modules)


def prunable_layers(
    block: nn.Module,
    prefix: str,
    pattern: Pattern | Callable[[str], Pattern],  # or the pattern of each linear by its full name
    filter_fn: LayerFilter | None = None,
) -> tuple[list[ModelWeight], list[Skipped]]:
    """The linears of one block that ``pattern`` fits, and the weights that stay dense with the reason.

    Matrices and stacks of matrices outside linears (experts in one tensor, convolutions) stay dense.
    """
    layers: list[ModelWeight] = []
    skipped: list[Skipped] = []
    inside: tuple[str, ...] = ()  # prefixes of what belongs to a linear: its parametrizations
    adapters = adapter_parts(block)
    for name, module in block.named_modules():
        full = f"{prefix}.{name}" if name else prefix
        if is_linear(module):
            inside += (f"{name}.",)
            layer = ModelWeight(full, module)
            wanted = pattern if isinstance(pattern, Pattern) else pattern(full)
            refusal = _refusal(layer, wanted, filter_fn)
            if id(module) in adapters:
                refusal = Skipped(full, ADAPTER)
            if refusal is None:
                layers.append(layer)
            else:
                skipped.append(refusal)
        elif not name.startswith(inside):
            reason = f"a weight of {type(module).__name__}, which is not a linear"
            reason = ADAPTER if id(module) in adapters else reason
            skipped.extend(
                Skipped(f"{full}.{part}", reason)
                for part, weight in module.named_parameters(recurse=False)
                if weight.ndim >= 2
            )
    return layers, skipped


def _refusal(layer: ModelWeight, pattern: Pattern, filter_fn: LayerFilter | None) -> Skipped | None:
    """Why a linear stays dense, or None."""
    if filter_fn is not None and not filter_fn(layer.module, layer.name):
        return Skipped(layer.name, "left out by the filter")
    if is_parametrized(layer.module, "weight"):
        return Skipped(layer.name, "its weight has a parametrization; call s3tensor.finalize first")
    if not layer.weight.is_floating_point():
        return Skipped(layer.name, f"its weight is {layer.weight.dtype}, a quantized one")
    try:
        pattern.bind(layer.shape)
    except PatternError as error:
        return Skipped(layer.name, str(error), misfit=True)
    return None


@contextmanager
def on_device(block: nn.Module, device: torch.device) -> Iterator[None]:
    """The block on a device, until the exit."""
    home = next(block.parameters()).device
    block.to(device)
    try:
        yield
    finally:
        block.to(home)


@contextmanager
def dense_again(block: nn.Module, layers: list[ModelWeight]) -> Iterator[None]:
    """Restore a block's parameters and buffers if anything raises."""
    held = [(layer.module, layer.module.weight) for layer in layers]
    plain = (
        x
        for x in (*block.parameters(), *block.buffers())
        if not isinstance(x, Compressed)  # which nothing changes
    )
    values = [(x, x.detach().to("cpu", copy=True)) for x in plain]
    try:
        yield
    except BaseException:
        for module, weight in held:
            module.weight = weight
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        raise
