"""Pruners: functional transforms ``(weight, hessian, pattern, **options) -> Pruned(weight, mask)``.

None of them changes its arguments, and each gives the same result on every run. ``hessian`` is ``X'X / N``
(K, K) of the layer's inputs, or a :class:`s3tensor.prune.hessian.Factors` made from it, which
linears of the same input share.
"""

# isort: off
# One line for each file of pruners, which register themselves; messages list them in this order.
from s3tensor.prune.scores import magnitude, obd, wanda
from s3tensor.prune.sparsegpt import sparsegpt
from s3tensor.prune.obs import obs
from s3tensor.prune.admm import admm, refit

# isort: on
from s3tensor.prune.problem import MEMORY_BUDGET, Pruned
from s3tensor.prune.registry import NEEDS_HESSIAN, PRUNERS, ROW_WISE, get, register

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
    "register",
    "sparsegpt",
    "wanda",
]
__all__ += [name for name in PRUNERS if name not in __all__]
