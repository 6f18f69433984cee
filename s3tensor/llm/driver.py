"""Prune a whole decoder-only model, block by block, each linear seeing what the pruned model gives it."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from s3tensor import prune
from s3tensor.errors import CalibrationError, ModelError, NonFiniteError, PatternError
from s3tensor.hessian import Factors, Hessian, output_error
from s3tensor.llm.calibrate import BlockRunner, Chunk, catch_chunks, check_finite
from s3tensor.llm.progress import PruneProgress
from s3tensor.llm.report import BlockRow, LinearRow, PruneReport, peak_memory
from s3tensor.llm.resume import RunFolder, fingerprint
from s3tensor.llm.structure import (
    LayerFilter,
    LinearLayer,
    Skipped,
    decoder_blocks,
    prunable_layers,
)
from s3tensor.pattern import Pattern
from s3tensor.tensor import StructuredSparseTensor

DEFAULT_ALPHA = 0.3  # best of 0.3, 0.5 and 1.0 on held-out text with SmolLM2-135M (docs/pruners.md)


@dataclass
class _Run:
    """What stays the same while a model is pruned."""

    pattern: Pattern
    pruner: str
    alpha: float
    damp: float
    options: dict[str, Any]
    device: torch.device
    cache: torch.device
    compress: bool
    dense: list[Tensor] = field(
        default_factory=list
    )  # hidden states of the dense model, if they differ

    @property
    def dense_target(self) -> bool:
        return self.alpha > 0


def prune_model(
    model: nn.Module,
    calibration: Iterable[Tensor],
    pattern: Pattern | str,
    pruner: str = "admm",
    *,
    alpha: float | None = None,
    damp: float = 0.01,
    device: torch.device | str | None = None,
    cache_device: torch.device | str = "cpu",
    blocks: int | None = None,
    filter_fn: LayerFilter | None = None,
    on_misfit: Literal["skip", "error"] = "skip",
    compress: bool = True,
    work_dir: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> PruneReport:
    """Prune the linears of every decoder block of ``model`` to ``pattern``, in place.

    Blocks are found by structure (the largest list of equal modules that holds linears). In a block,
    linears are taken in the order in which they are called; those that are given the same tensor share
    one Hessian and its factorisations. Each Hessian is measured on inputs that have passed through
    everything pruned before. ``lm_head`` and embeddings lie outside the blocks and stay as they are.

    Memory beyond the model: one dense block, one Hessian with its factors (about ``6 * in_features**2``
    floats), and on ``cache_device`` the hidden states of all calibration tokens (twice with a dense
    target) and one block's dense linear inputs.

    Args:
        model: a decoder-only language model, called as ``model(input_ids=..., use_cache=False)``.
        calibration: token ids, an iterable of (batch, tokens) int64 tensors.
        pattern: a pattern or its string.
        pruner: a name in ``s3tensor.prune.PRUNERS``.
        alpha: weight of the dense model's outputs in the target, for pruners that take one: 0 fits the
            pruned stream alone; default 0.3.
        damp: share of the mean of the Hessian's diagonal added to its diagonal.
        device: where blocks are pruned, one at a time; default is where they are.
        cache_device: where calibration activations wait.
        blocks: only the first so many blocks.
        filter_fn: ``(module, full name) -> bool``; False leaves a linear dense.
        on_misfit: a linear whose shape the pattern does not fit is reported and skipped, or refused.
        compress: leave ``StructuredSparseTensor`` parameters; else dense weights with zeros.
        work_dir: folder that receives each finished block and the CSV rows; a killed run that is
            started again with the same arguments goes on after the last finished block.
        progress: show a bar with the time left on a terminal, or one line for each block in a log.
        options: passed on to the pruner.

    Returns:
        The report, with a row for each linear and each block.

    Raises:
        ModelError: no decoder blocks, or nothing to prune in them.
        PatternError: a misfit under ``on_misfit="error"``.
        CalibrationError: unusable calibration data.
        NonFiniteError: NaN or Inf in a weight or an activation, by name of the layer.
        CheckpointError: ``work_dir`` holds another run or cannot be written.
    """
    start = time.perf_counter()
    pattern = Pattern.parse(pattern)
    prefix, found = decoder_blocks(model)
    chosen = list(found)[: _block_count(blocks, len(found))]
    plan = _plan(chosen, prefix, pattern, filter_fn, on_misfit)
    run = _settings(model, pattern, pruner, alpha, damp, device, cache_device, compress, options)
    batches = list(calibration)
    folder = None
    if work_dir is not None:
        folder = RunFolder(Path(work_dir), _resume_settings(run, model, batches, len(chosen)))
    report = PruneReport(str(pattern), pruner)
    was_training = model.training
    model.eval()
    total = sum(layer.weight.numel() for layers, _ in plan for layer in layers)
    try:
        with PruneProgress(total, len(chosen), progress) as bar:
            chunks = catch_chunks(model, chosen, batches, run.cache)
            for index, (block, (layers, skipped)) in enumerate(zip(chosen, plan, strict=True)):
                home = next(block.parameters()).device
                block.to(run.device)
                if folder is not None and folder.finished(index):
                    weights = sum(layer.weight.numel() for layer in layers)
                    row, linears = _replay(block, index, chunks, run, folder)
                    bar.advance(weights)
                    report.resumed += 1
                else:
                    row, linears, unused = _prune_block(block, index, layers, chunks, run, bar)
                    skipped = skipped + unused
                    if folder is not None:
                        folder.save(index, block, row, linears)
                    bar.block(row)
                block.to(home)
                report.blocks.append(row)
                report.linears.extend(linears)
                report.skipped.extend((s.name, s.reason) for s in skipped)
    finally:
        model.train(was_training)
    report.seconds = time.perf_counter() - start
    return report


def _block_count(wanted: int | None, present: int) -> int:
    if wanted is None:
        return present
    if not 1 <= wanted <= present:
        raise ModelError(
            f"blocks={wanted}, but the model has {present} decoder blocks; give 1 to {present}"
        )
    return wanted


def _plan(
    blocks: Sequence[nn.Module],
    prefix: str,
    pattern: Pattern,
    filter_fn: LayerFilter | None,
    on_misfit: str,
) -> list[tuple[list[LinearLayer], list[Skipped]]]:
    """What will be pruned in each block; everything that can be refused is refused here, before any work."""
    if on_misfit not in ("skip", "error"):
        raise PatternError(f"on_misfit={on_misfit!r} must be 'skip' or 'error'")
    plan = [
        prunable_layers(block, f"{prefix}.{index}", pattern, filter_fn)
        for index, block in enumerate(blocks)
    ]
    for layers, skipped in plan:
        misfits = [s for s in skipped if s.reason.startswith(str(pattern))]
        if misfits and on_misfit == "error":
            raise PatternError(f"{misfits[0].name}: {misfits[0].reason}")
        for layer in layers:
            if isinstance(layer.module.weight, StructuredSparseTensor):
                raise ModelError(f"{layer.name} is compressed already; prune the dense model")
            if not bool(torch.isfinite(layer.weight).all()):
                raise NonFiniteError(
                    f"{layer.name} has NaN or Inf in its weight; repair the model first"
                )
    if not any(layers for layers, _ in plan):
        reasons = sorted({s.reason for _, skipped in plan for s in skipped})
        raise ModelError(f"no linear of the model can be pruned to {pattern}: {reasons[0]}")
    return plan


def _settings(
    model: nn.Module,
    pattern: Pattern,
    pruner: str,
    alpha: float | None,
    damp: float,
    device: torch.device | str | None,
    cache_device: torch.device | str,
    compress: bool,
    options: dict[str, Any],
) -> _Run:
    accepts = inspect.signature(prune.get(pruner)).parameters
    takes_target = "target" in accepts
    if alpha is None:
        alpha = DEFAULT_ALPHA if takes_target else 0.0
    if not 0.0 <= alpha <= 1.0:
        raise CalibrationError(f"alpha={alpha} must be from 0 (pruned stream) to 1 (dense outputs)")
    if alpha > 0 and not takes_target:
        raise CalibrationError(
            f"pruner {pruner!r} takes no dense target; leave alpha out or use 'admm'"
        )
    unknown = sorted(set(options) - set(accepts))
    if unknown:
        known = [name for name in accepts if name not in ("weight", "hessian", "pattern")]
        raise TypeError(
            f"pruner {pruner!r} has no option {unknown[0]!r}; it has {', '.join(known)}"
        )
    where = torch.device(device) if device is not None else next(model.parameters()).device
    return _Run(pattern, pruner, alpha, damp, options, where, torch.device(cache_device), compress)


def _resume_settings(
    run: _Run, model: nn.Module, batches: list[Tensor], blocks: int
) -> dict[str, Any]:
    return {
        "pattern": run.pattern.parts,
        "pruner": run.pruner,
        "alpha": run.alpha,
        "damp": run.damp,
        "options": {name: repr(value) for name, value in sorted(run.options.items())},
        "compress": run.compress,
        "blocks": blocks,
        **fingerprint(model, batches),
    }


def _replay(
    block: nn.Module, index: int, chunks: list[Chunk], run: _Run, folder: RunFolder
) -> tuple[BlockRow, list[LinearRow]]:
    """Take a finished block from disk and move both streams past it."""
    runner = BlockRunner(block, index, run.device, run.cache)
    if run.dense_target:
        run.dense = [runner.output(c).to(run.cache) for c in _dense_stream(chunks, run)]
    row, linears = folder.load(index, block)
    for chunk in chunks:
        chunk.hidden = runner.output(chunk).to(run.cache)
    return row, linears


def _dense_stream(chunks: list[Chunk], run: _Run) -> list[Chunk]:
    """The chunks as the dense model sees them; before the first pruned block they are the same."""
    if not run.dense:
        return chunks
    return [Chunk(dense, chunk.extras) for dense, chunk in zip(run.dense, chunks, strict=True)]


def _prune_block(
    block: nn.Module,
    index: int,
    layers: list[LinearLayer],
    chunks: list[Chunk],
    run: _Run,
    bar: PruneProgress,
) -> tuple[BlockRow, list[LinearRow], list[Skipped]]:
    start = time.perf_counter()
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    bar.doing(index, "dense pass")
    runner = BlockRunner(block, index, run.device, run.cache)
    groups, unused = _groups(runner, chunks[0], layers)
    leaders = [group[0].module for group in groups]
    # One pass of the dense block gives its outputs, and with a dense target its linears' inputs.
    wanted = leaders if run.dense_target else []
    dense_out: list[Tensor] = []
    dense_inputs: list[list[Tensor]] = []
    for chunk in _dense_stream(chunks, run) if run.dense_target else chunks:
        out, inputs = runner.layer_inputs(chunk, wanted)
        check_finite(out, f"block {index}")
        dense_out.append(out.to(run.cache))
        dense_inputs.append(inputs)

    rows: list[LinearRow] = []
    masks: list[tuple[LinearLayer, Tensor]] = []
    for number, group in enumerate(groups):
        bar.doing(index, f"inputs of {_short(group)}")
        targets = [inputs[number] for inputs in dense_inputs] if run.dense_target else None
        hessian = _hessian(runner, chunks, group, targets, run)
        rows.extend(_prune_group(group, index, hessian, run, bar, masks))
    bar.doing(index, "pruned pass")
    error = _advance(runner, chunks, dense_out)
    if run.dense_target:
        run.dense = dense_out
    if run.compress:
        for layer, mask in masks:
            layer.set_weight(StructuredSparseTensor.from_dense(layer.weight, run.pattern, mask))
    solver = sum(row.seconds for row in rows)
    seconds = time.perf_counter() - start
    peak = peak_memory(run.device)
    return BlockRow(index, len(rows), error, seconds, solver, peak), rows, unused


def _groups(
    runner: BlockRunner, chunk: Chunk, layers: list[LinearLayer]
) -> tuple[list[list[LinearLayer]], list[Skipped]]:
    """Layers that share an input, in order of call, and the layers that cannot be calibrated."""
    indices = runner.input_groups(chunk, [layer.module for layer in layers])
    called = {i for group in indices for i in group}
    unused = [
        Skipped(layer.name, "it does not see every token of a sequence (never called, or routed)")
        for i, layer in enumerate(layers)
        if i not in called
    ]
    return [[layers[i] for i in group] for group in indices], unused


def _hessian(
    runner: BlockRunner,
    chunks: list[Chunk],
    group: list[LinearLayer],
    targets: list[Tensor] | None,
    run: _Run,
) -> Hessian:
    """Second moments of the group's inputs in the pruned stream, and against those of the dense one."""
    hessian = Hessian(group[0].shape[1], device=run.device)
    for number, chunk in enumerate(chunks):
        given = runner.layer_input(chunk, group[0].module)
        dense = None if targets is None else targets[number].to(run.device)
        try:
            hessian.update(given, dense)
        except NonFiniteError as error:
            raise NonFiniteError(f"{group[0].name}: {error}") from None
    return hessian


def _prune_group(
    group: list[LinearLayer],
    index: int,
    hessian: Hessian,
    run: _Run,
    bar: PruneProgress,
    masks: list[tuple[LinearLayer, Tensor]],  # appended to
) -> list[LinearRow]:
    pruner = prune.get(run.pruner)
    value = hessian.value()
    factors = Factors(value, run.damp)
    extra: dict[str, Any] = dict(run.options)
    if run.dense_target:
        extra |= {"target": hessian.cross(), "alpha": run.alpha}
    rows = []
    for layer in group:
        bar.doing(index, layer.name.rpartition(".")[2])
        start = time.perf_counter()
        weight = layer.weight
        pruned = pruner(weight, factors, run.pattern, **extra)
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        seconds = time.perf_counter() - start
        error = output_error(pruned.weight, weight, value)
        layer.copy_weight(pruned.weight)
        masks.append((layer, pruned.mask))
        row = LinearRow(
            block=index,
            name=layer.name,
            out_features=layer.shape[0],
            in_features=layer.shape[1],
            error=error,
            seconds=seconds,
            samples=hessian.samples,
            density=float(pruned.mask.float().mean()),
            peak_memory_bytes=peak_memory(run.device),
        )
        rows.append(row)
        bar.linear(row)
    return rows


def _advance(runner: BlockRunner, chunks: list[Chunk], dense_out: list[Tensor]) -> float:
    """Move the pruned stream past the block; the relative error of its output against the dense one."""
    lost = total = 0.0
    for chunk, dense in zip(chunks, dense_out, strict=True):
        out = runner.output(chunk)
        dense = dense.to(out.device)
        lost += float((out.float() - dense.float()).square().sum(dtype=torch.float64))
        total += float(dense.float().square().sum(dtype=torch.float64))
        chunk.hidden = out.to(runner.cache)
    return (lost / total) ** 0.5 if total > 0 else 0.0


def _short(group: list[LinearLayer]) -> str:
    return ", ".join(layer.name.rpartition(".")[2] for layer in group)
