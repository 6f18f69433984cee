"""``finalize``: after training, weights under S3Sparse become compressed parameters."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from s3tensor.errors import ModelError
from s3tensor.modes import neutral
from s3tensor.tensor.base import Compressed
from s3tensor.tensor.sparse import StructuredSparseTensor
from s3tensor.train.parametrized import (
    TrainedWeight,
    check_masks_not_shared,
    name_in_errors,
    trained_weights,
)
from s3tensor.train.sparse_cores import restore_forward


def finalize(module: nn.Module, compress: bool = True) -> nn.Module:
    """Replace every weight under :class:`S3Sparse` by a compressed parameter, in place.

    Each parametrization is removed, and the weight of the last forward stays, value for value, as a
    ``StructuredSparseTensor`` parameter without gradient. Weights that shared a dense original share the
    compressed one. What has no compressed product stays dense, with zeros in it: convolutions, embeddings,
    recurrent layers, the joint projection of ``nn.MultiheadAttention``, and in a coupling biases and weights
    whose share of a scope's budget is not fixed. Optimizers still hold the dense originals: drop them.

    Args:
        module: a module; its submodules count too.
        compress: False leaves plain dense parameters, with zeros in them, which still train.

    Returns:
        ``module``.

    Raises:
        ModelError: no ``S3Sparse`` and no compressed weight (with compressed weights only, as after an
            earlier call, nothing is done); or a density schedule that has not ended, or sharded weights.
            Nothing is changed then.
        PatternError: an ``S3Sparse`` under another parametrization, so that the weight that the module
            uses need not satisfy the pattern. Nothing is changed then.
        NonFiniteError: NaN or Inf in a weight, by name. Nothing is changed then.
    """
    found = list(trained_weights(module))
    if not found:
        if any(isinstance(p, Compressed) for p in module.parameters()):
            return module
        raise ModelError(
            f"{type(module).__name__} has no S3Sparse parametrization to finalize; register one with "
            "torch.nn.utils.parametrize.register_parametrization, or compress with s3tensor.sparsify_"
        )
    for weight in found:
        _check_trained(weight)
    check_masks_not_shared(found)
    made: dict[int, list[nn.Parameter]] = {}  # by the identity of the dense original
    with neutral():
        ready = [(weight, _final(weight, compress, made)) for weight in found]
        for weight, parameter in ready:
            owner, name = weight.module, weight.attribute
            restore_forward(owner)
            _own_class(owner)
            several = len(weight.originals) > 1  # then torch can only leave the parametrized value
            parametrize.remove_parametrizations(owner, name, leave_parametrized=several)
            weight.replace(parameter)
    return module


def _final(
    weight: TrainedWeight, compress: bool, made: dict[int, list[nn.Parameter]]
) -> nn.Parameter:
    """The parameter that a weight becomes, from ``made`` if another module has it already."""
    sparse, originals = weight.sparse, weight.originals
    pattern = sparse.pattern_in(weight.module) if compress else None
    with name_in_errors(weight.path, "; nothing was finalized"):
        dense = weight.dense()
        value = sparse(dense).detach()
        if pattern is not None:
            mask = weight.upright(sparse.current_mask(dense))
            value = StructuredSparseTensor.from_dense(weight.upright(value), pattern, mask)
            value = weight.upright(value)
    shared = made.setdefault(id(originals[0]), [])
    same = [p for p in shared if _equal(value, p)]
    if not same:
        gradient = pattern is None and any(original.requires_grad for original in originals)
        same = [nn.Parameter(value, requires_grad=gradient)]
        shared.extend(same)
    return same[0]


def _equal(value: Tensor, other: nn.Parameter) -> bool:
    if isinstance(value, Compressed) and not value.same_layout(other):
        return False
    return value.shape == other.shape and torch.equal(value, other)


def _own_class(owner: nn.Module) -> None:
    """Give a parametrized module a class of its own.

    ``copy.deepcopy`` lets the copy (an EMA model, say) share the class that torch made for the
    parametrization, and ``remove_parametrizations`` deletes the property from that class, for both.
    """
    cls = type(owner)
    body = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    owner.__class__ = type(cls.__name__, cls.__bases__, body)


def _check_trained(weight: TrainedWeight) -> None:
    """Refuse a weight that is not ready to be finalized; warn of one whose mask never changed."""
    sparse = weight.sparse
    if weight.is_sharded:
        raise ModelError(
            f"{weight.path} is sharded: gather the state dict (torch.distributed.checkpoint.state_dict."
            "get_model_state_dict with full_state_dict=True), load it into an unsharded model under the same "
            "patterns, and finalize that"
        )
    if sparse.schedule is not None and not sparse.has_ended:
        raise ModelError(
            f"{weight.path}: its density schedule is at {sparse.density:g} after {sparse.steps} of "
            f"{sparse.schedule.steps} steps; call s3tensor.step(model) after each optimizer step, until "
            "it ends"
        )
    if sparse.needs_steps and sparse.steps == 0 and not sparse.frozen:
        warnings.warn(
            f"{weight.path}: refresh={sparse.refresh}, but s3tensor.step(model) was never called, so its "
            "mask is the one of registration",
            stacklevel=3,
        )
