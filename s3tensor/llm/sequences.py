"""Calibration sequences one by one: batches are split, and rebatched to train a block on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from s3tensor.llm.calibrate import (
    BlockRunner,
    Chunk,
    equal_arguments,
    has_room,
    hidden_of,
    map_tensors,
    transfer_to_device,
)
from s3tensor.prune.linalg import full_precision

_KINDS = (
    8  # other arguments that are compared and kept on the device; with more, each is its own kind
)
_RESIDENT = 0.25  # share of a GPU's free memory that the sequences may take


@dataclass
class _Row:
    """One sequence, or one batch that cannot be split."""

    hidden: Tensor  # (1, tokens, hidden), input of the block
    target: Tensor  # (1, tokens, hidden)
    kind: int  # rows of one kind have one shape and equal other arguments


class Sequences:
    """What a block is trained on: inputs, targets, and the block's other arguments (masks, positions).

    How these arguments depend on the batch is up to the model. So a batch is split, and sequences are
    joined, only where the block's outputs stay the same.
    """

    def __init__(
        self,
        runner: BlockRunner,
        chunks: Sequence[Chunk],
        targets: Sequence[Tensor],  # (batch, tokens, hidden) for each chunk
    ) -> None:
        self.runner = runner
        self._rows: list[_Row] = []
        self._calls: list[Any] = []  # for each kind, its other arguments
        self._shapes: list[torch.Size] = []
        self._moved: dict[int, Any] = {}  # those on the device
        self._joins: dict[int, bool] = {}  # for each kind, whether sequences may be joined
        place = _place(runner, chunks, targets)
        splits: dict[torch.Size, bool] = {}
        for chunk, target in zip(chunks, targets, strict=True):
            shape = chunk.hidden.shape
            if shape not in splits:
                splits[shape] = shape[0] > 1 and self._may_split(chunk)
            call = chunk.call(runner.index, runner.cache)[:2]
            parts = range(shape[0]) if splits[shape] else (slice(None),)
            for part in parts:
                one = slice(part, part + 1) if isinstance(part, int) else part
                self._add(
                    chunk.hidden[one].to(place),
                    target[one].to(place),
                    _sliced(call, part, shape[0]) if isinstance(part, int) else call,
                )

    def __len__(self) -> int:
        return len(self._rows)

    def target(self, row: int) -> Tensor:
        """(1, tokens, hidden) on the block's device."""
        return self._rows[row].target.to(self.runner.device)

    def targets(self, rows: Sequence[int]) -> Tensor:
        """(rows, tokens, hidden) on the block's device."""
        return torch.cat([self.target(row) for row in rows])

    def sequences(self, rows: Sequence[int]) -> int:
        """How many sequences the rows hold."""
        return sum(len(self._rows[row].hidden) for row in rows)

    def by_kind(self, rows: Sequence[int]) -> list[int]:
        """The rows, sorted by kind."""
        return sorted(rows, key=lambda row: self._rows[row].kind)

    def alike(self, rows: Sequence[int]) -> list[int]:
        """The first of the rows and those directly after it that may be joined with it."""
        kind = self._rows[rows[0]].kind
        count = 1
        while count < len(rows) and self._rows[rows[count]].kind == kind:
            count += 1
        if count > 1 and not self._may_join(kind, rows[:2]):
            count = 1
        return list(rows[:count])

    def output(self, rows: Sequence[int], weights: Mapping[str, Tensor]) -> Tensor:
        """The block's output with these weights, by name, in place of its own, (rows, tokens, hidden)."""
        hidden = torch.cat([self._rows[row].hidden.to(self.runner.device) for row in rows])
        return self._run(hidden, self._call(self._rows[rows[0]].kind), weights)

    def _run(self, hidden: Tensor, call: Any, weights: Mapping[str, Tensor]) -> Tensor:
        args, kwargs = map_tensors(call, lambda x: x)  # containers that the block may write to
        return hidden_of(functional_call(self.runner.block, dict(weights), (hidden, *args), kwargs))

    def _add(self, hidden: Tensor, target: Tensor, call: Any) -> None:
        for kind in range(min(len(self._calls), _KINDS)):
            if hidden.shape == self._shapes[kind] and equal_arguments(call, self._calls[kind]):
                break
        else:
            kind = len(self._calls)
            self._calls.append(call)
            self._shapes.append(hidden.shape)
        self._rows.append(_Row(hidden, target, kind))

    def _call(self, kind: int) -> Any:
        if kind in self._moved:
            return self._moved[kind]
        call = transfer_to_device(self._calls[kind], self.runner.device)
        # Autograd takes only copies of inference-mode tensors.
        call = map_tensors(call, lambda x: x.clone() if x.is_inference() else x)
        if kind < _KINDS:
            self._moved[kind] = call
        return call

    def _may_join(self, kind: int, pair: Sequence[int]) -> bool:
        if kind not in self._joins:

            def joined() -> Tensor:
                return self.output(pair, {})

            with full_precision():
                alone = torch.cat([self.output([row], {}) for row in pair])
                self._joins[kind] = _matches(joined, alone)
        return self._joins[kind]

    def _may_split(self, chunk: Chunk) -> bool:
        """Whether the first and the last sequence of a batch give the same output alone."""
        whole, size = chunk.call(self.runner.index, self.runner.cache)[:2], len(chunk.hidden)

        def run(hidden: Tensor, call: Any) -> Tensor:
            there = hidden.to(self.runner.device, copy=True)
            return self._run(there, transfer_to_device(call, self.runner.device), {})

        with full_precision():
            out = run(chunk.hidden, whole)
            for row in (0, size - 1):

                def alone(row: int = row) -> Tensor:
                    return run(chunk.hidden[row : row + 1], _sliced(whole, row, size))

                if not _matches(alone, out[row : row + 1]):
                    return False
        return True


def _matches(compute: Any, expected: Tensor) -> bool:
    """Whether an output is as expected up to rounding."""
    try:
        found = compute()
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return False  # arguments of another batch size were refused
    if found.shape != expected.shape:
        return False
    lost = float((found.float() - expected.float()).norm())
    return lost <= math.sqrt(torch.finfo(found.dtype).eps) * float(expected.float().norm())


def _sliced(call: Any, row: int, size: int) -> Any:
    """The arguments of one sequence of a batch: one row of each tensor whose dim 0 is the batch."""
    return map_tensors(call, lambda x: x[row : row + 1] if x.ndim and x.shape[0] == size else x)


def _place(runner: BlockRunner, chunks: Sequence[Chunk], targets: Sequence[Tensor]) -> torch.device:
    """The GPU if it has enough room: otherwise every step copies sequences to it."""
    wanted = sum(chunk.hidden.nbytes for chunk in chunks) + sum(x.nbytes for x in targets)
    return runner.device if has_room(runner.device, wanted, _RESIDENT) else runner.cache
