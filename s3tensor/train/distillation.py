"""A distillation loss: a pruned student learns the dense teacher's distribution of each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from s3tensor.errors import OptionError

_AT_ONCE = 2**25  # probabilities


def distillation_loss(
    student: Tensor,  # (..., vocabulary) logits
    teacher: Tensor,  # (..., vocabulary) logits
    *,
    temperature: float = 1.0,
    labels: Tensor | None = None,  # (...) int
    ignore_index: int = -100,
    mask: Tensor | None = None,  # (...) bool
    hidden: Sequence[tuple[Tensor, Tensor]] = (),  # (student, teacher) of (..., features)
    hidden_weight: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """``T^2 KL(teacher || student)`` of the next token at temperature T, averaged over the tokens that count.

    G. Hinton et al., arXiv 1503.02531: both distributions are softened by T, and T^2 keeps the size of the
    gradient. With hidden states it adds ``hidden_weight`` times their squared error, relative to the square
    of the teacher's, averaged over the pairs. Combine it with a cross-entropy as you like::

        loss = 0.5 * F.cross_entropy(...) + 0.5 * distillation_loss(student, teacher, labels=labels)

    Probabilities are computed in float32 (float64 for float64 logits), for ``chunk`` tokens at a time, and
    again in the backward pass: the only other tensor of the logits' size is one gradient in the student's
    dtype.

    Args:
        student, teacher: logits of any floating dtypes. No gradient flows to the teacher: get its logits
            under ``torch.no_grad()``.
        temperature: T > 0.
        labels: of each position; those equal to ``ignore_index`` do not count. Align them with the logits:
            for a causal model shift both, or neither.
        mask: True for positions that count; with ``labels``, those that count by both.
        hidden: pairs of hidden states over the same positions.
        hidden_weight: weight of their term.
        chunk: tokens at a time; by default as many as have 2^25 probabilities, 0.13 GB in float32: 223 of a
            vocabulary of 150,000. About five such tensors are held at once.

    Returns:
        0-dim, float32 or float64; 0 where no token counts.

    Raises:
        OptionError: shapes that differ, or a temperature or chunk that is not positive.
    """
    if student.shape != teacher.shape or student.ndim < 1:
        raise OptionError(
            f"student logits of shape {tuple(student.shape)}, teacher logits of {tuple(teacher.shape)}; both "
            "must be (..., vocabulary), of one vocabulary: cut padding off the larger one"
        )
    if not (student.is_floating_point() and teacher.is_floating_point()):
        raise OptionError(f"logits must be floating point, got {student.dtype} and {teacher.dtype}")
    if not 0 < temperature < float("inf"):
        raise OptionError(f"temperature={temperature!r} must be a number > 0")
    if chunk is None:
        chunk = max(1, _AT_ONCE // max(1, student.shape[-1]))
    if type(chunk) is not int or chunk < 1:
        raise OptionError(f"chunk={chunk!r} must be an int >= 1, in tokens")
    counts = _counts(student, labels, ignore_index, mask)
    vocabulary = student.shape[-1]
    divergence: Tensor = _Divergence.apply(
        student.reshape(-1, vocabulary),
        teacher.detach().reshape(-1, vocabulary),
        counts,
        float(temperature),
        chunk,
    )
    if not hidden or hidden_weight == 0:
        return divergence
    errors = [_hidden_error(mine, theirs, counts) for mine, theirs in hidden]
    return divergence + hidden_weight * torch.stack(errors).mean().to(divergence.dtype)


def _counts(
    student: Tensor, labels: Tensor | None, ignore_index: int, mask: Tensor | None
) -> Tensor:
    """The positions that count, (tokens,) bool."""
    positions = student.shape[:-1]
    counts = torch.ones(positions, dtype=torch.bool, device=student.device)
    for name, given in (("labels", labels), ("mask", mask)):
        if given is not None and given.shape != positions:
            raise OptionError(
                f"{name} of shape {tuple(given.shape)} for logits of {tuple(positions)} positions; give one "
                "for each position"
            )
    if labels is not None:
        counts = counts & (labels.to(counts.device) != ignore_index)
    if mask is not None:
        counts = counts & mask.to(counts.device, torch.bool)
    return counts.reshape(-1)


def _hidden_error(mine: Tensor, theirs: Tensor, counts: Tensor) -> Tensor:
    """Squared error over the tokens that count, relative to the square of the teacher's."""
    if mine.shape != theirs.shape or mine.shape[:-1].numel() != len(counts):
        raise OptionError(
            f"hidden states of shapes {tuple(mine.shape)} and {tuple(theirs.shape)} over {len(counts)} "
            "positions; both must be (..., features), over the positions of the logits"
        )
    wide = torch.promote_types(mine.dtype, torch.float32)
    shape = (len(counts), mine.shape[-1])
    target = torch.where(counts[:, None], theirs.detach().reshape(shape).to(wide), 0)
    # Ignored positions are zeroed before the subtraction: they may not be finite.
    value = torch.where(counts[:, None], mine.reshape(shape).to(wide), 0)
    size = target.square().sum()
    return F.mse_loss(value, target, reduction="sum") / torch.where(size > 0, size, 1)


class _Divergence(torch.autograd.Function):
    """``T^2 KL`` averaged over the tokens that count; probabilities are computed again, not saved."""

    @staticmethod
    def forward(
        student: Tensor,  # (tokens, vocabulary)
        teacher: Tensor,
        counts: Tensor,  # (tokens,) bool
        temperature: float,
        chunk: int,
    ) -> Tensor:
        wide = torch.promote_types(student.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=student.device)
        parts = (part.split(chunk) for part in (student, teacher, counts))
        for mine, theirs, counted in zip(*parts, strict=True):
            q = _log_probabilities(mine, temperature, wide)
            p = _log_probabilities(theirs, temperature, wide)
            mass = p.exp()
            # Tokens that the teacher rules out (p = 0) add nothing, even if the student does too.
            each = torch.where(mass > 0, mass * (p - q), 0).sum(-1)
            total = total + torch.where(counted, each, 0).sum()
        return total * (temperature**2) / counts.sum().clamp(min=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        student, teacher, counts, ctx.temperature, ctx.chunk = inputs
        ctx.save_for_backward(student, teacher, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        student, teacher, counts = ctx.saved_tensors
        scale = grad * ctx.temperature / counts.sum().clamp(min=1)
        found = torch.empty_like(student)
        pieces = (part.split(ctx.chunk) for part in (student, teacher, counts, found))
        for mine, theirs, counted, out in zip(*pieces, strict=True):
            wide = scale.dtype
            q = _log_probabilities(mine, ctx.temperature, wide).exp()
            p = _log_probabilities(theirs, ctx.temperature, wide).exp()
            out.copy_(torch.where(counted[:, None], (q - p) * scale, 0))
        return found, None, None, None, None


def _log_probabilities(logits: Tensor, temperature: float, wide: torch.dtype) -> Tensor:
    return F.log_softmax(logits.to(wide) / temperature, dim=-1)
