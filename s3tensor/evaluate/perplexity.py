"""Perplexity of a causal language model."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s3tensor.errors import CalibrationError, ModelError, NonFiniteError
from s3tensor.modes import neutral
from s3tensor.text.text import check_tokens


@neutral()
def perplexity(
    model: nn.Module,
    token_ids: Tensor,
    seq_len: int = 1024,
    batch: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """exp of the mean negative log-likelihood of a token, over non-overlapping windows.

    The first token of a window is not predicted. A last window of fewer than ``seq_len`` tokens counts
    when it has at least two.

    Args:
        model: called as ``model(input_ids=..., use_cache=False)``; returns ``.logits`` or a tuple that
            starts with them, (batch, tokens, vocabulary).
        token_ids: (tokens,) or (sequences, tokens) int64; sequences are joined.
        seq_len: tokens in a window.
        batch: windows in one forward pass.
        progress: called with (windows done, windows).

    Raises:
        CalibrationError: fewer than two tokens, a window of fewer than two or of more than the model
            has positions, or ids beyond the vocabulary.
        ModelError: a model that does not predict the next token.
        NonFiniteError: the model gives NaN or Inf.
    """
    ids = token_ids.flatten()
    if ids.is_floating_point() or ids.numel() < 2 or seq_len < 2 or batch < 1:
        raise CalibrationError(
            f"perplexity needs at least 2 integer token ids, seq_len >= 2 and batch >= 1; got {ids.numel()} "
            f"{ids.dtype} ids, seq_len={seq_len}, batch={batch}"
        )
    check_predicts(model)
    check_tokens(model, ids, min(seq_len, ids.numel()))
    device = next(model.parameters()).device
    full = ids.numel() // seq_len
    pieces = list(ids[: full * seq_len].reshape(full, seq_len).split(batch)) if full else []
    if ids.numel() - full * seq_len >= 2:
        pieces.append(ids[full * seq_len :][None])
    was_training = model.training
    model.eval()
    total, count, done = 0.0, 0, 0
    windows = sum(len(piece) for piece in pieces)
    try:
        for piece in pieces:
            piece = piece.to(device, torch.int64)
            logits = next_token_logits(model, piece)
            # One row at a time bounds the memory of the float32 copy.
            for row, target in zip(logits, piece, strict=True):
                total += float(F.cross_entropy(row[:-1].float(), target[1:], reduction="sum"))
            count += piece.numel() - len(piece)
            done += len(piece)
            if progress is not None:
                progress(done, windows)
    finally:
        model.train(was_training)
    if not math.isfinite(total):
        raise NonFiniteError("the model's logits hold NaN or Inf; check its weights and its dtype")
    return math.exp(min(total / count, 700.0))


def check_predicts(model: nn.Module) -> None:
    """Refuse a model of transformers that does not predict the next token: an encoder, a classifier.

    Raises:
        ModelError: by name of its class.
    """
    generates = getattr(model, "can_generate", None)
    if generates is None or not type(model).__module__.startswith("transformers."):
        return  # its author knows
    if not generates() or getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} does not predict the next token from those before it, of which "
            "perplexity is made; measure it on its own task"
        )


def next_token_logits(
    model: nn.Module,
    ids: Tensor,  # (batch, tokens) int64
) -> Tensor:  # (batch, tokens, vocabulary)
    """The logits of a causal language model, which may return a tuple that starts with them."""
    given = model(input_ids=ids, use_cache=False)
    logits: Tensor = given[0] if isinstance(given, tuple) else given.logits
    return logits
