"""A linear of any size with inputs like a real one's, from a seed: correlated and heavy-tailed.

    layer = synthetic.layer(2560, 9728, samples=32_768, seed=0, device="cuda")
    layer.weight, layer.hessian, layer.held_out

Inputs are computed as those of a down projection: ``silu(h Wg') * (h Wu')``, with hidden states h in which a
few directions hold most of the energy (a power law; then each token is scaled to RMS 1, as by a norm) and
channels of very different activity. The product makes inputs heavy-tailed, the shared h correlates them. All
random numbers are drawn on the CPU: a seed gives the same layer on every device, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import s3tensor as s3

DECAY = 0.65  # standard deviation of direction j of h: (j + 1)^-DECAY
SPREAD = 0.7  # of the logarithm of a channel's activity
_TOKENS = 4096  # made at a time


@dataclass(frozen=True)
class Layer:
    """A linear and the second moments of its inputs."""

    weight: Tensor  # (out_features, in_features)
    hessian: Tensor  # (in_features, in_features), X'X / N of the calibration samples
    held_out: Tensor  # the same of other samples
    samples: int
    held_out_samples: int


def layer(
    out_features: int = 2560,
    in_features: int = 9728,
    samples: int = 32_768,
    held_out_samples: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Layer:
    """One layer with standard normal weights over ``sqrt(in_features)``.

    Args:
        out_features: rows of the weight, and the width of the hidden states behind the inputs.
        in_features: columns of the weight.
        samples: calibration tokens.
        held_out_samples: further tokens, for the error on inputs that no method has seen; default a
            quarter of ``samples``.
        seed: of everything random.
        device: where the layer lies and the products are made.
    """
    held_out_samples = samples // 4 if held_out_samples is None else held_out_samples
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=random) / in_features**0.5
    stream = inputs(out_features, in_features, (samples, held_out_samples), random, device)
    hessians = [s3.Hessian(in_features, device) for _ in range(2)]
    for part, x in stream:
        hessians[part].update(x)
    calibration, held_out = hessians
    return Layer(
        weight.to(device),
        calibration.value(),
        held_out.value(),
        calibration.samples,
        held_out.samples,
    )


def inputs(
    hidden: int,
    in_features: int,
    samples: tuple[int, ...],
    random: torch.Generator,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[int, Tensor]]:
    """Batches ``(part, (tokens, in_features))`` of inputs, ``samples[part]`` tokens of each part."""
    gate, up = (
        (torch.randn(in_features, hidden, generator=random) / hidden**0.5).to(device)
        for _ in range(2)
    )
    activity = torch.randn(in_features, generator=random).mul_(SPREAD).exp_().to(device)
    strength = torch.arange(1, hidden + 1).float().pow_(-DECAY)
    for part, count in enumerate(samples):
        for first in range(0, count, _TOKENS):
            tokens = min(_TOKENS, count - first)
            h = torch.randn(tokens, hidden, generator=random) * strength
            h = (h / h.square().mean(1, keepdim=True).sqrt()).to(device)
            yield part, F.silu(activity * (h @ gate.T)) * (h @ up.T)
