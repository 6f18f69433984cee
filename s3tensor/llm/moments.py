"""Second moments of the inputs of linears in a block, over calibration or held-out tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from s3tensor.errors import NonFiniteError
from s3tensor.llm.calibrate import BlockRunner, Chunk
from s3tensor.llm.structure import LinearLayer
from s3tensor.prune.hessian import Hessian


class Moments(NamedTuple):
    """What some tokens tell of the linears of one input."""

    hessian: Hessian  # of the inputs in the pruned stream, and against those of the dense one
    drift: Tensor | None = None  # (M, K), of a linear that writes into the residual stream


def input_moments(
    runner: BlockRunner,
    chunks: Sequence[Chunk],
    group: Sequence[LinearLayer],  # linears of one input
    targets: Sequence[Tensor] | None = None,  # for each chunk the input in the dense model
    weigh: bool = False,
) -> Moments | None:
    """Moments over all tokens alike, or over tokens by :func:`token_weights` of what the block gives.

    None when the group no longer sees every token, because what was pruned before it routes otherwise.

    Raises:
        NonFiniteError: NaN or Inf in an input, by name of the linear.
    """
    hessian = Hessian(group[0].shape[1], device=runner.device)
    for index, chunk in enumerate(chunks):
        weights = None
        if weigh:
            out, given, _ = runner.added(chunk, [group[0].module])
            weights = token_weights(out)
        else:
            given = runner.layer_input(chunk, group[0].module)
        if given is None:
            return None
        dense = None if targets is None else targets[index].to(runner.device)
        try:
            hessian.update(given, dense, weights)
        except NonFiniteError as error:
            raise NonFiniteError(f"{group[0].name}: {error}") from None
    return Moments(hessian)


def token_weights(hidden: Tensor) -> Tensor:  # (batch, tokens, hidden) -> (batch x tokens,)
    """The inverse mean square of each token's hidden state, float32; of zeros, that of the mean token."""
    sizes = hidden.float().square().mean(-1).flatten()
    mean = sizes.mean()
    if not mean > 0:
        return torch.ones_like(sizes)
    return 1 / torch.where(sizes > 0, sizes, mean)


def merged(parts: Sequence[Moments]) -> Moments:
    """The moments over the tokens of all parts; the first part's Hessian takes up the others."""
    whole = parts[0].hessian
    tokens = [part.hessian.weight for part in parts]
    for part in parts[1:]:
        whole.merge(part.hessian)
    drift = None
    for part, weight in zip(parts, tokens, strict=True):
        if part.drift is not None:
            share = part.drift * (weight / whole.weight)
            drift = share if drift is None else drift + share
    return Moments(whole, drift)
