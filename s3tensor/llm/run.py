"""Prune a whole decoder-only model, block by block, each linear seeing what the pruned model gives it."""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from s3tensor.errors import ModelError, NonFiniteError, PatternError
from s3tensor.files import locked
from s3tensor.llm.auto import check_options, parted, shares_of
from s3tensor.llm.budgets import (
    BUDGETS_JSON,
    Budgets,
    choices,
    load_budgets,
    mixed_budgets,
    parse_budgets,
    pattern_of,
    save_budgets,
)
from s3tensor.llm.calibrate import BlockRunner, Chunk, catch_chunks, check_batches, has_room
from s3tensor.llm.group import Run, prune_group, short_names
from s3tensor.llm.moments import Moments, input_moments
from s3tensor.llm.progress import PruneProgress
from s3tensor.llm.recover import Recovered, Recovery, recover_block, shared_parameters
from s3tensor.llm.report import BlockRow, LinearRow, PeakMemory, PruneReport
from s3tensor.llm.residual import writer_moments, writers
from s3tensor.llm.resume import RunFolder, fingerprint, tokens_digest, unfinished
from s3tensor.llm.structure import (
    LayerFilter,
    LinearLayer,
    Skipped,
    decoder_blocks,
    dense_again,
    on_device,
    prunable_layers,
)
from s3tensor.pattern import Pattern
from s3tensor.tensor.base import Compressed
from s3tensor.tensor.sparse import StructuredSparseTensor

_DIAGONAL = ("magnitude", "wanda", "obd")  # they look at the diagonal of a Hessian at most


@dataclass
class _Streams:
    """The calibration tokens' hidden states on their way through the blocks, on the cache device."""

    pruned: list[Chunk]  # in the model as it is pruned so far
    dense: list[Chunk]  # in the dense model; the same until something is pruned
    held_out: list[Chunk] = field(default_factory=list)  # held-out tokens in the pruned model


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

    Blocks are found by structure (the largest list of modules that hold linears). In a block, linears
    are taken in the order in which they are called; those that are given the same tensor share
    one Hessian and its factorisations. Each Hessian is measured on inputs that have passed through
    everything pruned before. ``lm_head`` and embeddings lie outside the blocks and stay as they are.

    Memory beyond the model: on ``device`` one dense block and what the linears of one input take (with
    ``admm`` about ``11 * in_features**2`` floats, whether or not alpha and damp are chosen), and on
    ``cache_device`` the hidden states of all calibration tokens twice and, with a dense target, one block's
    dense linear inputs. Recovery takes on ``device`` five floats for each weight of a block and what its
    backward pass keeps of ``batch`` sequences.

    Args:
        model: a decoder-only language model, called as ``model(input_ids=..., use_cache=False)``, on
            one device.
        calibration: token ids, an iterable of (batch, tokens) int64 tensors.
        pattern: a pattern or its string.
        pruner: a name in ``s3tensor.prune.PRUNERS``.
        alpha: weight of the dense model's outputs in the target, for pruners that take one: 0 fits the
            pruned stream alone; default 0.5. ``"auto"`` chooses it for the linears of each input, as the
            value that fits every eighth calibration sequence best after a fit on the others
            (:mod:`s3tensor.llm.auto`).
        beta: share of the residual stream's drift that the linears which write into it take back (see
            :mod:`s3tensor.llm.residual`), for pruners that take one; their tokens then count by the inverse
            square of their hidden states. Default ``alpha``, or 0.5 where that is chosen; 0 turns it off.
        damp: share of the mean of the Hessian's diagonal added to its diagonal. ``"auto"`` chooses it for the
            linears of each input like alpha, for pruners with a dense target. Default: chosen so where that
            can be done, with an alpha above 0 and two calibration sequences or more; else 0.01.
        device: where blocks are pruned, one at a time; default is where they are.
        cache_device: where calibration activations wait; default is ``device`` if half of its free memory
            holds them, else the CPU. The weights are the same.
        blocks: only the first so many blocks.
        filter_fn: ``(module, full name) -> bool``; False leaves a linear dense.
        on_misfit: a linear whose shape the pattern does not fit is reported and skipped, or refused.
        compress: leave ``StructuredSparseTensor`` parameters; else dense weights with zeros.
        recover: steps of recovery for each block, or a :class:`~s3tensor.llm.Recovery`: once a block
            is pruned, its kept weights, biases and norms are trained together towards the dense block's
            output on the calibration tokens. Better weights for more time; default none.
        budgets: ``"mixed"``: less and more kept than ``pattern`` says, as many weights in all, where the
            dense model's inputs tell that it costs least (see :mod:`s3tensor.llm.budgets`); or the patterns
            of single linears, by full name or by a glob such as ``"*.down_proj"``, the rest ``pattern``.
        held_out: token ids like ``calibration``, on which the error of each pruned linear is measured too.
        work_dir: folder that receives each finished block and the CSV rows; a killed run that is
            started again with the same arguments goes on after the last finished block, to the same
            weights.
        progress: show a bar with the time left on a terminal, or one line for each block in a log.
        options: passed on to the pruner.

    Returns:
        The report, with a row for each linear and each block.

    Raises:
        ModelError: no decoder blocks, nothing to prune in them, or blocks that are no chain.
        PrunerError: an unknown pruner, or a damp, an alpha or an option of recovery out of range.
        PatternError: a misfit under ``on_misfit="error"``, or budgets that cannot be.
        CalibrationError: unusable calibration data.
        NonFiniteError: NaN or Inf in a weight or an activation, by name of the layer.
        CheckpointError: ``work_dir`` holds another run, is in use, or cannot be written.
        torch.OutOfMemoryError: a pruner does not fit with the least working memory, or recovery with one
            sequence at a time.

    What breaks a run off leaves whole blocks: those that were finished, and dense ones.

    Warns:
        UserWarning: recovery met NaN or Inf in a block, which stays as it was pruned; or there are fewer
            calibration tokens than some linear has inputs.
    """
    start = time.perf_counter()
    pattern = Pattern.parse(pattern)
    check_options(pruner, alpha, damp, beta)
    prefix, found = decoder_blocks(model)
    recovery = Recovery.of(recover)
    chosen = list(found)[: _block_count(blocks, len(found))]
    where = torch.device(device) if device is not None else next(model.parameters()).device
    shares = shares_of(pruner, alpha, beta, damp, options)
    named = parse_budgets(budgets, model)
    if budgets == "mixed":
        choices(pattern)  # refused here, before any work
    wanted = partial(pattern_of, named=named, pattern=pattern)
    plan = _plan(model, chosen, prefix, wanted, filter_fn, on_misfit)
    batches, unseen = list(calibration), list(held_out or ())
    batches = check_batches(model, batches)
    parts = [list(range(len(batches)))]
    given = batches
    several = sum(len(batch) for batch in batches) > 1
    if damp is None and not several:
        shares = replace(shares, auto=shares.auto - {"damp"})
    if shares.auto:
        batches, parts = parted(batches)
    if unseen:
        unseen = check_batches(model, unseen)
    if pruner not in _DIAGONAL:
        fixed = shares.alpha > 0 and "damp" not in shares.auto
        _warn_of_few_tokens(plan, batches, may_choose=fixed and several)
    cache = (
        _cache(where, plan, [*batches, *unseen])
        if cache_device is None
        else torch.device(cache_device)
    )
    patterns = {layer.name: wanted(layer.name) for layers, _ in plan for layer in layers}
    run = Run(patterns, pruner, shares, options, where, cache, compress, recovery, parts)
    report = PruneReport(str(pattern), pruner)
    was_training = model.training
    model.eval()
    total = sum(layer.weight.numel() for layers, _ in plan for layer in layers)
    with ExitStack() as stack:
        stack.callback(model.train, was_training)
        folder = None
        goes_on = False
        if work_dir is not None:
            stack.enter_context(locked(work_dir))
            goes_on = unfinished(work_dir)
            settings = _resume_settings(
                run, model, given, unseen, plan, pattern, budgets == "mixed"
            )
            folder = RunFolder(Path(work_dir), settings)
        bar = stack.enter_context(PruneProgress(total, len(chosen), progress))
        chunks = catch_chunks(model, chosen, batches, run.cache)
        streams = _Streams(chunks, [Chunk(chunk.hidden, chunk.extras) for chunk in chunks])
        if unseen:
            streams.held_out = catch_chunks(model, chosen, unseen, run.cache)
        if budgets == "mixed":
            file = None if folder is None else folder.folder / BUDGETS_JSON
            if file is not None and goes_on and file.is_file():
                mixed = load_budgets(file)
            else:
                mixed = mixed_budgets(
                    pattern,
                    chosen,
                    prefix,
                    [layers for layers, _ in plan],
                    chunks,
                    device=where,
                    cache=cache,
                    damp=shares.damp,
                    told=bar.doing,
                )
                if file is not None:
                    save_budgets(file.parent, mixed)
            run = replace(run, patterns={**patterns, **mixed})
        shared = shared_parameters(model, chosen)
        for index, (block, (layers, skipped)) in enumerate(zip(chosen, plan, strict=True)):
            runner = BlockRunner(block, index, f"{prefix}.{index}", run.device, run.cache)
            with on_device(block, run.device):
                if folder is not None and folder.finished(index):
                    row, linears = _replay(runner, streams, folder)
                    bar.resumed(sum(layer.weight.numel() for layer in layers))
                    report.resumed += 1
                else:
                    left = _seconds_left(recovery, report.blocks, len(chosen) - index)
                    with dense_again(block, layers):
                        row, linears = _prune_block(runner, layers, streams, run, bar, shared, left)
                    if folder is not None:
                        folder.save(index, block, row, linears)
                    bar.block(row)
            report.blocks.append(row)
            report.linears.extend(linears)
            report.skipped.extend((s.name, s.reason) for s in skipped)
            pruned = {linear.name for linear in linears}
            report.skipped.extend((x.name, _ROUTED) for x in layers if x.name not in pruned)
    report.seconds = time.perf_counter() - start
    return report


_ROUTED = "it does not see every token of a sequence (never called, or routed)"


def _block_count(wanted: int | None, present: int) -> int:
    if wanted is None:
        return present
    if not 1 <= wanted <= present:
        raise ModelError(
            f"blocks={wanted}, but the model has {present} decoder blocks; give 1 to {present}"
        )
    return wanted


_Plan = list[tuple[list[LinearLayer], list[Skipped]]]  # for each block


def _plan(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    prefix: str,
    pattern: Callable[[str], Pattern],  # by the full name of a linear
    filter_fn: LayerFilter | None,
    on_misfit: str,
) -> _Plan:
    """What will be pruned in each block; everything that can be refused is refused here, before any work."""
    if on_misfit not in ("skip", "error"):
        raise PatternError(f"on_misfit={on_misfit!r} must be 'skip' or 'error'")
    _check_placed(model)
    plan: _Plan = []
    owners: dict[int, str] = {}  # the first linear of each parameter, by id
    for index, block in enumerate(blocks):
        layers, skipped = prunable_layers(block, f"{prefix}.{index}", pattern, filter_fn)
        misfits = [s for s in skipped if s.misfit]
        if misfits and on_misfit == "error":
            raise PatternError(f"{misfits[0].name}: {misfits[0].reason}")
        mine = []
        for layer in layers:
            owner = owners.setdefault(id(layer.module.weight), layer.name)
            if owner == layer.name:
                _check_weight(layer)
                mine.append(layer)
            else:
                skipped.append(Skipped(layer.name, f"it shares its weight with {owner}"))
        plan.append((mine, skipped))
    if not any(layers for layers, _ in plan):
        reasons = sorted({s.reason for _, skipped in plan for s in skipped})
        raise ModelError(f"no linear of the model can be pruned to {pattern('')}: {reasons[0]}")
    return plan


def _warn_of_few_tokens(plan: _Plan, batches: list[Tensor], may_choose: bool) -> None:
    tokens = sum(batch.numel() for batch in batches)
    layers = [layer for layers, _ in plan for layer in layers]
    widest = max(layers, key=lambda layer: layer.shape[1])
    if tokens < widest.shape[1]:
        remedy = (
            "Calibrate on more, or let damp='auto' choose" if may_choose else "Calibrate on more"
        )
        warnings.warn(
            f"{tokens} calibration tokens for {widest.name}, which has {widest.shape[1]} in_features: with "
            f"fewer tokens than inputs weights are fitted to these tokens alone. {remedy}; held_out= tells "
            "the error on other tokens",
            stacklevel=3,
        )


def _check_placed(model: nn.Module) -> None:
    """Refuse a model whose parameters are elsewhere than on one device."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or next(iter(devices)).type == "meta":
        places = ", ".join(sorted(str(device) for device in devices))
        raise ModelError(
            f"the model lies on {places}; load it on one device, such as the CPU, and let device= say "
            "where its blocks are pruned, one at a time"
        )


def _check_weight(layer: LinearLayer) -> None:
    if isinstance(layer.module.weight, Compressed):
        raise ModelError(f"{layer.name} is compressed already; prune the dense model")
    if not bool(torch.isfinite(layer.weight).all()):
        raise NonFiniteError(f"{layer.name} has NaN or Inf in its weight; repair the model first")


def _cache(device: torch.device, plan: _Plan, batches: list[Tensor]) -> torch.device:
    """The device itself where there is room for the streams and a block's dense inputs, else the CPU.

    Through the CPU and back, activations take several times as long as all that is computed from them.
    """
    blocks = [[layer.weight for layer in layers] for layers, _ in plan if layers]
    widths = [sum(weight.shape[1] for weight in weights) for weights in blocks]
    hidden = max(weight.shape[1] for weights in blocks for weight in weights)  # or what is wider
    tokens = sum(batch.numel() for batch in batches)
    nbytes = tokens * (max(widths) + 4 * hidden) * blocks[0][0].element_size()
    return device if has_room(device, nbytes, 0.5) else torch.device("cpu")


def _resume_settings(
    run: Run,
    model: nn.Module,
    batches: list[Tensor],  # as they were given
    unseen: list[Tensor],
    plan: _Plan,
    pattern: Pattern,
    mixed: bool,
) -> dict[str, Any]:
    others = {name: p.parts for name, p in sorted(run.patterns.items()) if p != pattern}
    names = "\n".join(layer.name for layers, _ in plan for layer in layers)
    return {
        "pattern": pattern.parts,
        "budgets": "mixed" if mixed else others or None,
        "pruner": run.pruner,
        "alpha": "auto" if "alpha" in run.shares.auto else run.shares.alpha,
        "beta": run.shares.beta,
        "damp": "auto" if "damp" in run.shares.auto else run.shares.damp,
        "options": {name: repr(value) for name, value in sorted(run.options.items())},
        "compress": run.compress,
        "recover": None if run.recovery is None else asdict(run.recovery),
        "blocks": len(plan),
        "linears": hashlib.sha256(names.encode()).hexdigest(),
        "held_out": tokens_digest(unseen) if unseen else None,
        **fingerprint(model, batches),
    }


def _replay(
    runner: BlockRunner, streams: _Streams, folder: RunFolder
) -> tuple[BlockRow, list[LinearRow]]:
    """Take a finished block from disk and move both streams past it."""
    state, row, linears = folder.load(runner.index, runner.block)
    for chunk in streams.dense:
        chunk.hidden = runner.output(chunk).to(runner.cache)
    # As in the run that wrote it, the pruned stream passes through dense weights: the same products
    # in the same order give the same bits.
    with torch.no_grad():
        for name, tensor in runner.block.state_dict().items():
            found = state[name]
            unpack = isinstance(found, Compressed) and not isinstance(tensor, Compressed)
            tensor.copy_(found.to_dense() if unpack else found)
    for chunk in (*streams.pruned, *streams.held_out):
        chunk.hidden = runner.output(chunk).to(runner.cache)
    for name, tensor in state.items():
        if isinstance(tensor, Compressed):
            owner, _, attribute = name.rpartition(".")
            parameter = nn.Parameter(tensor.to(runner.device), requires_grad=False)
            setattr(runner.block.get_submodule(owner), attribute, parameter)
    return row, linears


def _prune_block(
    runner: BlockRunner,
    layers: list[LinearLayer],
    streams: _Streams,
    run: Run,
    bar: PruneProgress,
    shared: set[int],  # ids of parameters that are not this block's alone
    seconds: float | None,  # for its recovery
) -> tuple[BlockRow, list[LinearRow]]:
    start = time.perf_counter()
    memory = PeakMemory(run.device)
    bar.doing(runner.index, "dense pass")
    groups = [
        [layers[i] for i in group]
        for group in runner.input_groups(streams.pruned[0], [layer.module for layer in layers])
    ]
    groups, dense_inputs = _dense_pass(runner, groups, streams, run)
    goals = [] if run.recovery is None else _goals(runner, streams, run.recovery)
    rows: list[LinearRow] = []
    masks: list[tuple[LinearLayer, Tensor]] = []
    writing = writers(runner, streams.pruned[0], groups) if run.shares.beta > 0 and groups else []
    for number, group in enumerate(groups):
        bar.doing(runner.index, f"inputs of {short_names(group)}")
        writes = number in writing
        later = writing[writing.index(number) :] if writes else []
        parts = _moments(runner, groups, number, later, streams, dense_inputs, run)
        dense_inputs[number].clear()
        if parts is not None:
            unseen = None
            if streams.held_out:
                found = input_moments(runner, streams.held_out, group, weigh=writes)
                unseen = None if found is None else found.hessian.value()
                del found
            rows.extend(prune_group(group, runner.index, parts, unseen, run, bar, memory, masks))
    bar.skip(sum(x.weight.numel() for x in layers) - sum(m.numel() for _, m in masks))
    recovered = Recovered(0, 0.0, None, None)
    if run.recovery is not None and masks:
        bar.doing(runner.index, "recovery")
        recovered = recover_block(
            runner,
            masks,
            streams.pruned,
            goals,
            run.recovery,
            seconds,
            shared,
            lambda *told: bar.recovery(runner.index, *told),
        )
    goals.clear()
    bar.doing(runner.index, "pruned pass")
    error = _advance(runner, streams)
    if run.compress:
        for layer, mask in masks:
            pattern = run.patterns[layer.name]
            layer.set_weight(StructuredSparseTensor.from_dense(layer.weight, pattern, mask))
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


def _moments(
    runner: BlockRunner,
    groups: Sequence[Sequence[LinearLayer]],
    number: int,  # of the group
    later: Sequence[int],  # where it writes into the residual stream: it and the writers after it
    streams: _Streams,
    dense_inputs: Sequence[Sequence[Tensor]],  # of each group, for each chunk
    run: Run,
) -> list[Moments] | None:
    """Those of a group over each part of the calibration tokens; None where it does not see them all."""
    found = []
    for part in run.parts:
        chunks = [streams.pruned[i] for i in part]
        inputs: list[list[Tensor]] = []
        if run.dense_target:
            inputs = [[dense_inputs[n][i] for i in part] for n in later or [number]]
        if later:
            dense = [streams.dense[i] for i in part]
            moments = writer_moments(runner, chunks, dense, [groups[n][0] for n in later], inputs)
        else:
            targets = inputs[0] if inputs else None
            moments = input_moments(runner, chunks, groups[number], targets)
        if moments is None:
            return None
        found.append(moments)
    return found


def _seconds_left(recovery: Recovery | None, done: list[BlockRow], blocks: int) -> float | None:
    """An even share for one block of the time that the blocks to come have for recovery."""
    if recovery is None or recovery.seconds is None:
        return None
    spent = sum(row.recovery_seconds for row in done)
    return max(recovery.seconds - spent, 0.0) / blocks


def _goals(runner: BlockRunner, streams: _Streams, recovery: Recovery) -> list[Tensor]:
    """What recovery takes the block's output to, for each chunk; the block is still dense."""
    goals = [chunk.hidden for chunk in streams.dense]
    if recovery.target == "mixed":
        for index, chunk in enumerate(streams.pruned):
            out = runner.output(chunk)
            goals[index] = (out + goals[index].to(out.device)).div_(2).to(runner.cache)
    return goals


def _dense_pass(
    runner: BlockRunner, groups: list[list[LinearLayer]], streams: _Streams, run: Run
) -> tuple[list[list[LinearLayer]], list[list[Tensor]]]:
    """Move the dense stream past the block.

    Returns:
        The groups that see every token of every chunk, and for each, with a dense target, its inputs
        for every chunk.
    """
    leaders = [group[0].module for group in groups]
    caught: list[list[Tensor | None]] = [[] for _ in groups]
    for chunk in streams.dense:
        out, inputs = runner.layer_inputs(chunk, leaders, keep=run.dense_target)
        chunk.hidden = out.to(runner.cache)
        for kept, given in zip(caught, inputs, strict=True):
            kept.append(given)
    whole = [
        (group, [x for x in kept if x is not None])
        for group, kept in zip(groups, caught, strict=True)
        if all(x is not None for x in kept)
    ]
    return [group for group, _ in whole], [kept for _, kept in whole]


def _advance(runner: BlockRunner, streams: _Streams) -> float:
    """Move the pruned stream past the block; the relative error of its output against the dense model's."""
    lost = total = 0.0
    for chunk, dense in zip(streams.pruned, streams.dense, strict=True):
        out = runner.output(chunk)
        expected = dense.hidden.to(out.device, torch.float32)
        lost += float((out.float() - expected).square().sum(dtype=torch.float64))
        total += float(expected.square().sum(dtype=torch.float64))
        chunk.hidden = out.to(runner.cache)
    for chunk in streams.held_out:
        chunk.hidden = runner.output(chunk).to(runner.cache)
    if total == 0:
        return 0.0 if lost == 0 else math.inf
    return math.sqrt(lost / total)
