"""A state dict with every kind of tensor that a model can hold."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

import s3tensor as s3
from s3tensor.io import state as checkpoint
from s3tensor.io.state import save_state


def same(first: Tensor, second: Tensor) -> bool:
    """Equal to the last bit, in dtype, shape, pattern and orientation."""
    if isinstance(first, s3.StructuredSparseTensor) != isinstance(
        second, s3.StructuredSparseTensor
    ):
        return False
    if isinstance(first, s3.StructuredSparseTensor):
        return (
            first.same_layout(second)
            and str(first.pattern) == str(second.pattern)
            and same(first.packed, second.packed)
            and same(first.indices, second.indices)
        )
    return (
        first.dtype == second.dtype
        and first.shape == second.shape
        and checkpoint.checksum(first) == checkpoint.checksum(second)
    )


def equal_states(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return set(first) == set(second) and all(same(first[name], second[name]) for name in first)


def mixed_state() -> dict[str, Tensor]:
    """Every kind of tensor a model's state can hold, small."""
    torch.manual_seed(0)
    made = s3.StructuredSparseTensor.from_dense
    return {
        "q.weight": made(torch.randn(8, 16).bfloat16(), "2:4"),
        "k.weight": made(torch.randn(16, 32), "coupled2:4").t(),
        "v.weight": made(torch.randn(16, 16).half(), "rowpair16"),
        "o.weight": made(torch.randn(6, 24), "block:2x4@0.5"),
        "norm.weight": torch.randn(16),
        "embed.weight": torch.randn(5, 4).bfloat16(),
        "position": torch.arange(7),
        "flag": torch.tensor([True, False]),
        "scale": torch.tensor(0.5, dtype=torch.float64),
        "none": torch.zeros(0, 3),
    }


@functools.cache
def mixed_bytes() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        save_state(path, mixed_state())
        return path.read_bytes()
