"""Remove whole channels and heads of a model: one decision over several tensors, then smaller dense modules.

:mod:`s3tensor.model.units` says what a channel or a head is.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from s3tensor.errors import ModelError
from s3tensor.model.outputs import Outputs, difference_from_config
from s3tensor.model.report import Report
from s3tensor.model.units import Kind, Part, Unit, norm_eps, units
from s3tensor.modes import neutral, ordinary_


@dataclass(frozen=True)
class Cut:
    """What :func:`compact` removed from one unit."""

    name: str
    kind: Kind
    before: int
    after: int


@dataclass(frozen=True)
class CompactReport(Report[Cut]):
    """What a model lost, and whether its configuration can describe it.

    Args:
        rows: one for every unit, changed or not.
        parameters_before, parameters_after: elements, shared ones once.
        problem: why the configuration does not describe the model, or empty. Such a model runs, and is
            saved with ``torch.save``, but no ``from_pretrained`` can build it.
    """

    parameters_before: int
    parameters_after: int
    problem: str = ""

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """The rows."""
        return self.rows

    @property
    def uniform(self) -> bool:
        """True if the model's configuration describes it, so that it can be saved and reloaded."""
        return not self.problem

    def __str__(self) -> str:
        lines = []
        for kind in ("channels", "heads", "hidden"):
            cuts = [cut for cut in self.cuts if cut.kind == kind]
            if cuts:
                before, after = (sorted({getattr(c, w) for c in cuts}) for w in ("before", "after"))
                what = "key-value groups" if kind == "heads" else kind
                lines.append(f"{what} of {len(cuts)} units: {_span(before)} to {_span(after)}")
        share = self.parameters_after / self.parameters_before
        lines.append(
            f"parameters: {self.parameters_before:,} to {self.parameters_after:,} ({share:.3f})"
        )
        return "\n".join(lines + [self.problem] * (not self.uniform))


@neutral()
def compact(
    model: nn.Module,
    *,
    channels: float | None = None,
    heads: float | None = None,
    hidden: float | None = None,
    scores: Mapping[str, Tensor] | None = None,
    uniform: bool = False,
) -> CompactReport:
    """Remove channels and heads of a model that are zero, in place: smaller, dense, the same outputs.

    With densities, each unit is first pruned to its density, one decision over all its tensors, by the
    Euclidean norm of its blocks or by ``scores``. Modules keep their types: a Hugging Face model's
    configuration is updated where all layers agree, so that ``save_pretrained`` and ``from_pretrained``
    work as for any other. Outputs are compared before and after, of the model for a few tokens if it takes
    ``input_ids``, else of each MLP; the old weights are kept until then.

    Norms of weights judge channels poorly. Prune the columns of the projections that read them instead, which
    also compensates for what is removed, and compact what that leaves at zero (``bench/compact.py``)::

        llm.prune_model(model, calibration, "column@0.75", "obs", compress=False,
                        filter_fn=lambda _, name: name.endswith("down_proj"))
        s3.compact(model)

    Args:
        model: with MLPs of ``gate_proj``, ``up_proj``, ``down_proj`` (or ``w1``, ``w3``, ``w2``; ``fc1``,
            ``fc2``; ``gate_up_proj``, ``down_proj``) and attentions of ``q_proj``, ``k_proj``, ``v_proj``,
            ``o_proj`` with a ``head_dim``, as in Llama, Qwen2, Qwen3 and Mistral.
        channels: density of MLP channels to keep, in (0, 1].
        heads: density of attention heads to keep, in whole key-value groups.
        hidden: density of the residual stream to keep; it needs RMS norms.
        scores: importance of each block by unit name, (count,), in place of norms.
        uniform: leave zero blocks in where other layers need more, so that all layers keep one size.

    Returns:
        what was cut; a warning says why if no configuration can describe the result.

    Raises:
        ModelError: nothing to prune, a density out of range, weights that cannot be cut, or a model that
            uses what would be cut in a way not known here, such as a norm over all heads. The model is then
            unchanged.
    """
    ordinary_(model)
    wanted: dict[Kind, float | None] = {"channels": channels, "heads": heads, "hidden": hidden}
    found: dict[Kind, list[Unit]] = {}
    for kind, density in wanted.items():
        if density is not None and not 0.0 < density <= 1.0:
            raise ModelError(f"{kind}={density} must be a density in (0, 1]")
        if kind == "hidden" and density is None:
            continue  # only on request: every tensor of the model must agree
        found[kind] = units(model, kind)
        if density is not None and not found[kind]:
            raise ModelError(f"{type(model).__name__} has no {kind} to remove; see help(compact)")
    if not any(found.values()):
        raise ModelError(
            f"{type(model).__name__} has neither MLPs nor attentions with known parts; see help(compact)"
        )
    chosen = {
        (kind, unit.name): _chosen(unit, density, scores or {})
        for kind, density in wanted.items()
        if density is not None
        for unit in found[kind]
    }
    before = _parameters(model)
    changes = _Changes()
    try:
        cuts, problem = _cut(model, found, chosen, uniform, changes)
    except BaseException:
        changes.undo()
        raise
    report = CompactReport(tuple(cuts), before, _parameters(model), problem)
    if problem:
        warnings.warn(problem, stacklevel=3)
    return report


class _Changes:
    """What was changed in a model, so that it can be undone."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """``setattr``, of a parameter too."""
        old = getattr(owner, name)
        self._undo.append(lambda: setattr(owner, name, old))
        setattr(owner, name, value)

    @torch.no_grad()
    def zero(self, part: Part, blocks: Tensor) -> None:
        """Set the blocks of a part, (count,) bool, to zero in place."""
        tensor = part.parameter.detach()
        index = part.slices(blocks).nonzero().flatten().to(tensor.device)
        old = tensor.index_select(part.dim, index)
        self._undo.append(lambda: tensor.index_copy_(part.dim, index, old))
        tensor.index_fill_(part.dim, index, 0)

    def config(self, config: Any) -> None:
        """Remember a configuration as it is."""
        old = dict(vars(config))
        self._undo.append(lambda: (vars(config).clear(), vars(config).update(old)))

    def undo(self) -> None:
        """The latest first."""
        while self._undo:
            self._undo.pop()()


def _cut(
    model: nn.Module,
    found: Mapping[Kind, list[Unit]],
    chosen: Mapping[tuple[Kind, str], Tensor],
    uniform: bool,
    changes: _Changes,
) -> tuple[list[Cut], str]:
    """Zero what is not chosen, cut what is zero, compare outputs; the cuts, and the report's problem."""
    for unit in (unit for each in found.values() for unit in each):
        if (unit.kind, unit.name) in chosen:
            for part in unit.parts:
                changes.zero(part, ~chosen[unit.kind, unit.name].cpu())
    cuts: list[Cut] = []
    outputs: Outputs | None = None
    for kind, each in found.items():
        kept = {unit.name: _kept(unit) for unit in each}
        if uniform and each:
            _pad(kept, each)
        for unit in each:
            if not bool(kept[unit.name].all()):
                if unit.unknown:
                    raise ModelError(unit.unknown)
                outputs = outputs or Outputs.of(model, _mlps(found))
                _shrink(unit, kept[unit.name], changes)
            cuts.append(Cut(unit.name, kind, unit.count, int(kept[unit.name].sum())))
    if hasattr(getattr(model, "config", None), "__dict__"):
        changes.config(model.config)
    problem = _describe(model, cuts, found)
    if outputs is not None:
        lost = ", ".join(sorted({cut.kind for cut in cuts if cut.after < cut.before}))
        stream = next((kept[unit.name] for unit in found.get("hidden", ())), None)
        outputs.check(f"without zero {lost}", stream)
    return cuts, problem


def _mlps(found: Mapping[Kind, list[Unit]]) -> dict[str, tuple[nn.Module, nn.Linear]]:
    """The MLPs, each with a linear layer that reads its input; none if that input is cut too."""
    units = () if found.get("hidden") else found.get("channels", ())
    return {unit.name: (unit.module, unit.parts[0].module) for unit in units}  # type: ignore[misc]


# Choosing and cutting --------------------------------------------------------------------------


def _chosen(unit: Unit, density: float, scores: Mapping[str, Tensor]) -> Tensor:
    """Blocks to keep, (count,) bool: at least one."""
    keep = max(1, math.floor(density * unit.count + 0.5))
    scope = unit.scope()
    given = scores.get(unit.name)
    if given is not None:
        if given.shape != (unit.count,):
            raise ModelError(
                f"scores of {unit.name} have shape {tuple(given.shape)}; give one for each of its "
                f"{unit.count} {unit.kind}"
            )
        given = given.reshape(1, 1, -1)
    masks = scope.get_masks(nnz=keep, block_scores=given)
    first = next(iter(masks))
    return first.block_view(masks[first], merge=True).any(-1).flatten()


def _kept(unit: Unit) -> Tensor:
    """Blocks that stay, (count,) bool on the CPU: those in use, and one in any case."""
    kept = unit.used()
    if not bool(kept.any()):
        kept[0] = True
    return kept


def _pad(kept: dict[str, Tensor], each: list[Unit]) -> None:
    """Keep the same number in every unit of one size: unused blocks stay if others need more."""
    for count in {unit.count for unit in each}:
        alike = [unit.name for unit in each if unit.count == count]
        most = max(int(kept[name].sum()) for name in alike)
        for name in alike:
            spare = (~kept[name]).nonzero().flatten()[: most - int(kept[name].sum())]
            kept[name][spare] = True


def _shrink(unit: Unit, kept: Tensor, changes: _Changes) -> None:
    """Cut every parameter of a unit to the blocks that stay."""
    left = int(kept.sum())
    # Parts of one parameter along one dim are cut together.
    kept_of: dict[tuple[str, int], tuple[Part, Tensor]] = {}
    for part in unit.parts:
        key = (part.path, part.dim)
        whole = torch.ones(part.parameter.shape[part.dim], dtype=torch.bool)
        _, keep = kept_of.setdefault(key, (part, whole))
        keep &= ~part.slices(~kept)
    for part, keep in kept_of.values():
        old = part.parameter
        index = keep.nonzero().flatten().to(old.device)
        cut = old.detach().index_select(part.dim, index)
        if unit.kind == "hidden" and part.role == "scales":
            _rescale_norm(part.module, cut, unit.count / left, changes)
        parameter = nn.Parameter(cut, requires_grad=old.requires_grad)
        for place in part.places:  # a head that is the embedding, too
            changes.set(place.module, place.attribute, parameter)
            _resize(place.module, part.dim, len(index), changes)
    for attribute, value in _sizes(unit, left).items():
        if isinstance(getattr(unit.module, attribute, None), int):
            changes.set(unit.module, attribute, value)


def _resize(module: nn.Module, dim: int, size: int, changes: _Changes) -> None:
    """Update the size that a module states of itself."""
    if isinstance(module, nn.Linear):
        changes.set(module, "in_features" if dim == 1 else "out_features", size)
    elif isinstance(module, nn.Embedding):
        changes.set(module, "embedding_dim", size)
    elif isinstance(module, nn.RMSNorm):
        changes.set(module, "normalized_shape", (size,))


def _rescale_norm(norm: nn.Module, weight: Tensor, ratio: float, changes: _Changes) -> None:
    """A mean of squares over fewer channels is larger: the norm's weight and eps compensate."""
    weight.mul_(math.sqrt(ratio))
    name = norm_eps(norm)
    assert name is not None
    changes.set(norm, name, getattr(norm, name) * ratio)


def _sizes(unit: Unit, left: int) -> dict[str, int]:
    """Attributes of a module or a configuration that state the size of a unit, with the new values."""
    if unit.kind == "channels":
        return dict.fromkeys(("intermediate_size", "ffn_dim"), left)
    if unit.kind == "hidden":
        return {"hidden_size": left}
    per_group = unit.parts[0].parameter.shape[0] // left // int(unit.module.head_dim)  # type: ignore[arg-type]
    return {
        "num_key_value_heads": left,
        "num_attention_heads": left * per_group,
        "num_heads": left * per_group,
    }


# The configuration -----------------------------------------------------------------------------


def _describe(model: nn.Module, cuts: list[Cut], found: Mapping[Kind, list[Unit]]) -> str:
    """Update ``model.config``; returns why it cannot describe the model, or an empty string."""
    changed = {kind for kind in found if any(c.before != c.after for c in cuts if c.kind == kind)}
    config = getattr(model, "config", None)
    if not changed or config is None:
        return ""
    for kind in changed:
        sizes = {cut.name: cut.after for cut in cuts if cut.kind == kind}
        if len(set(sizes.values())) > 1:
            least = min(sizes, key=sizes.__getitem__)
            most = max(sizes, key=sizes.__getitem__)
            return (
                f"the layers keep different numbers of {kind} ({sizes[least]} in {least}, {sizes[most]} in "
                f"{most}), and a configuration has one for all: from_pretrained cannot rebuild this model. "
                "Use torch.save, or compact(..., uniform=True), which keeps the larger number in every layer"
            )
    values: dict[str, Any] = {}
    for kind in changed:
        unit = found[kind][0]
        (left,) = {cut.after for cut in cuts if cut.kind == kind}
        stated = {
            name: value
            for name, value in _sizes(unit, left).items()
            if isinstance(getattr(config, name, None), int)
            and getattr(config, name) * left == value * unit.count  # its size, and not another's
        }
        if not stated:
            return f"the configuration states no number of {kind}: from_pretrained cannot rebuild this model"
        values.update(stated)
        if kind == "hidden":
            scaled = {part.module for part in unit.parts if part.role == "scales"}
            others = [n for n, m in model.named_modules() if norm_eps(m) and m not in scaled]
            if others or not hasattr(config, "rms_norm_eps"):
                where = (
                    f" and {others[0]} has it too" if others else ", which the configuration lacks"
                )
                return (
                    f"the eps of the residual stream's norms changed{where}: from_pretrained cannot rebuild "
                    "this model exactly; use torch.save"
                )
            values["rms_norm_eps"] = config.rms_norm_eps * unit.count / left
    # What was derived from the old sizes is now stated.
    sized = next((unit.module for unit in found.get("heads", ())), None)
    if sized is not None and changed & {"heads", "hidden"}:
        values["head_dim"] = int(sized.head_dim)  # type: ignore[arg-type]
    before = dict(vars(config))
    try:
        for name, value in values.items():
            setattr(config, name, value)
        if callable(getattr(config, "validate", None)):
            config.validate()
        problem = difference_from_config(model)
    except Exception as error:
        reason = " ".join(str(error).split())
        problem = f"{type(config).__name__} refuses {values} ({reason})"
    else:
        problem = problem and f"{type(config).__name__} cannot describe {values}: {problem}"
    if problem:
        vars(config).clear()
        vars(config).update(before)
        problem += (
            "; from_pretrained cannot rebuild this model: choose other densities, or use torch.save"
        )
    return problem


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _span(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}"
