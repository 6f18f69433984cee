"""Masked weights and their gradients: what the parametrizations of training share."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from s3tensor.errors import OptionError, PatternError
from s3tensor.mask import backend
from s3tensor.mask import projection as masks
from s3tensor.mask.projection import blocks_in, count, expand_blocks, tile, tile_norms, untile
from s3tensor.pattern import BoundPattern, Pattern
from s3tensor.tensor import ops
from s3tensor.train.schedule import Density

# Modules that do not multiply by their weight as F.linear does, so that it stays dense.
_NO_PRODUCT = (
    nn.modules.conv._ConvNd,
    *(nn.Embedding, nn.EmbeddingBag, nn.Bilinear, nn.RNNBase, nn.RNNCellBase),
    nn.MultiheadAttention,  # of its own parameters; out_proj is a linear layer
)

# Up to this many competing weights the compiler unrolls a sum, and fuses the mask into its use.
_UNROLLED = 8


class Masked(nn.Module):
    """The base of the parametrizations that multiply a weight by a mask, see :class:`s3tensor.S3Sparse`.

    Attributes:
        mask: bool, of the weight's shape, True where kept; None if each forward takes its own.
        steps: counted by ``s3tensor.step``.
        pattern: that a compressed weight is packed under; None if the mask has none.
    """

    mask: Tensor | None
    mode: str
    pattern: Pattern | None
    refresh: int
    schedule: Density | None
    steps: int
    frozen: bool
    _flips: Tensor | None
    _FACTS: ClassVar[tuple[str, ...]]  # names that every extra state has
    _unset = False  # the weight or a buffer was on meta, and no forward or step has seen it since

    def current_mask(self, weight: Tensor) -> Tensor:
        """The mask that :meth:`forward` applies to ``weight``."""
        raise NotImplementedError

    def pattern_in(self, owner: nn.Module) -> Pattern | None:
        """The pattern that a module's weight is packed under when compressed; None if it must stay dense."""
        return None if isinstance(owner, _NO_PRODUCT) else self.pattern

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Masked:
        """``fn`` of the buffers, which keep their values on the way to the meta device and back."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is None or new is None:
                continue
            if (
                old.is_meta and not new.is_meta
            ):  # by to_empty: any bytes, which _take must not trust
                new.fill_(True if name == "mask" else float("nan"))
            elif new.is_meta and not old.is_meta:
                setattr(self, name, old)
                self._unset = True
            elif self._unset and not old.is_meta:
                setattr(self, name, old.to(new.device, new.dtype))
        return self

    @property
    def needs_steps(self) -> bool:
        """Whether the mask never changes unless ``s3tensor.step`` is called."""
        return self.refresh > 1

    def upright(self, x: Tensor) -> Tensor:
        """``x``, laid out as the weight is stored, as the pattern sees it; its own inverse."""
        return x

    @property
    def density(self) -> float:
        """Kept fraction of the weight now."""
        raise NotImplementedError

    @property
    def has_ended(self) -> bool:
        """Whether the density has reached the budget."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What the extra state holds: counts, and what the parametrization is of."""
        raise NotImplementedError

    def get_extra_state(self) -> Tensor:
        """:meth:`facts` as bytes of JSON, uint8: a tensor, so that safetensors can hold it."""
        return torch.tensor(
            list(json.dumps(self.facts()).encode()), dtype=torch.uint8, device="cpu"
        )

    def saved_facts(self, state: Tensor) -> dict[str, Any]:
        """The facts in an extra state; TypeError or ValueError if it is damaged."""
        facts = json.loads(bytes(state.tolist()))
        if not isinstance(facts, dict) or not all(name in facts for name in self._FACTS):
            raise ValueError(f"the extra state lacks one of {', '.join(self._FACTS)}")
        return facts

    @property
    def flip_rate(self) -> float | None:
        """Fraction of mask elements that the last refresh changed; None before there is one to compare."""
        return None if self._flips is None else float(self._flips)


# options and the state dict ---------------------------------------------------------------------------


def check_options(
    mode: str,
    modes: tuple[str, ...],
    refresh: int,
    schedule: Density | None,
    decay: float | None,
    of: str = "",
) -> float:
    """Refuse options that are out of range or of another mode, ``of`` what; returns the decay in use."""
    if mode not in modes:
        raise OptionError(f"mode {mode!r}{of} must be one of {', '.join(modes)}")
    if type(refresh) is not int or refresh < 1:
        raise OptionError(f"refresh={refresh!r}{of} must be an int >= 1, in steps")
    if mode == "fixed" and (refresh != 1 or schedule is not None):
        raise OptionError(f"mode 'fixed'{of} takes no refresh and no schedule: its mask stays")
    if mode != "srste" and decay is None:
        return 0.0
    decay = 2e-4 if decay is None else decay
    if mode != "srste" or not 0 <= decay < float("inf"):
        raise OptionError(f"decay={decay!r}{of} must be a number >= 0, and is of mode 'srste' only")
    return float(decay)


def weight_name(prefix: str) -> str:
    """The weight's name from the prefix of its parametrization in a state dict."""
    owner, _, rest = prefix.rpartition("parametrizations.")
    return f"{owner}{rest.split('.')[0]}"


# masks ------------------------------------------------------------------------------------------------


def magnitude_mask(weight: Tensor, text: str, run: int, keep: int) -> Tensor:
    """The mask of the largest magnitudes in a forward: ``s3tensor.project`` without its checks.

    A compiled graph fuses that of N:M into the product with it: one read of the weight, no mask in memory. On
    a GPU the weight is not checked for NaN, which counts as the largest.

    Args:
        text: the pattern; run: of :func:`run_length`; keep: blocks of a scope.
    """
    if torch.compiler.is_compiling():
        if 0 < run <= _UNROLLED:
            return ranked(weight, run, keep)
    elif masks.on_plain_gpu(weight):
        mask = masks._project_by_kernel(weight, Pattern.parse(text).bind(weight.shape), look=False)
        if mask is not None:
            return mask
    return ops.project(weight, text)


def ranked(weight: Tensor, run: int, keep: int) -> Tensor:
    """The mask of the ``keep`` largest of each ``run`` neighbours, in operators that a compiler fuses."""
    size = _sizes(weight.detach()).reshape(-1, run)
    place = torch.arange(run, device=weight.device)
    if run == 4 and keep < 4:
        return _of_four(size, place, keep).reshape(weight.shape)
    mine, other = size.unsqueeze(-1), size.unsqueeze(-2)
    first = place.unsqueeze(0) < place.unsqueeze(1)  # of equals the lowest index is kept
    better = (other > mine) | ((other == mine) & first)
    return (better.sum(-1, dtype=torch.int32) < keep).reshape(weight.shape)


def _sizes(weight: Tensor) -> Tensor:
    """Integers in the order of the magnitudes; NaN is the largest."""
    if weight.dtype == torch.float64:
        return weight.view(torch.int64) & 0x7FFFFFFFFFFFFFFF
    return weight.to(torch.float32).view(torch.int32) & 0x7FFFFFFF


def _of_four(size: Tensor, place: Tensor, keep: int) -> Tensor:
    """:func:`ranked` by the six comparisons of a scope: half the instructions of counting for each."""
    a, b, c, d = size.split(1, -1)  # (scopes, 1)
    ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d
    kept = [
        _wins(keep, ab, ac, ad),
        _wins(keep, ~ab, bc, bd),
        _wins(keep, ~ac, ~bc, cd),
        _wins(keep, ~ad, ~bd, ~cd),
    ]
    even = place % 2 == 0
    low, high = torch.where(even, kept[0], kept[1]), torch.where(even, kept[2], kept[3])
    return torch.where(place < 2, low, high)


def _wins(keep: int, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Whether a weight with these results of its comparisons is among the ``keep`` largest of four."""
    if keep == 1:
        return x & y & z
    return x | y | z if keep == 3 else (x & y) | (z & (x | y))


def check_mask(mask: Tensor, bound: BoundPattern) -> None:
    """Refuse a mask that splits blocks or keeps too many."""
    blocks = blocks_in(tile(mask, bound))
    if not torch.equal(expand_blocks(blocks, bound), mask):
        raise PatternError(
            f"the mask splits a block of {bound}: all {bound.block_size} weights of a block are kept or "
            "pruned together; make masks with s3tensor.project"
        )
    if int(count(blocks).max()) > bound.keep:
        raise PatternError(
            f"the mask keeps {int(count(blocks).max())} blocks in a scope of {bound}, which keeps "
            f"{bound.keep}; make masks with s3tensor.project"
        )


def mask_problem(mask: Tensor, bound: BoundPattern) -> str:
    """Why a mask of a state dict does not satisfy a pattern, or empty; one on meta is not looked at."""
    if mask.is_meta:
        return ""
    if mask.dtype != torch.bool:
        return f"the mask has dtype {mask.dtype}, not bool"
    try:
        check_mask(mask, bound)
    except PatternError as error:
        return str(error)
    return ""


def changed_fraction(mask: Tensor, before: Tensor) -> Tensor:
    """Fraction of elements that differ, 0-dim float32."""
    return (mask != before.to(mask.device)).mean(dtype=torch.float32)


# the soft threshold of blocks -------------------------------------------------------------------------


@torch.library.custom_op(
    "s3tensor::shrink",
    mutates_args=(),
    schema="(Tensor weight, Tensor mask, str pattern) -> Tensor",
)
def shrink(weight: Tensor, mask: Tensor, pattern: str) -> Tensor:
    """Kept blocks, shortened by the norm of the largest dropped block of their scope; the rest zero.

    A kept block v becomes ``v max(0, 1 - t / ||v||)``, t the largest ``||u||`` of a dropped block u. For 2:4
    it is the soft threshold of S-STE (Y. Hu et al., arXiv 2409.09099, equation 8): continuous in the weight,
    also where the kept blocks change.

    Args:
        weight: any floating dtype; mask: bool, the same shape, whole blocks.
    """
    bound = Pattern.parse(pattern).bind(weight.shape)
    tiles = tile(weight, bound)
    norms = tile_norms(tiles, weight.abs().amax())  # (scopes, blocks_per_scope) float64
    kept = tile(mask, bound)[..., 0]
    dropped = norms.masked_fill(kept, 0).amax(-1, keepdim=True)
    factor = torch.where(norms > dropped, 1 - dropped / norms, 0).unsqueeze(-1)
    wide = torch.promote_types(weight.dtype, torch.float32)
    shrunk = torch.where(kept.unsqueeze(-1), tiles.to(wide) * factor.to(wide), 0)
    return untile(shrunk.to(weight.dtype), bound)


@shrink.register_fake
def _(weight: Tensor, mask: Tensor, pattern: str) -> Tensor:
    Pattern.parse(pattern).bind(weight.shape)
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


def shrink_run(weight: Tensor, mask: Tensor, run: int, keep: int = 0) -> Tensor:
    """:func:`shrink` of an N:M pattern, in operators that a compiler fuses: ``sign(w) max(|w| - t, 0)``.

    Args:
        keep: 1 to 3 of 4 if the mask is that of the largest, which is then not read; else 0.
    """
    magnitude = weight.abs().reshape(-1, run)
    if keep and run == 4:
        dropped = _largest_dropped(magnitude, keep)
        kept = ~(magnitude <= dropped)  # NaN too
    else:
        kept = mask.reshape(-1, run)
        dropped = torch.where(kept, 0, magnitude).amax(-1, keepdim=True)
        kept = kept & ~(magnitude <= dropped)
    shrunk = torch.copysign(magnitude - dropped, weight.reshape(-1, run))
    return torch.where(kept, shrunk, 0).reshape(weight.shape)


def _largest_dropped(magnitude: Tensor, keep: int) -> Tensor:  # (scopes, 4) -> (scopes, 1)
    """The largest after ``keep`` larger ones, by a network of minima and maxima.

    A compiler unrolls it into one kernel; a mask that is used twice, as here, would be written to memory.
    """
    a, b, c, d = magnitude.split(1, -1)
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    other_low, other_high = torch.minimum(c, d), torch.maximum(c, d)
    if keep == 3:
        return torch.minimum(low, other_low)
    if keep == 2:
        return torch.minimum(torch.maximum(low, other_low), torch.minimum(high, other_high))
    return torch.maximum(torch.maximum(low, other_low), torch.minimum(high, other_high))


def shrunk(
    weight: Tensor, mask: Tensor, text: str, run: int, transposed: bool, keep: int = 0
) -> Tensor:
    """The soft threshold of a weight as it is stored; ``keep`` as in :func:`shrink_run`."""
    if transposed:
        return shrunk(weight.t(), mask.t(), text, run, False, keep).t()
    return shrink_run(weight, mask, run, keep) if run else shrink(weight, mask, text)


# gradients --------------------------------------------------------------------------------------------


class StraightThrough(torch.autograd.Function):
    """The masked weight; its gradient passes to every weight, with decay for pruned ones."""

    @staticmethod
    def forward(
        weight: Tensor,
        mask: Tensor,
        beta: Tensor | None = None,
        decay: float = 0.0,
        text: str = "",
        run: int = 0,
        transposed: bool = False,
        keep: int = 0,
    ) -> Tensor:
        if beta is not None:
            return shrunk(weight, mask, text, run, transposed, keep) * beta
        return torch.where(mask, weight, 0)  # not weight * mask: its pruned zeros carry a sign

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, mask, _, ctx.decay, *_ = inputs
        if ctx.decay:
            ctx.save_for_backward(weight, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if ctx.decay:
            weight, mask = ctx.saved_tensors
            # Not add(..., alpha=decay): torch 2.11, compiling for CUDA, takes alpha as 1.
            grad = grad + torch.where(mask, 0, weight) * ctx.decay
        return grad, *(None,) * 7

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        # Only reached with a stack of weights: for inputs that are mapped over, torch does not call it.
        raise NotImplementedError("S3Sparse maps over inputs only; loop over a stack of weights")


class Fused(torch.autograd.Function):
    """:class:`StraightThrough`, or the mask's gradient, by kernels that do each in one pass."""

    @staticmethod
    def forward(
        ctx: Any,
        kernel: Any,  # of fused_kernel
        weight: Tensor,
        mask: Tensor | None,
        beta: Tensor | None,
        decay: float,
        keep: int,
        through: bool,  # False: pruned weights get no gradient
    ) -> Tensor:
        ctx.kernel, ctx.decay, ctx.through = kernel, decay, through
        out, chosen = kernel.masked(weight.detach(), keep, mask, beta, write=bool(decay))
        if decay:
            ctx.save_for_backward(weight, chosen)
        elif not through:
            ctx.save_for_backward(chosen)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        # A kernel has no gradient of its own.
        takes = not torch.is_grad_enabled() and ctx.kernel.covers(grad)
        if not ctx.through:
            (mask,) = ctx.saved_tensors
            grad = ctx.kernel.masked(grad, 1, mask)[0] if takes else torch.where(mask, grad, 0)
        elif ctx.decay:
            weight, mask = ctx.saved_tensors
            if takes:
                grad = ctx.kernel.decayed(grad, weight, mask, ctx.decay)
            else:
                grad = StraightThrough.backward(ctx, grad)[0]
        return None, grad, *(None,) * 5


def fused_kernel(weight: Tensor) -> Any:
    """The module of the kernels where they take a weight, contiguous on a GPU; else None."""
    # Before Triton 3.3 the kernels of ``masks`` cannot be imported; these need as much.
    if torch.compiler.is_compiling() or not masks.on_plain_gpu(weight):
        return None
    if backend.load("masks") is None:
        return None
    masked = backend.load("masked")
    return masked if masked.covers(weight) else None
