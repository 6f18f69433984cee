"""``S3Sparse``: a parametrization that trains a weight under a pattern."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from s3tensor.errors import OptionError, PatternError
from s3tensor.mask.projection import project, run_length
from s3tensor.mask.transposable import check as check_transposable
from s3tensor.mask.transposable import transposable, transposable_mask
from s3tensor.modes import ordinary
from s3tensor.pattern import BoundPattern, Pattern
from s3tensor.tensor.base import Compressed
from s3tensor.train.masked import (
    Fused,
    Masked,
    StraightThrough,
    changed_fraction,
    check_mask,
    check_options,
    fused_kernel,
    magnitude_mask,
    mask_problem,
    shrunk,
    weight_name,
)
from s3tensor.train.schedule import Density

MODES = ("fixed", "ste", "srste", "soft")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

Score = Callable[[Tensor, "S3Sparse"], Tensor]


class S3Sparse(Masked):
    """A parametrization: the weight that a module uses satisfies a pattern, and its dense original trains.

    Args:
        pattern: a pattern or its string.
        mode: what happens to weights that are pruned.

            ``"ste"`` keeps the blocks of the largest magnitude and passes the gradient straight through to
            all weights, so that a pruned weight can come back (Bengio et al., arXiv 1308.3432).

            ``"srste"`` adds ``decay`` times the weight to the gradient of each pruned weight, which stops
            masks from flipping back and forth (SR-STE; A. Zhou et al., arXiv 2102.04010). It is added once
            for each use of the weight in a backward pass, before clipping and the optimizer: with k
            accumulated passes give ``decay / k``; under a ``GradScaler`` multiply it by the scale.

            ``"soft"`` also shortens kept blocks by the norm of the largest dropped one in their scope and
            multiplies all by ``beta``, which makes the forward weight continuous (S-STE; Y. Hu et al., arXiv
            2409.09099, there for 2:4). ``beta`` minimises the error at registration and is then frozen. The
            gradient passes straight through.

            ``"fixed"`` keeps the blocks that were largest at registration, or ``mask``; pruned weights get
            no gradient.
        mask: of ``"fixed"`` alone: bool, True where kept, of the weight's shape, under the pattern.
        refresh: steps between new masks. At 1 each forward takes its mask from the weight. From 2 on the mask
            is a buffer that only ``s3tensor.step(model)`` changes, which counts the steps.
        score: ``"magnitude"``, or a function of the weight and this module that returns the importance of
            each element, in the weight's shape, summed per block. A function is called at registration and
            by ``s3tensor.step``; the weight has its ``.grad`` if that was not cleared.
        schedule: a falling :class:`Density`, counted by ``s3tensor.step``.
        decay: of ``"srste"``, default 2e-4.
        transposed: the weight is stored as (in_features, out_features), and the pattern is of its transpose.
        transposable: for 1:4, 2:4 and 3:4: masks under which the transpose satisfies the pattern too, see
            :func:`s3tensor.transposable`.

    On the meta device it takes no mask. The first forward, or step, after ``to_empty`` takes the mask and
    ``beta`` from the weight, unless a state dict has filled them in; a mask given to ``"fixed"`` stays.

    A held mask (``"fixed"``, refresh above 1, a function as score, a schedule, frozen) is a buffer in the
    state dict; counts are in its extra state. Forwards change neither.

    Example:
        >>> linear = nn.Linear(64, 32)
        >>> parametrize.register_parametrization(linear, "weight", S3Sparse("2:4"))
        ParametrizedLinear(...)
        >>> _ = s3.finalize(linear)  # after training: a compressed weight, no parametrization

    Raises:
        PatternError: a pattern that does not parse; at registration, one that does not fit the weight, a
            weight that is not floating point, a mask that does not satisfy the pattern, or a schedule that
            ends at another density.
        NonFiniteError: NaN or Inf in the weight when a mask is taken. Forwards on a GPU and compiled ones do
            not check: NaN counts as the largest there, and reaches the loss.
        OptionError: an unknown mode, or an option that is out of range or of another mode.
    """

    pattern: Pattern
    beta: Tensor | None
    _FACTS = ("pattern", "transposed", "shape", "steps", "frozen")

    def __init__(
        self,
        pattern: Pattern | str,
        mode: str = "ste",
        *,
        mask: Tensor | None = None,
        refresh: int = 1,
        score: str | Score = "magnitude",
        schedule: Density | None = None,
        decay: float | None = None,
        transposed: bool = False,
        transposable: bool = False,
    ) -> None:
        super().__init__()
        self.decay = check_options(mode, MODES, refresh, schedule, decay)
        if score != "magnitude" and not callable(score):
            raise OptionError(
                f"score={score!r} must be 'magnitude' or a function of weight and S3Sparse"
            )
        if mask is not None and mode != "fixed":
            raise OptionError(f"S3Sparse takes mask= in mode 'fixed' only, got mode {mode!r}")
        if mask is not None and mask.dtype != torch.bool:
            raise PatternError(f"mask has dtype {mask.dtype}; give a bool tensor, True where kept")
        if mask is not None and mask.is_meta:
            raise PatternError(
                "mask is on the meta device, without values; give one on a real device"
            )
        self.pattern = Pattern.parse(pattern)
        self.mode = mode
        self.refresh = refresh
        self.score = score
        self.schedule = schedule
        self.transposed = transposed
        self.transposable = transposable
        self.steps = 0  # counted by advance()
        self.frozen = False
        self._text = str(self.pattern)  # what the ops take: a constant for torch.compile
        self._shape: tuple[int, ...] | None = None  # of the weight, as stored
        self._run = self._budget = 0  # of the bound pattern: M of N:M, and N; constants too
        self._last: Tensor | None = None  # the mask of the last step, where none is held
        self._flips: Tensor | None = None
        self.register_buffer("mask", None if mask is None else mask.detach().clone())
        self.register_buffer("beta", None)

    @property
    def holds_mask(self) -> bool:
        """Whether the mask is a buffer, not taken from the weight at each forward."""
        chosen = self.mode == "fixed" or self.refresh > 1 or self.score != "magnitude"
        return chosen or self.schedule is not None or self.frozen

    # the forward pass ---------------------------------------------------------------------------------

    def current_mask(self, weight: Tensor) -> Tensor:
        """The mask that :meth:`forward` applies to ``weight``: bool, its shape, True where kept."""
        if self._shape is None:  # used without register_parametrization, or after another one
            self.right_inverse(weight)
        if self._unset:
            self._take(weight)
        if self.mask is not None:
            if self.mask.device != weight.device:  # loaded before the device was known
                if weight.is_meta:  # it has the shape alone
                    return self.mask.to(weight.device)
                self.mask = self.mask.to(weight.device)
            return self.mask
        dense = self.upright(weight.detach())
        if self.transposable:
            mask = self.upright(transposable_mask(dense, self._budget))
        else:
            mask = self.upright(magnitude_mask(dense, self._text, self._run, self._budget))
        if self.frozen:  # by freeze() without the weight
            self.mask = mask = ordinary(mask.contiguous())
        return mask

    def forward(self, weight: Tensor) -> Tensor:
        """``weight`` with pruned blocks zero; same shape, dtype and device."""
        if self._unset:
            self._take(weight)
        kernel = fused_kernel(weight) if self._fuses() else None
        if kernel is not None:
            held = None if self.mask is None else self.current_mask(weight)
            keep = self._budget if held is None else 1  # of no meaning there
            through = self.mode != "fixed"
            used: Tensor = Fused.apply(kernel, weight, held, self.beta, self.decay, keep, through)
            return used
        mask = self.current_mask(weight)
        if self.mode == "fixed":
            return torch.where(mask, weight, 0)
        largest = (
            self._run == 4 and self._budget < 4 and self.mask is None and not self.transposable
        )
        keep = self._budget if largest else 0
        masked: Tensor = StraightThrough.apply(
            weight, mask, self.beta, self.decay, self._text, self._run, self.transposed, keep
        )
        return masked

    def _fuses(self) -> bool:
        """Whether one kernel may multiply and, for N:4, also choose the mask or shorten the weight."""
        plain = self._run == 4 and not self.transposed
        if self.mask is not None:
            return self.mask.is_contiguous() and (plain or self.beta is None)
        return plain and not (self.frozen or self.transposable)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The dense original of a weight that is registered, or assigned later: the weight itself."""
        if isinstance(weight, Compressed):
            raise PatternError("the weight is compressed already; parametrize weight.to_dense()")
        if weight.dtype not in _DTYPES:
            raise PatternError(
                f"S3Sparse needs a floating-point weight of 16, 32 or 64 bits, got {weight.dtype}"
            )
        if hasattr(weight, "full_tensor"):
            raise PatternError(
                "the weight is sharded already (a DTensor); register S3Sparse first, then shard"
            )
        bound = self.pattern.bind(self.upright(weight).shape)
        if self.transposable:
            check_transposable(self.pattern, bound.shape)
        held = next((x for x in (self.mask, self._last) if x is not None), None)
        shape = (
            self._shape if held is None and self.beta is not None else getattr(held, "shape", None)
        )
        if shape is not None and shape != weight.shape:
            raise PatternError(
                f"this S3Sparse holds the mask of a weight of shape {tuple(shape)}, not "
                f"{tuple(weight.shape)}; make one S3Sparse for each weight"
            )
        if self.schedule is not None:
            self.schedule.check(bound)
        if self.mask is not None and self._shape is None:
            check_mask(self.upright(self.mask), bound)
            if self.transposable:
                check_mask(self.upright(self.mask).t(), self.pattern.bind(bound.shape[::-1]))
            if not weight.is_meta:
                self.mask = self.mask.to(weight.device)
        self._unset = self._unset or weight.is_meta
        self._shape = tuple(weight.shape)
        self._run, self._budget = run_length(bound), bound.keep
        if self.holds_mask and self.mask is None and not self.frozen:
            self.mask = self._select(weight)
        if self.mode == "soft" and self.beta is None:
            mask = self.mask if self.mask is not None else self._select(weight)
            self.beta = ordinary(self._scale(weight.detach(), mask))
        return weight

    @torch.no_grad()
    def _take(self, weight: Tensor) -> None:
        """Take mask and beta from the weight where they left the meta device, and nothing filled them in."""
        if weight.is_meta:
            return
        mask, keep = self.mask, self._keep(self.steps)
        if mask is not None and (bool(mask.all()) or self._mask_problem(mask, keep)):
            self.mask = self._select(weight)
        if self.beta is not None and not bool(torch.isfinite(self.beta)):
            held = self._select(weight) if self.mask is None else self.mask
            self.beta = ordinary(self._scale(weight.detach(), held))
        self._unset = False

    def upright(self, x: Tensor) -> Tensor:
        """``x``, laid out as the weight is stored, as the pattern sees it; its own inverse."""
        return x.t() if self.transposed else x

    def _scale(self, weight: Tensor, mask: Tensor) -> Tensor:
        """The factor that brings the shrunk weight nearest to the weight: 0-dim."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        if weight.is_meta:
            return torch.empty((), dtype=wide, device="meta")
        short = shrunk(weight, mask, self._text, self._run, self.transposed).to(wide)
        square = short.square().sum()
        scale = (weight.to(wide) * short).sum() / square
        return torch.where(square > 0, scale, 1.0)

    # steps --------------------------------------------------------------------------------------------

    def _bound(self) -> BoundPattern:
        if self._shape is None:
            raise PatternError("this S3Sparse is not registered on a weight yet")
        shape = self._shape[::-1] if self.transposed else self._shape
        return self.pattern.bind(shape)

    def _keep(self, steps: int) -> int:
        """Blocks kept in each scope after so many steps."""
        bound = self._bound()
        return bound.keep if self.schedule is None else self.schedule.keep(steps, bound)

    def _select(self, weight: Tensor) -> Tensor:
        """A new mask, by the score and the schedule."""
        scores = None
        if self.score != "magnitude" and not weight.is_meta:
            assert callable(self.score)
            with torch.no_grad():
                scores = self.score(weight, self)
            if not isinstance(scores, Tensor) or scores.shape != weight.shape:
                got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                raise PatternError(
                    f"the score function returned {got} for a weight of shape {tuple(weight.shape)}; "
                    "return one score for each element"
                )
            scores = self.upright(scores.detach())
        pattern = dataclasses.replace(self.pattern, keep=self._keep(self.steps))
        if weight.is_meta:  # for the mask of a state dict
            return torch.empty(weight.shape, dtype=torch.bool, device="meta")
        choose = transposable if self.transposable else project
        mask = choose(self.upright(weight.detach()), pattern, scores)
        return ordinary(self.upright(mask).contiguous())

    def advance(self, weight: Tensor) -> None:
        """Count one optimizer step, and refresh a held mask when it is due; ``s3tensor.step`` calls it.

        Args:
            weight: the dense weight that :meth:`forward` is given.
        """
        if self._unset:
            self._take(weight)
        self.steps += 1
        if self.mode == "fixed" or self.frozen:
            return
        if not self.holds_mask:  # each forward takes its own; this one counts flips
            mask = self._select(weight)
            if self._last is not None:
                self._flips = changed_fraction(mask, self._last)
            self._last = mask
            return
        moved = self._keep(self.steps) != self._keep(self.steps - 1)
        if moved or self.steps % self.refresh == 0:
            mask = self._select(weight)
            held = self.current_mask(weight)
            self._flips = changed_fraction(mask, held)
            held.copy_(mask)  # in place: compiled graphs keep reading it
            if moved and self.beta is not None:
                self.beta.copy_(self._scale(weight.detach(), mask))

    def freeze(self, weight: Tensor | None = None) -> None:
        """Keep the mask as it is from now on; gradients stay those of the mode.

        Args:
            weight: the dense weight, needed where no mask is held. Without it the next forward takes the
                mask that stays. ``s3tensor.freeze(model)`` knows the weights.

        Raises:
            PatternError: a schedule that has not ended, so that the mask would never satisfy the pattern.
        """
        mask = self.mask_to_freeze(weight)
        if self.mask is None:
            self.mask = mask
        self.frozen = True
        self._last = None

    def mask_to_freeze(self, weight: Tensor | None) -> Tensor | None:
        """The mask that :meth:`freeze` would keep, if known; raises what that raises."""
        if self._unset and weight is not None:
            self._take(weight)
        if self._shape is not None and not self.has_ended:
            raise PatternError(
                f"the schedule is at density {self.density:g} after {self.steps} steps, above the "
                f"{self._bound().density:g} of {self._bound()}; freeze once it has ended"
            )
        return self._select(weight) if self.mask is None and weight is not None else self.mask

    @property
    def density(self) -> float:
        """Kept fraction of the weight now; a mask given to ``"fixed"`` may keep less than the budget."""
        if self.mask is not None:
            return float(self.mask.float().mean())
        return self._keep(self.steps) / self._bound().blocks_per_scope

    @property
    def has_ended(self) -> bool:
        """Whether the density has reached the pattern's budget, by the count or by the mask.

        A copy that follows the weights and buffers of a model, such as an EMA, has its mask but not its
        count.
        """
        if self._keep(self.steps) == self._bound().keep:
            return True
        return self.mask is not None and not self._mask_problem(self.mask, self._bound().keep)

    def _mask_problem(self, mask: Tensor, keep: int) -> str:
        """Why a mask, as the weight is stored, keeps more than ``keep`` blocks of a scope, or empty."""
        upright = self.upright(mask)
        pattern = dataclasses.replace(self.pattern, keep=keep)
        problem = mask_problem(upright, pattern.bind(tuple(upright.shape)))
        if self.transposable and not problem:
            problem = mask_problem(upright.t(), pattern.bind(tuple(upright.t().shape)))
        return problem

    # the state dict -----------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """Pattern, shape and counts."""
        return {
            "pattern": self.pattern.parts,
            "transposed": self.transposed,
            "transposable": self.transposable,
            "shape": self._shape,
            "steps": self.steps,
            "frozen": self.frozen,
        }

    def set_extra_state(self, state: Tensor) -> None:
        """Take the counts of :meth:`get_extra_state`; :meth:`_load_from_state_dict` has checked them."""
        facts = self.saved_facts(state)
        self.steps, self.frozen = facts["steps"], facts["frozen"]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any
    ) -> None:  # rest: local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        saved = state_dict.get(f"{prefix}_extra_state")
        if isinstance(saved, Tensor):
            problem = self._mismatch(saved, prefix)
            if problem:
                rest[-1].append(problem)
                return
            self.frozen = self.saved_facts(saved)["frozen"]
            if not self.holds_mask:
                self.mask = None
                state_dict.pop(f"{prefix}mask", None)  # of a held mask: each forward takes its own
            elif self.mask is None and f"{prefix}mask" in state_dict:
                self.mask = torch.empty_like(state_dict[f"{prefix}mask"])
            self._last = self._flips = None
        mask = state_dict.get(f"{prefix}mask")
        if self.holds_mask and isinstance(mask, Tensor) and mask.shape == self._shape:
            steps = self.saved_facts(saved)["steps"] if isinstance(saved, Tensor) else self.steps
            problem = self._mask_problem(mask, self._keep(steps))
            if problem:
                rest[-1].append(
                    f"{weight_name(prefix)}: {problem}; this S3Sparse would train under it after {steps} "
                    "steps: load what was saved under the same pattern, mode and schedule"
                )
                return
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _mismatch(self, saved: Tensor, prefix: str) -> str:
        """Why a saved state is not of this pattern and weight, or an empty string."""
        where = weight_name(prefix)
        try:
            facts = self.saved_facts(saved)
        except (TypeError, ValueError):
            return f"{where}: the extra state of S3Sparse is damaged; it must be bytes of JSON"
        mine = self.facts()
        if _pattern_and_options(facts) != _pattern_and_options(mine):
            return (
                f"{where}: the state dict is of S3Sparse({_pattern_and_options(facts)}), this module of "
                f"S3Sparse({_pattern_and_options(mine)}); register the pattern that it was saved with"
            )
        if None not in (facts["shape"], self._shape) and tuple(facts["shape"]) != self._shape:
            return (
                f"{where}: the state dict is of a weight of shape {tuple(facts['shape'])}, this "
                f"module's is {self._shape}"
            )
        return ""

    def extra_repr(self) -> str:
        parts = [str(self.pattern), f"mode={self.mode!r}"]
        if self.refresh != 1:
            parts.append(f"refresh={self.refresh}")
        if self.score != "magnitude":
            parts.append(f"score={getattr(self.score, '__name__', self.score)}")
        if self.schedule is not None:
            parts.append(f"schedule={self.schedule}")
        if self.decay:
            parts.append(f"decay={self.decay:g}")
        flags = ("transposed", "transposable", "frozen")
        return ", ".join(parts + [flag for flag in flags if getattr(self, flag)])


def _pattern_and_options(facts: dict[str, Any]) -> str:
    options = [name for name in ("transposed", "transposable") if facts.get(name)]
    return ", ".join([facts["pattern"], *options])
