"""Compressing the linear layers of a whole model: ``sparsify_`` and its report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from s3tensor.errors import ModelError, NonFiniteError, PatternError
from s3tensor.mask.projection import satisfies
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


@dataclass(frozen=True)
class SparsifyReport:
    """Rows of :func:`sparsify_`, one for each linear layer, in the model's order."""

    rows: tuple[SparsifyRow, ...]

    @property
    def bytes_before(self) -> int:
        """Bytes of all weights in the report, dense."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of all weights in the report, as they are now."""
        return sum(row.bytes_after for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[SparsifyRow]:
        return iter(self.rows)

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=4)
        lines = [f"{'name':<{width}}  {'action':<10}  {'before':>12}  {'after':>12}  note"]
        for row in self.rows:
            note = row.reason or row.pattern
            lines.append(
                f"{row.name:<{width}}  {row.action:<10}  {row.bytes_before:>12,}  "
                f"{row.bytes_after:>12,}  {note}"
            )
        lines.append(
            f"{'total':<{width}}  {'':<10}  {self.bytes_before:>12,}  {self.bytes_after:>12,}  bytes"
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class Layer:
    """A layer and its weight as the pattern sees it: (out_features, in_features), or a convolution's."""

    name: str
    module: nn.Module
    parameter: Tensor
    transposed: bool  # stored as (in_features, out_features), like the Conv1D of transformers

    @property
    def upright(self) -> Tensor:
        weight = self.parameter.detach()
        return weight.t() if self.transposed else weight

    @property
    def nbytes(self) -> int:
        if isinstance(self.parameter, Compressed):
            return self.parameter.nbytes_compressed
        return self.parameter.numel() * self.parameter.element_size()


def sparsify_(
    model: nn.Module,
    pattern: Pattern | str,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
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
            output heads (``lm_head`` and the like) and weights that several modules share. With a filter,
            a shared weight is compressed once if every module that holds it is chosen, else skipped.

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
    names = {layer.name for layer in layers if filter_fn and filter_fn(layer.module, layer.name)}
    owners = owners_of(model)
    reasons: dict[str, str] = {}
    for layer in layers:
        holders = owners.get(id(layer.parameter), {layer.name})
        reason = reason_to_skip(layer, pattern, holders, names if filter_fn else None)
        if reason:
            reasons[layer.name] = reason
        elif not bool(torch.isfinite(layer.parameter).all()):
            raise NonFiniteError(
                f"{layer.name}: the weight holds NaN or Inf; nothing was compressed"
            )
    rows = []
    made: dict[tuple[int, bool], tuple[nn.Parameter, str]] = {}
    for layer in layers:
        before = layer.nbytes
        if layer.name in reasons:
            row = SparsifyRow(
                layer.name, str(pattern), "skipped", before, before, reasons[layer.name]
            )
            rows.append(row)
            continue
        key = (id(layer.parameter), layer.transposed)
        if key not in made:
            made[key] = _compress(layer, pattern)
        parameter, action = made[key]
        layer.module.weight = parameter
        after = parameter.nbytes_compressed  # type: ignore[attr-defined]
        rows.append(SparsifyRow(layer.name, str(pattern), action, before, after))
    return SparsifyReport(tuple(rows))


def _compress(layer: Layer, pattern: Pattern) -> tuple[nn.Parameter, str]:
    action = "compressed" if satisfies(layer.upright, pattern) else "projected"
    # Projection keeps every non-zero block of a weight that satisfies the pattern already.
    weight: Tensor = StructuredSparseTensor.from_dense(layer.upright, pattern)
    weight = weight.t() if layer.transposed else weight
    return nn.Parameter(weight, requires_grad=False), action


def reason_to_skip(
    layer: Layer, pattern: Pattern, holders: set[str], chosen: set[str] | None
) -> str:
    """Why a layer stays as it is, or an empty string."""
    if parametrize.is_parametrized(layer.module, "weight"):
        return "parametrized; call s3tensor.finalize"
    if isinstance(layer.parameter, Compressed):
        return "compressed already"
    if chosen is not None and layer.name not in chosen:
        return "left out by the filter"
    if chosen is None and layer.name.rpartition(".")[2] in HEADS:
        return "output head"
    if len(holders) > 1 and (chosen is None or not holders <= chosen):
        return f"shared with {', '.join(sorted(holders - {layer.name}))}"
    try:
        pattern.bind(layer.upright.shape)
    except PatternError as error:
        return str(error)
    if not layer.parameter.is_floating_point():
        return f"dtype {layer.parameter.dtype}"
    return ""


def linear_layers(
    model: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Linear,)
) -> Iterator[Layer]:
    """The linear layers of a model and its modules of other ``kinds``, by name, in its order."""
    for name, module in model.named_modules():
        transposed = is_conv1d(module)
        weight = getattr(module, "weight", None)
        if (transposed or isinstance(module, kinds)) and isinstance(weight, Tensor):
            yield Layer(name or type(module).__name__, module, weight, transposed)


def is_conv1d(module: nn.Module) -> bool:
    """True for the ``Conv1D`` of transformers, a linear that stores its weight transposed."""
    # By class name and shape, so that transformers need not be imported, nor installed.
    return (
        type(module).__name__ == "Conv1D"
        and isinstance(getattr(module, "nf", None), int)
        and getattr(getattr(module, "weight", None), "ndim", 0) == 2
    )


def owners_of(model: nn.Module) -> dict[int, set[str]]:
    """For each parameter, by identity, the modules that hold it."""
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(name or type(module).__name__)
    return owners
