"""Fine-tune a pruned block towards the dense block's output, on the calibration tokens alone.

Pruners fit each linear by itself. Here all kept weights of a block, its biases and its norms are trained
together, with fixed masks, before the next block is pruned on the better hidden states.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from s3tensor.errors import PrunerError
from s3tensor.llm.calibrate import BlockRunner, Chunk
from s3tensor.llm.sequences import Sequences
from s3tensor.model.weights import ModelWeight, is_linear
from s3tensor.prune.linalg import full_precision

Target = Literal["dense", "mixed"]
Precision = Literal["auto", "float32", "bfloat16"]
OnStep = Callable[[int, int, float, float], None]  # steps, of how many, held-out loss, seconds left

_CHECKS = 8  # measurements of the held-out loss in a block, besides the first
_FLOOR = 1e-3  # a token's square counts as at least this share of the mean of its sequence


@dataclass(frozen=True)
class Recovery:
    """How pruned blocks are fine-tuned, see :func:`recover_block`.

    Attributes:
        steps: steps of Adam for each block; 0 does nothing.
        rate: largest step size, as a share of a tensor's root mean square.
        batch: calibration sequences in a step.
        seconds: time limit for all blocks together; the schedule ends early to keep it. The result then
            depends on the machine's speed: only runs without a limit repeat bit by bit.
        target: ``dense`` is the dense block's output on the dense model's hidden states; ``mixed`` the
            mean of that and of the dense block's output on the hidden states of the model pruned so far.
        norms: train the block's norms and biases too.
        held_out: share of the calibration sequences that select the best state and are not trained on.
        precision: of the products in training. ``auto`` is bfloat16 on CUDA (weights and the selection of
            the best state stay in float32), and float32 elsewhere.
        seed: of the order of the sequences.

    Raises:
        PrunerError: a setting out of range, by its name.
    """

    steps: int = 300
    rate: float = 3e-3
    batch: int = 8
    seconds: float | None = None
    target: Target = "dense"
    norms: bool = True
    held_out: float = 0.125
    precision: Precision = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if not _whole(self.steps) or self.steps < 0:
            raise PrunerError(f"recovery steps={self.steps!r} must be an integer >= 0, such as 300")
        if not 0.0 < self.rate <= 1.0:
            raise PrunerError(f"recovery rate={self.rate} must be a share > 0 and <= 1 of a weight")
        if not _whole(self.batch) or self.batch < 1:
            raise PrunerError(f"recovery batch={self.batch!r} must be an integer >= 1 of sequences")
        if self.seconds is not None and not 0.0 < self.seconds < math.inf:
            raise PrunerError(f"recovery seconds={self.seconds} must be finite and > 0, or None")
        if self.target not in get_args(Target):
            raise PrunerError(f"recovery target={self.target!r} must be 'dense' or 'mixed'")
        if not 0.0 < self.held_out <= 0.5:
            raise PrunerError(f"recovery held_out={self.held_out} must be a share > 0 and <= 0.5")
        if self.precision not in get_args(Precision):
            raise PrunerError(
                f"recovery precision={self.precision!r} must be 'auto', 'float32' or 'bfloat16'"
            )
        if not _whole(self.seed) or not 0 <= self.seed < 2**63:
            raise PrunerError(f"recovery seed={self.seed!r} must be an integer from 0 to 2**63 - 1")

    @classmethod
    def of(cls, value: Recovery | int | None) -> Recovery | None:
        """``value``, or a recovery of so many steps; ``None`` for none or 0 steps.

        Raises:
            PrunerError: steps that are not an integer >= 0.
        """
        if value is not None and not isinstance(value, Recovery):
            value = cls(steps=value)
        return value if value is not None and value.steps else None


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Recovered:
    """What recovery did to a block."""

    steps: int
    seconds: float
    loss_before: float | None  # on the held-out share; None when it was not finite
    loss_after: float | None


def shared_parameters(model: nn.Module, blocks: Sequence[nn.Module]) -> set[int]:
    """Ids of parameters that a block shares with another one or with the rest of the model."""
    inside = {id(module) for block in blocks for module in block.modules()}
    holders = [set(map(id, block.parameters())) for block in blocks]
    holders.append(
        {
            id(parameter)
            for module in model.modules()
            if id(module) not in inside
            for parameter in module.parameters(recurse=False)
        }
    )
    seen: set[int] = set()
    shared: set[int] = set()
    for held in holders:
        shared |= held & seen
        seen |= held
    return shared


def recover_block(
    runner: BlockRunner,
    masks: Sequence[tuple[ModelWeight, Tensor]],  # (out_features, in_features) bool
    chunks: Sequence[Chunk],  # the block's inputs in the model pruned so far
    targets: Sequence[Tensor],  # (batch, tokens, hidden) for each chunk, on the cache device
    recovery: Recovery,
    seconds: float | None = None,
    fixed: set[int] | frozenset[int] = frozenset(),
    on_step: OnStep | None = None,
) -> Recovered:
    """Train a pruned block, in place, so that its output comes closer to ``targets``; masks stay.

    The loss is each token's squared error relative to the square of its target, averaged over tokens.
    Adam runs on float32 copies of the kept weights of the pruned linears and, with ``recovery.norms``,
    of the parameters of one dim, at one step size relative to the root mean square of each tensor, with
    a warm-up and a cosine decay. The state of the least loss on the held-out sequences is kept; if none is
    better than the pruned block, that stays bit for bit. Weights shared with other parts of the model, and
    linears that were not pruned, do not change.

    Without a time limit, runs of the same settings on the same machine give the same bits; on CUDA if the
    block uses torch's attention and its other operators are deterministic, as in plain transformers.

    Args:
        seconds: time for this block.
        fixed: ids of parameters to leave alone, see :func:`shared_parameters`.
        on_step: called after each step.

    Raises:
        torch.OutOfMemoryError: not even one sequence at a time fits on the device.
    """
    start = time.perf_counter()
    try:
        with torch.enable_grad():
            leaves = _leaves(runner.block, masks, fixed, recovery.norms)
            tuning = _Tuning(runner, leaves, Sequences(runner, chunks, targets), recovery)
            before, after, steps = tuning.run(start, seconds, on_step)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise torch.OutOfMemoryError(
            f"recovery of {runner.name} needs more memory than {runner.device} has, with one sequence of "
            f"{targets[0].shape[1]} tokens at a time; leave recovery out, or calibrate on shorter sequences."
        ) from None
    if before is None:
        warnings.warn(
            f"recovery of {runner.name} met NaN or Inf after {steps} steps; the block stays as it was "
            "pruned: try a lower rate, or load the model in float32 or bfloat16",
            stacklevel=2,
        )
    return Recovered(steps, time.perf_counter() - start, before, after)


class _Leaf:
    """A parameter of the block in training: float32, in units of about its own root mean square.

    In these units one step size fits all tensors. The unit is a power of two: nothing is rounded.
    """

    def __init__(
        self, name: str, parameter: nn.Parameter, mask: Tensor | None, size: float
    ) -> None:
        self.name = name
        self.parameter = parameter
        unit = 2.0 ** round(math.log2(size)) if size > 0 else 1.0
        value = parameter.detach().float()
        # Zero outside the mask: neither values nor gradients pass.
        self.unit: Tensor | float = unit if mask is None else mask.float() * unit
        self.value = (value / unit).requires_grad_()

    def weight(self) -> Tensor:
        """The weight in the block's dtype and units."""
        return (self.value * self.unit).to(self.parameter.dtype)


def _leaves(
    block: nn.Module,
    masks: Sequence[tuple[ModelWeight, Tensor]],
    fixed: set[int] | frozenset[int],
    norms: bool,
) -> list[_Leaf]:
    kept = {
        id(layer.module.weight): mask.t() if layer.transposed else mask for layer, mask in masks
    }
    pruned = {id(layer.module) for layer, _ in masks}
    leaves: list[_Leaf] = []
    seen = set(fixed)
    for prefix, module in block.named_modules():
        dense = is_linear(module) and id(module) not in pruned
        for own, parameter in module.named_parameters(recurse=False):
            mask = kept.get(id(parameter))
            trains = mask is not None or (norms and parameter.ndim <= 1 and not dense)
            if not trains or id(parameter) in seen or not parameter.is_floating_point():
                continue
            seen.add(id(parameter))
            size = _size(parameter)
            if own == "bias" and isinstance(getattr(module, "weight", None), Tensor):
                size = max(size, _size(module.weight))  # biases may start at zero
            name = f"{prefix}.{own}" if prefix else own
            leaves.append(_Leaf(name, parameter, mask, size))
    return leaves


def _size(tensor: Any) -> float:
    """Root mean square of the nonzero values."""
    squares = tensor.detach().float().square()
    return math.sqrt(float(squares.sum()) / max(int(squares.count_nonzero()), 1))


class _Tuning:
    """The training of one block."""

    def __init__(
        self, runner: BlockRunner, leaves: list[_Leaf], data: Sequences, recovery: Recovery
    ) -> None:
        self.runner = runner
        self.leaves = leaves
        self.data = data
        self.recovery = recovery
        self.micro = recovery.batch  # sequences in one pass; fewer after memory runs out
        self.train, self.held_out = _split(len(data), recovery)
        self.order = _order(self.train, (recovery.seed + runner.index) % 2**63)
        low = "cuda" if recovery.precision == "auto" else runner.device.type
        self.low = recovery.precision != "float32" and runner.device.type == low
        self.token_weights = [_token_weights(data.target(index)) for index in range(len(data))]

    def run(
        self, start: float, seconds: float | None, on_step: OnStep | None
    ) -> tuple[float | None, float | None, int]:
        """Loss before, loss after and steps taken; the losses are None when they were not finite."""
        before = self.loss()
        if not math.isfinite(before):
            return None, None, 0
        steps = self.recovery.steps
        values = [leaf.value for leaf in self.leaves]
        if not steps or not values or before == 0.0:
            return before, before, 0
        adam = torch.optim.Adam(
            values, betas=(0.9, 0.95), eps=1e-10, fused=self.runner.device.type == "cuda"
        )
        best, kept, loss = before, None, before
        every = max(1, math.ceil(steps / _CHECKS))
        done = 0
        while True:
            spent = time.perf_counter() - start
            share = done / steps
            if seconds is not None:
                share = max(share, spent / seconds if seconds > 0 else 1.0)
            if done and (share >= 1.0 or done % every == 0):
                loss = self.loss()
                if not math.isfinite(loss):
                    return None, None, done
                if loss < best:
                    best, kept = loss, [value.detach().clone() for value in values]
            if done and on_step is not None:
                on_step(done, steps, loss, max(spent / share - spent, 0.0))
            if share >= 1.0:
                break
            adam.param_groups[0]["lr"] = self.recovery.rate * _schedule(share, done, steps)
            self._step(adam, values)
            done += 1
        if kept is not None:
            with torch.no_grad():
                for leaf, value in zip(self.leaves, kept, strict=True):
                    leaf.value.copy_(value)
                    leaf.parameter.copy_(leaf.weight())
        return before, best, done

    def loss(self) -> float:
        """On the held-out sequences, in the precision of the block."""
        with full_precision():
            total = self._sum(self.held_out, self._lost)
        return total / self.data.sequences(self.held_out)

    def _step(self, adam: torch.optim.Optimizer, values: list[Tensor]) -> None:
        def backward(part: list[int]) -> float:
            with torch.autocast(
                self.runner.device.type, torch.bfloat16, enabled=self.low, cache_enabled=False
            ):
                loss = self._loss(part)
            # All gradients at once: a pass that runs out of memory must not add to some of them.
            grads = torch.autograd.grad(loss, values, allow_unused=True)
            for value, grad in zip(values, grads, strict=True):
                if grad is not None:
                    value.grad = grad if value.grad is None else value.grad.add_(grad)
            return 0.0

        adam.zero_grad()
        rows = [next(self.order) for _ in range(min(self.recovery.batch, len(self.train)))]
        with _repeatable(self.runner.device):
            self._sum(rows, backward)
        adam.step()

    def _sum(self, rows: Sequence[int], work: Callable[[list[int]], float]) -> float:
        """The sum of ``work`` over rows, as many at a time as fit in memory."""
        rows = self.data.by_kind(rows)
        total, at = 0.0, 0
        while at < len(rows):
            alike = self.data.alike(rows[at : at + self.micro])
            try:
                total += work(alike)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if len(alike) == 1:
                    raise
                self.micro = (len(alike) + 1) // 2
                alike = []
            if not alike and self.runner.device.type == "cuda":
                torch.cuda.empty_cache()  # once the error has released its tensors
            at += len(alike)
        return total

    def _lost(self, rows: list[int]) -> float:
        return float(self._loss(rows))

    def _loss(self, rows: list[int]) -> Tensor:
        """The sum over rows of each one's mean relative squared error."""
        weights = {leaf.name: leaf.weight() for leaf in self.leaves}
        out = self.data.output(rows, weights)
        target = self.data.targets(rows)
        lost = (out.float() - target.float()).square().sum(-1)
        return (lost * torch.cat([self.token_weights[row] for row in rows])).mean(-1).sum()


def _split(count: int, recovery: Recovery) -> tuple[list[int], list[int]]:
    """Sequences to train on and to select by, the same for every block; fewer than 4 are used for both."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(recovery.seed)).tolist()
    held_out = round(count * recovery.held_out)
    if count < 4:
        return order, order
    held_out = max(held_out, 1)
    return sorted(order[held_out:]), sorted(order[:held_out])


def _order(rows: list[int], seed: int) -> Iterator[int]:
    """Rows in random order without end, each once in every round."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for place in torch.randperm(len(rows), generator=generator).tolist():
            yield rows[place]


def _schedule(share: float, done: int, steps: int) -> float:
    """Factor of the rate: a linear warm-up over the first twentieth of the steps, times a cosine decay."""
    warm = min(1.0, (done + 1) / max(1.0, steps / 20))
    return warm * 0.5 * (1.0 + math.cos(math.pi * share))


def _token_weights(target: Tensor) -> Tensor:
    """One over the square of each token's target, (rows, tokens), float32; bounded for those near zero."""
    squares = target.float().square().sum(-1)
    least = _FLOOR * squares.mean() + torch.finfo(torch.float32).tiny
    return squares.clamp_min(least).reciprocal()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on any device."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(
        error
    )


class _Repeatable(TorchFunctionMode):
    """Attention whose backward pass on CUDA gives the same bits every time.

    By default it sums in whatever order thread blocks end. Only torch's flag of deterministic algorithms
    changes that, under which cuBLAS is refused unless the environment was set before the first product of
    the process. So the flag is up only while that pass is launched.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mode = torch.get_deterministic_debug_mode()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is functional.scaled_dot_product_attention:
            node = out.grad_fn
            for _ in range(3):  # the output may be a slice of the kernel's
                if node and "ScaledDotProduct" in node.name():
                    node.register_prehook(self._raise)
                    node.register_hook(self._lower)
                    break
                node = node.next_functions[0][0] if node and node.next_functions else None
        return out

    def _raise(self, grads: Any) -> None:
        torch.set_deterministic_debug_mode("error")

    def _lower(self, *grads: Any) -> None:
        torch.set_deterministic_debug_mode(self.mode)


@contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """Make training passes on CUDA repeat bit by bit, with torch's attention."""
    if device.type != "cuda":
        yield
        return
    fixed = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    mode = _Repeatable()
    try:
        with sdpa_kernel(fixed), mode:  # cuDNN's is never deterministic
            yield
    finally:
        mode._lower()  # after an error in the backward pass
