"""Compressing the linear layers of a whole model: ``sparsify_`` and its report."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from s3tensor.errors import ModelError, NonFiniteError, PatternError
from s3tensor.mask.projection import satisfies
from s3tensor.model.linear import put_parameter
from s3tensor.model.report import Report, table
from s3tensor.model.weights import (
    ADAPTER,
    LayerFilter,
    ModelWeight,
    adapter_parts,
    computed_by_hook,
    linear_layers,
    router_names,
)
from s3tensor.modes import neutral
from s3tensor.pattern import Pattern
from s3tensor.tensor.base import Compressed
from s3tensor.tensor.sparse import StructuredSparseTensor

# Output embeddings, by the names that Hugging Face models give them. Their rows are tokens, most of them
# rare, and pruning them costs far more accuracy than their share of the bytes saves.
HEADS = ("lm_head", "embed_out", "output_projection", "score", "classifier")


@dataclass(frozen=True)
class SparsifyRow:
    """What :func:`sparsify_` did to one linear layer."""

    name: str
    pattern: str
    action: str  # "compressed" (it satisfied the pattern), "projected" or "skipped"
    bytes_before: int
    bytes_after: int
    reason: str = ""


class SparsifyReport(Report[SparsifyRow]):
    """Rows of :func:`sparsify_`, one for each linear layer."""

    def __str__(self) -> str:
        lines: list[tuple[str | int, ...]] = [("name", "action", "before", "after", "note")]
        for row in self:
            note = row.reason or row.pattern
            lines.append((row.name, row.action, row.bytes_before, row.bytes_after, note))
        return table([*lines, ("total", "", self.bytes_before, self.bytes_after, "bytes")])


@neutral()
def sparsify_(
    model: nn.Module, pattern: Pattern | str, filter_fn: LayerFilter | None = None
) -> SparsifyReport:
    """Compress the weights of linear layers in place; those that do not satisfy ``pattern`` are projected.

    Linear layers are ``nn.Linear`` and the ``Conv1D`` of transformers, whose weight is stored transposed.
    Projection keeps the blocks of the largest magnitude; prune with data first for better accuracy
    (:mod:`s3tensor.prune`). Compressed parameters have no gradient. All weights are checked before the
    first one is changed.

    Args:
        model: a module; its own weight counts too when it is a linear layer.
        pattern: a pattern or its string.
        filter_fn: ``filter_fn(module, name)`` is True for the layers to compress. By default all but
            output heads (``lm_head`` and the like), routers of experts, and weights that several modules
            share. With a filter, a shared weight is compressed once if every module that holds it is
            chosen, else skipped.

    Returns:
        One row for each linear layer: what was done, bytes before and after, and why it was skipped.
        Layers that the pattern does not fit are skipped.

    Raises:
        PatternError: a pattern that does not parse.
        ModelError: a model without linear layers.
        NonFiniteError: NaN or Inf in a weight that is to be compressed.
    """
    pattern = Pattern.parse(pattern)
    layers = list(linear_layers(model))
    if not layers:
        raise ModelError(f"{type(model).__name__} has no linear layers to compress")
    chosen = names_chosen(layers, filter_fn)
    adapters, routers = adapter_parts(model), router_names(model)
    reasons = {
        layer.name: reason_to_skip(layer, pattern, chosen, routers, adapters) for layer in layers
    }
    for layer in layers:
        if not reasons[layer.name] and not bool(torch.isfinite(layer.parameter).all()):
            raise NonFiniteError(
                f"{layer.name}: the weight holds NaN or Inf; nothing was compressed"
            )
    rows = []
    made: dict[
        tuple[frozenset[str], bool], tuple[nn.Parameter, str]
    ] = {}  # once where it is shared
    for layer in layers:
        before, action, reason = layer.nbytes, "skipped", reasons[layer.name]
        if not reason:
            key = (frozenset(place.path for place in layer.places), layer.transposed)
            if key not in made:
                made[key] = _compressed(layer, pattern)
            parameter, action = made[key]
            put_parameter(layer.module, "weight", parameter)
        rows.append(SparsifyRow(layer.name, str(pattern), action, before, layer.nbytes, reason))
    return SparsifyReport(tuple(rows))


def _compressed(layer: ModelWeight, pattern: Pattern) -> tuple[nn.Parameter, str]:
    """A layer's weight compressed, as it is stored, and what that took."""
    weight = layer.weight
    action = "compressed" if satisfies(weight, pattern) else "projected"
    # Projection keeps every non-zero block of a weight that satisfies the pattern already.
    packed = StructuredSparseTensor.from_dense(weight, pattern)
    return nn.Parameter(layer.upright(packed), requires_grad=False), action


def names_chosen(layers: list[ModelWeight], filter_fn: LayerFilter | None) -> set[str] | None:
    """The names of the layers that a filter takes; None without a filter."""
    if filter_fn is None:
        return None
    return {layer.name for layer in layers if filter_fn(layer.module, layer.name)}


def reason_to_skip(
    layer: ModelWeight,
    pattern: Pattern,
    chosen: set[str] | None,
    routers: set[str],
    adapters: Set[int],
) -> str:
    """Why a layer stays as it is, or an empty string.

    Args:
        chosen: the names of the layers that a filter takes, or None: all but output heads, routers and
            weights that several modules share.
        routers: names of layers, see :func:`s3tensor.model.weights.router_names`.
        adapters: ids of modules that belong to adapters, see :func:`adapter_parts`.
    """
    if id(layer.module) in adapters:
        return ADAPTER
    if parametrize.is_parametrized(layer.module, "weight"):
        return "parametrized; call s3tensor.finalize"
    computed = computed_by_hook(layer.module)
    if computed:
        return computed
    if isinstance(layer.parameter, Compressed):
        return "compressed already"
    if chosen is not None and layer.name not in chosen:
        return "left out by the filter"
    if chosen is None and layer.name.rpartition(".")[2] in HEADS:
        return "output head"
    if chosen is None and layer.name in routers:
        return "a router"
    holders = {place.name for place in layer.places}
    if len(holders) > 1 and (chosen is None or not holders <= chosen):
        return f"shared with {', '.join(sorted(holders - {layer.name}))}"
    try:
        pattern.bind(layer.weight.shape)
    except PatternError as error:
        return str(error)
    if not layer.parameter.is_floating_point():
        return f"dtype {layer.parameter.dtype}"
    return ""
