"""Compare models: size, sparsity, perplexity, and agreement of their predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s3tensor.errors import CalibrationError, NonFiniteError
from s3tensor.evaluate.perplexity import next_token_logits
from s3tensor.io.folder import unshared_state
from s3tensor.io.pretrained import weight_bytes
from s3tensor.modes import neutral
from s3tensor.tensor.base import Compressed
from s3tensor.text.text import check_tokens


@dataclass(frozen=True)
class Side:
    """One model of a comparison; divergence and agreement are against the first model."""

    name: str
    parameters: int
    weight_bytes: int  # in memory, as they are
    sparse_weights: int
    patterns: tuple[str, ...]
    density: float  # share of the sparse weights' values that is stored; 1.0 without any
    perplexity: float
    divergence: float  # mean KL(first model || this one) of the next token, in nats
    agreement: float  # share of positions with the same most likely token


@neutral()
def compare(
    models: Sequence[tuple[str, nn.Module]],
    token_ids: Tensor,  # (windows, tokens) int64
    progress: Callable[[int, int], None] | None = None,
) -> list[Side]:
    """Compare models that share a vocabulary on the same tokens. They may be on different devices.

    Args:
        models: (name, model); the first is the reference.
        token_ids: windows of tokens, (windows, tokens).
        progress: called with (windows done, windows).

    Raises:
        CalibrationError: no models, tokens that are not (windows, 2 or more), ids beyond a vocabulary, or
            vocabularies of different sizes.
        NonFiniteError: NaN or Inf in a model's logits.
    """
    if not models or token_ids.ndim != 2 or token_ids.shape[1] < 2 or not len(token_ids):
        raise CalibrationError(
            f"a comparison needs a model and windows of 2 or more tokens, got {len(models)} models and "
            f"tokens of shape {tuple(token_ids.shape)}"
        )
    for _, model in models:
        check_tokens(model, token_ids.flatten(), token_ids.shape[1])
        model.eval()
    lost, apart, same = ([0.0] * len(models) for _ in range(3))
    for done, window in enumerate(token_ids, 1):
        first: Tensor | None = None
        for place, (name, model) in enumerate(models):
            logs = _log_probabilities(name, model, window)
            target = window[1:].to(logs.device)
            lost[place] -= float(logs[:-1].gather(1, target[:, None]).sum())
            first = logs if first is None else first.to(logs.device)
            if first.shape != logs.shape:
                raise CalibrationError(
                    f"{name} has {logs.shape[1]} tokens in its vocabulary, {models[0][0]} has "
                    f"{first.shape[1]}; only models that share a vocabulary can be compared"
                )
            apart[place] += float((first.exp() * (first - logs)).sum())
            same[place] += float((first.argmax(1) == logs.argmax(1)).sum())
        if progress is not None:
            progress(done, len(token_ids))
    predicted = token_ids.numel() - len(token_ids)
    return [
        _side(
            name,
            model,
            lost[i] / predicted,
            apart[i] / token_ids.numel(),
            same[i] / token_ids.numel(),
        )
        for i, (name, model) in enumerate(models)
    ]


def _log_probabilities(name: str, model: nn.Module, window: Tensor) -> Tensor:
    """Log-probabilities of the next token at each position, (tokens, vocabulary) float32."""
    device = next(model.parameters()).device
    logits = next_token_logits(model, window[None].to(device, torch.int64))
    logs = F.log_softmax(logits[0].float(), -1)
    if not bool(torch.isfinite(logs).all()):
        raise NonFiniteError(f"{name}: logits hold NaN or Inf; check its weights and its dtype")
    return logs


def _side(name: str, model: nn.Module, loss: float, apart: float, same: float) -> Side:
    state = unshared_state(model)
    sparse = [tensor for tensor in state.values() if isinstance(tensor, Compressed)]
    numel = sum(tensor.numel() for tensor in sparse)
    stored = sum(tensor.density * tensor.numel() for tensor in sparse)
    return Side(
        name=name,
        parameters=sum(tensor.numel() for tensor in state.values()),
        weight_bytes=weight_bytes(model)[0],
        sparse_weights=len(sparse),
        patterns=tuple(sorted({str(tensor.pattern) for tensor in sparse})),
        density=stored / numel if numel else 1.0,
        perplexity=math.exp(min(loss, 700.0)),
        divergence=max(apart, 0.0),
        agreement=same,
    )
