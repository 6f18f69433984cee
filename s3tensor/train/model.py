"""Training whole models under a pattern: ``sparsify_training_``, ``step``, ``freeze`` and a callback."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from s3tensor.errors import ArgumentError, ModelError, NonFiniteError
from s3tensor.mask.transposable import check as check_transposable
from s3tensor.model.report import Report, table
from s3tensor.model.sparsify import names_chosen, reason_to_skip
from s3tensor.model.weights import (
    LayerFilter,
    ModelWeight,
    adapter_parts,
    linear_layers,
    model_weights,
    router_names,
)
from s3tensor.paper import Scopes
from s3tensor.pattern import Pattern
from s3tensor.train.coupling import CoupledSparse, Coupling
from s3tensor.train.parametrized import (
    TrainedWeight,
    check_masks_not_shared,
    name_in_errors,
    require_trained_weights,
    trained_weights,
)
from s3tensor.train.s3_sparse import S3Sparse

_CONVOLUTIONS: dict[int, type[nn.Module]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


@dataclass(frozen=True)
class TrainingRow:
    """What :func:`sparsify_training_` did to one layer."""

    name: str
    pattern: str
    mode: str
    action: str  # "parametrized" or "skipped"
    density: float  # of the pattern; 1.0 for a layer that was skipped
    weights: int
    reason: str = ""


class TrainingReport(Report[TrainingRow]):
    """Rows of :func:`sparsify_training_`, one for each layer."""

    def __str__(self) -> str:
        lines: list[tuple[str | int, ...]] = [("name", "action", "weights", "density", "note")]
        for row in self:
            note = row.reason or f"{row.pattern}, {row.mode}"
            lines.append((row.name, row.action, row.weights, f"{row.density:.3f}", note))
        return table(lines)


def sparsify_training_(
    model: nn.Module,
    pattern: Pattern | str | Scopes | Sequence[Scopes],
    mode: str = "ste",
    filter_fn: LayerFilter | None = None,
    **options: Any,
) -> TrainingReport:
    """Put the weights of linear layers under :class:`s3tensor.S3Sparse`, in place, for training.

    Linear layers are ``nn.Linear`` and the ``Conv1D`` of transformers, whose weight is stored transposed;
    for a pattern of 3, 4 or 5 dims the layers are ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``. Parameters
    stay the same objects, so existing optimizers keep working. All weights are checked before the first one
    is changed. Train, call :func:`step` after each optimizer step if the options need it, and end with
    :func:`s3tensor.finalize`.

    In place of a pattern, give one coupling or several, whose blocks are bound to parameters of the model:
    one decision over all tensors of each, taken in :func:`step`, which must be called. The budget is then
    ``keep=``, and there is no filter. See :class:`s3tensor.train.coupling.Coupling`.

    Args:
        model: a module; its own weight counts too.
        pattern: a pattern or its string; or :class:`s3tensor.ScopeSpec` and ``ScopeCoupling`` objects.
        mode: ``"fixed"``, ``"ste"``, ``"srste"`` or ``"soft"`` (which couplings do not have).
        filter_fn: ``filter_fn(module, name)`` is True for the layers to take. By default all but output
            heads (``lm_head`` and the like), routers of experts, and weights that several modules share.
            With a filter, a shared weight is taken if every module that holds it is chosen, under one
            S3Sparse, else skipped.
        options: of :class:`s3tensor.S3Sparse`: refresh, score, schedule, decay, transposable. Of a
            coupling: keep, refresh, schedule, decay.

    Returns:
        One row for each layer: what was done, and why it was skipped. Layers that the pattern does not fit
        are skipped.

    Raises:
        PatternError: a pattern that does not parse, or a schedule that ends at another density.
        ModelError: a model without such layers; a coupled parameter that is not in the model, or that is
            parametrized already.
        NonFiniteError: NaN or Inf in a weight that is to be trained. Nothing is changed then, nor if a
            score function fails.
        OptionError: an unknown mode, or an option that is out of range.
        ArgumentError: ``mask`` or ``transposed``, which are of one weight, or what a coupling does not take.
    """
    scopes = [pattern] if isinstance(pattern, Scopes) else pattern
    if not isinstance(scopes, (Pattern, str)):
        if filter_fn is not None:
            raise ArgumentError("a coupling names its weights itself: give no filter_fn")
        return _couple_(model, scopes, mode, **options)
    own = {"mask", "transposed"} & options.keys()
    if own:
        raise ArgumentError(
            f"sparsify_training_ takes no {own.pop()}: it is of one weight; use S3Sparse"
        )
    pattern = Pattern.parse(scopes)
    S3Sparse(pattern, mode, **options)  # refuses wrong options before anything is changed
    kind = _CONVOLUTIONS.get(len(pattern.rule.inputs), nn.Linear)
    layers = [
        layer
        for layer in linear_layers(model, (kind,))
        if kind is nn.Linear or isinstance(layer.module, kind)
    ]
    if not layers:
        raise ModelError(f"{type(model).__name__} has no {kind.__name__} layers for {pattern}")
    chosen = names_chosen(layers, filter_fn)
    adapters, routers = adapter_parts(model), router_names(model)
    reasons = {
        layer.name: _reason_to_skip(layer, pattern, chosen, routers, adapters, options)
        for layer in layers
    }
    rows = []
    made: dict[tuple[frozenset[str], bool], S3Sparse] = {}  # one where the weight is shared
    for layer in layers:
        weights, reason = layer.parameter.numel(), reasons[layer.name]
        action, density = "skipped", 1.0
        if not reason:
            action, density = "parametrized", pattern.bind(layer.weight.shape).density
            key = (frozenset(place.path for place in layer.places), layer.transposed)
            if key not in made:
                made[key] = S3Sparse(pattern, mode, transposed=layer.transposed, **options)
            try:
                with name_in_errors(layer.name, "; nothing was changed"):
                    parametrize.register_parametrization(layer.module, "weight", made[key])
            except BaseException:  # of a score function, say
                _unregister(model, set(map(id, made.values())))
                raise
        row = TrainingRow(layer.name, str(pattern), mode, action, density, weights, reason)
        rows.append(row)
    return TrainingReport(tuple(rows))


def _reason_to_skip(
    layer: ModelWeight,
    pattern: Pattern,
    chosen: set[str] | None,
    routers: set[str],
    adapters: Set[int],
    options: dict[str, Any],
) -> str:
    """Why a layer is not parametrized, or an empty string; one that is to be is checked."""
    if parametrize.is_parametrized(layer.module, "weight"):
        return "parametrized already"
    reason = reason_to_skip(layer, pattern, chosen, routers, adapters)
    if reason:
        return reason
    if not (layer.parameter.is_meta or bool(torch.isfinite(layer.parameter).all())):
        raise NonFiniteError(f"{layer.name}: the weight holds NaN or Inf; nothing was changed")
    if options.get("schedule") is not None:
        options["schedule"].check(pattern.bind(layer.weight.shape))
    if options.get("transposable"):
        if layer.weight.shape[0] % 4:
            return "its rows do not divide by 4, as tiles that transpose need"
        check_transposable(pattern, tuple(layer.weight.shape))
    return ""


def _unregister(model: nn.Module, made: set[int]) -> None:
    """Undo the registration of S3Sparse objects, given by identity."""
    for weight in list(trained_weights(model)):
        if id(weight.sparse) in made:
            parametrize.remove_parametrizations(
                weight.module, weight.attribute, leave_parametrized=False
            )


def _couple_(
    model: nn.Module, scopes: Sequence[Scopes], mode: str, **options: Any
) -> TrainingReport:
    """:func:`sparsify_training_` for couplings."""
    wrong = options.keys() - {"keep", "refresh", "schedule", "decay"}
    if wrong:
        raise ArgumentError(
            f"a coupling takes no {wrong.pop()}; it takes keep, refresh, schedule, decay"
        )
    if "keep" not in options:
        raise ArgumentError(
            "a coupling needs keep=, the blocks of each scope that stay, or a density"
        )
    if not scopes or not all(isinstance(each, Scopes) for each in scopes):
        raise ArgumentError("give a pattern, or a ScopeSpec or ScopeCoupling, or several in a list")
    known = {id(weight.parameter): weight for weight in model_weights(model)}
    taken: dict[int, str] = {}
    owners = []
    for number, each in enumerate(scopes):
        owner = Coupling(each, mode=mode, name=each.name or f"coupling {number}", **options)
        for weight in owner.weights:
            if id(weight) not in known:
                raise ModelError(
                    f"{owner.name}: its tensor of shape {tuple(weight.shape)} is not a parameter of this "
                    f"{type(model).__name__}; bind blocks to the model's own parameters"
                )
            path = known[id(weight)].path
            if "parametrizations." in path:
                raise ModelError(f"{path.replace('parametrizations.', '')} is parametrized already")
            if id(weight) in taken:
                raise ModelError(
                    f"{path} is in {taken[id(weight)]} and in {owner.name}; a weight has one owner"
                )
            taken[id(weight)] = owner.name
        owners.append(owner)
    rows = []
    for owner in owners:
        for weight, member in zip(owner.weights, owner.members, strict=True):
            for place in known[id(weight)].places:
                parametrize.register_parametrization(place.module, place.attribute, member)
                facts = (mode, "parametrized", member.density, weight.numel())
                rows.append(TrainingRow(place.path, str(owner.budget), *facts))
        owner.weights.clear()  # the model holds them
    return TrainingReport(tuple(rows))


def step(model: nn.Module) -> None:
    """Count one optimizer step for every S3Sparse of a model, and refresh the masks that are due.

    Call it once after each ``optimizer.step()``, before gradients are cleared if a score reads them. It is
    needed with ``refresh`` above 1, a schedule, a function as score or a coupling; otherwise it only measures
    ``flip_rate``, at the cost of one more mask.

    Raises:
        ModelError: a model without S3Sparse, or with only a part of a coupling.
        NonFiniteError: NaN or Inf in a weight whose mask is refreshed, with its name.
    """
    weights = _trained_once(model)
    for weight in weights:
        if isinstance(weight.sparse, S3Sparse):
            with name_in_errors(weight.path), torch.no_grad():
                weight.sparse.advance(weight.dense())
    for owner, members in _couplings(weights):
        if len(members) != len(owner.members):
            raise ModelError(
                f"{members[0].path} is one of {len(owner.members)} weights of {owner.name}, of which this "
                f"module holds {len(members)}; call s3tensor.step on the model that holds all"
            )
        with torch.no_grad():
            owner.advance([weight.dense() for weight in members])


def _trained_once(model: nn.Module) -> list[TrainedWeight]:
    """The weights under S3Sparse, each S3Sparse once."""
    found = require_trained_weights(model)
    check_masks_not_shared(found)
    first: dict[int, TrainedWeight] = {}
    for weight in found:
        first.setdefault(id(weight.sparse), weight)
    return list(first.values())


def _couplings(weights: list[TrainedWeight]) -> list[tuple[Coupling, list[TrainedWeight]]]:
    """Each coupling, with its weights in its own order."""
    found: dict[int, tuple[Coupling, dict[int, TrainedWeight]]] = {}
    for weight in weights:
        if isinstance(weight.sparse, CoupledSparse):
            owner = weight.sparse.owner
            found.setdefault(id(owner), (owner, {}))[1][weight.sparse.place] = weight
    return [(owner, [by[i] for i in sorted(by)]) for owner, by in found.values()]


def freeze(model: nn.Module) -> None:
    """Keep every mask of a model as it is from now on; gradients stay those of the modes.

    Raises:
        ModelError: a model without S3Sparse.
        PatternError: a density schedule that has not ended. Nothing is frozen then.
        NonFiniteError: NaN or Inf in a weight, by name. Nothing is frozen then.
    """
    weights = _trained_once(model)
    masks: list[tuple[S3Sparse, Tensor | None]] = []
    for weight in weights:
        if isinstance(weight.sparse, S3Sparse):
            with name_in_errors(weight.path, "; nothing was frozen"), torch.no_grad():
                masks.append((weight.sparse, weight.sparse.mask_to_freeze(weight.dense())))
    owners = [owner for owner, _ in _couplings(weights)]
    for owner in owners:
        owner.check_ended()
    for owner in owners:
        owner.freeze()
    for sparse, mask in masks:
        sparse.mask = mask
        sparse.freeze()


def metrics(model: nn.Module) -> dict[str, dict[str, float]]:
    """``density`` of each weight under S3Sparse, by name, and its ``flip_rate`` once there is one.

    Raises:
        ModelError: a model without S3Sparse.
    """
    found: dict[str, dict[str, float]] = {}
    for weight in _trained_once(model):
        flips = weight.sparse.flip_rate
        found[weight.path] = {"density": weight.sparse.density}
        if flips is not None:
            found[weight.path]["flip_rate"] = flips
    return found


def trainer_callback() -> Any:
    """A callback for the ``Trainer`` of transformers that calls :func:`step` after each optimizer step.

    Example:
        ``Trainer(model, args, train_dataset=data, callbacks=[trainer_callback()])``

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    from transformers import TrainerCallback

    class StepCallback(TrainerCallback):
        def on_optimizer_step(
            self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any
        ) -> None:
            step(model)

    return StepCallback()
