"""Units of a model: channels and heads that can be removed, each with every parameter that shares them.

A channel of an MLP is a row of ``gate_proj`` and ``up_proj`` with a column of ``down_proj``; a key-value
group of an attention is its rows of ``q_proj``, ``k_proj`` and ``v_proj`` with columns of ``o_proj``; a
channel of the residual stream is a column or row of every weight that reads or writes it. Each is a block
of a :class:`s3tensor.BlockCoupling`, and the blocks of one unit compete in one scope (S3, arXiv
2604.11315, section 3). Units are found by the names and shapes of their parts, without transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from s3tensor.errors import ModelError
from s3tensor.model.outputs import computes_rms_norm
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

    def slices(self, blocks: Tensor) -> Tensor:
        """The blocks, (count,) bool, as slices of the parameter's dim, bool; False outside the part."""
        found = torch.zeros(self.parameter.shape[self.dim], dtype=torch.bool)
        found[self.start : self.start + len(blocks) * self.size] = blocks.repeat_interleave(
            self.size
        )
        return found


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
        unknown: a parameter of the module that would have to be cut too, in a way not known here, or empty.
            Such a unit can be pruned, and not compacted.
    """

    name: str
    kind: Kind
    module: nn.Module
    count: int
    parts: tuple[Part, ...]
    unknown: str = ""

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
            yield _mlp(name, module, out, parts)
        fused = _linears(module, _FUSED)
        if fused is not None and fused[0].out_features == 2 * fused[1].in_features:
            both, out = fused
            count = out.in_features
            parts = [*_rows(both, role="scales"), *_rows(both, start=count)]
            yield _mlp(name, module, out, parts)


def _mlp(name: str, module: nn.Module, out: nn.Linear, parts: list[Part]) -> Unit:
    count, own = out.in_features, {*out.parameters(), *(part.parameter for part in parts)}
    unknown = [
        path
        for path, parameter in module.named_parameters()
        # Of a layer that holds its MLP's linears itself, others have a side of the residual stream.
        if parameter not in own and count in parameter.shape and count != out.out_features
    ]
    all_parts = (*parts, Part("", out, dim=1))
    return Unit(name, "channels", module, count, all_parts, _unknown(name, unknown, "channels"))


def _unknown(name: str, parameters: list[str], kind: Kind) -> str:
    if not parameters:
        return ""
    others = [each for each in ("channels", "heads", "hidden") if each != kind]
    return (
        f"{name}.{parameters[0]} is a part of {name} that would have to be cut with its {kind} in a way not "
        f"known here; leave {kind} as they are, and cut {' and '.join(others)} alone"
    )


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
        own = {*o.parameters(), *(part.parameter for part in parts)}
        unknown = [
            path
            for path, parameter in module.named_parameters()
            if parameter not in own and not _of_a_head_norm(module, path, parameter, size)
        ]
        unit = Unit(name, "heads", module, groups, parts, _unknown(name, unknown, "heads"))
        yield unit


def _of_a_head_norm(attention: nn.Module, path: str, parameter: Tensor, size: int) -> bool:
    """Whether a parameter is of a norm within each head, which no cut of heads concerns."""
    child, _, rest = path.partition(".")
    kind = type(getattr(attention, child)).__name__.lower()
    return "norm" in kind and "." not in rest and parameter.shape == (size,)


def _hidden(model: nn.Module) -> Iterator[Unit]:
    """The residual stream: the embedding, every block's readers and writers, the norms, and the head."""
    readers = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "gate_up_proj", "lm_head"}
    writers = {"o_proj", "down_proj"}
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    if len(embeddings) != 1:
        return
    count = embeddings[0].embedding_dim
    parts = [Part("", embeddings[0], dim=1, role="writes")]
    modules = dict(model.named_modules())
    known = {embeddings[0].weight}
    for name, module in modules.items():
        parent, _, own = name.rpartition(".")
        if isinstance(module, nn.Linear):
            if own in writers and module.out_features == count:
                parts += _rows(module)
            elif own in readers and module.in_features == count:
                if module.weight is not embeddings[0].weight:
                    parts.append(Part("", module, dim=1))
            else:
                raise _unknown_reader(name)
            known |= set(module.parameters(recurse=False))
        elif _is_norm(module):
            holder = modules[parent]
            inside = any(isinstance(getattr(holder, each, None), nn.Linear) for each in writers)
            if not inside:
                _check_rms_norm(name, module, count)
                parts.append(Part("", module, dim=0, role="scales"))
            known |= set(module.parameters(recurse=False))  # one inside norms what a linear made
    for name, parameter in model.named_parameters():
        if parameter not in known:
            raise _unknown_reader(name)
    if len(parts) > 1:
        yield Unit("residual stream", "hidden", model, count, tuple(parts))


def _unknown_reader(name: str) -> ModelError:
    return ModelError(
        f"{name} reads or writes the residual stream in a way not known here; give channels= and heads= alone"
    )


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not any(module.children())


def _check_rms_norm(name: str, norm: nn.Module, count: int) -> None:
    """Refuse a norm of the residual stream that is not an RMS norm, by its parts and its result."""
    eps = norm_eps(norm)
    weight = norm._parameters.get("weight")
    known = eps and weight is not None and weight.shape == (count,) and len(norm._parameters) == 1
    if not known or not (weight.is_meta or computes_rms_norm(norm, getattr(norm, eps))):  # type: ignore[arg-type, union-attr]
        raise ModelError(
            f"{name} is a {type(norm).__name__}: only an RMS norm with its eps, x / sqrt(mean(x^2) + eps) * "
            "weight, gives the same output without the zero channels; give channels= and heads= alone"
        )


def norm_eps(norm: nn.Module) -> str | None:
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
