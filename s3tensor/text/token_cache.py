"""A cache on disk of the tokens of large texts."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from s3tensor.errors import CheckpointError
from s3tensor.files import cache_folder, write_atomically

_FORMAT = "1"  # of the files and of tokenization; another value misses the cache


def cached(
    key: str,
    tokenizer: Any,
    make: Callable[[], Tensor],  # (tokens,) int64
) -> Tensor:
    """The tokens of ``make``, from disk if the same tokenizer made them under the same key before.

    A damaged file is made again; a folder that cannot be written only costs time.

    Args:
        key: identifies the text: the text itself, or its name and settings.
        tokenizer: a fast tokenizer of transformers; the tokens of others, which have no identity, are not
            cached.
        make: tokenizes.
    """
    path = token_file(key, tokenizer)
    if path is None:
        return make()
    with contextlib.suppress(OSError, SafetensorError, KeyError):  # missing or damaged
        tokens = load_file(path)["tokens"]
        if tokens.dtype == torch.int32 and tokens.ndim == 1:
            return tokens.long()
    made = make()
    if made.numel():
        with contextlib.suppress(CheckpointError):
            write_atomically(path, lambda to: save_file({"tokens": made.to(torch.int32)}, to))
    return made


def token_file(key: str, tokenizer: Any) -> Path | None:
    """Path of the cached tokens; None for a tokenizer without an identity."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "to_str"):
        return None
    digest = hashlib.sha256()
    for part in (_FORMAT, type(tokenizer).__name__, backend.to_str(), key):
        digest.update(part.encode("utf-8", "surrogatepass"))
        digest.update(b"\0")
    return cache_folder() / "tokens" / f"{digest.hexdigest()[:40]}.safetensors"
