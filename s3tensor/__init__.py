"""s3tensor: structured sparsity for PyTorch, from one Pattern to a pruned, compressed, running model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from s3tensor import presets as _presets  # registers the named patterns
from s3tensor.errors import (
    CalibrationError,
    CheckpointError,
    HessianError,
    ModelError,
    NonFiniteError,
    PatternError,
    PrunerError,
    S3Error,
    UnsupportedOpError,
)
from s3tensor.layout import Layout, coalesce, complement, composition, right_inverse
from s3tensor.pattern import BoundPattern, Pattern
from s3tensor.registration import watch as _watch
from s3tensor.version import __version__ as __version__

if TYPE_CHECKING:
    from s3tensor import llm, prune
    from s3tensor.compaction import compact
    from s3tensor.distillation import distillation_loss
    from s3tensor.evaluate import perplexity
    from s3tensor.finalization import finalize
    from s3tensor.harness import evaluate_tasks
    from s3tensor.hessian import Factors, Hessian, compute_hessian, output_error
    from s3tensor.hf import from_pretrained, load_model, save_pretrained, verify
    from s3tensor.inductor import inductor_options
    from s3tensor.int8 import Int8SparseTensor
    from s3tensor.llm.calibrate import ModuleInputCatcher, transfer_to_device
    from s3tensor.llm.text import get_c4
    from s3tensor.lora import lora_config
    from s3tensor.mask import project, satisfies
    from s3tensor.memory import set_memory_
    from s3tensor.parametrize import S3Sparse
    from s3tensor.prune.structured import StructuredOBS
    from s3tensor.quantize import quantize_
    from s3tensor.schedule import Density
    from s3tensor.selection import kth_largest, mid_kth_largest
    from s3tensor.sparse_training import sparse_cores_
    from s3tensor.sparsify import sparsify_
    from s3tensor.specs import (
        BlockCoupling,
        BlockSpec,
        ScopeCoupling,
        ScopeSpec,
        SparsityBuilder,
        View,
    )
    from s3tensor.tensor import StructuredSparseTensor
    from s3tensor.training import freeze, sparsify_training_, step
    from s3tensor.transposing import transposable
    from s3tensor.viz import draw_layout

# Loaded when first used, so that patterns and layouts cost no import of torch, and nothing but the
# functions that need it imports transformers, pandas or matplotlib.
_LAZY = {
    "llm": "s3tensor.llm",
    "prune": "s3tensor.prune",
    "compact": "s3tensor.compaction",
    "distillation_loss": "s3tensor.distillation",
    "perplexity": "s3tensor.evaluate",
    "evaluate_tasks": "s3tensor.harness",
    "Factors": "s3tensor.hessian",
    "Hessian": "s3tensor.hessian",
    "compute_hessian": "s3tensor.hessian",
    "output_error": "s3tensor.hessian",
    "from_pretrained": "s3tensor.hf",
    "load_model": "s3tensor.hf",
    "save_pretrained": "s3tensor.hf",
    "verify": "s3tensor.hf",
    "ModuleInputCatcher": "s3tensor.llm.calibrate",
    "get_c4": "s3tensor.llm.text",
    "transfer_to_device": "s3tensor.llm.calibrate",
    "project": "s3tensor.mask",
    "satisfies": "s3tensor.mask",
    "inductor_options": "s3tensor.inductor",
    "Int8SparseTensor": "s3tensor.int8",
    "quantize_": "s3tensor.quantize",
    "lora_config": "s3tensor.lora",
    "set_memory_": "s3tensor.memory",
    "S3Sparse": "s3tensor.parametrize",
    "finalize": "s3tensor.finalization",
    "sparse_cores_": "s3tensor.sparse_training",
    "sparsify_": "s3tensor.sparsify",
    "Density": "s3tensor.schedule",
    "freeze": "s3tensor.training",
    "sparsify_training_": "s3tensor.training",
    "step": "s3tensor.training",
    "transposable": "s3tensor.transposing",
    "StructuredOBS": "s3tensor.prune.structured",
    "kth_largest": "s3tensor.selection",
    "mid_kth_largest": "s3tensor.selection",
    "BlockCoupling": "s3tensor.specs",
    "BlockSpec": "s3tensor.specs",
    "ScopeCoupling": "s3tensor.specs",
    "ScopeSpec": "s3tensor.specs",
    "SparsityBuilder": "s3tensor.specs",
    "View": "s3tensor.specs",
    "StructuredSparseTensor": "s3tensor.tensor",
    "draw_layout": "s3tensor.viz",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    value = module if module.__name__ == f"s3tensor.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


_watch()  # AutoModelForCausalLM.from_pretrained loads compressed models
