"""Prune a whole decoder-only model, block by block, each linear seeing what the pruned model gives it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from s3tensor.errors import ModelError
from s3tensor.files import locked
from s3tensor.llm.budgets import (
    BUDGETS_JSON,
    Budgets,
    load_budgets,
    mixed_budgets,
    save_budgets,
)
from s3tensor.llm.calibrate import BlockRunner, Chunk
from s3tensor.llm.chain import catch_chunks
from s3tensor.llm.group import prune_group, short_names
from s3tensor.llm.moments import Moments, input_moments
from s3tensor.llm.plan import BlockPlan, Plan
from s3tensor.llm.progress import PruneProgress
from s3tensor.llm.recover import Recovered, Recovery, Target, recover_block
from s3tensor.llm.report import BlockRow, LinearRow, PeakMemory, PruneReport
from s3tensor.llm.residual import writer_moments, writers
from s3tensor.llm.resume import RunFolder
from s3tensor.llm.structure import dense_again, on_device, uncompiled, with_weights
from s3tensor.model.linear import put_parameter
from s3tensor.model.weights import LayerFilter, ModelWeight
from s3tensor.modes import neutral, ordinary_
from s3tensor.pattern import Pattern
from s3tensor.tensor.base import Compressed
from s3tensor.tensor.sparse import StructuredSparseTensor

_ROUTED = (
    "it does not see every token of a sequence (never called, routed, or with inputs of its own)"
)
_NOT_CALLED = "the calibration sequences do not call its block"


def prune_model(
    model: nn.Module,
    calibration: Iterable[Tensor],
    pattern: Pattern | str,
    pruner: str = "admm",
    *,
    alpha: float | Literal["auto"] | None = None,
    beta: float | None = None,
    damp: float | Literal["auto"] | None = None,
    device: torch.device | str | None = None,
    cache_device: torch.device | str | None = None,
    blocks: int | None = None,
    filter_fn: LayerFilter | None = None,
    on_misfit: Literal["skip", "error"] = "skip",
    compress: bool = True,
    recover: Recovery | int | None = None,
    budgets: Budgets | None = None,
    held_out: Iterable[Tensor] | None = None,
    work_dir: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> PruneReport:
    """Prune the linears of every decoder block of ``model`` to ``pattern``, in place.

    ``lm_head`` and embeddings stay dense. ``docs/pruners.md`` describes the method and its memory.

    Args:
        model: a decoder-only language model, called as ``model(input_ids=..., use_cache=False)``, on
            one device.
        calibration: token ids, an iterable of (batch, tokens) int64 tensors.
        pattern: a pattern or its string.
        pruner: a name in ``s3tensor.prune.PRUNERS``.
        alpha: weight of the dense model's outputs in the target, for pruners that take one, from 0 (the
            pruned stream alone) to 1; default 0.5. ``"auto"`` chooses it for the linears of each input on
            every eighth calibration sequence, after a fit on the others (:mod:`s3tensor.llm.auto`).
        beta: share of the residual stream's drift that the linears which write into it correct
            (:mod:`s3tensor.llm.residual`), for pruners that take one, from 0 to 1; default ``alpha``, or 0.5
            where that is chosen.
        damp: share of the mean of the Hessian's diagonal added to the diagonal. ``"auto"`` chooses it like
            alpha, which needs a dense target. Default: chosen with alpha > 0 and at least two calibration
            sequences, else 0.01.
        device: where blocks are pruned, one at a time; default is where they are.
        cache_device: where calibration activations are kept; default is ``device`` if half of its free
            memory holds them, else the CPU. The weights are the same.
        blocks: prune only the first so many blocks.
        filter_fn: ``(module, full name) -> bool``; False leaves a linear dense.
        on_misfit: whether a linear whose shape the pattern does not fit is skipped and reported, or an error.
        compress: leave ``StructuredSparseTensor`` parameters; else dense weights with zeros.
        recover: steps of recovery for each block, or a :class:`~s3tensor.llm.Recovery`: once a block is
            pruned, its kept weights, biases and norms are trained together towards the dense block's output
            on the calibration tokens. Default none.
        budgets: ``"mixed"`` keeps more than ``pattern`` in some linears and less in others, as many weights
            in all, at the least estimated error (:mod:`s3tensor.llm.budgets`); or a mapping from
            names or globs of linears (``"*.down_proj"``) to patterns, the rest get ``pattern``.
        held_out: token ids like ``calibration``; the error of each pruned linear is measured on them too.
        work_dir: folder for each finished block and the CSV rows. A run that was interrupted resumes after
            the last finished block when it is called with the same arguments, and ends with the same weights.
        progress: show a bar with the time left on a terminal, or one line for each block in a log.
        options: passed on to the pruner.

    Returns:
        The report, with a row for each linear and each block.

    Raises:
        ModelError: no decoder blocks, a model that does not run on token ids alone, blocks that do not form
            a chain, or no linear in them that can be pruned, with the reasons.
        OptionError: an option out of range; PrunerError for those of pruners and recovery.
        TypeError: an option that the pruner does not have.
        PatternError: a misfit under ``on_misfit="error"``, or impossible budgets.
        CalibrationError: unusable calibration data.
        NonFiniteError: NaN or Inf in a weight or an activation, by name of the layer.
        CheckpointError: ``work_dir`` holds another run, is in use, or cannot be written.
        torch.OutOfMemoryError: a pruner does not fit with the least working memory, or recovery with one
            sequence at a time.

    After an error or an interrupt every block is whole: finished, or dense as before.

    Warns:
        UserWarning: recovery met NaN or Inf in a block, which stays as it was pruned; there are fewer
            calibration tokens than some linear has inputs; or the model has adapters of peft.
    """
    arguments = locals()  # Plan.of takes the same ones
    start = time.perf_counter()
    with neutral():
        ordinary_(model)
        plan = Plan.of(**arguments.pop("options"), **arguments)
        planning = time.perf_counter() - start
        report = run(plan)
        report.seconds += planning
    return report


@dataclass
class _Streams:
    """The calibration tokens' hidden states on their way through the blocks, on the cache device."""

    pruned: list[Chunk]  # in the model as it is pruned so far
    dense: list[Chunk]  # in the dense model; the same until something is pruned
    held_out: list[Chunk] = field(default_factory=list)  # held-out tokens in the pruned model

    @classmethod
    def of(cls, plan: Plan) -> _Streams:
        """At the input of the first block."""
        blocks = [block.module for block in plan.blocks]
        pruned = catch_chunks(plan.model, blocks, plan.batches, plan.cache)
        dense = [chunk.twin() for chunk in pruned]
        if not plan.held_out:
            return cls(pruned, dense)
        return cls(pruned, dense, catch_chunks(plan.model, blocks, plan.held_out, plan.cache))

    def calls(self, runner: BlockRunner) -> bool:
        """Whether the tokens pass through a block."""
        return self.pruned[0].extras[runner.index] is not None


def run(plan: Plan) -> PruneReport:
    """Prune the model of a plan, in place; see :func:`prune_model` for errors and warnings."""
    start = time.perf_counter()
    report = PruneReport(str(plan.pattern), plan.pruner, outside=list(plan.outside))
    with ExitStack() as stack:
        stack.enter_context(uncompiled(plan.model))
        stack.callback(plan.model.train, plan.model.training)
        plan.model.eval()
        folder = None
        if plan.work_dir is not None:
            stack.enter_context(locked(plan.work_dir))
            folder = RunFolder(plan.work_dir, plan.settings())
        total = sum(block.weights for block in plan.blocks)
        bar = stack.enter_context(PruneProgress(total, len(plan.blocks), plan.progress))
        runners = [
            BlockRunner(block.module, index, block.name, plan.device, plan.cache)
            for index, block in enumerate(plan.blocks)
        ]
        streams = _Streams.of(plan)
        originals: dict[
            int, Tensor
        ] = {}  # dense weights that a later block shares, by id of its module
        if plan.mixed:
            mixed = _mixed_budgets(plan, runners, streams, folder, bar)
            plan = replace(plan, patterns={**plan.patterns, **mixed})
        for runner, block in zip(runners, plan.blocks, strict=True):
            report.skipped.extend((s.name, s.reason) for s in block.skipped)
            if not streams.calls(runner):
                report.skipped.extend((x.name, _NOT_CALLED) for x in block.layers)
                bar.skip(block.weights)
                continue
            _keep_originals(block, plan.blocks, originals)
            with on_device(runner.block, plan.device):
                if folder is not None and folder.finished(runner.index):
                    row, linears = _replay(runner, block, streams, folder, originals)
                    bar.resumed(block.weights)
                    report.resumed += 1
                else:
                    left = len(runners) - runner.index
                    seconds = _seconds_left(plan.recovery, report.blocks, left)
                    with dense_again(runner.block, block.layers):
                        row, linears = _prune_block(
                            runner, block, streams, plan, bar, seconds, originals
                        )
                    if folder is not None:
                        folder.save(runner.index, runner.block, row, linears)
                    bar.block(row)
            report.blocks.append(row)
            report.linears.extend(linears)
            pruned = {linear.name for linear in linears}
            report.skipped.extend((x.name, _ROUTED) for x in block.layers if x.name not in pruned)
    if not report.linears:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in _examples(report.skipped))
        raise ModelError(f"no linear of the model was pruned, which stays as it was ({reasons})")
    report.seconds = time.perf_counter() - start
    return report


def _examples(skipped: Iterable[tuple[str, str]]) -> Iterable[tuple[str, str]]:
    """The first weight that was skipped for each reason."""
    first: dict[str, str] = {}
    for name, reason in skipped:
        first.setdefault(reason, name)
    return ((name, reason) for reason, name in first.items())


def _keep_originals(
    block: BlockPlan, blocks: Sequence[BlockPlan], originals: dict[int, Tensor]
) -> None:
    """Keep, on the CPU, the weights of a block that is still dense which later blocks share."""
    own = {id(layer.parameter): layer for layer in block.layers}
    copies: dict[int, Tensor] = {}
    for later in blocks:
        for tied in later.tied:
            key = id(tied.parameter)
            if key in own:
                if key not in copies:
                    copies[key] = own[key].parameter.detach().to("cpu", copy=True)
                originals[id(tied.module)] = copies[key]


def _mixed_budgets(
    plan: Plan,
    runners: Sequence[BlockRunner],
    streams: _Streams,
    folder: RunFolder | None,
    bar: PruneProgress,
) -> Mapping[str, Pattern]:
    """The allocation of the run: what it allocated before it was interrupted, or a new one."""
    file = None if folder is None else folder.folder / BUDGETS_JSON
    if folder is not None and file is not None and folder.resumes and file.is_file():
        return load_budgets(file)
    called = [(r, b.layers) for r, b in zip(runners, plan.blocks, strict=True) if streams.calls(r)]
    runners, layers = [runner for runner, _ in called], [each for _, each in called]
    mixed = mixed_budgets(
        plan.pattern, runners, layers, streams.pruned, plan.coefficients.damp, bar.doing
    )
    if file is not None:
        save_budgets(file, mixed)
    return mixed


def _replay(
    runner: BlockRunner,
    block: BlockPlan,
    streams: _Streams,
    folder: RunFolder,
    originals: Mapping[int, Tensor],
) -> tuple[BlockRow, list[LinearRow]]:
    """Take a finished block from disk and move all streams past it."""
    state, row, linears = folder.load(runner.index, runner.block)
    with with_weights(block.tied, originals):
        for chunk in streams.dense:
            runner.advance(chunk, runner.output(chunk))
    # As in the run that wrote it, the pruned stream passes through dense weights: the same products
    # in the same order give the same bits.
    with torch.no_grad():
        for name, tensor in runner.block.state_dict().items():
            found = state[name]
            unpack = isinstance(found, Compressed) and not isinstance(tensor, Compressed)
            tensor.copy_(found.to_dense() if unpack else found)
    for chunk in (*streams.pruned, *streams.held_out):
        runner.advance(chunk, runner.output(chunk))
    shared = {id(layer.module) for layer in block.tied}
    for name, tensor in state.items():
        if isinstance(tensor, Compressed):
            owner, _, attribute = name.rpartition(".")
            parameter = nn.Parameter(tensor.to(runner.device), requires_grad=False)
            module = runner.block.get_submodule(owner)
            if id(module) not in shared:  # compressed already, with the block that was pruned
                put_parameter(module, attribute, parameter)
    for layer in block.layers:
        layer.replace(layer.parameter)
    return row, linears


def _prune_block(
    runner: BlockRunner,
    block: BlockPlan,
    streams: _Streams,
    plan: Plan,
    bar: PruneProgress,
    seconds: float | None,  # for its recovery
    originals: Mapping[int, Tensor],  # dense weights that it shares with blocks before it
) -> tuple[BlockRow, list[LinearRow]]:
    layers = block.layers
    start = time.perf_counter()
    memory = PeakMemory(plan.device)
    bar.doing(runner.index, "dense pass")
    with with_weights(block.tied, originals):
        groups = _dense_pass(runner, layers, streams, plan)
        targets: list[Tensor] = []
        if plan.recovery is not None:
            targets = _recovery_targets(runner, streams, plan.recovery.target)
    rows: list[LinearRow] = []
    masks: list[tuple[ModelWeight, Tensor]] = []
    writing: list[int] = []
    if plan.coefficients.beta > 0 and groups:
        writing = writers(runner, streams.pruned[0], [group.layers for group in groups])
    for number, group in enumerate(groups):
        bar.doing(runner.index, f"inputs of {short_names(group.layers)}")
        later = [groups[i] for i in writing if i >= number] if number in writing else []
        splits = _moments(runner, group, later, streams, plan)
        group.dense_inputs.clear()
        if splits is not None:
            held_out = None
            if streams.held_out:
                found = input_moments(runner, streams.held_out, group.layers, weigh=bool(later))
                held_out = None if found is None else found.hessian.value()
                del found
            pruned = prune_group(group.layers, runner.index, splits, held_out, plan, bar, memory)
            rows += [row for row, _, _ in pruned]
            masks += [(layer, mask) for _, layer, mask in pruned]
    bar.skip(sum(x.weight.numel() for x in layers) - sum(m.numel() for _, m in masks))
    recovered = Recovered(0, 0.0, None, None)
    if plan.recovery is not None and masks:
        bar.doing(runner.index, "recovery")
        recovered = recover_block(
            runner,
            masks,
            streams.pruned,
            targets,
            plan.recovery,
            seconds,
            plan.shared,
            lambda *step: bar.recovery(runner.index, *step),
        )
    targets.clear()
    bar.doing(runner.index, "pruned pass")
    error = _advance(runner, streams)
    if plan.compress:
        for layer, mask in masks:
            pattern = plan.patterns[layer.name]
            packed = StructuredSparseTensor.from_dense(layer.weight, pattern, mask)
            layer.replace(nn.Parameter(layer.upright(packed), requires_grad=False))
    row = BlockRow(
        block=runner.index,
        linears=len(rows),
        error=error,
        seconds=time.perf_counter() - start,
        solver_seconds=sum(row.seconds for row in rows),
        peak_memory_bytes=memory.whole(),
        recovery_steps=recovered.steps,
        recovery_seconds=recovered.seconds,
        loss_before=recovered.loss_before,
        loss_after=recovered.loss_after,
    )
    return row, rows


@dataclass
class _Group:
    """Linears of one input, and with a dense target that input in the dense model, for each chunk."""

    layers: list[ModelWeight]
    dense_inputs: list[Tensor]


def _dense_pass(
    runner: BlockRunner, layers: Sequence[ModelWeight], streams: _Streams, plan: Plan
) -> list[_Group]:
    """Move the dense stream past the block; the groups that see every token, in order of call."""
    order = runner.input_groups(streams.pruned[0], [layer.module for layer in layers])
    groups = [[layers[i] for i in group] for group in order]
    leaders = [group[0].module for group in groups]
    inputs: list[list[Tensor | None]] = [[] for _ in groups]
    for chunk in streams.dense:
        out, given = runner.layer_inputs(chunk, leaders, keep=plan.dense_target)
        runner.advance(chunk, out)
        for kept, x in zip(inputs, given, strict=True):
            kept.append(x)
    return [
        _Group(group, [x for x in kept if x is not None])
        for group, kept in zip(groups, inputs, strict=True)
        if all(x is not None for x in kept)
    ]


def _moments(
    runner: BlockRunner,
    group: _Group,
    later: Sequence[_Group],  # if it writes into the residual stream: it and the writers after it
    streams: _Streams,
    plan: Plan,
) -> list[Moments] | None:
    """The group's moments over each split of the calibration tokens; None if it does not see them all."""
    splits = []
    for split in plan.splits:
        chunks = [streams.pruned[i] for i in split]
        inputs: list[list[Tensor]] = []
        if plan.dense_target:
            inputs = [[x.dense_inputs[i] for i in split] for x in later or [group]]
        if later:
            dense = [streams.dense[i] for i in split]
            moments = writer_moments(runner, chunks, dense, [x.layers[0] for x in later], inputs)
        else:
            moments = input_moments(runner, chunks, group.layers, inputs[0] if inputs else None)
        if moments is None:
            return None
        splits.append(moments)
    return splits


def _seconds_left(recovery: Recovery | None, done: list[BlockRow], blocks: int) -> float | None:
    """One block's equal part of the recovery time that is left for so many blocks."""
    if recovery is None or recovery.seconds is None:
        return None
    spent = sum(row.recovery_seconds for row in done)
    return max(recovery.seconds - spent, 0.0) / blocks


def _recovery_targets(runner: BlockRunner, streams: _Streams, target: Target) -> list[Tensor]:
    """The outputs that recovery trains towards, for each chunk; the block is still dense."""
    targets = [chunk.hidden for chunk in streams.dense]
    if target == "mixed":
        for index, chunk in enumerate(streams.pruned):
            out = runner.output(chunk)
            targets[index] = (out + targets[index].to(out.device)).div_(2).to(runner.cache)
    return targets


def _advance(runner: BlockRunner, streams: _Streams) -> float:
    """Move the pruned streams past the block; the relative error of its output against the dense model's."""
    lost = total = 0.0
    for chunk, dense in zip(streams.pruned, streams.dense, strict=True):
        out = runner.output(chunk)
        expected = dense.hidden.to(out.device, torch.float32)
        lost += float((out.float() - expected).square().sum(dtype=torch.float64))
        total += float(expected.square().sum(dtype=torch.float64))
        runner.advance(chunk, out)
    for chunk in streams.held_out:
        runner.advance(chunk, runner.output(chunk))
    if total == 0:
        return 0.0 if lost == 0 else math.inf
    return math.sqrt(lost / total)
