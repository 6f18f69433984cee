"""Training whole models under a pattern: ``sparsify_training_``, ``step``, ``freeze`` and a callback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from s3tensor.errors import ModelError, NonFiniteError
from s3tensor.parametrize import S3Sparse, Site, parametrized
from s3tensor.pattern import Pattern
from s3tensor.sparsify import linear_layers, owners_of, reason_to_skip

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
    pattern: Pattern | str,
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

    Args:
        model: a module; its own weight counts too.
        pattern: a pattern or its string.
        mode: ``"fixed"``, ``"ste"``, ``"srste"`` or ``"soft"``.
        filter_fn: ``filter_fn(module, name)`` is True for the layers to take. By default all but output
            heads (``lm_head`` and the like) and weights that several modules share. With a filter, a shared
            weight is taken if every module that holds it is chosen, under one S3Sparse, else skipped.
        options: of :class:`s3tensor.S3Sparse`: refresh, score, schedule, decay.

    Returns:
        One row for each layer: what was done, and why it was skipped. Layers that the pattern does not fit
        are skipped.

    Raises:
        PatternError: a pattern that does not parse, or a schedule that ends at another density.
        ModelError: a model without such layers.
        NonFiniteError: NaN or Inf in a weight that is to be trained.
        ValueError: an unknown mode, or an option that is out of range.
        TypeError: ``mask`` or ``transposed``, which are of one weight.
    """
    own = {"mask", "transposed"} & options.keys()
    if own:
        raise TypeError(
            f"sparsify_training_ takes no {own.pop()}: it is of one weight; use S3Sparse"
        )
    pattern = Pattern.parse(pattern)
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
        elif not bool(torch.isfinite(layer.parameter).all()):
            raise NonFiniteError(f"{layer.name}: the weight holds NaN or Inf; nothing was changed")
        elif options.get("schedule") is not None:
            options["schedule"].check(pattern.bind(layer.upright.shape))
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
        parametrize.register_parametrization(layer.module, "weight", made[key])
        rows.append(TrainingRow(layer.name, str(pattern), mode, "parametrized", density, weights))
    return TrainingReport(tuple(rows))


def step(model: nn.Module) -> None:
    """Count one optimizer step for every S3Sparse of a model, and refresh the masks that are due.

    Call it once after each ``optimizer.step()``, before gradients are cleared if a score reads them. It is
    needed with ``refresh`` above 1, a schedule or a function as score; elsewhere it measures ``flip_rate``,
    for the price of one more mask.

    Raises:
        ModelError: a model without S3Sparse.
        NonFiniteError: NaN or Inf in a weight whose mask is refreshed, with its name.
    """
    for site in _sites(model):
        try:
            with torch.no_grad():
                site.sparse.advance(site.weight())
        except NonFiniteError as error:
            raise NonFiniteError(f"{site.path}: {error}") from None


def freeze(model: nn.Module) -> None:
    """Keep every mask of a model as it is from now on; gradients stay those of the modes.

    Raises:
        ModelError: a model without S3Sparse.
        PatternError: a density schedule that has not ended.
    """
    for site in _sites(model):
        with torch.no_grad():
            site.sparse.freeze(site.weight())


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
    sites = {id(site.sparse): site for site in reversed(list(parametrized(model)))}
    if not sites:
        raise ModelError(
            f"{type(model).__name__} has no S3Sparse parametrization; call s3tensor.sparsify_training_ first"
        )
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
