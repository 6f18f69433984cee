"""Linears that write into the residual stream, and how far that stream has drifted from the dense model's.

In a pruned model the residual stream that a block adds to is no longer the dense model's. A linear that
writes into it can take part of that drift back: its outputs f are fitted to those of the dense model plus a
share of ``r0 - r``, the residual stream before it in the dense and in the pruned model. How dear an error
is depends on the token: what follows normalises the stream, so that a token counts by the inverse square
of its size in the pruned model, and a few huge ones do not outweigh the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from s3tensor.errors import NonFiniteError
from s3tensor.llm.calibrate import BlockRunner, Chunk
from s3tensor.llm.moments import Moments, token_weights
from s3tensor.llm.structure import LinearLayer
from s3tensor.prune.hessian import Hessian
from s3tensor.prune.linalg import full_precision

_ALIKE = 0.25  # of what a linear gives, in the median token; what is not added to the stream differs by 1


def writers(
    runner: BlockRunner, chunk: Chunk, groups: Sequence[Sequence[LinearLayer]]
) -> list[int]:
    """The groups, by index and in order of call, of one linear whose outputs the block adds to its stream.

    Seen by leaving it out: the block's output then lacks just what the linear gave, those that write after
    it left out too. Norms after a linear, as in Gemma 2, hide it.
    """
    found: list[int] = []
    out = runner.output(chunk)
    for index in reversed(range(len(groups))):
        layers = [groups[index][0].module, *(groups[later][0].module for later in found)]
        if len(groups[index]) > 1 or groups[index][0].shape[0] != out.shape[-1]:
            continue
        rest, gave = runner.without(chunk, layers)
        if gave is None or gave.shape != out.shape:
            continue
        lacks = (out.float() - rest.float() - gave.float()).norm(dim=-1)
        if bool((lacks <= _ALIKE * gave.float().norm(dim=-1)).float().mean() > 0.5):
            found.insert(0, index)
            out = rest
    return found


def writer_moments(
    runner: BlockRunner,
    pruned: Sequence[Chunk],
    dense: Sequence[Chunk],  # past the block
    layers: Sequence[LinearLayer],  # a writer and those that write after it, all still dense
    inputs: Sequence[Sequence[Tensor]],  # theirs in the dense model, for each chunk
) -> Moments | None:
    """Of a writer, over tokens by their weights: the moments of its inputs, and the drift ``E'X / N`` (M, K).

    None when it no longer sees every token.
    """
    modules = [layer.module for layer in layers]
    hessian = Hessian(layers[0].shape[1], device=runner.device)
    drift = torch.zeros(layers[0].shape, device=runner.device)
    for index, (chunk, after) in enumerate(zip(pruned, dense, strict=True)):
        out, given, gave = runner.added(chunk, modules)
        if given is None or gave is None:
            return None
        weights = token_weights(out)
        dense_inputs = [x[index].to(runner.device) for x in inputs]
        try:
            hessian.update(given, dense_inputs[0], weights)
        except NonFiniteError as error:
            raise NonFiniteError(f"{layers[0].name}: {error}") from None
        apart = after.hidden.to(runner.device).float() - (out.float() - gave.view_as(out))
        for module, x in zip(modules, dense_inputs, strict=True):
            with torch.no_grad():
                apart -= module(x).float().view_as(apart)
        apart = apart.flatten(0, -2) * weights[:, None]
        with full_precision():
            drift.addmm_(apart.T, given.float().flatten(0, -2))
    return Moments(hessian, drift / hessian.weight)
