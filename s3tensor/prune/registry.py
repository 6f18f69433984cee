"""Pruners by name, for ``prune_model`` and the command line."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from s3tensor.errors import PrunerError
from s3tensor.modes import neutral
from s3tensor.prune.problem import Pruned

_Pruner = TypeVar("_Pruner", bound=Callable[..., Pruned])

PRUNERS: dict[str, Callable[..., Pruned]] = {}

NEEDS_HESSIAN: set[str] = set()
"""Names of the pruners for which ``hessian=None`` is an error."""

ROW_WISE: set[str] = set()
"""Names of the pruners that prune rows without a common scope independently, except for rounding.

Weights of the same inputs may then be stacked along dim 0 and pruned as one.
"""


def register(*, needs_hessian: bool = True, row_wise: bool = True) -> Callable[[_Pruner], _Pruner]:
    """Register the decorated pruner under its own name; it runs in :func:`s3tensor.modes.neutral`.

    Args:
        needs_hessian: whether ``hessian=None`` is an error.
        row_wise: whether rows that share no scope are pruned independently of each other.
    """

    def add(pruner: _Pruner) -> _Pruner:
        name = pruner.__name__
        pruner = neutral()(pruner)
        PRUNERS[name] = pruner
        for names, belongs in ((NEEDS_HESSIAN, needs_hessian), (ROW_WISE, row_wise)):
            (names.add if belongs else names.discard)(name)
        return pruner

    return add


def get(name: str) -> Callable[..., Pruned]:
    """The pruner of a name in ``PRUNERS``.

    Raises:
        PrunerError: an unknown name; the message lists the names.
    """
    if name not in PRUNERS:
        raise PrunerError(f"unknown pruner {name!r}; use one of {', '.join(PRUNERS)}")
    return PRUNERS[name]
