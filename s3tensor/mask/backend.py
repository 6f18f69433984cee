"""The gate to the kernels: no other module imports ``s3tensor.kernels`` or asks for HIP and Triton.

Every kernel has a slower equivalent in torch. Where :func:`load` returns None, the caller uses that.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import Any

import torch


def is_rocm() -> bool:
    """Whether this torch is built for HIP, which the kernels do not support."""
    return torch.version.hip is not None


@functools.lru_cache(maxsize=64)
def load(name: str, otherwise: str = "") -> Any:
    """The module ``s3tensor.kernels.<name>``, or None on ROCm, without Triton or with one that is too old.

    Args:
        name: a file of ``kernels/``.
        otherwise: what happens without it, for a warning where the import fails; by default none.
    """
    if is_rocm():
        return None
    try:
        return importlib.import_module(f"s3tensor.kernels.{name}")
    except ImportError as error:
        if otherwise:
            reason = str(error)
            if "need Triton" not in reason:
                reason = f"s3tensor's {name} kernels need Triton 3.6 or later ({reason})"
            _warn_once(f"{reason}: {otherwise}")
        return None


def tiles() -> Any:
    """The module ``s3tensor.kernels.tiles``, which needs torch alone and imports everywhere."""
    return importlib.import_module("s3tensor.kernels.tiles")


@functools.lru_cache(maxsize=64)  # once for each message
def _warn_once(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)
