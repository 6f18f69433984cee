"""Training whole models under a pattern: ``sparsify_training_``, ``step``, ``freeze`` and a callback."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from s3tensor.errors import ModelError, NonFiniteError
from s3tensor.mask.transposable import check as check_transposable
from s3tensor.model.sparsify import linear_layers, owners_of, reason_to_skip
from s3tensor.model.weights import parameters_of
from s3tensor.paper import Scopes
from s3tensor.pattern import Pattern
from s3tensor.train.coupling import CoupledSparse, Coupling
from s3tensor.train.parametrized import Site, check_alone, naming, parametrized
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


@dataclass(frozen=True)
class TrainingReport:
    """Rows of :func:`sparsify_training_`, one for each layer, in the model's order."""

    rows: tuple[TrainingRow, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[TrainingRow]:
        return iter(self.rows)

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=4)
        lines = [f"{'name':<{width}}  {'action':<12}  {'weights':>12}  {'density':>7}  note"]
        for row in self.rows:
            note = row.reason or f"{row.pattern}, {row.mode}"
            lines.append(
                f"{row.name:<{width}}  {row.action:<12}  {row.weights:>12,}  {row.density:>7.3f}  {note}"
            )
        return "\n".join(lines)


def sparsify_training_(
    model: nn.Module,
    pattern: Pattern | str | Scopes | Sequence[Scopes],
    mode: str = "ste",
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    **options: Any,
) -> TrainingReport:
    """Put the weights of linear layers under :class:`s3tensor.S3Sparse`, in place, to be trained.

    Linear layers are ``nn.Linear`` and the ``Conv1D`` of transformers, whose weight is stored transposed;
    for a pattern of 3, 4 or 5 dims the layers are ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``. Parameters
    stay the same objects, so an optimizer made before goes on. All weights are checked before the first
    one is changed. Train, call :func:`step` after each optimizer step where the options need it, and end
    with :func:`s3tensor.finalize`.

    In place of a pattern, a coupling, or several, whose blocks are bound to parameters of the model: one
    decision over all tensors of each, taken once in :func:`step`, which must be called. The budget is then
    ``keep=``, and there is no filter. See :class:`s3tensor.train.coupling.Coupling`.

    Args:
        model: a module; its own weight counts too.
        pattern: a pattern or its string; or :class:`s3tensor.ScopeSpec` and ``ScopeCoupling`` objects.
        mode: ``"fixed"``, ``"ste"``, ``"srste"`` or ``"soft"`` (which couplings do not have).
        filter_fn: ``filter_fn(module, name)`` is True for the layers to take. By default all but output
            heads (``lm_head`` and the like) and weights that several modules share. With a filter, a shared
            weight is taken if every module that holds it is chosen, under one S3Sparse, else skipped.
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
        ValueError: an unknown mode, or an option that is out of range.
        TypeError: ``mask`` or ``transposed``, which are of one weight.
    """
    scopes = [pattern] if isinstance(pattern, Scopes) else pattern
    if not isinstance(scopes, (Pattern, str)):
        if filter_fn is not None:
            raise TypeError("a coupling names its weights itself: give no filter_fn")
        return _couple_(model, scopes, mode, **options)
    own = {"mask", "transposed"} & options.keys()
    if own:
        raise TypeError(
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
    chosen = None
    if filter_fn is not None:
        chosen = {layer.name for layer in layers if filter_fn(layer.module, layer.name)}
    owners = owners_of(model)
    reasons: dict[str, str] = {}
    for layer in layers:
        holders = owners.get(id(layer.parameter), {layer.name})
        reason = reason_to_skip(layer, pattern, holders, chosen)
        if parametrize.is_parametrized(layer.module, "weight"):
            reason = "parametrized already"
        if reason:
            reasons[layer.name] = reason
        elif not (layer.parameter.is_meta or bool(torch.isfinite(layer.parameter).all())):
            raise NonFiniteError(f"{layer.name}: the weight holds NaN or Inf; nothing was changed")
        else:
            if options.get("schedule") is not None:
                options["schedule"].check(pattern.bind(layer.upright.shape))
            if options.get("transposable") and layer.upright.shape[0] % 4:
                reasons[layer.name] = "its rows do not divide by 4, as tiles that transpose need"
            elif options.get("transposable"):
                check_transposable(pattern, tuple(layer.upright.shape))
    rows = []
    made: dict[tuple[int, bool], S3Sparse] = {}
    for layer in layers:
        weights = layer.parameter.numel()
        reason = reasons.get(layer.name, "")
        if reason:
            rows.append(
                TrainingRow(layer.name, str(pattern), mode, "skipped", 1.0, weights, reason)
            )
            continue
        density = pattern.bind(layer.upright.shape).density
        key = (id(layer.parameter), layer.transposed)
        if key not in made:
            made[key] = S3Sparse(pattern, mode, transposed=layer.transposed, **options)
        try:
            with naming(layer.name, "; nothing was changed"):
                parametrize.register_parametrization(layer.module, "weight", made[key])
        except BaseException:  # of a score function, say
            _leave(model, set(map(id, made.values())))
            raise
        rows.append(TrainingRow(layer.name, str(pattern), mode, "parametrized", density, weights))
    return TrainingReport(tuple(rows))


def _leave(model: nn.Module, made: set[int]) -> None:
    """Take back the registration of these S3Sparse objects."""
    for site in list(parametrized(model)):
        if id(site.sparse) in made:
            parametrize.remove_parametrizations(site.owner, site.name, leave_parametrized=False)


def _couple_(
    model: nn.Module, scopes: Sequence[Scopes], mode: str, **options: Any
) -> TrainingReport:
    """:func:`sparsify_training_` for couplings."""
    wrong = options.keys() - {"keep", "refresh", "schedule", "decay"}
    if wrong:
        raise TypeError(
            f"a coupling takes no {wrong.pop()}; it takes keep, refresh, schedule, decay"
        )
    if "keep" not in options:
        raise TypeError("a coupling needs keep=, the blocks of each scope that stay, or a density")
    if not scopes or not all(isinstance(each, Scopes) for each in scopes):
        raise TypeError("give a pattern, or a ScopeSpec or ScopeCoupling, or several in a list")
    holders = {id(held.parameter): held for held in parameters_of(model)}
    taken: dict[int, str] = {}
    owners = []
    for number, each in enumerate(scopes):
        owner = Coupling(each, mode=mode, name=each.name or f"coupling {number}", **options)
        for weight in owner.weights:
            if id(weight) not in holders:
                raise ModelError(
                    f"{owner.name}: its tensor of shape {tuple(weight.shape)} is no parameter of this "
                    f"{type(model).__name__}; bind blocks to the model's own parameters"
                )
            where = holders[id(weight)].path
            if "parametrizations." in where:
                raise ModelError(
                    f"{where.replace('parametrizations.', '')} is parametrized already"
                )
            if id(weight) in taken:
                raise ModelError(
                    f"{where} is in {taken[id(weight)]} and in {owner.name}; a weight has one owner"
                )
            taken[id(weight)] = owner.name
        owners.append(owner)
    rows = []
    for owner in owners:
        for weight, member in zip(owner.weights, owner.members, strict=True):
            for where, module, name in holders[id(weight)].places:
                parametrize.register_parametrization(module, name, member)
                facts = (mode, "parametrized", member.density, weight.numel())
                rows.append(TrainingRow(where, str(owner.budget), *facts))
        owner.weights.clear()  # the model holds them
    return TrainingReport(tuple(rows))


def step(model: nn.Module) -> None:
    """Count one optimizer step for every S3Sparse of a model, and refresh the masks that are due.

    Call it once after each ``optimizer.step()``, before gradients are cleared if a score reads them. It is
    needed with ``refresh`` above 1, a schedule, a function as score or a coupling; elsewhere it measures
    ``flip_rate``, for the price of one more mask.

    Raises:
        ModelError: a model without S3Sparse, or with a part of a coupling only.
        NonFiniteError: NaN or Inf in a weight whose mask is refreshed, with its name.
    """
    sites = _sites(model)
    for site in sites:
        if isinstance(site.sparse, S3Sparse):
            with naming(site.path), torch.no_grad():
                site.sparse.advance(site.weight())
    for owner, members in _couplings(sites):
        if len(members) != len(owner.members):
            raise ModelError(
                f"{members[0].path} is one of {len(owner.members)} weights of {owner.name}, of which this "
                f"module holds {len(members)}; call s3tensor.step on the model that holds all"
            )
        with torch.no_grad():
            owner.advance([site.weight() for site in members])


def _couplings(sites: list[Site]) -> list[tuple[Coupling, list[Site]]]:
    """Each coupling, with its weights in its own order."""
    found: dict[int, tuple[Coupling, dict[int, Site]]] = {}
    for site in sites:
        if isinstance(site.sparse, CoupledSparse):
            owner = site.sparse.owner
            found.setdefault(id(owner), (owner, {}))[1][site.sparse.place] = site
    return [(owner, [by[i] for i in sorted(by)]) for owner, by in found.values()]


def freeze(model: nn.Module) -> None:
    """Keep every mask of a model as it is from now on; gradients stay those of the modes.

    Raises:
        ModelError: a model without S3Sparse.
        PatternError: a density schedule that has not ended. Nothing is frozen then.
        NonFiniteError: NaN or Inf in a weight, by name. Nothing is frozen then.
    """
    sites = _sites(model)
    masks: list[tuple[S3Sparse, Tensor | None]] = []
    for site in sites:
        if isinstance(site.sparse, S3Sparse):
            with naming(site.path, "; nothing was frozen"), torch.no_grad():
                masks.append((site.sparse, site.sparse.mask_to_freeze(site.weight())))
    owners = [owner for owner, _ in _couplings(sites)]
    for owner in owners:
        owner.check_ended()
    for owner in owners:
        owner.freeze()
    for sparse, mask in masks:
        sparse.mask = mask
        sparse.freeze()


def metrics(model: nn.Module) -> dict[str, dict[str, float]]:
    """Of each weight under S3Sparse, by its name: its ``density``, and its ``flip_rate`` once there is one.

    Raises:
        ModelError: a model without S3Sparse.
    """
    found: dict[str, dict[str, float]] = {}
    for site in _sites(model):
        flips = site.sparse.flip_rate
        found[site.path] = {"density": site.sparse.density}
        if flips is not None:
            found[site.path]["flip_rate"] = flips
    return found


def _sites(model: nn.Module) -> list[Site]:
    """The weights under S3Sparse, each S3Sparse once."""
    found = list(parametrized(model))
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no S3Sparse parametrization; call s3tensor.sparsify_training_ first "
            "(its report says which layers it skipped, and why)"
        )
    check_alone(found)
    sites = {id(site.sparse): site for site in reversed(found)}
    return list(reversed(sites.values()))


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
