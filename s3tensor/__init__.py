"""Structured sparsity for PyTorch: prune weights to a pattern, store them compressed, run and train them.

Start with :class:`Pattern`, the pruners in :mod:`s3tensor.prune`, :class:`StructuredSparseTensor`,
:class:`S3Sparse` for training, and :func:`s3tensor.llm.prune_model` for whole models.
:mod:`s3tensor.paper` has the vocabulary of the S3 paper.
"""

from __future__ import annotations

import importlib as _importlib
import typing as _typing

from s3tensor import moved as _moved
from s3tensor.errors import (
    CalibrationError,
    CheckpointError,
    HessianError,
    ModelError,
    NonFiniteError,
    OptionError,
    PatternError,
    PrunerError,
    S3Error,
    UnsupportedOpError,
)
from s3tensor.io.registration import watch as _watch
from s3tensor.pattern import (
    BoundPattern,
    Layout,
    Pattern,
    coalesce,
    complement,
    composition,
    right_inverse,
)
from s3tensor.version import __version__

if _typing.TYPE_CHECKING:
    from s3tensor import llm, paper, prune
    from s3tensor.draw import draw_layout
    from s3tensor.evaluate.harness import evaluate_tasks
    from s3tensor.evaluate.perplexity import perplexity
    from s3tensor.io.pretrained import from_pretrained, load_model, save_pretrained, verify
    from s3tensor.llm.calibrate import ModuleInputCatcher, transfer_to_device
    from s3tensor.mask.order_statistics import kth_largest, mid_kth_largest
    from s3tensor.mask.projection import project, satisfies
    from s3tensor.mask.transposable import transposable
    from s3tensor.model.compact import compact
    from s3tensor.model.memory import set_memory_
    from s3tensor.model.quantize import quantize_
    from s3tensor.model.sparsify import sparsify_
    from s3tensor.paper import (
        BlockCoupling,
        BlockSpec,
        ScopeCoupling,
        ScopeSpec,
        SparsityBuilder,
        StructuredOBS,
        View,
    )
    from s3tensor.prune.hessian import Factors, Hessian, compute_hessian, output_error
    from s3tensor.tensor.inductor import compile_config, inductor_options
    from s3tensor.tensor.int8 import Int8SparseTensor
    from s3tensor.tensor.sparse import StructuredSparseTensor
    from s3tensor.text.text import get_c4
    from s3tensor.train.distillation import distillation_loss
    from s3tensor.train.finalize import finalize
    from s3tensor.train.lora import lora_config
    from s3tensor.train.model import freeze, sparsify_training_, step
    from s3tensor.train.s3_sparse import S3Sparse
    from s3tensor.train.schedule import Density
    from s3tensor.train.sparse_cores import sparse_cores_

# The module of each name, imported on first use: patterns and layouts need no torch, and only the
# functions that need them import transformers, pandas or matplotlib.
_LAZY = {
    name: module
    for module, names in {
        "s3tensor": "llm paper prune",
        "s3tensor.draw": "draw_layout",
        "s3tensor.evaluate.harness": "evaluate_tasks",
        "s3tensor.evaluate.perplexity": "perplexity",
        "s3tensor.io.pretrained": "from_pretrained load_model save_pretrained verify",
        "s3tensor.llm.calibrate": "ModuleInputCatcher transfer_to_device",
        "s3tensor.mask.order_statistics": "kth_largest mid_kth_largest",
        "s3tensor.mask.projection": "project satisfies",
        "s3tensor.mask.transposable": "transposable",
        "s3tensor.model.compact": "compact",
        "s3tensor.model.memory": "set_memory_",
        "s3tensor.model.quantize": "quantize_",
        "s3tensor.model.sparsify": "sparsify_",
        "s3tensor.paper": (
            "BlockCoupling BlockSpec ScopeCoupling ScopeSpec SparsityBuilder StructuredOBS View"
        ),
        "s3tensor.prune.hessian": "Factors Hessian compute_hessian output_error",
        "s3tensor.tensor.inductor": "compile_config inductor_options",
        "s3tensor.tensor.int8": "Int8SparseTensor",
        "s3tensor.tensor.sparse": "StructuredSparseTensor",
        "s3tensor.text.text": "get_c4",
        "s3tensor.train.distillation": "distillation_loss",
        "s3tensor.train.finalize": "finalize",
        "s3tensor.train.lora": "lora_config",
        "s3tensor.train.model": "freeze sparsify_training_ step",
        "s3tensor.train.s3_sparse": "S3Sparse",
        "s3tensor.train.schedule": "Density",
        "s3tensor.train.sparse_cores": "sparse_cores_",
    }.items()
    for name in names.split()
}

__all__ = [
    "BlockCoupling",
    "BlockSpec",
    "BoundPattern",
    "CalibrationError",
    "CheckpointError",
    "Density",
    "Factors",
    "Hessian",
    "HessianError",
    "Int8SparseTensor",
    "Layout",
    "ModelError",
    "ModuleInputCatcher",
    "NonFiniteError",
    "OptionError",
    "Pattern",
    "PatternError",
    "PrunerError",
    "S3Error",
    "S3Sparse",
    "ScopeCoupling",
    "ScopeSpec",
    "SparsityBuilder",
    "StructuredOBS",
    "StructuredSparseTensor",
    "UnsupportedOpError",
    "View",
    "__version__",
    "coalesce",
    "compact",
    "compile_config",
    "complement",
    "composition",
    "compute_hessian",
    "distillation_loss",
    "draw_layout",
    "evaluate_tasks",
    "finalize",
    "freeze",
    "from_pretrained",
    "get_c4",
    "inductor_options",
    "kth_largest",
    "llm",
    "load_model",
    "lora_config",
    "mid_kth_largest",
    "output_error",
    "paper",
    "perplexity",
    "project",
    "prune",
    "quantize_",
    "right_inverse",
    "satisfies",
    "save_pretrained",
    "set_memory_",
    "sparse_cores_",
    "sparsify_",
    "sparsify_training_",
    "step",
    "transfer_to_device",
    "transposable",
    "verify",
]


def __getattr__(name: str) -> _typing.Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _LAZY[name]
    if module == __name__:
        value: _typing.Any = _importlib.import_module(f"{module}.{name}")
    else:
        value = getattr(_importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)


_moved.watch()  # stored files name modules by the names of their time
_watch()  # AutoModelForCausalLM.from_pretrained loads compressed models
