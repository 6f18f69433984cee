"""Training under a pattern, and leaving it: ``S3Sparse``, ``finalize`` and ``sparsify_``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from s3tensor import ops
from s3tensor.errors import ModelError, NonFiniteError, PatternError
from s3tensor.mask import satisfies
from s3tensor.pattern import Pattern
from s3tensor.tensor import StructuredSparseTensor

MODES = ("ste", "fixed")


class _StraightThrough(torch.autograd.Function):
    """``weight * mask`` whose gradient passes to every weight, pruned ones too."""

    @staticmethod
    def forward(weight: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, weight, 0)  # not weight * mask: its pruned zeros carry a sign

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class S3Sparse(nn.Module):
    """A parametrization: the weight that a module uses satisfies a pattern, and its dense original trains.

    Args:
        pattern: a pattern or its string.
        mode: ``"ste"`` keeps, at every forward, the blocks of the largest magnitude at that time, and
            passes the gradient straight through to all weights, so that a pruned weight can come back
            (Bengio et al., arXiv 1308.3432). ``"fixed"`` keeps the blocks that were largest at
            registration; pruned weights get no gradient. Its mask is a buffer and is in the state dict.

    Example:
        >>> linear = nn.Linear(64, 32)
        >>> parametrize.register_parametrization(linear, "weight", S3Sparse("2:4"))
        ParametrizedLinear(...)
        >>> _ = finalize(linear)  # after training: a compressed weight, no parametrization

    Raises:
        PatternError: a pattern that does not parse; at registration, one that does not fit the weight,
            or a weight that is not floating point.
        NonFiniteError: at registration and at each forward, NaN or Inf in the weight.
        ValueError: an unknown mode.
    """

    mask: Tensor | None

    def __init__(self, pattern: Pattern | str, mode: str = "ste") -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"S3Sparse mode {mode!r} must be one of {', '.join(MODES)}")
        self.pattern = Pattern.parse(pattern)
        self.mode = mode
        self._text = str(self.pattern)  # what the op takes: a constant for torch.compile
        self.register_buffer("mask", None)

    def current_mask(self, weight: Tensor) -> Tensor:
        """The mask that :meth:`forward` applies to ``weight``."""
        if self.mode == "ste":
            return ops.project(weight.detach(), self._text)
        if self.mask is None:
            raise PatternError("S3Sparse('fixed') has no mask before register_parametrization")
        return self.mask

    def forward(self, weight: Tensor) -> Tensor:
        """``weight`` with pruned blocks zero; same shape, dtype and device."""
        mask = self.current_mask(weight)
        if self.mode == "ste":
            masked: Tensor = _StraightThrough.apply(weight, mask)
            return masked
        return torch.where(mask, weight, 0)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The dense original of a weight that is registered, or assigned later: the weight itself."""
        if isinstance(weight, StructuredSparseTensor):
            raise PatternError("the weight is compressed already; parametrize weight.to_dense()")
        if not weight.is_floating_point():
            raise PatternError(f"S3Sparse needs a floating-point weight, got {weight.dtype}")
        self.pattern.bind(weight.shape)
        if self.mode == "fixed" and self.mask is None:
            self.mask = ops.project(weight.detach(), self._text)
        elif self.mode == "fixed" and self.mask is not None and self.mask.shape != weight.shape:
            raise PatternError(
                f"this S3Sparse holds the mask of a weight of shape {tuple(self.mask.shape)}, not "
                f"{tuple(weight.shape)}; make one S3Sparse for each weight"
            )
        return weight

    def extra_repr(self) -> str:
        return f"{self.pattern}, mode={self.mode!r}"


def finalize(module: nn.Module) -> nn.Module:
    """Replace every weight under :class:`S3Sparse` by a compressed parameter, in place.

    Each parametrization is removed, and what the last forward used is left, value for value, as a
    ``StructuredSparseTensor`` parameter without gradient. Weights that shared a dense original share the
    compressed one. Optimizers still hold the dense originals: drop them.

    Returns:
        ``module``.

    Raises:
        ModelError: nothing to finalize: no ``S3Sparse`` and no compressed weight. (With compressed
            weights only, as after an earlier call, nothing is done.)
        PatternError: an ``S3Sparse`` under another parametrization, so that the weight that the module
            uses need not satisfy the pattern. Nothing is changed then.
    """
    found = list(_parametrized(module))
    if not found:
        if any(isinstance(p, StructuredSparseTensor) for p in module.parameters()):
            return module
        raise ModelError(
            f"{type(module).__name__} has no S3Sparse parametrization to finalize; register one with "
            "torch.nn.utils.parametrize.register_parametrization, or compress with s3tensor.sparsify_"
        )
    made: dict[int, list[nn.Parameter]] = {}  # by the identity of the dense original
    with torch.no_grad():
        for owner, name, chain in found:
            original = chain.original
            weight = original
            for step in list(chain)[:-1]:
                weight = step(weight)
            last = chain[-1]
            assert isinstance(last, S3Sparse)
            compressed = StructuredSparseTensor.from_dense(
                weight, last.pattern, last.current_mask(weight)
            )
            shared = made.setdefault(id(original), [])
            same = [p for p in shared if compressed.same_layout(p) and torch.equal(compressed, p)]
            if not same:
                same = [nn.Parameter(compressed, requires_grad=False)]
                shared.extend(same)
            _own_class(owner)
            parametrize.remove_parametrizations(owner, name, leave_parametrized=False)
            setattr(owner, name, same[0])
    return module


def _own_class(owner: nn.Module) -> None:
    """Give a parametrized module a class of its own.

    ``copy.deepcopy`` lets the copy (an EMA model, say) share the class that torch made for the
    parametrization, and ``remove_parametrizations`` deletes the property from it, for both.
    """
    cls = type(owner)
    body = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    owner.__class__ = type(cls.__name__, cls.__bases__, body)


def _parametrized(module: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Each (owner, tensor name, parametrization list) whose last step is an S3Sparse."""
    for owner in list(module.modules()):
        if not parametrize.is_parametrized(owner):
            continue
        for name, chain in list(owner.parametrizations.items()):  # type: ignore[union-attr,operator]
            at = [isinstance(step, S3Sparse) for step in chain]
            if not any(at):
                continue
            if sum(at) != 1 or not at[-1]:
                raise PatternError(
                    f"{type(owner).__name__}.{name} has parametrizations after S3Sparse; register "
                    "S3Sparse last, so that the weight in use satisfies its pattern"
                )
            yield owner, name, chain


# whole models -----------------------------------------------------------------------------------------

# Output embeddings, by the names that Hugging Face models give them. Their rows are tokens, most of them
# rare, and pruning them costs far more accuracy than their share of the bytes saves.
_HEADS = ("lm_head", "embed_out", "output_projection", "score", "classifier")


@dataclass(frozen=True)
class SparsifyRow:
    """What :func:`sparsify_` did to one linear layer."""

    name: str
    pattern: str
    action: str  # "compressed" (it satisfied the pattern), "projected" or "skipped"
    bytes_before: int
    bytes_after: int
    reason: str = ""


@dataclass(frozen=True)
class SparsifyReport:
    """Rows of :func:`sparsify_`, one for each linear layer, in the model's order."""

    rows: tuple[SparsifyRow, ...]

    @property
    def bytes_before(self) -> int:
        """Bytes of all weights in the report, dense."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of all weights in the report, as they are now."""
        return sum(row.bytes_after for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[SparsifyRow]:
        return iter(self.rows)

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=4)
        lines = [f"{'name':<{width}}  {'action':<10}  {'before':>12}  {'after':>12}  note"]
        for row in self.rows:
            note = row.reason or row.pattern
            lines.append(
                f"{row.name:<{width}}  {row.action:<10}  {row.bytes_before:>12,}  "
                f"{row.bytes_after:>12,}  {note}"
            )
        lines.append(
            f"{'total':<{width}}  {'':<10}  {self.bytes_before:>12,}  {self.bytes_after:>12,}  bytes"
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class _Layer:
    """A linear layer and its weight as the pattern sees it: (out_features, in_features)."""

    name: str
    module: nn.Module
    parameter: Tensor
    transposed: bool  # stored as (in_features, out_features), like the Conv1D of transformers

    @property
    def upright(self) -> Tensor:
        weight = self.parameter.detach()
        return weight.t() if self.transposed else weight

    @property
    def nbytes(self) -> int:
        if isinstance(self.parameter, StructuredSparseTensor):
            return self.parameter.nbytes_compressed
        return self.parameter.numel() * self.parameter.element_size()


def sparsify_(
    model: nn.Module,
    pattern: Pattern | str,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> SparsifyReport:
    """Compress the weights of linear layers in place; those that do not satisfy ``pattern`` are projected.

    Linear layers are ``nn.Linear`` and the ``Conv1D`` of transformers, whose weight is stored transposed.
    Projection keeps the blocks of the largest magnitude; prune with data first for better accuracy
    (:mod:`s3tensor.prune`). Compressed parameters have no gradient. All weights are checked before the
    first one is changed.

    Args:
        model: a module; its own weight counts too when it is a linear layer.
        pattern: a pattern or its string.
        filter_fn: ``filter_fn(module, name)`` is True for the layers to compress. By default all but
            output heads (``lm_head`` and the like) and weights that several modules share. With a filter,
            a shared weight is compressed once if every module that holds it is chosen, else skipped.

    Returns:
        One row for each linear layer: what was done, bytes before and after, and why it was skipped.
        Layers that the pattern does not fit are skipped.

    Raises:
        PatternError: a pattern that does not parse.
        ModelError: a model without linear layers.
        NonFiniteError: NaN or Inf in a weight that is to be compressed.
    """
    pattern = Pattern.parse(pattern)
    layers = list(_linear_layers(model))
    if not layers:
        raise ModelError(f"{type(model).__name__} has no linear layers to compress")
    names = {layer.name for layer in layers if filter_fn and filter_fn(layer.module, layer.name)}
    owners = _owners(model)
    reasons: dict[str, str] = {}
    for layer in layers:
        holders = owners.get(id(layer.parameter), {layer.name})
        reason = _reason_to_skip(layer, pattern, holders, names if filter_fn else None)
        if reason:
            reasons[layer.name] = reason
        elif not bool(torch.isfinite(layer.parameter).all()):
            raise NonFiniteError(
                f"{layer.name}: the weight holds NaN or Inf; nothing was compressed"
            )
    rows = []
    made: dict[tuple[int, bool], tuple[nn.Parameter, str]] = {}
    for layer in layers:
        before = layer.nbytes
        if layer.name in reasons:
            row = SparsifyRow(
                layer.name, str(pattern), "skipped", before, before, reasons[layer.name]
            )
            rows.append(row)
            continue
        key = (id(layer.parameter), layer.transposed)
        if key not in made:
            made[key] = _compress(layer, pattern)
        parameter, action = made[key]
        layer.module.weight = parameter
        after = parameter.nbytes_compressed  # type: ignore[attr-defined]
        rows.append(SparsifyRow(layer.name, str(pattern), action, before, after))
    return SparsifyReport(tuple(rows))


def _compress(layer: _Layer, pattern: Pattern) -> tuple[nn.Parameter, str]:
    action = "compressed" if satisfies(layer.upright, pattern) else "projected"
    # Projection keeps every non-zero block of a weight that satisfies the pattern already.
    weight: Tensor = StructuredSparseTensor.from_dense(layer.upright, pattern)
    weight = weight.t() if layer.transposed else weight
    return nn.Parameter(weight, requires_grad=False), action


def _reason_to_skip(
    layer: _Layer, pattern: Pattern, holders: set[str], chosen: set[str] | None
) -> str:
    """Why a layer stays as it is, or an empty string."""
    if parametrize.is_parametrized(layer.module, "weight"):
        return "parametrized; call s3tensor.finalize"
    if isinstance(layer.parameter, StructuredSparseTensor):
        return "compressed already"
    if chosen is not None and layer.name not in chosen:
        return "left out by the filter"
    if chosen is None and layer.name.rpartition(".")[2] in _HEADS:
        return "output head"
    if len(holders) > 1 and (chosen is None or not holders <= chosen):
        return f"shared with {', '.join(sorted(holders - {layer.name}))}"
    try:
        pattern.bind(layer.upright.shape)
    except PatternError as error:
        return str(error)
    if not layer.parameter.is_floating_point():
        return f"dtype {layer.parameter.dtype}"
    return ""


def _linear_layers(model: nn.Module) -> Iterator[_Layer]:
    for name, module in model.named_modules():
        transposed = is_conv1d(module)
        weight = getattr(module, "weight", None)
        if (transposed or isinstance(module, nn.Linear)) and isinstance(weight, Tensor):
            yield _Layer(name or type(module).__name__, module, weight, transposed)


def is_conv1d(module: nn.Module) -> bool:
    """True for the ``Conv1D`` of transformers, a linear that stores its weight transposed."""
    # By class name and shape, so that transformers need not be imported, nor installed.
    return (
        type(module).__name__ == "Conv1D"
        and isinstance(getattr(module, "nf", None), int)
        and getattr(getattr(module, "weight", None), "ndim", 0) == 2
    )


def _owners(model: nn.Module) -> dict[int, set[str]]:
    """For each parameter, by identity, the modules that hold it."""
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(name or type(module).__name__)
    return owners
