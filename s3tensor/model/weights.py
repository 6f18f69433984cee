"""A weight somewhere in a model: where it is, which modules share it, which way round it is stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from s3tensor.model.linear import put_parameter
from s3tensor.tensor.base import Compressed

LayerFilter = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class ModelWeight:
    """A weight by where a model has it; the parameter is looked up, so that one that is replaced is freed.

    Args:
        module_path: in the model, such as ``blocks.0.up``; empty for the model itself.
        attribute: of the module.
        sharing: the other places of the same parameter.
    """

    module_path: str
    module: nn.Module
    attribute: str = "weight"
    sharing: tuple[ModelWeight, ...] = ()

    @property
    def places(self) -> tuple[ModelWeight, ...]:
        """All places of the parameter, its own first."""
        return (self, *self.sharing)

    @property
    def path(self) -> str:
        """The weight's, such as ``blocks.0.up.weight``."""
        return f"{self.module_path}.{self.attribute}" if self.module_path else self.attribute

    @property
    def name(self) -> str:
        """The module's: its path, or the class of the model itself."""
        return self.module_path or type(self.module).__name__

    @property
    def parameter(self) -> Any:  # an nn.Parameter, which may be a Compressed too
        """The parameter as it is stored; computed where it is parametrized."""
        return getattr(self.module, self.attribute)

    @property
    def transposed(self) -> bool:
        """Whether it is stored as (in_features, out_features)."""
        return self.attribute == "weight" and is_conv1d(self.module)

    def upright(self, stored: Tensor) -> Tensor:
        """What is stored as the weight is, as (out_features, in_features); its own inverse."""
        return stored.t() if self.transposed else stored

    @property
    def weight(self) -> Tensor:
        """The weight without gradient, (out_features, in_features), or as a convolution stores it."""
        return self.upright(self.parameter.detach())

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of a linear layer."""
        out_features, in_features = self.weight.shape
        return out_features, in_features

    @property
    def nbytes(self) -> int:
        """Bytes of the weight, compressed or dense, without copies for speed."""
        parameter = self.parameter
        if isinstance(parameter, Compressed):
            return parameter.nbytes_compressed
        return int(parameter.numel() * parameter.element_size())

    def copy_weight(self, weight: Tensor) -> None:
        """Write ``weight``, (out_features, in_features), into the parameter that is there."""
        self.weight.copy_(weight)

    def replace(self, parameter: nn.Parameter) -> None:
        """Put one parameter, as it is stored, in all the places, so that what was shared stays shared."""
        for place in self.places:
            put_parameter(place.module, place.attribute, parameter)


def model_weights(model: nn.Module, filter_fn: LayerFilter | None = None) -> list[ModelWeight]:
    """The parameters of a model, biases too, each once, in its order.

    Args:
        model: a module; its own parameters count too.
        filter_fn: ``filter_fn(module, name)`` is True for the modules to look at. Places in the others are
            left out.
    """
    places: dict[int, list[ModelWeight]] = {}
    for path, module in model.named_modules():
        if filter_fn is not None and not filter_fn(module, path):
            continue
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(id(parameter), []).append(ModelWeight(path, module, name))
    return [replace(first, sharing=tuple(others)) for first, *others in places.values()]


def linear_layers(
    model: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Linear,)
) -> Iterator[ModelWeight]:
    """The weight of each linear layer and each module of other ``kinds``, in the model's order.

    Each layer has its own, also where several share a parameter, and where it is parametrized.
    """
    known = {id(weight.parameter): weight for weight in model_weights(model)}
    for path, module in model.named_modules():
        if not (is_conv1d(module) or isinstance(module, kinds)):
            continue
        parameter, own = getattr(module, "weight", None), ModelWeight(path, module)
        if isinstance(parameter, Tensor):
            found = known.get(id(parameter), own)
            places = (replace(place, sharing=()) for place in found.places)
            yield replace(own, sharing=tuple(place for place in places if place != own))


def computed_by_hook(module: nn.Module, attribute: str = "weight") -> str:
    """Why a module's weight is not a parameter that can be replaced, or an empty string.

    ``torch.nn.utils.prune`` and the old ``weight_norm`` and ``spectral_norm`` compute it before each
    forward, which would undo whatever was done to it. A parametrized weight is another matter.
    """
    if attribute in module._parameters or is_parametrized(module, attribute):
        return ""
    sources = [name for name in module._parameters if name.startswith(f"{attribute}_")]
    if not sources:
        return f"its {attribute} is not a parameter"
    return (
        f"its {attribute} is computed from {' and '.join(sources)} by a hook; make it a parameter first "
        "(torch.nn.utils.prune.remove, remove_weight_norm, remove_spectral_norm)"
    )


def router_names(model: nn.Module) -> set[str]:
    """The names of linear layers that route tokens to experts, or weigh a shared expert.

    They are ``router`` or part of one, by name or class, or a ``gate`` beside experts. A gate of the same
    name that is a projection of an MLP or of attention has no experts beside it.
    """
    modules = dict(model.named_modules())
    return {
        path for path, module in modules.items() if is_linear(module) and _routes(path, modules)
    }


def _routes(path: str, modules: dict[str, nn.Module]) -> bool:
    parts = path.split(".")
    for depth, part in enumerate(parts):
        owner = modules[".".join(parts[:depth])]
        if "router" in part.lower():
            return True
        gate = part == "gate" or (part.endswith("gate") and ("expert" in part or "moe" in part))
        if gate and any("expert" in name for name, _ in owner.named_children()):
            return True
    return "router" in type(modules[path]).__name__.lower()


def is_linear(module: nn.Module) -> bool:
    """True for ``nn.Linear`` and for the ``Conv1D`` of transformers, parametrized or not."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


ADAPTER = "part of an adapter of peft, which stays dense"
"""Why a linear of an adapter is skipped."""


def adapter_parts(model: nn.Module) -> frozenset[int]:
    """Ids of the modules inside adapters of peft (``lora_A``, ``lora_B``), but not the layers they adapt."""
    # By the name of the base class, so that peft need not be imported, nor installed.
    found = set[int]()
    for layer in model.modules():
        if any(kind.__name__ == "BaseTunerLayer" for kind in type(layer).__mro__):
            for name, part in layer.named_children():
                if name != "base_layer":
                    found.update(map(id, part.modules()))
    return frozenset(found)


def is_conv1d(module: nn.Module) -> bool:
    """True for the ``Conv1D`` of transformers, a linear layer that stores its weight transposed."""
    # By the name of its class, or of the base that a parametrization gives it, and by its shape, so that
    # transformers need not be imported, nor installed.
    return (
        any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)
        and isinstance(getattr(module, "nf", None), int)
        and getattr(module._parameters.get("weight"), "ndim", 2) == 2
    )
