"""``CompressedLinear``: an ``nn.Linear`` with a compressed weight, for ``torch.compile``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s3tensor.tensor.base import Compressed
from s3tensor.tensor.frozen import traces


class CompressedLinear(nn.Linear):
    """A linear layer with a compressed weight. What compresses a model puts it in place of ``nn.Linear``.

    Eagerly it is ``F.linear``. Where ``torch.compile`` traces it and nothing trains, the graph takes the
    packed parts of the weight, read anew on each call, and not the weight, which is a tensor subclass that
    each call would take apart. With a dense weight it is ``nn.Linear``.
    """

    def forward(self, input: Tensor) -> Tensor:
        weight: Any = self.weight
        if traces(input, weight):
            out: Tensor = torch.ops.s3tensor.frozen_linear(
                input, weight.packed, weight.indices, weight.scales, self.bias, weight.traced_as
            )
            return out
        return F.linear(input, weight, self.bias)


def put_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Set a parameter of a module; a plain ``nn.Linear`` that gets a compressed weight becomes a
    :class:`CompressedLinear`."""
    setattr(module, name, parameter)
    if type(module) is nn.Linear and name == "weight" and isinstance(parameter, Compressed):
        module.__class__ = CompressedLinear
