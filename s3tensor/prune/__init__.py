"""Pruners: functional transforms ``(weight, hessian, pattern, **options) -> Pruned(weight, mask)``.

None of them changes its arguments, and each gives the same result on every run. ``hessian`` is ``X'X / N``
(K, K) of the layer's inputs, or a :class:`s3tensor.prune.hessian.Factors` made from it, which
linears of the same input share.
"""

from __future__ import annotations

from collections.abc import Callable

from s3tensor.errors import PrunerError
from s3tensor.prune.admm import admm, refit
from s3tensor.prune.obs import obs
from s3tensor.prune.problem import MEMORY_BUDGET, Pruned
from s3tensor.prune.scores import magnitude, obd, wanda
from s3tensor.prune.sparsegpt import sparsegpt

PRUNERS: dict[str, Callable[..., Pruned]] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "obd": obd,
    "sparsegpt": sparsegpt,
    "obs": obs,
    "admm": admm,
}

NEEDS_HESSIAN = frozenset(PRUNERS) - {"magnitude"}
"""Names of the pruners for which ``hessian=None`` is an error."""

ROW_WISE = frozenset(PRUNERS)
"""Names of the pruners for which rows that share no scope do not matter to each other, but by rounding.

Weights of the same inputs may then be pruned one above the other, as one.
"""


def get(name: str) -> Callable[..., Pruned]:
    """The pruner of a name in ``PRUNERS``.

    Raises:
        PrunerError: an unknown name; the message lists the names.
    """
    if name not in PRUNERS:
        raise PrunerError(f"unknown pruner {name!r}; use one of {', '.join(PRUNERS)}")
    return PRUNERS[name]


__all__ = [
    "MEMORY_BUDGET",
    "NEEDS_HESSIAN",
    "PRUNERS",
    "ROW_WISE",
    "Pruned",
    "admm",
    "get",
    "magnitude",
    "obd",
    "obs",
    "refit",
    "sparsegpt",
    "wanda",
]
