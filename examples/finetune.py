"""Masked fine-tuning of a pruned language model, with and without distillation, from dense to compressed.

    python examples/finetune.py                          # on a GPU, at full size: about five minutes
    python examples/finetune.py --steps 3 --blocks 1 --samples 1 --sequences 4 --seq-len 64 --batch 1 \\
        --eval-samples 1 --out finetune-out.json   # on a CPU: under two minutes

SmolLM2-135M is pruned by the default pruner, as in demo.py. Then its pruned linears and norms train under
S3Sparse in mode ``fixed``, on the calibration topics of pydoc: by themselves, and with the dense model as a
teacher. The perplexity of development topics chooses the step whose state is kept, and the peak learning rate
if several are given. The perplexity reported is that of held-out topics, from the compressed model, saved and
reloaded. The JSON file is written after each part.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import math
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from demo import packaged_model, step
from torch import Tensor, nn

import s3tensor as s3
from s3tensor import llm
from s3tensor.io import pretrained as hf

METHODS = {"fine-tuning": 0.0, "fine-tuning + distillation": 0.5}  # share of the distillation loss


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, help="a .gguf file or Hugging Face folder [SmolLM2-135M]")
    add("--pattern", default="2:4")
    add("--pruner", default="admm")
    add("--samples", type=int, default=24, help="calibration sequences of 512 tokens [24]")
    add("--blocks", type=int, help="prune only the first so many blocks [all]")
    add("--steps", type=int, default=300)
    add("--batch", type=int, default=4, help="sequences of a step [4]")
    add("--sequences", type=int, default=61, help="training sequences [61, all there are]")
    add("--seq-len", type=int, default=1024)
    add("--rates", default="3e-5", help="peak rates to choose from, with commas [3e-5]")
    add("--eval-every", type=int, default=50, help="steps; the state of the best is kept [50]")
    add("--warm-up", type=float, default=0.1, help="share of the steps [0.1]")
    add("--temperature", type=float, default=1.0)
    add("--eval-samples", type=int, default=16, help="held-out sequences [16]")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--backend", help="of torch.compile [inductor on a GPU, aot_eager on a CPU]")
    add("--folder", type=Path, default=Path("finetune-out"), help="of the saved models; replaced")
    add("--out", type=Path, default=Path("bench/results/finetune.json"))
    return parser.parse_args()


def learning_rate(count: int, steps: int, peak: float, warm_up: float) -> float:
    """Linear warm-up, then half a cosine down to a tenth of the peak; ``count`` from 0."""
    first = max(1, round(warm_up * steps))
    if count < first:
        return peak * (count + 1) / first
    done = (count - first) / max(1, steps - first)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def autocast(device: torch.device) -> Any:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def train(
    model: nn.Module,
    teacher: nn.Module | None,
    tokens: Tensor,  # (sequences, seq_len)
    development: Tensor,
    args: argparse.Namespace,
    peak: float,
    share: float,
) -> dict[str, Any]:
    """Train what needs a gradient, and leave the state that is best on the development text.

    So few tokens are memorised: their loss keeps falling long after that of other text rises.
    """
    device = next(model.parameters()).device
    trained = [p for p in model.parameters() if p.requires_grad]
    history = [{"step": 0, "perplexity": s3.perplexity(model, development, args.seq_len)}]
    best = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(
        trained,
        peak, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    losses: list[Tensor] = []
    order = torch.empty(0, dtype=torch.int64)
    evaluating = 0.0
    start = time.perf_counter()
    for count in range(args.steps):
        while len(order) < args.batch:  # all sequences before any comes again
            order = torch.cat([order, torch.randperm(len(tokens), generator=generator)])
        rows, order = order[: args.batch], order[args.batch :]
        ids = tokens[rows].to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(count, args.steps, peak, args.warm_up)
        labels = F.pad(ids[:, 1:], (0, 1), value=-100)  # of the next token; the last has none
        with autocast(device):
            logits = model(input_ids=ids, use_cache=False).logits
        loss = (1 - share) * F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        if teacher is not None:
            with torch.no_grad(), autocast(device):
                target = teacher(input_ids=ids, use_cache=False).logits
            loss = loss + share * s3.distillation_loss(
                logits, target, temperature=args.temperature, labels=labels
            )
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if (count + 1) % args.eval_every and count + 1 < args.steps:
            continue
        losses[-1].item()  # which waits for the device
        began = time.perf_counter()
        quality = s3.perplexity(model, development, args.seq_len)
        if quality < min(row["perplexity"] for row in history):
            best = [p.detach().clone() for p in trained]
        history.append({"step": count + 1, "perplexity": quality})
        evaluating += time.perf_counter() - began
    seconds = time.perf_counter() - start - evaluating
    with torch.no_grad():
        for parameter, kept in zip(trained, best, strict=True):
            parameter.copy_(kept)
    every = torch.stack(losses).tolist()
    tenth = max(1, len(every) // 10)
    least = min(history, key=lambda row: row["perplexity"])
    return {
        "development_perplexity": least["perplexity"],
        "kept_step": least["step"],
        "history": history,
        "first_loss": sum(every[:tenth]) / tenth,
        "last_loss": sum(every[-tenth:]) / tenth,
        "ms_per_step": 1e3 * seconds / args.steps,
    }


def masked(pruned: nn.Module, names: set[str], pattern: str) -> nn.Module:
    """A copy of a pruned model in which pruned linears, under fixed masks, and norms train."""
    model = copy.deepcopy(pruned).train()
    for parameter in model.parameters():
        parameter.requires_grad_(
            parameter.ndim == 1
        )  # norms; embeddings and other linears do not train
    s3.sparsify_training_(model, pattern, "fixed", lambda _, name: name in names)
    for name in names:
        model.get_submodule(name).parametrizations.weight.original.requires_grad_()
    return model


def masks_of(model: nn.Module, names: set[str]) -> dict[str, Tensor]:
    """The mask of each pruned linear, while it trains and once it is compressed."""
    found = {}
    for name in names:
        layer = model.get_submodule(name)
        if isinstance(layer.weight, s3.StructuredSparseTensor):
            found[name] = layer.weight.mask()
        else:
            found[name] = layer.parametrizations.weight[0].mask.clone()
    return found


def finish(
    model: nn.Module,
    tokenizer: Any,
    folder: Path,
    args: argparse.Namespace,
    held_out: Tensor,
    masks: dict[str, Tensor],
) -> dict[str, Any]:
    """Finalize, save, reload and compile; what was checked."""
    device = torch.device(args.device)
    s3.finalize(model.eval())
    s3.save_pretrained(model, folder, tokenizer)
    reloaded = s3.from_pretrained(folder).to(device)
    ids = held_out[:1, : min(128, args.seq_len)].to(device)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        again = reloaded(input_ids=ids, use_cache=False).logits
    after = masks_of(reloaded, set(masks))
    found: dict[str, Any] = {
        "perplexity": s3.perplexity(reloaded, held_out, args.seq_len),
        "masks_unchanged": all(torch.equal(after[n].to(m.device), m) for n, m in masks.items()),
        "verified_weights": len(s3.verify(folder)),
        "reload_equal": bool(torch.equal(logits, again)),
    }
    backend = args.backend or ("inductor" if device.type == "cuda" else "aot_eager")
    start = time.perf_counter()
    torch._dynamo.reset()
    compiled = torch.compile(reloaded, backend=backend)
    with torch.no_grad():
        other = compiled(input_ids=ids, use_cache=False).logits
    found["compiled"] = {
        "backend": backend,
        "seconds": time.perf_counter() - start,
        "relative_difference": float((other - again).norm() / again.norm()),
    }
    return found


def main() -> None:
    args = arguments()
    device = torch.device(args.device)
    rates = [float(rate) for rate in args.rates.split(",")]
    shutil.rmtree(args.folder, ignore_errors=True)
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "versions": {
            "python": platform.python_version(),
            **{n: importlib.metadata.version(n) for n in ("torch", "transformers", "s3tensor")},
        },
        "date": time.strftime("%Y-%m-%d"),
        "settings": {
            "model": args.model.name if args.model else "SmolLM2-135M",
            **{k: v for k, v in vars(args).items() if k not in ("model", "folder", "out")},
        },
        "rows": [],
    }

    def write() -> None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    step("loading the model")
    dense, tokenizer = hf.load_model(args.model or packaged_model())
    dense = dense.to(device).eval().requires_grad_(False)

    def text(part: str, samples: int) -> Tensor:
        ids = llm.tokenize(llm.load_text("pydoc", part), tokenizer)
        return llm.windows(ids, min(samples, len(ids) // args.seq_len), args.seq_len)

    tokens = text("calibration", args.sequences)
    development = text("development", args.eval_samples)
    held_out = text("held-out", args.eval_samples)
    calibration = llm.calibration_tokens("pydoc", tokenizer, args.samples, 512)
    record["tokens"] = {"training": tokens.numel(), "held_out": held_out.numel()}
    record["dense_perplexity"] = s3.perplexity(dense, held_out, args.seq_len)
    step(f"dense {record['dense_perplexity']:.2f}; pruning to {args.pattern} by {args.pruner}")
    pruned = copy.deepcopy(dense)
    report = llm.prune_model(
        pruned, calibration, args.pattern, args.pruner, blocks=args.blocks, compress=False
    )
    names = {row.name for row in report.linears}
    record["pruned_linears"] = len(names)
    record["pruning_seconds"] = report.seconds
    record["pruned_perplexity"] = s3.perplexity(pruned, held_out, args.seq_len)
    step(f"pruned {record['pruned_perplexity']:.2f}, {len(names)} linears")
    write()

    for method, share in METHODS.items():
        best: tuple[float, nn.Module, dict[str, Any]] | None = None
        tried = []
        for peak in rates:
            model = masked(pruned, names, args.pattern)
            masks = masks_of(model, names)
            teacher = dense if share else None
            facts = train(model, teacher, tokens, development, args, peak, share)
            quality = facts["development_perplexity"]
            tried.append({"rate": peak, **facts})
            step(
                f"{method}, rate {peak:g}: development {facts['history'][0]['perplexity']:.2f} to "
                f"{quality:.2f} at step {facts['kept_step']}, loss {facts['last_loss']:.3f}"
            )
            if best is None or quality < best[0]:
                best = quality, model, {"masks": masks, **tried[-1]}
        assert best is not None
        _, model, chosen = best
        masks = chosen.pop("masks")
        folder = args.folder / method.replace(" + ", "-and-")
        found = finish(model, tokenizer, folder, args, held_out, masks)
        record["rows"].append({"method": method, **chosen, **found, "tried": tried})
        write()
        step(
            f"{method}: held-out {found['perplexity']:.2f}, masks unchanged {found['masks_unchanged']}, "
            f"reloaded equal {found['reload_equal']}, compiled within "
            f"{found['compiled']['relative_difference']:.1e}"
        )

    print(f"\n| {args.pattern}, {args.steps} steps | held-out perplexity |\n|---|---|")
    print(f"| dense | {record['dense_perplexity']:.2f} |")
    print(f"| pruned | {record['pruned_perplexity']:.2f} |")
    for row in record["rows"]:
        print(f"| {row['method']} | {row['perplexity']:.2f} |")
    if not all(row["masks_unchanged"] and row["reload_equal"] for row in record["rows"]):
        sys.exit("error: a mask changed, or a reloaded model differs")


if __name__ == "__main__":
    try:
        main()
    except s3.S3Error as error:
        sys.exit(f"error: {error}")
