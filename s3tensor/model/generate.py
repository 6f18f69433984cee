"""How transformers' ``generate`` compiles a compressed model: with the options that serve it best."""

from __future__ import annotations

import sys

import torch
from torch import nn

from s3tensor.tensor.inductor import inductor_options


def prefer_grouped_linears(model: nn.Module) -> None:
    """Let ``generate`` compile the model's step with :func:`s3tensor.inductor_options`.

    With a static cache transformers compiles by itself, by ``generation_config.compile_config``. That of the
    user stays; it is never saved. Nothing happens without a GPU, or for a model that does not generate.
    """
    config = getattr(model, "generation_config", None)
    transformers = sys.modules.get("transformers")
    if config is None or transformers is None or not torch.cuda.is_available():
        return
    if getattr(config, "compile_config", None) is None:
        config.compile_config = transformers.CompileConfig(mode=None, options=inductor_options())
