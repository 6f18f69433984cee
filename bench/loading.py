"""Memory of loading a model with transformers: dense, compressed, and compressed after a dense load.

    python bench/loading.py               # a random Llama of 0.3 B parameters on a CPU, two minutes
    python bench/loading.py --layers 48   # a larger one

Each way runs in a process of its own (Linux). *Peak* is the most memory that the process held, less what it
held before: ``private`` is memory that no file backs, sampled every 2 ms; ``with files`` is the kernel's own
high-water mark, which also counts the mapped pages of the weights' files, read at first use. So the peak is
taken twice: of loading alone, and of loading and one pass over 16 tokens. All ways must give the same logits,
to the rounding of bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import RESULTS, device_name, versions, write_json

import s3tensor as s3
from s3tensor.io import pretrained as hf

WAYS = {
    "dense": "AutoModelForCausalLM, dense files",
    "compressed": "AutoModelForCausalLM, compressed files",
    "verified": "s3tensor.from_pretrained, every checksum verified",
    "afterwards": "the first, then sparsify_",
}
KINDS = ("private", "with_files")
MB = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--out", type=Path, default=RESULTS / "loading.json")
    parser.add_argument(
        "--load", nargs=3, metavar=("WAY", "FOLDER", "PATTERN"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.load:
        print(json.dumps(measured(args.load[0], Path(args.load[1]), args.load[2])))
        return

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = made(args.layers, args.pattern, folder)
        rows = {way: in_a_process(way, folder, args.pattern) for way in WAYS}
        expected = torch.load(folder / "dense.pt")
        for way in WAYS:
            torch.testing.assert_close(
                torch.load(folder / f"{way}.pt"), expected, rtol=5e-2, atol=5e-2
            )
    result = {
        "model": model,
        "pattern": args.pattern,
        "rows": rows,
        "device": device_name("cpu"),
        **versions("torch", "transformers", "safetensors"),
        "date": time.strftime("%Y-%m-%d"),
    }
    print(f"{model['parameters'] / 1e6:.0f} M parameters in bfloat16, {args.pattern}; MB")
    print(f"{'':60}{'':8}{'peak of loading':>20}{'and of one pass':>20}")
    print(f"{'way':60}{'held':>8}" + f"{'private':>9}{'with files':>11}" * 2 + f"{'seconds':>9}")
    for way, row in rows.items():
        sizes = [row[f"{when}_{kind}"] for when in ("load", "run") for kind in KINDS]
        cells = "".join(f"{size / MB:{9 + 2 * (n % 2)}.0f}" for n, size in enumerate(sizes))
        print(f"{WAYS[way]:60}{row['held'] / MB:8.0f}{cells}{row['seconds']:9.2f}")
    write_json(args.out, result)


def made(layers: int, pattern: str, folder: Path) -> dict[str, Any]:
    """Write one random model twice: dense with zeros, and compressed."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=8192,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    s3.sparsify_(model, pattern, filter_fn=in_a_block)
    s3.save_pretrained(model, folder / "dense", dense=True)
    s3.save_pretrained(model, folder / "compressed")
    now, dense = hf.weight_bytes(model)
    count = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": count, "layers": layers, "dense_bytes": dense, "compressed_bytes": now}


def in_a_block(module: torch.nn.Module, name: str) -> bool:
    return isinstance(module, torch.nn.Linear) and "lm_head" not in name


def in_a_process(way: str, folder: Path, pattern: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--load", way, str(folder), pattern]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{way}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measured(way: str, folder: Path, pattern: str) -> dict[str, float]:
    """Memory and seconds of loading one way."""
    place = folder / ("compressed" if way in ("compressed", "verified") else "dense")
    # Imports what loading imports, before the first reading.
    transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(
            hidden_size=8, num_hidden_layers=1, vocab_size=8, num_attention_heads=1
        )
    )
    before = memory("RssAnon"), memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    start = time.perf_counter()
    with Peak() as peak:
        if way == "verified":
            model = s3.from_pretrained(place)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype="auto")
        if way == "afterwards":
            s3.sparsify_(model, pattern, filter_fn=in_a_block)
        seconds = time.perf_counter() - start
        loading = peak.bytes - before[0], memory("VmHWM") - before[1]
        with torch.no_grad():
            tokens = torch.arange(16)[None] * 311 % 8192
            logits = model(input_ids=tokens).logits
    result = {
        "held": hf.weight_bytes(model)[0],
        "load_private": loading[0],
        "load_with_files": loading[1],
        "run_private": peak.bytes - before[0],
        "run_with_files": memory("VmHWM") - before[1],
        "seconds": round(seconds, 2),
    }
    torch.save(logits.float(), folder / f"{way}.pt")
    return result


class Peak:
    """The most private memory between entry and exit."""

    def __enter__(self) -> Peak:
        self.bytes, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            over = self._over.is_set()
            self.bytes = max(self.bytes, memory("RssAnon"))
            if over:
                return
            time.sleep(0.002)


def memory(field: str) -> int:
    """Bytes of a field of ``/proc/self/status``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status lacks {field}: this needs Linux")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
