"""Launches that are recorded and replayed: what a replay passes on, and when there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from s3tensor.kernels.launch import Replay, recorded, scratch, start
from torch import Tensor


class Kernel:
    """Stands for a kernel of Triton: notes what its launches are given."""

    arg_names = ("x_ptr", "w_ptr", "s_ptr", "y_ptr", "N", "WIDE", "SPLIT")
    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.given: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> Kernel:
            return self

        return launch

    def run(self, *given: Any) -> None:
        self.given.append(given)


def product(kernel: Kernel, x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    sums = scratch(8, torch.float32, x.device) if x.is_cuda else weight
    arguments = (x, weight, sums, y, 3)
    start(kernel, (4, 2), arguments, {"SPLIT": 1, "num_warps": 4, "WIDE": True})
    return y


def replayed(kernel: Kernel, weight: Tensor, read: Tensor) -> Replay:
    x, y = torch.randn(2, 8), torch.empty(2, 4)
    _, tape = recorded(lambda: product(kernel, x, read, y))
    (launched,) = tape.launches
    return Replay(launched, x, y, (weight, None), tape.scratch)


def test_a_replay_passes_the_new_x_and_y_and_all_else_as_it_was() -> None:
    kernel, weight = Kernel(), torch.randn(4, 8)
    replay = replayed(kernel, weight, weight)
    x = torch.randn(2, 8)
    y = replay(x, 7)
    assert y.shape == (2, 4) and y.dtype == torch.float32
    (given,) = kernel.given
    assert given[:6] == (4, 2, 1, 7, "function", "metadata") and given[6:9] == (None, None, None)
    pointers = (x.data_ptr(), weight.data_ptr(), weight.data_ptr(), y.data_ptr())
    assert given[9:] == (
        *pointers,
        3,
        True,
        1,
    )  # constexprs in the kernel's order, options left out


def test_each_replay_has_a_result_of_its_own() -> None:
    kernel, weight = Kernel(), torch.randn(4, 8)
    replay = replayed(kernel, weight, weight)
    x = torch.randn(2, 8)
    first, second = replay(x, 0), replay(x, 0)
    assert first.data_ptr() != second.data_ptr()


def test_a_launch_that_read_a_copy_of_the_weight_is_not_replayed() -> None:
    weight = torch.randn(4, 8)
    with pytest.raises(ValueError, match="where they lie"):
        replayed(Kernel(), weight, weight.clone())


def test_nothing_is_recorded_outside_and_an_error_ends_the_recording() -> None:
    kernel, weight, x, y = Kernel(), torch.randn(4, 8), torch.randn(2, 8), torch.empty(2, 4)
    product(kernel, x, weight, y)

    def fails() -> Tensor:
        raise KeyError

    with pytest.raises(KeyError):
        recorded(fails)
    _, tape = recorded(lambda: product(kernel, x, weight, y))
    assert len(tape.launches) == 1
