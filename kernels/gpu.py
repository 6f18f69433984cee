"""What the launchers of matmul kernels ask of a device: whether they run there, and how large it is."""

from __future__ import annotations

import functools

import torch


def refusal(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, or None."""
    if device.type != "cuda" or torch.version.hip is not None or capability(device) < (8, 0):
        return f"{device} is not an NVIDIA GPU of compute capability 8.0 or above"
    return None


@functools.lru_cache(maxsize=64)
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


@functools.lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count
