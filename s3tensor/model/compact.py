"""Remove whole channels and heads of a model: one decision over several tensors, then smaller dense modules.

A channel of an MLP is a row of ``gate_proj`` and ``up_proj`` with a column of ``down_proj``; a key-value
group of an attention is its rows of ``q_proj``, ``k_proj`` and ``v_proj`` with columns of ``o_proj``; a
channel of the residual stream is a column or row of every weight that reads or writes it. Each is a block
of a :class:`s3tensor.BlockCoupling`, and the blocks of one unit compete in one scope (S3, arXiv
2604.11315, section 3). Units are found by the names and shapes of their parts, without transformers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from s3tensor.errors import ModelError
from s3tensor.model.report import Report
from s3tensor.model.weights import ModelWeight, computed_by_hook, model_weights
from s3tensor.paper import BlockCoupling, BlockSpec, ScopeSpec, View

Kind = Literal["channels", "heads", "hidden"]

# The names of an MLP's input projections (of one activation, or of a gate and what it multiplies) and its
# output projection.
_MLPS = ((("gate_proj", "up_proj"), "down_proj"), (("w1", "w3"), "w2"), (("fc1",), "fc2"))
_FUSED = ("gate_up_proj", "down_proj")  # gate over up in one weight
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, kw_only=True)
class Part(ModelWeight):
    """Blocks of a unit in one parameter: block i is ``size`` slices of ``dim`` from ``start + i size``.

    The finders below leave the path empty; :func:`units` fills in the places of the parameter.
    """

    dim: int
    size: int = 1
    start: int = 0
    role: Literal["reads", "writes", "scales"] = "reads"

    def view(self, count: int) -> View:
        """The part's blocks as a matrix, their dim first: (count * size, rest)."""
        tensor = self.parameter
        matrix = tensor.unsqueeze(1) if tensor.ndim == 1 else tensor
        own = matrix.stride(self.dim)
        other = 1 - self.dim
        return View(
            tensor,
            (count * self.size, matrix.shape[other]),
            (own, matrix.stride(other)),
            self.start * own,
        )


@dataclass(frozen=True)
class Unit:
    """Channels or heads of one module, or of the model's residual stream, that can be removed.

    Args:
        name: of the module, as in ``model.named_modules()``; of the residual stream, the stack's.
        kind: ``channels`` of an MLP, ``heads`` of an attention (in whole key-value groups), ``hidden``.
        count: blocks: channels or key-value groups.
        parts: every parameter that holds a share of a block. A ``writes`` part makes the block's values and
            a ``reads`` part uses them: a block whose values in either are zero does nothing. ``scales``
            parts are neither.
    """

    name: str
    kind: Kind
    module: nn.Module
    count: int
    parts: tuple[Part, ...]

    def scope(self) -> ScopeSpec:
        """All blocks of the unit in one scope, bound to the parameters."""
        blocks = [BlockSpec(part.view(self.count), (part.size, -1)) for part in self.parts]
        return ScopeSpec(BlockCoupling(blocks, name=self.name), (-1,), name=self.name)

    def used(self) -> Tensor:
        """The blocks that change an output, (count,) bool."""
        reads = torch.zeros(self.count, dtype=torch.bool)
        writes = torch.zeros(self.count, dtype=torch.bool)
        for part in self.parts:
            if part.role == "scales":
                continue
            blocks = part.view(self.count).data.reshape(self.count, -1)
            (reads if part.role == "reads" else writes).logical_or_((blocks != 0).any(1).cpu())
        if self.kind == "hidden":  # a norm reads all that is written
            return writes
        # What is read but never written, or the reverse, changes no output.
        return reads & writes if any(part.role == "writes" for part in self.parts) else reads


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


def units(model: nn.Module, kind: Kind) -> list[Unit]:
    """Every unit of a kind in a model, in its order.

    ``unit.scope()`` is a :class:`s3tensor.ScopeSpec` for your own in-place pruning; :func:`compact` then
    removes what is zero.

    Raises:
        ModelError: a weight that is compressed, parametrized or shared, which cannot be cut; or a
            residual stream with norms that subtract a mean.
    """
    finder = {"channels": _channels, "heads": _heads, "hidden": _hidden}
    if kind not in finder:
        raise ModelError(f"kind={kind!r} must be one of {', '.join(finder)}")
    known = {id(weight.parameter): vars(weight) for weight in model_weights(model)}
    found = []
    for unit in finder[kind](model):
        parts = (replace(part, **known.get(id(part.parameter), {})) for part in unit.parts)
        found.append(replace(unit, parts=tuple(parts)))
    _check_parts(found)
    return found


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
    work as for any other.

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
        ModelError: nothing to prune, a density out of range, or weights that cannot be cut. The model is
            then unchanged.
    """
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
        unit.name: _chosen(unit, density, scores or {})
        for kind, density in wanted.items()
        if density is not None
        for unit in found[kind]
    }
    before = _parameters(model)
    for unit in (unit for each in found.values() for unit in each):
        if unit.name in chosen:
            unit.scope().block.apply_mask(~chosen[unit.name].unsqueeze(1))
    cuts = []
    for kind, each in found.items():
        kept = {unit.name: _kept(unit) for unit in each}
        if uniform and each:
            _pad(kept, each)
        for unit in each:
            _shrink(unit, kept[unit.name])
            cuts.append(Cut(unit.name, kind, unit.count, int(kept[unit.name].sum())))
    problem = _describe(model, cuts, found)
    report = CompactReport(tuple(cuts), before, _parameters(model), problem)
    if problem:
        warnings.warn(problem, stacklevel=2)
    return report


# Finding units ---------------------------------------------------------------------------------


def _linears(module: nn.Module, names: tuple[str, ...]) -> list[nn.Linear] | None:
    found = [getattr(module, name, None) for name in names]
    return found if all(isinstance(each, nn.Linear) for each in found) else None  # type: ignore[return-value]


def _rows(linear: nn.Linear, size: int = 1, start: int = 0, role: Any = "writes") -> Iterator[Part]:
    """Output features of a linear: rows of its weight, entries of its bias."""
    for attribute in ("weight", "bias") if linear.bias is not None else ("weight",):
        yield Part("", linear, attribute, dim=0, size=size, start=start, role=role)


def _channels(model: nn.Module) -> Iterator[Unit]:
    for name, module in model.named_modules():
        for inputs, output in _MLPS:
            linears = _linears(module, (*inputs, output))
            if linears is None:
                continue
            *ins, out = linears
            count = out.in_features
            if any(linear.out_features != count for linear in ins):
                continue
            # An activation may not map zero to zero: only what a gate multiplies is surely zero.
            roles = ("scales", "writes") if len(ins) == 2 else ("scales",)
            parts = [p for i, r in zip(ins, roles, strict=True) for p in _rows(i, role=r)]
            yield Unit(name, "channels", module, count, (*parts, Part("", out, dim=1)))
        fused = _linears(module, _FUSED)
        if fused is not None and fused[0].out_features == 2 * fused[1].in_features:
            both, out = fused
            count = out.in_features
            parts = [*_rows(both, role="scales"), *_rows(both, start=count)]
            yield Unit(name, "channels", module, count, (*parts, Part("", out, dim=1)))


def _heads(model: nn.Module) -> Iterator[Unit]:
    for name, module in model.named_modules():
        linears = _linears(module, _ATTENTION)
        size = getattr(module, "head_dim", None)
        if linears is None or not isinstance(size, int):
            continue
        q, k, v, o = linears
        groups = k.out_features // size
        wide = q.out_features // max(groups, 1)
        if (
            k.out_features != v.out_features
            or groups * size != k.out_features
            or wide * groups != q.out_features
            or wide % size
            or o.in_features != q.out_features
        ):
            continue
        parts = (
            *_rows(q, wide, role="scales"),
            *_rows(k, size, role="scales"),
            *_rows(v, size),
            Part("", o, dim=1, size=wide),
        )
        yield Unit(name, "heads", module, groups, parts)


def _hidden(model: nn.Module) -> Iterator[Unit]:
    """The residual stream: the embedding, every block's readers and writers, the norms, and the head."""
    readers = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "gate_up_proj", "lm_head"}
    writers = {"o_proj", "down_proj"}
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    if len(embeddings) != 1:
        return
    count = embeddings[0].embedding_dim
    parts = [Part("", embeddings[0], dim=1, role="writes")]
    for name, module in model.named_modules():
        own = name.rpartition(".")[2]
        if isinstance(module, nn.Linear):
            if own in writers and module.out_features == count:
                parts += _rows(module)
            elif own in readers and module.in_features == count:
                if module.weight is not embeddings[0].weight:
                    parts.append(Part("", module, dim=1))
            else:
                raise ModelError(
                    f"{name} reads or writes the residual stream in a way not known here; give "
                    "channels= and heads= alone"
                )
        elif not isinstance(module, nn.Embedding):
            weight = module._parameters.get("weight")
            if weight is None or weight.shape != (count,):
                continue
            if _eps(module) is None or getattr(module, "bias", None) is not None:
                raise ModelError(
                    f"{name} is a {type(module).__name__}: only an RMS norm, with its eps, gives the same "
                    "output without the zero channels"
                )
            parts.append(Part("", module, dim=0, role="scales"))
    if len(parts) > 1:
        yield Unit("residual stream", "hidden", model, count, tuple(parts))


def _eps(norm: nn.Module) -> str | None:
    """The attribute that holds an RMS norm's eps."""
    if "rmsnorm" not in type(norm).__name__.lower():
        return None
    return next(
        (a for a in ("variance_epsilon", "eps") if isinstance(getattr(norm, a, None), float)), None
    )


def _check_parts(found: list[Unit]) -> None:
    for unit in found:
        for part in unit.parts:
            kind = type(part.module).__name__
            if hasattr(part.module, "parametrizations"):
                raise ModelError(
                    f"a {kind} of {unit.name} is parametrized; call s3tensor.finalize, then densify"
                )
            computed = computed_by_hook(part.module, part.attribute)
            if computed:
                raise ModelError(f"a {kind} of {unit.name} cannot be cut: {computed}")
            tensor = part.parameter
            if hasattr(tensor, "__tensor_flatten__") or not tensor.dtype.is_floating_point:
                raise ModelError(
                    f"a {kind} of {unit.name} holds a {type(tensor).__name__} of {tensor.dtype}: compact "
                    "dense weights, then compress"
                )
            if len(part.places) > 1 and unit.kind != "hidden":
                names = " and ".join(place.path for place in part.places)
                raise ModelError(f"{names} are one parameter, which cannot be cut")


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


def _shrink(unit: Unit, kept: Tensor) -> None:
    """Cut every parameter of a unit to the blocks that stay."""
    if bool(kept.all()):
        return
    left = int(kept.sum())
    # Parts of one parameter along one dim are cut together.
    kept_of: dict[tuple[str, int], tuple[Part, Tensor]] = {}
    for part in unit.parts:
        key = (part.path, part.dim)
        whole = torch.ones(part.parameter.shape[part.dim], dtype=torch.bool)
        _, keep = kept_of.setdefault(key, (part, whole))
        keep[part.start : part.start + unit.count * part.size] = kept.repeat_interleave(part.size)
    if unit.kind == "hidden":
        _rescale_norms(unit, left)
    for part, keep in kept_of.values():
        old = part.parameter
        index = keep.nonzero().flatten().to(old.device)
        cut = old.detach().index_select(part.dim, index)
        part.replace(nn.Parameter(cut, requires_grad=old.requires_grad))
        for place in part.places:  # a head that is the embedding, too
            _resize(place.module, part.dim, len(index))
    for attribute, value in _sizes(unit, left).items():
        if isinstance(getattr(unit.module, attribute, None), int):
            setattr(unit.module, attribute, value)


def _resize(module: nn.Module, dim: int, size: int) -> None:
    """Update the size that a module states of itself."""
    if isinstance(module, nn.Linear):
        if dim == 1:
            module.in_features = size
        else:
            module.out_features = size
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = size


def _rescale_norms(unit: Unit, left: int) -> None:
    """A mean of squares over fewer channels is larger: the norms' weights and eps compensate."""
    ratio = unit.count / left
    for part in unit.parts:
        if part.role == "scales":
            with torch.no_grad():
                part.parameter.mul_(math.sqrt(ratio))
            name = _eps(part.module)
            assert name is not None
            setattr(part.module, name, getattr(part.module, name) * ratio)


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


def _describe(model: nn.Module, cuts: list[Cut], found: dict[Kind, list[Unit]]) -> str:
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
            others = [n for n, m in model.named_modules() if _eps(m) and m not in scaled]
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
    except Exception as error:
        vars(config).clear()
        vars(config).update(before)
        reason = " ".join(str(error).split())
        return (
            f"{type(config).__name__} refuses {values} ({reason}): from_pretrained cannot rebuild this "
            "model; choose other densities, or use torch.save"
        )
    return ""


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _span(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}"
