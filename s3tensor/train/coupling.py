"""Training under a coupling: one decision over several weights, taken once a step by their owner."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from s3tensor.errors import NonFiniteError, PatternError
from s3tensor.model.weights import is_linear
from s3tensor.paper import BlockSpec, Scopes, ScopeSpec, View
from s3tensor.pattern import Pattern
from s3tensor.train.masked import (
    Masked,
    StraightThrough,
    changed_fraction,
    check_options,
    mask_problem,
    weight_name,
)
from s3tensor.train.schedule import Density

MODES = ("fixed", "ste", "srste")


@dataclass(frozen=True)
class CouplingBudget:
    """How many blocks each scope of a coupling keeps, and of how many."""

    name: str
    keep: int
    blocks_per_scope: int

    @property
    def density(self) -> float:
        """Kept fraction of the blocks."""
        return self.keep / self.blocks_per_scope

    def __str__(self) -> str:
        return f"{self.name}, which keeps {self.keep} of {self.blocks_per_scope}"


class Coupling:
    """The owner of the masks of several weights: one decision over all of them, taken once a step.

    It holds the geometry of a coupling, not its tensors: each decision is given the weights, so that a model
    may be copied, moved or loaded. Masks keep the largest blocks by Euclidean norm over all tensors,
    as :meth:`s3tensor.ScopeSpec.hard_threshold` keeps them.

    Args:
        scopes: a ``ScopeSpec``, over a ``BlockCoupling`` as a rule, or a ``ScopeCoupling``.
        keep: blocks of each scope that stay: an int, or a density in (0, 1) as a float.
        mode: ``"fixed"``, ``"ste"`` or ``"srste"``, as in :class:`s3tensor.S3Sparse`.
        refresh: steps between decisions.
        schedule: a falling :class:`s3tensor.Density`.
        decay: of ``"srste"``.
        name: for messages; by default that of the scopes.

    Attributes:
        weights: the tensors of the coupling, in its order; each is the parameter of one member.
        members: a :class:`CoupledSparse` for each of them.

    Raises:
        PatternError: a budget that does not fit, a schedule that does not end at it, or a weight on meta.
        OptionError: an unknown mode, or an option that is out of range or of another mode.
    """

    def __init__(
        self,
        scopes: Scopes,
        keep: int | float,
        mode: str = "ste",
        *,
        refresh: int = 1,
        schedule: Density | None = None,
        decay: float | None = None,
        name: str | None = None,
    ) -> None:
        # 'soft' is none: its shortened weights would need every tensor in each forward.
        self.decay = check_options(mode, MODES, refresh, schedule, decay, " of a coupling")
        label = name or scopes.name or "a coupling"
        self.budget = CouplingBudget(
            label, _keep_of(keep, scopes, label), scopes.numblk_per_scope()
        )
        if schedule is not None:
            schedule.check(self.budget)
        self.mode, self.refresh, self.schedule = mode, refresh, schedule
        self.steps = 0
        self.frozen = False
        self.weights: list[Tensor] = []
        for spec in scopes.blocks():
            root = _parameter_of(spec.view)
            if not any(root is weight for weight in self.weights):
                self.weights.append(root)
        if any(weight.is_meta for weight in self.weights):
            raise PatternError(
                f"{label}: a weight is on the meta device, without values to decide by; load the model "
                "first, then couple its weights"
            )
        # The same geometry over meta tensors, so that no parameter is held twice.
        self.scopes: Scopes = copy.deepcopy(
            scopes, {id(w): _without_memory(w) for w in self.weights}
        )
        places = [
            next(i for i, weight in enumerate(self.weights) if weight is _parameter_of(spec.view))
            for spec in scopes.blocks()
        ]
        self.specs = list(zip(self.scopes.blocks(), places, strict=True))
        patterns = _patterns(scopes, self.budget.keep)
        self.members = [
            CoupledSparse(self, i, _pattern_of(i, places, patterns))
            for i in range(len(self.weights))
        ]
        for member, mask in zip(self.members, self.decide(self.weights), strict=True):
            member.mask = mask

    @property
    def name(self) -> str:
        """Its name in messages."""
        return self.budget.name

    @property
    def density(self) -> float:
        """Kept fraction of the blocks now."""
        return self.keep_now() / self.budget.blocks_per_scope

    def keep_now(self, steps: int | None = None) -> int:
        """Blocks kept in each scope after ``steps`` steps, by default those counted."""
        steps = self.steps if steps is None else steps
        return self.budget.keep if self.schedule is None else self.schedule.keep(steps, self.budget)

    def decide(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """A mask for each weight, bool, True where kept; elements that no block covers stay.

        Args:
            weights: the dense weights, in the order of :attr:`weights`.

        Raises:
            NonFiniteError: NaN or Inf in one of them.
        """
        values = {spec: _elements_of(spec.view, weights[i]) for spec, i in self.specs}
        try:
            found = self.scopes.get_masks(nnz=self.keep_now(), values=values)
        except NonFiniteError as error:
            raise NonFiniteError(f"{self.name}: {error}") from None
        masks = [torch.ones(w.shape, dtype=torch.bool, device=w.device) for w in weights]
        for spec, i in self.specs:
            masks[i] &= _mask_of_parameter(spec.view, found[spec])
        return masks

    def advance(self, weights: Sequence[Tensor]) -> None:
        """Count one optimizer step, and decide again when due; ``s3tensor.step`` calls it."""
        self.steps += 1
        if self.mode == "fixed" or self.frozen:
            return
        moved = self.keep_now() != self.keep_now(self.steps - 1)
        if moved or self.steps % self.refresh == 0:
            for member, mask in zip(self.members, self.decide(weights), strict=True):
                held = member.current_mask(mask)
                member._flips = changed_fraction(mask, held)
                held.copy_(mask)  # in place: compiled graphs keep reading it

    def freeze(self) -> None:
        """Keep the masks as they are from now on.

        Raises:
            PatternError: a schedule that has not ended.
        """
        self.check_ended()
        self.frozen = True

    def check_ended(self) -> None:
        """Raise what :meth:`freeze` would."""
        if self.keep_now() != self.budget.keep:
            raise PatternError(
                f"{self.name} is at density {self.density:g} after {self.steps} steps, above its "
                f"{self.budget.density:g}; freeze once the schedule has ended"
            )

    def facts(self) -> dict[str, Any]:
        """What a state dict holds of it; ``coupling`` is a hash of the geometry."""
        parts = [
            (i, spec.view.shape, spec.view.stride, spec.view.offset, spec.shape)
            for spec, i in self.specs
        ]
        scopes = [(scope.shape, order) for scope, order in self.scopes.members]
        orders = [order for scope, _ in self.scopes.members for _, order in scope.block.members]
        said = repr((parts, scopes, orders, self.budget.keep))
        return {
            "coupling": hashlib.sha256(said.encode()).hexdigest()[:16],
            "name": self.name,
            "keep": self.budget.keep,
            "steps": self.steps,
            "frozen": self.frozen,
        }


class CoupledSparse(Masked):
    """The parametrization of one weight of a :class:`Coupling`: it applies the mask that its owner decides.

    The mask is a buffer, set at registration and by ``s3tensor.step``; forwards do not change it. The owner's
    counts are in the extra state of every member.

    Args:
        owner: the coupling.
        place: index of the weight in the coupling.
        pattern: that the weight alone satisfies, and is compressed under; None without one.
    """

    _FACTS = ("coupling", "place", "steps", "frozen")

    def __init__(self, owner: Coupling, place: int, pattern: Pattern | None) -> None:
        super().__init__()
        self.owner, self.place, self.pattern = owner, place, pattern
        self.mode, self.decay = owner.mode, owner.decay
        self._flips = None
        self.register_buffer("mask", None)

    @property
    def refresh(self) -> int:  # type: ignore[override]
        return self.owner.refresh

    @property
    def schedule(self) -> Density | None:  # type: ignore[override]
        return self.owner.schedule

    @property
    def steps(self) -> int:  # type: ignore[override]
        return self.owner.steps

    @property
    def frozen(self) -> bool:  # type: ignore[override]
        return self.owner.frozen

    @property
    def needs_steps(self) -> bool:
        return self.mode != "fixed" and not self.frozen

    def pattern_in(self, owner: nn.Module) -> Pattern | None:
        """The weight's pattern in a linear layer; biases and embeddings have no compressed product."""
        return self.pattern if is_linear(owner) and self._ndim == 2 else None

    @property
    def _ndim(self) -> int:
        return 0 if self.mask is None else self.mask.ndim

    @property
    def density(self) -> float:
        assert self.mask is not None
        return float(self.mask.float().mean())

    @property
    def has_ended(self) -> bool:
        return self.owner.keep_now() == self.owner.budget.keep

    def current_mask(self, weight: Tensor) -> Tensor:
        assert self.mask is not None
        if weight.is_meta:  # it has the shape alone
            return self.mask.to(weight.device)
        if self.mask.device != weight.device:
            self.mask = self.mask.to(weight.device)
        self._unset = False
        return self.mask

    def forward(self, weight: Tensor) -> Tensor:
        """``weight`` with pruned blocks zero."""
        mask = self.current_mask(weight)
        if self.mode == "fixed":
            return torch.where(mask, weight, 0)
        masked: Tensor = StraightThrough.apply(weight, mask, None, self.decay)
        return masked

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The dense original of a weight that is registered, or assigned later: the weight itself."""
        if self.mask is not None and weight.shape != self.mask.shape:
            raise PatternError(
                f"weight {self.place} of {self.owner.name} has shape {tuple(self.mask.shape)}, got "
                f"{tuple(weight.shape)}"
            )
        return weight

    def facts(self) -> dict[str, Any]:
        """The owner's facts, and the place."""
        return {**self.owner.facts(), "place": self.place}

    def set_extra_state(self, state: Tensor) -> None:
        """Take the owner's counts; :meth:`_load_from_state_dict` has checked the rest."""
        facts = self.saved_facts(state)
        self.owner.steps, self.owner.frozen = facts["steps"], facts["frozen"]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any
    ) -> None:  # rest: local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        saved = state_dict.get(f"{prefix}_extra_state")
        if isinstance(saved, Tensor):
            where = weight_name(prefix)
            try:
                facts = self.saved_facts(saved)
                theirs = facts["coupling"], facts["place"]
                sound = type(facts["steps"]) is int and type(facts["frozen"]) is bool
            except (TypeError, ValueError):
                theirs, sound = (None, None), False
            mine = self.owner.facts()["coupling"], self.place
            if theirs != mine or not sound:
                rest[-1].append(
                    f"{where}: the state dict is not of {self.owner.budget}, of these weights in this "
                    "order; couple the weights as they were when it was saved"
                )
                return
            mask = state_dict.get(f"{prefix}mask")
            if isinstance(mask, Tensor) and not self._fits(mask, facts["steps"]):
                rest[-1].append(
                    f"{where}: the mask is not one of {self.owner.budget}; load what was saved under the "
                    "same coupling and schedule"
                )
                return
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _fits(self, mask: Tensor, steps: int) -> bool:
        """Whether the owner may have decided a mask, as far as one weight can tell."""
        ended = self.owner.keep_now(steps) == self.owner.budget.keep
        shaped = self.mask is not None and mask.shape == self.mask.shape  # else torch raises
        if self.pattern is None or not ended or not shaped:
            return mask.dtype == torch.bool
        return not mask_problem(mask, self.pattern.bind(tuple(mask.shape)))

    def extra_repr(self) -> str:
        parts = [f"{self.owner.budget}", f"weight {self.place}", f"mode={self.mode!r}"]
        return ", ".join(parts + ["frozen"] * self.frozen)


# the geometry of a coupling ---------------------------------------------------------------------------


def _keep_of(keep: int | float, scopes: Scopes, label: str) -> int:
    n = scopes.numblk_per_scope()
    if isinstance(keep, float) and 0 < keep < 1:
        keep = max(1, int(keep * n + 0.5))
    if type(keep) is not int or not 1 <= keep <= n:
        raise PatternError(
            f"keep={keep!r} of the {n} blocks in each scope of {label}; give an int from 1 to {n}, or a "
            "density as a float between 0 and 1"
        )
    return keep


def _parameter_of(view: View) -> Tensor:
    """The tensor under a view, or under nested views."""
    return _parameter_of(view.param) if isinstance(view.param, View) else view.param


def _without_memory(weight: Tensor) -> Tensor:
    return torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device="meta")


def _elements_of(view: View, weight: Tensor) -> Tensor:
    """The elements of ``weight`` in the view's shape."""
    return view.of(_elements_of(view.param, weight) if isinstance(view.param, View) else weight)


def _mask_of_parameter(view: View, mask: Tensor) -> Tensor:
    """A mask of the view's shape in the weight's shape, True outside the view."""
    whole = view.to_param(mask, fill=True)
    return _mask_of_parameter(view.param, whole) if isinstance(view.param, View) else whole


def _patterns(scopes: Scopes, keep: int) -> list[Pattern | None]:
    """The pattern that each tensor alone satisfies: that of its blocks, if a block spans all tensors."""
    if not isinstance(scopes, ScopeSpec):
        return [None for _ in scopes.blocks()]  # its share of a scope's budget is unknown
    found: list[Pattern | None] = []
    for spec, order in scopes.block.members:
        shape = [0] * len(order)
        for axis, size in zip(order, scopes.shape, strict=True):
            shape[axis] = size
        try:
            found.append(ScopeSpec(BlockSpec(spec.view, spec.shape), shape).pattern(keep))
        except PatternError:  # a part of a parameter, or a view without a rule
            found.append(None)
    return found


def _pattern_of(place: int, places: list[int], patterns: list[Pattern | None]) -> Pattern | None:
    mine = [pattern for i, pattern in zip(places, patterns, strict=True) if i == place]
    return mine[0] if len(mine) == 1 else None
