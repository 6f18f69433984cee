"""Linears that write into the residual stream, and how far that stream has drifted from the dense model's.

In a pruned model the residual stream that a block adds to differs from the dense model's. A linear that
writes into it can correct part of that drift: its outputs f are fitted to those of the dense model plus a
share of ``r0 - r``, the residual stream before it in the dense and in the pruned model. Since what follows
normalises the stream, each token counts by the inverse square of its size in the pruned model; otherwise a
few huge tokens would outweigh the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from s3tensor.llm.calibrate import BlockRunner, Chunk
from s3tensor.llm.moments import Moments, token_weights, update
from s3tensor.model.weights import ModelWeight
from s3tensor.prune.hessian import Hessian
from s3tensor.prune.linalg import full_precision

_ALIKE = (
    0.25  # of a linear's output, in the median token; what is not added to the stream differs by 1
)


def writers(
    runner: BlockRunner, chunk: Chunk, groups: Sequence[Sequence[ModelWeight]]
) -> list[int]:
    """Indices, in order of call, of the groups of one linear whose output the block adds to its stream.

    Found by ablation: with the linear and the writers after it set to zero, the block's output lacks exactly
    what the linear gave. A norm after a linear, as in Gemma 2, hides it.
    """
    found: list[int] = []
    out = runner.output(chunk)
    for index in reversed(range(len(groups))):
        if len(groups[index]) > 1 or groups[index][0].shape[0] != out.shape[-1]:
            continue
        rest, gave = _without(runner, chunk, [groups[i][0] for i in (index, *found)])
        if gave is None or gave.shape != out.shape:
            continue
        lacks = (out.float() - rest.float() - gave.float()).norm(dim=-1)
        if bool((lacks <= _ALIKE * gave.float().norm(dim=-1)).float().mean() > 0.5):
            found.insert(0, index)
            out = rest
    return found


def _without(
    runner: BlockRunner, chunk: Chunk, layers: Sequence[ModelWeight]
) -> tuple[Tensor, Tensor | None]:
    """The block's output with these linears set to zero, and what the first of them gave.

    The latter is None for a linear that does not see every token.
    """
    inputs: dict[int, Tensor | None] = {}
    outputs: dict[int, Tensor] = {}

    def zeros(index: int, out: Tensor) -> Tensor:
        return torch.zeros_like(outputs.setdefault(index, out))

    rest = runner.output(chunk, [layer.module for layer in layers], inputs.setdefault, zeros)
    return rest, None if inputs.get(0) is None else outputs[0]


def _added(
    runner: BlockRunner, chunk: Chunk, modules: Sequence[nn.Module]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The block's output, the input of the first of these linears, and what all give, summed in float32.

    None where one of them does not see every token.
    """
    inputs: dict[int, Tensor | None] = {}
    outputs: list[Tensor] = []
    out = runner.output(chunk, modules, inputs.setdefault, lambda _, y: outputs.append(y.float()))
    first = inputs.get(0)
    if first is None or any(inputs.get(index) is None for index in range(len(modules))):
        return None
    return out, first, torch.stack(outputs).sum(0)


def writer_moments(
    runner: BlockRunner,
    pruned: Sequence[Chunk],
    dense: Sequence[Chunk],  # past the block
    layers: Sequence[ModelWeight],  # a writer and those that write after it, all still dense
    inputs: Sequence[Sequence[Tensor]],  # theirs in the dense model, for each chunk
) -> Moments | None:
    """Of a writer, over weighted tokens: the moments of its inputs, and the drift ``E'X / N`` (M, K).

    None when it or a later one no longer sees every token.

    Raises:
        NonFiniteError: NaN or Inf in an input, by name of the linear.
    """
    modules = [layer.module for layer in layers]
    hessian = Hessian(layers[0].shape[1], device=runner.device)
    drift = torch.zeros(layers[0].shape, device=runner.device)
    for index, (chunk, after) in enumerate(zip(pruned, dense, strict=True)):
        added = _added(runner, chunk, modules)
        if added is None:
            return None
        out, given, gave = added
        weights = token_weights(out)
        dense_inputs = [x[index].to(runner.device) for x in inputs]
        update(hessian, layers[0], given, dense_inputs[0], weights)
        residual = out.float() - gave.view_as(out)
        apart = after.hidden.to(runner.device).float() - residual
        for module, x in zip(modules, dense_inputs, strict=True):
            with torch.no_grad():
                apart -= module(x).float().view_as(apart)
        apart = apart.flatten(0, -2) * weights[:, None]
        with full_precision():
            drift.addmm_(apart.T, given.float().flatten(0, -2))
    return Moments(hessian, drift / hessian.weight)
