"""Tokens of large texts, kept on the disk from one run to the next."""

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

_FORMAT = "1"  # of what is kept and of how text becomes tokens; another one finds nothing


def cached(
    key: str,
    tokenizer: Any,
    make: Callable[[], Tensor],  # (tokens,) int64
) -> Tensor:
    """What ``make`` gives, from the disk when the same tokenizer has made it under the same key before.

    A file that is damaged is made anew; a folder that cannot be written costs the next run its time and
    nothing else.

    Args:
        key: tells this text from any other: the text itself, or its name and settings.
        tokenizer: a fast tokenizer of transformers; others, which cannot be told apart, keep nothing.
        make: tokenizes.
    """
    path = token_file(key, tokenizer)
    if path is None:
        return make()
    with contextlib.suppress(OSError, SafetensorError, KeyError):  # not there, or damaged
        tokens = load_file(path)["tokens"]
        if tokens.dtype == torch.int32 and tokens.ndim == 1:
            return tokens.long()
    made = make()
    if made.numel():
        with contextlib.suppress(CheckpointError):
            write_atomically(path, lambda to: save_file({"tokens": made.to(torch.int32)}, to))
    return made


def token_file(key: str, tokenizer: Any) -> Path | None:
    """Where the tokens lie; None for a tokenizer that cannot tell what it is."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "to_str"):
        return None
    digest = hashlib.sha256()
    for part in (_FORMAT, type(tokenizer).__name__, backend.to_str(), key):
        digest.update(part.encode("utf-8", "surrogatepass"))
        digest.update(b"\0")
    return cache_folder() / "tokens" / f"{digest.hexdigest()[:40]}.safetensors"
