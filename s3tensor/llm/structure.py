"""Find the decoder blocks of a model and the linears inside them, by structure and not by names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from s3tensor.errors import ModelError, PatternError
from s3tensor.pattern import Pattern

LayerFilter = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class LinearLayer:
    """A linear map inside a decoder block, whichever way round it stores its weight.

    ``nn.Linear`` holds (out_features, in_features); the ``Conv1D`` of GPT-2 holds the transpose.
    """

    module: nn.Module
    name: str  # full name in the model
    transposed: bool

    @property
    def weight(self) -> Tensor:
        """The weight as (out_features, in_features)."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach().t() if self.transposed else weight.detach()

    def set_weight(self, weight: Tensor) -> None:
        """Replace the parameter by ``weight``, (out_features, in_features), without gradient."""
        stored = weight.t() if self.transposed else weight
        self.module.weight = nn.Parameter(stored, requires_grad=False)

    def copy_weight(self, weight: Tensor) -> None:
        """Write ``weight``, (out_features, in_features), into the parameter that is there."""
        self.weight.copy_(weight)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        out_features, in_features = self.weight.shape
        return out_features, in_features


@dataclass(frozen=True)
class Skipped:
    """A linear that stays dense, and why."""

    name: str
    reason: str


def is_linear(module: nn.Module) -> bool:
    """True for ``nn.Linear`` and for the transposed ``Conv1D`` of transformers."""
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    # By shape and class name, so that finding linears does not import transformers.
    return (
        type(module).__name__ == "Conv1D"
        and isinstance(getattr(module, "nf", None), int)
        and getattr(getattr(module, "weight", None), "ndim", 0) == 2
    )


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks: the largest ``nn.ModuleList`` of one class that holds linears.

    Raises:
        ModelError: when the model has no such list.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if len({type(child) for child in module}) != 1:
            continue
        if not any(is_linear(child) for child in module[0].modules()):
            continue
        numel = sum(parameter.numel() for parameter in module.parameters())
        if best is None or numel > best[0]:
            best = (numel, name, module)
    if best is None:
        raise ModelError(
            f"{type(model).__name__} has no decoder blocks: no nn.ModuleList of equal blocks that hold "
            "linears; prune single layers with s3tensor.prune, or pass a decoder-only language model"
        )
    return best[1], best[2]


def prunable_layers(
    block: nn.Module,
    prefix: str,
    pattern: Pattern,
    filter_fn: LayerFilter | None = None,
) -> tuple[list[LinearLayer], list[Skipped]]:
    """The linears of one block that fit ``pattern``, and those that stay dense with the reason."""
    layers: list[LinearLayer] = []
    skipped: list[Skipped] = []
    for name, module in block.named_modules():
        if not is_linear(module):
            continue
        layer = LinearLayer(module, f"{prefix}.{name}" if name else prefix, _is_conv1d(module))
        if filter_fn is not None and not filter_fn(module, layer.name):
            skipped.append(Skipped(layer.name, "left out by the filter"))
            continue
        try:
            pattern.bind(layer.shape)
        except PatternError as error:
            skipped.append(Skipped(layer.name, str(error)))
            continue
        layers.append(layer)
    return layers, skipped
