"""Which pattern each linear gets: patterns by name, or mixed budgets over layers at an equal total."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from s3tensor.errors import CheckpointError, PatternError
from s3tensor.files import write_json
from s3tensor.llm.calibrate import BlockRunner, Chunk
from s3tensor.llm.structure import decoder_blocks, on_device
from s3tensor.mask.projection import select
from s3tensor.model.weights import ModelWeight, is_linear
from s3tensor.pattern import Pattern
from s3tensor.prune.admm import block_scale, refit
from s3tensor.prune.hessian import Factors, Hessian, output_error
from s3tensor.prune.problem import row_group
from s3tensor.prune.product import Product
from s3tensor.prune.scores import wanda

Budgets: TypeAlias = "Literal['mixed'] | Mapping[str, Pattern | str]"

BUDGETS_JSON = "budgets.json"  # in a run's folder: the allocated pattern of each linear

_ROWS = 128  # of a weight, from which its sensitivity is estimated
_BALANCE = 0.85  # the default of admm
_SLOTS = 20_000  # most sizes of the budget that the allocation distinguishes


def parse_budgets(
    budgets: Budgets | None, model: nn.Module, pattern: Pattern
) -> dict[str, Pattern] | None:
    """Patterns by full name or glob of a linear; None where no names are given.

    Raises:
        PatternError: another word than ``mixed``, ``mixed`` of a pattern without :func:`choices`, a pattern
            that does not parse, or a name that no linear of the model has.
    """
    if budgets == "mixed":
        choices(pattern)
    if budgets is None or budgets == "mixed":
        return None
    if not isinstance(budgets, Mapping):
        raise PatternError(
            f"budgets={budgets!r} must be 'mixed', or map names of linears to patterns, as in "
            "{'*.down_proj': '3:4'}"
        )
    names = [name for name, module in model.named_modules() if is_linear(module)]
    for key in budgets:
        if not any(name == key or fnmatchcase(name, key) for name in names):
            # An example from within the blocks: lm_head is not pruned.
            prefix = f"{decoder_blocks(model)[0]}." if names else ""
            within = next((name for name in reversed(names) if name.startswith(prefix)), None)
            example = f", which has {within}" if within else ""
            raise PatternError(f"budgets names {key!r}, no linear of the model{example}")
    return {key: Pattern.parse(pattern) for key, pattern in budgets.items()}


def pattern_of(name: str, named: Mapping[str, Pattern] | None, pattern: Pattern) -> Pattern:
    """The pattern of a linear: by its own name, else the first glob that it matches, else ``pattern``."""
    if not named:
        return pattern
    if name in named:
        return named[name]
    return next((named[key] for key in named if fnmatchcase(name, key)), pattern)


def choices(pattern: Pattern) -> list[Pattern]:
    """The pattern and its variants with less and more kept, in order of ``keep``, which alone differs.

    One block less and more in each scope (1:4, 2:4, 3:4); for a density, one and two fifths of its distance
    to 0 or 1, whichever is nearer, less and more.

    Raises:
        PatternError: a scope without room for another budget, such as one of two blocks.
    """
    keeps: list[int | float]
    if isinstance(pattern.keep, float):
        step = min(pattern.keep, 1.0 - pattern.keep) / 5
        keeps = [round(pattern.keep + n * step, 6) for n in (-2, -1, 1, 2)] if step > 0 else []
    else:
        blocks = math.prod(pattern.scope) if -1 not in pattern.scope else math.inf
        keeps = [n for n in (pattern.keep - 1, pattern.keep + 1) if 1 <= n < blocks]
    if not keeps:
        raise PatternError(
            f"mixed budgets need another number of kept blocks than {pattern} has, and its scope has no "
            "room for one; use a pattern such as 2:4, 4:8 or unstructured@0.5"
        )
    others = [_spelt(pattern, keep) for keep in keeps]
    return sorted([*others, pattern], key=lambda p: p.keep)


def _spelt(pattern: Pattern, keep: int | float) -> Pattern:
    """The pattern with another ``keep``, under its short name where it has one."""
    made = Pattern(pattern.view, dict(pattern.sizes), pattern.block, pattern.scope, keep)
    name = re.sub(r"[0-9]+(:[0-9]+)$|(?<=@)[0-9.]+$", rf"{keep:g}\1", pattern.name)
    try:
        named = Pattern.parse(name)
    except PatternError:
        return made
    return named if named == made else made


def kept_weights(pattern: Pattern, shape: tuple[int, int]) -> int:
    """How many weights a pattern keeps in a shape."""
    bound = pattern.bind(shape)
    return bound.keep * bound.block_size * bound.scopes


def sensitivities(
    weight: Tensor,  # (M, K)
    factors: Factors,  # of K inputs
    hessian: Tensor,  # (K, K), undamped
    patterns: Sequence[Pattern],  # that differ in ``keep`` alone
) -> list[float]:
    """Estimates of the squared relative output error of each pattern, without pruning the weight.

    From at most 128 rows, evenly spaced: the mask that ADMM starts from, the largest blocks in its scales,
    with exact weights. The Hessian is inverted once.
    """
    group = row_group(patterns[0].bind((weight.shape[0], weight.shape[1])))
    groups = len(weight) // group
    taken = min(groups, max(1, _ROWS // group))
    first = torch.arange(taken, device=weight.device) * groups // taken * group
    rows = weight[(first[:, None] + torch.arange(group, device=weight.device)).flatten()]
    rows = rows if rows.dtype == torch.float64 else rows.float()
    factors = factors.to(rows.dtype, rows.device)
    product = Product.of(patterns[0].bind((len(rows), rows.shape[1]))).to(rows.device)
    scores = (factors.clear_dead(rows) * block_scale(factors, product, _BALANCE)).square()
    losses = []
    for pattern in patterns:
        mask = select(scores, pattern.bind((len(rows), rows.shape[1])))
        losses.append(output_error(refit(rows, factors, mask), rows, hessian) ** 2)
    return losses


@torch.no_grad()
def gain(
    runner: BlockRunner,
    layer: ModelWeight,
    chunk: Chunk,  # on its way into the block
    expected: Tensor,  # the dense block's output for it
    hessian: Tensor,  # (K, K), undamped, of the linear's inputs
    pattern: Pattern,
) -> float:
    """Ratio of the squared relative error of the block's output to that of the linear which causes it.

    The block's error is relative to each token and averaged over tokens, so that a few tokens of huge
    activations do not hide the others. Measured by pruning the linear alone, by Wanda, for one pass over
    the chunk.
    """
    dense = layer.weight.clone()
    trial = wanda(dense, hessian, pattern).weight
    error = output_error(trial, dense, hessian) ** 2
    if error == 0:
        return 0.0
    try:
        layer.copy_weight(trial)
        out = runner.output(chunk)
    finally:
        layer.copy_weight(dense)
    expected = expected.to(out.device, torch.float32)
    lost = (out.float() - expected).square().sum(-1)
    whole = expected.square().sum(-1)
    least = torch.finfo(torch.float32).tiny
    return float((lost / whole.clamp_min(least)).mean(dtype=torch.float64)) / error


def allocate(
    losses: Sequence[Sequence[float]],  # for each layer and option
    costs: Sequence[Sequence[int]],  # kept weights, likewise
    uniform: Sequence[int],  # an option for each layer: the budget is what these cost together
) -> list[int]:
    """An option for each layer: the least sum of losses at a total cost of at most that of ``uniform``.

    A multiple-choice knapsack, solved exactly by dynamic programming over the budget in units of the
    costs' greatest common divisor. If that gives more than 20,000 sizes, the unit is coarser and costs are
    rounded up, so that the budget holds. ``uniform`` is returned unless another allocation is better.
    """
    least = [min(each) for each in costs]
    room = sum(each[n] for each, n in zip(costs, uniform, strict=True)) - sum(least)
    unit = math.gcd(*(c - low for each, low in zip(costs, least, strict=True) for c in each))
    unit = max(unit, -(-room // _SLOTS), 1)
    slots = room // unit
    best = torch.zeros(slots + 1, dtype=torch.float64)  # least loss so far, for each size at most
    picks = []
    for each, cost, low, common in zip(losses, costs, least, uniform, strict=True):
        found = torch.full_like(best, math.inf)
        pick = torch.zeros(slots + 1, dtype=torch.int32)
        # The common option first: it stays where others are as good.
        for option in sorted(range(len(each)), key=lambda n: (n != common, n)):
            extra = -((low - cost[option]) // unit)
            if extra > slots:
                continue
            summed = best[: slots + 1 - extra] + each[option]
            better = summed < found[extra:]
            found[extra:][better] = summed[better]
            pick[extra:][better] = option
        best = found
        picks.append((pick, cost, low))
    plain = sum(each[n] for each, n in zip(losses, uniform, strict=True))
    if not float(best[-1]) < plain * (1 - 1e-9):
        return list(uniform)
    chosen: list[int] = []
    left = slots
    for pick, cost, low in reversed(picks):
        option = int(pick[left])
        left += (low - cost[option]) // unit
        chosen.append(option)
    return chosen[::-1]


def mixed_budgets(
    pattern: Pattern,
    runners: Sequence[BlockRunner],
    layers: Sequence[Sequence[ModelWeight]],  # to prune, of each block
    chunks: Sequence[Chunk],  # the input of the first block
    damp: float,
    progress: Callable[[int, str], None],  # called with the block and what is done
) -> dict[str, Pattern]:
    """A pattern for each linear by name: ``pattern`` with less or more kept, as many weights in all.

    Minimises the sum, over linears, of the squared relative error that the pattern costs the output of the
    linear's block: :func:`sensitivities` times :func:`gain`, in one pass of the dense model over the
    calibration tokens and one of a block over a batch for each linear.
    """
    options = choices(pattern)
    stream = [chunk.twin() for chunk in chunks]
    names: list[str] = []
    losses: list[list[float]] = []
    costs: list[list[int]] = []
    for runner, linears in zip(runners, layers, strict=True):
        with on_device(runner.block, runner.device):
            progress(runner.index, "sensitivity")
            first = stream[0].twin()
            for layer, hessian, factors in _dense_hessians(runner, linears, stream, damp):
                names.append(layer.name)
                costs.append([kept_weights(option, layer.shape) for option in options])
                cost = gain(runner, layer, first, stream[0].hidden, hessian, pattern)
                found = sensitivities(layer.weight, factors, hessian, options)
                losses.append([cost * loss for loss in found])
    if not names:
        return {}
    uniform = [options.index(pattern)] * len(names)
    chosen = allocate(losses, costs, uniform)
    return {name: options[n] for name, n in zip(names, chosen, strict=True)}


def _dense_hessians(
    runner: BlockRunner, layers: Sequence[ModelWeight], stream: list[Chunk], damp: float
) -> Iterable[tuple[ModelWeight, Tensor, Factors]]:
    """Move the stream past a block; its linears that see every token, with their Hessian and factors."""
    order = runner.input_groups(stream[0], [layer.module for layer in layers]) if layers else []
    leaders = [layers[group[0]].module for group in order]
    found = [Hessian(layers[group[0]].shape[1], device=runner.device) for group in order]
    whole = [True] * len(order)
    for chunk in stream:
        out, inputs = runner.layer_inputs(chunk, leaders, keep=True)
        runner.advance(chunk, out)
        for n, given in enumerate(inputs):
            whole[n] = whole[n] and given is not None
            if given is not None:
                found[n].update(given.to(runner.device))
    for group, hessian, seen in zip(order, found, whole, strict=True):
        if seen:
            value = hessian.value()
            factors = Factors(value, damp)
            for number in group:
                yield layers[number], value, factors


def save_budgets(path: Path, patterns: Mapping[str, Pattern]) -> None:
    """Write an allocation as JSON; ``--budgets`` reads the file.

    Raises:
        CheckpointError: when it cannot be written.
    """
    write_json(path, {name: str(pattern) for name, pattern in patterns.items()})


def load_budgets(path: Path) -> dict[str, Pattern]:
    """The allocation of an interrupted run.

    Raises:
        CheckpointError: a damaged file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: Pattern.parse(text) for name, text in found.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); delete {path.parent} to start again"
        ) from None
