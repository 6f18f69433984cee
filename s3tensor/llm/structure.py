"""Find the decoder blocks of a model, and the linears inside them, by structure rather than by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from s3tensor.errors import ModelError, PatternError
from s3tensor.model.weights import (
    ADAPTER,
    LayerFilter,
    ModelWeight,
    adapter_parts,
    computed_by_hook,
    is_linear,
    router_names,
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
    routers = router_names(block)
    for name, module in block.named_modules():
        full = f"{prefix}.{name}" if name else prefix
        if is_linear(module):
            inside += (f"{name}.",)
            layer = ModelWeight(full, module)
            wanted = pattern if isinstance(pattern, Pattern) else pattern(full)
            refusal = _refusal(layer, wanted, filter_fn, name in routers)
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


def _refusal(
    layer: ModelWeight, pattern: Pattern, filter_fn: LayerFilter | None, router: bool
) -> Skipped | None:
    """Why a linear stays dense, or None."""
    if filter_fn is not None and not filter_fn(layer.module, layer.name):
        return Skipped(layer.name, "left out by the filter")
    if is_parametrized(layer.module, "weight"):
        return Skipped(layer.name, "its weight has a parametrization; call s3tensor.finalize first")
    computed = computed_by_hook(layer.module)
    if computed:
        return Skipped(layer.name, computed)
    if router:
        return Skipped(layer.name, "it is a router")
    if not layer.weight.is_floating_point():
        return Skipped(layer.name, f"its weight is {layer.weight.dtype}, a quantized one")
    try:
        pattern.bind(layer.shape)
    except PatternError as error:
        return Skipped(layer.name, str(error), misfit=True)
    return None


@dataclass(frozen=True)
class Outside:
    """A part of a model outside the blocks to prune, which stays as it is."""

    name: str
    linears: int
    weights: int  # elements of its matrices, without those that a part before it shares


def outside_blocks(model: nn.Module, prefix: str, count: int) -> list[Outside]:
    """The parts of a model with matrices, outside the first ``count`` blocks of the list at ``prefix``."""
    found: list[Outside] = []
    path_to = prefix.split(".") if prefix else []
    listed = model.get_submodule(prefix)
    assert isinstance(listed, nn.ModuleList)
    seen = {id(x) for block in listed[:count] for x in block.parameters()}

    def add(name: str, parameters: Iterable[nn.Parameter], modules: Iterable[nn.Module]) -> None:
        own = {id(x): x for x in parameters if x.ndim >= 2 and id(x) not in seen}
        seen.update(own)
        if own:
            weights = sum(x.shape.numel() for x in own.values())
            found.append(Outside(name, sum(map(is_linear, modules)), weights))

    module: nn.Module = model
    for depth, part in enumerate([*path_to, None]):
        path = path_to[:depth]
        for name, parameter in module.named_parameters(recurse=False):
            add(".".join([*path, name]), [parameter], [])
        if part is None:
            rest = listed[count:]
            numbers = f"{count}" if len(rest) == 1 else f"{count}-{count + len(rest) - 1}"
            add(".".join([*path, numbers]), rest.parameters(), rest.modules())
            break
        for name, child in module.named_children():
            if name != part:
                add(".".join([*path, name]), child.parameters(), child.modules())
        module = module.get_submodule(part)
    return found


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Modules that ``torch.compile`` compiled run as they were, until the exit.

    Compiled code does not call hooks that were registered after it.
    """
    with ExitStack() as stack:
        for module in model.modules():
            state = module.__dict__
            # Of module.compile(), of torch.compile(module), and of module.forward = torch.compile(...).
            wrapped = module._modules.get("_orig_mod") if "dynamo_ctx" in state else None
            plain = wrapped or getattr(state.get("forward"), "_torchdynamo_orig_callable", None)
            if plain is not None:
                stack.callback(state.__setitem__, "forward", state["forward"])
                state["forward"] = plain
            if state.get("_compiled_call_impl") is not None:
                stack.callback(
                    state.__setitem__, "_compiled_call_impl", state["_compiled_call_impl"]
                )
                state["_compiled_call_impl"] = None
        yield


@contextmanager
def with_weights(layers: Sequence[ModelWeight], weights: Mapping[int, Tensor]) -> Iterator[None]:
    """Other weights, by id of module and as they are stored, in the own places of layers, until the exit."""
    held = [(layer, layer.parameter) for layer in layers]
    for layer, parameter in held:
        other = weights[id(layer.module)].to(parameter.device)
        setattr(layer.module, layer.attribute, nn.Parameter(other, requires_grad=False))
    try:
        yield
    finally:
        for layer, parameter in held:
            setattr(layer.module, layer.attribute, parameter)


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
    held = [(layer, layer.parameter) for layer in layers]
    plain = (
        x
        for x in (*block.parameters(), *block.buffers())
        if not isinstance(x, Compressed)  # which nothing changes
    )
    values = [(x, x.detach().to("cpu", copy=True)) for x in plain]
    try:
        yield
    except BaseException:
        for layer, weight in held:
            layer.replace(weight)
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        raise
