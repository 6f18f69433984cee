"""Which modules of a model hold a parameter, so that another one is put in all its places."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn


class Place(NamedTuple):
    """An attribute of a module that is a parameter."""

    path: str  # in the model, such as "blocks.0.up.weight"
    module: nn.Module
    name: str  # in the module


@dataclass(frozen=True)
class Held:
    """A parameter by where a model holds it; it has several places where modules share it.

    The parameter itself is looked up, not kept: replaced in all its places, it goes.
    """

    places: tuple[Place, ...]  # in the model's order, one at least

    @property
    def path(self) -> str:
        """The first place's."""
        return self.places[0].path

    @property
    def parameter(self) -> Any:  # an nn.Parameter, and of a subclass what that is
        _, module, name = self.places[0]
        return getattr(module, name)

    def replace(self, parameter: nn.Parameter) -> None:
        """Put one parameter in all the places, so that what was shared stays shared."""
        for _, module, name in self.places:
            setattr(module, name, parameter)


def parameters_of(
    model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None
) -> list[Held]:
    """The parameters of a model, each once, in its order.

    Args:
        model: a module; its own parameters count too.
        filter_fn: ``filter_fn(module, name)`` is True for the modules to look at. Places in the others are
            left out.
    """
    places: dict[int, list[Place]] = {}
    for path, module in model.named_modules():
        if filter_fn is not None and not filter_fn(module, path):
            continue
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            place = Place(f"{path}.{name}" if path else name, module, name)
            places.setdefault(id(parameter), []).append(place)
    return [Held(tuple(found)) for found in places.values()]
