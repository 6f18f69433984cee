"""Second moments of the inputs of linears in a block, over calibration or held-out tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from s3tensor.errors import NonFiniteError
from s3tensor.llm.calibrate import BlockRunner, Chunk
from s3tensor.model.weights import ModelWeight
from s3tensor.prune.hessian import Hessian


class Moments(NamedTuple):
    """What a fit of the linears of one input needs to know of some tokens."""

    hessian: Hessian  # of the inputs in the pruned stream, and against those of the dense one
    drift: Tensor | None = None  # (M, K), of a linear that writes into the residual stream


def input_moments(
    runner: BlockRunner,
    chunks: Sequence[Chunk],
    group: Sequence[ModelWeight],  # linears of one input
    targets: Sequence[Tensor] | None = None,  # for each chunk the input in the dense model
    weigh: bool = False,
) -> Moments | None:
    """Moments over all tokens, alike or weighted by :func:`token_weights` of the block's output.

    None when the group no longer sees every token, because what was pruned before routes them elsewhere.

    Raises:
        NonFiniteError: NaN or Inf in an input, by name of the linear.
    """
    hessian = Hessian(group[0].shape[1], device=runner.device)
    for index, chunk in enumerate(chunks):
        weights = None
        if weigh:
            inputs: dict[int, Tensor | None] = {}
            weights = token_weights(runner.output(chunk, [group[0].module], inputs.setdefault))
            given = inputs.get(0)
        else:
            given = runner.layer_input(chunk, group[0].module)
        if given is None:
            return None
        dense = None if targets is None else targets[index].to(runner.device)
        update(hessian, group[0], given, dense, weights)
    return Moments(hessian)


def update(
    hessian: Hessian,
    layer: ModelWeight,
    inputs: Tensor,
    dense: Tensor | None,
    weights: Tensor | None,
) -> None:
    """Add tokens to the Hessian of a linear.

    Raises:
        NonFiniteError: NaN or Inf among them, by name of the linear.
    """
    try:
        hessian.update(inputs, dense, weights)
    except NonFiniteError as error:
        raise NonFiniteError(f"{layer.name}: {error}") from None


def token_weights(hidden: Tensor) -> Tensor:  # (batch, tokens, hidden) -> (batch x tokens,)
    """The inverse mean square of each token's hidden state, float32; for one of zeros, the mean token's."""
    sizes = hidden.float().square().mean(-1).flatten()
    mean = sizes.mean()
    if not mean > 0:
        return torch.ones_like(sizes)
    return 1 / torch.where(sizes > 0, sizes, mean)


def merged(splits: Sequence[Moments]) -> Moments:
    """The moments over the tokens of all splits, added into the first one's Hessian."""
    whole = splits[0].hessian
    tokens = [split.hessian.weight for split in splits]
    for split in splits[1:]:
        whole.merge(split.hessian)
    drift = None
    for split, weight in zip(splits, tokens, strict=True):
        if split.drift is not None:
            part = split.drift * (weight / whole.weight)
            drift = part if drift is None else drift + part
    return Moments(whole, drift)
