"""torch.compile with a count of its compilations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.testing import CompileCounterWithBackend


def compiled(
    function: Any, backend: str = "aot_eager", **options: Any
) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    """The function compiled whole, and the counter of its compilations."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter, **options), counter
