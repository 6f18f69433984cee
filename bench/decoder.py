"""Tokens per second of a compiled decoder with dense and with compressed weights, in one run.

    python bench/decoder.py                      # 8 layers at Qwen3-4B's shapes, on a CUDA device
    python bench/decoder.py --layers 36 --batches 1,16 --patterns 2:4,rowpair16
    python bench/decoder.py --patterns 2:4,2:4+int8      # with int8 values beside bfloat16 ones
    python bench/decoder.py --tiny               # a model of toy size, to try it on a CPU

The weights are random: speed does not depend on them. All linears of the layers are compressed, the output
head stays dense; its vocabulary is cut in the proportion of the layers, so that it has the share of the
time that it has in the whole model. One token a step, greedily, with a static cache; the step is compiled
whole and recorded in a CUDA graph. Compressed models are compiled with ``s3.inductor_options()``; the
dense one with defaults and with the same options, its linears grouped too, and the faster of these is the
rival. Rounds take turns. The file keeps rows of other batches if device, versions and settings are the same,
so that batches can be run one by one.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import DEVICE, RESULTS, device_name, integers, rows_before, versions, write_json
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM, StaticCache

import s3tensor as s3
from s3tensor.tensor.inductor import GroupLinears

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
    """A model, its cache and its step for one batch: compiled whole, and recorded in a CUDA graph."""

    def __init__(
        self, model: nn.Module, batch: int, prompt: int, length: int, options: dict[str, Any]
    ) -> None:
        self.model, self.batch, self.prompt = model, batch, prompt
        self.device = next(model.parameters()).device
        self.cache = StaticCache(config=model.config, max_cache_len=length)  # type: ignore[arg-type]
        known = inspect.signature(model.forward).parameters
        # Both names changed in the course of transformers 5.
        self.name = "cache" if "cache" in known else "past_key_values"
        self.positioned = "cache_position" in known
        self.compiled = torch.compile(self._step, fullgraph=True, options=options)
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=self.device)
        self.position = torch.zeros(1, dtype=torch.long, device=self.device)
        self.found = torch.zeros(batch, length, dtype=torch.long, device=self.device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def _forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        extra: dict[str, Any] = {self.name: self.cache, "use_cache": True}
        if self.positioned:
            extra["cache_position"] = positions
        out = self.model(input_ids=tokens, position_ids=positions[None], **extra)
        return out.logits

    def _step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self._forward(tokens, positions)[:, -1].argmax(-1, keepdim=True)

    @torch.inference_mode()
    def start(self) -> None:
        """Read a prompt, up to the first token."""
        self.cache.reset()
        tokens = torch.arange(self.batch * self.prompt, device=self.device) % 251
        positions = torch.arange(self.prompt, device=self.device)
        logits = self._forward(tokens.reshape(self.batch, self.prompt), positions)
        self.token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        self.position.fill_(self.prompt)

    def advance(self, step: Callable[[Tensor, Tensor], Tensor]) -> None:
        """One token further, all on the device."""
        self.found.index_copy_(1, self.position, self.token)
        self.token.copy_(step(self.token, self.position))
        self.position.add_(1)

    @torch.inference_mode()
    def record(self) -> None:
        """Compile, and record the compiled step in a CUDA graph where there is one."""
        self.start()
        for _ in range(3):
            self.advance(self.compiled)
        if self.device.type == "cuda":
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.advance(self.compiled)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.advance(self.compiled)

    @torch.inference_mode()
    def run(self, tokens: int, eager: bool = False) -> float:
        """Seconds for so many steps; the tokens are in ``found``."""
        self.start()
        self._wait()
        began = time.perf_counter()
        for _ in range(tokens):
            if eager:
                self.advance(self._step)
            elif self.graph is not None:
                self.graph.replay()
            else:
                self.advance(self.compiled)
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def agreement(decoder: Decoder, tokens: int) -> float:
    """Share of equal tokens of the compiled and the eager model up to the first that differs."""
    found = []
    for eager in (True, False):
        decoder.run(tokens, eager)
        found.append(decoder.found[:, decoder.prompt : decoder.prompt + tokens].clone())
    return float((found[0] == found[1]).long().cumprod(1).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--patterns", default="2:4,rowpair16")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", default="lean", choices=("lean", "fast"))
    parser.add_argument(
        "--apart", action="store_true", help="a launch for each linear, even for those of one input"
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, help="[bench/results/decoder.json]")
    args = parser.parse_args()
    torch._dynamo.config.cache_size_limit = 64  # each decoder compiles the one step for itself
    batches = integers(args.batches)

    dense = build(args.layers, args.tiny, DEVICE)
    plain: dict[str, Any] = {"triton.cudagraphs": False}
    grouped = s3.inductor_options(
        triton__cudagraphs=False,
        post_grad_custom_post_pass=GroupLinears((torch.ops.aten.mm.default,)),
    )
    models = {"dense": (dense, plain), "dense, same options": (dense, grouped)}
    sizes: dict[str, Any] = {}
    for name_of_model in args.patterns.split(","):
        pattern, _, values = name_of_model.partition("+")
        model = copy.deepcopy(dense)
        report = s3.sparsify_(model, pattern)
        held = report.bytes_after
        if values:
            held = s3.quantize_(model, values).after  # type: ignore[arg-type]
        else:
            s3.set_memory_(model, args.memory, (1, max(batches)))
        sizes[name_of_model] = {"dense": report.bytes_before, "compressed": held}
        options = {"post_grad_custom_post_pass": GroupLinears(merge=False)} if args.apart else {}
        models[name_of_model] = model, s3.inductor_options(triton__cudagraphs=False, **options)
    record: dict[str, Any] = {
        "device": device_name(),
        "versions": versions("torch", "transformers", "s3tensor"),
        "date": time.strftime("%Y-%m-%d"),
        "model": "toy" if args.tiny else "Qwen3-4B shapes, random weights",
        "layers": args.layers, "vocabulary": dense.config.vocab_size, "prompt": args.prompt,
        "tokens": args.tokens, "memory": args.memory, "apart": args.apart,
        "bytes_of_linears": sizes, "rows": [],
    }  # fmt: skip
    out = args.out or RESULTS / "decoder.json"
    record["rows"] = [row for row in rows_before(out, record) if row["batch"] not in batches]
    for batch in batches:
        length = args.prompt + args.tokens + 8
        decoders = {
            which: Decoder(model, batch, args.prompt, length, options)
            for which, (model, options) in models.items()
        }
        seconds: dict[str, list[float]] = {which: [] for which in decoders}
        agreements = {}
        for which, decoder in decoders.items():
            decoder.record()
            agreements[which] = agreement(decoder, min(args.tokens, 32))
        for _ in range(args.rounds):
            for which, decoder in decoders.items():
                seconds[which].append(decoder.run(args.tokens))
        middle = {which: statistics.median(times) for which, times in seconds.items()}
        rival = min(time for which, time in middle.items() if which.startswith("dense"))
        for which in decoders:
            row = {
                "batch": batch, "weights": which, "tokens_per_s": batch * args.tokens / middle[which],
                "ms_per_step": 1e3 * middle[which] / args.tokens, "ratio": rival / middle[which],
                "agreement": agreements[which],
            }  # fmt: skip
            record["rows"].append(row)
            print(
                f"batch {batch:>3} {which:<20} {row['tokens_per_s']:9.1f} tokens/s  "
                f"{row['ms_per_step']:7.3f} ms/step  {row['ratio']:.2f}x  compiled tokens as eager "
                f"{100 * agreements[which]:.0f} %",
                flush=True,
            )
        if not args.tiny or args.out:
            record["rows"].sort(key=lambda row: row["batch"])
            write_json(out, record)


if __name__ == "__main__":
    main()
