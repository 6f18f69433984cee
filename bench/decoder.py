"""Tokens per second of a compiled decoder with dense and with compressed weights, in one run.

    python bench/decoder.py                      # 8 layers at Qwen3-4B's shapes, on a CUDA device
    python bench/decoder.py --layers 36 --batches 1,16 --patterns 2:4,rowpair16
    python bench/decoder.py --tiny               # a model of toy size, to try it on a CPU

The weights are random: speed does not depend on them. All linears of the layers are compressed, the output
head stays dense; its vocabulary is cut in the proportion of the layers, so that it has the share of the
time that it has in the whole model. One token a step, greedily, with a static cache, the step compiled
whole (``fullgraph=True, mode="reduce-overhead"``). Rounds of dense and compressed take turns.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import inspect
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM, StaticCache

import s3tensor as s3

WHOLE_LAYERS, WHOLE_VOCABULARY = 36, 151936


def build(layers: int, tiny: bool, device: str) -> nn.Module:
    """A Qwen3 of random weights, bfloat16."""
    sizes = {
        "hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128,
    }  # fmt: skip
    vocabulary = WHOLE_VOCABULARY * layers // WHOLE_LAYERS // 64 * 64
    if tiny:
        sizes = {
            "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 32,
        }  # fmt: skip
        vocabulary = 256
    config = Qwen3Config(
        **sizes, num_hidden_layers=layers, vocab_size=vocabulary, tie_word_embeddings=False,
        max_position_embeddings=4096, eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    return model.eval()


class Decoder:
    """A model, its cache and its compiled step for one batch."""

    def __init__(self, model: nn.Module, batch: int, prompt: int, length: int) -> None:
        self.model, self.batch, self.prompt = model, batch, prompt
        self.device = next(model.parameters()).device
        self.cache = StaticCache(config=model.config, max_cache_len=length)  # type: ignore[arg-type]
        known = inspect.signature(model.forward).parameters
        # Both names changed in the course of transformers 5.
        self.name = "cache" if "cache" in known else "past_key_values"
        self.positioned = "cache_position" in known
        on_gpu = self.device.type == "cuda"
        self.compiled = torch.compile(
            self._step, fullgraph=True, mode="reduce-overhead" if on_gpu else "default"
        )

    def _forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        extra: dict[str, Any] = {self.name: self.cache, "use_cache": True}
        if self.positioned:
            extra["cache_position"] = positions
        out = self.model(input_ids=tokens, position_ids=positions[None], **extra)
        return out.logits

    def _step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self._forward(tokens, positions)[:, -1].argmax(-1, keepdim=True)

    @torch.inference_mode()
    def start(self) -> Tensor:
        """Read a prompt; the first token."""
        self.cache.reset()
        tokens = torch.arange(self.batch * self.prompt, device=self.device) % 251
        tokens = tokens.reshape(self.batch, self.prompt)
        positions = torch.arange(self.prompt, device=self.device)
        return self._forward(tokens, positions)[:, -1].argmax(-1, keepdim=True)

    @torch.inference_mode()
    def run(self, tokens: int, step: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, Tensor]:
        """Seconds for so many steps, and the tokens."""
        token = self.start()
        position = torch.tensor([self.prompt], device=self.device)
        found = [token.clone()]
        self._wait()
        began = time.perf_counter()
        for _ in range(tokens):
            token = step(token, position).clone()
            position = position + 1
            found.append(token)
        self._wait()
        return time.perf_counter() - began, torch.cat(found, 1)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def agreement(decoder: Decoder, tokens: int) -> float:
    """Share of equal tokens of the compiled and the eager model up to the first that differs."""
    _, eager = decoder.run(tokens, decoder._step)
    _, quick = decoder.run(tokens, decoder.compiled)
    same = (eager == quick).long().cumprod(1)
    return float(same.double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--patterns", default="2:4,rowpair16")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", default="lean", choices=("lean", "fast"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, help="[bench/results/decoder-DEVICE.json]")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"

    dense = build(args.layers, args.tiny, device)
    models = {"dense": dense}
    sizes: dict[str, Any] = {}
    for pattern in args.patterns.split(","):
        models[pattern] = copy.deepcopy(dense)
        report = s3.sparsify_(models[pattern], pattern)
        s3.set_memory_(models[pattern], args.memory, (1, max(map(int, args.batches.split(",")))))
        sizes[pattern] = {"dense": report.bytes_before, "compressed": report.bytes_after}
    record: dict[str, Any] = {
        "device": name,
        "versions": {
            package: importlib.metadata.version(package)
            for package in ("torch", "transformers", "s3tensor")
        },
        "date": time.strftime("%Y-%m-%d"),
        "model": "toy" if args.tiny else "Qwen3-4B shapes, random weights",
        "layers": args.layers, "vocabulary": dense.config.vocab_size, "prompt": args.prompt,
        "tokens": args.tokens, "memory": args.memory, "bytes_of_linears": sizes, "rows": [],
    }  # fmt: skip
    for batch in map(int, args.batches.split(",")):
        length = args.prompt + args.tokens + 2
        decoders = {
            which: Decoder(model, batch, args.prompt, length) for which, model in models.items()
        }
        seconds: dict[str, list[float]] = {which: [] for which in decoders}
        agreements = {}
        for which, decoder in decoders.items():
            agreements[which] = agreement(decoder, min(args.tokens, 32))
        for _ in range(args.rounds):
            for which, decoder in decoders.items():
                seconds[which].append(decoder.run(args.tokens, decoder.compiled)[0])
        for which in decoders:
            middle = statistics.median(seconds[which])
            ratio = statistics.median(seconds["dense"]) / middle
            row = {
                "batch": batch, "weights": which, "tokens_per_s": batch * args.tokens / middle,
                "ms_per_step": 1e3 * middle / args.tokens, "ratio": ratio,
                "agreement": agreements[which],
            }  # fmt: skip
            record["rows"].append(row)
            print(
                f"batch {batch:>3} {which:<10} {row['tokens_per_s']:9.1f} tokens/s  "
                f"{row['ms_per_step']:7.3f} ms/step  {ratio:.2f}x  compiled tokens as eager "
                f"{100 * agreements[which]:.0f} %",
                flush=True,
            )
    if not args.tiny or args.out:
        out = args.out or Path("bench/results") / f"decoder-{name.replace(' ', '-')}.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
