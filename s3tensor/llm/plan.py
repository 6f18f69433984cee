"""What a pruning run will do: every option checked, every linear listed, before any work."""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from s3tensor import prune
from s3tensor.errors import ModelError, NonFiniteError, OptionError, PatternError
from s3tensor.llm.auto import Auto, Coefficients, split_batches
from s3tensor.llm.budgets import Budgets, parse_budgets, pattern_of
from s3tensor.llm.calibrate import check_batches, has_room
from s3tensor.llm.recover import Recovery, shared_parameters
from s3tensor.llm.resume import fingerprint, tokens_digest
from s3tensor.llm.structure import (
    Outside,
    Skipped,
    decoder_blocks,
    outside_blocks,
    prunable_layers,
)
from s3tensor.model.weights import ADAPTER, LayerFilter, ModelWeight, model_weights
from s3tensor.pattern import Pattern
from s3tensor.tensor.base import Compressed

_DIAGONAL = ("magnitude", "wanda", "obd")  # pruners that use at most the diagonal of a Hessian


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """One decoder block and what happens to its weights."""

    module: nn.Module
    name: str  # full name in the model
    layers: list[ModelWeight]  # to prune
    skipped: list[Skipped]  # stay dense
    tied: list[ModelWeight] = field(
        default_factory=list
    )  # share a weight that a block before prunes

    @property
    def weights(self) -> int:
        """Weights in the linears to prune."""
        return sum(layer.weight.numel() for layer in self.layers)


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """A pruning run, checked: :func:`s3tensor.llm.run.run` carries it out."""

    model: nn.Module
    blocks: list[BlockPlan]
    outside: list[Outside]  # what stays as it is
    pattern: Pattern  # the one asked for
    patterns: Mapping[str, Pattern]  # of each linear, by full name
    mixed: bool  # the run allocates ``patterns`` first
    pruner: str
    options: Mapping[str, Any]  # of the pruner
    coefficients: Coefficients
    calibration: list[Tensor]  # (batch, tokens) each, as given
    batches: list[Tensor]  # the same tokens, cut at the splits
    splits: list[
        list[int]
    ]  # indices of ``batches``: all of them, or those to fit on and to validate by
    held_out: list[Tensor]
    device: torch.device
    cache: torch.device
    compress: bool
    recovery: Recovery | None
    shared: frozenset[int]  # ids of parameters that recovery leaves alone
    work_dir: Path | None
    progress: bool

    @classmethod
    def of(
        cls,
        model: nn.Module,
        calibration: Iterable[Tensor],
        pattern: Pattern | str,
        pruner: str = "admm",
        *,
        alpha: float | Auto | None = None,
        beta: float | None = None,
        damp: float | Auto | None = None,
        device: torch.device | str | None = None,
        cache_device: torch.device | str | None = None,
        blocks: int | None = None,
        filter_fn: LayerFilter | None = None,
        on_misfit: Literal["skip", "error"] = "skip",
        compress: bool = True,
        recover: Recovery | int | None = None,
        budgets: Budgets | None = None,
        held_out: Iterable[Tensor] | None = None,
        work_dir: str | Path | None = None,
        progress: bool = True,
        **options: Any,
    ) -> Plan:
        """The arguments of :func:`s3tensor.llm.prune_model`, checked; the model stays as it is.

        Raises and warns as :func:`~s3tensor.llm.prune_model`, except for what shows only in the course of the
        run: activations, memory, the state of ``work_dir``.
        """
        pattern = Pattern.parse(pattern)
        coefficients = Coefficients.of(pruner, alpha, beta, damp)
        prefix, found = decoder_blocks(model)
        recovery = Recovery.of(recover)
        count = len(found) if blocks is None else blocks
        if not 1 <= count <= len(found):
            raise ModelError(
                f"blocks={blocks}, but the model has {len(found)} decoder blocks; give 1 to {len(found)}"
            )
        chosen = list(found)[:count]
        where = torch.device(device) if device is not None else next(model.parameters()).device
        _check_pruner_options(pruner, options)
        named = parse_budgets(budgets, model, pattern)
        wanted = partial(pattern_of, named=named, pattern=pattern)
        if on_misfit not in ("skip", "error"):
            raise OptionError(f"on_misfit={on_misfit!r} must be 'skip' or 'error'")
        _check_placed(model)
        planned = _plan_blocks(
            model, list(found), count, prefix, wanted, filter_fn, on_misfit == "error"
        )
        if not any(block.layers for block in planned):
            reasons = sorted({s.reason for block in planned for s in block.skipped})
            raise ModelError(f"no linear of the model can be pruned to {wanted('')}: {reasons[0]}")
        if any(s.reason == ADAPTER for block in planned for s in block.skipped):
            warnings.warn(
                "the adapters of peft in this model stay dense, and merging one makes the pruned weight "
                "beside it dense again; to prune both together, call model.merge_and_unload() first",
                stacklevel=3,  # the caller of prune_model
            )
        given, unseen = list(calibration), list(held_out or ())
        given = check_batches(model, given)
        batches, splits = given, [list(range(len(given)))]
        several = sum(len(batch) for batch in given) > 1
        if damp is None and not several:
            coefficients = replace(coefficients, auto=coefficients.auto - {"damp"})
        if coefficients.auto:
            batches, splits = split_batches(given)
        if unseen:
            unseen = check_batches(model, unseen)
        if pruner not in _DIAGONAL:
            fixed = coefficients.alpha > 0 and "damp" not in coefficients.auto
            _warn_of_few_tokens(planned, given, may_choose=fixed and several)
        if cache_device is not None:
            cache = torch.device(cache_device)
        else:
            cache = choose_cache(where, planned, [*given, *unseen])
        return cls(
            model=model,
            blocks=planned,
            outside=outside_blocks(model, prefix, count),
            pattern=pattern,
            patterns={x.name: wanted(x.name) for block in planned for x in block.layers},
            mixed=budgets == "mixed",
            pruner=pruner,
            options=options,
            coefficients=coefficients,
            calibration=given,
            batches=batches,
            splits=splits,
            held_out=unseen,
            device=where,
            cache=cache,
            compress=compress,
            recovery=recovery,
            shared=frozenset(shared_parameters(model, chosen)),
            work_dir=None if work_dir is None else Path(work_dir),
            progress=progress,
        )

    @property
    def dense_target(self) -> bool:
        """Whether fits need the dense model's inputs of each linear."""
        return self.coefficients.alpha > 0

    def settings(self) -> dict[str, Any]:
        """What the pruned weights depend on, for JSON, before any budgets are allocated."""
        others = {name: p.parts for name, p in sorted(self.patterns.items()) if p != self.pattern}
        names = "\n".join(layer.name for block in self.blocks for layer in block.layers)
        coefficients = self.coefficients
        return {
            "pattern": self.pattern.parts,
            "budgets": "mixed" if self.mixed else others or None,
            "pruner": self.pruner,
            "alpha": "auto" if "alpha" in coefficients.auto else coefficients.alpha,
            "beta": coefficients.beta,
            "damp": "auto" if "damp" in coefficients.auto else coefficients.damp,
            "options": {name: repr(value) for name, value in sorted(self.options.items())},
            "compress": self.compress,
            "recover": None if self.recovery is None else asdict(self.recovery),
            "blocks": len(self.blocks),
            "linears": hashlib.sha256(names.encode()).hexdigest(),
            "held_out": tokens_digest(self.held_out) if self.held_out else None,
            **fingerprint(self.model, self.calibration),
        }


def _check_pruner_options(pruner: str, options: Mapping[str, Any]) -> None:
    accepts = inspect.signature(prune.get(pruner)).parameters
    unknown = sorted(set(options) - set(accepts))
    if unknown:
        known = [name for name in accepts if name not in ("weight", "hessian", "pattern")]
        raise TypeError(
            f"pruner {pruner!r} has no option {unknown[0]!r}; it has {', '.join(known)}"
        )


def _check_placed(model: nn.Module) -> None:
    """Refuse a model whose parameters are not all on one device."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or next(iter(devices)).type == "meta":
        places = ", ".join(sorted(str(device) for device in devices))
        raise ModelError(
            f"the model lies on {places}; load it on one device, such as the CPU, and let device= say "
            "where its blocks are pruned, one at a time"
        )


def _plan_blocks(
    model: nn.Module,
    listed: Sequence[nn.Module],
    count: int,  # of the blocks to prune
    prefix: str,
    pattern: Callable[[str], Pattern],  # by the full name of a linear
    filter_fn: LayerFilter | None,
    refuse_misfits: bool,
) -> list[BlockPlan]:
    planned: list[BlockPlan] = []
    for index, block in enumerate(listed[:count]):
        name = f"{prefix}.{index}"
        layers, skipped = prunable_layers(block, name, pattern, filter_fn)
        misfits = [s for s in skipped if s.misfit]
        if misfits and refuse_misfits:
            raise PatternError(f"{misfits[0].name}: {misfits[0].reason}")
        planned.append(BlockPlan(block, name, layers, skipped))
    _plan_shared(model, planned, listed[count:])
    for each in planned:
        for layer in each.layers:
            _check_weight(layer)
    return planned


def _plan_shared(
    model: nn.Module, blocks: Sequence[BlockPlan], others: Sequence[nn.Module]
) -> None:
    """Leave a shared weight to the first of its linears, or dense if not all its places are to be pruned."""
    places = {id(weight.parameter): weight.places for weight in model_weights(model)}
    elsewhere = {id(x) for block in others for x in block.parameters()}
    chosen: dict[int, list[ModelWeight]] = {}
    for block in blocks:
        for layer in block.layers:
            chosen.setdefault(id(layer.parameter), []).append(layer)
    owners: dict[int, ModelWeight] = {}
    for block in blocks:
        own: list[ModelWeight] = []
        for layer in block.layers:
            key = id(layer.parameter)
            taken = {(id(each.module), each.attribute, each.transposed) for each in chosen[key]}
            outside = [
                x.path
                for x in places[key]
                if (id(x.module), x.attribute, layer.transposed) not in taken
            ]
            if outside or key in elsewhere:
                where = outside[0] if outside else "a later block"
                reason = f"it shares its weight with {where}, which is not pruned"
                block.skipped.append(Skipped(layer.name, reason))
            elif key in owners:
                reason = f"it shares its weight with {owners[key].name}"
                block.skipped.append(Skipped(layer.name, reason))
                block.tied.append(layer)
            else:
                sharing = tuple(x for x in places[key] if x.module is not layer.module)
                owners[key] = replace(layer, sharing=sharing)
                own.append(owners[key])
        block.layers[:] = own
        first = {id(layer.parameter) for layer in own}
        block.tied[:] = [layer for layer in block.tied if id(layer.parameter) not in first]


def _check_weight(layer: ModelWeight) -> None:
    if isinstance(layer.module.weight, Compressed):
        raise ModelError(f"{layer.name} is compressed already; prune the dense model")
    if not bool(torch.isfinite(layer.weight).all()):
        raise NonFiniteError(f"{layer.name} has NaN or Inf in its weight; repair the model first")


def _warn_of_few_tokens(
    blocks: Sequence[BlockPlan], batches: Sequence[Tensor], may_choose: bool
) -> None:
    tokens = sum(batch.numel() for batch in batches)
    layers = [layer for block in blocks for layer in block.layers]
    widest = max(layers, key=lambda layer: layer.shape[1])
    if tokens < widest.shape[1]:
        remedy = (
            "Calibrate on more, or let damp='auto' choose" if may_choose else "Calibrate on more"
        )
        warnings.warn(
            f"{tokens} calibration tokens for {widest.name}, which has {widest.shape[1]} in_features: with "
            f"fewer tokens than inputs the weights overfit these tokens. {remedy}; held_out= measures the "
            "error on other tokens",
            stacklevel=4,  # the caller of prune_model
        )


def choose_cache(
    device: torch.device, blocks: Sequence[BlockPlan], batches: Sequence[Tensor]
) -> torch.device:
    """The device itself if it has room for both streams and a block's dense inputs, else the CPU.

    Moving activations to the CPU and back takes several times as long as everything computed from them.
    """
    layers = [[layer.weight for layer in block.layers] for block in blocks if block.layers]
    widths = [sum(weight.shape[1] for weight in weights) for weights in layers]
    hidden = max(weight.shape[1] for weights in layers for weight in weights)  # or something wider
    tokens = sum(batch.numel() for batch in batches)
    nbytes = tokens * (max(widths) + 4 * hidden) * layers[0][0].element_size()
    return device if has_room(device, nbytes, 0.5) else torch.device("cpu")
