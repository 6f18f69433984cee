"""Speed of transformers' own ``generate``, dense and compressed in one run: what a user measures.

    python bench/generate.py                                  # a Llama of 8B shape on a CUDA device
    python bench/generate.py --cells static:1:37,eager:1:37   # mode, batch and prompt of each cell
    python bench/generate.py --weights 2:4,rowpair16,2:4+int8
    python bench/generate.py --tiny                           # a model of toy size, to try it on a CPU

Weights are random: speed does not depend on them. Every linear of the layers is compressed by
``s3.sparsify_`` and nothing else is called: no CUDA graph of our own. ``eager`` is ``generate`` as it is,
``static`` passes ``cache_implementation="static"``, by which transformers compiles the step by itself, and
``config`` passes ``compile_config=s3.compile_config()`` too, for all but the dense model. ``no layers`` is
the same ``generate`` of a model that has none: the time of transformers' own loop.

For each cell: seconds of the first call, which compiles; milliseconds to the first token; milliseconds of
each further token; the most memory in use. Medians over rounds in which the models take turns; a ratio is
dense's time over that of the compressed model.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import RESULTS, versions, write_json
from torch import Tensor, nn

import s3tensor as s3

CELLS = "eager:1:37,static:1:37,config:1:37,config:1:2048,config:4:1,config:16:512"


def build(device: str, tiny: bool, layers: int | None) -> nn.Module:
    """A Llama of random weights: 8B shape in bfloat16, or of toy size in float32."""
    sizes: dict[str, Any] = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    }  # fmt: skip
    if tiny:
        sizes = {
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
        }  # fmt: skip
    if layers is not None:
        sizes["num_hidden_layers"] = layers
    config = transformers.LlamaConfig(
        **sizes, max_position_embeddings=8192, tie_word_embeddings=False, pad_token_id=0
    )
    torch.manual_seed(0)
    dtype = torch.float32 if tiny else torch.bfloat16
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = None  # random weights must not stop early
    model.generation_config.pad_token_id = 0
    return model.eval().requires_grad_(False)


def compress(model: nn.Module, weights: str) -> nn.Module:
    """In place: ``2:4`` or ``2:4+int8``."""
    pattern, _, values = weights.partition("+")
    s3.sparsify_(model, pattern)
    if values:
        s3.quantize_(model, values)  # type: ignore[arg-type]
    return model


def seconds(model: Any, tokens: Tensor, new: int, options: dict[str, Any]) -> float:
    """Wall-clock seconds of one call of ``generate`` for so many new tokens."""
    wait(tokens)
    began = time.perf_counter()
    model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, min_new_tokens=new,
        do_sample=False, **options,
    )  # fmt: skip
    wait(tokens)
    return time.perf_counter() - began


def wait(tokens: Tensor) -> None:
    if tokens.is_cuda:
        torch.cuda.synchronize()


def measure(
    models: dict[str, nn.Module], mode: str, batch: int, prompt: int, new: int, rounds: int
) -> list[dict[str, Any]]:
    """One cell: a row for each model.

    Compiled steps share code, and Dynamo looks through all that it compiled of it: so it forgets before each
    model, and the models take turns twice, the second time in reverse.
    """
    device = next(models["dense"].parameters()).device
    vocabulary = models["dense"].config.vocab_size  # type: ignore[union-attr]
    tokens = torch.randint(vocabulary, (batch, prompt), device=device)
    first: dict[str, float] = {}
    memory: dict[str, int] = {}
    firsts: dict[str, list[float]] = {name: [] for name in models}
    wholes: dict[str, list[float]] = {name: [] for name in models}
    with tempfile.TemporaryDirectory() as cache, torch._inductor.utils.fresh_cache(cache):
        for name in [*models, *reversed(models)]:
            model, again = models[name], name in first
            options: dict[str, Any] = {} if mode == "eager" else {"cache_implementation": "static"}
            if mode == "config" and name != "dense":
                options["compile_config"] = s3.compile_config()
            torch._dynamo.reset()
            model.__dict__.pop("_compiled_call", None)  # what transformers keeps of a compiled step
            took = seconds(model, tokens, new, options)
            if not again:
                first[name] = took
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
            seconds(model, tokens, new, options)
            if device.type == "cuda" and not again:
                memory[name] = torch.cuda.max_memory_allocated()
            for _ in range(rounds):
                firsts[name].append(seconds(model, tokens, 1, options))
                wholes[name].append(seconds(model, tokens, new, options))
    rows = []
    for name in models:
        start = statistics.median(firsts[name])
        step = (statistics.median(wholes[name]) - start) / (new - 1)
        rows.append(
            {
                "mode": mode, "batch": batch, "prompt": prompt,
                "weights": name, "first_call_s": first[name], "first_token_ms": 1e3 * start,
                "token_ms": 1e3 * step, "tokens_per_s": batch / step, "bytes": memory.get(name),
            }
        )  # fmt: skip
    dense = rows[0]
    for row in rows:
        row["ratio"] = dense["token_ms"] / row["token_ms"]
        row["first_token_ratio"] = dense["first_token_ms"] / row["first_token_ms"]
        row["first_call_ratio"] = row["first_call_s"] / dense["first_call_s"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="2:4,rowpair16")
    parser.add_argument("--cells", default=CELLS, help=f"mode:batch:prompt, ... [{CELLS}]")
    parser.add_argument("--new-tokens", type=int, default=65)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--no-loop", action="store_true", help="leave out the model without layers")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, help="[bench/results/generate.json]")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = {"dense": build(device, args.tiny, args.layers)}
    for weights in args.weights.split(","):
        models[weights] = compress(build(device, args.tiny, args.layers), weights)
    if not args.no_loop:
        models["no layers"] = build(device, args.tiny, 0)
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": versions("torch", "triton", "transformers", "s3tensor"),
        "date": time.strftime("%Y-%m-%d"),
        "model": "toy" if args.tiny else "Llama, 8B shape, random weights, bfloat16",
        "layers": models["dense"].config.num_hidden_layers,  # type: ignore[union-attr]
        "new_tokens": args.new_tokens, "rounds": args.rounds, "rows": [],
    }  # fmt: skip
    for cell in args.cells.split(","):
        mode, batch, prompt = cell.split(":")
        rows = measure(models, mode, int(batch), int(prompt), args.new_tokens, args.rounds)
        record["rows"] += rows
        for row in rows:
            print(
                f"{mode:<6} batch {batch:>2} prompt {prompt:>4} {row['weights']:<10} "
                f"{row['token_ms']:7.2f} ms/token {row['ratio']:.2f}x  first token "
                f"{row['first_token_ms']:7.1f} ms {row['first_token_ratio']:.2f}x  first call "
                f"{row['first_call_s']:5.1f} s",
                flush=True,
            )
        if not args.tiny or args.out:
            write_json(args.out or RESULTS / "generate.json", record)


if __name__ == "__main__":
    main()
