"""Order statistics: the k-th largest value, and a threshold between it and the next."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from s3tensor.errors import PatternError
from s3tensor.mask.projection import select_kernels
from s3tensor.pattern.layout import as_int


def kth_largest(
    x: Tensor,  # (..., n, ...)
    k: int,
    dim: int | None = None,
    keepdim: bool = False,
) -> Tensor:
    """The k-th largest value along ``dim``, k from 1 (the largest) to n; ``dim=None`` takes all of x.

    It selects, without a sort. NaN counts as the largest, as in ``torch.topk``.

    Example:
        >>> kth_largest(torch.tensor([[3, 1, 2], [6, 5, 4]]), 2, dim=1).tolist()
        [2, 5]

    Raises:
        PatternError: k outside 1 to n, or an empty tensor.
    """
    values, along = _along(x, dim)
    n = values.shape[along] if values.ndim else 1
    _check_rank(k, n, n)
    found = _select(values, k, along)
    return found.unsqueeze(along) if keepdim and dim is not None and values.ndim else found


def mid_kth_largest(
    x: Tensor,  # (..., n, ...)
    k: int,
    dim: int | None = None,
    k_weight: float = 1.0,
    keepdim: bool = False,
) -> Tensor:
    """A value between the k-th and the next largest, k from 1 to n - 1: ``(x_k + w x_k+1) / (1 + w)``.

    As a threshold it separates the k largest with a margin on either side. ``k_weight`` w = 1 is the
    middle; a smaller w is nearer to the k-th.

    Returns:
        floating; the dtype of x where that is floating.

    Raises:
        PatternError: k outside 1 to n - 1, or a negative weight.
    """
    values, along = _along(x, dim)
    n = values.shape[along] if values.ndim else 1
    _check_rank(k, n - 1, n)
    if not 0.0 <= k_weight < float("inf"):
        raise PatternError(f"k_weight={k_weight} must be a finite weight >= 0 of the next value")
    if not values.dtype.is_floating_point:
        values = values.to(torch.get_default_dtype())
    upper, lower = _select_two(values, k, along)
    # From the upper value down: exact for equal values, and without overflow.
    found = torch.where(
        upper == lower, upper, upper + (lower / 2 - upper / 2) * (2 * k_weight / (1 + k_weight))
    )
    return found.unsqueeze(along) if keepdim and dim is not None else found


def _along(x: Tensor, dim: int | None) -> tuple[Tensor, int]:
    """The tensor and the dim, from 0, along which to select."""
    if not isinstance(x, Tensor):
        raise TypeError(f"values are a tensor, got {type(x).__name__}")
    if x.numel() == 0:
        raise PatternError(f"an empty tensor of shape {tuple(x.shape)} has no k-th largest value")
    if dim is None:
        return x.reshape(-1), 0
    ndim = max(x.ndim, 1)
    if not -ndim <= dim < ndim:
        raise PatternError(
            f"dim={dim} of a tensor of {x.ndim} dims; it must be from {-ndim} to {ndim - 1}"
        )
    return x, dim % ndim


def _check_rank(k: int, most: int, n: int) -> None:
    rank = as_int(k)
    if rank is None or not 1 <= rank <= most:
        raise PatternError(f"k={k!r:.80} of {n} values; it must be an int from 1 to {most}")


def _select(values: Tensor, k: int, dim: int) -> Tensor:
    if values.dtype == torch.bool:
        return _select(values.to(torch.uint8), k, dim).bool()
    if values.ndim == 0:
        return values.clone()
    kernels = _kernels(values)
    if kernels is not None:
        return kernels.kth_largest(_rows(values, dim), int(k)).view(_without(values, dim))
    return values.kthvalue(values.shape[dim] - k + 1, dim=dim).values


def _select_two(values: Tensor, k: int, dim: int) -> tuple[Tensor, Tensor]:
    """The k-th and the next, of floating values."""
    kernels = _kernels(values)
    if kernels is None:
        return _select(values, k, dim), _select(values, k + 1, dim)
    upper, lower = kernels.two_largest(_rows(values, dim), int(k))
    return upper.view(_without(values, dim)), lower.view(_without(values, dim))


def _kernels(values: Tensor) -> Any:
    """The selection kernels, or None: without a GPU, or where a gradient is needed."""
    differentiated = values.requires_grad and torch.is_grad_enabled()
    return None if differentiated else select_kernels(values)


def _rows(values: Tensor, dim: int) -> Tensor:
    """The lines along ``dim``, (rows, n) contiguous."""
    return values.detach().movedim(dim, -1).reshape(-1, values.shape[dim]).contiguous()


def _without(values: Tensor, dim: int) -> torch.Size:
    return values.shape[:dim] + values.shape[dim + 1 :]
